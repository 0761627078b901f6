"""Softmax attention of flash-linear-attention, which its hybrid models have between their recurrences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.adapters.fla_reading import unpadded
from captum_ssm.adapters.reading import parameters, to_heads
from captum_ssm.gates import inverse_rms, rotate
from captum_ssm.layers.mixers import register
from captum_ssm.operators import Attention, Chain, Projection


@register("Attention", kernel="softmax attention", family="fla")
def softmax_attention(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Softmax attention with rotary positions, whose query heads share the keys and values of their group.

    ``y = W_out weights W_v x + bias``. The layer runs a kernel that gives no weights, so they are made here.

    Args:
        mixer: ``Attention`` of fla.
        x: Input (B, L, E).
        kwargs: ``attention_mask`` (B, L), 0 at padding, is respected.

    Returns:
        Chain of ``out, attention, in``.

    Source:
        flash-linear-attention ``layers/attn.py``; Vaswani et al. 2017 (arXiv 1706.03762), groups as in Ainslie et al.
        2023 (arXiv 2305.13245).
    """
    named, mask = parameters(mixer, x), unpadded(mixer, kwargs, x)
    H, P, L = mixer.num_heads, mixer.head_dim, x.shape[1]
    q, k = (
        F.linear(x, named[f"{name}_proj.weight"], named.get(f"{name}_proj.bias")).unflatten(-1, (-1, P))
        for name in "qk"
    )
    if mixer.qk_norm:
        q = q * inverse_rms(q, mixer.q_norm.eps) * named["q_norm.weight"]
        k = k * inverse_rms(k, mixer.k_norm.eps) * named["k_norm.weight"]
    rate = mixer.rotary.base ** -(torch.arange(P // 2).to(x) / (P // 2))
    angles = torch.arange(L).to(x).view(1, -1, 1, 1) * rate
    q, k = (rotate(to_heads(t, H), angles, mixer.rotary.interleaved) for t in (q, k))

    seen = torch.ones(L, L, dtype=torch.bool, device=x.device).tril()
    seen = seen if mixer.window_size is None else seen.triu(1 - mixer.window_size)
    if mask:
        real = mask["mask"].s.squeeze(-1).bool()
        seen = seen & real.view(-1, 1, 1, L) & real.view(-1, 1, L, 1)
    scores = torch.einsum("bihp,bjhp->bhij", q, k) * P**-0.5
    weights = scores.masked_fill(~seen, torch.finfo(x.dtype).min).softmax(-1)

    def every_head(w: Tensor) -> Tensor:
        return w.unflatten(0, (-1, P)).repeat_interleave(mixer.num_kv_groups, 0).flatten(0, 1)

    bias = named.get("v_proj.bias")
    return Chain(
        {
            "out": Projection(named["o_proj.weight"]),
            "attention": Attention(weights.masked_fill(~seen, 0), head_size=P),
            "in": Projection(every_head(named["v_proj.weight"]), None if bias is None else every_head(bias)),
        }
    )
