"""The functions of the entries of a channel's matrix that fusions and rectification use."""

from __future__ import annotations

from functools import reduce
from operator import add
from typing import NamedTuple

import torch
from torch import Tensor


class Entrywise(NamedTuple):
    """A function of each entry, ``f(x) = linear x + absolute |x| + square x²``.

    Args:
        linear: Factor of the entry.
        absolute: Factor of its absolute value.
        square: Factor of its square.
    """

    linear: float = 0.0
    absolute: float = 0.0
    square: float = 0.0

    def __call__(self, x: Tensor) -> Tensor:
        """Return the function of every entry of ``x``."""
        return self.linear * x + self.absolute * x.abs() + self.square * x.square()

    def summed(self, u: Tensor | None, x: Tensor) -> Tensor:
        """Return ``sum_d f(u_d x_d)``: for each part of f one sum of products, however many weights there are.

        Args:
            u: Weights (M, ..., I, D), or None if they are 1.
            x: Entries (..., I, J, D). They are overwritten.

        Returns:
            (M, ..., I, J), or (1, ..., I, J) without weights.
        """
        sums = []
        for factor, function in zip(self, (None, torch.abs, torch.square)):
            if factor:
                x = function(x, out=x) if function else x
                weights = function(u) if function and u is not None else u
                sums.append(factor * _over_channels(weights, x))
        return reduce(add, sums)


def _over_channels(u: Tensor | None, x: Tensor) -> Tensor:
    """Return ``sum_d u_d x_d`` of weights and entries as in :meth:`Entrywise.summed`."""
    if u is None:
        return (x @ x.new_ones(x.shape[-1])).unsqueeze(0)
    return (u.movedim(0, -2) @ x.mT).movedim(-2, 0)


IDENTITY = Entrywise(linear=1.0)
ABSOLUTE = Entrywise(absolute=1.0)
POSITIVE = Entrywise(linear=0.5, absolute=0.5)
"""``max(x, 0)``."""
SQUARE = Entrywise(square=1.0)
