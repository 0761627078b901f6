"""What the layers of flash-linear-attention have in common: padding, short convolutions, the norm and the gate."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from captum_ssm.adapters.reading import padding, refuse_packed
from captum_ssm.errors import InvalidInputError
from captum_ssm.gates import activation_name, inverse_rms, secant
from captum_ssm.operators import CausalConv, Chain, Diagonal, Operator, Projection

_FUNCTIONS = {"SwishFunction": "silu", "SigmoidFunction": "sigmoid", "SquaredReLUFunction": "relu2"}
"""The package's own activations, by the class of their autograd function."""


def masked(mixer: nn.Module, kwargs: Mapping[str, Any], x: Tensor) -> dict[str, Diagonal]:
    """Return the factor that sets padding to 0, ``{"mask": ...}``, or nothing if the call had no mask.

    Args:
        mixer: The layer.
        kwargs: The call's arguments; ``attention_mask`` (B, L) is 0 at padding.
        x: Input of the layer (B, L, E).

    Raises:
        UnsupportedModelError: If the call packs several sequences into one.
    """
    refuse_packed(mixer, kwargs)
    return padding(kwargs, x)


def unpadded(mixer: nn.Module, kwargs: Mapping[str, Any], x: Tensor) -> dict[str, Diagonal]:
    """Return the factor that sets padding to 0, as :func:`masked`, for a layer that takes padding out of its sequences.

    Raises:
        UnsupportedModelError: If the call packs several sequences into one.
        InvalidInputError: If tokens are masked between real ones: the layer makes neighbours of those around them.
    """
    mask = masked(mixer, kwargs, x)
    if mask:
        real = mask["mask"].s.squeeze(-1)
        if bool((real.diff(dim=1) == 1).sum(1).add(real[:, 0]).gt(1).any()):
            raise InvalidInputError(
                f"The attention mask leaves out tokens between real ones. A {type(mixer).__name__} layer takes them "
                "out of the sequence, so that those around them become neighbours: remove them from the inputs."
            )
    return mask


def short_conv(
    mixer: Any, weights: Mapping[str, Tensor], name: str, x: Tensor, activation: str | None = None, groups: int = 1
) -> dict[str, Operator]:
    """Return the factors that make queries, keys or values of a layer's input.

    Args:
        mixer: The layer; its ``<name>_conv1d``, if it has one, brings an activation of its own.
        weights: Its parameters by name.
        name: Prefix of the projection and the convolution, ``"q"``.
        x: Input (B, L, E), 0 at padding.
        activation: What follows the projection if there is no convolution; None for nothing.
        groups: How many consecutive heads share one of the layer's ``num_kv_heads`` heads of keys and values.

    Returns:
        ``act`` and ``conv``, where there are such, and ``in``.
    """

    def every_head(w: Tensor) -> Tensor:
        return w if groups == 1 else w.unflatten(0, (mixer.num_kv_heads, -1)).repeat_interleave(groups, 0).flatten(0, 1)

    factors: dict[str, Operator] = {"in": Projection(every_head(weights[f"{name}_proj.weight"]))}
    if mixer.use_short_conv:
        bias = weights.get(f"{name}_conv1d.bias")
        taps = every_head(weights[f"{name}_conv1d.weight"].squeeze(1))
        factors = {"conv": CausalConv(taps, None if bias is None else every_head(bias)), **factors}
        activation = getattr(mixer, f"{name}_conv1d").activation
    if activation is not None:
        factors = {"act": Diagonal(secant(activation, Chain(factors).apply(x, bias=True))), **factors}
    return factors


def norm(found: Tensor, eps: float, weight: Tensor | None, mask: Mapping[str, Diagonal]) -> Diagonal:
    """Return the root-mean-square norm of every head as a diagonal, which is 0 at padding.

    Args:
        found: What the recurrence gives (B, L, H, P).
        eps: Added to the mean square.
        weight: (P,) or None.
        mask: From :func:`unpadded`: the layer puts zeros in the place of the padding that it took out.
    """
    scale = inverse_rms(found, eps).expand_as(found) * (1 if weight is None else weight)
    return Diagonal(Chain(mask).apply(scale.flatten(-2)))


def low_rank(
    weights: Mapping[str, Tensor], name: str, x: Tensor, between: Callable[[Tensor], Tensor] = lambda t: t
) -> Tensor:
    """Return ``x`` through the two projections ``<name>.0`` and ``<name>.<last>``, the last with its bias.

    Args:
        weights: The layer's parameters by name.
        name: Prefix of the pair.
        x: (B, L, E).
        between: What comes between the two.
    """
    last = f"{name}.2" if f"{name}.2.weight" in weights else f"{name}.1"  # an activation may have the number between
    low = between(F.linear(x, weights[f"{name}.0.weight"]))
    return F.linear(low, weights[f"{last}.weight"], weights.get(f"{last}.bias"))


def function_name(function: Any) -> str:
    """Return the name that :mod:`captum_ssm.gates` knows an activation by: a module, or a function of the package."""
    if isinstance(function, nn.Module):
        return activation_name(function)
    own = inspect.unwrap(function)
    name = getattr(getattr(own, "__self__", own), "__name__", repr(own))
    return _FUNCTIONS.get(name, name)
