"""mLSTM, the matrix memory of xLSTM."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.layers.activations import secant
from captum_ssm.layers.matrix_memory import matrix_memory
from captum_ssm.layers.mixers import register
from captum_ssm.layers.norms import group_norm
from captum_ssm.layers.parameters import convolution, parameters, projection, projections
from captum_ssm.operators import Centre, Chain, Diagonal, Projection, Sum


@register("xlstm.xlstm_large.mLSTMLayer", kernel="mLSTM", family="xlstm (NX-AI)")
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
        mixer: ``xLSTMLayer`` of transformers, or ``mLSTMLayer`` of NX-AI's xLSTM of 7B.
        x: Input (B, L, E).
        kwargs: Arguments of the call, not used: the model knows no mask.

    Returns:
        Chain of ``out``, ``gate``, ``norm``, ``scan``, ``centre``, ``in``.

    Source:
        transformers ``modeling_xlstm.py``; xlstm ``xlstm_large/model.py``; Beck et al. 2024 (arXiv 2405.04517),
        equations 19 to 27; Beck et al. 2025 (arXiv 2503.13427).
    """
    weights, norm = parameters(mixer, x), mixer.multihead_norm
    H, cap = norm.num_heads, mixer.config.gate_soft_cap
    eps = getattr(mixer.config, "mlstm_backend", mixer.config).eps
    factors = _projections(mixer, weights)
    q, k, v, o, i, f = (factor.apply(x, bias=True) for factor in factors)
    q, k = (t.unflatten(-1, (H, -1)) for t in (q, k))  # (B, L, H, N)
    i, f = (cap * torch.tanh(t / cap) for t in (i, f))  # (B, L, H)

    scan = matrix_memory(q, k, i, F.logsigmoid(f), eps, norm.head_dim)
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


@register("xlstm.mLSTMLayer", kernel="mLSTM", family="xlstm (NX-AI)")
def convolved_mlstm(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose the mLSTM layer of the first xLSTM, whose queries and keys are convolved.

    Equation::

        y = W_out diag(silu(z)) [diag(norm) S centre W_v + diag(skip) diag(act) M_conv] W_in x + bias

    S is that of :func:`mlstm`; its queries and keys are projections of the convolved and activated input.

    Args:
        mixer: ``mLSTMLayer`` of NX-AI's xlstm.
        x: Input (B, L, E).
        kwargs: Arguments of the call, not used: the layer takes none.

    Returns:
        Chain of ``out``, ``gate``, ``paths``, ``in``. ``paths`` is the sum of ``memory``, a chain of ``norm``,
        ``scan``, ``centre``, ``value``, and of ``convolved``, a chain of ``skip``, ``act``, ``conv``.

    Source:
        xlstm ``blocks/mlstm/layer.py`` and ``cell.py``; Beck et al. 2024 (arXiv 2405.04517), figure 11.
    """
    weights, cell, D = parameters(mixer, x), mixer.mlstm_cell, len(mixer.learnable_skip)
    H, P, outnorm = cell.config.num_heads, D // cell.config.num_heads, cell.outnorm
    (into, gate), conv = projections(weights, "proj_up", [D, D]), convolution(weights, "conv1d.conv")
    inner = into.apply(x, bias=True)
    pre = conv.apply(inner, bias=True)
    act = secant("silu", pre)
    q, k, value = (_headwise(weights, name) for name in ("q_proj", "k_proj", "v_proj"))
    queries, keys = (factor.apply(act * pre, bias=True) for factor in (q, k))
    v = value.apply(inner, bias=True)
    i, f = (
        projection(weights, f"mlstm_cell.{n}gate").apply(torch.cat([queries, keys, v], -1), bias=True) for n in "if"
    )

    queries, keys = (t.unflatten(-1, (H, -1)) for t in (queries, keys))
    scan = matrix_memory(queries, keys, i, F.logsigmoid(f), _EPS, P, starts_at_zero=False)
    scale = weights["mlstm_cell.outnorm.weight"] + float(outnorm.residual_weight)
    norm = group_norm(scan.apply(Centre(P).apply(v)), H, outnorm.eps, scale, weights.get("mlstm_cell.outnorm.bias"))
    memory = Chain({"norm": norm, "scan": scan, "centre": Centre(P), "value": value})
    convolved = Chain({"skip": Diagonal(weights["learnable_skip"]), "act": Diagonal(act), "conv": conv})
    return Chain(
        {
            "out": projection(weights, "proj_down"),
            "gate": Diagonal(F.silu(gate.apply(x, bias=True))),
            "paths": Sum({"memory": memory, "convolved": convolved}),
            "in": into,
        }
    )


_EPS = 1e-6
"""Added to the normaliser by the code of xlstm."""


def _headwise(weights: Mapping[str, Tensor], name: str) -> Projection:
    """Build the projection of each head of channels by a matrix of its own, stored as (heads, P, P)."""
    return Projection(torch.block_diag(*weights[f"{name}.weight"]), weights.get(f"{name}.bias"))


def _projections(mixer: Any, weights: Mapping[str, Tensor]) -> list[Projection]:
    """Build the projections of query, key, value, output gate, input gate and forget gate."""
    if "q.weight" in weights:
        names = ("q", "k", "v", "ogate_preact", "igate_preact", "fgate_preact")
        return [projection(weights, name) for name in names]
    qk, v, H = mixer.qk_dim, mixer.v_dim, mixer.config.num_heads
    qkvo = projections(weights, "qkv_opreact", [qk, qk, v, v])
    return [*qkvo, *projections(weights, "ifgate_preact", [H, H])]
