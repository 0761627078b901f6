"""Functions of each entry, a few entries at a time: all that is between stays in the processor's cache."""

from __future__ import annotations

from collections.abc import Callable
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
    first = tensors[0]
    alike = all(t.is_contiguous() and t.shape == first.shape and t.dtype == first.dtype for t in tensors)
    if first.numel() < 2 * _ENTRIES or not alike or first.device.type != "cpu":
        return function(*tensors)
    result = torch.empty_like(first)
    for part, *of_tensors in zip(*(t.view(-1).split(_ENTRIES) for t in (result, *tensors))):
        found = function(*of_tensors)
        if found is None:
            return found
        part.copy_(found)
    return result
