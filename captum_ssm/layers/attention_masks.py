"""Masks of softmax attention: the keys that each query sees, and what is added to the scores of the others."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from captum_ssm.errors import UnsupportedModelError
from captum_ssm.operators.score_blocks import HIDDEN


def additive_mask(mask: Any, x: Tensor, window: int | None = None) -> Tensor | None:
    """Build the additive mask of a call.

    Args:
        mask: None or (B, L) if the kernel itself is causal, else (B, 1, L, L), True or 0 where a key is visible.
        x: Input (B, L, E).
        window: Number of keys that a token sees at most; None for all.

    Returns:
        (B or 1, 1, L, L), added to the scores of the keys; None if each token sees all earlier ones.

    Raises:
        UnsupportedModelError: If the mask is no tensor.
    """
    if not (mask is None or isinstance(mask, Tensor)):
        raise UnsupportedModelError(
            f"An attention mask of type {type(mask).__name__} cannot be read. Load the model with another attention: "
            "attn_implementation='sdpa' or 'eager'."
        )
    if mask is None and (window is None or window >= x.shape[1]):
        return None
    return causal_mask(x, mask, window) if mask is None or mask.dim() == 2 else as_scores(mask, x)


def causal_mask(x: Tensor, tokens: Tensor | None = None, window: int | None = None) -> Tensor:
    """Build the additive mask of tokens that see earlier ones alone.

    Args:
        x: Input (B, L, E).
        tokens: Mask (B, L), 0 at padding; None without padding.
        window: Number of keys that a token sees at most; None for all.

    Returns:
        (B or 1, 1, L, L).
    """
    L = x.shape[1]
    visible = torch.ones(1, 1, L, L, dtype=torch.bool, device=x.device).tril()
    if window:
        visible = visible.triu(1 - window)
    if tokens is not None:
        visible = visible & tokens.to(visible)[:, None, None]
    return as_scores(visible, x)


def as_scores(mask: Tensor, x: Tensor) -> Tensor:
    """Return a mask, boolean or additive, as what is added to scores in the type of ``x``; none is infinite."""
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, -math.inf)
    return mask.to(x).clamp(min=torch.finfo(torch.float32).min)  # finite also where the softmax runs in float32


def attending(mask: Tensor | None, visible: Tensor | None) -> Tensor | None:
    """Find the tokens that attend to none: padding, and those that see no key, whose softmax is no attention.

    Args:
        mask: That of the call, (B or 1, 1, L, L), which hides a key from its own query if it is padding; or None.
        visible: That of the keys that a layer sees in the end, (B or 1, 1, L, L), or None.

    Returns:
        (B or 1, 1, L, 1), 0 for them, else 1; None if there are none.
    """
    if visible is None:
        return None
    none = (visible <= HIDDEN).all(-1, keepdim=True)
    if mask is not None:
        none = none | (mask <= HIDDEN).diagonal(dim1=-2, dim2=-1).unsqueeze(-1)
    return (~none).to(visible) if bool(none.any()) else None
