"""The token matrix of a core: one (L, L) matrix ``A^d`` for each channel, fused with weights at both sides.

Almost all that is asked of a core is one form with two token-by-channel weights, ``C_ij = sum_d u_id A^d_ij v_jd``:
with ``u = 1/D`` and ``v = 1`` the mean over channels, with ``u = W_out^T g`` and ``v = W_in x`` the gradient times the
attention.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, reduce
from operator import add

import torch
from torch import Tensor

from captum_ssm.matrices.banded import Banded
from captum_ssm.matrices.entries import block_columns, column_blocks, entry_blocks
from captum_ssm.matrices.entrywise import IDENTITY, Entrywise
from captum_ssm.matrices.lengths import OutputLengths, is_same_for_all_tokens
from captum_ssm.matrices.shared_heads import SharedHeads
from captum_ssm.matrices.single_channels import SingleChannels
from captum_ssm.matrices.token_matrix import DenseMatrix, SomeRows
from captum_ssm.operators import Chain, Operator

_FEW_ROWS = 8
"""Rows up to which each is made by a product of its own."""

_SHARE_OF_ROWS = 8
"""How many times as many rows there must be in all."""


@dataclass(frozen=True)
class CoreMatrix:
    """The token matrix ``C_ij = sum_d u_id A^d_ij v_jd``, given by its products.

    Args:
        core: Channelwise operator, ``A^d`` for each channel d. If it mixes channels, ``A^d_ij v_jd`` stands for
            channel d of the contribution of token j to token i.
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

    def dense(self, entrywise: Entrywise = IDENTITY) -> Tensor:
        """Return ``sum_d f(u_id A^d_ij v_jd)``.

        Args:
            entrywise: f, applied to every channel's entries before the sum.

        Returns:
            (..., B, L, L): row i is the query, column j the key. Cost: see :meth:`made`; O(L²) memory.
        """
        return self.made(entrywise).dense()

    def made(self, entrywise: Entrywise = IDENTITY) -> DenseMatrix | SomeRows:
        """Return ``sum_d f(u_id A^d_ij v_jd)`` by its entries, which are made once.

        Args:
            entrywise: f, applied to every channel's entries before the sum.

        Returns:
            (..., B, L, L). Cost: O(L·D·N) a row if ``u`` is 0 in all rows but a few, and the core mixes no channels;
            else O(L²·D·N), or O(L²·D) if heads of several channels share a matrix.
        """
        rows = self._few_rows()
        return DenseMatrix(self._every_row(entrywise)) if rows is None else self._some_rows(rows, entrywise)

    def _every_row(self, entrywise: Entrywise) -> Tensor:
        """Return ``sum_d f(u_id A^d_ij v_jd)``, (..., B, L, L)."""
        core = self.core
        summands = core.summands().values() if isinstance(core, Chain) else [core]
        parts = [replace(self, core=summand) for summand in summands]
        if len(parts) > 1 and (entrywise == IDENTITY or _in_two_directions(parts)):
            return self._dense_sum(parts, entrywise)
        if core.anticausal and not core.causal:
            flipped = replace(self, core=core.flipped(), u=self.u.flip(-2), v=self.v.flip(-2))
            return flipped._every_row(entrywise).flip(-2, -1)
        further = self.u.shape[:-3]
        u = self.u.flatten(0, -4) if further else self.u.unsqueeze(0)  # (M, B, L, D)
        forms = (form.of(core, self.v) for form in (Banded, SharedHeads, SingleChannels))
        form = next((form for form in forms if form is not None), None)
        fused = _fused_by_entries(core, u, self.v, entrywise) if form is None else form.fused(u, entrywise)
        return fused.unflatten(0, further) if further else fused.squeeze(0)

    def _dense_sum(self, parts: Sequence[CoreMatrix], entrywise: Entrywise) -> Tensor:
        """Return the matrix of a sum from those of its summands, two directions if f is not the identity."""
        fused = reduce(add, (part._every_row(entrywise) for part in parts))
        if entrywise != IDENTITY:  # two directions have nothing but the diagonal in common
            diagonals = [self.u * part.core.diagonal(self.v) * self.v for part in parts]  # (..., B, L, D)
            separate = reduce(add, [entrywise(diagonal) for diagonal in diagonals])
            correction = entrywise(reduce(add, diagonals)) - separate
            fused.diagonal(dim1=-2, dim2=-1).add_(correction.sum(-1))
        return fused

    def on_rows(self, rows: Tensor) -> CoreMatrix:
        """Return the matrix itself, whose products cost the same."""
        return self

    def _few_rows(self) -> Tensor | None:
        """Return the rows with any weight ``u``, (R,), or None if they are too many, or the core mixes channels."""
        if self.core.mixes_channels:
            return None
        L = self.u.shape[-2]
        rows = self.u.ne(0).any(-1).reshape(-1, L).any(0).nonzero().squeeze(-1)
        return rows if len(rows) <= _FEW_ROWS and len(rows) * _SHARE_OF_ROWS <= L else None

    def _some_rows(self, rows: Tensor, entrywise: Entrywise) -> SomeRows:
        """Return ``sum_d f(u_id A^d_ij v_jd)`` in these rows i, (R,), by one transposed product for each."""
        *further, B, L, D = self.u.shape
        entries = self.u.new_zeros(*further, B, len(rows), L)
        for number, row in enumerate(rows.tolist()):
            one = torch.zeros_like(self.v)
            one[:, row] = 1
            of_channels = (self.core.adjoint(one) * self.v).unsqueeze(1)  # (B, 1, L, D)
            weights = self.u.reshape(-1, B, L, D)[:, :, row].unsqueeze(2)  # (M, B, 1, D)
            entries[..., number, :] = entrywise.summed(weights, of_channels).view(*further, B, L)
        return SomeRows(rows, entries)

    def lengths(self, output: Chain) -> Tensor:
        """Return the length of each token's contribution to each other token, ``|output(A_ij v_j)|``.

        Args:
            output: The factors after the core, from channels to the model's width.

        Returns:
            (B, L, L) of Euclidean lengths. ``u`` is not used. Cost: O(L²·D·(N + E)) time, O(L²) memory.

        Source:
            Kobayashi et al. 2020 (arXiv 2004.10102), equation 2, for softmax attention.
        """
        single = SingleChannels.of(self.core, self.v) if is_same_for_all_tokens(output) else None
        form = Banded.of(self.core, self.v) or SharedHeads.of(self.core, self.v) or single
        if form is not None:
            return form.lengths(output)
        B, L, _ = self.v.shape
        fused, of_output = self.v.new_zeros(B, L, L), OutputLengths.of(output, B * L * L)
        for tokens, channels in column_blocks(self.v, all_channels=True):
            rows, columns = block_columns(self.core, self.v, tokens, channels)
            fused[:, rows, tokens] = of_output.from_token(rows.start, columns).permute(1, 2, 0)
        return fused


