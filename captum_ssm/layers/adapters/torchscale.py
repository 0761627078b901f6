"""Retention of torchscale, whose code computes the whole matrix."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from captum_ssm.errors import UnsupportedModelError
from captum_ssm.layers.activations import activation, activation_name
from captum_ssm.layers.initial_state import refuse_state
from captum_ssm.layers.mixers import register
from captum_ssm.layers.norms import group_norm
from captum_ssm.layers.parameters import parameters, projection
from captum_ssm.layers.rotary import turn
from captum_ssm.operators import Attention, Chain, Diagonal


@register("torchscale.MultiScaleRetention", kernel="retention", family="torchscale")
def parallel_retention(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose a retention: linear attention with one decay for each head.

    Equation::

        y = W_out diag(act(W_g x)) diag(norm) weights W_v x
        weights_ij = (q_i · k_j / sqrt(N)) decay_ij / max(|sum_j ...|, 1)

    Positions turn queries and keys.

    Args:
        mixer: ``MultiScaleRetention`` of torchscale.
        x: Input (B, L, E).
        kwargs: Arguments of the call; ``rel_pos`` holds the sines and cosines (L, N) of the positions and the decays
            (H, L, L).

    Returns:
        Chain of ``out``, ``gate``, ``norm``, ``attention``, ``in``.

    Raises:
        UnsupportedModelError: If the call runs in chunks.
        ModelStateError: If the call has a state.

    Source:
        torchscale ``component/multiscale_retention.py``; Sun et al. 2023 (arXiv 2307.08621), equations 5 and 8.
    """
    refuse_state(mixer, kwargs, "incremental_state")
    if kwargs.get("chunkwise_recurrent"):
        raise UnsupportedModelError(
            "A MultiScaleRetention layer that runs in chunks is not supported: set chunkwise_recurrent=False in the "
            "model's configuration, which gives the same."
        )
    weights, H = parameters(mixer, x), mixer.num_heads
    (sin, cos), decays = kwargs["rel_pos"]
    sin, cos = (t[:, None, ::2].to(x) for t in (sin, cos))  # (L, 1, N / 2), of neighbours that make a pair
    q, k = (
        turn(projection(weights, name).apply(x, bias=True).unflatten(-1, (H, -1)), cos, sin, interleaved=True)
        for name in ("q_proj", "k_proj")
    )
    retained = torch.einsum("bihn,bjhn->bhij", q, k * mixer.scaling) * decays.to(x)
    attention = Attention(retained / retained.sum(-1, keepdim=True).abs().clamp(min=1), head_size=mixer.head_dim)
    into, gate = (projection(weights, name) for name in ("v_proj", "g_proj"))
    return Chain(
        {
            "out": projection(weights, "out_proj"),
            "gate": Diagonal(activation(activation_name(mixer.gate_fn), gate.apply(x, bias=True))),
            "norm": group_norm(attention.apply(into.apply(x, bias=True)), H, mixer.group_norm.eps),
            "attention": attention,
            "in": into,
        }
    )
