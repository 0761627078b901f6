"""The residual graph: which calls of mixers, and the embeddings, each call reads.

A rollout multiplies matrices along the model's residual streams, so it must know them. They are measured on the model's
own graph (:mod:`captum_ssm.network.examination`): mixers one after another, side by side, or on a branch need no
declaration.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

EMBEDDINGS = -1
"""The number that stands for the embeddings among the numbers of the calls."""

OTHERS = -2
"""The number that stands for vectors that do not come from the inputs, before they are left out."""

Stream = frozenset[int]
"""A residual stream, named by its summands: the numbers of the mixers' calls, and :data:`EMBEDDINGS`."""


@dataclass(frozen=True)
class Junction:
    """A place where mixers' outputs are added to a stream: ``stream = base + sum_m mix_m(input of m)``.

    Args:
        stream: The sum.
        base: The stream that is added to; None if there is no residual path.
        mixers: Numbers of the mixers' calls.
    """

    stream: Stream
    base: Stream | None
    mixers: tuple[int, ...]


@dataclass(frozen=True)
class ResidualGraph:
    """The streams that the mixers' calls read, and the stream that the explained output reads.

    Args:
        reads: For each call the summands of the stream that it reads.
        output: The summands that reach the output.
        orders: For each call the token of the inputs that each of its tokens is, (B, L), or None if all have the same
            number; empty if all calls have.
    """

    reads: Sequence[Stream]
    output: Stream
    orders: Sequence[Tensor | None] = ()

    @property
    def is_in_order(self) -> bool:
        """Whether each token of every call is the token of the inputs with the same number."""
        return all(order is None for order in self.orders)

    def order(self, number: int) -> Tensor | None:
        """Return the token of the inputs that each token of a call is, (B, L); None if it has the same number."""
        return self.orders[number] if self.orders else None

    def in_order_of_inputs(self, number: int, values: Tensor) -> Tensor:
        """Return values (B, L) of the tokens of a call in the order of the inputs' tokens; -1 is the last call."""
        order = self.order(number)
        return values if order is None else torch.zeros_like(values).scatter(-1, order, values)

    def junctions(self) -> Iterator[Junction]:
        """Return all junctions on the way from the output back to the embeddings, the last one first.

        A stream is the largest other stream that it contains, and the outputs of the remaining mixers. All streams that
        a junction reads come after it.

        Yields:
            The junctions.
        """
        embeddings = frozenset({EMBEDDINGS})
        streams = {self.output, *self.reads, embeddings}
        for stream in sorted(streams, key=lambda s: (max(s, default=EMBEDDINGS), len(s)), reverse=True):
            inside = [s for s in streams if s < stream and (EMBEDDINGS in s or EMBEDDINGS not in stream)]
            if stream != embeddings and stream:
                base = max(inside, key=len, default=frozenset())
                yield Junction(stream, base or None, tuple(sorted(stream - base)))
