"""Time mixing of RWKV-6 in flash-linear-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from captum_ssm.layers.activations import activation, activation_name
from captum_ssm.layers.fla_factors import unpacked_mask
from captum_ssm.layers.mixers import register
from captum_ssm.layers.norms import group_norm
from captum_ssm.layers.parameters import low_rank, parameters, projection
from captum_ssm.layers.token_shift import previous
from captum_ssm.operators import Centre, Chain, Diagonal, Operator, Scan


@register("fla.RWKV6Attention", kernel="WKV-6", family="fla")
def wkv6(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose the time mixing of RWKV-6.

    Equation::

        y = W_out diag(act(g)) [diag(norm) S centre W_v shift_v diag(mask) x + bias]
        S: h_t = diag(a_t) h_{t-1} + k_t v_t,  y_t = <r_t, h_{t-1} + diag(bonus) k_t v_t>
        a = exp(-exp(w))

    Each of ``r, w, k, v, g`` reads a mixture of a token and the one before it whose weights depend on the token. The
    layer norm of each head is centring and a diagonal; as the channels of a head share one matrix, they may be centred
    before it.

    Args:
        mixer: ``RWKV6Attention`` of fla.
        x: Input (B, L, E).
        kwargs: Arguments of the call; ``attention_mask`` (B, L) is 0 at padding.

    Returns:
        Chain of ``out``, ``gate``, ``norm``, ``scan``, ``centre``, ``value``, ``shift`` and, with a mask, ``padding``
        before ``value``, and ``mask``.

    Source:
        flash-linear-attention ``layers/rwkv6.py``; Peng et al. 2024 (arXiv 2404.05892), section 4.2, Finch.
    """
    weights, mask = parameters(mixer, x), unpacked_mask(mixer, kwargs, x)
    masked, H, P = Chain(mask).apply(x), mixer.num_heads, mixer.head_v_dim
    step = previous(masked) - masked
    shifts = _shifts(weights, masked, step)
    inputs = {name: masked + step * mu for name, mu in shifts.items()}
    scan = _recurrence(weights, inputs, H, P)
    value: dict[str, Operator] = {
        "centre": Centre(P),
        **({"padding": mask["mask"]} if mask else {}),  # the shift leaves the token before it there
        "value": projection(weights, "v_proj.linear"),
        "shift": _shift(shifts["v"]),
        **mask,
    }
    y, eps = scan.apply(Chain(value).apply(x)), mixer.g_norm.eps
    gate = projection(weights, "g_proj.linear").apply(inputs["g"], bias=True)
    return Chain(
        {
            "out": projection(weights, "o_proj"),
            "gate": Diagonal(activation(activation_name(mixer.gate_fn), gate)),
            "norm": group_norm(y, H, eps, weights.get("g_norm.weight"), weights.get("g_norm.bias")),
            "scan": scan,
            **value,
        }
    )


def _shifts(weights: Mapping[str, Tensor], x: Tensor, step: Tensor) -> dict[str, Tensor]:
    """Compute the weights of the token before in each mixture.

    Args:
        weights: Parameters by name.
        x: Input (B, L, E), 0 at padding.
        step: Previous token less current token (B, L, E).

    Returns:
        (B, L, E) for each of ``r``, ``w``, ``k``, ``v`` and ``g``.
    """
    low = projection(weights, "x_proj.0.linear").apply(x + step * weights["x_proj.0.mu"], bias=True).tanh()
    low, W = (t.unflatten(-1, (5, -1)) for t in (low, weights["x_proj.2.weight"]))  # (B, L, 5, rank), (E, 5, rank)
    mixed = torch.einsum("blnr,enr->blne", low, W) + weights["x_bias"]  # (B, L, 5, E)
    return {name: mixed[..., number, :] for number, name in enumerate("rwkvg")}


def _shift(mu: Tensor) -> Scan:
    """Build the token shift ``mu_t x_{t-1} + (1 - mu_t) x_t``, whose weights (B, L, E) depend on the token."""
    zero, one = (mu.new_full((1, 1, 1, 1), value) for value in (0, 1))
    return Scan(a=zero, b=one, c=mu.unsqueeze(-1), lag=1, bonus=1 - mu)


def _recurrence(weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor], H: int, P: int) -> Scan:
    """Build the recurrence of a layer.

    Args:
        weights: Parameters by name.
        inputs: The mixture (B, L, E) that each of ``r``, ``w`` and ``k`` reads.
        H: Number of heads.
        P: Channels of a head.

    Returns:
        The recurrence.
    """
    r, k = (projection(weights, f"{name}_proj.linear").apply(inputs[name], bias=True) for name in "rk")
    w = low_rank(weights, "w_proj.linear.lora", inputs["w"], torch.tanh)
    r, w, k = (t.unflatten(-1, (H, -1)) for t in (r, w, k))  # (B, L, H, N)
    bonus = (r * weights["bonus"] * k).sum(-1).repeat_interleave(P, -1)  # (B, L, D)
    return Scan(a=torch.exp(-w.exp()), b=k, c=r, lag=1, bonus=bonus, head_size=P)
