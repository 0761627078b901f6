"""Wires: the factors by which a mixer's output joins the residual stream, declared by class of block.

Which mixers follow one another, run side by side or on a branch is measured on the model's graph
(:mod:`captum_ssm.network.examination`). A graph shows no factors, so a block that has some declares them here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from captum_ssm.layers.registry import Registry


@dataclass(frozen=True)
class Wire:
    """How a mixer's output joins the residual stream: ``stream = keep * stream + write * mix(stream)``.

    Args:
        keep: Factor of the stream, a number or (B, L).
        write: Factor of the mixer's output, a number or (B, L).
        embeddings: Channels of the mixer's input that come straight from the embeddings, if any.
    """

    keep: float | Tensor = 1.0
    write: float | Tensor = 1.0
    embeddings: slice | None = None


WireRule = Callable[[Any, Any, Any], Wire]
"""``wire(block, mixer, state)``: the block, the mixer within it, and the block's input."""

_WIRES = Registry[WireRule]("A wire", "captum_ssm.unregister_wire")


def register_wire(*class_names: str) -> Callable[[WireRule], WireRule]:
    """Register how the mixers of blocks of these class names, and of derived classes, join the residual stream.

    Only needed if that is not ``x + mix(norm(x))``.

    Args:
        class_names: Names of the block's class.

    Returns:
        A decorator for ``wire(block, mixer, state) -> Wire``. The function gets the block, the mixer within it, and the
        block's input, the first argument of its ``forward``.

    Raises:
        ValueError: If a name is taken; the message names its owner.

    Example:
        >>> @register_wire("MyBlock")
        ... def my_block(block, mixer, state):
        ...     return Wire(write=block.multiplier)
        >>> unregister_wire("MyBlock")
    """
    return _WIRES.decorator(*class_names)


def unregister_wire(class_name: str) -> None:
    """Remove the wire of this class name.

    Raises:
        KeyError: If none is registered.
    """
    _WIRES.remove(class_name)


def block_name(model: nn.Module, mixer: str) -> str:
    """Return the dotted name of the innermost block around the mixer that has a wire, or ``""``."""
    parts = mixer.split(".")
    names = [".".join(parts[:depth]) for depth in range(len(parts) - 1, 0, -1)]
    return next((name for name in names if _WIRES.of_class(model.get_submodule(name)) is not None), "")


def find_wire(model: nn.Module, name: str, mixer: nn.Module, state: Tensor | None) -> Wire:
    """Return the wire of the mixer of this name; a plain residual one if its block declares none.

    Args:
        model: The model.
        name: Dotted name of the mixer.
        mixer: The mixer.
        state: Input of the block around it.
    """
    block = model.get_submodule(block_name(model, name))
    rule = _WIRES.of_class(block)
    return Wire() if rule is None else rule(block, mixer, state)
