"""Mamba-3: a recurrence of Mamba-2's kind that writes the mean of two neighbours, and turns its state."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from captum_ssm.errors import UnsupportedModelError
from captum_ssm.layers.heads import to_heads
from captum_ssm.layers.mixers import register
from captum_ssm.layers.norms import group_norm, rms_norm
from captum_ssm.layers.padding import refuse_packed
from captum_ssm.layers.parameters import parameters, projection
from captum_ssm.layers.rotary import rotate
from captum_ssm.operators import Chain, Diagonal, Operator, Scan


@register("Mamba3", kernel="Mamba-3", family="mamba_ssm", parts=("in_proj", "is_mimo", "num_rope_angles"))
def mamba3(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose a Mamba-3 layer with one input and one output.

    Equation::

        y = W_out diag(silu(z)) diag(norm) [S + diag(skip)] W_in x
        S: h_t = a_t (h_{t-1} + w'_t B_{t-1} x_{t-1}) + w_t B_t x_t,  y_t = <C_t, h_t>
        a = exp(delta A),  w = lambda delta,  w' = (1 - lambda) delta

    These are the weights of the trapezoidal rule; A, delta and lambda are read from the token. B and C are normed,
    shifted and turned by angles that add up along the sequence. The token s reads its own input with the weight
    ``w_s``, the bonus, and all later tokens read it with ``w_s + w'_{s+1}``.

    Args:
        mixer: ``Mamba3`` of mamba_ssm.
        x: Input (B, L, E).
        kwargs: Arguments of the call; the layer takes no mask.

    Returns:
        Chain of ``out``, ``gate``, ``norm`` (where the layer has one), ``scan``, ``in``.

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
    weights, D = parameters(mixer, x), mixer.d_inner
    H, GN = mixer.nheads, mixer.num_bc_heads * mixer.d_state
    sizes = [D, D, GN, GN, H, H, H, mixer.num_rope_angles]
    z, v, *coefficients = projection(weights, "in_proj").apply(x, bias=True).split(sizes, dim=-1)
    scan = _recurrence(mixer, weights, *coefficients)
    factors: dict[str, Operator] = {"gate": Diagonal(F.silu(z))}
    if mixer.is_outproj_norm:
        norm = mixer.norm
        factors["norm"] = group_norm(scan.apply(v), D // norm.group_size, norm.eps, weights["norm.weight"])
    into = projection(weights, "in_proj", lambda t: t[D : 2 * D])
    return Chain({"out": projection(weights, "out_proj"), **factors, "scan": scan, "in": into})


def _recurrence(
    mixer: Any,
    weights: Mapping[str, Tensor],
    b: Tensor,
    c: Tensor,
    low: Tensor,
    rate: Tensor,
    mix: Tensor,
    turn: Tensor,
) -> Scan:
    """Build the recurrence of a layer.

    Args:
        mixer: The layer.
        weights: Parameters by name.
        b: B before its norm (B, L, G·N).
        c: C before its norm (B, L, G·N).
        low: Delta before its bias and the softplus (B, L, H).
        rate: A before the softplus (B, L, H).
        mix: Lambda before the sigmoid (B, L, H).
        turn: Angles for a unit of time before the tanh (B, L, A).

    Returns:
        The recurrence, in the form that reads the state before it is written.
    """
    H, P = mixer.nheads, mixer.d_inner // mixer.nheads
    delta = F.softplus(low + weights["dt_bias"])  # (B, L, H)
    decay = (-F.softplus(rate)).clamp(max=-mixer.A_floor) * delta
    angles = (turn.unsqueeze(2).tanh() * delta.unsqueeze(-1)).cumsum(1) * math.pi  # (B, L, H, A)

    def coefficient(t: Tensor, name: str) -> Tensor:
        t = t.unflatten(-1, (mixer.num_bc_heads, -1))
        t = rms_norm(t, getattr(mixer, f"{name}_norm").eps, weights[f"{name}_norm.weight"])
        return rotate(to_heads(t, H) + weights[f"{name}_bias"].squeeze(1), angles, interleaved=True)

    b, c = coefficient(b, "B"), coefficient(c, "C")  # (B, L, H, N)
    now, before = mix.sigmoid() * delta, (1 - mix.sigmoid()) * delta
    later = now + F.pad(before[:, 1:], (0, 0, 0, 1))
    a = decay.exp().unsqueeze(-1)
    return Scan(
        a=a,
        b=later.unsqueeze(-1) * b,
        c=a * c,
        lag=1,
        bonus=((b * c).sum(-1) * now).repeat_interleave(P, -1),
        skip=weights["D"].repeat_interleave(P),
        head_size=P,
    )
