"""Linear attention of flash-linear-attention: RetNet, gated linear attention and HGRN2 differ in their decays alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.layers.activations import activation, activation_name
from captum_ssm.layers.fla_factors import gapless_mask, masked_norm, projection_factors
from captum_ssm.layers.heads import rows_to_heads, to_heads
from captum_ssm.layers.mixers import register
from captum_ssm.layers.parameters import low_rank, parameters, projection
from captum_ssm.layers.rotary import rotary_angles, rotate
from captum_ssm.operators import Chain, Coefficient, Diagonal, Operator, Product, Scan

_HGRN2_EPS = 1e-5
"""Added to the mean square in the norm of HGRN2, regardless of the layer's configuration."""


@register("fla.MultiScaleRetention", kernel="retention", family="fla")
def retention(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose a multi-scale retention: linear attention with one constant decay for each head.

    Equation::

        y = W_out diag(act(W_g x)) diag(norm) S diag(act) M_conv W_v diag(mask) x
        S: h_t = gamma h_{t-1} + k_t v_t,  y_t = <q_t, h_t> / sqrt(N)
        gamma = 1 - 2^(-5-h) of head h

    Positions turn queries and keys. The convolution and the gate may be absent, and several heads may share a key and a
    value.

    Args:
        mixer: ``MultiScaleRetention`` of fla.
        x: Input (B, L, E).
        kwargs: Arguments of the call; ``attention_mask`` (B, L) is 0 at padding.

    Returns:
        Chain of ``out``, ``gate``, ``norm``, ``scan``, ``act``, ``conv``, ``in`` and ``mask``, where they exist.

    Source:
        flash-linear-attention ``layers/multiscale_retention.py``; Sun et al. 2023 (arXiv 2307.08621), equation 6.
    """

    def decays(weights: Mapping[str, Tensor], masked: Tensor) -> Coefficient:
        return 1 - 2.0 ** (-5 - torch.arange(mixer.num_heads, dtype=x.dtype, device=x.device)).view(1, 1, -1, 1)

    def turn(t: Tensor) -> Tensor:
        angles = rotary_angles(mixer.rotary.base, t.shape[-1] // 2, x)
        return rotate(t, angles, mixer.rotary.interleaved)

    return _gated_layer(mixer, x, kwargs, decays, turn)


@register("fla.GatedLinearAttention", kernel="GLA", family="fla")
def gla(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose a gated linear attention: linear attention with a decay for each state.

    Equation::

        y = W_out diag(act(W_g x)) diag(norm) S diag(act) M_conv W_v diag(mask) x
        S: h_t = diag(a_t) h_{t-1} + k_t v_t,  y_t = <q_t, h_t> / sqrt(N)
        a = sigmoid(W_2 W_1 x + bias)^(1 / tau)

    The logarithm of the decays may be bounded from below. The convolution and the gate may be absent, and several heads
    may share a key and a value.

    Args:
        mixer: ``GatedLinearAttention`` of fla.
        x: Input (B, L, E).
        kwargs: Arguments of the call; ``attention_mask`` (B, L) is 0 at padding.

    Returns:
        Chain of ``out``, ``gate``, ``norm``, ``scan``, ``act``, ``conv``, ``in`` and ``mask``, where they exist.

    Source:
        flash-linear-attention ``layers/gla.py``; Yang et al. 2023 (arXiv 2312.06635), equation 3 and section 4.4.
    """

    def decays(weights: Mapping[str, Tensor], masked: Tensor) -> Coefficient:
        log_a = F.logsigmoid(low_rank(weights, "gk_proj", masked)) / mixer.gate_logit_normalizer
        log_a = log_a if mixer.clamp_min is None else log_a.clamp_min(mixer.clamp_min)
        return Product((to_heads(log_a.unflatten(-1, (mixer.num_kv_heads, -1)), mixer.num_heads),), exponential=True)

    return _gated_layer(mixer, x, kwargs, decays)


@register("fla.HGRN2Attention", kernel="HGRN2", family="fla")
def hgrn2(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose an HGRN2 layer: linear attention whose keys are one minus the decays.

    Equation::

        y = W_out diag(norm) S M_conv W_v diag(mask) x
        S: h_t = diag(a_t) h_{t-1} + (1 - a_t) v_t,  y_t = <q_t, h_t> / sqrt(N)
        a = lb + (1 - lb) sigmoid(W_f x)

    The model gives every layer but the first a lower bound ``lb`` of its decays. The norm spans all heads, and the
    convolution may be absent.

    Args:
        mixer: ``HGRN2Attention`` of fla.
        x: Input (B, L, E).
        kwargs: Arguments of the call; ``attention_mask`` (B, L) is 0 at padding, ``lower_bound`` is (H·N,).

    Returns:
        Chain of ``out``, ``norm``, ``scan``, ``conv``, ``in`` and ``mask``, where they exist.

    Source:
        flash-linear-attention ``layers/hgrn2.py``; Qin et al. 2024 (arXiv 2404.07904), section 3.2.
    """
    weights, mask = parameters(mixer, x), gapless_mask(mixer, kwargs, x)
    masked, H = Chain(mask).apply(x), mixer.num_heads
    q, f, v = (projection_factors(mixer, weights, name, masked) for name in "qfi")
    queries, forget, values = (Chain(factors).apply(masked, bias=True) for factors in (q, f, v))

    bound = kwargs.get("lower_bound")
    lb = torch.zeros_like(x[0, 0, :1]) if bound is None or mixer.layer_idx == 0 else bound.to(x)
    keys = Chain(mask).apply((1 - lb) * (-forget).sigmoid())
    scan = Scan(
        a=(lb + (1 - lb) * forget.sigmoid()).unflatten(-1, (H, -1)),
        b=keys.unflatten(-1, (H, -1)),
        c=F.silu(queries).unflatten(-1, (H, -1)) * mixer.head_f_dim**-0.5,
        head_size=mixer.head_i_dim,
    )
    norm = masked_norm(scan.apply(values), 1, _HGRN2_EPS, weights.get("g_norm.weight"), mask)
    return Chain({"out": projection(weights, "o_proj"), "norm": norm, "scan": scan, **v, **mask})


def _gated_layer(
    mixer: Any,
    x: Tensor,
    kwargs: Mapping[str, Any],
    decays: Callable[[Mapping[str, Tensor], Tensor], Coefficient],
    turn: Callable[[Tensor], Tensor] = lambda t: t,
) -> Chain:
    """Build the chain of a layer of RetNet or of gated linear attention.

    Args:
        mixer: The layer.
        x: Input (B, L, E).
        kwargs: Arguments of the call.
        decays: From the parameters by name and the masked input to the decays.
        turn: From queries or keys (B, L, H, N) to those turned by their positions.

    Returns:
        Chain of ``out``, ``gate``, ``norm``, ``scan``, ``act``, ``conv``, ``in`` and ``mask``, where they exist.
    """
    weights, mask = parameters(mixer, x), gapless_mask(mixer, kwargs, x)
    masked, H = Chain(mask).apply(x), mixer.num_heads
    q, k = (projection_factors(mixer, weights, name, masked) for name in "qk")
    v = projection_factors(mixer, weights, "v", masked, rows=lambda t: rows_to_heads(t, mixer.num_kv_heads, H))
    queries, keys, values = (Chain(factors).apply(masked, bias=True) for factors in (q, k, v))
    queries, keys = (t.unflatten(-1, (-1, mixer.head_k_dim)) for t in (queries, keys))
    if mixer.feature_map_fn is not None:
        queries, keys = (activation(activation_name(mixer.feature_map_fn), t) for t in (queries, keys))
    keys = Chain(mask).apply(keys.flatten(-2)).unflatten(-1, (-1, mixer.head_k_dim))

    scan = Scan(
        a=decays(weights, masked),
        b=to_heads(turn(keys), H),
        c=turn(queries) * mixer.head_k_dim**-0.5,
        head_size=mixer.head_v_dim,
    )
    name = "g_norm_swish_gate" if mixer.fuse_norm_and_gate else "g_norm"
    factors: dict[str, Operator] = {"out": projection(weights, "o_proj")}
    if mixer.use_output_gate:
        act = "silu" if mixer.fuse_norm_and_gate else activation_name(mixer.gate_fn)
        factors["gate"] = Diagonal(activation(act, projection(weights, "g_proj").apply(masked, bias=True)))
    factors["norm"] = masked_norm(scan.apply(values), H, getattr(mixer, name).eps, weights.get(f"{name}.weight"), mask)
    return Chain({**factors, "scan": scan, **v, **mask})
