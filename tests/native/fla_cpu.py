"""Run flash-linear-attention on a machine without a GPU: its own naive functions in the place of its kernels.

Tensors on a GPU go to the kernels as ever. The recurrences are the package's reference implementations; norms,
convolutions and activations are written with torch's functions.

Source:
    flash-linear-attention 0.6.0, ``fla/ops/*/naive.py``, ``fla/ops/rwkv6/recurrent_naive.py``, ``fla/modules``.
"""

import inspect
import sys
from collections.abc import Callable
from functools import wraps
from itertools import pairwise
from typing import Any

import pytest

pytest.importorskip("fla")

import fla.layers  # noqa: F401
import fla.models  # noqa: F401  every module that holds one of the names below must be there to be changed
import fla.modules as modules
import torch
import torch.nn.functional as F
from fla.modules import activations
from fla.modules.rotary.ops import rotary_embedding_ref
from fla.ops.delta_rule.naive import delta_rule_recurrence
from fla.ops.gated_delta_rule.naive import naive_recurrent_gated_delta_rule
from fla.ops.generalized_delta_rule.dplr.naive import dplr_recurrence
from fla.ops.gla.naive import naive_recurrent_gla
from fla.ops.kda.gate import naive_kda_gate, naive_kda_lowerbound_gate
from fla.ops.kda.naive import naive_recurrent_kda
from fla.ops.retention.naive import naive_retention
from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6
from fla.ops.rwkv7.fused_addcmul import torch_addcmul_rwkv7
from fla.ops.rwkv7.fused_k_update import k_update_ref
from fla.ops.rwkv7.gate_output_correction import gate_output_correction_ref
from torch import Tensor

ACTIVATIONS: dict[str | None, Callable[[Tensor], Tensor]] = {
    "swish": F.silu,
    "silu": F.silu,
    "sigmoid": torch.sigmoid,
    None: lambda x: x,
}


def swap(*tensors: Tensor) -> list[Tensor]:
    """Exchange tokens and heads."""
    return [t.transpose(1, 2) for t in tensors]


def packed(function: Callable[..., Any]) -> Callable[..., Any]:
    """Let a function of tensors (1, T, ...) run on each of the sequences that are packed into one."""

    def run(*tensors: Tensor, cu_seqlens: Tensor | None = None, **options: Any) -> Tensor:
        if cu_seqlens is None:
            return function(*tensors, **options)
        parts = pairwise(cu_seqlens.tolist())
        return torch.cat([function(*(t[:, i:j] for t in tensors), **options) for i, j in parts], dim=1)

    return run


def state(given: Tensor | None) -> None:
    assert given is None, "the references start without a state"


# --- recurrences: layers want (output, final state) ----------------------------------------------------------------


@packed
def gla_reference(q: Tensor, k: Tensor, v: Tensor, g: Tensor) -> Tensor:
    return naive_recurrent_gla(q, k, v, g)[0]


def gla(
    q: Any, k: Any, v: Any, g: Any = None, gk: Any = None, initial_state: Any = None, cu_seqlens: Any = None, **_: Any
) -> Any:
    state(initial_state)
    return gla_reference(q, k, v, gk if g is None else g, cu_seqlens=cu_seqlens), None


