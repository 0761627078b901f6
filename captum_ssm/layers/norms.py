"""Norms, given their scales: root-mean-square and Euclidean, and the norm of groups of channels as a diagonal."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_ssm.operators import Diagonal


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """Compute the scale of a root-mean-square norm, ``1 / sqrt(mean(x²) + eps)``.

    Args:
        x: (..., N); the mean is over the last axis.
        eps: Added to the mean square.

    Returns:
        (..., 1).
    """
    return torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)


def inverse_length(x: Tensor, eps: float) -> Tensor:
    """Compute the scale of a Euclidean norm, ``1 / sqrt(sum(x²) + eps)``.

    Args:
        x: (..., N); the sum is over the last axis.
        eps: Added to the squared length.

    Returns:
        (..., 1).
    """
    return torch.rsqrt(x.square().sum(-1, keepdim=True) + eps)


def rms_norm(x: Tensor, eps: float, weight: Tensor) -> Tensor:
    """Scale vectors to a root mean square of 1, and then by a weight.

    Args:
        x: (..., N).
        eps: Added to the mean square.
        weight: (N,).

    Returns:
        (..., N).
    """
    return x * inverse_rms(x, eps) * weight


def group_norm(
    y: Tensor, groups: int, eps: float, weight: Tensor | None = None, bias: Tensor | None = None
) -> Diagonal:
    """Build the root-mean-square norm of each group of consecutive channels, such as a head, as a diagonal.

    It is a layer norm of each group too, for ``y`` that is centred in each group.

    Args:
        y: Values to be normed (B, L, D).
        groups: Number of groups G, of P = D / G channels.
        eps: Added to the mean square.
        weight: (D,), or (P,) where all groups share it; None for none.
        bias: (D,), or None.

    Returns:
        The diagonal, with a scale (B, L, D).
    """
    y = y.unflatten(-1, (groups, -1))  # (B, L, G, P)
    scale = inverse_rms(y, eps)  # (B, L, G, 1)
    scale = scale.expand_as(y) if weight is None else scale * weight.view(-1, y.shape[-1])
    return Diagonal(scale.flatten(-2), bias)
