"""Rotary positions: queries and keys turned by angles that grow along the sequence."""

from __future__ import annotations

import torch
from torch import Tensor


def rotary_angles(base: float, pairs: int, x: Tensor) -> Tensor:
    """Compute the angles by which the positions of a sequence turn queries and keys.

    ``angle[t, p] = t / base^(p / pairs)``.

    Args:
        base: Base of the frequencies.
        pairs: Number of pairs of entries that are turned, half of the rotary dimension.
        x: Any tensor (B, L, ...) of the sequence, in the wanted type and on the wanted device.

    Returns:
        (1, L, 1, pairs).

    Source:
        Su et al. 2021 (arXiv 2104.09864), equation 15.
    """
    pair, token = (torch.arange(size, device=x.device, dtype=x.dtype) for size in (pairs, x.shape[1]))
    return token.view(1, -1, 1, 1) * base ** -(pair / pairs)


def rotate(t: Tensor, angles: Tensor, interleaved: bool) -> Tensor:
    """Turn the first pairs of entries of queries or keys, each by its angle.

    Args:
        t: Queries or keys (B, L, H, N).
        angles: (B, L, H, A), with 1 where they are shared; 2A is at most N.
        interleaved: Whether neighbours make a pair, instead of the first and the second half of the 2A entries.

    Returns:
        (B, L, H, N).

    Source:
        Su et al. 2021 (arXiv 2104.09864), equation 34.
    """
    return turn(t, angles.cos(), angles.sin(), interleaved)


def turn(t: Tensor, cos: Tensor, sin: Tensor, interleaved: bool) -> Tensor:
    """Turn the first pairs of entries of queries or keys, each by the angle that has this cosine and sine.

    Args:
        t: Queries or keys (B, L, H, N).
        cos: (B, L, H, A), with 1 where they are shared; 2A is at most N.
        sin: (B, L, H, A), with 1 where they are shared.
        interleaved: Whether neighbours make a pair, instead of the first and the second half of the 2A entries.

    Returns:
        (B, L, H, N).
    """
    turned, unturned = t[..., : 2 * cos.shape[-1]], t[..., 2 * cos.shape[-1] :]
    x, y = turned.unflatten(-1, (-1, 2)).unbind(-1) if interleaved else turned.chunk(2, -1)
    pairs = [x * cos - y * sin, x * sin + y * cos]
    turned = torch.stack(pairs, -1).flatten(-2) if interleaved else torch.cat(pairs, -1)
    return torch.cat([turned, unturned], -1)
