"""The functions of the entries of a channel's matrix that fusions and rectification use."""

from __future__ import annotations

from typing import NamedTuple

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


IDENTITY = Entrywise(linear=1.0)
ABSOLUTE = Entrywise(absolute=1.0)
POSITIVE = Entrywise(linear=0.5, absolute=0.5)
"""``max(x, 0)``."""
SQUARE = Entrywise(square=1.0)
