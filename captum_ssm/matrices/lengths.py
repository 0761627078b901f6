"""The lengths of the many vectors that one tokenwise chain makes.

With ``W = Q R``, where the columns of Q are orthogonal and R is upper triangular, ``|W x| = |R x|``, and the products
with the zeros of R are left out: half of all if W is square.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from captum_ssm.operators import Centre, Chain, Projection
from captum_ssm.operators.device_sizes import DeviceSize

_VECTORS = 10
"""Vectors for each channel from which on the triangular factor saves more time than it takes."""

_COLUMNS = DeviceSize(cpu=64, others=512)
"""Columns of the triangular factor that are multiplied at once: of fewer, more zeros are left out, but each takes
longer."""

_VECTORS_AT_ONCE = DeviceSize(cpu=2**11, others=2**15)
"""Vectors, of one token's contribution to another each, that the output is applied to at once."""


def vectors_at_once(like: Tensor) -> int:
    """Return the number of vectors that the output is to be applied to at once, on the device of a tensor."""
    return _VECTORS_AT_ONCE.of(like)


@dataclass(frozen=True)
class OutputLengths:
    """The Euclidean length ``|output(x)|`` of what a layer's output side makes of vectors of its channels.

    Args:
        output: The output side, or its factors before the triangular one.
        triangular: R, (rows, channels), which is applied last, or None.
    """

    output: Chain
    triangular: Tensor | None = None

    @classmethod
    def of(cls, output: Chain, vectors: int) -> OutputLengths:
        """Return the lengths of a chain, in triangular form if that pays.

        Args:
            output: The factors after the core, from channels to the model's width.
            vectors: Number of vectors whose lengths are asked for.
        """
        last, *others = output.leaves() or [output]
        if not isinstance(last, Projection) or vectors < _VECTORS * max(last.W.shape):
            return cls(output)
        before = Chain({str(number): operator for number, operator in enumerate(others)})
        W = last.W.to(torch.promote_types(last.W.dtype, torch.float32))  # torch factors nothing less exact
        return cls(before, torch.linalg.qr(W, mode="r").R)

    def from_token(self, start: int, x: Tensor) -> Tensor:
        """Return the lengths of vectors at the tokens from ``start`` on.

        Args:
            start: The first token.
            x: (..., L - start, D).

        Returns:
            (..., L - start).
        """
        output = self.output.after(start) if self.output.causal else self.output
        y = output.apply(x)
        if self.triangular is None:
            return y.norm(dim=-1)
        R, vectors = self.triangular, y.flatten(0, -2).to(self.triangular)
        size = _COLUMNS.of(R)
        whole = (len(R) - 1) // size * size  # the first column of those that have all rows
        z = vectors[:, whole:] @ R[:, whole:].T
        for first in range(0, whole, size):
            columns, rows = slice(first, first + size), slice(0, first + size)
            z[:, rows].addmm_(vectors[:, columns], R[rows, columns].T)
        return z.norm(dim=-1).view(x.shape[:-1]).to(x)


def is_same_for_all_tokens(output: Chain) -> bool:
    """Whether an output side treats all tokens alike: then :meth:`OutputLengths.from_token` takes any of them."""
    return all(isinstance(leaf, (Projection, Centre)) for leaf in output.leaves())
