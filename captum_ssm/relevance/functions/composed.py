"""Functions written in other functions: the decorator above each definition is the function's row in the table.

A definition has the parameters of torch's function. An argument that it cannot follow raises NotImplementedError, whose
message becomes part of the error.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.layers.log_domain import log_of_sum, normalized_exponentials
from captum_ssm.relevance.functions.table import composed


@composed("div", aliases=("truediv", "divide", "true_divide"), in_place=("idiv", "itruediv"))
def _divide(x: Any, y: Any, *, rounding_mode: None = None) -> Any:
    if rounding_mode is not None:
        raise NotImplementedError("div with a rounding mode")
    return x * torch.reciprocal(y) if isinstance(y, Tensor) else x * (1 / y)


@composed("rdiv", aliases=("rtruediv",))
def _divide_by(y: Tensor, x: Any) -> Any:
    return x * torch.reciprocal(y)


@composed("rpow")
def _raise_to(exponent: Tensor, base: Any) -> Any:
    return torch.pow(base, exponent)


@composed("detach", aliases=("data",))
def _detach(input: Tensor) -> Tensor:
    """Return the tensor itself: a difference of the output passes where a gradient does not."""
    return input.view_as(input)


@composed("softmax")
def _softmax(x: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None, **_: Any) -> Tensor:
    return normalized_exponentials(x if dtype is None else x.to(dtype), -1 if dim is None else dim)


@composed("logsumexp")
def _logsumexp(x: Tensor, dim: int, keepdim: bool = False) -> Tensor:
    total = log_of_sum(x, dim)
    return total if keepdim else total.squeeze(dim)


@composed("log_softmax")
def _log_softmax(x: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None, **_: Any) -> Tensor:
    x = x if dtype is None else x.to(dtype)
    return x - _logsumexp(x, -1 if dim is None else dim, keepdim=True)


def normalized(x: Tensor, dims: list[int], weight: Any, bias: Any, eps: float, centre: bool) -> Tensor:
    """Return ``x`` over its root mean square along ``dims``, of its deviation from the mean if ``centre``."""
    x = x - x.mean(dims, keepdim=True) if centre else x
    y = x * torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


@composed("layer_norm")
def _layer_norm(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any) -> Tensor:
    return normalized(x, list(range(-len(shape), 0)), weight, bias, eps, centre=True)


@composed("rms_norm")
def _rms_norm(x: Tensor, shape: Any, weight: Any = None, eps: float | None = None) -> Tensor:
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return normalized(x, list(range(-len(shape), 0)), weight, None, eps, centre=False)


@composed("batch_norm")
def _batch_norm(
    x: Tensor,
    mean: Any,
    var: Any,
    weight: Any = None,
    bias: Any = None,
    training: Any = False,
    momentum: Any = 0.1,
    eps: float = 1e-5,
    *torch_batch_norm: Any,
) -> Tensor:
    if training is not False or torch_batch_norm:
        raise NotImplementedError("batch_norm by the statistics of a batch, or as torch.batch_norm")
    shape = (-1, *[1] * (x.dim() - 2))
    y = (x - mean.view(shape)) * torch.rsqrt(var + eps).view(shape)
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


@composed("group_norm")
def _group_norm(x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any) -> Tensor:
    y = normalized(x.unflatten(1, (groups, -1)).flatten(2), [-1], None, None, eps, centre=True).view(x.shape)
    shape = (-1, *[1] * (x.dim() - 2))
    y = y if weight is None else y * weight.view(shape)
    return y if bias is None else y + bias.view(shape)


@composed("var")
def _var(x: Tensor, dim: Any = None, unbiased: bool = True, keepdim: bool = False, *, correction: Any = None) -> Tensor:
    dims = list(range(x.dim())) if dim is None else [dim] if isinstance(dim, int) else list(dim)
    count = 1
    for d in dims:
        count *= x.shape[d]
    free = count - (int(unbiased) if correction is None else correction)
    return (x - x.mean(dims, keepdim=True)).square().sum(dims, keepdim=keepdim) / free


@composed("std")
def _std(*args: Any, **kwargs: Any) -> Tensor:
    return _var(*args, **kwargs).sqrt()


@composed("linalg_vector_norm")
@composed("norm")
def _norm(x: Tensor, p: Any = 2, dim: Any = None, keepdim: bool = False, **options: Any) -> Tensor:
    p = options.get("ord", 2 if p in (None, "fro") else p)
    if p not in (1, 2):
        raise NotImplementedError(f"norm with p={p}")
    dim = list(range(x.dim())) if dim is None else dim
    return x.abs().sum(dim, keepdim=keepdim) if p == 1 else x.square().sum(dim, keepdim=keepdim).sqrt()


@composed("normalize")
def _normalize(x: Tensor, p: float = 2.0, dim: int = 1, eps: float = 1e-12, **_: Any) -> Tensor:
    return x / _norm(x, p, dim, keepdim=True).clamp_min(eps)


@composed("maximum")
def _maximum(x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (x + y + (x - y).abs())


@composed("minimum")
def _minimum(x: Tensor, y: Tensor) -> Tensor:
    return 0.5 * (x + y - (x - y).abs())


@composed("glu")
def _glu(x: Tensor, dim: int = -1) -> Tensor:
    value, gate = x.chunk(2, dim)
    return value * gate.sigmoid()


@composed("bilinear")
def _bilinear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    z = torch.einsum("...i,oij,...j->...o", x, weight, y)
    return z if bias is None else z + bias


@composed("addmm")
def _addmm(bias: Tensor, x: Tensor, y: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return beta * bias + alpha * (x @ y)


@composed("baddbmm")
def _baddbmm(bias: Tensor, x: Tensor, y: Tensor, *, beta: float = 1, alpha: float = 1) -> Tensor:
    return beta * bias + alpha * (x @ y)


@composed("addcmul")
def _addcmul(x: Tensor, y: Tensor, z: Tensor, *, value: float = 1) -> Tensor:
    return x + value * (y * z)


@composed("lerp")
def _lerp(x: Tensor, y: Tensor, weight: Any) -> Tensor:
    return x + weight * (y - x)


@composed("scaled_dot_product_attention")
def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    scores = (q @ k.transpose(-1, -2)) * (q.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        visible = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
        scores = scores.masked_fill(~visible, -torch.inf)
    if attn_mask is not None:
        boolean = attn_mask.dtype == torch.bool
        scores = scores.masked_fill(~attn_mask, -torch.inf) if boolean else scores + attn_mask
    return F.softmax(scores, dim=-1) @ v


@composed("amax")
def _amax(x: Tensor, dim: Any = None, keepdim: bool = False) -> Tensor:
    if not isinstance(dim, int):
        raise NotImplementedError("amax over other than one axis")
    largest = x.gather(dim, x.argmax(dim, keepdim=True))
    return largest if keepdim else largest.squeeze(dim)
