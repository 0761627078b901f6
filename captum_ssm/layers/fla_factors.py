"""Factors that the layers of flash-linear-attention share: masks, queries, keys and values, and the norm of heads."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from captum_ssm.layers.activations import secant
from captum_ssm.layers.norms import group_norm
from captum_ssm.layers.padding import padding_mask, refuse_gaps, refuse_packed
from captum_ssm.layers.parameters import Rows, convolution, projection
from captum_ssm.operators import Chain, Diagonal, Operator


def unpacked_mask(mixer: nn.Module, kwargs: Mapping[str, Any], x: Tensor) -> dict[str, Diagonal]:
    """Build the factor that sets padding to 0, for a call that may not pack several sequences into one.

    Args:
        mixer: The layer.
        kwargs: Arguments of the call; ``attention_mask`` (B, L) is 0 at padding.
        x: Input of the layer (B, L, E).

    Returns:
        ``{"mask": ...}``, or an empty dictionary if the call had no mask.

    Raises:
        UnsupportedModelError: If the call packs several sequences into one.
    """
    refuse_packed(mixer, kwargs)
    return padding_mask(kwargs, x)


def gapless_mask(mixer: nn.Module, kwargs: Mapping[str, Any], x: Tensor) -> dict[str, Diagonal]:
    """Build the factor that sets padding to 0, for a layer that takes padding out of its sequences.

    Args:
        mixer: The layer.
        kwargs: Arguments of the call; ``attention_mask`` (B, L) is 0 at padding.
        x: Input of the layer (B, L, E).

    Returns:
        ``{"mask": ...}``, or an empty dictionary if the call had no mask.

    Raises:
        UnsupportedModelError: If the call packs several sequences into one.
        InvalidInputError: If tokens are masked between real ones.
    """
    mask = unpacked_mask(mixer, kwargs, x)
    refuse_gaps(mixer, mask)
    return mask


def projection_factors(
    mixer: Any,
    weights: Mapping[str, Tensor],
    name: str,
    x: Tensor,
    activation: str | None = None,
    rows: Rows = lambda t: t,
) -> dict[str, Operator]:
    """Build the factors that make queries, keys or values of a layer's input.

    Args:
        mixer: The layer; its convolution ``<name>_conv1d``, if it has one, has an activation.
        weights: Parameters by name.
        name: Prefix of the projection and the convolution, such as ``"q"``.
        x: Input (B, L, E), 0 at padding.
        activation: Name of the activation that follows the projection if there is no convolution; None for none.
        rows: From the rows of the parameters to those of the factors, such as a repetition for groups of heads.

    Returns:
        ``act`` and ``conv``, where the layer has them, and ``in``.
    """
    factors: dict[str, Operator] = {"in": projection(weights, f"{name}_proj", rows)}
    if mixer.use_short_conv:
        factors = {"conv": convolution(weights, f"{name}_conv1d", rows), **factors}
        activation = getattr(mixer, f"{name}_conv1d").activation
    if activation is not None:
        factors = {"act": Diagonal(secant(activation, Chain(factors).apply(x, bias=True))), **factors}
    return factors


def masked_norm(y: Tensor, heads: int, eps: float, weight: Tensor | None, mask: Mapping[str, Diagonal]) -> Diagonal:
    """Build the root-mean-square norm of each head as a diagonal, which is 0 at padding.

    Args:
        y: Output of the recurrence (B, L, D).
        heads: Number of heads H, of P channels each.
        eps: Added to the mean square.
        weight: (D,), (P,) or None.
        mask: Factor of :func:`gapless_mask`: the layer returns zeros at the padding that it took out.

    Returns:
        The diagonal.
    """
    return Diagonal(Chain(mask).apply(group_norm(y, heads, eps, weight).s))
