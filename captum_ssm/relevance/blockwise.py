"""Functions of each entry or row, a few at a time: all that is between stays in the processor's cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

_ENTRIES = 2**16
"""Entries of a block: some tensors of this size fit a processor's cache."""


Result = TypeVar("Result", Tensor, Tensor | None)


def blockwise(function: Callable[..., Result], *tensors: Tensor) -> Result:
    """Compute a function of the entries at each place of some tensors.

    Args:
        function: From the tensors to one of their shape and type, entry by entry; it may be called with parts of them.
            It may return None, for all parts.
        *tensors: All of one shape.

    Returns:
        The function's result.
    """
    if not _worth_it(tensors):
        return function(*tensors)
    result = torch.empty_like(tensors[0])
    for part, *of_tensors in zip(*(t.view(-1).split(_ENTRIES) for t in (result, *tensors))):
        found = function(*of_tensors)
        if found is None:
            return found
        part.copy_(found)
    return result


def rowwise(function: Callable[..., tuple[Tensor, ...]], count: int, *tensors: Tensor) -> tuple[Tensor, ...]:
    """Compute functions of the rows, along the last axis, of some tensors.

    Args:
        function: From the tensors to some of their shape and type, row by row; it may be called with parts of them.
        count: How many it returns.
        *tensors: All of one shape.

    Returns:
        The function's results.
    """
    if not _worth_it(tensors):
        return function(*tensors)
    length = tensors[0].shape[-1]
    results = tuple(torch.empty_like(tensors[0]) for _ in range(count))
    for blocks in zip(*(t.view(-1, length).split(max(_ENTRIES // length, 1)) for t in (*results, *tensors))):
        for part, found in zip(blocks, function(*blocks[count:])):
            part.copy_(found)
    return results


def _worth_it(tensors: Sequence[Tensor]) -> bool:
    """Whether tensors can be cut into blocks, and are too large for a processor's cache."""
    first = tensors[0]
    alike = all(t.is_contiguous() and t.shape == first.shape and t.dtype == first.dtype for t in tensors)
    return first.numel() >= 2 * _ENTRIES and alike and first.device.type == "cpu"
