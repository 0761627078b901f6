"""Implicit attention matrices: the only code whose cost grows with L².

A channelwise chain (the *core*) is one (L, L) matrix ``A^d`` for each channel. Almost all that is wanted
of it is one form with two token-by-channel weights, ``C_ij = sum_d u_id A^d_ij v_jd``: with ``u = 1/D`` and
``v = 1`` the mean over channels, with ``u = W_out^T g`` and ``v = W_in x`` the gradient times the attention.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Protocol, cast

import torch
from torch import Tensor

from captum_ssm.operators import CausalConv, Chain, Operator, Scan

Entrywise = Callable[[Tensor], Tensor]
"""A function f of each entry of each channel's matrix, such as ``torch.abs``, ``torch.relu`` or ``torch.square``.

It must hold that ``f(t x) = t^k f(x)`` for t > 0, and ``f(1) > 0``.
"""

_BLOCK = 2**21
"""Entries of a block of columns: bounds the memory of everything below to some tens of megabytes."""

_CHANNELS = 8
"""Channels of a block, if more columns than the memory bound allows would fit."""


class TokenMatrix(Protocol):
    """A matrix between tokens, (B, L, L), given by its products."""

    def apply(self, s: Tensor) -> Tensor:
        """Return ``C s`` for ``s`` (B, L)."""

    def adjoint(self, r: Tensor) -> Tensor:
        """Return ``C^T r`` for ``r`` (B, L)."""

    def dense(self) -> Tensor:
        """Return the entries (B, L, L); row i is the query, column j the key."""


@dataclass(frozen=True)
class ExplicitAttention:
    """A token matrix whose entries are at hand.

    Args:
        matrix: (..., B, L, L); row i is the query, column j the key.
    """

    matrix: Tensor

    def apply(self, s: Tensor) -> Tensor:
        """Return ``C s``. Cost: O(L²)."""
        return torch.einsum("...ij,...j->...i", self.matrix, s)

    def adjoint(self, r: Tensor) -> Tensor:
        """Return ``C^T r``. Cost: O(L²)."""
        return torch.einsum("...ij,...i->...j", self.matrix, r)

    def dense(self) -> Tensor:
        """Return the entries."""
        return self.matrix


@dataclass(frozen=True)
class ProductAttention:
    """The product of token matrices, the first applied last.

    Args:
        matrices: At least one.
    """

    matrices: tuple[TokenMatrix, ...]

    def apply(self, s: Tensor) -> Tensor:
        """Return ``C_1 C_2 ... s``."""
        for matrix in reversed(self.matrices):
            s = matrix.apply(s)
        return s

    def adjoint(self, r: Tensor) -> Tensor:
        """Return ``... C_2^T C_1^T r``."""
        for matrix in self.matrices:
            r = matrix.adjoint(r)
        return r

    def dense(self) -> Tensor:
        """Return the product's entries. Cost: O(L³) a factor."""
        return reduce(torch.matmul, (matrix.dense() for matrix in self.matrices))


@dataclass(frozen=True)
class SumAttention:
    """The sum of token matrices.

    Args:
        matrices: At least one.
    """

    matrices: tuple[TokenMatrix, ...]

    def apply(self, s: Tensor) -> Tensor:
        """Return ``(C_1 + C_2 + ...) s``."""
        return reduce(add, (matrix.apply(s) for matrix in self.matrices))

    def adjoint(self, r: Tensor) -> Tensor:
        """Return ``(C_1 + C_2 + ...)^T r``."""
        return reduce(add, (matrix.adjoint(r) for matrix in self.matrices))

    def dense(self) -> Tensor:
        """Return the sum's entries."""
        return reduce(add, (matrix.dense() for matrix in self.matrices))


@dataclass(frozen=True)
class ScaledAttention:
    """A token matrix whose rows are scaled.

    Args:
        matrix: The matrix.
        factor: Of each row, a number or (B, L).
    """

    matrix: TokenMatrix
    factor: float | Tensor

    def apply(self, s: Tensor) -> Tensor:
        """Return ``diag(factor) C s``."""
        return self.factor * self.matrix.apply(s)

    def adjoint(self, r: Tensor) -> Tensor:
        """Return ``C^T diag(factor) r``."""
        return self.matrix.adjoint(self.factor * r)

    def dense(self) -> Tensor:
        """Return the entries of the scaled matrix."""
        matrix = self.matrix.dense()
        return torch.as_tensor(self.factor).to(matrix).expand(matrix.shape[:2]).unsqueeze(-1) * matrix