@packed
def retention_reference(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    return naive_retention(*swap(q, k, v)).transpose(1, 2)


def retention(q: Any, k: Any, v: Any, initial_state: Any = None, cu_seqlens: Any = None, **_: Any) -> Any:
    state(initial_state)
    return retention_reference(q, k, v, cu_seqlens=cu_seqlens), None


@packed
def delta_reference(q: Tensor, k: Tensor, v: Tensor, beta: Tensor) -> Tensor:
    return delta_rule_recurrence(*swap(q, k, v, beta))[0].transpose(1, 2)


def delta(
    q: Any, k: Any, v: Any, beta: Any, initial_state: Any = None, cu_seqlens: Any = None,
    use_qk_l2norm_in_kernel: bool = False, **_: Any,
) -> Any:  # fmt: skip
    state(initial_state)
    q, k = (l2_norm(t) if use_qk_l2norm_in_kernel else t for t in (q, k))
    return delta_reference(q, k, v, beta, cu_seqlens=cu_seqlens), None


@packed
def gated_delta_reference(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    return naive_recurrent_gated_delta_rule(q, k, v, beta, g)[0].to(v)


def gated_delta(
    q: Any, k: Any, v: Any, g: Any, beta: Any, A_log: Any, dt_bias: Any, initial_state: Any = None,
    cu_seqlens: Any = None, allow_neg_eigval: bool = False, **options: Any,
) -> Any:  # fmt: skip
    state(initial_state)
    assert all(options[f"use_{what}_in_kernel"] for what in ("qk_l2norm", "gate", "beta_sigmoid"))
    g = -A_log.exp() * F.softplus(g + dt_bias)
    beta = (2 if allow_neg_eigval else 1) * beta.sigmoid()
    groups = v.shape[2] // q.shape[2]
    q, k = (l2_norm(t).repeat_interleave(groups, 2) for t in (q, k))
    return gated_delta_reference(q, k, v, g, beta, cu_seqlens=cu_seqlens), None


@packed
def kda_reference(q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor) -> Tensor:
    return naive_recurrent_kda(q, k, v, g, beta)[0]


def kda(
    q: Any, k: Any, v: Any, g: Any, beta: Any, A_log: Any, dt_bias: Any, initial_state: Any = None,
    cu_seqlens: Any = None, allow_neg_eigval: bool = False, lower_bound: float | None = None, **options: Any,
) -> Any:  # fmt: skip
    state(initial_state)
    assert all(options[f"use_{what}_in_kernel"] for what in ("qk_l2norm", "gate", "beta_sigmoid"))
    bound = {} if lower_bound is None else {"lower_bound": lower_bound}
    g = (naive_kda_lowerbound_gate if bound else naive_kda_gate)(g, A_log, dt_bias, **bound)
    beta = (2 if allow_neg_eigval else 1) * beta.sigmoid()
    return kda_reference(l2_norm(q), l2_norm(k), v, g, beta, cu_seqlens=cu_seqlens), None


def rwkv6(
    r: Any, k: Any, v: Any, w: Any, u: Any, scale: float, initial_state: Any = None, cu_seqlens: Any = None, **_: Any
) -> Any:
    state(initial_state)
    assert cu_seqlens is None
    return naive_recurrent_rwkv6(*swap(r, k, v, w), u, scale)[0].transpose(1, 2), None


def rwkv7(
    r: Any, w: Any, k: Any, v: Any, a: Any, b: Any, scale: float, initial_state: Any = None, cu_seqlens: Any = None,
    **_: Any,
) -> Any:  # fmt: skip
    state(initial_state)
    assert cu_seqlens is None
    scaled = r * r.shape[-1] ** 0.5 * scale  # the reference divides by this root
    y, _ = dplr_recurrence(*swap(*(t.float() for t in (scaled, k, v, a, b, w))))
    return y.transpose(1, 2).to(v), None


def mul_rwkv7(r: Any, w: Any, k: Any, v: Any, kk: Any, a: Any, **options: Any) -> Any:
    return rwkv7(r, w, k, v, -kk, kk * a, **options)


# --- all around them -----------------------------------------------------------------------------------------------


def l2_norm(x: Tensor, eps: float = 1e-6, output_dtype: Any = None) -> Tensor:
    return x * torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def norm(x: Tensor, weight: Any, bias: Any, eps: float, centre: bool, groups: int = 1) -> Tensor:
    parts = x.unflatten(-1, (groups, -1))
    parts = parts - parts.mean(-1, keepdim=True) if centre else parts
    y = (parts * torch.rsqrt(parts.square().mean(-1, keepdim=True) + eps)).flatten(-2)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


def norm_forward(
    self: Any, x: Tensor, residual: Any = None, prenorm: bool = False, residual_in_fp32: bool = False
) -> Any:
    x = x if residual is None else x + residual
    centre = not isinstance(self, modules.RMSNorm) and not getattr(self, "is_rms_norm", False)
    y = norm(x, self.weight, self.bias, self.eps, centre, getattr(self, "num_groups", None) or 1)
    return (y, x) if prenorm else y


def gated_norm_forward(self: Any, x: Tensor, g: Tensor, **_: Any) -> Tensor:
    return norm(x, self.weight, None, self.eps, False) * ACTIVATIONS[self.activation](g)


def rms_norm_linear(x: Tensor, norm_weight: Any, norm_bias: Any, W: Tensor, bias: Any, eps: float = 1e-5) -> Tensor:
    return F.linear(norm(x, norm_weight, norm_bias, eps, False), W, bias)


@packed
def conv(x: Tensor, *, weight: Tensor, bias: Any, activation: str | None) -> Tensor:
    (D, K), L = weight.shape, x.shape[1]
    y = F.conv1d(x.transpose(1, 2), weight.unsqueeze(1), bias, padding=K - 1, groups=D)
    return ACTIVATIONS[activation](y[..., :L].transpose(1, 2))


def causal_conv1d(
    x: Any, weight: Any = None, bias: Any = None, activation: Any = None, cu_seqlens: Any = None, **_: Any
) -> Any:
    return conv(x, weight=weight, bias=bias, activation=activation, cu_seqlens=cu_seqlens), None


def conv_forward(self: Any, x: Tensor, cache: Any = None, cu_seqlens: Any = None, **_: Any) -> Any:
    state(cache)
    return causal_conv1d(x, self.weight.squeeze(1), self.bias, self.activation, cu_seqlens)


def token_shift(x: Tensor, cu_seqlens: Any = None, cache: Any = None, output_cache: bool = False) -> Any:
    state(cache)
    assert cu_seqlens is None
    delta = F.pad(x, (0, 0, 1, -1)) - x
    return (delta, x[:, -1:]) if output_cache else delta


def rotary_embedding(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False, cu_seqlens: Any = None, **_: Any
) -> Any:
    return packed(lambda t: rotary_embedding_ref(t, cos[: t.shape[1]], sin[: t.shape[1]], interleaved))(
        x, cu_seqlens=cu_seqlens
    )


def mlp_forward(self: Any, x: Tensor, **_: Any) -> Tensor:
    assert self.hidden_act == "swish"
    return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def flash_attn_func(q: Tensor, k: Tensor, v: Tensor, causal: bool, window_size: tuple[int, int]) -> Tensor:
    """Attention of (B, L, H, P): a query sees itself and, in a window, so many keys before it."""
    assert causal and window_size in ((-1, -1), (window_size[0], 0))
    behind = torch.arange(q.shape[1]).view(-1, 1) - torch.arange(q.shape[1])
    seen = (behind >= 0) & (behind <= (window_size[0] if window_size[0] >= 0 else q.shape[1]))
    q, k, v = swap(q, k, v)
    return F.scaled_dot_product_attention(q, k, v, seen, enable_gqa=True).transpose(1, 2)


def flash_attn_varlen_func(q: Tensor, k: Tensor, v: Tensor, *, cu_seqlens_q: Tensor, **options: Any) -> Tensor:
    kept = {name: options[name] for name in ("causal", "window_size")}
    each = packed(lambda *tensors: flash_attn_func(*tensors, **kept))
    return each(*(t.unsqueeze(0) for t in (q, k, v)), cu_seqlens=cu_seqlens_q).squeeze(0)


FUNCTIONS = {
    **dict.fromkeys(("chunk_gla", "fused_chunk_gla", "fused_recurrent_gla"), gla),
    **dict.fromkeys(
        ("chunk_retention", "fused_chunk_retention", "fused_recurrent_retention", "parallel_retention"), retention
    ),
    **dict.fromkeys(("chunk_delta_rule", "fused_recurrent_delta_rule"), delta),
    **dict.fromkeys(("chunk_gated_delta_rule", "fused_recurrent_gated_delta_rule"), gated_delta),
    **dict.fromkeys(("chunk_kda", "fused_recurrent_kda"), kda),
    **dict.fromkeys(("chunk_rwkv6", "fused_recurrent_rwkv6"), rwkv6),
    "chunk_rwkv7": rwkv7,
    "fused_mul_recurrent_rwkv7": mul_rwkv7,
    "fused_addcmul_rwkv7": torch_addcmul_rwkv7,
    "fused_k_rwkv7": k_update_ref,
    "gate_output_correction": gate_output_correction_ref,
    "l2_norm": l2_norm,
    "rms_norm_linear": rms_norm_linear,
    "causal_conv1d": causal_conv1d,
    "token_shift": token_shift,
    "rotary_embedding": rotary_embedding,
    "elu_p1": lambda x: F.elu(x) + 1,
}
"""By the name under which layers import them."""

FORWARDS: dict[Any, Callable[..., Any]] = {
    modules.RMSNorm: norm_forward,
    modules.LayerNorm: norm_forward,
    modules.GroupNorm: norm_forward,
    modules.FusedRMSNormGated: gated_norm_forward,
    modules.ShortConvolution: conv_forward,
    modules.GatedMLP: mlp_forward,
}

INSIDE = {
    "swish_fwd": lambda x, output_contiguous=False: F.silu(x),
    "swish_bwd": lambda x, dy, **_: dy * x.sigmoid() * (1 + x * (1 - x.sigmoid())),
    "sigmoid_fwd": lambda x, output_contiguous=False: x.sigmoid(),
    "sigmoid_bwd": lambda x, dy, **_: dy * x.sigmoid() * (1 - x.sigmoid()),
    "sqrelu_fwd": lambda x: x.relu().square(),
    "sqrelu_bwd": lambda g, x: 2 * g * x.relu(),
}
"""What the package's activations call: their names stay those of its own functions."""


def by_device(native: Callable[..., Any], cpu: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(native if inspect.isfunction(native) else cpu)
    def function(*args: Any, **kwargs: Any) -> Any:
        on_gpu = any(isinstance(value, Tensor) and value.is_cuda for value in (*args, *kwargs.values()))
        return (native if on_gpu else cpu)(*args, **kwargs)

    function.by_device = True  # type: ignore[attr-defined]
    return function


def enable() -> None:
    """Change the package, once."""
    for cls, cpu in FORWARDS.items():
        if not hasattr(cls.forward, "by_device"):
            cls.forward = by_device(cls.forward, cpu)
    tables = {
        name: FUNCTIONS for name in sys.modules if name.startswith(("fla.layers", "fla.models", "fla.modules.rotary"))
    }
    for name, table in {**tables, "fla.modules.activations.ops": INSIDE}.items():
        for function in table.keys() & vars(sys.modules[name]).keys():
            native = getattr(sys.modules[name], function)
            if callable(native) and not inspect.ismodule(native) and not hasattr(native, "by_device"):
                setattr(sys.modules[name], function, by_device(native, table[function]))

    attn: Any = sys.modules["fla.layers.attn"]
    if attn.flash_attn_func is None:  # the package it comes from is not installed
        attn.flash_attn_func, attn.flash_attn_varlen_func = flash_attn_func, flash_attn_varlen_func


assert activations.ops is sys.modules["fla.modules.activations.ops"]
enable()
