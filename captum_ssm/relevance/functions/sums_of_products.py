"""Sums of products, written in products of two."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from captum_ssm.relevance.functions.table import composed


def einsum(equation: str, *operands: Any) -> Tensor:
    """Contract tensors two at a time, from the left, each pair to the axes that are still needed.

    Args:
        equation: The axes of each tensor, and of the result, by letters.
        operands: The tensors, or one list of them.

    Returns:
        The sum of products.
    """
    tensors = list(operands[0]) if len(operands) == 1 and isinstance(operands[0], (list, tuple)) else list(operands)
    inputs, arrow, output = equation.replace(" ", "").partition("->")
    terms = inputs.split(",")
    if not arrow:
        once = sorted(letter for letter in set(inputs) - set(",.") if inputs.count(letter) == 1)
        output = "..." * ("..." in inputs) + "".join(once)
    total, term = tensors[0], terms[0]
    for k in range(1, len(tensors)):
        pair, needed = term + terms[k], output + "".join(terms[k + 1 :])
        kept = "..." * ("..." in pair) + "".join(a for a in dict.fromkeys(pair) if a != "." and a in needed)
        kept = output if k == len(tensors) - 1 else kept
        total, term = torch.einsum(f"{term},{terms[k]}->{kept}", total, tensors[k]), kept
    return total


@composed("bilinear")
def _bilinear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    z = torch.einsum("...i,oij,...j->...o", x, weight, y)
    return z if bias is None else z + bias


@composed("addmm")
@composed("addmv")
@composed("baddbmm")
def _addmm(bias: Tensor, x: Tensor, y: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return beta * bias + alpha * (x @ y)


@composed("addbmm")
def _addbmm(bias: Tensor, x: Tensor, y: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return beta * bias + alpha * (x @ y).sum(0)


@composed("addr")
def _addr(bias: Tensor, x: Tensor, y: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return beta * bias + alpha * torch.outer(x, y)


@composed("addcmul")
def _addcmul(x: Tensor, y: Tensor, z: Tensor, *, value: float = 1) -> Tensor:
    return x + value * (y * z)


@composed("addcdiv")
def _addcdiv(x: Tensor, y: Tensor, z: Tensor, *, value: float = 1) -> Tensor:
    return x + value * (y / z)


@composed("lerp")
def _lerp(x: Tensor, y: Tensor, weight: Any) -> Tensor:
    return x + weight * (y - x)


@composed("linalg_multi_dot")
@composed("chain_matmul")
def _multi_dot(*tensors: Any) -> Tensor:
    first, *rest = tensors[0] if isinstance(tensors[0], (list, tuple)) else tensors
    for other in rest:
        first = first @ other
    return first


@composed("matrix_power", aliases=("linalg_matrix_power",))
def _matrix_power(x: Tensor, n: int) -> Tensor:
    if n < 1:
        raise NotImplementedError("a power that is not positive")
    return _multi_dot(*[x] * n)


@composed("prod")
def _prod(x: Tensor, dim: int | None = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    x = x if dtype is None else x.to(dtype)
    if not x.dim() or 0 in x.shape:
        return x if not x.dim() else x.sum(dim, keepdim) + 1 if dim is not None else x.sum() + 1
    factors, axis = (x.flatten(), 0) if dim is None else (x, dim)
    while factors.shape[axis] > 1:
        even = factors.shape[axis] // 2
        rest = factors.narrow(axis, 2 * even, factors.shape[axis] - 2 * even)
        pairs = factors.narrow(axis, 0, even) * factors.narrow(axis, even, even)
        factors = torch.cat([pairs, rest], axis)
    return factors if keepdim and dim is not None else factors.squeeze(axis)


@composed("cumprod")
def _cumprod(x: Tensor, dim: int, *, dtype: Any = None) -> Tensor:
    x = x if dtype is None else x.to(dtype)
    if not x.dim() or 0 in x.shape:
        return x
    parts = list(x.unbind(dim))
    for k in range(1, len(parts)):
        parts[k] = parts[k - 1] * parts[k]
    return torch.stack(parts, dim)


@composed("scatter_reduce")
def _scatter_reduce(
    input: Tensor, dim: int, index: Tensor, src: Tensor, reduce: str, *, include_self: bool = True
) -> Tensor:
    if reduce not in ("sum", "mean"):
        raise NotImplementedError(f"scatter_reduce with {reduce!r}")
    start = input if include_self else input.scatter(dim, index, 0)
    total = start.scatter_add(dim, index, src)
    if reduce == "sum":
        return total
    ones = torch.full(input.shape, float(include_self), dtype=input.dtype, device=input.device)
    counts = ones.scatter_add(dim, index, torch.ones(src.shape, dtype=input.dtype, device=input.device))
    return total / counts.clamp_min(1)


@composed("linalg_solve_triangular")
def _solve_triangular(a: Tensor, b: Tensor, *, upper: bool, left: bool = True, unitriangular: bool = False) -> Tensor:
    """Solve for one row after the other; a constant matrix is inverted at once."""
    if not left:
        return torch.linalg.solve_triangular(a.mT, b.mT, upper=not upper, unitriangular=unitriangular).mT
    size = a.shape[-1]
    if not torch.overrides.has_torch_function_unary(a):
        eye = torch.eye(size, dtype=a.dtype, device=a.device)
        return torch.linalg.solve_triangular(a, eye, upper=upper, unitriangular=unitriangular) @ b
    solved = b.new_empty(0)
    for i in reversed(range(size)) if upper else range(size):
        known = slice(i + 1, None) if upper else slice(0, i)
        row = b[..., i : i + 1, :]
        if solved.dim() > 1:
            row = row - a[..., i : i + 1, known] @ solved
        row = row if unitriangular else row / a[..., i : i + 1, i : i + 1]
        solved = row if solved.dim() == 1 else torch.cat([row, solved] if upper else [solved, row], -2)
    return solved


@composed("linalg_solve")
def _solve(a: Tensor, b: Tensor, *, left: bool = True) -> Tensor:
    if torch.overrides.has_torch_function_unary(a):
        raise NotImplementedError("the inverse of a matrix that depends on the input")
    inverse = torch.linalg.inv(a)
    if b.dim() == 1 or (left and b.dim() == a.dim() - 1 and b.shape == a.shape[:-1]):
        return (inverse @ b.unsqueeze(-1)).squeeze(-1)
    return inverse @ b if left else b @ inverse
