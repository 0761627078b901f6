"""Values whose gradient is chosen: the multipliers of relevance instead of the derivatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

Adjoint = Callable[[Tensor, Tensor, int], Tensor]
"""Of a product of two: from the gradient of the product, the other factor, and the position of a factor, 0 or 1, to the
gradient of this factor, or to one that is still to be summed over the axes that the factor is shared along."""


def with_multiplier(x: Tensor, y: Tensor, multiplier: Tensor) -> Tensor:
    """Return the value ``y`` with ``multiplier`` as its gradient in ``x``; all of one shape."""
    return _Multiplied.apply(x, y, multiplier)  # type: ignore[no-untyped-call]


def with_value(linear: Tensor, value: Tensor) -> Tensor:
    """Return ``value`` with the gradient of ``linear``, which differs from it by a constant."""
    return _Replaced.apply(linear, value)  # type: ignore[no-untyped-call]


def with_factors(
    x: Tensor, y: Tensor, for_x: Tensor, for_y: Tensor, product: Callable[[Tensor, Tensor], Tensor], adjoint: Adjoint
) -> Tensor:
    """Return ``product(x, y)`` with the gradient of ``product(x, for_x) + product(for_y, y)``.

    Args:
        x: The first factor.
        y: The second one.
        for_x: In the place of ``y``, where the gradient goes to ``x``.
        for_y: In the place of ``x``, where the gradient goes to ``y``.
        product: A function that is linear in each of two.
        adjoint: Its adjoint.
    """
    return _Product.apply(x, y, for_x, for_y, product, adjoint)  # type: ignore[no-untyped-call]


def adjoint_of_mul(g: Tensor, other: Tensor, position: int) -> Tensor:
    """Return the gradient of a factor of ``x * y``."""
    return g * other


def adjoint_of_matmul(g: Tensor, other: Tensor, position: int) -> Tensor:
    """Return the gradient of a factor of ``x @ y``, each with at least two axes."""
    return g @ other.mT if position == 0 else other.mT @ g


class _Multiplied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, multiplier: Tensor) -> Tensor:
        ctx.save_for_backward(multiplier)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (multiplier,) = ctx.saved_tensors
        return (gradient * multiplier).masked_fill_(multiplier == 0, 0), None, None


class _Replaced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, linear: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        y: Tensor,
        for_x: Tensor,
        for_y: Tensor,
        product: Callable[[Tensor, Tensor], Tensor],
        adjoint: Adjoint,
    ) -> Tensor:
        ctx.save_for_backward(for_x, for_y)
        ctx.shapes, ctx.adjoint = (x.shape, y.shape), adjoint
        return product(x, y)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        others = zip(ctx.saved_tensors, ctx.shapes)
        of_x, of_y = (ctx.adjoint(gradient, t, k).sum_to_size(shape) for k, (t, shape) in enumerate(others))
        return of_x, of_y, None, None, None, None
