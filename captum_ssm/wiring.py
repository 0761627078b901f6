"""How a model's mixers are wired: which of them, and the embeddings, each one reads.

A rollout multiplies matrices along the model's residual streams, so it must know them. What each mixer reads is
measured on the model's own graph (:mod:`captum_ssm.structure`): mixers one after the other, side by side, or on a
branch of their own need no declaration. What a graph cannot tell, the factors on the way, a block declares with
:func:`register_wire`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

EMBEDDINGS = -1
"""The number that stands for the embeddings among the mixers' numbers."""

Stream = frozenset[int]
"""A residual stream, named by its summands: the numbers of the mixers' calls, and :data:`EMBEDDINGS`."""


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

_WIRES: dict[str, WireRule] = {}


def register_wire(*class_names: str) -> Callable[[WireRule], WireRule]:
    """Register how the mixers of blocks of these class names, and of derived classes, join the residual stream.

    Only needed where that is not ``x + mix(norm(x))``.

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

    def decorate(rule: WireRule) -> WireRule:
        for name in class_names:
            if name in _WIRES:
                owner = _WIRES[name]
                raise ValueError(
                    f"A wire for {name!r} is already registered: {owner.__module__}.{owner.__qualname__}. "
                    f"To replace it, call captum_ssm.unregister_wire({name!r}) first."
                )
        for name in class_names:
            _WIRES[name] = rule
        return rule

    return decorate


def unregister_wire(class_name: str) -> None:
    """Forget the wire of this class name.

    Raises:
        KeyError: If none is registered.
    """
    del _WIRES[class_name]


def _rule(block: nn.Module) -> WireRule | None:
    """Return the rule of the block's class or of the nearest class that it derives from, or None."""
    return next((_WIRES[c.__name__] for c in type(block).__mro__ if c.__name__ in _WIRES), None)


def block_name(model: nn.Module, mixer: str) -> str:
    """Return the dotted name of the innermost block around the mixer that has a wire, or ``""``."""
    parts = mixer.split(".")
    names = [".".join(parts[:depth]) for depth in range(len(parts) - 1, 0, -1)]
    return next((name for name in names if _rule(model.get_submodule(name)) is not None), "")


def find_wire(model: nn.Module, name: str, mixer: nn.Module, state: Tensor | None) -> Wire:
    """Return the wire of the mixer of this name; a plain residual one if its block declares none."""
    block = model.get_submodule(block_name(model, name))
    rule = _rule(block)
    return Wire() if rule is None else rule(block, mixer, state)


SourceRule = Callable[[Any, Sequence[Any]], Any]
"""``source(mixer, calls)``: the earlier call whose input this layer reads too, or None."""

_SOURCES: dict[str, SourceRule] = {}


def register_source(*class_names: str) -> Callable[[SourceRule], SourceRule]:
    """Register which earlier call's input layers of these class names read besides their own.

    Only needed where a layer hands something on to later ones past the residual stream. The adapter then gets both
    inputs as the channels of one, ``x`` (B, L, 2E), its own first, and the earlier layer as ``kwargs["source"]``; a
    wire says which channels come straight from the embeddings.

    Args:
        class_names: Names of the layer's class.

    Returns:
        A decorator for ``source(mixer, calls) -> MixerCall | None``, of the layer and the mixers' calls so far.

    Raises:
        ValueError: If a name is taken; the message names its owner.
    """

    def decorate(rule: SourceRule) -> SourceRule:
        for name in class_names:
            if name in _SOURCES:
                owner = _SOURCES[name]
                raise ValueError(
                    f"A source for {name!r} is already registered: {owner.__module__}.{owner.__qualname__}."
                )
            _SOURCES[name] = rule
        return rule

    return decorate


def find_source(mixer: nn.Module, calls: Sequence[Any]) -> Any:
    """Return the earlier call whose input the layer reads too, or None."""
    rule = next((_SOURCES[c.__name__] for c in type(mixer).__mro__ if c.__name__ in _SOURCES), None)
    return None if rule is None else rule(mixer, calls)


@dataclass(frozen=True)
class Junction:
    """A place where mixers' outputs are added to a stream: ``stream = base + sum_m mix_m(what m reads)``.

    Args:
        stream: The sum.
        base: The stream that is added to; None if there is no residual path.
        mixers: Numbers of the mixers' calls.
    """

    stream: Stream
    base: Stream | None
    mixers: tuple[int, ...]


@dataclass(frozen=True)
class Wiring:
    """What each mixer's call reads, and what the explained output reads.

    Args:
        reads: For each call the summands of the stream that it reads.
        output: The summands that reach the output.
    """

    reads: Sequence[Stream]
    output: Stream

    def junctions(self) -> Iterator[Junction]:
        """Return all junctions on the way from the output back to the embeddings, the last one first.

        A stream is some other stream, the largest that it contains, and the outputs of the remaining mixers. All
        that a junction reads comes after it.
        """
        embeddings = frozenset({EMBEDDINGS})
        streams = {self.output, *self.reads, embeddings}
        for stream in sorted(streams, key=lambda s: (max(s, default=EMBEDDINGS), len(s)), reverse=True):
            inside = [s for s in streams if s < stream and (EMBEDDINGS in s or EMBEDDINGS not in stream)]
            if stream != embeddings and stream:
                base = max(inside, key=len, default=frozenset())
                yield Junction(stream, base or None, tuple(sorted(stream - base)))