@dataclass(frozen=True)
class ImplicitAttention:
    """The token matrix ``C_ij = sum_d u_id A^d_ij v_jd``, known by its products.

    Args:
        core: Channelwise operator, ``A^d`` for each channel d. If it mixes channels, ``A^d_ij v_jd`` stands for
            channel d of what token j adds to token i.
        u: Output-side weights (..., B, L, D): dimensions in front of B are further matrices of the same core.
        v: Input-side weights (B, L, D), or (B, L, input channels) of a core that mixes channels.
    """

    core: Operator
    u: Tensor
    v: Tensor

    def apply(self, s: Tensor) -> Tensor:
        """Return ``C s`` for ``s`` (B, L): one pass of the core. Cost: O(L·D·N), no (L, L) matrix."""
        return (self.u * self.core.apply(self.v * s.unsqueeze(-1))).sum(-1)

    def adjoint(self, r: Tensor) -> Tensor:
        """Return ``C^T r`` for ``r`` (B, L): one pass of the transposed core. Cost: O(L·D·N)."""
        return (self.v * self.core.adjoint(self.u * r.unsqueeze(-1))).sum(-1)

    def dense(self, entrywise: Entrywise | None = None) -> Tensor:
        """Return ``sum_d f(u_id A^d_ij v_jd)``.

        Args:
            entrywise: f, applied to every channel's entries before the sum; None is the identity.

        Returns:
            (..., B, L, L): row i is the query, column j the key. Cost: O(L²·D·N) time, O(L²) memory.
        """
        core, several = self.core, self.u.shape[:-3]
        parts = [replace(self, core=part) for part in core.summands().values()] if isinstance(core, Chain) else [self]
        if len(parts) > 1 and (entrywise is None or _in_two_directions(parts)):
            fused = reduce(add, (part.dense(entrywise) for part in parts))
            if entrywise is not None:  # the directions have the diagonal alone in common
                own = [self.u * part.core.diagonal(self.v) * self.v for part in parts]
                apart = reduce(add, map(entrywise, own))
                fused.diagonal(dim1=-2, dim2=-1).add_((entrywise(reduce(add, own)) - apart).sum(-1))
            return fused
        if core.anticausal and not core.causal:
            flipped = replace(self, core=core.flipped(), u=self.u.flip(-2), v=self.v.flip(-2))
            return flipped.dense(entrywise).flip(-2, -1)
        weights = self.u.flatten(0, -4) if several else self.u.unsqueeze(0)
        fused = weights.new_zeros(*weights.shape[:-1], self.v.shape[1])
        for rows, columns, channels, factor, entries in _by_rows(core, self.v) or _by_columns(core, self.v):
            fused[:, :, rows, columns] += _weighed(weights[:, :, rows, channels] * factor, entries, entrywise)
        return fused.unflatten(0, several) if several else fused.squeeze(0)

    def lengths(self, output: Chain) -> Tensor:
        """Return the length of what each token contributes to each other, ``|output(A_ij v_j)|``.

        Args:
            output: What follows the core, from channels to the model's width.

        Returns:
            (B, L, L) of Euclidean lengths. ``u`` is not used. Cost: O(L²·D·(N + E)) time, O(L²) memory.

        Source:
            Kobayashi et al. 2020 (arXiv 2004.10102), equation 2, there for softmax attention.
        """
        B, L, _ = self.v.shape
        fused = self.v.new_zeros(B, L, L)
        for tokens, channels in _blocks(self.v, whole=True):
            rows, columns = _columns(self.core, self.v, tokens, channels)
            after = output.after(rows.start) if output.causal else output
            fused[:, rows, tokens] = after.apply(columns).norm(dim=-1).permute(1, 2, 0)
        return fused


def dense(core: Operator, like: Tensor) -> Tensor:
    """Return the core's matrix of every channel, from its products alone.

    Args:
        core: Channelwise operator.
        like: Any tensor (B, L, D) of the shape, type and device of the core's input.

    Returns:
        (B, D, L, L): the matrix of channel d in row i (query) and column j (key). Cost: O(L²·D·N) time and
        B·D·L² numbers of memory; :meth:`ImplicitAttention.dense` fuses the channels without holding them.

    Raises:
        ValueError: If the core mixes channels.
    """
    if core.mixes_channels:
        raise ValueError("The core mixes channels, so no channel has a matrix of its own; see Chain.channelwise.")
    B, L, D = like.shape
    matrices = like.new_zeros(B, D, L, L)
    one = like.new_ones(1, 1, 1).expand(B, L, D)
    for tokens, channels in _blocks(like):
        rows, columns = _columns(core, one, tokens, channels)
        matrices[:, channels, rows, tokens] = columns.permute(1, 3, 2, 0)
    return matrices


_Block = tuple[slice, slice, slice, Tensor, Tensor]
"""Rows i, columns j and channels d, a factor of the rows (B, I, D), and entries (B, D, I, J)."""


