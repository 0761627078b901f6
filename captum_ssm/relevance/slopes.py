"""The difference quotient ``(f(x) - f(r)) / (x - r)`` of the usual functions, without a difference of their values.

Each is an identity, good also where x and r are close or the same, where the quotient itself is mostly rounding.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, TypeVar

import torch
from torch import Tensor

SLOPES: dict[str, Callable[..., Tensor | None]] = {}
"""By a function's name its difference quotient of ``x, r, f(x), f(r)`` and the function's other arguments.

None where these have no closed form."""

Slope = TypeVar("Slope", bound=Callable[..., Tensor | None])


def _slope_of(*names: str) -> Callable[[Slope], Slope]:
    def decorate(slope: Slope) -> Slope:
        SLOPES.update(dict.fromkeys(names, slope))
        return slope

    return decorate


@_slope_of("square")
def _square(x: Tensor, r: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return x + r


@_slope_of("pow")
def _power(x: Tensor, r: Tensor, y: Tensor, z: Tensor, exponent: Any) -> Tensor | None:
    if not isinstance(exponent, (int, float)) or exponent not in (2, 3):
        return None
    return x + r if exponent == 2 else x * (x + r) + r * r


@_slope_of("sqrt")
def _root(x: Tensor, r: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return 1 / (y + z)


@_slope_of("reciprocal")
def _reciprocal(x: Tensor, r: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return -y * z


@_slope_of("rsqrt")
def _inverse_root(x: Tensor, r: Tensor, y: Tensor, z: Tensor) -> Tensor:
    product = y * z
    return -product * (product / (y + z))


@_slope_of("exp")
def slope_of_exp(x: Tensor, r: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Return ``(exp(x) - exp(r)) / (x - r)`` for ``y = exp(x)`` and ``z = exp(r)``: nothing overflows."""
    return _decline((x - r).abs_()).mul_(torch.maximum(y, z))


@_slope_of("log")
def _log(x: Tensor, r: Tensor, y: Tensor, z: Tensor) -> Tensor:
    low, distance = torch.minimum(x, r), (x - r).abs()
    return torch.where(distance == 0, 1 / low, torch.log1p(distance / low) / distance)


@_slope_of("sigmoid", "special_expit")
def _sigmoid(x: Tensor, r: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """``s(x) - s(r) = s(x) s(-r) (1 - exp(r - x))``."""
    return torch.maximum(y, z) * torch.sigmoid(-torch.minimum(x, r)) * _decline((x - r).abs())


@_slope_of("tanh")
def _tanh(x: Tensor, r: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """``tanh(x) - tanh(r) = (1 - tanh(x) tanh(r)) tanh(x - r)``."""
    distance = x - r
    return (1 - y * z) * torch.where(distance == 0, 1, torch.tanh(distance) / distance)


@_slope_of("softplus")
def _softplus(x: Tensor, r: Tensor, y: Tensor, z: Tensor, beta: float = 1, threshold: float = 20) -> Tensor | None:
    """``f(x) - f(r) = -log(1 + s(x) (exp(r - x) - 1))``, s the sigmoid; above the threshold torch's f(x) is x."""
    if beta != 1:
        return None
    high, distance = torch.maximum(x, r), (x - r).abs()
    top = torch.where(high > threshold, 1, torch.sigmoid(high))
    near = torch.where(distance == 0, top, -torch.log1p(top * torch.expm1(-distance)) / distance)
    return torch.where(distance < 1, near, (y - z) / (x - r))


@_slope_of("silu")
def _silu(x: Tensor, r: Tensor, y: Tensor, z: Tensor) -> Tensor:
    s, t = torch.sigmoid(x), torch.sigmoid(r)
    return _gated(x, r, s, t, _sigmoid(x, r, s, t))


@_slope_of("gelu")
def _gelu(x: Tensor, r: Tensor, y: Tensor, z: Tensor, approximate: str = "none") -> Tensor | None:
    if approximate != "tanh":
        return None
    u, v = (_CUBIC[0] * (t + _CUBIC[1] * t**3) for t in (x, r))
    s, t = torch.tanh(u), torch.tanh(v)
    inner = _CUBIC[0] * (1 + _CUBIC[1] * (x * (x + r) + r * r))
    return _gated(x, r, (1 + s) / 2, (1 + t) / 2, _tanh(u, v, s, t) * inner / 2)


@_slope_of("abs", "absolute")
def _abs(x: Tensor, r: Tensor, y: Tensor, z: Tensor) -> Tensor:
    return (x + r) / (y + z)


@_slope_of("relu")
def _relu(x: Tensor, r: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """``relu(x) = (x + |x|) / 2``."""
    return (1 + (x + r) / (x.abs() + r.abs())) / 2


@_slope_of("clamp", "clip", "clamp_min", "clamp_max")
def _clamp(x: Tensor, r: Tensor, y: Tensor, z: Tensor, *_: Any, **__: Any) -> Tensor:
    """Between two kinks all is exact."""
    return torch.where(x == r, (y == x).to(x), (y - z) / (x - r))


_CUBIC = ((2 / math.pi) ** 0.5, 0.044715)
"""The numbers in the tanh form of GELU."""


def _gated(x: Tensor, r: Tensor, s: Tensor, t: Tensor, slope: Tensor) -> Tensor:
    """Return the slope of ``x s(x)`` from that of s, with ``s = s(x)`` and ``t = s(r)``."""
    return ((x + r) * slope + s + t) / 2


def _decline(distance: Tensor) -> Tensor:
    """Return ``(1 - exp(-d)) / d``, 1 at 0."""
    return torch.neg(distance).expm1_().div_(distance).neg_().masked_fill_(distance == 0, 1)
