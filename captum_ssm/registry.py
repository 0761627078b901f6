"""Which class of layer is decomposed by which adapter, by name: no model library is imported."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

from torch import Tensor, nn

from captum_ssm.errors import UnsupportedModelError
from captum_ssm.operators import Chain

Adapter = Callable[[nn.Module, Tensor, Mapping[str, Any]], Chain]
"""``decompose(mixer, x, kwargs)``: the layer, its input (B, L, E), and its other arguments by name."""


class Support(NamedTuple):
    """One class of layers that can be decomposed."""

    layer: str
    """Name of the class."""
    kernel: str
    """What mixes the tokens, such as ``"S6"`` or ``"softmax attention"``; empty if the adapter does not say."""
    family: str
    """The model type in transformers' configurations; empty if the adapter does not say."""


_ADAPTERS: dict[str, tuple[Adapter, Support]] = {}


def register(*class_names: str, kernel: str = "", family: str = "") -> Callable[[Adapter], Adapter]:
    """Register an adapter for layers of these class names, and of classes derived from them.

    Args:
        class_names: Names of the layer's class (no module path: libraries move classes about).
        kernel: What mixes the tokens, for :func:`supported`.
        family: The model type that has such layers, likewise.

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
        for name in class_names:
            if name in _ADAPTERS:
                owner, _ = _ADAPTERS[name]
                raise ValueError(
                    f"An adapter for {name!r} is already registered: {owner.__module__}.{owner.__qualname__}. "
                    f"To replace it, call captum_ssm.unregister({name!r}) first."
                )
        for name in class_names:
            _ADAPTERS[name] = adapter, Support(name, kernel, family)
        return adapter

    return decorate


def unregister(class_name: str) -> None:
    """Forget the adapter of this class name.

    Raises:
        KeyError: If none is registered.
    """
    del _ADAPTERS[class_name]


def supported() -> list[Support]:
    """Return all classes of layers that can be decomposed, by family and name.

    Example:
        >>> supported()[0]
        Support(layer='BailingHybridAttention', kernel='softmax attention', family='bailing_hybrid')
    """
    return sorted((support for _, support in _ADAPTERS.values()), key=lambda s: (not s.family, s.family, s.layer))


def supported_families() -> str:
    """Return the supported families, and the layers of none, as the messages name them."""
    return ", ".join(dict.fromkeys(support.family or support.layer for support in supported()))


def find_adapter(module: nn.Module) -> Adapter | None:
    """Return the adapter of the module's class or of the nearest class that it derives from, or None."""
    return next((_ADAPTERS[c.__name__][0] for c in type(module).__mro__ if c.__name__ in _ADAPTERS), None)


def find_mixers(model: nn.Module) -> dict[str, nn.Module]:
    """Return the model's supported token mixers by dotted name, outermost only, in order of definition.

    A module that is shared by several layers has a name in each of them.

    Raises:
        UnsupportedModelError: If there is none; the message lists what looks like one and what is supported.
    """
    mixers: dict[str, nn.Module] = {}
    for name, module in model.named_modules(remove_duplicate=False):
        inside = any(name.startswith(f"{outer}.") or not outer for outer in mixers)
        if not inside and find_adapter(module) is not None:
            mixers[name] = module
    if not mixers:
        alike = sorted({type(m).__name__ for m in model.modules() if _looks_like_mixer(type(m).__name__)})
        raise UnsupportedModelError(
            f"{type(model).__name__} has no layer that captum_ssm can decompose. Layers that look like token "
            f"mixers: {', '.join(alike) or 'none'}. Supported: {supported_families()}. For a layer of your own, "
            "write an adapter (captum_ssm.register) and check it (captum_ssm.testing.check_adapter)."
        )
    return mixers


def _looks_like_mixer(class_name: str) -> bool:
    parts = ("Mixer", "Attention", "DeltaNet", "ShortConv", "Recurrent", "Rglru", "LSTM", "GRU", "RNN", "SSM")
    return any(part in class_name for part in parts) or class_name in ("Mamba", "Mamba2", "Mamba3", "xLSTMLayer")
