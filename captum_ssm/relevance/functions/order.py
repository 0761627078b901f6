"""Largest, smallest and middle entries, which the input chooses, and bounds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_ssm.relevance.functions.table import composed


def largest(x: Tensor, other: Tensor | None = None) -> Tensor:
    """Return the larger of two tensors, or the largest entry of one."""
    return _extreme(x, None, False, torch.argmax) if other is None else _maximum(x, other)


def smallest(x: Tensor, other: Tensor | None = None) -> Tensor:
    """Return the smaller of two tensors, or the smallest entry of one."""
    return _extreme(x, None, False, torch.argmin) if other is None else _minimum(x, other)


def median(x: Tensor) -> Tensor:
    """Return the median of all entries."""
    return x.flatten().median(0).values


def nanmedian(x: Tensor) -> Tensor:
    """Return the median of all entries that are numbers."""
    return x.flatten().nanmedian(0).values


def clamped(x: Tensor, min: Any = None, max: Any = None) -> Tensor:
    """Return the entries within bounds that are tensors or numbers."""
    x = x if min is None else _maximum(x, min) if isinstance(min, Tensor) else x.clamp_min(min)
    return x if max is None else _minimum(x, max) if isinstance(max, Tensor) else x.clamp_max(max)


@composed("maximum", aliases=("fmax",))
def _maximum(x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (x + y + (x - y).abs())


@composed("minimum", aliases=("fmin",))
def _minimum(x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (x + y - (x - y).abs())


@composed("heaviside")
def _heaviside(input: Tensor, values: Tensor) -> Tensor:
    sign = input.sign()
    return (1 + sign) / 2 + (values - 0.5) * (1 - sign.square())


@composed("amax")
def amax(x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    """Return the largest entries along an axis, several, or all."""
    return _extreme(x, dim, keepdim, torch.argmax)


@composed("amin")
def _amin(x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    return _extreme(x, dim, keepdim, torch.argmin)


@composed("aminmax")
def _aminmax(x: Tensor, *, dim: int | None = None, keepdim: bool = False) -> Any:
    return torch.return_types.aminmax((_amin(x, dim, keepdim), amax(x, dim, keepdim)))


def _extreme(x: Tensor, dim: Any, keepdim: bool, position: Callable[..., Tensor]) -> Tensor:
    """Return the entry at a position among those of one axis, of several, or of all."""
    if not x.dim():
        return x
    axes = list(range(x.dim())) if dim is None or dim == () else [dim] if isinstance(dim, int) else list(dim)
    axes = sorted(axis % x.dim() for axis in axes)
    together = x.movedim(axes, list(range(-len(axes), 0))).flatten(-len(axes))
    entry = together.gather(-1, position(together, -1, True)).squeeze(-1)
    if keepdim:
        for axis in axes:
            entry = entry.unsqueeze(axis)
    return entry


@composed("msort")
def _msort(x: Tensor) -> Tensor:
    return x.sort(0)[0]


@composed("quantile")
def _quantile(
    x: Tensor, q: Any, dim: int | None = None, keepdim: bool = False, *, interpolation: str = "linear"
) -> Any:
    if not isinstance(q, float) or interpolation != "linear":
        raise NotImplementedError("quantile of other than one number, or not interpolated")
    if not x.dim():
        return x
    ordered, axis = (x.flatten().sort(0)[0], 0) if dim is None else (x.sort(dim)[0], dim)
    place = q * (ordered.shape[axis] - 1)
    low = min(int(place), ordered.shape[axis] - 1)
    high = min(low + 1, ordered.shape[axis] - 1)
    entry = ordered.narrow(axis, low, 1) * (1 - place + low) + ordered.narrow(axis, high, 1) * (place - low)
    if dim is None:
        return entry.view([1] * x.dim()) if keepdim else entry.squeeze(0)
    return entry if keepdim else entry.squeeze(axis)
