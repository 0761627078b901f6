"""WKV, the recurrence of RWKV-4, and the token shift of its channel mixing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from captum_ssm.layers.activations import secant
from captum_ssm.layers.log_domain import relative_gates, running_max, upper_bound
from captum_ssm.layers.mixers import register
from captum_ssm.layers.parameters import parameters, projection
from captum_ssm.layers.token_shift import token_shift
from captum_ssm.operators import CausalConv, Chain, Diagonal, Scan


@register("RwkvSelfAttention", kernel="WKV-4", family="rwkv")
def wkv(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose the time mixing of RWKV-4: averages whose weights decay at a constant rate for each channel.

    Equation::

        y = W_out diag(sigmoid(W_r shift_r x)) S W_v shift_v x
        S_ij = exp(e_ij) / sum_j exp(e_ij),  e_ij = k_j - (i - 1 - j) w for j < i,  e_ii = k_i + bonus
        k = W_k shift_k x,  w = exp(time_decay)

    A shift mixes each token with the one before it.

    Args:
        mixer: ``RwkvSelfAttention`` of transformers.
        x: Input (B, L, E).
        kwargs: Arguments of the call, not used: the model knows no mask.

    Returns:
        Chain of ``out``, ``gate``, ``scan``, ``value``, ``shift``.

    Source:
        transformers ``modeling_rwkv.py``; Peng et al. 2023 (arXiv 2305.13048), time mixing.
    """
    weights = parameters(mixer, x)
    shifts = {name: _shift(weights, name) for name in ("receptance", "key", "value")}
    r, k = (projection(weights, name).apply(shifts[name].apply(x), bias=True) for name in ("receptance", "key"))
    return Chain(
        {
            "out": projection(weights, "output"),
            "gate": Diagonal(r.sigmoid()),
            "scan": _averages(k, weights["time_decay"].exp(), weights["time_first"]),
            "value": projection(weights, "value"),
            "shift": shifts["value"],
        }
    )


@register("RwkvFeedForward", kernel="token shift", family="rwkv")
def channel_mix(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose the channel mixing of RWKV-4, which mixes each token with the one before it too.

    Equation::

        y = diag(sigmoid(W_r shift_r x)) W_v diag(act) W_k shift_k x

    The activation is the squared ReLU.

    Args:
        mixer: ``RwkvFeedForward`` of transformers.
        x: Input (B, L, E).
        kwargs: Arguments of the call, not used: the model knows no mask.

    Returns:
        Chain of ``gate``, ``value``, ``act``, ``key``, ``shift``.

    Source:
        transformers ``modeling_rwkv.py``; Peng et al. 2023 (arXiv 2305.13048), channel mixing.
    """
    weights = parameters(mixer, x)
    shift, key = _shift(weights, "key"), projection(weights, "key")
    r = projection(weights, "receptance").apply(_shift(weights, "receptance").apply(x), bias=True)
    return Chain(
        {
            "gate": Diagonal(r.sigmoid()),
            "value": projection(weights, "value"),
            "act": Diagonal(secant("relu2", key.apply(shift.apply(x), bias=True))),
            "key": key,
            "shift": shift,
        }
    )


def _shift(weights: Mapping[str, Tensor], name: str) -> CausalConv:
    """Build the token shift of this name: the parameter weighs the current token."""
    mix = weights[f"time_mix_{name}"]
    return token_shift(before=1 - mix, now=mix)


def _averages(k: Tensor, w: Tensor, bonus: Tensor) -> Chain:
    """Build the recurrence whose matrices are WKV's weights, in a form in which no exponent is positive.

    The state is kept relative to ``exp(m_t)``, ``m_t = max_{j <= t} k_j - (t - j) w``, and row i relative to the
    largest of its exponents; then each row is divided by its sum. Any m gives the same matrices.

    Args:
        k: Keys (B, L, D).
        w: Rate of decay (D,), positive.
        bonus: Added to the key of the current token (D,).

    Returns:
        Chain of ``total``, the division by the sums, and ``weights``.
    """
    bound = upper_bound(k)
    m = running_max(-w.expand_as(k), bound)  # (B, L, D)
    first = bound[:, :1] + bonus.clamp(max=0)  # no state comes before it, so any number that keeps the rule
    before = torch.cat([first, m[:, :-1]], dim=1)
    largest = torch.maximum(before, bound + bonus)
    a, b = relative_gates(-w, k, m, before)
    c, now = torch.exp(before - largest), torch.exp(k + bonus - largest)
    scan = Scan(a=a.unsqueeze(-1), b=b.unsqueeze(-1), c=c.unsqueeze(-1), lag=1, bonus=now)
    return Chain({"total": Diagonal(1 / scan.apply(torch.ones_like(k))), "weights": scan})
