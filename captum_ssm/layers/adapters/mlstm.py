"""mLSTM, the matrix memory of xLSTM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.layers.matrix_memory import matrix_memory
from captum_ssm.layers.mixers import register
from captum_ssm.layers.norms import group_norm
from captum_ssm.layers.parameters import parameters, projection, projections
from captum_ssm.operators import Centre, Chain, Diagonal, Projection


@register("xLSTMLayer", kernel="mLSTM", family="xlstm")
def mlstm(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose an mLSTM: linear attention with an exponential input gate and a normaliser, one matrix for each head.

    Equation::

        y = W_out diag(sigmoid(W_o x)) diag(norm) S centre W_v x + bias
        S_ij = (q_i · k_j / sqrt(N)) exp(F_i - F_j + i_j) / max(|n_i|, 1)

    F is the cumulative logarithm of the forget gates, and ``n_i`` the sum of the row without the denominator. The layer
    norm of each head is centring and a diagonal; as the channels of a head share one matrix, they may be centred before
    it.

    Args:
        mixer: ``xLSTMLayer`` of transformers.
        x: Input (B, L, E).
        kwargs: Arguments of the call, not used: the model knows no mask.

    Returns:
        Chain of ``out``, ``gate``, ``norm``, ``scan``, ``centre``, ``in``.

    Source:
        transformers ``modeling_xlstm.py``; Beck et al. 2024 (arXiv 2405.04517), equations 19 to 27; Beck et al. 2025
        (arXiv 2503.13427).
    """
    weights, norm = parameters(mixer, x), mixer.multihead_norm
    H, cap = norm.num_heads, mixer.config.gate_soft_cap
    factors = _projections(mixer, weights)
    q, k, v, o, i, f = (factor.apply(x, bias=True) for factor in factors)
    q, k = (t.unflatten(-1, (H, -1)) for t in (q, k))  # (B, L, H, N)
    i, f = (cap * torch.tanh(t / cap) for t in (i, f))  # (B, L, H)

    scan = matrix_memory(q, k, i, F.logsigmoid(f), mixer.config.eps, norm.head_dim)
    centre = Centre(norm.head_dim)
    scale, shift = weights["multihead_norm.weight"], weights.get("multihead_norm.bias")
    return Chain(
        {
            "out": projection(weights, "out_proj"),
            "gate": Diagonal(o.sigmoid()),
            "norm": group_norm(scan.apply(centre.apply(v)), H, norm.eps, scale, shift),
            "scan": scan,
            "centre": centre,
            "in": factors[2],
        }
    )


def _projections(mixer: Any, weights: Mapping[str, Tensor]) -> list[Projection]:
    """Build the projections of query, key, value, output gate, input gate and forget gate."""
    if "q.weight" in weights:
        names = ("q", "k", "v", "ogate_preact", "igate_preact", "fgate_preact")
        return [projection(weights, name) for name in names]
    qk, v, H = mixer.qk_dim, mixer.v_dim, mixer.config.num_heads
    qkvo = projections(weights, "qkv_opreact", [qk, qk, v, v])
    return [*qkvo, *projections(weights, "ifgate_preact", [H, H])]
