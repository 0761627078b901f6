"""The delta rule of flash-linear-attention: DeltaNet, Gated DeltaNet and Kimi delta attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.layers.activations import activation
from captum_ssm.layers.delta_rule import EPS, delta_scan, log_decay, unit
from captum_ssm.layers.fla_factors import gapless_mask, masked_norm, projection_factors
from captum_ssm.layers.heads import to_heads
from captum_ssm.layers.mixers import register
from captum_ssm.layers.parameters import low_rank, parameters, projection
from captum_ssm.operators import Chain, Diagonal, Operator


@register("fla.DeltaNet", kernel="delta rule", family="fla")
def delta_net(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose a DeltaNet: the delta rule without decays.

    Equation::

        y = W_out diag(silu(z)) diag(norm) S diag(act) M_conv W_v diag(mask) x
        S: h_t = (I - beta_t k_t k_t^T) h_{t-1} + beta_t k_t v_t,  y_t = <q_t, h_t> / sqrt(N)
        beta = sigmoid(W_b x)

    Beta is doubled where negative eigenvalues are allowed, or constant. Queries and keys go through an activation, and
    have length 1, or entries whose absolute values add up to 1.

    Args:
        mixer: ``DeltaNet`` of fla.
        x: Input (B, L, E).
        kwargs: Arguments of the call; ``attention_mask`` (B, L) is 0 at padding.

    Returns:
        Chain of ``out``, ``gate``, ``norm``, ``scan``, ``act``, ``conv``, ``in`` and ``mask``, where they exist.

    Source:
        flash-linear-attention ``layers/delta_net.py``; Yang et al. 2024 (arXiv 2406.06484), equation 4.
    """
    weights, mask = parameters(mixer, x), gapless_mask(mixer, kwargs, x)
    masked, act = Chain(mask).apply(x), mixer.qk_activation
    acts = {"v": "silu"} if act != "silu" else dict.fromkeys("qkv", "silu")
    q, k, v = (projection_factors(mixer, weights, name, masked, acts.get(name)) for name in "qkv")
    queries, keys = (Chain(t).apply(masked, bias=True).unflatten(-1, (mixer.num_heads, -1)) for t in (q, k))
    if act != "silu":
        queries, keys = (F.elu(t) + 1 if act == "elu" else activation(act, t) for t in (queries, keys))
    scaled = unit if mixer.qk_norm == "l2" else _of_sum_one
    beta = _sigmoid(weights, "b_proj", masked) if mixer.use_beta else torch.ones_like(keys[..., 0])
    gate = F.silu(projection(weights, "g_proj").apply(masked, bias=True)) if mixer.use_gate else None
    a = torch.ones_like(beta[:1, :1, :1, None])
    beta = (2 if mixer.allow_neg_eigval else 1) * beta
    return _delta_layer(mixer, weights, masked, mask, scaled(queries), scaled(keys), v, a, beta, gate)


