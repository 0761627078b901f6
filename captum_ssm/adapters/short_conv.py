"""The gated short convolution of LFM2 and LFM3: no recurrence at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from captum_ssm.adapters.reading import padding, parameters
from captum_ssm.layers.mixers import register
from captum_ssm.operators import CausalConv, Chain, Diagonal, Operator, Projection


@register("Lfm2ShortConv", kernel="short convolution", family="lfm2")
@register("Lfm2MoeShortConv", kernel="short convolution", family="lfm2_moe")
@register("Lfm3ShortConv", kernel="short convolution", family="lfm3")
def short_conv(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Gated short convolution: K taps for each channel, between two gates that are linear in the input.

    ``y = W_out diag(W_C x) M_conv diag(W_B x) W_in diag(mask) x + bias``.

    Args:
        mixer: ``Lfm2ShortConv``, ``Lfm2MoeShortConv`` or ``Lfm3ShortConv`` of transformers.
        x: Input (B, L, E).
        kwargs: ``attention_mask`` (B, L), 0 at padding, is respected.

    Returns:
        Chain of ``out, gate, conv, input, in`` and, with a mask, ``mask``.

    Source:
        transformers ``modeling_lfm2.py``, ``modeling_lfm2_moe.py``, ``modeling_lfm3.py``; Liquid AI 2025
        (arXiv 2511.23404).
    """
    weights, mask = parameters(mixer, x), padding(kwargs, x)
    W, bias = weights["in_proj.weight"].chunk(3), weights.get("in_proj.bias")
    biases = (None, None, None) if bias is None else bias.chunk(3)
    b, c = (F.linear(Chain(mask).apply(x), W[part], biases[part]) for part in (0, 1))
    factors: dict[str, Operator] = {
        "out": Projection(weights["out_proj.weight"], weights.get("out_proj.bias")),
        "gate": Diagonal(c),
        "conv": CausalConv(weights["conv.weight"].squeeze(1), weights.get("conv.bias")),
        "input": Diagonal(b),
        "in": Projection(W[2], biases[2]),
    }
    return Chain({**factors, **mask})
