"""Activations as gates on their own input: ``act(u) = secant(u) * u``.

Each form below is free of a division, so that none is undefined at ``u = 0``.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from captum_ssm.errors import UnsupportedModelError


def _gelu_tanh_secant(u: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (u + 0.044715 * u**3)))


def _linear_sigmoid_secant(u: Tensor) -> Tensor:
    """Of ``u + 1/2`` for positive u and the sigmoid for negative u, less the 1/2 that both have at 0."""
    positive = 0.5 * (1 + torch.sign(u))
    below = u.clamp(max=-1e-12)  # at 0 the slope of the sigmoid
    return positive + (1 - positive) * torch.tanh(below / 2) / (2 * below)


_SECANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.sigmoid,
    "swish": torch.sigmoid,
    "gelu": torch.special.ndtr,
    "gelu_pytorch_tanh": _gelu_tanh_secant,
    "gelutanh": _gelu_tanh_secant,  # the name that activation_name reads off transformers' module
    "relu": lambda u: (u > 0).to(u),
    "relu2": torch.relu,
    "linear_sigmoid": _linear_sigmoid_secant,
    "identity": torch.ones_like,
    "linear": torch.ones_like,
}

_FUNCTION_NAMES = {"SwishFunction": "silu", "SigmoidFunction": "sigmoid", "SquaredReLUFunction": "relu2"}
"""Activations of flash-linear-attention, by the class of their autograd function."""


def secant(activation: str, u: Tensor) -> Tensor:
    """Compute ``act(u) / u``, the gate that an activation puts on its own input.

    A rule of relevance may take over this function through ``__torch_function__``.

    Args:
        activation: Name of the activation in transformers' configurations.
        u: Pre-activation, any shape.

    Returns:
        The gate, of the shape of ``u``.

    Raises:
        UnsupportedModelError: If the activation has no gate form here.
    """
    if has_torch_function_unary(u):
        return handle_torch_function(secant, (u,), activation, u)
    return secant_of(activation)(u)


def secant_of(activation: str) -> Callable[[Tensor], Tensor]:
    """Look up the function behind :func:`secant`.

    Args:
        activation: Name of the activation in transformers' configurations.

    Returns:
        A function from the pre-activation to the gate.

    Raises:
        UnsupportedModelError: If the activation has no gate form here.
    """
    if activation not in _SECANTS:
        raise UnsupportedModelError(
            f"The activation {activation!r} has no gate form; known: {', '.join(_SECANTS)}. Register an adapter of "
            "your own for this layer (captum_ssm.register)."
        )
    return _SECANTS[activation]


def activation(name: str, u: Tensor) -> Tensor:
    """Compute ``act(u)``, for the sigmoid too, which has no gate form.

    Args:
        name: Name of the activation in transformers' configurations.
        u: Pre-activation, any shape.

    Returns:
        The activation, of the shape of ``u``.

    Raises:
        UnsupportedModelError: If the activation is neither the sigmoid nor known to :func:`secant`.
    """
    return u.sigmoid() if name == "sigmoid" else secant(name, u) * u


def activation_name(function: Any) -> str:
    """Find the name under which :func:`secant` and :func:`activation` know a layer's activation.

    Args:
        function: The activation: a module of torch or transformers, or a function of flash-linear-attention.

    Returns:
        The name; one that :func:`secant` does not know if the activation is not supported.

    Example:
        >>> activation_name(nn.SiLU())
        'silu'
    """
    if isinstance(function, nn.Module):
        return type(function).__name__.removesuffix("Activation").lower()
    function = inspect.unwrap(function)
    name = getattr(getattr(function, "__self__", function), "__name__", repr(function))
    return _FUNCTION_NAMES.get(name, name)
