"""Functions written in other functions: the decorator above each definition is the function's row in the table.

A definition has the parameters of torch's function. An argument that it cannot follow raises NotImplementedError, whose
message becomes part of the error. Here are passing, activations, exponentials and attention; the modules beside this
one hold those of a kind.
"""

from __future__ import annotations

import math
from functools import reduce
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import has_torch_function_unary

from captum_ssm.layers.log_domain import log_of_sum, normalized_exponentials
from captum_ssm.operators.attention import weighted_sums
from captum_ssm.relevance.functions.table import composed
from captum_ssm.relevance.functions.torch_code import as_torch_writes_it


@composed("detach", aliases=("data", "detach_copy"))
def _detach(input: Tensor) -> Tensor:
    """Return the tensor itself: a difference of the output passes where a gradient does not."""
    return input.view_as(input)


@composed("dropout")
@composed("dropout1d")
@composed("dropout2d")
@composed("dropout3d")
@composed("alpha_dropout")
@composed("feature_dropout")
@composed("feature_alpha_dropout")
def _dropout(input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False) -> Tensor:
    if training and p:
        raise NotImplementedError("dropout in training mode")
    return input


@composed("embedding")
def _embedding(
    input: Tensor, weight: Tensor, padding_idx: Any = None, max_norm: Any = None, *_: Any, **__: Any
) -> Tensor:
    """Look up; ``torch.embedding`` has its first two arguments the other way round, and a number third and fourth."""
    if weight.is_floating_point() and max_norm is not None:
        raise NotImplementedError("embedding with a largest norm")
    if weight.is_floating_point() and input.is_floating_point():
        raise NotImplementedError("embedding takes integers, and these are floating-point numbers")
    return weight[input] if weight.is_floating_point() else input[weight]


# --- Activations --------------------------------------------------------------------------------------------------


@composed("glu")
def _glu(x: Tensor, dim: int = -1) -> Tensor:
    value, gate = x.chunk(2, dim)
    return value * gate.sigmoid()


@composed("prelu")
def _prelu(x: Tensor, weight: Tensor) -> Tensor:
    weight = weight.view(-1, *[1] * (x.dim() - 2)) if x.dim() > 1 and weight.numel() > 1 else weight.squeeze()
    return x.relu() - weight * (-x).relu()


@composed("rrelu")
def _rrelu(
    x: Tensor, lower: float = 1 / 8, upper: float = 1 / 3, training: bool = False, inplace: bool = False
) -> Tensor:
    if training or inplace:
        raise NotImplementedError("rrelu in training mode, or in place")
    return F.leaky_relu(x, (lower + upper) / 2)


# --- Exponentials -------------------------------------------------------------------------------------------------


@composed("softmax", aliases=("special_softmax",))
def _softmax(x: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None, **_: Any) -> Tensor:
    return normalized_exponentials(_typed(x, _stacklevel, dtype), -1 if dim is None else dim)


@composed("softmin")
def _softmin(x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    return _softmax(-x, *args, **kwargs)


@composed("logsumexp", aliases=("special_logsumexp",))
def _logsumexp(x: Tensor, dim: Any, keepdim: bool = False) -> Tensor:
    if x.is_complex():
        raise NotImplementedError("a sum of exponentials of complex numbers")
    total = log_of_sum(x, tuple(dim) if isinstance(dim, list) else dim)
    return total if keepdim else total.squeeze(dim)


@composed("log_softmax", aliases=("special_log_softmax",))
def _log_softmax(x: Tensor, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None, **_: Any) -> Tensor:
    x = _typed(x, _stacklevel, dtype)
    return x - _logsumexp(x, -1 if dim is None else dim, keepdim=True)


def _typed(x: Tensor, third: Any, dtype: Any) -> Tensor:
    """Return ``x`` in the type that is asked for: the third argument in ``torch``, the fourth in ``functional``."""
    dtype = third if isinstance(third, torch.dtype) else dtype
    return x if dtype is None else x.to(dtype)


@composed("logaddexp")
def _logaddexp(x: Tensor, y: Tensor) -> Tensor:
    return _logsumexp(torch.stack(list(torch.broadcast_tensors(x, y))), 0)


@composed("logaddexp2")
def _logaddexp2(x: Tensor, y: Tensor) -> Tensor:
    return _logaddexp(x * math.log(2), y * math.log(2)) / math.log(2)


@composed("logcumsumexp")
def _logcumsumexp(x: Tensor, dim: int) -> Tensor:
    """Sum over the entries up to each, which are L² for L along the axis."""
    if not x.dim():
        return x
    x = x.movedim(dim, -1)
    later = torch.ones(x.shape[-1], x.shape[-1], dtype=torch.bool, device=x.device).triu(1)
    return _logsumexp(x.unsqueeze(-2).masked_fill(later, -torch.inf), -1).movedim(-1, dim)


# --- Attention ----------------------------------------------------------------------------------------------------


_LOST = 64
"""Scores of this size or less are lost, or rounded to equal ones, in sums with numbers of its size over epsilon."""


@composed("scaled_dot_product_attention")
def _attention(
    q: Tensor, k: Tensor, v: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    if dropout_p:
        raise NotImplementedError("attention with dropout")
    dtype = reduce(torch.promote_types, (t.dtype for t in (q, k, v)))
    q, k, v = (t if t.dtype == dtype else t.to(dtype) for t in (q, k, v))  # constants of a model in half precision
    if enable_gqa:
        k, v = (t.repeat_interleave(q.shape[-3] // t.shape[-3], -3) for t in (k, v))
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    if attn_mask is None:
        return weighted_sums(q, k, v, None, is_causal, scale)
    if attn_mask.dtype == torch.bool:
        attn_mask = torch.zeros_like(attn_mask, dtype=dtype).masked_fill(~attn_mask, -torch.inf)
    mask = attn_mask.to(dtype)
    sees_any = (mask > -torch.inf).any(-1, keepdim=True)
    q = q.masked_fill((mask <= -_LOST / torch.finfo(dtype).eps).all(-1, keepdim=True), 0)
    if has_torch_function_unary(mask):  # a bias that depends on the tokens
        y = F.softmax(q @ k.mT * scale + mask.masked_fill(~sees_any, 0), dim=-1) @ v
    else:
        mask = (mask - mask.amax(-1, keepdim=True)).masked_fill(~sees_any, 0)  # what all keys share has no effect
        y = weighted_sums(q, k, v, mask, is_causal, scale)
    return y * sees_any


composed("multi_head_attention_forward")(as_torch_writes_it(F.multi_head_attention_forward))
