"""Token shift of RWKV: each token mixed with the one before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.operators import CausalConv


def token_shift(before: Tensor, now: Tensor) -> CausalConv:
    """Build the convolution ``before x_{t-1} + now x_t``.

    Args:
        before: Weight of the token before, with D entries.
        now: Weight of the current token, with D entries.

    Returns:
        The convolution.
    """
    return CausalConv(torch.stack([before.flatten(), now.flatten()], dim=-1))


def previous(x: Tensor) -> Tensor:
    """Shift a sequence by one token, with 0 before its first.

    Args:
        x: (B, L, E).

    Returns:
        ``x_{t-1}`` at each token t, (B, L, E).
    """
    return F.pad(x, (0, 0, 1, -1))
