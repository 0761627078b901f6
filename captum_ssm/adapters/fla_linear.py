"""Linear attention of flash-linear-attention: RetNet, gated linear attention and HGRN2 differ in their decays alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.adapters.fla_reading import function_name, low_rank, norm, short_conv, unpadded
from captum_ssm.adapters.reading import parameters, to_heads
from captum_ssm.gates import activation, rotate
from captum_ssm.layers.mixers import register
from captum_ssm.operators import Chain, Coefficient, Diagonal, Operator, Product, Projection, Scan

_HGRN2_EPS = 1e-5
"""Added to the mean square in the norm of HGRN2, whatever the layer's configuration says."""


@register("MultiScaleRetention", kernel="retention", family="fla")
def retention(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Multi-scale retention: ``h_t = gamma h_{t-1} + k_t v_t``, ``y_t = <q_t, h_t> / sqrt(N)``, one gamma for a head.

    ``y = W_out diag(act(W_g x)) diag(norm) S [diag(act) M_conv] W_v diag(mask) x`` with ``gamma = 1 - 2^(-5-h)`` of
    head h, and queries and keys turned by their positions. The convolution and the gate may be absent, and several
    heads may share a key and a value.

    Args:
        mixer: ``MultiScaleRetention`` of fla.
        x: Input (B, L, E).
        kwargs: ``attention_mask`` (B, L), 0 at padding, is respected.

    Returns:
        Chain of ``out, gate, norm, scan, act, conv, in``, where there are such, and, with a mask, ``mask``.

    Source:
        flash-linear-attention ``layers/multiscale_retention.py``; Sun et al. 2023 (arXiv 2307.08621), equation 6.
    """

    def decays(weights: Mapping[str, Tensor], real: Tensor) -> Coefficient:
        return 1 - 2.0 ** (-5 - torch.arange(mixer.num_heads).to(x)).view(1, 1, -1, 1)

    def turned(t: Tensor) -> Tensor:
        half = t.shape[-1] // 2
        rate = mixer.rotary.base ** -(torch.arange(half).to(x) / half)
        return rotate(t, torch.arange(t.shape[1]).to(x).view(1, -1, 1, 1) * rate, mixer.rotary.interleaved)

    return _gated(mixer, x, kwargs, decays, turned)


@register("GatedLinearAttention", kernel="GLA", family="fla")
def gla(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Gated linear attention: ``h_t = diag(a_t) h_{t-1} + k_t v_t``, ``y_t = <q_t, h_t> / sqrt(N)``.

    The layer is that of :func:`retention` with ``a = sigmoid(W_2 W_1 x + bias)^(1 / tau)`` of N entries for each head,
    whose logarithm may be bounded from below, and without positions.

    Args:
        mixer: ``GatedLinearAttention`` of fla.
        x: Input (B, L, E).
        kwargs: ``attention_mask`` (B, L), 0 at padding, is respected.

    Returns:
        Chain of ``out, gate, norm, scan, act, conv, in``, where there are such, and, with a mask, ``mask``.

    Source:
        flash-linear-attention ``layers/gla.py``; Yang et al. 2023 (arXiv 2312.06635), equation 3 and section 4.4.
    """

    def decays(weights: Mapping[str, Tensor], real: Tensor) -> Coefficient:
        log_a = F.logsigmoid(low_rank(weights, "gk_proj", real)) / mixer.gate_logit_normalizer
        log_a = log_a if mixer.clamp_min is None else log_a.clamp_min(mixer.clamp_min)
        return Product((to_heads(log_a.unflatten(-1, (mixer.num_kv_heads, -1)), mixer.num_heads),), exponential=True)

    return _gated(mixer, x, kwargs, decays)


@register("HGRN2Attention", kernel="HGRN2", family="fla")
def hgrn2(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """HGRN2: ``h_t = diag(a_t) h_{t-1} + (1 - a_t) v_t``, ``y_t = <q_t, h_t> / sqrt(N)``, with the decays for keys.

    ``y = W_out diag(norm) S [M_conv] W_v diag(mask) x`` with ``a = lb + (1 - lb) sigmoid(W_f x)``, where the model
    gives every layer but the first a lower bound ``lb`` of its decays; the norm spans all heads.

    Args:
        mixer: ``HGRN2Attention`` of fla.
        x: Input (B, L, E).
        kwargs: ``attention_mask`` (B, L), 0 at padding, and ``lower_bound`` (H·N,) are respected.

    Returns:
        Chain of ``out, norm, scan, conv, in``, where there are such, and, with a mask, ``mask``.

    Source:
        flash-linear-attention ``layers/hgrn2.py``; Qin et al. 2024 (arXiv 2404.07904), section 3.2.
    """
    weights, mask = parameters(mixer, x), unpadded(mixer, kwargs, x)
    real, H, P = Chain(mask).apply(x), mixer.num_heads, mixer.head_i_dim
    q, f, v = (short_conv(mixer, weights, name, real) for name in "qfi")
    queries, forget, values = (Chain(factors).apply(real, bias=True) for factors in (q, f, v))

    bound = kwargs.get("lower_bound")
    lb = torch.zeros_like(x[0, 0, :1]) if bound is None or mixer.layer_idx == 0 else bound.to(x)
    k = Chain(mask).apply((1 - lb) * (-forget).sigmoid())
    scan = Scan(
        a=(lb + (1 - lb) * forget.sigmoid()).unflatten(-1, (H, -1)),
        b=k.unflatten(-1, (H, -1)),
        c=F.silu(queries).unflatten(-1, (H, -1)) * mixer.head_f_dim**-0.5,
        head_size=P,
    )
    factors: dict[str, Operator] = {
        "out": Projection(weights["o_proj.weight"]),
        "norm": norm(scan.apply(values).unsqueeze(-2), _HGRN2_EPS, weights.get("g_norm.weight"), mask),
        "scan": scan,
    }
    return Chain({**factors, **v, **mask})


def _gated(
    mixer: Any,
    x: Tensor,
    kwargs: Mapping[str, Any],
    decays: Callable[[Mapping[str, Tensor], Tensor], Coefficient],
    turned: Callable[[Tensor], Tensor] = lambda t: t,
) -> Chain:
    """Return the layer that RetNet and gated linear attention share.

    Args:
        mixer: The layer.
        x: Input (B, L, E).
        kwargs: The call's other arguments.
        decays: Gives the decays, of the layer's parameters by name and its input, 0 at padding.
        turned: What positions do to queries and keys (B, L, H, N).
    """
    weights, mask = parameters(mixer, x), unpadded(mixer, kwargs, x)
    real, H, groups = Chain(mask).apply(x), mixer.num_heads, mixer.num_kv_groups
    q, k, v = (short_conv(mixer, weights, name, real, groups=g) for name, g in (("q", 1), ("k", 1), ("v", groups)))
    queries, keys, values = (Chain(factors).apply(real, bias=True) for factors in (q, k, v))
    queries, keys = (t.unflatten(-1, (-1, mixer.head_k_dim)) for t in (queries, keys))
    if mixer.feature_map_fn is not None:
        queries, keys = (activation(function_name(mixer.feature_map_fn), t) for t in (queries, keys))

    scan = Scan(
        a=decays(weights, real),
        b=to_heads(turned(Chain(mask).apply(keys.flatten(-2)).unflatten(-1, (-1, mixer.head_k_dim))), H),
        c=turned(queries) * mixer.head_k_dim**-0.5,
        head_size=mixer.head_v_dim,
    )
    found = scan.apply(values).unflatten(-1, (H, -1))
    name = "g_norm_swish_gate" if mixer.fuse_norm_and_gate else "g_norm"
    factors: dict[str, Operator] = {"out": Projection(weights["o_proj.weight"])}
    if mixer.use_output_gate:
        act = "silu" if mixer.fuse_norm_and_gate else function_name(mixer.gate_fn)
        factors["gate"] = Diagonal(activation(act, F.linear(real, weights["g_proj.weight"])))
    factors["norm"] = norm(found, getattr(mixer, name).eps, weights.get(f"{name}.weight"), mask)
    return Chain({**factors, "scan": scan, **v, **mask})
