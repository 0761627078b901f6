"""The types that code computes in: those of its tensors, and a narrower one under ``torch.autocast``.

A model may run under autocast, by its user's context or its own. What this package computes itself does not: its
operators would lose the digits that a decomposition is checked by.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import wraps
from typing import Any, TypeVar, cast

import torch
from torch import nn

Function = TypeVar("Function", bound=Callable[..., Any])

Autocast = tuple[tuple[str, torch.dtype], ...]
"""The kinds of devices on which autocast is on, each with its type."""

_KINDS = ("cpu", "cuda", "xpu", "mps", "hpu", "privateuseone")
"""Kinds of devices that torch has autocast for."""


def autocast_here() -> Autocast:
    """Return the autocast that this code runs under."""
    if not torch._C._is_any_autocast_enabled():
        return ()
    return tuple((kind, torch.get_autocast_dtype(kind)) for kind in _KINDS if torch.is_autocast_enabled(kind))


@contextmanager
def under(autocast: Autocast) -> Iterator[None]:
    """Run code under this autocast, and none besides, while the context is open.

    Casts of weights are not kept: one that was made without a graph would serve the caller's own training too.

    Yields:
        None.
    """
    own = dict(autocast)
    with ExitStack() as stack:
        for kind, dtype in {**dict(autocast_here()), **own}.items():
            stack.enter_context(torch.autocast(kind, dtype, enabled=kind in own, cache_enabled=False))
        yield


_AS_IT_IS = nullcontext()


def full_precision() -> AbstractContextManager[None]:
    """Return a context in which code runs in the types of its tensors, also where autocast is on."""
    return under(()) if torch._C._is_any_autocast_enabled() else _AS_IT_IS


def in_full_precision(function: Function) -> Function:
    """Decorate a function to run in :func:`full_precision`."""

    @wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        with full_precision():
            return function(*args, **kwargs)

    return cast(Function, run)


def narrowest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the floating-point type with the coarsest rounding; torch's default one if there is none."""
    floating = {dtype for dtype in dtypes if dtype.is_floating_point}
    if len(floating) == 1:
        return floating.pop()
    return max(floating, key=lambda dtype: torch.finfo(dtype).eps, default=torch.get_default_dtype())


def computing_type(module: nn.Module) -> torch.dtype:
    """Return the narrowest floating-point type of a module's parameters, but for those of a byte, for storage alone."""
    tables = [part._parameters.values() for part in module.modules()]
    types = {parameter.dtype for table in tables for parameter in table if parameter is not None}
    return narrowest(dtype for dtype in types if dtype.itemsize > 1)