@register("fla.GatedDeltaNet", kernel="GDN", family="fla")
def gated_delta_net(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose a Gated DeltaNet: the delta rule with one decay for each head.

    Equation::

        y = W_out diag(act(z)) diag(norm) S diag(act) M_conv W_v diag(mask) x
        S: h_t = (I - beta_t k_t k_t^T) a_t h_{t-1} + beta_t k_t v_t,  y_t = <q_t, h_t> / sqrt(N)
        a = exp(-exp(A_log) softplus(W_a x + dt_bias)),  beta = sigmoid(W_b x)

    Queries and keys have length 1. Beta is doubled where negative eigenvalues are allowed. Each key head serves a group
    of consecutive value heads.

    Args:
        mixer: ``GatedDeltaNet`` of fla.
        x: Input (B, L, E).
        kwargs: Arguments of the call; ``attention_mask`` (B, L) is 0 at padding.

    Returns:
        Chain of ``out``, ``gate``, ``norm``, ``scan``, ``act``, ``conv``, ``in`` and ``mask``, where they exist.

    Source:
        flash-linear-attention ``layers/gated_deltanet.py``; Yang et al. 2024 (arXiv 2412.06464), equation 10.
    """
    weights, mask = parameters(mixer, x), gapless_mask(mixer, kwargs, x)
    masked = Chain(mask).apply(x)
    f = projection(weights, "a_proj").apply(masked, bias=True)
    a = log_decay(f, weights["A_log"], weights["dt_bias"]).exp()
    z = projection(weights, "g_proj").apply(masked, bias=True) if mixer.use_gate else None
    gate = None if z is None else activation(mixer.o_norm.activation, z)
    q, k, v, beta = _heads(mixer, weights, masked)
    return _delta_layer(mixer, weights, masked, mask, q, k, v, a, beta, gate)


@register("fla.KimiDeltaAttention", kernel="KDA", family="fla")
def kimi_delta(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose a Kimi delta attention: the delta rule with a decay for each state.

    Equation::

        y = W_out diag(act(z)) diag(norm) S diag(act) M_conv W_v diag(mask) x
        S: h_t = (I - beta_t k_t k_t^T) diag(a_t) h_{t-1} + beta_t k_t v_t,  y_t = <q_t, h_t> / sqrt(N)
        a = exp(-exp(A_log) softplus(f + dt_bias)),  f = W_f x,  beta = sigmoid(W_b x)

    Queries and keys have length 1. In a gate with a lower bound, a negative number, the logarithm of the decay is
    ``bound * sigmoid(exp(A_log) f)``. Beta is doubled where negative eigenvalues are allowed.

    Args:
        mixer: ``KimiDeltaAttention`` of fla.
        x: Input (B, L, E).
        kwargs: Arguments of the call; ``attention_mask`` (B, L) is 0 at padding.

    Returns:
        Chain of ``out``, ``gate``, ``norm``, ``scan``, ``act``, ``conv``, ``in`` and ``mask``, where they exist.

    Source:
        flash-linear-attention ``layers/kda.py``; Kimi Team 2025 (arXiv 2510.26692), equation 1.
    """
    weights, mask = parameters(mixer, x), gapless_mask(mixer, kwargs, x)
    masked = Chain(mask).apply(x)
    f = low_rank(weights, "f_proj", masked)
    a = log_decay(f, weights["A_log"], weights["dt_bias"], mixer.lower_bound).exp()
    gate = activation(mixer.o_norm.activation, low_rank(weights, "g_proj", masked))
    q, k, v, beta = _heads(mixer, weights, masked)
    return _delta_layer(mixer, weights, masked, mask, q, k, v, a, beta, gate)


def _heads(mixer: Any, weights: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, Tensor, dict[str, Operator], Tensor]:
    """Build unit queries and keys (B, L, H, N), the factors of the values, and beta (B, L, H)."""
    q, k, v = (projection_factors(mixer, weights, name, x, "silu") for name in "qkv")
    queries, keys = (Chain(t).apply(x, bias=True).unflatten(-1, (mixer.num_heads, -1)) for t in (q, k))
    beta = (2 if mixer.allow_neg_eigval else 1) * _sigmoid(weights, "b_proj", x)
    return unit(to_heads(queries, mixer.num_v_heads)), unit(to_heads(keys, mixer.num_v_heads)), v, beta


def _delta_layer(
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
    """Build the chain of a layer.

    Args:
        mixer: The layer.
        weights: Parameters by name.
        x: Input (B, L, E), 0 at padding.
        mask: Factor that sets padding to 0, or an empty dictionary.
        q: Queries (B, L, H, N).
        k: Keys (B, L, H, N).
        v: Factors that make the values.
        a: Decays (B, L, H, N), with 1 where they are shared.
        beta: Share of the value found at its key that a token erases and rewrites, (B, L, H).
        gate: Output gate (B, L, D), or None.

    Returns:
        Chain of ``out``, ``gate``, ``norm``, ``scan``, ``act``, ``conv``, ``in`` and ``mask``, where they exist.
    """
    H, norm = beta.shape[-1], mixer.o_norm
    scan = delta_scan(q, k, a, Chain(mask).apply(beta), P=mixer.head_v_dim)
    y = scan.apply(Chain(v).apply(x, bias=True))
    factors: dict[str, Operator] = {
        "out": projection(weights, "o_proj"),
        **({} if gate is None else {"gate": Diagonal(gate)}),
        "norm": masked_norm(y, H, norm.eps, weights.get("o_norm.weight"), mask),
        "scan": scan,
    }
    return Chain({**factors, **v, **mask})


def _sigmoid(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    return projection(weights, name).apply(x, bias=True).sigmoid()


def _of_sum_one(t: Tensor) -> Tensor:
    """Scale queries or keys (..., N) to absolute values that add up to 1."""
    return t / t.abs().sum(-1, keepdim=True).clamp_min(EPS)
