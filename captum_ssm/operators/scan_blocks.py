"""The entries of a scan's matrices behind a banded one, as products of few numbers.

A column is *complete* at the token where its band ends: what the scan's state owes to it then, decays from there on and
is read by later tokens. Its entries up to that token are computed one lag after the other. All others are blocks
``reads left^T`` of halves of the sequence, of halves of these, and so on: what the tokens of the later half read of the
state between both halves, times what the columns of the earlier half have left in it. From one level to the next a
token's ``reads`` and ``left`` decay over the tokens of the neighbour, so that nothing but products of decays occurs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from operator import add, mul
from typing import NamedTuple

import torch
from torch import Tensor

from captum_ssm.operators.coefficient import Product, ScanCoefficients

_PRODUCT = 8
"""Tokens of a half from which on a block is a product of matrices: of fewer, all channels' entries are made at once."""


class ScanBlock(NamedTuple):
    """P blocks of every channel's matrix, each of I rows and J columns, one every few tokens down the diagonal."""

    channels: slice
    row: int
    """The first row of the first block."""
    column: int
    """The first column of the first block."""
    step: int
    """Tokens from one block to the next."""
    reads: Tensor
    """Of the rows, (B, P, I, N, D)."""
    left: Tensor
    """Of the columns, (B, P, J, N, D)."""

    @property
    def held(self) -> int:
        """How many numbers are held for each of the entries that are made at once."""
        return self.reads.shape[3] if self.left.shape[2] < _PRODUCT else 1

    def entries(self, rows: slice) -> Tensor:
        """Return the entries ``sum_n reads_in left_jn`` of some of the I rows, (B, P, rows, J, D)."""
        reads, left = self.reads[:, :, rows], self.left
        if left.shape[2] < _PRODUCT:
            return (reads.unsqueeze(3) * left.unsqueeze(2)).sum(-2)
        return (reads.movedim(-1, 0) @ left.movedim(-1, 0).mT).movedim(0, -1)


def blocks_of_matrix(
    products: ScanCoefficients[Product],
    direct: Sequence[Tensor],
    diagonal: Tensor,
    lag: int,
    band: Tensor,
    factor: Tensor,
    width: int,
) -> Iterator[ScanBlock]:
    """Cut the products of every channel's matrix and a banded one into blocks, see :meth:`Scan.blocks`.

    Args:
        products: The coefficients, each (B or 1, L or 1, D or 1, N or 1).
        direct: Direct paths, each broadcastable to (B, L, D).
        diagonal: Weight of each token in its own output without these, broadcastable to (B, L, D).
        lag: 1 if the state is read before the current token is written, else 0.
        band: (K, B, L, D): entry ``[k, :, t]`` is the weight of token t - k in the input at t.
        factor: Factor of the rows, (B, L, D).
        width: Number of channels that are treated at once.

    Yields:
        Blocks whose entries add up to the matrices. Those of a block are to be taken before the next one is asked for.
    """
    (_, B, L, D), K = band.shape, min(len(band), band.shape[2])
    near = reduce(add, direct) * band[:K] if direct else torch.zeros_like(band[:K])
    near[0] += diagonal * band[0]
    complete = slice(K - 1, None)  # the tokens where columns end
    for start in range(0, D, width):
        channels = slice(start, min(start + width, D))
        a, b, c = (_factors(product, channels, L) for product in products)
        decays, reads = reduce(mul, a), reduce(mul, c)  # (B or 1, L, N or 1, channels or 1)
        left = _complete_columns(decays, b, reads, lag, band[:K, ..., channels], near[..., channels])
        reads = reads[:, complete] * factor[:, complete, None, channels]
        reads = reads.expand(B, -1, left.shape[2], -1).contiguous()
        if not lag:
            reads *= decays[:, complete]
        yield from _blocks_of_halves(channels, K - 1, reads, left, decays[:, complete])
    one = band.new_ones(1, 1, 1, 1, 1)
    for k in range(K):
        yield ScanBlock(slice(0, D), k, 0, 1, (factor * near[k])[:, k:, None, None], one)


