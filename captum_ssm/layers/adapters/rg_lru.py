"""RG-LRU, the real-gated linear recurrent unit of Griffin and RecurrentGemma."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.layers.activations import activation, activation_name
from captum_ssm.layers.mixers import register
from captum_ssm.layers.parameters import convolution, parameters, projection
from captum_ssm.operators import Chain, Diagonal, Scan


@register("RecurrentGemmaRecurrentBlock", kernel="RG-LRU", family="recurrent_gemma")
def rg_lru(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose an RG-LRU layer: one state for each channel.

    Equation::

        y = W_out diag(gelu(W_y x)) S M_conv W_in x + bias
        S: h_t = a_t h_{t-1} + sqrt(1 - a_t²) i_t v_t,  y_t = h_t
        a = exp(-8 r softplus(lambda))

    The gates r and i are sigmoids of projections of the convolved input that are block-diagonal in its heads. A
    sequence starts where a position is 0: there ``h_t = i_t v_t``.

    Args:
        mixer: ``RecurrentGemmaRecurrentBlock`` of transformers.
        x: Input (B, L, E).
        kwargs: Arguments of the call; ``position_ids`` (B or 1, L). The layer ignores the attention mask.

    Returns:
        Chain of ``out``, ``gate``, ``scan``, ``conv``, ``in``.

    Source:
        transformers ``modeling_recurrent_gemma.py``; De et al. 2024 (arXiv 2402.19427), equations 1 to 4.
    """
    weights = parameters(mixer, x)
    into, conv = projection(weights, "linear_x"), convolution(weights, "conv_1d")
    convolved = conv.apply(into.apply(x, bias=True), bias=True)
    gate = projection(weights, "linear_y").apply(x, bias=True)
    return Chain(
        {
            "out": projection(weights, "linear_out"),
            "gate": Diagonal(activation(activation_name(mixer.act_fn), gate)),
            "scan": _recurrence(convolved, weights, mixer.rg_lru.num_attention_heads, kwargs["position_ids"] == 0),
            "conv": conv,
            "in": into,
        }
    )


def _recurrence(x: Tensor, weights: Mapping[str, Tensor], H: int, starts: Tensor) -> Scan:
    """Build the recurrence of a layer.

    Args:
        x: Convolved input (B, L, D).
        weights: Parameters of the layer by name.
        H: Number of heads that the gates are block-diagonal in.
        starts: (B or 1, L), True where a sequence starts.

    Returns:
        The recurrence.
    """
    starts, heads = starts.unsqueeze(-1), x.unflatten(-1, (H, -1))
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
    return Scan(
        a=torch.where(starts, 0, log_a.exp()).unsqueeze(-1),
        b=(torch.where(starts, 1, scale) * i).unsqueeze(-1),
        c=x.new_ones(1, 1, 1, 1),
    )
