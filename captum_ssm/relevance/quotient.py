"""The difference quotient of a function of single entries, as exactly as its arithmetic allows."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

Function = Callable[[Tensor], Tensor]


def quotient(function: Function, x: Tensor, r: Tensor, y: Tensor, z: Tensor, alone: bool = False) -> Tensor:
    """Return ``(y - z) / (x - r)`` for ``y = function(x)`` and ``z = function(r)``, all of one shape.

    ``alone``: whether the function has no other tensor, so that it may be taken of some entries.

    Where x and r are so close that the difference of y and z is mostly rounding: the mean slope between them by
    Simpson's rule, if that is the more exact. It is 0 where there is no slope.
    """
    difference = x - r
    slope = (y - z) / difference
    epsilon = torch.finfo(x.dtype).eps
    rounding = epsilon * (y.abs() + z.abs()) / difference.abs()
    doubtful = ~(rounding <= epsilon**0.75 * slope.abs())
    if bool(doubtful.any()):
        some = doubtful if alone else torch.ones_like(doubtful)
        ends = [t[doubtful] if alone else t for t in torch.broadcast_tensors(x, r, slope)[:2]]
        closer, error = _simpson(function, *ends)
        better = doubtful[some].view_as(closer) & (error <= rounding[some].view_as(closer))
        slope[some] = torch.where(better, closer, slope[some].view_as(closer)).flatten()
    return torch.nan_to_num(slope, nan=0.0, posinf=0.0, neginf=0.0)


def _simpson(function: Function, x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
    """Return the mean derivative between ``x`` and ``r``, and about its error: 0 also where nothing better is known."""
    at = torch.stack([x, (x + r) / 2, r]).detach().requires_grad_()
    with torch.enable_grad(), saved_tensors_hooks(lambda t: t, lambda t: t):  # a checkpoint would run all again
        (slopes,) = torch.autograd.grad(function(at).sum(), at)
    first, middle, last = slopes
    mean = (first + 4 * middle + last) / 6
    error = (mean - middle).square() / mean.abs()  # the next order, by the size of this one
    return mean, torch.nan_to_num(error, nan=0.0)
