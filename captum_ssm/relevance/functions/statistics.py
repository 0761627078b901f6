"""Moments, norms, distances and similarities."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from captum_ssm.relevance.functions.order import amax
from captum_ssm.relevance.functions.table import composed


@composed("var")
def _var(x: Tensor, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *, correction: Any = None) -> Tensor:
    dim, unbiased = (None, dim) if isinstance(dim, bool) else (dim, unbiased)
    dims = list(range(x.dim())) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    count = 1
    for d in dims:
        count *= x.shape[d]
    free = max(count - (int(unbiased) if correction is None else correction), 0)
    deviation = x - x.mean(dims, keepdim=True)
    deviation = deviation.abs() if x.is_complex() else deviation
    return deviation.square().sum(dims, keepdim=keepdim) / free


@composed("std")
def _std(*args: Any, **kwargs: Any) -> Tensor:
    return _var(*args, **kwargs).sqrt()


@composed("var_mean")
def _var_mean(x: Tensor, dim: Any = None, *args: Any, keepdim: bool = False, **kwargs: Any) -> tuple[Tensor, Tensor]:
    var = _var(x, dim, *args, keepdim=keepdim, **kwargs)
    return var, x.mean(list(range(x.dim())) if dim is None or isinstance(dim, bool) else dim, keepdim=keepdim)


@composed("std_mean")
def _std_mean(*args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
    var, mean = _var_mean(*args, **kwargs)
    return var.sqrt(), mean


@composed("cov")
def _cov(x: Tensor, *, correction: int = 1, fweights: None = None, aweights: None = None) -> Tensor:
    if fweights is not None or aweights is not None:
        raise NotImplementedError("cov with weights")
    x = x.reshape(-1, x.shape[-1] if x.dim() else 1)
    deviation = x - x.mean(-1, keepdim=True)
    return ((deviation @ deviation.mH) / max(x.shape[-1] - correction, 0)).squeeze()


@composed("corrcoef")
def _corrcoef(x: Tensor) -> Tensor:
    x = x.reshape(-1, x.shape[-1] if x.dim() else 1)
    deviation = x - x.mean(-1, keepdim=True)
    unit = deviation / norm(deviation, 2, -1, keepdim=True)
    return (unit @ unit.mH).squeeze()


@composed("norm")
def norm(x: Tensor, p: Any = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None, **_: Any) -> Tensor:
    """Return the norm of vectors.

    Raises:
        NotImplementedError: If it is that of the singular values of a matrix, or no norm.
    """
    p = 2 if p in (None, "fro") else p
    if not isinstance(p, (int, float)) or not p:
        raise NotImplementedError(f"norm with p={p}")
    x = x.to(dtype) if dtype is not None else x
    if p != 2 or x.is_complex():
        x = x.abs()
    dim = list(range(x.dim())) if dim is None else dim
    if p == 1:
        return x.sum(dim, keepdim=keepdim)
    if p == torch.inf:
        return amax(x, dim, keepdim)
    if p == -torch.inf:
        return -amax(-x, dim, keepdim)
    if p == 2:
        return x.square().sum(dim, keepdim=keepdim).sqrt()
    return x.pow(p).sum(dim, keepdim=keepdim).pow(1 / p)


@composed("linalg_vector_norm")
def _vector_norm(x: Tensor, ord: float = 2, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    return norm(x, ord, dim, keepdim, dtype)


@composed("linalg_matrix_norm")
def _matrix_norm(
    x: Tensor, ord: Any = "fro", dim: Any = (-2, -1), keepdim: bool = False, *, dtype: Any = None
) -> Tensor:
    if ord != "fro":
        raise NotImplementedError(f"norm {ord!r} of a matrix")
    return norm(x, 2, dim, keepdim, dtype)


@composed("linalg_norm")
def _norm(x: Tensor, ord: Any = None, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> Tensor:
    axes = x.dim() if dim is None else 1 if isinstance(dim, int) else len(dim)
    if ord is not None and axes == 2:
        return _matrix_norm(x, ord, (-2, -1) if dim is None else dim, keepdim, dtype=dtype)
    return norm(x, ord, dim, keepdim, dtype)


@composed("frobenius_norm")
def _frobenius_norm(x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    return norm(x, 2, dim, keepdim)


@composed("dist")
def _dist(x: Tensor, y: Tensor, p: float = 2) -> Tensor:
    return norm(x - y, p)


@composed("norm_except_dim")
def _norm_except_dim(v: Tensor, pow: int = 2, dim: int = 0) -> Tensor:
    return norm(v, pow) if dim == -1 else norm(v, pow, [d for d in range(v.dim()) if d != dim], keepdim=True)


@composed("renorm")
def _renorm(x: Tensor, p: float, dim: int, maxnorm: float) -> Tensor:
    return x * (maxnorm / (_norm_except_dim(x, p, dim % x.dim()) + 1e-7)).clamp_max(1)


@composed("normalize")
def _normalize(x: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, **_: Any) -> Tensor:
    return x / norm(x, p, dim, keepdim=True).clamp_min(eps)


@composed("cosine_similarity")
def cosine_similarity(x1: Tensor, x2: Tensor, dim: int = 1, eps: float = 1e-8) -> Tensor:
    """Return the product of two vectors over that of their norms, none of which is taken below ``eps``."""
    x1, x2 = torch.broadcast_tensors(x1, x2)
    return (_normalize(x1, 2, dim, eps) * _normalize(x2, 2, dim, eps)).sum(dim)


@composed("pairwise_distance")
def pairwise_distance(x1: Tensor, x2: Tensor, p: float = 2.0, eps: float = 1e-6, keepdim: bool = False) -> Tensor:
    """Return the norm of the difference of vectors, to which ``eps`` is added."""
    return norm(x1 - x2 + eps, p, -1, keepdim)


@composed("cdist")
def _cdist(x1: Tensor, x2: Tensor, p: float = 2.0, compute_mode: Any = None) -> Tensor:
    return norm(x1.unsqueeze(-2) - x2.unsqueeze(-3), p, -1)


@composed("pdist")
def _pdist(x: Tensor, p: float = 2.0) -> Tensor:
    first, second = torch.triu_indices(len(x), len(x), 1, device=x.device)
    return norm(x[first] - x[second], p, -1)
