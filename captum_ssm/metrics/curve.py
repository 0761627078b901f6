"""A model's evidence as a growing share of its input is perturbed."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_ssm.errors import InvalidInputError


def mean_and_error(values: Tensor) -> tuple[float, float]:
    """Return the mean over the examples and its standard error.

    Args:
        values: (B,) one value for each example.

    Returns:
        The mean, and its standard error: NaN for a single example.

    Example:
        >>> import torch
        >>> mean_and_error(torch.tensor([1.0, 3.0]))
        (2.0, 1.0)
    """
    values = values.double()
    error = float(values.std() / len(values) ** 0.5) if len(values) > 1 else math.nan
    return float(values.mean()), error


@dataclass(frozen=True)
class Curve:
    """One value for each example at each step.

    Attributes:
        fractions: (S,) share of the features that are perturbed, or inserted, at each step; ascending.
        values: (B, S) the measured value of each example at each step.

    Raises:
        InvalidInputError: If the shapes do not fit.

    Example:
        >>> import torch
        >>> curve = Curve(torch.tensor([0.0, 0.5, 1.0]), torch.tensor([[1.0, 0.5, 0.0], [1.0, 1.0, 1.0]]))
        >>> curve.area
        tensor([0.5000, 1.0000])
    """

    fractions: Tensor
    values: Tensor

    def __post_init__(self) -> None:
        fractions, values = tuple(self.fractions.shape), tuple(self.values.shape)
        if len(fractions) != 1 or values[1:] != fractions or len(values) != 2:
            raise InvalidInputError(
                f"A curve needs fractions (S,) and values (B, S), not {fractions} and {values}. Of one example keep "
                "the batch dimension: values[None]."
            )

    @property
    def mean(self) -> Tensor:
        """The mean over the examples, (S,)."""
        return self.values.mean(0)

    @property
    def standard_error(self) -> Tensor:
        """The standard error of the mean, (S,); NaN for a single example."""
        if len(self.values) == 1:
            return torch.full_like(self.mean, torch.nan)
        return self.values.std(0) / len(self.values) ** 0.5

    @property
    def area(self) -> Tensor:
        """The area under each example's curve by the trapezoidal rule, (B,).

        Of values up to 1 over fractions from 0.1 to 0.9 the area is at most 0.8.
        """
        return torch.trapezoid(self.values, self.fractions.to(self.values), dim=1)

    def __sub__(self, other: Curve) -> Curve:
        """Return the difference of two curves of the same examples at the same fractions.

        Raises:
            InvalidInputError: If examples or fractions differ.
        """
        if self.values.shape != other.values.shape or not torch.equal(self.fractions, other.fractions):
            raise InvalidInputError(
                "Only curves of the same examples at the same fractions can be subtracted, not "
                f"{tuple(self.values.shape)} at {self.fractions.tolist()} and "
                f"{tuple(other.values.shape)} at {other.fractions.tolist()}."
            )
        return Curve(self.fractions, self.values - other.values)

    @classmethod
    def join(cls, curves: Sequence[Curve]) -> Curve:
        """Join the examples of several curves, such as one for each batch of a data set.

        Args:
            curves: One curve or more, with the same fractions.

        Returns:
            One curve with all examples, in this order.

        Raises:
            InvalidInputError: If there is no curve, or the fractions differ.
        """
        if not curves or not all(torch.equal(curves[0].fractions, curve.fractions) for curve in curves):
            raise InvalidInputError("Only curves with the same fractions can be joined, and at least one.")
        return cls(curves[0].fractions, torch.cat([curve.values for curve in curves]))
