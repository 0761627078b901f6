"""Sources: earlier calls whose input a layer reads besides its own, declared by class of layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import nn

from captum_ssm.layers.call import LayerCall
from captum_ssm.layers.registry import Registry

SourceRule = Callable[[Any, Sequence[Any]], Any]
"""``source(mixer, calls)``: the earlier call whose input this layer reads too, or None."""

_SOURCES = Registry[SourceRule]("A source", "captum_ssm.layers.sources.unregister_source")


def register_source(*class_names: str) -> Callable[[SourceRule], SourceRule]:
    """Register which earlier call's input layers of these class names read besides their own.

    Only needed if a layer hands something on to later ones past the residual stream. The adapter then gets both
    inputs as the channels of one, ``x`` (B, L, 2E), its own first, and the earlier layer as ``kwargs["source"]``; a
    wire says which channels come straight from the embeddings.

    Args:
        class_names: Names of the layer's class.

    Returns:
        A decorator for ``source(mixer, calls) -> LayerCall | None``, of the layer and the mixers' calls so far.

    Raises:
        ValueError: If a name is taken; the message names its owner.
    """
    return _SOURCES.decorator(*class_names)


def unregister_source(class_name: str) -> None:
    """Remove the source of this class name.

    Raises:
        KeyError: If none is registered.
    """
    _SOURCES.remove(class_name)


def find_source(mixer: nn.Module, calls: Sequence[LayerCall]) -> LayerCall | None:
    """Return the earlier call whose input the layer reads too, or None.

    Args:
        mixer: The layer.
        calls: The calls of mixers so far.
    """
    rule = _SOURCES.of_class(mixer)
    return None if rule is None else rule(mixer, calls)
