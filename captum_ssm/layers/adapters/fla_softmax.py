"""Softmax attention of flash-linear-attention, which its hybrid models have between their recurrences."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from captum_ssm.layers.attention_masks import additive_mask, attending
from captum_ssm.layers.fla_factors import gapless_mask
from captum_ssm.layers.heads import rows_to_heads, to_heads
from captum_ssm.layers.mixers import register
from captum_ssm.layers.norms import rms_norm
from captum_ssm.layers.parameters import parameters, projection
from captum_ssm.layers.rotary import rotary_angles, rotate
from captum_ssm.operators import Chain, SoftmaxAttention


@register("fla.Attention", kernel="softmax attention", family="fla")
def softmax_attention(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose a softmax attention with rotary positions, whose query heads share keys and values in groups.

    Equation::

        y = W_out weights W_v x + bias
        weights = softmax(q k^T / sqrt(P))

    The layer runs a kernel that returns no weights, so its queries and keys are computed here.

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
    weights, padding = parameters(mixer, x), gapless_mask(mixer, kwargs, x)
    H, P = mixer.num_heads, mixer.head_dim
    groups = H // mixer.num_kv_groups
    q, k = (t.transpose(1, 2) for t in _queries_and_keys(mixer, weights, x))
    tokens = padding["mask"].s.squeeze(-1) if padding else None
    mask = additive_mask(tokens, x, mixer.window_size)
    attention = SoftmaxAttention(
        q, k, P**-0.5, mask=mask, sees_earlier=mask is None, attends=attending(mask, mask), head_size=P
    )
    return Chain(
        {
            "out": projection(weights, "o_proj"),
            "attention": attention,
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
