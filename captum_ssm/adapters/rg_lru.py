"""RG-LRU, the real-gated linear recurrent unit of Griffin and RecurrentGemma."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.adapters.reading import parameters
from captum_ssm.gates import activation, activation_name
from captum_ssm.layers.mixers import register
from captum_ssm.operators import CausalConv, Chain, Diagonal, Projection, Scan


@register("RecurrentGemmaRecurrentBlock", kernel="RG-LRU", family="recurrent_gemma")
def rg_lru(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """RG-LRU: one state for each channel, ``h_t = a_t h_{t-1} + sqrt(1 - a_t²) i_t v_t``.

    ``y = W_out diag(gelu(W_y x)) S M_conv W_in x + bias`` with ``a = exp(-8 r softplus(lambda))``, and with r and i the
    sigmoids of a projection of the convolved input that is block-diagonal in its heads. Where a position is 0 a
    sequence starts: ``h_t = i_t v_t``.

    Args:
        mixer: ``RecurrentGemmaRecurrentBlock`` of transformers.
        x: Input (B, L, E).
        kwargs: ``position_ids`` (B or 1, L). The layer itself ignores the attention mask.

    Returns:
        Chain of ``out, gate, scan, conv, in``.

    Source:
        transformers ``modeling_recurrent_gemma.py``; De et al. 2024 (arXiv 2402.19427), equations 1 to 4.
    """
    weights = parameters(mixer, x)
    starts = (kwargs["position_ids"] == 0).unsqueeze(-1)  # (B or 1, L, 1)

    into = Projection(weights["linear_x.weight"], weights["linear_x.bias"])
    conv = CausalConv(weights["conv_1d.weight"].squeeze(1), weights["conv_1d.bias"])
    heads = conv.apply(into.apply(x, bias=True), bias=True).unflatten(-1, (mixer.rg_lru.num_attention_heads, -1))
    r, i = (
        torch.einsum("blhp,hpq->blhq", heads, weights[f"rg_lru.{name}_gate_weight"])
        .add(weights[f"rg_lru.{name}_gate_bias"])
        .sigmoid()
        .flatten(-2)
        for name in ("recurrent", "input")
    )
    log_a = -8 * r * F.softplus(weights["rg_lru.recurrent_param"])
    # not expm1: near a = 1 rounding is felt, and has to be the layer's; the bound is below it, for the gradient at 0
    scale = (1 - torch.exp(2 * log_a)).clamp(min=torch.finfo(x.dtype).tiny).sqrt()

    return Chain(
        {
            "out": Projection(weights["linear_out.weight"], weights["linear_out.bias"]),
            "gate": Diagonal(
                activation(
                    activation_name(mixer.act_fn), F.linear(x, weights["linear_y.weight"], weights["linear_y.bias"])
                )
            ),
            "scan": Scan(
                a=torch.where(starts, 0, log_a.exp()).unsqueeze(-1),
                b=(torch.where(starts, 1, scale) * i).unsqueeze(-1),
                c=x.new_ones(1, 1, 1, 1),
            ),
            "conv": conv,
            "in": into,
        }
    )
