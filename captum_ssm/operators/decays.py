"""The decays of one chunk, accumulated from token to token, and the products that they weigh."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor


class ChunkDecays(NamedTuple):
    """Products of a chunk's decays from one token to a later one."""

    between: Tensor
    """(B, H, T, T, N), ``[t, s] = prod_{s < k <= t} a_k``: the decay until token t of a value written at token s; 0 for
    s > t."""
    since_start: Tensor
    """(B, H, T, N), ``[t] = prod_{k <= t} a_k``: the decay until token t of the state before the chunk."""

    def before_token(self) -> ChunkDecays:
        """Return the decays until t - 1 instead of t: of the state that token t finds, before it is written."""
        return ChunkDecays(
            F.pad(self.between[:, :, :-1], (0, 0, 0, 0, 1, 0)),  # (B, H, T, T, N), 0 for t = 0
            F.pad(self.since_start[:, :, :-1], (0, 0, 1, 0), value=1.0),  # (B, H, T, N), 1 for t = 0
        )

    def until_end(self) -> Tensor:
        """Return the decay from each token to the end of the chunk, (B, H, T, N)."""
        return self.between[:, :, -1]

    def of_chunk(self) -> Tensor:
        """Return the decay of the state over the whole chunk, (B, H, N, 1)."""
        return self.since_start[:, :, -1:].mT


def chunk_decays(a: Tensor) -> ChunkDecays:
    """Accumulate the decays ``a`` (B, T, H, N) of a chunk."""
    return ChunkDecays(_decays_between(a), a.transpose(1, 2).cumprod(2))


def _decays_between(a: Tensor) -> Tensor:
    """Return ``[t, s] = prod_{s < k <= t} a_k``, 0 for s > t, (B, H, T, T, N), of decays ``a`` (B, T, H, N).

    These are products, not exponentials of differences: decays may be zero or negative, and nothing overflows.
    """
    T = a.shape[1]
    upper = torch.ones(T, T, dtype=torch.bool, device=a.device).triu()  # [s, t]: the running axis last is the fast one
    steps = torch.where(upper.triu(1), a.permute(0, 2, 3, 1).unsqueeze(-2), 1)  # (B, H, N, T, T)
    return (steps.cumprod(-1) * upper).permute(0, 1, 4, 3, 2)


def decayed_products(rows: Tensor, between: Tensor, columns: Tensor) -> Tensor:
    """Return ``[t, s] = sum_n rows_tn between_tsn columns_sn``: the inner products of decayed keys and queries.

    Args:
        rows: (B, H, T, N), such as the weights ``c`` with which each token reads the state.
        between: Decays (B, H, T, S, N), or (B, H, T, S, 1) if all states share one.
        columns: (B, H, S, N), such as the weights ``b`` with which each token is written.

    Returns:
        (B, H, T, S). Cost: O(T·S·N) a head; one matrix product if all states share one decay.
    """
    if between.shape[-1] == 1:
        return rows @ columns.mT * between.squeeze(-1)
    return (rows.unsqueeze(3) * between * columns.unsqueeze(2)).sum(-1)


def heads_first(tensor: Tensor, size: int) -> Tensor:
    """Return (B, H, T, size) of ``tensor`` (B, T, H, size), or (B, T, H, 1) if the last axis is shared.

    Of several examples it is copied, once, where each matrix product would do so.
    """
    tensor = tensor.expand(-1, -1, -1, size).transpose(1, 2)
    return tensor.contiguous() if len(tensor) > 1 else tensor