def _complete_columns(
    decays: Tensor, writes: Sequence[Tensor], reads: Tensor, lag: int, band: Tensor, near: Tensor
) -> Tensor:
    """Follow every column's state from its first token to its last one.

    Args:
        decays: (B or 1, L, N or 1, D or 1).
        writes: Factors of the weight of the input, each (B or 1, L, N or 1, D or 1).
        reads: Weight of the state in the output, (B or 1, L, N or 1, D or 1).
        lag: 1 if the state is read before the current token is written, else 0.
        band: (K, B, L, D): entry ``[k, :, t]`` is the weight of token t - k in the input at t.
        near: (K, B, L, D): the entries of token t and column t - k are added to ``[k, :, t]``, but for the diagonal.

    Returns:
        The part of each column in the state after its last token, (B, L - K + 1, N, D).
    """
    *shared, b = writes
    weights = reduce(mul, shared, band.unsqueeze(3))  # (K, B, L, N or 1, D): the last factor is the largest
    B, L = band.shape[1:3]
    N = max(t.shape[-2] for t in (decays, weights, b, reads))
    state = (weights[0] * b).expand(B, L, N, -1).contiguous()  # of column j after token j + k
    for k in range(1, len(band)):
        before = state[:, :-1]
        if lag:
            near[k, :, k:] += _read(reads[:, k:], before)
        state = before.mul_(decays[:, k:]).addcmul_(weights[k, :, k:], b[:, k:])
        if not lag:
            near[k, :, k:] += _read(reads[:, k:], state)
    return state


def _read(reads: Tensor, state: Tensor) -> Tensor:
    """Return the inner product over N of states (B, T, N, D) with weights (B or 1, T, N or 1, D or 1), (B, T, D)."""
    if reads.shape[2:] == (state.shape[2], 1):  # a product of matrices, if all channels share the weights
        return (reads.mT @ state).squeeze(2)
    return (reads * state).sum(2)


def _blocks_of_halves(channels: slice, row: int, reads: Tensor, left: Tensor, decays: Tensor) -> Iterator[ScanBlock]:
    """Join halves of 1, 2, 4, ... tokens.

    Args:
        channels: The channels.
        row: The row of the first token.
        reads: What each token reads of the state before it, (B, T, N, D). It is overwritten.
        left: What each column has left in the state after its token, (B, T, N, D). It is overwritten.
        decays: Decay over each token, (B or 1, T, N or 1, D or 1).

    Yields:
        The blocks below the diagonal.
    """
    T, s = reads.shape[1], 1
    while s < T:
        if s == _PRODUCT:
            reads, left, decays = (_channels_outermost(t) for t in (reads, left, decays))
        for start, P, rows in _pairs(T, s):
            later, earlier = windows(reads, start + s, P, rows, 2 * s), windows(left, start, P, s, 2 * s)
            yield ScanBlock(channels, row + start + s, start, 2 * s, later, earlier)
            if 2 * s < T:  # there is a next level
                pairs = slice(start // s, start // s + 2 * P)
                later *= decays[:, pairs][:, ::2].unsqueeze(2)
                if rows == s:
                    earlier *= decays[:, pairs][:, 1::2].unsqueeze(2)
        whole = T // (2 * s) * 2
        decays, s = decays[:, 0:whole:2] * decays[:, 1:whole:2], 2 * s


def _pairs(T: int, s: int) -> Iterator[tuple[int, int, int]]:
    """Cut T tokens into pairs of halves of s tokens; the last later half may be shorter.

    Yields:
        The first token of a run of equal pairs, their number, and the tokens of a later half.
    """
    P, rest = divmod(T, 2 * s)
    if P:
        yield 0, P, s
    if rest > s:
        yield T - rest, 1, rest - s


def windows(tensor: Tensor, start: int, P: int, size: int, step: int) -> Tensor:
    """Return P windows of some tokens of (B, T, ...), one every few tokens, as a view (B, P, size, ...)."""
    return tensor[:, start : start + (P - 1) * step + size].unfold(1, size, step).movedim(-1, 2)


def _channels_outermost(t: Tensor) -> Tensor:
    """Return (B, T, N, D) with the channels outermost in memory, as products of matrices read them."""
    return t.contiguous().flatten(0, 2).t().contiguous().unflatten(1, t.shape[:-1]).movedim(0, -1)


def _factors(product: Product, channels: slice, L: int) -> list[Tensor]:
    """Return the factors of a coefficient for some channels, each (B or 1, L, N or 1, channels or 1)."""
    of_channels = (factor[:, :, channels] if factor.shape[2] > 1 else factor for factor in product.factors)
    factors = [factor.transpose(2, 3).contiguous() for factor in of_channels]
    if product.exponential:
        factors = [product.of_factors(factors)]
    return [factor.expand(-1, L, -1, -1) for factor in factors]
