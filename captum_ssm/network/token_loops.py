"""Loops over tokens, differentiated in linear time.

Code without kernels runs a recurrence token by token, ``h = a[:, t] * h + b[:, t]``. For each such reading the
gradient has a tensor of the size of all of ``a``, 0 but for one token: the time of L² tokens for a loop over L of them.
The same entries taken as parts of one ``a.unbind(1)`` have the same gradient, which is put together once.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from types import EllipsisType, NoneType
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

_FEW = 8
"""Readings along an axis that are left as they are. An entry of ``unbind`` refuses to be written to, which code that
writes in between its readings does; it does not come to more of them without writing."""

_SHORT = 32
"""Tokens up to which nothing is gained, and each function of torch costs a microsecond more."""


def linear_time_loops(tokens: int) -> AbstractContextManager[object]:
    """Give entries that are read one after the other along an axis their gradient together while the context is open.

    Values and gradients are those without it.

    Args:
        tokens: An upper bound of the tokens that a loop may have.

    Returns:
        The context.
    """
    return nullcontext() if tokens <= _SHORT else _LinearTimeLoops()


class _LinearTimeLoops(TorchFunctionMode):
    """Reads entries as parts of all entries of their axis."""

    def __init__(self) -> None:
        super().__init__()
        self._readings: dict[tuple[int, int], _Readings] = {}

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if function is Tensor.__getitem__ and torch.is_grad_enabled():
            entry = self._entry(*args)
            if entry is not None:
                return entry
        return function(*args, **(kwargs or {}))

    def _entry(self, t: Any, index: Any) -> Tensor | None:
        """Return ``t[index]`` if the index is a number for one axis, and many have been read along it before."""
        at = _single_number(t, index) if type(t) is Tensor and t.requires_grad else None
        if at is None:
            return None
        readings = self._readings.get((id(t), at.axis))
        if readings is None or readings.version != t._version:
            readings = self._readings[id(t), at.axis] = _Readings(t, t._version)
        readings.count += 1
        if readings.count <= _FEW:
            return None
        readings.parts = readings.parts or t.unbind(at.axis)
        part = readings.parts[at.number]
        return part if all(entry in (slice(None), ...) for entry in at.others) else part[at.others]


@dataclass
class _Readings:
    """What was read along an axis of a tensor since it was last written to."""

    tensor: Tensor
    version: int
    count: int = 0
    parts: tuple[Tensor, ...] = ()


class _Single(NamedTuple):
    """An index with a number for one axis."""

    axis: int
    number: int
    others: tuple[Any, ...]
    """The index of the remaining axes."""


def _single_number(t: Tensor, index: Any) -> _Single | None:
    """Return an index of numbers, slices, None and ``...`` that has a single number, for an axis of some length."""
    index = index if isinstance(index, tuple) else (index,)
    places = [place for place, entry in enumerate(index) if type(entry) is int]
    if len(places) != 1 or not all(type(e) in (int, slice, EllipsisType, NoneType) for e in index):
        return None
    (place,), number = places, index[places[0]]
    axes = [e is not None and e is not ... for e in index]  # entries that have an axis of their own
    axis = sum(axes[:place]) if ... not in index[:place] else t.dim() - sum(axes[place:])
    if not (0 <= axis < t.dim() and t.shape[axis] > _FEW and -t.shape[axis] <= number < t.shape[axis]):
        return None
    return _Single(axis, number, index[:place] + index[place + 1 :])
