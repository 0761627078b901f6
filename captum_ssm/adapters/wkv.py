"""WKV, the recurrence of RWKV-4, and the token shift of its channel mixing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.adapters.reading import parameters
from captum_ssm.gates import running_max, secant, upper_bound
from captum_ssm.layers.mixers import register
from captum_ssm.operators import CausalConv, Chain, Diagonal, Projection, Scan


@register("RwkvSelfAttention", kernel="WKV-4", family="rwkv")
def wkv(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Time mixing of RWKV-4: each channel averages the values with weights that sum to 1 and decay at a constant rate.

    ``y = W_out diag(sigmoid(W_r shift_r x)) S W_v shift_v x``, where row i of S is the softmax over j of
    ``k_j - (i - 1 - j) w`` for j < i and ``k_i + bonus`` for j = i, with ``k = W_k shift_k x`` and
    ``w = exp(time_decay)``. A shift mixes each token with the one before it.

    Args:
        mixer: ``RwkvSelfAttention`` of transformers.
        x: Input (B, L, E).
        kwargs: Not used; the model knows no mask.

    Returns:
        Chain of ``out, gate, scan, value, shift``.

    Source:
        transformers ``modeling_rwkv.py``; Peng et al. 2023 (arXiv 2305.13048), time mixing.
    """
    weights = parameters(mixer, x)
    shifts = {name: _shift(weights[f"time_mix_{name}"]) for name in ("receptance", "key", "value")}
    receptance, k = (F.linear(shifts[name].apply(x), weights[f"{name}.weight"]) for name in ("receptance", "key"))
    return Chain(
        {
            "out": Projection(weights["output.weight"]),
            "gate": Diagonal(receptance.sigmoid()),
            "scan": _averages(k, weights["time_decay"].exp(), weights["time_first"]),
            "value": Projection(weights["value.weight"]),
            "shift": shifts["value"],
        }
    )


@register("RwkvFeedForward", kernel="token shift", family="rwkv")
def channel_mix(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Channel mixing of RWKV-4, which mixes each token with the one before it too.

    ``y = diag(sigmoid(W_r shift_r x)) W_v diag(act) W_k shift_k x`` with the squared ReLU as the activation.

    Args:
        mixer: ``RwkvFeedForward`` of transformers.
        x: Input (B, L, E).
        kwargs: Not used; the model knows no mask.

    Returns:
        Chain of ``gate, value, act, key, shift``.

    Source:
        transformers ``modeling_rwkv.py``; Peng et al. 2023 (arXiv 2305.13048), channel mixing.
    """
    weights = parameters(mixer, x)
    shift, key = _shift(weights["time_mix_key"]), Projection(weights["key.weight"])
    receptance = F.linear(_shift(weights["time_mix_receptance"]).apply(x), weights["receptance.weight"])
    return Chain(
        {
            "gate": Diagonal(receptance.sigmoid()),
            "value": Projection(weights["value.weight"]),
            "act": Diagonal(secant("relu2", key.apply(shift.apply(x)))),
            "key": key,
            "shift": shift,
        }
    )


def _shift(mix: Tensor) -> CausalConv:
    """Return the convolution ``mix x_t + (1 - mix) x_{t-1}``."""
    now = mix.flatten()
    return CausalConv(torch.stack([1 - now, now], dim=-1))


def _averages(k: Tensor, w: Tensor, bonus: Tensor) -> Chain:
    """Return the recurrence whose matrices are WKV's weights, in a form in which no exponent is positive.

    The state is kept relative to ``exp(m_t)``, ``m_t = max_{j <= t} k_j - (t - j) w``, and row i relative to the
    largest of its exponents; then each row is divided by its sum. Any m gives the same matrices.

    Args:
        k: Keys (B, L, D).
        w: Rate of decay (D,), positive.
        bonus: Added to the key of the current token (D,).
    """
    bound = upper_bound(k)
    m = running_max(-w.expand_as(k), bound)
    first = bound[:, :1] + bonus.clamp(max=0)  # no state comes before it, so any number that keeps the rule
    before = torch.cat([first, m[:, :-1]], dim=1)
    largest = torch.maximum(before, bound + bonus)
    c, now = torch.exp(before - largest), torch.exp(k + bonus - largest)
    scan = Scan(
        a=torch.exp(before - m - w).unsqueeze(-1),
        b=torch.exp(k - m).unsqueeze(-1),
        c=c.unsqueeze(-1),
        lag=1,
        bonus=now,
    )
    return Chain({"total": Diagonal(1 / scan.apply(torch.ones_like(k))), "weights": scan})
