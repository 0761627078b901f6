"""RG-LRU and local attention in RecurrentGemma's own package."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from captum_ssm.errors import UnsupportedModelError
from captum_ssm.layers.activations import activation
from captum_ssm.layers.attention_masks import additive_mask
from captum_ssm.layers.initial_state import refuse_state
from captum_ssm.layers.mixers import register
from captum_ssm.layers.parameters import parameters, projection
from captum_ssm.layers.real_gated import real_gated_recurrence
from captum_ssm.layers.rotary import rotary_angles, rotate
from captum_ssm.operators import CausalConv, Chain, Diagonal, SoftmaxAttention


@register("recurrentgemma.RecurrentBlock", kernel="RG-LRU", family="recurrentgemma")
def griffin_block(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose the recurrent block of RecurrentGemma's own package: one state for each channel.

    Equation::

        y = W_out diag(gelu(W_y x)) S M_conv W_in x + bias
        S: h_t = a_t h_{t-1} + sqrt(1 - a_t²) i_t v_t,  y_t = h_t
        a = exp(-8 r softplus(lambda))

    The gates r and i are sigmoids of projections of the convolved input that are block-diagonal in its heads.

    Args:
        mixer: ``RecurrentBlock`` of recurrentgemma.
        x: Input (B, L, E).
        kwargs: Arguments of the call; ``segment_pos`` (B, L) is 0 at the first token. A ``cache`` is refused.

    Returns:
        Chain of ``out``, ``gate``, ``scan``, ``conv``, ``in``.

    Raises:
        UnsupportedModelError: If a second sequence starts within a row.
        ModelStateError: If the call has a cache.

    Source:
        recurrentgemma ``torch/modules.py``, ``torch/layers.py``; De et al. 2024 (arXiv 2402.19427), equations 1 to 4.
    """
    _refuse_other_calls(mixer, kwargs)
    weights = parameters(mixer, x)
    gates = {
        f"rg_lru.{name}_gate_{kind}": weights[f"rg_lru.{own}.{tensor}"]
        for name, own in (("recurrent", "a_gate"), ("input", "input_gate"))
        for kind, tensor in (("weight", "w"), ("bias", "b"))
    }
    into, conv = projection(weights, "linear_x"), CausalConv(weights["conv_1d.w"].T, weights["conv_1d.b"])
    convolved = conv.apply(into.apply(x, bias=True), bias=True)
    gates["rg_lru.recurrent_param"] = weights["rg_lru.a_param"]
    gate = projection(weights, "linear_y").apply(x, bias=True)
    return Chain(
        {
            "out": projection(weights, "linear_out"),
            "gate": Diagonal(activation("gelu_pytorch_tanh", gate)),
            "scan": real_gated_recurrence(convolved, gates, mixer.num_heads, kwargs["segment_pos"] == 0),
            "conv": conv,
            "in": into,
        }
    )


@register("recurrentgemma.LocalAttentionBlock", kernel="softmax attention", family="recurrentgemma")
def local_attention(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose the attention of RecurrentGemma's own package, whose heads share keys and values.

    Equation::

        y = W_out weights W_v x + bias
        weights = softmax(q k^T / sqrt(P)), over a window

    Args:
        mixer: ``LocalAttentionBlock`` of recurrentgemma.
        x: Input (B, L, E).
        kwargs: Arguments of the call; ``segment_pos`` (B, L) is 0 at the first token. A ``cache`` is refused.

    Returns:
        Chain of ``out``, ``attention``, ``in``.

    Raises:
        UnsupportedModelError: If a second sequence starts within a row.
        ModelStateError: If the call has a cache.

    Source:
        recurrentgemma ``torch/modules.py``; De et al. 2024 (arXiv 2402.19427), section 2.3.
    """
    _refuse_other_calls(mixer, kwargs)
    weights, H, P = parameters(mixer, x), mixer.num_heads, mixer.head_dim
    angles = rotary_angles(10_000.0, P // 4, x)  # half of the entries of a head are turned
    q, k = (
        rotate(projection(weights, name).apply(x).unflatten(-1, (-1, P)), angles, interleaved=False)
        for name in ("proj_q", "proj_k")
    )
    q, k = q.transpose(1, 2), k.transpose(1, 2).expand(-1, H, -1, -1)
    mask = additive_mask(None, x, mixer.window_size + 1)
    return Chain(
        {
            "out": projection(weights, "proj_final"),
            "attention": SoftmaxAttention(q, k, P**-0.5, mask=mask, sees_earlier=mask is None, head_size=P),
            "in": projection(weights, "proj_v", lambda t: t.repeat(H, 1)),
        }
    )


def _refuse_other_calls(mixer: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Refuse a call with a cache, or with several sequences in one row."""
    refuse_state(mixer, kwargs, "cache")
    if bool((kwargs["segment_pos"][:, 1:] == 0).any()):
        raise UnsupportedModelError(
            f"A {type(mixer).__name__} layer was called with 'segment_pos' that starts anew within a row: several "
            "sequences are packed into one. Pass them as the examples of a batch."
        )
