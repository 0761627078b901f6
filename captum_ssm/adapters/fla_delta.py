"""The delta rule of flash-linear-attention: DeltaNet, Gated DeltaNet and Kimi delta attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.adapters.fla_reading import low_rank, norm, short_conv, unpadded
from captum_ssm.adapters.reading import parameters, to_heads
from captum_ssm.gates import activation, inverse_length
from captum_ssm.layers.mixers import register
from captum_ssm.operators import Chain, DeltaScan, Diagonal, Operator, Projection

_EPS = 1e-6
"""Added to the squared length of every query and key, and the least sum of their sizes. A constant of the kernels."""


@register("DeltaNet", kernel="delta rule", family="fla")
def delta_net(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """DeltaNet: ``h_t = (I - beta_t k_t k_t^T) h_{t-1} + beta_t k_t v_t``, ``y_t = <q_t, h_t> / sqrt(N)``.

    ``y = W_out [diag(silu(z))] diag(norm) S diag(act) [M_conv] W_v diag(mask) x`` with ``beta = sigmoid(W_b x)``, twice
    that where negative eigenvalues are allowed, or constant. Queries and keys go through an activation, and have
    length 1, or entries whose sizes sum to 1.

    Args:
        mixer: ``DeltaNet`` of fla.
        x: Input (B, L, E).
        kwargs: ``attention_mask`` (B, L), 0 at padding, is respected.

    Returns:
        Chain of ``out, gate, norm, scan, act, conv, in``, where there are such, and, with a mask, ``mask``.

    Source:
        flash-linear-attention ``layers/delta_net.py``; Yang et al. 2024 (arXiv 2406.06484), equation 4.
    """
    weights, mask = parameters(mixer, x), unpadded(mixer, kwargs, x)
    real = Chain(mask).apply(x)
    acts = {"v": "silu"} if mixer.qk_activation != "silu" else dict.fromkeys("qkv", "silu")
    q, k, v = (short_conv(mixer, weights, name, real, acts.get(name)) for name in "qkv")
    queries, keys = (Chain(t).apply(real, bias=True).unflatten(-1, (mixer.num_heads, -1)) for t in (q, k))
    if mixer.qk_activation != "silu":
        queries, keys = (_activated(mixer.qk_activation, t) for t in (queries, keys))
    unit = _unit if mixer.qk_norm == "l2" else _share
    beta = F.linear(real, weights["b_proj.weight"]).sigmoid() if mixer.use_beta else torch.ones_like(keys[..., 0])
    largest = 2 if mixer.allow_neg_eigval else 1
    gate = F.silu(F.linear(real, weights["g_proj.weight"])) if mixer.use_gate else None
    one = torch.ones_like(beta[:1, :1, :1, None])
    return _layer(mixer, weights, real, mask, unit(queries), unit(keys), v, one, largest * beta, gate)


@register("GatedDeltaNet", kernel="GDN", family="fla")
def gated_delta_net(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Gated DeltaNet, as :func:`captum_ssm.adapters.delta.gdn`; the convolution and the output gate may be absent.

    Args:
        mixer: ``GatedDeltaNet`` of fla.
        x: Input (B, L, E).
        kwargs: ``attention_mask`` (B, L), 0 at padding, is respected.

    Returns:
        Chain of ``out, gate, norm, scan, act, conv, in``, where there are such, and, with a mask, ``mask``.

    Source:
        flash-linear-attention ``layers/gated_deltanet.py``; Yang et al. 2024 (arXiv 2412.06464), equation 10.
    """
    weights, mask = parameters(mixer, x), unpadded(mixer, kwargs, x)
    real = Chain(mask).apply(x)
    f = F.linear(real, weights["a_proj.weight"]) + weights["dt_bias"]
    a = torch.exp(-weights["A_log"].exp() * F.softplus(f)).unsqueeze(-1)
    z = F.linear(real, weights["g_proj.weight"]) if mixer.use_gate else None
    gate = None if z is None else activation(mixer.o_norm.activation, z)
    return _layer(mixer, weights, real, mask, *_heads(mixer, weights, real), a, _beta(mixer, weights, real), gate)


