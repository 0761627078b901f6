"""The difference quotient ``(f(x) - f(r)) / (x - r)`` of elementwise functions, in closed form.

A difference of two values of f is mostly rounding where x and r are close. Each formula below is an identity without
that difference, so it is exact at any distance; where x and r are equal it is the derivative.

Every function takes x, r, ``y = f(x)`` and ``z = f(r)``, all of one shape, and the other arguments of f; for arguments
without a closed form it returns None. The table of functions names it in the row of f.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor


def slope_of_square(x: Tensor, r: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Return ``x + r``."""
    return x + r


def slope_of_pow(x: Tensor, r: Tensor, y: Tensor, z: Tensor, exponent: Any) -> Tensor | None:
    """Return ``x + r`` for squares, ``x² + x r + r²`` for cubes, and None for other exponents."""
    if not isinstance(exponent, (int, float)) or exponent not in (2, 3):
        return None
    return x + r if exponent == 2 else x * (x + r) + r * r


def slope_of_sqrt(x: Tensor, r: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Return ``1 / (sqrt(x) + sqrt(r))``."""
    return 1 / (y + z)


def slope_of_reciprocal(x: Tensor, r: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Return ``-1 / (x r)``."""
    return -y * z


def slope_of_rsqrt(x: Tensor, r: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Return ``-y² z² / (y + z)``, multiplied in an order that does not overflow."""
    product = y * z
    return -product * (product / (y + z))


def slope_of_exp(x: Tensor, r: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Return ``max(y, z) (1 - exp(-d)) / d`` with ``d = |x - r|``: nothing overflows."""
    return _decline((x - r).abs_()).mul_(torch.maximum(y, z))


def slope_of_log(x: Tensor, r: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Return ``log(1 + d / min(x, r)) / d`` with ``d = |x - r|``."""
    low, distance = torch.minimum(x, r), (x - r).abs()
    return torch.where(distance == 0, 1 / low, torch.log1p(distance / low) / distance)


def slope_of_sigmoid(x: Tensor, r: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Return the slope from ``s(x) - s(r) = s(x) s(-r) (1 - exp(r - x))``."""
    return torch.maximum(y, z) * torch.sigmoid(-torch.minimum(x, r)) * _decline((x - r).abs())


def slope_of_tanh(x: Tensor, r: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Return the slope from ``tanh(x) - tanh(r) = (1 - tanh(x) tanh(r)) tanh(x - r)``."""
    distance = x - r
    return (1 - y * z) * torch.where(distance == 0, 1, torch.tanh(distance) / distance)


def slope_of_softplus(
    x: Tensor, r: Tensor, y: Tensor, z: Tensor, beta: float = 1, threshold: float = 20
) -> Tensor | None:
    """Return the slope from ``f(x) - f(r) = -log(1 + s(x) (exp(r - x) - 1))``, s the sigmoid; None if beta is not 1.

    Above the threshold torch's f(x) is x.
    """
    if beta != 1:
        return None
    high, distance = torch.maximum(x, r), (x - r).abs()
    top = torch.where(high > threshold, 1, torch.sigmoid(high))
    near = torch.where(distance == 0, top, -torch.log1p(top * torch.expm1(-distance)) / distance)
    return torch.where(distance < 1, near, (y - z) / (x - r))


def slope_of_silu(x: Tensor, r: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Return the slope of ``x s(x)``, s the sigmoid."""
    s, t = torch.sigmoid(x), torch.sigmoid(r)
    return _gated(x, r, s, t, slope_of_sigmoid(x, r, s, t))


def slope_of_gelu(x: Tensor, r: Tensor, y: Tensor, z: Tensor, approximate: str = "none") -> Tensor | None:
    """Return the slope of ``x (1 + tanh(u)) / 2``, u the cubic of the tanh form; None for the exact GELU."""
    if approximate != "tanh":
        return None
    u, v = (_CUBIC[0] * (t + _CUBIC[1] * t**3) for t in (x, r))
    s, t = torch.tanh(u), torch.tanh(v)
    inner = _CUBIC[0] * (1 + _CUBIC[1] * (x * (x + r) + r * r))
    return _gated(x, r, (1 + s) / 2, (1 + t) / 2, slope_of_tanh(u, v, s, t) * inner / 2)


def slope_of_abs(x: Tensor, r: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Return ``(x + r) / (|x| + |r|)``."""
    return (x + r) / (y + z)


def slope_of_relu(x: Tensor, r: Tensor, y: Tensor, z: Tensor) -> Tensor:
    """Return the slope from ``relu(x) = (x + |x|) / 2``."""
    return (1 + (x + r) / (x.abs() + r.abs())) / 2


def slope_of_clamp(x: Tensor, r: Tensor, y: Tensor, z: Tensor, *_: Any, **__: Any) -> Tensor:
    """Return the quotient, which is exact where a bound is constant; where x and r are equal, 1 inside the bounds."""
    return torch.where(x == r, (y == x).to(x), (y - z) / (x - r))


_CUBIC = ((2 / math.pi) ** 0.5, 0.044715)
"""The coefficients of the tanh form of GELU."""


def _gated(x: Tensor, r: Tensor, s: Tensor, t: Tensor, slope: Tensor) -> Tensor:
    """Return the slope of ``x s(x)`` for ``s = s(x)``, ``t = s(r)`` and the slope of s."""
    return ((x + r) * slope + s + t) / 2


def _decline(distance: Tensor) -> Tensor:
    """Return ``(1 - exp(-d)) / d``, 1 at 0."""
    return torch.neg(distance).expm1_().div_(distance).neg_().masked_fill_(distance == 0, 1)
