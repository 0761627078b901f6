"""Walk through the entries of a core's matrices in blocks of bounded size.

A core of single channels, a scan perhaps behind convolutions and projections, is walked by rows, which keeps the state
of every column; any other core by columns, which needs nothing but its products.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from captum_ssm.matrices.banded import are_banded, parts, product
from captum_ssm.matrices.device_sizes import DeviceSize
from captum_ssm.operators import Operator, Scan

_BLOCK = DeviceSize(cpu=2**21, others=2**26)
"""Entries of a block of columns: bounds the memory of this module on a processor to some tens of megabytes. Elsewhere a
pass over few columns costs as much as one over many."""

_STATES = DeviceSize(cpu=2**18, others=2**24)
"""Entries of the states of all columns in a walk by rows: those that fit a processor's cache."""

_CHANNELS = 8
"""Channels of a block, if more columns than the memory bound allows would fit."""


class EntryBlock(NamedTuple):
    """Entries ``A^d_ij v_jd`` of some rows i, columns j and channels d."""

    rows: slice
    columns: slice
    channels: slice
    factor: Tensor
    """Factor of the rows, (B, I, D)."""
    entries: Tensor
    """The entries without this factor, (B, D, I, J). The walk overwrites them in its next step."""


def entry_blocks(core: Operator, v: Tensor) -> Iterator[EntryBlock]:
    """Walk through the entries ``A^d_ij v_jd`` of a core.

    Args:
        core: Channelwise operator, or one that mixes channels: its entry is then channel d of the contribution of
            token j to token i.
        v: Input-side weights (B, L, input channels).

    Returns:
        An iterator over blocks whose entries add up to the matrices; entries outside all blocks are 0.
    """
    return _by_rows(core, v) or _by_columns(core, v)


def _by_rows(core: Operator, v: Tensor) -> Iterator[EntryBlock] | None:
    """Walk through the entries by rows, if the core is a scan of single channels behind banded factors."""
    after, scan, before = parts(core)
    if not isinstance(scan, Scan) or scan.head_size > 1 or not are_banded(before):
        return None
    return None if any(leaf.mixes_channels for leaf in after) else _rows(after, scan, product(before, v))


def _rows(after: list[Operator], scan: Scan, lags: Mapping[int, Tensor]) -> Iterator[EntryBlock]:
    """Walk through the rows of a product of operators.

    Args:
        after: The factors after the scan, the first applied last.
        scan: The scan.
        lags: By lag, (B, L, D): what token t - lag contributes to the scan's input at token t.

    Yields:
        Blocks of some rows and all columns up to the last of these.
    """
    band = torch.stack([lags[lag] for lag in range(len(lags))])  # (K, B, L, D)
    _, B, L, D = band.shape
    width = max(_CHANNELS, _STATES.of(band) // (B * L * scan.states))
    for start in range(0, D, width):
        channels = slice(start, min(start + width, D))
        factor = torch.ones_like(band[0, ..., channels])  # (B, L, channels)
        for operator in reversed(after):
            factor = operator.channels(channels).apply(factor)
        for rows, entries in scan.channels(channels).rows(band[..., channels]):
            yield EntryBlock(rows, slice(0, rows.stop), channels, factor[:, rows], entries)


def _by_columns(core: Operator, v: Tensor) -> Iterator[EntryBlock]:
    """Walk through the entries of any core by columns."""
    for tokens, channels in column_blocks(v, all_channels=core.mixes_channels):
        rows, columns = block_columns(core, v, tokens, channels)
        if core.mixes_channels:
            channels = slice(0, columns.shape[-1])
        yield EntryBlock(rows, tokens, channels, v.new_ones(1, 1, 1), columns.permute(1, 3, 2, 0))


def column_blocks(like: Tensor, all_channels: bool = False) -> Iterator[tuple[slice, slice]]:
    """Cut the columns of all channels' matrices into blocks that fit the memory bound.

    Args:
        like: Any tensor (B, L, D).
        all_channels: Whether a block has all channels, however few columns then fit.

    Yields:
        The tokens (columns) and the channels of a block.
    """
    B, L, D = like.shape
    block = _BLOCK.of(like)
    width = D if all_channels else min(D, max(_CHANNELS, block // (B * L * L)))
    count = min(L, max(1, block // (B * L * width)))
    for d in range(0, D, width):
        for j in range(0, L, count):
            yield slice(j, min(j + count, L)), slice(d, min(d + width, D))


def block_columns(core: Operator, v: Tensor, tokens: slice, channels: slice) -> tuple[slice, Tensor]:
    """Return the columns ``A^d_ij v_jd`` of a block.

    Args:
        core: The core.
        v: Input-side weights (B, L, input channels).
        tokens: The columns j.
        channels: The channels d; all of a core that mixes channels.

    Returns:
        The rows i, for a causal core those from the first of the tokens on, as all others are 0; and the entries
        (J, B, rows, channels).
    """
    causal = core.causal
    if not core.mixes_channels:
        core, v = core.channels(channels), v[..., channels]
    if not causal:
        return slice(0, v.shape[1]), core.columns(v, tokens)
    start = tokens.start
    return slice(start, v.shape[1]), core.after(start).columns(v[:, start:], slice(0, tokens.stop - start))
