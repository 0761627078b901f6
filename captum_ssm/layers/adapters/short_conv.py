"""The gated short convolution of LFM2 and LFM3: no recurrence at all."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from captum_ssm.layers.mixers import register
from captum_ssm.layers.padding import own_masking, padding_mask
from captum_ssm.layers.parameters import convolution, parameters, projection, projections
from captum_ssm.operators import Chain, Diagonal, Operator


@register("Lfm2ShortConv", kernel="short convolution", family="lfm2")
@register("Lfm2MoeShortConv", kernel="short convolution", family="lfm2_moe")
@register("Lfm3ShortConv", kernel="short convolution", family="lfm3")
def short_conv(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose a gated short convolution: K taps for each channel, between two gates that are linear in the input.

    Equation::

        y = W_out diag(W_C x) M_conv diag(W_B x) W_in diag(mask) x + bias

    Args:
        mixer: ``Lfm2ShortConv``, ``Lfm2MoeShortConv`` or ``Lfm3ShortConv`` of transformers.
        x: Input (B, L, E).
        kwargs: Arguments of the call; ``attention_mask`` (B, L) is 0 at padding.

    Returns:
        Chain of ``out``, ``gate``, ``conv``, ``input``, ``in`` and, with a mask, ``mask``.

    Source:
        transformers ``modeling_lfm2.py``, ``modeling_lfm2_moe.py``, ``modeling_lfm3.py``; Liquid AI 2025
        (arXiv 2511.23404).
    """
    weights, mask = parameters(mixer, x), padding_mask(own_masking(mixer, kwargs, x), x)
    D = len(weights["conv.weight"])
    *gates, into = projections(weights, "in_proj", [D, D, D])
    b, c = (Chain({"in": gate, **mask}).apply(x, bias=True) for gate in gates)
    factors: dict[str, Operator] = {
        "out": projection(weights, "out_proj"),
        "gate": Diagonal(c),
        "conv": convolution(weights, "conv"),
        "input": Diagonal(b),
        "in": into,
    }
    return Chain({**factors, **mask})
