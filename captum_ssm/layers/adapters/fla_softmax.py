"""Softmax attention of flash-linear-attention, which its hybrid models have between their recurrences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from captum_ssm.layers.fla_factors import gapless_mask
from captum_ssm.layers.heads import rows_to_heads, to_heads
from captum_ssm.layers.mixers import register
from captum_ssm.layers.norms import rms_norm
from captum_ssm.layers.parameters import parameters, projection
from captum_ssm.layers.rotary import rotary_angles, rotate
from captum_ssm.layers.softmax_attention import visible_keys
from captum_ssm.operators import Attention, Chain, Diagonal


@register("fla.Attention", kernel="softmax attention", family="fla")
def softmax_attention(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose a softmax attention with rotary positions, whose query heads share keys and values in groups.

    Equation::

        y = W_out weights W_v x + bias
        weights = softmax(q k^T / sqrt(P))

    The layer runs a kernel that returns no weights, so they are computed here.

    Args:
        mixer: ``Attention`` of fla.
        x: Input (B, L, E).
        kwargs: Arguments of the call; ``attention_mask`` (B, L) is 0 at padding.

    Returns:
        Chain of ``out``, ``attention``, ``in``.

    Source:
        flash-linear-attention ``layers/attn.py``; Vaswani et al. 2017 (arXiv 1706.03762), groups of Ainslie et al.
        2023 (arXiv 2305.13245).
    """
    weights, mask = parameters(mixer, x), gapless_mask(mixer, kwargs, x)
    H, P = mixer.num_heads, mixer.head_dim
    groups = H // mixer.num_kv_groups
    q, k = _queries_and_keys(mixer, weights, x)
    visible = _visible(x, mixer.window_size, mask)
    logits = torch.einsum("bihp,bjhp->bhij", q, k) * P**-0.5
    attention = logits.masked_fill(~visible, torch.finfo(x.dtype).min).softmax(-1)
    return Chain(
        {
            "out": projection(weights, "o_proj"),
            "attention": Attention(attention.masked_fill(~visible, 0), head_size=P),
            "in": projection(weights, "v_proj", lambda t: rows_to_heads(t, groups, H)),
        }
    )


def _queries_and_keys(mixer: Any, weights: Mapping[str, Tensor], x: Tensor) -> list[Tensor]:
    """Compute the queries and the keys of all heads, normed and turned by their positions, (B, L, H, P) each."""
    P, angles, turned = mixer.head_dim, rotary_angles(mixer.rotary.base, mixer.head_dim // 2, x), []
    for name in "qk":
        t = projection(weights, f"{name}_proj").apply(x, bias=True).unflatten(-1, (-1, P))
        if mixer.qk_norm:
            t = rms_norm(t, getattr(mixer, f"{name}_norm").eps, weights[f"{name}_norm.weight"])
        turned.append(rotate(to_heads(t, mixer.num_heads), angles, mixer.rotary.interleaved))
    return turned


def _visible(x: Tensor, window: int | None, mask: Mapping[str, Diagonal]) -> Tensor:
    """Find the keys that each query sees, (B or 1, 1, L, L): no later ones, none at padding, none from padding."""
    L = x.shape[1]
    visible = visible_keys(L, x.device, window)[None, None]
    if mask:
        tokens = mask["mask"].s.squeeze(-1).bool()
        visible = visible & tokens.view(-1, 1, 1, L) & tokens.view(-1, 1, L, 1)
    return visible
