"""Walk through the entries of any core's matrices by columns, in blocks of bounded size: all it needs are products."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from torch import Tensor

from captum_ssm.operators import Operator
from captum_ssm.operators.device_sizes import DeviceSize

_BLOCK = DeviceSize(cpu=2**21, others=2**26)
"""Entries of a block of columns: bounds the memory of this module on a processor to some tens of megabytes. Elsewhere a
pass over few columns costs as much as one over many."""

_CHANNELS = 8
"""Channels of a block, if more columns than the memory bound allows would fit."""


class EntryBlock(NamedTuple):
    """Entries ``A^d_ij v_jd`` of some rows i, columns j and channels d."""

    rows: slice
    columns: slice
    channels: slice
    entries: Tensor
    """(B, I, J, D)."""


def entry_blocks(core: Operator, v: Tensor) -> Iterator[EntryBlock]:
    """Walk through the entries ``A^d_ij v_jd`` of a core.

    Args:
        core: Channelwise operator, or one that mixes channels: its entry is then channel d of the contribution of
            token j to token i.
        v: Input-side weights (B, L, input channels).

    Yields:
        Blocks whose entries add up to the matrices; entries outside all blocks are 0.
    """
    for tokens, channels in column_blocks(v, all_channels=core.mixes_channels):
        rows, columns = block_columns(core, v, tokens, channels)
        if core.mixes_channels:
            channels = slice(0, columns.shape[-1])
        yield EntryBlock(rows, tokens, channels, columns.permute(1, 2, 0, 3))


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
