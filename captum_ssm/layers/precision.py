"""The types that code computes in: those of its tensors, and a narrower one under ``torch.autocast``.

A model may run under autocast, by its user's context or its own. What this package computes itself does not: its
operators would lose the digits that a decomposition is checked by.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager

import torch
from torch import nn

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


@contextmanager
def full_precision() -> Iterator[None]:
    """Run code in the types of its tensors while the context is open, also where autocast is on.

    Yields:
        None.
    """
    if not torch._C._is_any_autocast_enabled():
        yield
        return
    with under(()):
        yield


def narrowest(dtypes: Iterable[torch.dtype]) -> torch.dtype:
    """Return the floating-point type with the coarsest rounding; torch's default one if there is none."""
    floating = [dtype for dtype in dtypes if dtype.is_floating_point]
    return max(floating, key=lambda dtype: torch.finfo(dtype).eps, default=torch.get_default_dtype())


def computing_type(module: nn.Module) -> torch.dtype:
    """Return the narrowest floating-point type of a module's parameters, but for those of a byte, for storage alone."""
    return narrowest(parameter.dtype for parameter in module.parameters() if parameter.dtype.itemsize > 1)
