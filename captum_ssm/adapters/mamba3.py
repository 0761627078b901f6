"""Mamba-3: a recurrence of Mamba-2's kind that writes the mean of two neighbours, and turns its state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from captum_ssm.adapters.reading import parameters, refuse_packed, to_heads
from captum_ssm.errors import UnsupportedModelError
from captum_ssm.gates import inverse_rms, rotate
from captum_ssm.layers.mixers import register
from captum_ssm.operators import Chain, Diagonal, Operator, Projection, Scan


@register("Mamba3", kernel="Mamba-3", family="mamba_ssm")
def mamba3(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Mamba-3 with one input and one output: ``h_t = a_t (h_{t-1} + w'_t B_{t-1} x_{t-1}) + w_t B_t x_t``.

    The trapezoidal rule with the weights ``w_t = lambda_t delta_t`` and ``w'_t = (1 - lambda_t) delta_t``, where
    ``a = exp(delta A)`` and A, delta, lambda are read from the token. ``y = W_out diag(norm) diag(silu(z)) [S +
    diag(skip)] W_in x``, where B and C are normed, shifted and turned by angles that add up along the sequence. What
    token s writes is read by itself with the weight ``w_s``, the bonus, and by all later ones with ``w_s + w'_{s+1}``.

    Args:
        mixer: ``Mamba3`` of mamba_ssm.
        x: Input (B, L, E).
        kwargs: Nothing in them matters: the layer takes no mask.

    Returns:
        Chain of ``out, gate, scan, in``; with an output norm ``out, gate, norm, scan, in``.

    Raises:
        UnsupportedModelError: If the layer has several inputs and outputs (MIMO), or the call packs several sequences
            into one.

    Source:
        mamba_ssm ``modules/mamba3.py``, ``ops/triton/mamba3/``.
    """
    refuse_packed(mixer, kwargs)
    if mixer.is_mimo:
        raise UnsupportedModelError(
            "This Mamba3 layer has several inputs and outputs that share one state (MIMO, is_mimo=True); the adapter "
            "knows one of each (is_mimo=False). Register an adapter of your own for it (captum_ssm.register)."
        )
    weights = parameters(mixer, x)
    W = weights["in_proj.weight"]
    D, H, N, G = mixer.d_inner, mixer.nheads, mixer.d_state, mixer.num_bc_heads
    sizes = [D, D, G * N, G * N, H, H, H, mixer.num_rope_angles]
    z, v, b, c, low, rate, mix, turn = F.linear(x, W).split(sizes, dim=-1)

    delta = F.softplus(low + weights["dt_bias"])  # (B, L, H)
    decay = (-F.softplus(rate)).clamp(max=-mixer.A_floor) * delta
    angles = (turn.unsqueeze(2).tanh() * delta.unsqueeze(-1)).cumsum(1) * math.pi  # (B, L, H, A)

    def coefficient(t: Tensor, name: str) -> Tensor:
        t = t.unflatten(-1, (G, N))
        t = t * inverse_rms(t, getattr(mixer, f"{name}_norm").eps) * weights[f"{name}_norm.weight"]
        return rotate(to_heads(t, H) + weights[f"{name}_bias"].squeeze(1), angles, interleaved=True)

    b, c = coefficient(b, "B"), coefficient(c, "C")  # (B, L, H, N)
    now, before = mix.sigmoid() * delta, (1 - mix.sigmoid()) * delta
    later = now + F.pad(before[:, 1:], (0, 0, 0, 1))
    bonus = ((b * c).sum(-1) * now).repeat_interleave(D // H, -1)
    a = decay.exp().unsqueeze(-1)
    scan = Scan(
        a=a,
        b=later.unsqueeze(-1) * b,
        c=a * c,
        lag=1,
        bonus=bonus,
        skip=weights["D"].repeat_interleave(D // H),
        head_size=D // H,
    )
    gates: dict[str, Operator] = {"gate": Diagonal(F.silu(z))}
    if mixer.is_outproj_norm:
        y = scan.apply(v).unflatten(-1, (D // mixer.norm.group_size, -1))
        scale = inverse_rms(y, mixer.norm.eps).expand_as(y).flatten(-2) * weights["norm.weight"]
        gates["norm"] = Diagonal(scale)
    return Chain({"out": Projection(weights["out_proj.weight"]), **gates, "scan": scan, "in": Projection(W[D : 2 * D])})
