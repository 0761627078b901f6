"""The difference quotient of an elementwise function without a closed form, as exact as its arithmetic allows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from captum_ssm.errors import UnsupportedModelError

ElementwiseFunction = Callable[[Tensor], Tensor]


def difference_quotient(
    function: ElementwiseFunction, x: Tensor, r: Tensor, y: Tensor, z: Tensor, of_one_tensor: bool = False
) -> Tensor:
    """Return ``(y - z) / (x - r)`` for ``y = function(x)`` and ``z = function(r)``, all of one shape.

    Where x and r are so close that the difference of y and z is mostly rounding, the mean slope between them by
    Simpson's rule is used if its error is smaller. The result is 0 where there is no slope.

    Args:
        function: The function, of each entry.
        x: The value.
        r: The reference.
        y: The function of the value.
        z: The function of the reference.
        of_one_tensor: Whether the function reads no other tensor, so that it can be evaluated at selected entries.

    Returns:
        The quotient, of the shape of ``x``.

    Raises:
        UnsupportedModelError: If a slope is needed, and torch has no derivative of the function.
    """
    difference = x - r
    slope = (y - z) / difference
    epsilon = torch.finfo(x.dtype).eps
    rounding = epsilon * (y.abs() + z.abs()) / difference.abs()
    doubtful = ~(rounding <= epsilon**0.75 * slope.abs())
    if bool(doubtful.any()):
        entries = doubtful if of_one_tensor else torch.ones_like(doubtful)
        ends = [t[doubtful] if of_one_tensor else t for t in torch.broadcast_tensors(x, r, slope)[:2]]
        closer, error = _simpson(function, *ends)
        better = doubtful[entries].view_as(closer) & (error <= rounding[entries].view_as(closer))
        slope[entries] = torch.where(better, closer, slope[entries].view_as(closer)).flatten()
    return torch.nan_to_num(slope, nan=0.0, posinf=0.0, neginf=0.0)


def _simpson(function: ElementwiseFunction, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean derivative between ``x`` and ``r``, and an estimate of its error, 0 where there is none."""
    at = torch.stack([x, (x + r) / 2, r]).detach().requires_grad_()
    with torch.enable_grad(), saved_tensors_hooks(lambda t: t, lambda t: t):  # a checkpoint would run all again
        y = function(at)
        if not y.requires_grad:
            raise UnsupportedModelError(
                "A function that is registered as elementwise has no derivative in torch, which relevance needs where "
                "value and reference are close. Register it as a composition of functions that have one: "
                "@captum_ssm.register_rule(function)."
            )
        (slopes,) = torch.autograd.grad(y.sum(), at)
    first, middle, last = slopes
    mean = (first + 4 * middle + last) / 6
    error = (mean - middle).square() / mean.abs()  # the next order, by the size of this one
    return mean, torch.nan_to_num(error, nan=0.0)
