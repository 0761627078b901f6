"""mLSTM, the matrix memory of xLSTM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.layers.log_domain import relative_gates, running_max, upper_bound
from captum_ssm.layers.mixers import register
from captum_ssm.layers.norms import group_norm
from captum_ssm.layers.parameters import parameters, projection, projections
from captum_ssm.operators import Centre, Chain, Diagonal, Product, Projection, Scan


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

    scan = _memory(q, k, i, F.logsigmoid(f), mixer.config.eps, norm.head_dim)
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


def _memory(q: Tensor, k: Tensor, i: Tensor, log_f: Tensor, eps: float, P: int) -> Chain:
    """Build the recurrence of the memory, divided by its normaliser, in a form in which no exponent is positive.

    The memory is kept relative to ``exp(m_t)``, ``m_t = max(m_{t-1} + log f_t, i_t)``, which cancels but for the
    layer's ``eps``: that is relative to the m of the layer's own code.

    Args:
        q: Queries (B, L, H, N).
        k: Keys (B, L, H, N).
        i: Input gates, as exponents (B, L, H).
        log_f: Logarithms of the forget gates (B, L, H).
        eps: Added to the normaliser.
        P: Channels of a head.

    Returns:
        Chain of ``total``, the division by the normaliser, and ``weights``.
    """
    layer_m, m = _log_size(i, log_f), _log_size(upper_bound(i), upper_bound(log_f))  # (B, L, H)
    a, b = relative_gates(log_f, i, m, before=F.pad(m, (0, 0, 1, -1)))
    scan = Scan(a=a.unsqueeze(-1), b=Product((b.unsqueeze(-1), k)), c=q * q.shape[-1] ** -0.5)
    total = torch.maximum(scan.apply(torch.ones_like(i)).abs(), torch.exp(-m)) + eps * torch.exp(layer_m - m)
    scale = (1 / total).repeat_interleave(P, -1)  # (B, L, D)
    return Chain({"total": Diagonal(scale), "weights": replace(scan, head_size=P)})


def _log_size(i: Tensor, log_f: Tensor) -> Tensor:
    """Compute the logarithm of the memory's size (B, L, H), which the layer starts at 0 before the first token."""
    start = torch.maximum(i[:, :1], log_f[:, :1])
    return running_max(log_f, torch.cat([start, i[:, 1:]], dim=1))


def _projections(mixer: Any, weights: Mapping[str, Tensor]) -> list[Projection]:
    """Build the projections of query, key, value, output gate, input gate and forget gate."""
    if "q.weight" in weights:
        names = ("q", "k", "v", "ogate_preact", "igate_preact", "fgate_preact")
        return [projection(weights, name) for name in names]
    qk, v, H = mixer.qk_dim, mixer.v_dim, mixer.config.num_heads
    qkvo = projections(weights, "qkv_opreact", [qk, qk, v, v])
    return [*qkvo, *projections(weights, "ifgate_preact", [H, H])]
