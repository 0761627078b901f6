"""Channel mixing of RWKV-6 and RWKV-7, which mixes each token with the one before it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from captum_ssm.layers.activations import activation_name, secant
from captum_ssm.layers.fla_factors import unpacked_mask
from captum_ssm.layers.mixers import register
from captum_ssm.layers.parameters import parameters, projection
from captum_ssm.layers.token_shift import token_shift
from captum_ssm.operators import Chain, Diagonal, Operator


@register("fla.RWKV6FeedForward", kernel="token shift", family="fla")
def channel_mix6(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose the channel mixing of RWKV-6.

    Equation::

        y = diag(sigmoid(W_r shift_r x)) W_v diag(act) W_k shift_k diag(mask) x

    Args:
        mixer: ``RWKV6FeedForward`` of fla.
        x: Input (B, L, E).
        kwargs: Arguments of the call; ``attention_mask`` (B, L) is 0 at padding.

    Returns:
        Chain of ``gate``, ``value``, ``act``, ``key``, ``shift`` and, with a mask, ``mask``.

    Source:
        flash-linear-attention ``models/rwkv6/modeling_rwkv6.py``; Peng et al. 2024 (arXiv 2404.05892), section 4.3.
    """
    weights, mask = parameters(mixer, x), unpacked_mask(mixer, kwargs, x)
    mu = weights["receptance.mu"]
    shifted = token_shift(before=mu, now=1 - mu).apply(Chain(mask).apply(x))
    gate = projection(weights, "receptance.linear").apply(shifted, bias=True).sigmoid()
    factors = _feed_forward(mixer, weights, x, "key.linear", weights["key.mu"], mask)
    return Chain({"gate": Diagonal(gate), **factors})


@register("RWKV7ChannelMix", kernel="token shift", family="rwkv7_hf", parts=("x_k", "key", "value"))
@register("fla.RWKV7FeedForward", kernel="token shift", family="fla")
def channel_mix7(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose the channel mixing of RWKV-7.

    Equation::

        y = W_v diag(act) W_k shift_k diag(mask) x

    Args:
        mixer: ``RWKV7FeedForward`` of fla, or ``RWKV7ChannelMix`` of rwkv7-hf.
        x: Input (B, L, E).
        kwargs: Arguments of the call; ``attention_mask`` (B, L) is 0 at padding.

    Returns:
        Chain of ``value``, ``act``, ``key``, ``shift`` and, with a mask, ``mask``.

    Source:
        flash-linear-attention ``models/rwkv7/modeling_rwkv7.py``; rwkv7-hf ``modeling_rwkv7.py``; Peng
        et al. 2025 (arXiv 2503.14456), section 4.
    """
    weights, mask = parameters(mixer, x), unpacked_mask(mixer, kwargs, x)
    return Chain(_feed_forward(mixer, weights, x, "key", weights["x_k"], mask))


def _feed_forward(
    mixer: Any, weights: Mapping[str, Tensor], x: Tensor, key: str, mu: Tensor, mask: Mapping[str, Operator]
) -> dict[str, Operator]:
    """Build the factors of a channel mixing, without its gate.

    Args:
        mixer: The layer.
        weights: Parameters by name.
        x: Input (B, L, E).
        key: Name of the projection that is activated.
        mu: Weight of the token before in the shift, with E entries.
        mask: Factor that sets padding to 0, or an empty dictionary.

    Returns:
        ``value``, ``act``, ``key``, ``shift`` and, with a mask, ``mask``.
    """
    into: dict[str, Operator] = {"key": projection(weights, key), "shift": token_shift(before=mu, now=1 - mu), **mask}
    name = activation_name(mixer.act_fn) if hasattr(mixer, "act_fn") else "relu2"
    act = secant(name, Chain(into).apply(x, bias=True))
    return {"value": projection(weights, "value"), "act": Diagonal(act), **into}
