"""mLSTM, the matrix memory of xLSTM."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.adapters.reading import parameters
from captum_ssm.gates import inverse_rms, running_max, upper_bound
from captum_ssm.layers.mixers import register
from captum_ssm.operators import Centre, Chain, Diagonal, Product, Projection, Scan


@register("xLSTMLayer", kernel="mLSTM", family="xlstm")
def mlstm(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """mLSTM: linear attention with an exponential input gate and a normaliser, one matrix for each head.

    ``y = W_out diag(sigmoid(W_o x)) diag(norm) S centre W_v x + bias``, where head h has
    ``S_ij = (q_i · k_j / sqrt(N)) exp(F_i - F_j + i_j) / max(|n_i|, 1)``, ``F`` the cumulative logarithm of the forget
    gates and ``n_i`` the row's sum without the denominator. The layer norm of each head is centring and a diagonal; as
    a head's channels share one matrix, they may be centred before it.

    Args:
        mixer: ``xLSTMLayer`` of transformers.
        x: Input (B, L, E).
        kwargs: Not used; the model knows no mask.

    Returns:
        Chain of ``out, gate, norm, scan, centre, in``.

    Source:
        transformers ``modeling_xlstm.py``; Beck et al. 2024 (arXiv 2405.04517), equations 19 to 27; Beck et al. 2025
        (arXiv 2503.13427).
    """
    weights, config, norm = parameters(mixer, x), mixer.config, mixer.multihead_norm
    H, cap = norm.num_heads, config.gate_soft_cap
    projections = _projections(mixer, weights)
    q, k, v, o, i, f = (projection.apply(x, bias=True) for projection in projections)
    q, k = (t.unflatten(-1, (H, -1)) for t in (q, k))
    i, f = (cap * torch.tanh(t / cap) for t in (i, f))  # (B, L, H)

    scan = _memory(q, k, i, F.logsigmoid(f), config.eps, norm.head_dim)
    centre = Centre(norm.head_dim)
    centred = scan.apply(centre.apply(v)).unflatten(-1, (H, -1))
    scale = inverse_rms(centred, norm.eps).expand_as(centred).flatten(-2)
    return Chain(
        {
            "out": Projection(weights["out_proj.weight"], weights.get("out_proj.bias")),
            "gate": Diagonal(o.sigmoid()),
            "norm": Diagonal(scale * weights["multihead_norm.weight"], weights.get("multihead_norm.bias")),
            "scan": scan,
            "centre": centre,
            "in": projections[2],
        }
    )


def _memory(q: Tensor, k: Tensor, i: Tensor, log_f: Tensor, eps: float, P: int) -> Chain:
    """Return the recurrence of the memory, divided by its normaliser, in a form in which no exponent is positive.

    The memory is kept relative to ``exp(m_t)``, ``m_t = max(m_{t-1} + log f_t, i_t)``, which cancels but for the
    layer's ``eps``: that is relative to the layer's own m, which starts at 0.

    Args:
        q: Queries (B, L, H, N).
        k: Keys, likewise.
        i: Input gates, as exponents (B, L, H).
        log_f: Logarithms of the forget gates, likewise.
        eps: Added to the normaliser.
        P: Channels of a head.
    """
    own, m = _log_size(i, log_f), _log_size(upper_bound(i), upper_bound(log_f))
    before = F.pad(m, (0, 0, 1, -1))
    q = q * q.shape[-1] ** -0.5
    scan = Scan(
        a=torch.exp(before - m + log_f).unsqueeze(-1),
        b=Product((torch.exp(i - m).unsqueeze(-1), k)),
        c=q,
    )
    total = torch.maximum(scan.apply(torch.ones_like(i)).abs(), torch.exp(-m)) + eps * torch.exp(own - m)
    scale = (1 / total).repeat_interleave(P, -1)
    return Chain({"total": Diagonal(scale), "weights": replace(scan, head_size=P)})


def _log_size(i: Tensor, log_f: Tensor) -> Tensor:
    started = torch.maximum(i[:, :1], log_f[:, :1])
    return running_max(log_f, torch.cat([started, i[:, 1:]], dim=1))


def _projections(mixer: Any, weights: Mapping[str, Tensor]) -> list[Projection]:
    """Return the projections of query, key, value, output gate, input gate and forget gate."""
    if "q.weight" in weights:
        names = ("q", "k", "v", "ogate_preact", "igate_preact", "fgate_preact")
        return [Projection(weights[f"{name}.weight"], weights.get(f"{name}.bias")) for name in names]
    qk, v, H = mixer.qk_dim, mixer.v_dim, mixer.config.num_heads
    projections: list[Projection] = []
    for name, sizes in (("qkv_opreact", [qk, qk, v, v]), ("ifgate_preact", [H, H])):
        W, bias = weights[f"{name}.weight"].split(sizes), weights.get(f"{name}.bias")
        projections += map(Projection, W, [None] * len(W) if bias is None else bias.split(sizes))
    return projections