@register("KimiDeltaAttention", kernel="KDA", family="fla")
def kimi_delta(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Kimi delta attention, as :func:`captum_ssm.adapters.delta.kda`; the convolution may be absent.

    Args:
        mixer: ``KimiDeltaAttention`` of fla.
        x: Input (B, L, E).
        kwargs: ``attention_mask`` (B, L), 0 at padding, is respected.

    Returns:
        Chain of ``out, gate, norm, scan, act, conv, in``, where there are such, and, with a mask, ``mask``.

    Source:
        flash-linear-attention ``layers/kda.py``; Kimi Team 2025 (arXiv 2510.26692), equation 1.
    """
    weights, mask = (
        parameters(mixer, x),
        unpadded(mixer, kwargs, x),
    )
    real = Chain(mask).apply(x)
    f = (low_rank(weights, "f_proj", real) + weights["dt_bias"]).unflatten(-1, (mixer.num_v_heads, -1))
    rate, bound = weights["A_log"].exp().view(-1, 1), mixer.lower_bound
    log_a = -rate * F.softplus(f) if bound is None else bound * (rate * f).sigmoid()
    gate = activation(mixer.o_norm.activation, low_rank(weights, "g_proj", real))
    return _layer(
        mixer, weights, real, mask, *_heads(mixer, weights, real), log_a.exp(), _beta(mixer, weights, real), gate
    )


def _heads(mixer: Any, weights: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor, dict[str, Operator]]:
    """Return unit queries and keys (B, L, H, N), a key head for each group of value heads, and the values' factors."""
    q, k, v = (short_conv(mixer, weights, name, x, "silu") for name in "qkv")
    queries, keys = (Chain(t).apply(x, bias=True).unflatten(-1, (mixer.num_heads, -1)) for t in (q, k))
    return _unit(to_heads(queries, mixer.num_v_heads)), _unit(to_heads(keys, mixer.num_v_heads)), v


def _beta(mixer: Any, weights: Mapping[str, Tensor], x: Tensor) -> Tensor:
    """Return how much of what is found at its key a token erases and rewrites, (B, L, H)."""
    return (2 if mixer.allow_neg_eigval else 1) * F.linear(x, weights["b_proj.weight"]).sigmoid()


def _layer(
    mixer: Any,
    weights: Mapping[str, Tensor],
    x: Tensor,
    mask: Mapping[str, Diagonal],
    q: Tensor,
    k: Tensor,
    v: Mapping[str, Operator],
    a: Tensor,
    beta: Tensor,
    gate: Tensor | None,
) -> Chain:
    """Return the layer.

    Args:
        mixer: The layer.
        weights: Its parameters by name.
        x: Its input (B, L, E), 0 at padding.
        mask: Its padding, as a factor.
        q: Queries (B, L, H, N).
        k: Keys, likewise.
        v: Factors that make the values.
        a: Decays (B, L, H, N), with 1 where they are shared.
        beta: (B, L, H).
        gate: Output gate (B, L, D), or None.
    """
    H, P = beta.shape[-1], mixer.head_v_dim
    write = Chain(mask).apply(beta).unsqueeze(-1) * k
    scan = DeltaScan(a=a, b=write, c=q * q.shape[-1] ** -0.5, recall=a * k, erase=write, head_size=P)
    found = scan.apply(Chain(v).apply(x, bias=True)).unflatten(-1, (H, P))
    factors: dict[str, Operator] = {
        "out": Projection(weights["o_proj.weight"]),
        **({} if gate is None else {"gate": Diagonal(gate)}),
        "norm": norm(found, mixer.o_norm.eps, weights.get("o_norm.weight"), mask),
        "scan": scan,
    }
    return Chain({**factors, **v, **mask})


def _unit(t: Tensor) -> Tensor:
    return t * inverse_length(t, _EPS)


def _share(t: Tensor) -> Tensor:
    return t / t.abs().sum(-1, keepdim=True).clamp_min(_EPS)


def _activated(name: str, t: Tensor) -> Tensor:
    return F.elu(t) + 1 if name == "elu" else activation(name, t)
