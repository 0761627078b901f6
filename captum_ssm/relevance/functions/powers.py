"""Powers, quotients and remainders, written in functions of one tensor."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from captum_ssm.relevance.functions.table import composed


def power(x: Any, exponent: Any) -> Tensor:
    """Return ``exp(exponent log(x))``, for positive x."""
    return torch.exp(exponent * torch.log(x))


@composed("div", aliases=("truediv", "divide", "true_divide"), in_place=("idiv", "itruediv"))
def _divide(x: Any, y: Any, *, rounding_mode: str | None = None) -> Any:
    quotient = x * torch.reciprocal(y) if isinstance(y, Tensor) else x * (1 / y if y else math.inf)
    if rounding_mode is None:
        return quotient
    return torch.floor(quotient) if rounding_mode == "floor" else torch.trunc(quotient)


@composed("rdiv", aliases=("rtruediv",))
def _divide_by(y: Tensor, x: Any) -> Any:
    return x * torch.reciprocal(y)


@composed("floor_divide", aliases=("floordiv",), in_place=("ifloordiv",))
def _floor_divide(x: Any, y: Any) -> Any:
    return _divide(x, y, rounding_mode="floor")


@composed("rfloordiv")
def _floor_divide_by(y: Any, x: Any) -> Any:
    return _divide(x, y, rounding_mode="floor")


@composed("remainder", aliases=("mod",), in_place=("imod",))
def _remainder(x: Any, y: Any) -> Any:
    return x - y * _divide(x, y, rounding_mode="floor")


@composed("rmod")
def _remainder_of(y: Any, x: Any) -> Any:
    return _remainder(x, y)


@composed("fmod")
def _fmod(x: Any, y: Any) -> Any:
    return x - y * _divide(x, y, rounding_mode="trunc")


@composed("frac")
def _frac(x: Tensor) -> Tensor:
    return x - torch.trunc(x)


@composed("rpow")
def _raise_to(exponent: Tensor, base: Any) -> Any:
    return torch.pow(base, exponent)


@composed("mvlgamma", aliases=("special_multigammaln",))
def _mvlgamma(x: Tensor, p: int) -> Tensor:
    terms = (torch.lgamma(x - j / 2) for j in range(p))
    return sum(terms, torch.full_like(x, p * (p - 1) / 4 * math.log(math.pi)))


@composed("ldexp")
def _ldexp(x: Tensor, exponent: Tensor) -> Tensor:
    return x * torch.exp2(exponent)


@composed("xlogy", aliases=("special_xlogy",))
def _xlogy(x: Any, y: Any) -> Tensor:
    return _times_log(x, y, torch.log)


@composed("special_xlog1py")
def _xlog1py(x: Any, y: Any) -> Tensor:
    return _times_log(x, y, torch.log1p)


def _times_log(x: Any, y: Any, log: Any) -> Tensor:
    """Return ``x log(y)``, 0 where x is 0."""
    y = y if isinstance(y, Tensor) else torch.full_like(x, y)
    x = x if isinstance(x, Tensor) else torch.full_like(y, x)
    return x * log(torch.where(x == 0, torch.ones_like(y), y))
