"""Values whose gradient is chosen: the multipliers of relevance instead of the derivatives."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def with_multiplier(x: Tensor, y: Tensor, multiplier: Tensor) -> Tensor:
    """Return the value ``y`` with ``multiplier`` as its gradient in ``x``; all of one shape."""
    return _Multiplied.apply(x, y, multiplier)  # type: ignore[no-untyped-call]


def with_value(linear: Tensor, value: Tensor) -> Tensor:
    """Return ``value`` with the gradient of ``linear``, which differs from it by a constant."""
    return _Replaced.apply(linear, value)  # type: ignore[no-untyped-call]


class _Multiplied(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, multiplier: Tensor) -> Tensor:
        ctx.save_for_backward(multiplier)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (multiplier,) = ctx.saved_tensors
        return (gradient * multiplier).masked_fill(multiplier == 0, 0), None, None


class _Replaced(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, linear: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None
