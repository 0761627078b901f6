"""Which classes of layers mix tokens, and the adapter that decomposes each."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_ssm.errors import UnsupportedModelError
from captum_ssm.layers.registry import Registry
from captum_ssm.operators import Chain

Adapter = Callable[[nn.Module, Tensor, Mapping[str, Any]], Chain]
"""``decompose(mixer, x, kwargs)``: the layer, its input (B, L, E), and its other arguments by name."""


class Support(NamedTuple):
    """One class of layers that can be decomposed."""

    layer: str
    """Name of the class."""
    kernel: str
    """How the layer mixes tokens, such as ``"S6"`` or ``"softmax attention"``; empty if the adapter does not say."""
    family: str
    """The model type in transformers' configurations; empty if the adapter does not say."""


class _Registered(NamedTuple):
    adapter: Adapter
    support: Support


_ADAPTERS = Registry[_Registered]("An adapter", "captum_ssm.unregister")


def register(*class_names: str, kernel: str = "", family: str = "") -> Callable[[Adapter], Adapter]:
    """Register an adapter for layers of these class names, and of classes derived from them.

    Args:
        class_names: Names of the layer's class (no module path: libraries move classes about).
        kernel: How the layer mixes tokens, for :func:`supported`.
        family: The model type that has these layers, for :func:`supported`.

    Returns:
        A decorator for ``decompose(mixer, x, kwargs) -> Chain``. The function gets the layer, its input
        ``x`` (B, L, E) in at least float32, and the call's other arguments by their parameter names. It
        returns the layer as a :class:`~captum_ssm.operators.Chain` whose gates are those of this input. It
        must not change the layer, run its submodules, or detach ``x``.

    Raises:
        ValueError: If a name is taken; the message names its owner.

    Example:
        >>> from captum_ssm.operators import Chain, Diagonal
        >>> @register("MyGatedLayer")
        ... def my_gated_layer(mixer, x, kwargs):
        ...     return Chain({"gate": Diagonal(x.sigmoid())})
        >>> "MyGatedLayer" in [support.layer for support in supported()]
        True
        >>> unregister("MyGatedLayer")
    """

    def decorate(adapter: Adapter) -> Adapter:
        _ADAPTERS.refuse_taken(*class_names)
        for name in class_names:
            _ADAPTERS.add(name, _Registered(adapter, Support(name, kernel, family)), owner=adapter)
        return adapter

    return decorate


def unregister(class_name: str) -> None:
    """Remove the adapter of this class name.

    Raises:
        KeyError: If none is registered.
    """
    _ADAPTERS.remove(class_name)


def supported() -> list[Support]:
    """Return all classes of layers that can be decomposed, by family and name.

    Example:
        >>> supported()[0]
        Support(layer='BailingHybridAttention', kernel='softmax attention', family='bailing_hybrid')
    """
    return sorted((entry.support for entry in _ADAPTERS.values()), key=lambda s: (not s.family, s.family, s.layer))


def supported_families() -> str:
    """Return the supported families, and the layers without a family, as messages name them."""
    return ", ".join(dict.fromkeys(support.family or support.layer for support in supported()))


def find_adapter(module: nn.Module) -> Adapter | None:
    """Return the adapter of the module's class or of the nearest class that it derives from, or None."""
    entry = _ADAPTERS.of_class(module)
    return None if entry is None else entry.adapter


def known_mixers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's supported token mixers by dotted name, outermost only, in order of definition.

    A module that is shared by several layers has a name in each of them.
    """
    mixers: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        inside = any(name.startswith(f"{outer}.") or not outer for outer in mixers)
        if not inside and _ADAPTERS.of_class(module) is not None:
            mixers[name] = module
    return mixers


def refuse_scripted(model: nn.Module) -> None:
    """Raise if the model is traced or scripted by torch.jit.

    Raises:
        UnsupportedModelError: With the remedy.
    """
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise UnsupportedModelError(
            f"{type(model).__name__} has code of torch.jit (a traced or scripted model), in which no layer can be "
            "seen. Explain the model that it was made from."
        )


def find_mixers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's supported token mixers, see :func:`known_mixers`.

    Raises:
        UnsupportedModelError: If there is none; the message lists layers that look like mixers, and those supported,
            or says that the model is traced or scripted.
    """
    mixers = known_mixers(model)
    if not mixers:
        refuse_scripted(model)
        alike = sorted({type(m).__name__ for m in model.modules() if _looks_like_mixer(type(m).__name__)})
        raise UnsupportedModelError(
            f"{type(model).__name__} has no layer that captum_ssm can decompose. Layers that look like token "
            f"mixers: {', '.join(alike) or 'none'}. Supported: {supported_families()}. For a layer of your own, "
            "write an adapter (captum_ssm.register) and check it (captum_ssm.testing.check_adapter). "
            "ImplicitAttentionRelevance needs none: it follows every function of torch."
        )
    return mixers


def _looks_like_mixer(class_name: str) -> bool:
    parts = ("Mixer", "Attention", "DeltaNet", "ShortConv", "Recurrent", "Rglru", "LSTM", "GRU", "RNN", "SSM")
    return any(part in class_name for part in parts) or class_name in ("Mamba", "Mamba2", "Mamba3", "xLSTMLayer")
