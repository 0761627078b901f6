"""The nonlinear pieces of a layer in the form in which they are linear: a diagonal for each input.

Each nonlinearity of the families is defined here once. ``act(u) = secant(u) * u`` turns an activation into a
gate on its own input; the forms below have no division, so none is undefined at ``u = 0``.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from captum_ssm.errors import UnsupportedModelError

_SECANTS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": torch.sigmoid,
    "swish": torch.sigmoid,
    "gelu": torch.special.ndtr,
    "relu": lambda u: (u > 0).to(u),
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
    if activation not in _SECANTS:
        raise UnsupportedModelError(
            f"The activation {activation!r} has no gate form; known: {', '.join(_SECANTS)}. Register an adapter of "
            "your own for this layer (captum_ssm.register)."
        )
    return _SECANTS[activation](u)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """Return the scale of a root-mean-square norm, ``1 / sqrt(mean(x²) + eps)``, shape (..., 1)."""
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
