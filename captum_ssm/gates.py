"""The nonlinear pieces of a layer in the form in which they are linear: a diagonal for each input.

Each nonlinearity of the families is defined here once. ``act(u) = secant(u) * u`` turns an activation into a
gate on its own input; the forms below have no division, so none is undefined at ``u = 0``.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.overrides import handle_torch_function, has_torch_function_unary

from captum_ssm.errors import UnsupportedModelError


def _gelu_tanh_secant(u: Tensor) -> Tensor:
    return 0.5 * (1 + torch.tanh((2 / math.pi) ** 0.5 * (u + 0.044715 * u**3)))


_SECANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.sigmoid,
    "swish": torch.sigmoid,
    "gelu": torch.special.ndtr,
    "gelu_pytorch_tanh": _gelu_tanh_secant,
    "gelutanh": _gelu_tanh_secant,  # what activation_name calls it
    "relu": lambda u: (u > 0).to(u),
    "relu2": torch.relu,
    "identity": torch.ones_like,
    "linear": torch.ones_like,
}


def secant(activation: str, u: Tensor) -> Tensor:
    """Return ``act(u) / u``, the gate that the activation puts on its input.

    Args:
        activation: The activation's name in transformers' configurations.
        u: Pre-activation, any shape.

    Raises:
        UnsupportedModelError: If the activation has no such form here.
    """
    if has_torch_function_unary(u):  # a rule of relevance may hold it
        return handle_torch_function(secant, (u,), activation, u)
    return secant_of(activation)(u)


def secant_of(activation: str) -> Callable[[Tensor], Tensor]:
    """Return the function behind :func:`secant`.

    Raises:
        UnsupportedModelError: If the activation has no such form here.
    """
    if activation not in _SECANTS:
        raise UnsupportedModelError(
            f"The activation {activation!r} has no gate form; known: {', '.join(_SECANTS)}. Register an adapter of "
            "your own for this layer (captum_ssm.register)."
        )
    return _SECANTS[activation]


def activation(name: str, u: Tensor) -> Tensor:
    """Return ``act(u)`` as an output gate: any activation that has a gate form, and the sigmoid, which has none.

    Args:
        name: The activation's name in transformers' configurations.
        u: Pre-activation, any shape.

    Raises:
        UnsupportedModelError: If the activation is neither the sigmoid nor one that :func:`secant` knows.
    """
    return u.sigmoid() if name == "sigmoid" else secant(name, u) * u


def activation_name(module: nn.Module) -> str:
    """Return the name that :func:`secant` knows an activation by, for layers that keep the module alone.

    Example:
        >>> activation_name(nn.SiLU())
        'silu'
    """
    return type(module).__name__.removesuffix("Activation").lower()


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """Return the scale of a root-mean-square norm, ``1 / sqrt(mean(x²) + eps)``, shape (..., 1)."""
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def inverse_length(x: Tensor, eps: float) -> Tensor:
    """Return the scale of a Euclidean norm, ``1 / sqrt(sum(x²) + eps)``, shape (..., 1)."""
    return torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def rotate(t: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """Return ``t`` with its first pairs of entries each turned by an angle.

    Args:
        t: Queries or keys (B, L, H, N).
        angles: (B, L, H, A), or 1 where they are shared; 2A is at most N.
        interleaved: Whether neighbours make a pair, rather than the first and the second half of the 2A entries.

    Source:
        Su et al. 2021 (arXiv 2104.09864), equation 34.
    """
    turned, rest = t[..., : 2 * angles.shape[-1]], t[..., 2 * angles.shape[-1] :]
    x, y = turned.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else turned.chunk(2, -1)
    cos, sin = angles.cos(), angles.sin()
    pairs = [x * cos - y * sin, x * sin + y * cos]
    turned = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
    return torch.cat([turned, rest], -1)


def upper_bound(x: Tensor) -> Tensor:
    """Return a constant at or above ``x``: what exponents are kept relative to, where it cancels in the end.

    It is ``x`` itself; where relevance compares an input with a reference, the larger of the two.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(upper_bound, (x,), x)
    return x


def running_max(step: Tensor, values: Tensor) -> Tensor:
    """Return ``m_t = max(m_{t-1} + step_t, values_t)`` along axis 1, from ``m_0 = values_0``.

    The logarithm of a state's size that exponential gates are kept relative to. The reach of the maximum is doubled
    until it spans the sequence, so steps are summed over what is in reach of a maximum, never over all tokens.

    Args:
        step: Logarithms of the decays (B, L, ...), not positive.
        values: Logarithms of what is written, likewise.

    Cost: O(L·log L) for each channel.
    """
    reach = 1
    while reach < values.shape[1]:
        reached = torch.maximum(values[:, reach:], values[:, :-reach] + step[:, reach:])
        values = torch.cat([values[:, :reach], reached], dim=1)
        step = torch.cat([step[:, :reach], step[:, reach:] + step[:, :-reach]], dim=1)
        reach *= 2
    return values
