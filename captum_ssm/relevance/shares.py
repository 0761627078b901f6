"""The factors of a coefficient, and how they share the multiplier of their product.

The change of a product of n factors is shared by their Shapley values: the multiplier of a factor is the mean of the
product of the others over all orders in which the factors change from reference to value. That mean is the integral of
the partial derivative of the product over the straight line from reference to value. Along the line every factor is
linear, so the derivative is a polynomial of degree n - 1, and a rule of Gauss integrates it exactly: with one point for
two factors, with two points for up to four.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from operator import add, mul
from typing import Any

import torch
from torch import Tensor

from captum_ssm.operators import Product
from captum_ssm.relevance.slopes import slope_of_exp
from captum_ssm.relevance.stacked import Stacked

_ONE_POINT = (0.5,)
_TWO_POINTS = (0.5 - 0.5 / 3**0.5, 0.5 + 0.5 / 3**0.5)


@dataclass(frozen=True)
class ChunkCoefficient:
    """A coefficient at the T tokens of a chunk, for the value and the reference.

    Args:
        product: Factors, each stacked, (2B or 1, T or 1, H or 1, N or 1).
        T: Tokens of the chunk.
        share: Weight of the value in the mean by which the coefficient's partner is multiplied: a state that the
            coefficient as a whole shares a product with.
        further_factors: Number of factors that share one product with the coefficient's own: 1 for b, which the
            recurrence multiplies by x. Then ``share`` has no effect.
    """

    product: Product
    T: int
    share: float = 0.5
    further_factors: int = 0

    @cached_property
    def exponent(self) -> Stacked | None:
        """The product of the factors, (2B or 1, T, H or 1, N or 1), if the coefficient is its exponential."""
        return Stacked(replace(self.product, exponential=False).tokens(0, self.T)) if self.product.exponential else None

    @cached_property
    def evaluated(self) -> Stacked:
        """The coefficient, (2B or 1, T, H or 1, N or 1)."""
        return Stacked(self.product.tokens(0, self.T) if self.exponent is None else self.exponent.tensor.exp())

    def mean(self) -> Tensor:
        """Return the mean over value and reference, (B or 1, T, H or 1, N or 1): the multiplier of the other factor."""
        if not self.further_factors:
            return self.evaluated.mean(self.share)
        products = (reduce(mul, self._factors_at(point)) for point in self._points)
        return (reduce(add, products) / len(self._points)).expand(-1, self.T, -1, -1)

    def multipliers_of_factors(self, multiplier: Callable[[float], Tensor]) -> list[Tensor | None]:
        """Return the multiplier of each factor from the coefficient's.

        Args:
            multiplier: The coefficient's multiplier (B, H, T, N or 1), as a function of the point on the line from
                reference to value at which further factors of the product are taken.

        Returns:
            One tensor of the factor's shape for each factor, with B examples; None of a constant.
        """
        factors = self.product.factors
        totals: list[Any] = [None if len(factor) == 1 else 0 for factor in factors]
        if all(total is None for total in totals):
            return totals
        for point in self._points:
            at_point = self._factors_at(point)
            of_product = self._of_exponent(multiplier(point).transpose(1, 2))  # (B, T, H, N or 1)
            for k, factor in enumerate(at_point):
                if totals[k] is not None:
                    others = [other for j, other in enumerate(at_point) if j != k]
                    totals[k] = totals[k] + _product_summed_to(factor.shape, of_product, *others)
        return [total if total is None else total / len(self._points) for total in totals]

    @property
    def _points(self) -> tuple[float, ...]:
        """Points of Gauss's rule on (0, 1) that are enough for all factors."""
        return _ONE_POINT if len(self.product.factors) + self.further_factors <= 2 else _TWO_POINTS

    def _factors_at(self, point: float) -> list[Tensor]:
        """Return the factors, each (B or 1, T or 1, H or 1, N or 1), at a point of the line from reference to value."""
        return [Stacked(factor).mean(point) for factor in self.product.factors]

    def _of_exponent(self, multiplier: Tensor) -> Tensor:
        """Return the multiplier of the product of the factors from the coefficient's, (B, T, H, N or 1)."""
        return multiplier if self._slope is None else multiplier * self._slope

    @cached_property
    def _slope(self) -> Tensor | None:
        """The difference quotient of the exponential, (B or 1, T, H or 1, N or 1); None without exponential."""
        return None if self.exponent is None else slope_of_exp(*self.exponent.pair, *self.evaluated.pair)


def _product_summed_to(shape: torch.Size, *tensors: Tensor) -> Tensor:
    """Return the product of broadcastable tensors with four axes, summed over the axes that are 1 in the shape."""
    return reduce(mul, tensors).sum_to_size(shape)
