"""The rows of a scan's matrices, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate
from operator import mul

import torch
import torch.nn.functional as F
from torch import Tensor

_ROWS = 16
"""T, the rows of one step: a chunk."""


def rows_of_matrix(
    a: Tensor, b: Tensor, c: Tensor, direct: Sequence[Tensor], lag: int, band: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Walk through the products of every channel's matrix and a banded one, see :meth:`Scan.rows`.

    The columns of earlier chunks reach the rows of a chunk through their states. The columns of the band that enter
    with this chunk do so through the matrix of the chunk.

    Args:
        a: Decays (B or 1, L, D or 1, N or 1).
        b: Weights of the input (B or 1, L, D or 1, N or 1).
        c: Weights of the state in the output (B or 1, L, D or 1, N or 1).
        direct: Direct paths, each broadcastable to (B, L, D).
        lag: 1 if the state is read before the current token is written, else 0.
        band: (K, B, L, D): entry ``[k, :, t]`` is the weight of token t - k in the input at t.

    Yields:
        A slice of rows i, and their entries (B, D, rows, columns), of the columns j up to the last of these rows. The
        entries are overwritten in the next step.
    """
    K, B, L, D = band.shape
    T = _ROWS
    a, b, c = (_chunked(coefficient, T) for coefficient in (a, b, c))  # (T, B or 1, D or 1, chunks, N or 1)
    matrices, left = _chunk_matrices(a, b, c, lag)  # (B, D, chunks, T, T) and (B, D, chunks, N, T)
    since_start = torch.stack([*accumulate(a, mul)])  # (T, B, D, chunks, N)
    until_read = torch.cat([torch.ones_like(a[:1]), since_start[:-1]]) if lag else since_start
    reads = (c * until_read).movedim(0, -2)  # (B, D, chunks, T, N)
    entering = _band_matrices(band, T)  # (B, D, chunks, T, T + K - 1)
    added, written = matrices @ entering, left @ entering  # (B, D, chunks, T or N, T + K - 1)
    for path in direct:
        added += _chunked(path.expand(B, L, D).unsqueeze(-1), T).movedim(0, -2) * entering

    h = band.new_zeros(B, D, left.shape[-2], L)  # (B, D, N, L): the state of every column
    buffer = band.new_empty(B * D * T * L)
    for chunk, start in enumerate(range(0, L, T)):
        stop = min(start + T, L)
        rows = stop - start
        columns = slice(max(0, start - K + 1), stop)  # the columns that enter with this chunk
        in_band = slice(columns.start - (start - K + 1), columns.stop - (start - K + 1))
        y = buffer[: B * D * rows * stop].view(B, D, rows, stop)
        y[..., start:] = 0
        torch.matmul(reads[:, :, chunk, :rows], h[..., :start], out=y[..., :start])
        y[..., columns] += added[:, :, chunk, :rows, in_band]
        yield slice(start, stop), y
        h[..., :start] *= since_start[-1, :, :, chunk, :, None]
        h[..., columns] += written[:, :, chunk, :, in_band]


def _chunked(coefficient: Tensor, T: int) -> Tensor:
    """Return ``coefficient`` (B, L, D or 1, N) in chunks of T tokens, (T, B, D or 1, chunks, N), padded with 0."""
    padded = F.pad(coefficient, (0, 0, 0, 0, 0, -coefficient.shape[1] % T))  # (B, chunks * T, D or 1, N)
    return padded.unflatten(1, (-1, T)).permute(2, 0, 3, 1, 4).contiguous()


def _band_matrices(band: Tensor, T: int) -> Tensor:
    """Return the rows of a banded matrix, a dense block for each chunk of T rows.

    Args:
        band: (K, B, L, D).
        T: Rows of a chunk.

    Returns:
        (B, D, chunks, T, T + K - 1). A block's first column belongs to the token K - 1 before its first row.
    """
    K, _, L, _ = band.shape
    rows = F.pad(band, (0, 0, 0, -L % T)).unflatten(2, (-1, T)).permute(1, 4, 2, 3, 0)  # (B, D, chunks, T, K)
    blocks = band.new_zeros(*rows.shape[:-1], T + K - 1)
    t = torch.arange(T, device=band.device)
    for k in range(K):
        blocks[..., t, t + K - 1 - k] = rows[..., k]
    return blocks


def _chunk_matrices(a: Tensor, b: Tensor, c: Tensor, lag: int) -> tuple[Tensor, Tensor]:
    """Return the matrix of each chunk, and the part of each of its tokens that is left in the state after it.

    Args:
        a: Decays (T, B or 1, D or 1, chunks, N or 1).
        b: Weights of the input (T, B or 1, D or 1, chunks, N or 1).
        c: Weights of the state in the output (T, B or 1, D or 1, chunks, N or 1).
        lag: 1 if the state is read before the current token is written, else 0.

    Returns:
        (B, D, chunks, T, T) and (B, D, chunks, N, T).
    """
    shape = torch.broadcast_shapes(a.shape, b.shape, c.shape)  # (T, B, D, chunks, N)
    left = a.new_empty(shape)  # [s]: the weights that token s has written, decayed until token t
    matrix = a.new_zeros(*shape[1:-1], shape[0], shape[0])
    for t in range(len(left)):
        if lag:
            matrix[..., t, :t] = torch.einsum("...n,s...n->...s", c[t], left[:t])
        left[:t] *= a[t]
        left[t] = b[t]
        if not lag:
            matrix[..., t, : t + 1] = torch.einsum("...n,s...n->...s", c[t], left[: t + 1])
    return matrix, left.movedim(0, -1)
