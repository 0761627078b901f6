"""Poolings whose windows choose an entry, or take a norm; their averages are linear."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.relevance.functions.table import composed
from captum_ssm.relevance.functions.torch_code import as_torch_writes_it


def _without_positions(with_positions: Callable[..., Any]) -> Callable[..., Any]:
    """Return the pooling whose selection, of entries and their positions, is another function of torch."""

    def pool(x: Tensor, *args: Any, return_indices: bool = False, **kwargs: Any) -> Any:
        chosen = with_positions(x, *args, **kwargs)
        return chosen if return_indices else chosen[0]

    return pool


def _back_to_positions(unpool: Callable[..., Any], window: int) -> Callable[..., Any]:
    """Return the function that puts entries back to their positions, where windows that overlap share an entry."""

    def put_back(x: Tensor, indices: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        whole = unpool(torch.zeros_like(x), indices, *args, **kwargs)
        plain, numbers = whole.flatten(-window), indices.flatten(-window)
        counts = plain.scatter_add(-1, numbers, torch.ones_like(x).flatten(-window)).gather(-1, numbers)
        return plain.scatter_add(-1, numbers, x.flatten(-window) / counts).view(whole.shape)

    return put_back


for _window in (1, 2, 3):
    for _name in (f"max_pool{_window}d", f"adaptive_max_pool{_window}d"):
        composed(_name)(_without_positions(getattr(F, f"{_name}_with_indices")))
    composed(f"max_unpool{_window}d")(_back_to_positions(getattr(F, f"max_unpool{_window}d"), _window))
    composed(f"lp_pool{_window}d")(as_torch_writes_it(getattr(F, f"lp_pool{_window}d")))
