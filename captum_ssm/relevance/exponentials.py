"""Softmax and the logarithm of a sum of exponentials, for a value and a reference of any two levels.

The rule is that of the functions written out: ``e_j = exp(x_j - c)`` with one constant c for value and reference,
``s = sum_j e_j``, and ``e_j / s`` or ``log(s) + c``. Where the two are far apart, no c leaves both of them numbers that
are neither 0 nor infinite. But c cancels: every multiplier depends only on the probabilities ``p_j = e_j / s`` of each
side and on ``d = log(s / s')``, and these are computed without c.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from captum_ssm.relevance.blockwise import rowwise
from captum_ssm.relevance.multipliers import with_value
from captum_ssm.relevance.slopes import slope_of_exp


def difference_of_softmax(x: Tensor, r: Tensor, axis: int) -> tuple[Tensor, Tensor]:
    """Compute the softmax of a value and a reference, the first with the multipliers as its gradient.

    The quotient's rule with equal shares is ``p_j - p'_j = (e_j - e'_j - m_j (s - s')) / S`` with the means
    ``m_j = (p_j + p'_j) / 2`` and ``S = (s + s') / 2``, and ``s / S = 2 / (1 + exp(-d))``.

    Args:
        x: The value, any shape.
        r: The reference, of the shape of ``x``.
        axis: The axis of the sum.

    Returns:
        Both softmaxes, of the shape of ``x``.
    """
    value, reference = _Softmax.apply(x, r, axis)  # type: ignore[no-untyped-call]
    return value, reference


def _softmax_of_both(x: Tensor, r: Tensor, axis: int = -1) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return the softmax of value and reference, the slopes ``(e_j - e'_j) / (x_j - x'_j) / S``, and m."""
    value, reference = x.softmax(axis), r.softmax(axis)
    d = _log_of_sum(x, value, axis) - _log_of_sum(r, reference, axis)
    slopes = _slopes(x, r, *over_mean_sum(value, reference, d))
    return value, reference, slopes, torch.lerp(value, reference, 0.5)


def over_mean_sum(value: Tensor, reference: Tensor, d: Tensor) -> tuple[Tensor, Tensor]:
    """Return the exponentials over the mean of both sums, ``e_j / S`` and ``e'_j / S``.

    Args:
        value: The softmax of the value.
        reference: The softmax of the reference, of the same shape.
        d: ``log(s / s')``, with size 1 along the axis of the sums.

    Returns:
        Both, of the shape of ``value``.
    """
    return 2 * d.sigmoid() * value, 2 * (-d).sigmoid() * reference


class _Softmax(torch.autograd.Function):
    """The softmax of x and r, that of x with the gradient of ``slopes_j x_j - m_j sum_k slopes_k x_k``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, r: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        if axis in (-1, x.dim() - 1):
            value, reference, slopes, m = rowwise(_softmax_of_both, 4, x, r)
        else:
            value, reference, slopes, m = _softmax_of_both(x, r, axis)
        ctx.save_for_backward(slopes, m)
        ctx.axis = axis
        ctx.mark_non_differentiable(reference)
        return value, reference

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        slopes, m = ctx.saved_tensors
        return slopes * (g - (g * m).sum(ctx.axis, keepdim=True)), None, None


def _log_of_sum(x: Tensor, softmax: Tensor, axis: int) -> Tensor:
    """Compute the logarithm of the sum of exponentials from the largest of them and its part of the sum."""
    return x.amax(axis, keepdim=True) - softmax.amax(axis, keepdim=True).log()


def difference_of_logsumexp(x: Tensor, r: Tensor, axis: int | tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Compute the logarithm of the sum of exponentials, that of the value with the multipliers as its gradient.

    The multiplier of ``x_j`` is the slope of ``exp`` over that of ``exp`` from ``log(s')`` to ``log(s)``, both relative
    to the larger of s and s'.

    Args:
        x: The value, any shape.
        r: The reference, of the shape of ``x``.
        axis: The axis of the sum, or several, which the results keep with size 1.

    Returns:
        The logarithms of both sums.
    """
    value, reference = (t.logsumexp(axis, keepdim=True) for t in (x.detach(), r))
    larger = torch.maximum(value, reference)
    y, z, s, t = (torch.exp(exponent - larger) for exponent in (x.detach(), r, value, reference))
    slopes = _slopes(x, r, y, z) / slope_of_exp(value, reference, s, t)
    return with_value((slopes * x).sum(axis, keepdim=True), value), reference


def _slopes(x: Tensor, r: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Compute the slopes of the exponentials y of x and z of r, 0 where both exponents are those of hidden entries."""
    return torch.nan_to_num(slope_of_exp(x.detach(), r, y, z), nan=0.0)