def _weighed(u: Tensor, entries: Tensor, entrywise: Entrywise | None) -> Tensor:
    """Return ``sum_d f(u_mid x_dij)``, (M, B, I, J), for weights (M, B, I, D) and entries (B, D, I, J).

    The entries are overwritten. With p and q the values of f at 1 and -1, ``f(x) = p x^k`` for x > 0 and ``q |x|^k``
    else, so ``f(u x) = (p + q)/2 |u|^k |x|^k + (p - q)/2 u |u|^(k-1) x |x|^(k-1)``: two products of matrices, however
    many weights there are.
    """
    if entrywise is None:
        return torch.einsum("mbid,bdij->mbij", u, entries)
    p, q, double = (float(entrywise(u.new_full((1,), x))) for x in (1.0, -1.0, 2.0))
    k = math.log2(double / p)
    fused = torch.zeros_like(u[..., :1])
    if p != q:
        fused = (p - q) / 2 * torch.einsum("mbid,bdij->mbij", _signed_power(u, k), _signed_power(entries, k))
    return fused + (p + q) / 2 * torch.einsum("mbid,bdij->mbij", u.abs() ** k, entries.abs_().pow_(k))


def _signed_power(x: Tensor, k: float) -> Tensor:
    """Return ``x |x|^(k-1)``."""
    return x if k == 1 else x * x.abs() ** (k - 1)


def _in_two_directions(parts: list[ImplicitAttention]) -> bool:
    """Whether one of two parts reads the past alone, and the other the future."""
    return len(parts) == 2 and {(p.core.causal, p.core.anticausal) for p in parts} == {(True, False), (False, True)}


def _by_rows(core: Operator, v: Tensor) -> Iterator[_Block] | None:
    """Walk through the entries ``A^d_ij v_jd`` by rows, if the core is a scan of single channels, perhaps convolved."""
    leaves = core.leaves() if isinstance(core, Chain) else [core]
    mixing = [leaf for leaf in leaves if leaf.mixes_tokens]
    scan = mixing[0] if mixing else None
    if core.mixes_channels or not isinstance(scan, Scan) or scan.head_size > 1:
        return None
    if len(mixing) > 2 or not all(isinstance(leaf, CausalConv) for leaf in mixing[1:]):
        return None
    B, L, D = v.shape
    width = max(_CHANNELS, _BLOCK // (B * L * max(p.shape[3] for p in scan.products)))
    return _rows(leaves, v, leaves.index(scan), [slice(d, min(d + width, D)) for d in range(0, D, width)])


def _rows(leaves: list[Operator], v: Tensor, at: int, blocks: list[slice]) -> Iterator[_Block]:
    """Walk through the rows of a product of ``leaves``, of which that of number ``at`` is the scan."""
    for channels in blocks:
        part = [leaf.channels(channels) for leaf in leaves]
        factor, band = torch.ones_like(v[..., channels]), v[..., channels].unsqueeze(0)
        for leaf in reversed(part[at + 1 :]):
            band = leaf.band(band[0]) if isinstance(leaf, CausalConv) else leaf.apply(band)
        for leaf in reversed(part[:at]):
            factor = leaf.apply(factor)
        for rows, entries in cast(Scan, part[at]).rows(band):
            yield rows, slice(0, rows.stop), channels, factor[:, rows], entries


def _by_columns(core: Operator, v: Tensor) -> Iterator[_Block]:
    """Walk through the entries ``A^d_ij v_jd`` of any core by columns."""
    for tokens, channels in _blocks(v, whole=core.mixes_channels):
        rows, columns = _columns(core, v, tokens, channels)
        if core.mixes_channels:
            channels = slice(0, columns.shape[-1])
        yield rows, tokens, channels, v.new_ones(1, 1, 1), columns.permute(1, 3, 2, 0)


def _blocks(like: Tensor, whole: bool = False) -> Iterator[tuple[slice, slice]]:
    """Cut (tokens, channels) into blocks of columns that fit the memory bound; ``whole`` keeps channels together."""
    B, L, D = like.shape
    width = D if whole else min(D, max(_CHANNELS, _BLOCK // (B * L * L)))
    count = min(L, max(1, _BLOCK // (B * L * width)))
    for d in range(0, D, width):
        for j in range(0, L, count):
            yield slice(j, min(j + count, L)), slice(d, min(d + width, D))


def _columns(core: Operator, v: Tensor, tokens: slice, channels: slice) -> tuple[slice, Tensor]:
    """Return ``A^d_ij v_jd`` for j in ``tokens`` and d in ``channels``, shape (J, B, rows, channels), and the rows i.

    Of a causal core these are the rows from the first of the tokens on: all others are 0.
    """
    causal = core.causal
    if not core.mixes_channels:
        core, v = core.channels(channels), v[..., channels]
    if not causal:
        return slice(0, v.shape[1]), core.columns(v, tokens)
    start = tokens.start
    return slice(start, v.shape[1]), core.after(start).columns(v[:, start:], slice(0, tokens.stop - start))
