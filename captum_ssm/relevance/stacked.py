"""A value and its reference in one tensor, so that both go through a computation at once."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class Stacked(NamedTuple):
    """A value and its reference, stacked along the batch axis."""

    tensor: Tensor
    """(2B, ...), B examples of the value and then B of the reference; or (1, ...), a constant that all share."""

    @classmethod
    def of(cls, value: Tensor, reference: Tensor, B: int) -> Stacked:
        """Stack a value and a reference with four axes, (B or 1, ...); a constant that both share is not copied."""
        if value is reference and len(value) == 1:
            return cls(value)
        return cls(torch.cat([t.expand(B, -1, -1, -1) for t in (value, reference)]))

    @property
    def pair(self) -> tuple[Tensor, Tensor]:
        """The value and the reference, each (B, ...), or twice the constant (1, ...) that they share."""
        value, reference = (self.tensor, self.tensor) if len(self.tensor) == 1 else self.tensor.chunk(2)
        return value, reference

    def mean(self, share: float = 0.5) -> Tensor:
        """Return ``share * value + (1 - share) * reference``: a point on the line from the reference to the value."""
        value, reference = self.pair
        return value if value is reference else torch.lerp(reference, value, share)
