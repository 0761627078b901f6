"""The rows of a scan's matrices, a few at a time."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from operator import add, mul
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.operators.coefficient import Product, ScanCoefficients

_ROWS = 16
"""T, the rows of one step: a chunk. A power of two."""


def rows_of_matrix(
    products: ScanCoefficients[Product], direct: Sequence[Tensor], lag: int, band: Tensor
) -> Iterator[tuple[slice, Tensor]]:
    """Walk through the products of every channel's matrix and a banded one, see :meth:`Scan.rows`.

    The columns of earlier chunks reach the rows of a chunk through their states. The columns of the band that enter
    with this chunk do so through the matrix of the chunk.

    Args:
        products: The coefficients, each (B or 1, L or 1, D or 1, N or 1).
        direct: Direct paths, each broadcastable to (B, L, D).
        lag: 1 if the state is read before the current token is written, else 0.
        band: (K, B, L, D): entry ``[k, :, t]`` is the weight of token t - k in the input at t.

    Yields:
        A slice of rows i, and their entries (B, D, rows, columns), of the columns j up to the last of these rows. The
        entries are overwritten in the next step.
    """
    K, B, L, D = band.shape
    T = _ROWS
    path = reduce(add, direct).expand(B, L, D) if direct else None
    matrices, reads, left, decays = _chunks(products, path, lag, band)
    added, written = _by_column(matrices, band), _by_column(left, band)  # (B, D, chunks, T + K - 1, T or N)

    h = band.new_zeros(B, D, L, left.shape[-1])  # the state of every column
    buffer = band.new_empty(B * D * T * L)
    for chunk, start in enumerate(range(0, L, T)):
        stop = min(start + T, L)
        rows = stop - start
        columns = slice(max(0, start - K + 1), stop)  # the columns that enter with this chunk
        in_band = slice(columns.start - (start - K + 1), columns.stop - (start - K + 1))
        y = buffer[: B * D * rows * stop].view(B, D, rows, stop)
        torch.matmul(reads[:, :, chunk, :rows], h[:, :, :stop].mT, out=y)
        y[..., columns] += added[:, :, chunk, in_band, :rows].mT
        yield slice(start, stop), y
        if stop < L:
            h[:, :, :start] *= decays[:, :, chunk, None]
            h[:, :, columns] += written[:, :, chunk, in_band]


class _Chunks(NamedTuple):
    """What each chunk of T tokens makes of its inputs and of the state before it."""

    matrices: Tensor
    """From its inputs to its outputs, (B, D, chunks, T, T)."""
    reads: Tensor
    """From the state before it to its outputs, (B, D, chunks, T, N)."""
    left: Tensor
    """From its inputs to the state after it, (B, D, chunks, T, N)."""
    decays: Tensor
    """From the state before it to the state after it, (B, D, chunks, N or 1)."""


def _chunks(products: ScanCoefficients[Product], direct: Tensor | None, lag: int, like: Tensor) -> _Chunks:
    """Return the chunks of a scan, put together from single tokens by joining neighbours.

    Two neighbours of s tokens each are joined as ``[[M, 0], [reads' left^T, M']]``: what the later one reads of the
    state is what the earlier one has left in it.

    Args:
        products: The coefficients.
        direct: Weight of each token in its own output beside the scan, (B, L, D), or None.
        lag: 1 if the state is read before the current token is written, else 0.
        like: Any tensor (..., B, L, D).
    """
    T, (B, L, D) = _ROWS, like.shape[-3:]
    a, b, c = (_in_chunks(product, T) for product in products)  # (B or 1, D or 1, chunks or 1, T or 1, N or 1)
    N = max(coefficient.shape[-1] for coefficient in (a, b, c))
    matrices = like.new_zeros(B, D, -(-L // T), T, T)
    reads, left = like.new_empty(2, *matrices.shape[:-1], N)
    reads.copy_(c if lag else c * a)
    left.copy_(b)
    decays = a.expand(*a.shape[:2], matrices.shape[2], T, -1)
    own = matrices.diagonal(0, -2, -1)  # (B, D, chunks, T)
    if not lag:
        own += (b * c).sum(-1)
    if direct is not None:
        own += _in_chunks(Product((direct.unsqueeze(-1),)), T).squeeze(-1)
    s = 1
    while s < T:
        pairs = (-1, 2, s)
        later, earlier = reads.unflatten(-2, pairs)[..., 1, :, :], left.unflatten(-2, pairs)[..., 0, :, :]
        before, after = decays.unflatten(-2, (-1, 2)).unbind(-2)  # (B or 1, D or 1, chunks, T / 2s, N or 1)
        blocks = matrices.unflatten(-1, pairs).unflatten(-4, pairs)  # (B, D, chunks, T / 2s, 2, s, T / 2s, 2, s)
        blocks.select(-5, 0).select(-2, 1).diagonal(0, -4, -2).copy_((earlier @ later.mT).movedim(-3, -1))
        later *= before.unsqueeze(-2)
        earlier *= after.unsqueeze(-2)
        decays, s = before * after, 2 * s
    return _Chunks(matrices, reads, left, decays.squeeze(-2))


def _in_chunks(product: Product, T: int) -> Tensor:
    """Return a coefficient (B, L or 1, D or 1, N) in chunks of T tokens, (B, D or 1, chunks or 1, T or 1, N).

    Tokens behind the end have 0, or 1 as the exponential of 0.
    """
    value = reduce(mul, (_chunked(factor, T) for factor in product.factors))
    return value.exp() if product.exponential else value


def _chunked(factor: Tensor, T: int) -> Tensor:
    """Return ``factor`` (B, L or 1, D or 1, N) in chunks of T tokens, padded with 0."""
    if factor.shape[1] == 1:
        return factor.transpose(1, 2).unsqueeze(2)
    padded = F.pad(factor, (0, 0, 0, 0, 0, -factor.shape[1] % T))  # (B, chunks * T, D or 1, N)
    return padded.unflatten(1, (-1, T)).permute(0, 3, 1, 2, 4).contiguous()


def _by_column(of_inputs: Tensor, band: Tensor) -> Tensor:
    """Multiply what becomes of each token's input, (B, D, chunks, T, X), by a banded matrix (K, B, L, D) from the left.

    Returns:
        (B, D, chunks, T + K - 1, X). A chunk's first column belongs to the token K - 1 before its first row.
    """
    (T, X), K = of_inputs.shape[-2:], len(band)
    columns = of_inputs.new_zeros(*of_inputs.shape[:-2], T + K - 1, X)
    for lag, weights in enumerate(band):
        start = K - 1 - lag
        columns[..., start : start + T, :].addcmul_(of_inputs, _chunked(weights.unsqueeze(-1), T))
    return columns
