"""RG-LRU, the real-gated linear recurrent unit of Griffin and RecurrentGemma."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from captum_ssm.layers.activations import activation, activation_name
from captum_ssm.layers.mixers import register
from captum_ssm.layers.parameters import convolution, parameters, projection
from captum_ssm.layers.real_gated import real_gated_recurrence
from captum_ssm.operators import Chain, Diagonal


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
    H, starts = mixer.rg_lru.num_attention_heads, kwargs["position_ids"] == 0
    return Chain(
        {
            "out": projection(weights, "linear_out"),
            "gate": Diagonal(activation(activation_name(mixer.act_fn), gate)),
            "scan": real_gated_recurrence(convolved, weights, H, starts),
            "conv": conv,
            "in": into,
        }
    )
