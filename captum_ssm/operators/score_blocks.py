"""The scores of softmax attention, a block of queries at a time, so that nothing holds a number for each two tokens.

Source: Dao et al. 2022 (arXiv 2205.14135), algorithm 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from captum_ssm.operators.device_sizes import DeviceSize

HIDDEN = -1e4
"""Largest number that a library or a user adds to the score of a hidden key."""

_SCORES = DeviceSize(cpu=2**17, others=2**26)
"""Scores of a block: on a processor, some tensors of this size fit the cache."""

_ROWS = 32
"""Queries of a block at least, where there are as many: with fewer, products of matrices are slow."""


def by_heads(t: Tensor, lead: torch.Size) -> Tensor:
    """Return (B, H, rows, columns) of a tensor that may be shared along some of its leading axes."""
    return t.expand(*lead, *t.shape[-2:]).reshape(math.prod(lead[:-1]), math.prod(lead[-1:]), *t.shape[-2:])


class ScoreBlock(NamedTuple):
    """Scores that are treated at once."""

    heads: slice
    rows: slice
    keys: slice
    """The first keys: all that some query of the block sees."""
    mask: Tensor | None
    """Broadcastable to (B, heads, rows, keys)."""

    def of_rows(self, t: Tensor) -> Tensor:
        """Return the entries of the block's queries, (B, heads, rows, ...)."""
        return t[:, self.heads, self.rows]

    def of_keys(self, t: Tensor) -> Tensor:
        """Return the entries of the block's keys, (B, heads, keys, ...)."""
        return t[:, self.heads, self.keys]

    def scores(self, q: Tensor, k: Tensor) -> Tensor:
        """Return the products of queries and keys, without the mask, (B, heads, rows, keys)."""
        return self.of_rows(q) @ self.of_keys(k).mT

    def masked(self, scores: Tensor) -> Tensor:
        """Return the scores with the mask."""
        return scores if self.mask is None else scores + self.mask


class ScoreBlocks:
    """The blocks of the scores (B, H, I, J).

    Args:
        q: Queries (B, H, I, N).
        k: Keys (B, H, J, N).
        mask: Broadcastable to (..., I, J), or None.
        sees_earlier: Whether query i sees the keys up to i alone.
        lead: The leading axes.
    """

    def __init__(self, q: Tensor, k: Tensor, mask: Tensor | None, sees_earlier: bool, lead: torch.Size) -> None:
        (B, H, I, _), J = q.shape, k.shape[2]  # noqa: E741
        self.like, self.sees_earlier, self.mask = q.detach(), sees_earlier, None
        self.shape, size = (H, I, J), _SCORES.of(q)
        self.rows = max(1, min(I, max(_ROWS, size // max(B * H * J, 1))))
        self.heads = max(1, min(H, size // max(B * self.rows * J, 1)))
        self.seen = [min(i + 1, J) if sees_earlier else J for i in range(I)]
        if mask is not None:
            mask = mask.expand(*mask.shape[:-2], I, J)
            self.seen, self.mask = _seen(mask), by_heads(mask, lead)

    def __iter__(self) -> Iterator[ScoreBlock]:
        H, I, _ = self.shape  # noqa: E741
        for start in range(0, I, self.rows):
            rows = slice(start, min(start + self.rows, I))
            keys = slice(0, max(self.seen[rows]))
            for head in range(0, H, self.heads):
                heads = slice(head, head + self.heads)
                yield ScoreBlock(heads, rows, keys, self._mask(heads, rows, keys))

    def _mask(self, heads: slice, rows: slice, keys: slice) -> Tensor | None:
        if self.sees_earlier:
            later = self.like.new_full((rows.stop - rows.start, keys.stop), -torch.inf)
            return later.triu(rows.start + 1)
        return None if self.mask is None else self.mask[:, heads, rows, keys]


def _seen(mask: Tensor) -> list[int]:
    """Return by row of a mask (..., I, J) how many of the first keys it sees: all, if it hides all from some query."""
    visible = mask > HIDDEN
    visible = (visible | ~visible.any(-1, keepdim=True)).view(-1, *mask.shape[-2:]).any(0)  # (I, J)
    number = torch.arange(1, mask.shape[-1] + 1, device=mask.device)
    seen: list[int] = (visible * number).amax(-1).tolist()
    return seen
