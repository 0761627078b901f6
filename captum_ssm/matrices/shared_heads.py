"""The fused matrices of a core whose channels share one matrix a head.

With ``S`` the matrix of a head, that of its channel d is ``A^d = diag(factor_d) (S + diag(direct_d)) M_d``. ``M_d``,
the convolution and the gates before the head, is banded: its entries (t, t - lag) are not 0 for a few lags alone. So
``A^d_ij v_jd = factor_id sum_lag S_i,j+lag V_lag,jd``, a sum of few terms, each a number of the head times a number of
the channel. What is summed over the P channels of a head is then a product of matrices (L, P) (P, L) for each lag, or
for each pair of lags if the entries are squared; absolute values take one pass over the entries.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import reduce
from itertools import product as combinations
from operator import add
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.matrices.banded import are_banded, parts, product
from captum_ssm.matrices.entrywise import Entrywise
from captum_ssm.matrices.lengths import OutputLengths, vectors_at_once
from captum_ssm.operators import Chain, HeadOperator, Operator, Scan
from captum_ssm.operators.device_sizes import DeviceSize

_MATRICES = DeviceSize(cpu=2**23, others=2**27)
"""Entries of the heads' columns that are made at once: bounds them on a processor to some tens of megabytes. Elsewhere
long texts are not cut into many small products."""

_HEADS = DeviceSize(cpu=2**21, others=2**27)
"""Entries of the matrices of those heads that are fused at once: of one head at least, in every example."""

_ROWS = DeviceSize(cpu=64, others=1024)
"""Rows of a block at most: each block leaves out the columns behind it, which are 0."""

_BLOCK = DeviceSize(cpu=2**20, others=2**25)
"""Entries of all channels' matrices that are treated at once: those that fit a processor's cache."""


class Terms(NamedTuple):
    """Some rows of some heads' entries, ``u_id sum_k S_k,ij V_k,jd``."""

    S: Tensor
    """(K, B, H, I, J), a term for each lag."""
    V: Tensor
    """(K, B, H, J, P)."""
    U: Tensor
    """Weights of the rows, (M, B, H, I, P)."""

    def linear(self) -> Tensor:
        """Return ``sum_d u x``, (M, B, I, J)."""
        S, V, U = self
        return _weighted(S, (U @ of_lag.mT for of_lag in V)).sum(2)

    def square(self) -> Tensor:
        """Return ``sum_d (u x)²``, (M, B, I, J): a sum over pairs of lags, of which each counts twice but for k = m."""
        S, V, U = self
        squares = U.square()
        twice = 2 * squares

        def with_earlier(k: int) -> Tensor:
            """Return ``sum_m S_m (u² V_k V_m)`` over the lags up to k, (M, B, H, I, J)."""
            return _weighted(S, ((squares if k == m else twice) @ (V[k] * V[m]).mT for m in range(k + 1)))

        return _weighted(S, map(with_earlier, range(len(S)))).sum(2)

    def absolute(self) -> Tensor:
        """Return ``sum_d |u x|``, (M, B, I, J)."""
        S, V, U = self
        if len(S) == 1:  # the absolute value of a single product is that of its factors
            return Terms(S.abs(), V.abs(), U.abs()).linear()
        absolute = S.new_zeros(len(U), len(S[0]), *S.shape[3:])
        for examples, heads, rows in _tiles(S.shape[1:4], S.shape[4] * V.shape[-1], _BLOCK.of(S)):
            of_heads = V[:, examples, heads]
            absolute[:, examples, rows] += _absolute(S[:, examples, heads, rows], of_heads, U[:, examples, heads, rows])
        return absolute


