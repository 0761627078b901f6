"""WKV, the recurrence of RWKV-4, and the token shift of its channel mixing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from captum_ssm.layers.activations import secant
from captum_ssm.layers.averages import averages
from captum_ssm.layers.mixers import register
from captum_ssm.layers.parameters import parameters, projection
from captum_ssm.layers.token_shift import token_shift
from captum_ssm.operators import CausalConv, Chain, Diagonal


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
            "scan": averages(k, weights["time_decay"].exp(), weights["time_first"]),
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
