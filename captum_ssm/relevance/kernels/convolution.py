"""The causal convolutions of causal_conv1d and of flash-linear-attention, with their activation."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from captum_ssm.relevance.kernels.kernel import kernel


@kernel("causal_conv1d_fn", "CausalConv1dFn", "causal_conv1d_ref")
def causal_conv1d_fn(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, activation: str | bool | None = None
) -> Tensor:
    """Convolve each channel with its own kernel over itself and the tokens before it.

    Args:
        x: Input (B, D, L).
        weight: Weights of the tokens, the current one last, (D, K).
        bias: (D,), or None.
        activation: ``"silu"`` or ``"swish"``, or None.

    Returns:
        (B, D, L).
    """
    D, K = weight.shape
    y = F.conv1d(x, weight.unsqueeze(1), bias, padding=K - 1, groups=D)[..., : x.shape[-1]]
    return F.silu(y) if activation else y


@kernel("causal_conv1d")
def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    residual: Tensor | None = None,
    activation: str | None = None,
) -> Tensor:
    """Convolve each channel of an input (B, L, D), as :func:`causal_conv1d_fn`, and add a residual (B, L, D)."""
    y = causal_conv1d_fn(x.mT, weight, bias, activation).mT
    return y if residual is None else y + residual
