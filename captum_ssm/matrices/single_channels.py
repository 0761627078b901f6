"""The fused matrices of a core whose channels each have a recurrence of their own.

Such a core is a scan, perhaps behind convolutions and projections, which make its input a banded matrix of few lags.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce

import torch
from torch import Tensor

from captum_ssm.matrices.banded import are_banded, parts, product
from captum_ssm.matrices.entrywise import Entrywise
from captum_ssm.matrices.lengths import OutputLengths, vectors_at_once
from captum_ssm.operators import Chain, Operator, Scan
from captum_ssm.operators.device_sizes import DeviceSize
from captum_ssm.operators.scan_blocks import ScanBlock, windows

_STATES = DeviceSize(cpu=2**19, others=2**24)
"""Entries of the states of all columns that are treated at once: those that fit a processor's cache."""

_CHANNELS = 32
"""Channels that are treated at once, if more columns than the bound allows have states: fewer are slow."""

_ENTRIES = DeviceSize(cpu=2**20, others=2**26)
"""Entries of a block that are made at once: those that fit a processor's cache."""


@dataclass(frozen=True)
class SingleChannels:
    """The entries ``A^d_ij v_jd`` of a core whose channels each have a recurrence of their own.

    Args:
        scan: The recurrences.
        factor: Factor of the rows, broadcastable to (B, L, D).
        band: By lag, (B, L, D): the weight of token t - lag in the recurrences' input at t, times ``v``.
    """

    scan: Scan
    factor: Tensor
    band: Mapping[int, Tensor]

    @classmethod
    def of(cls, core: Operator, v: Tensor) -> SingleChannels | None:
        """Return the entries of a core in this form, or None if it has another.

        Args:
            core: Channelwise, or with projections before its recurrences alone.
            v: Input-side weights (B, L, input channels).
        """
        after, scan, before = parts(core)
        if not isinstance(scan, Scan) or scan.head_size > 1 or not are_banded(before):
            return None
        if any(leaf.mixes_channels for leaf in after):
            return None
        factor = reduce(lambda weight, leaf: leaf.apply(weight), reversed(after), v.new_ones(1, 1, 1))
        return cls(scan, factor, product(before, v))

    def fused(self, u: Tensor, entrywise: Entrywise) -> Tensor:
        """Return ``sum_d f(u_id A^d_ij v_jd)``.

        Args:
            u: Output-side weights (M, B, L, D).
            entrywise: f.

        Returns:
            (M, B, L, L). Cost: see :meth:`Scan.blocks`, and one pass over the entries; O(L²) memory.
        """
        band = self._stacked_band()
        M, (_, B, L, D) = len(u), band.shape
        factor = self.factor * u[0] if M == 1 else self.factor  # the rows of blocks are fewer than their entries
        width = min(D, max(_CHANNELS, _STATES.of(u) // (B * L * self.scan.states)))
        size = _ENTRIES.of(u) // width
        fused = u.new_zeros(M, B, L, L)
        for block in self.scan.blocks(band, factor.expand(B, L, D), width):
            _add(fused, block, None if M == 1 else u[..., block.channels], entrywise, size)
        return fused

    def lengths(self, output: Chain) -> Tensor:
        """Return the Euclidean length of each token's contribution to each other token, ``|output(A_ij v_j)|``.

        Args:
            output: The factors after the core, from channels to the model's width, the same for every token.

        Returns:
            (B, L, L). Cost: see :meth:`Scan.blocks`, and O(L²·D·E) of the output; memory for the states of all columns.
        """
        band = self._stacked_band()
        _, B, L, D = band.shape
        lengths, of_output = band.new_zeros(1, B, L, L), OutputLengths.of(output, B * L * L)
        for block in self.scan.blocks(band, self.factor.expand(B, L, D), D):
            P, number, J = *block.reads.shape[1:3], block.left.shape[2]
            place, rows_at_once = _place(lengths, block)[0], max(1, vectors_at_once(band) // (B * P * J * block.held))
            for start in range(0, number, rows_at_once):
                rows = slice(start, start + rows_at_once)
                place[:, :, rows] = of_output.from_token(0, block.entries(rows))
        return lengths[0]

    def _stacked_band(self) -> Tensor:
        """Return the band, (K, B, L, D)."""
        return torch.stack([self.band[lag] for lag in range(len(self.band))])


def _place(fused: Tensor, block: ScanBlock) -> Tensor:
    """Return the view (M, B, P, I, J) of contiguous matrices (M, B, L, L) where the entries of a block stand."""
    (M, B, L, _), (P, number), J = fused.shape, block.reads.shape[1:3], block.left.shape[2]
    strides = (B * L * L, L * L, block.step * (L + 1), L, 1)  # the next block is as many rows down as columns right
    return fused.as_strided((M, B, P, number, J), strides, block.row * L + block.column)


def _add(fused: Tensor, block: ScanBlock, u: Tensor | None, entrywise: Entrywise, size: int) -> None:
    """Add the entries of a block to the fused ones.

    Args:
        fused: (M, B, L, L), contiguous.
        block: The block.
        u: Weights (M, B, L, channels), or None if they are part of the block.
        entrywise: f.
        size: Number of entries of a channel that are made at once.
    """
    place, weights = _place(fused, block), u
    M, B, P, number, J = place.shape
    if u is not None:
        weights = windows(u.flatten(0, 1), block.row, P, number, block.step).unflatten(0, (M, B))
    rows_at_once = max(1, size // (B * P * J))
    for start in range(0, number, rows_at_once):
        rows = slice(start, start + rows_at_once)
        of_rows = None if weights is None else weights[:, :, :, rows]
        place[:, :, :, rows] += entrywise.summed(of_rows, block.entries(rows))
