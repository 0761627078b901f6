"""Which classes of layers mix tokens, and the adapter that decomposes each."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.fx
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
    parts: tuple[str, ...]


_ADAPTERS = Registry[_Registered]("An adapter", "captum_ssm.unregister")


def register(
    *classes: type[nn.Module] | str, kernel: str = "", family: str = "", parts: Sequence[str] = ()
) -> Callable[[Adapter], Adapter]:
    """Register an adapter for layers of these classes, and of classes derived from them.

    Args:
        classes: The layer's class; or its name, ``"Mamba"``; or its name with that of its module, or of a package
            around it, in front: ``"mamba_ssm.Mamba"``. The class itself counts before its names, and a longer name
            before a shorter one, so that libraries may have different classes of one name.
        kernel: How the layer mixes tokens, for :func:`supported`.
        family: The model type that has these layers, for :func:`supported`.
        parts: Names of attributes that the layer must have to be one of these: for a common name.

    Returns:
        A decorator for ``decompose(mixer, x, kwargs) -> Chain``. The function gets the layer, its input
        ``x`` (B, L, E) in at least float32, and the call's other arguments by their parameter names. It
        returns the layer as a :class:`~captum_ssm.operators.Chain` whose gates are those of this input. It
        must not change the layer or detach ``x``. It may run a submodule that projects each token; one that reads
        ``submodule.weight`` instead is exact only for submodules that are what their weight says, without
        fine-tuning, quantisation or hooks.

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
        _ADAPTERS.refuse_taken(*classes, owner=adapter)
        for named in classes:
            layer = named.rpartition(".")[2] if isinstance(named, str) else named.__name__
            _ADAPTERS.add(named, _Registered(adapter, Support(layer, kernel, family), tuple(parts)), owner=adapter)
        return adapter

    return decorate


def unregister(cls: type[nn.Module] | str) -> None:
    """Remove the adapter of this class, or name.

    Raises:
        KeyError: If none is registered.
    """
    _ADAPTERS.remove(cls)


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
    return None if entry is None or not all(hasattr(module, part) for part in entry.parts) else entry.adapter


def known_mixers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's supported token mixers by dotted name, outermost only, in order of definition.

    A module that is shared by several layers has a name in each of them.
    """
    mixers: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        inside = any(name.startswith(f"{outer}.") or not outer for outer in mixers)
        if not inside and find_adapter(module) is not None:
            mixers[name] = module
    return mixers


def refuse_scripted(model: nn.Module) -> None:
    """Raise if the model is traced or scripted by torch.jit, or exported by torch.export.

    Raises:
        UnsupportedModelError: With the remedy.
    """
    if any(_is_exported(module) for module in model.modules()):
        raise UnsupportedModelError(
            f"{type(model).__name__} has code of torch.export, in which no layer can be seen. Explain the model that "
            "was exported."
        )
    if any(isinstance(module, torch.jit.ScriptModule) for module in model.modules()):
        raise UnsupportedModelError(
            f"{type(model).__name__} has code of torch.jit (a traced or scripted model), in which no layer can be "
            "seen. Explain the model that it was made from."
        )


def _is_exported(module: nn.Module) -> bool:
    """Whether a module is a graph of torch's operators, as an exported program is, rather than of modules."""
    if not isinstance(module, torch.fx.GraphModule):
        return False
    return any(isinstance(node.target, torch._ops.OpOverload) for node in module.graph.nodes)


def find_mixers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's supported token mixers, see :func:`known_mixers`.

    Raises:
        UnsupportedModelError: If there is none; the message lists layers that look like mixers, and those supported,
            or says that the model is traced, scripted or exported.
    """
    mixers = known_mixers(model)
    if not mixers:
        refuse_scripted(model)
        alike = sorted({type(module).__name__ for module in model.modules() if _mixes_by_its_code(module)})
        reasons = "".join(sorted({not_gated_linear(module) for module in model.modules()}))
        raise UnsupportedModelError(
            f"{type(model).__name__} has no layer that captum_ssm can decompose. Layers that look like token "
            f"mixers: {', '.join(alike) or 'none'}. {reasons}Supported: {supported_families()}. For a layer of your "
            "own, write an adapter (captum_ssm.register) and check it (captum_ssm.testing.check_adapter). "
            "ImplicitAttentionRelevance needs none: it follows every function of torch."
        )
    return mixers


_NONLINEAR = re.compile("s?LSTM|GRU|RNN")
"""Recurrent networks whose gates or states are nonlinear functions of the state before, without endings of the name."""


def not_gated_linear(module: nn.Module) -> str:
    """Return why a recurrent network has no matrices, as a sentence for a message; empty for all other modules."""
    names = [re.sub("(Layer|Cell|Base|Block)+$", "", cls.__name__) for cls in type(module).__mro__]
    if not any(_NONLINEAR.fullmatch(name) for name in names):
        return ""
    return f"{type(module).__name__} is not gated-linear: its gates read its own state, so it has no matrices. "


_MIXING = re.compile(
    r"scan|cumsum|cumprod|conv1d|fft|softmax|scaled_dot_product|recurren|attention|lstm|gru|for \w+ in range\(",
    re.IGNORECASE,
)
"""Parts of code that mixes tokens: recurrences and their kernels, convolutions, attention, loops over tokens."""


def _mixes_by_its_code(module: nn.Module) -> bool:
    """Whether the code of a module's own class, not of torch's, or of a recurrent network of torch, mixes tokens."""
    if isinstance(module, nn.RNNBase):
        return True
    if type(module).__module__.startswith("torch.") or any(_mixes_by_its_code(child) for child in module.children()):
        return False
    try:
        return _MIXING.search(inspect.getsource(type(module).forward)) is not None
    except (OSError, TypeError):  # no source is at hand
        return False