def _tiles(sizes: Sequence[int], entries: int, bound: int) -> Iterator[tuple[slice, ...]]:
    """Cut an array into blocks, along a later axis only if one of an earlier axis is still too large.

    Args:
        sizes: Of the axes along which it may be cut.
        entries: Of each of their elements.
        bound: Entries of a block at most, if one element has no more.

    Yields:
        A slice of each axis.
    """
    counts: list[int] = []
    for size in reversed(sizes):
        counts.insert(0, max(1, bound // entries))
        entries *= size
    starts = (range(0, size, count) for size, count in zip(sizes, counts))
    for start in combinations(*starts):
        yield tuple(slice(first, first + count) for first, count in zip(start, counts))


def _weighted(S: Tensor, values: Iterable[Tensor]) -> Tensor:
    """Return ``sum_k S_k x_k``, (M, B, H, I, J), of (K, B, H, I, J) and as many or fewer x (M, B, H, I, J)."""
    first, *others = zip(S, values)
    total = torch.mul(*first)
    for of_lag, x in others:
        total.addcmul_(of_lag, x)
    return total


def _absolute(S: Tensor, V: Tensor, U: Tensor) -> Tensor:
    """Return ``sum_d |u_id sum_k S_k,ij V_k,jd|`` of a block of heads, (M, B, I, J); see :class:`Terms`."""
    rows, columns = S.unsqueeze(4), V.mT.unsqueeze(3)  # (K, B, H, I, 1, J), (K, B, H, 1, P, J)
    x = rows[0] * columns[0]  # (B, H, I, P, J)
    for k in range(1, len(S)):
        x.addcmul_(rows[k], columns[k])
    weights = U.abs().permute(1, 2, 3, 0, 4)  # (B, H, I, M, P)
    return (weights @ x.abs_()).sum(1).movedim(2, 0)


@dataclass(frozen=True)
class SharedHeads:
    """The entries ``A^d_ij v_jd`` of a core whose channels share one matrix a head.

    Args:
        heads: The heads, without direct paths.
        direct: Weight of each token in its own output beside the head's matrix, broadcastable to (B, L, D), or None.
        factor: Factor of the rows, broadcastable to (B, L, D).
        band: By lag, (B, L, D): the weight of token t - lag in the heads' input at t, times ``v``.
    """

    heads: HeadOperator
    direct: Tensor | None
    factor: Tensor
    band: Mapping[int, Tensor]

    @classmethod
    def of(cls, core: Operator, v: Tensor) -> SharedHeads | None:
        """Return the entries of a core in this form, or None if it has another.

        Args:
            core: Channelwise, or with projections before its heads alone.
            v: Input-side weights (B, L, input channels).
        """
        after, heads, before = parts(core)
        if not isinstance(heads, HeadOperator) or _has_single_channels(heads) or not are_banded(before):
            return None
        if any(leaf.mixes_channels for leaf in after):
            return None
        paths = [path for path in (heads.skip, heads.bonus) if path is not None]
        factor = reduce(lambda weight, leaf: leaf.apply(weight), reversed(after), v.new_ones(1, 1, 1))
        without = replace(heads, skip=None, bonus=None)
        return cls(without, reduce(add, paths) if paths else None, factor, product(before, v))

    def fused(self, u: Tensor, entrywise: Entrywise) -> Tensor:
        """Return ``sum_d f(u_id A^d_ij v_jd)``.

        Args:
            u: Output-side weights (M, B, L, D).
            entrywise: f.

        Returns:
            (M, B, L, L).

        Cost: one pass of the heads with L right-hand sides, and for K lags K products of matrices, K² of squares, of
        O(L²·D); one pass over the entries for absolute values. O(L²) memory.
        """
        _, B, L, _ = u.shape
        U = _by_head(u * self.factor, self.heads)  # (M, B, H, L, P)
        V = torch.stack([_by_head(_earlier(weight, lag), self.heads) for lag, weight in self.band.items()])
        fused = u.new_zeros(len(u), B, L, L)
        for group in torch.arange(self.heads.heads, device="cpu").split(max(1, _HEADS.of(u) // (B * L * L))):
            heads = slice(int(group[0]), int(group[-1]) + 1)
            matrices = F.pad(self.heads.take_heads(group).matrices(u[0]), (0, max(self.band)))  # (B, H, L, L + lags)
            S = matrices.unfold(-1, L, 1).movedim(-2, 0)  # (K, B, H, L, L), no copies
            terms = Terms(S, V[:, :, heads], U[:, :, heads])
            for rows, columns in self._blocks(u):
                block = Terms(terms.S[..., rows, columns], terms.V[..., columns, :], terms.U[..., rows, :])
                fused[..., rows, columns] += _fused(block, entrywise)
            if self.direct is not None:
                direct = _by_head(self.direct.expand(B, L, -1), self.heads)[:, heads]  # (B, H, L, P)
                self._add_direct_paths(fused, terms, direct, entrywise)
        return fused

    def lengths(self, output: Chain) -> Tensor:
        """Return the Euclidean length of each token's contribution to each other token, ``|output(A_ij v_j)|``.

        Args:
            output: The factors after the core, from channels to the model's width.

        Returns:
            (B, L, L). Cost: O(L²·D·E) of the output, whatever the heads' matrices cost; O(L²) memory.
        """
        like = self.band[0]  # (B, L, D)
        B, L, _ = like.shape
        lengths, of_output = like.new_zeros(B, L, L), OutputLengths.of(output, B * L * L)
        entries = _MATRICES.of(like)
        for group in torch.arange(L, device="cpu").split(max(1, entries // (B * L * self.heads.heads))):
            first, stop = int(group[0]), int(group[-1]) + 1
            S = self.heads.head_columns(like, slice(first, min(stop + max(self.band), L)))
            for tokens in group.split(max(1, vectors_at_once(like) // (B * L))):
                columns = slice(int(tokens[0]), int(tokens[-1]) + 1)
                rows = slice(columns.start if self.heads.causal else 0, L)
                contributions = self._contributions(S[columns.start - first :], tokens.to(like.device), rows)
                lengths[:, rows, columns] = of_output.from_token(rows.start, contributions).permute(1, 2, 0)
        return lengths

    def _contributions(self, S: Tensor, tokens: Tensor, rows: slice) -> Tensor:
        """Return the contributions of single tokens, (J, B, rows, D).

        Args:
            S: Columns of the heads' matrices from the first of the tokens on, (columns, B, L, H): those of all lags.
            tokens: Their numbers, (J,), one after the other.
            rows: The rows, from the first of the tokens on or all.
        """
        J, L = len(tokens), S.shape[2]
        shape = self.heads.heads, self.heads.head_size

        def factors(lag: int) -> tuple[Tensor, Tensor]:
            """Return the columns that the tokens reach by a lag, (tokens, B, rows, H, 1), and their values."""
            columns = S[lag : lag + J, :, rows].unsqueeze(-1)
            values = _earlier(self.band[lag], lag)[:, tokens[: len(columns)]].transpose(0, 1).unsqueeze(2)
            return columns, values.unflatten(-1, shape)

        x = torch.mul(*factors(0))  # (J, B, rows, H, P)
        for lag in [lag for lag in self.band if lag]:
            columns, values = factors(lag)
            x[: len(columns)].addcmul_(columns, values)
        x = x.flatten(-2)
        if self.direct is not None:
            number = torch.arange(J, device=S.device)
            for lag, weight in self.band.items():
                at = number[tokens + lag < L]
                direct = (self.direct * weight)[:, tokens[at] + lag]  # (B, tokens, D)
                x[at, :, tokens[at] + lag - rows.start] += direct.transpose(0, 1)
        return x.mul_(self.factor.expand(-1, L, -1)[:, rows])

    def _blocks(self, u: Tensor) -> Iterator[tuple[slice, slice]]:
        """Cut the entries into blocks of rows, without the columns that are 0 in a causal core."""
        L, count = u.shape[2], _ROWS.of(u)
        for start in range(0, L, count):
            stop = min(start + count, L)
            yield slice(start, stop), slice(0, stop if self.heads.causal else L)

    def _add_direct_paths(self, fused: Tensor, terms: Terms, direct: Tensor, entrywise: Entrywise) -> None:
        """Add to the fused entries what the direct paths of some heads change, near the diagonal alone."""
        for number, lag in enumerate(self.band):
            if lag >= fused.shape[-1]:
                continue
            V = terms.V[..., : fused.shape[-1] - lag, :]  # (K, B, H, L - lag, P)
            without = (terms.S.diagonal(-lag, -2, -1).unsqueeze(-1) * V).sum(0)  # (B, H, L - lag, P)
            U, both = terms.U[..., lag:, :], without + direct[..., lag:, :] * V[number]
            change = entrywise(U * both) - entrywise(U * without)  # (M, B, H, L - lag, P)
            fused.diagonal(-lag, -2, -1).add_(change.sum((2, -1)))


def _fused(block: Terms, entrywise: Entrywise) -> Tensor:
    """Return ``sum_d f(u x)`` of a block, (M, B, I, J)."""
    parts = zip(entrywise, (block.linear, block.absolute, block.square))
    return reduce(add, (factor * part() for factor, part in parts if factor))


def _by_head(t: Tensor, heads: HeadOperator) -> Tensor:
    """Return (..., H, L, P) of (..., L, D)."""
    return t.unflatten(-1, (heads.heads, heads.head_size)).transpose(-2, -3)


def _earlier(t: Tensor, lag: int) -> Tensor:
    """Return (B, L, D) with the entry of token t + lag at token t, 0 behind the end."""
    return F.pad(t, (0, 0, 0, lag))[:, lag:]


def _has_single_channels(heads: HeadOperator) -> bool:
    """Whether each channel has a recurrence of its own, whose rows are best walked one after the other."""
    return isinstance(heads, Scan) and heads.head_size == 1