@dataclass(frozen=True)
class FusedMatrix:
    """The token matrix ``C_ij = g(sum_d f(u_id A^d_ij v_jd))``, made when it is first needed.

    Args:
        weighted: The matrix of the weighted entries.
        entrywise: f.
        finish: g, a function of a tensor of sums that keeps 0.
    """

    weighted: CoreMatrix
    entrywise: Entrywise
    finish: Callable[[Tensor], Tensor] = lambda sums: sums

    @cached_property
    def _entries(self) -> DenseMatrix | SomeRows:
        made = self.weighted.made(self.entrywise)
        return replace(made, entries=self.finish(made.entries))

    def apply(self, s: Tensor) -> Tensor:
        """Return ``C s``. Cost: O(L²) but for the first product."""
        return self._entries.apply(s)

    def adjoint(self, r: Tensor) -> Tensor:
        """Return ``C^T r``. Cost: O(L²) but for the first product."""
        return self._entries.adjoint(r)

    def dense(self) -> Tensor:
        """Return the entries (..., B, L, L). Cost: see :meth:`CoreMatrix.made`."""
        return self._entries.dense()

    def on_rows(self, rows: Tensor) -> FusedMatrix:
        """Return the matrix that is 0 in all rows but these, (B, L) of booleans."""
        return replace(self, weighted=replace(self.weighted, u=self.weighted.u * rows.unsqueeze(-1)))


def channel_matrices(core: Operator, like: Tensor) -> Tensor:
    """Return the core's matrix of every channel, from its products alone.

    Args:
        core: Channelwise operator.
        like: Any tensor (B, L, D) of the shape, type and device of the core's input.

    Returns:
        (B, D, L, L): the matrix of channel d in row i (query) and column j (key). Cost: O(L²·D·N) time and
        B·D·L² numbers of memory; :meth:`CoreMatrix.dense` fuses the channels without holding them.

    Raises:
        ValueError: If the core mixes channels.
    """
    if core.mixes_channels:
        raise ValueError("The core mixes channels, so no channel has a matrix of its own; see Chain.channelwise.")
    B, L, D = like.shape
    matrices = like.new_zeros(B, D, L, L)
    one = like.new_ones(1, 1, 1).expand(B, L, D)
    for tokens, channels in column_blocks(like):
        rows, columns = block_columns(core, one, tokens, channels)
        matrices[:, channels, rows, tokens] = columns.permute(1, 3, 2, 0)
    return matrices


def _fused_by_entries(core: Operator, u: Tensor, v: Tensor, entrywise: Entrywise) -> Tensor:
    """Return ``sum_d f(u_id A^d_ij v_jd)``, (M, B, L, L), of any core, entry by entry.

    Args:
        core: The core.
        u: Output-side weights (M, B, L, D).
        v: Input-side weights (B, L, input channels).
        entrywise: f.
    """
    fused = u.new_zeros(*u.shape[:-1], v.shape[1])
    for rows, columns, channels, entries in entry_blocks(core, v):
        fused[:, :, rows, columns] += entrywise.summed(u[:, :, rows, channels], entries)
    return fused


def _in_two_directions(parts: Sequence[CoreMatrix]) -> bool:
    """Whether one of two parts reads the past alone, and the other the future."""
    return len(parts) == 2 and {(p.core.causal, p.core.anticausal) for p in parts} == {(True, False), (False, True)}
