"""Parallel scans: recurrences whose steps are combined in a tree, each channel by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from captum_ssm.errors import UnsupportedModelError
from captum_ssm.operators import Scan
from captum_ssm.relevance.kernels.kernel import Unfollowed, kernel


@kernel("PScan", "pscan", A_in="A", X_in="X")
def pscan(A: Tensor, X: Tensor) -> Tensor:
    """Run ``h_t = A_t h_{t-1} + X_t`` in each channel.

    Args:
        A: Decays (B, L, ...).
        X: Inputs (B, L, ...).

    Returns:
        The states (B, L, ...).

    Source:
        mambapy ``pscan.py``; Blelloch 1990, Prefix sums and their applications.
    """
    one = torch.ones_like(X[:1, :1].flatten()[:1]).view(1, 1, 1, 1)
    a, x = (t.unsqueeze(-1).flatten(2) for t in (A, X))  # (B, L, channels)
    return Scan(a=a.unsqueeze(-1), b=one, c=one).apply(x).reshape(X.shape)


@kernel("associative_scan")
def associative_scan(combine_fn: Callable[..., Any], xs: Any, dim: int, reverse: bool = False) -> Any:
    """Run an associative scan that combines the steps of a recurrence, or adds.

    Args:
        combine_fn: From two neighbouring steps to both of them.
        xs: The steps along ``dim``: a pair of inputs and decays, or their logarithms, of one shape; or numbers.
        dim: The axis of the scan.
        reverse: Whether the scan runs from the last step to the first.

    Returns:
        The combination of all steps so far, in the form of ``xs``. The products of the decays are refused when they are
        read.

    Raises:
        UnsupportedModelError: If other things are combined.
    """

    def turned(t: Tensor) -> Tensor:
        return t.flip(dim) if reverse else t

    if isinstance(xs, Tensor):
        if _is(combine_fn, lambda x, y: x + y, 1):
            return turned(turned(xs).cumsum(dim))
    elif len(xs) == 2:
        for is_first, is_logarithm in product((True, False), repeat=2):
            if _is(combine_fn, partial(_combined, is_first, is_logarithm), 2):
                a, x = (turned(t).movedim(dim, 0).unsqueeze(0) for t in (xs if is_first else xs[::-1]))
                h = turned(pscan(a.exp() if is_logarithm else a, x).squeeze(0).movedim(0, dim))
                decays = Unfollowed.of(torch.empty(h.shape, device=h.device), "associative_scan")
                return (decays, h) if is_first else (h, decays)
    raise UnsupportedModelError("An associative scan of something else than a recurrence has no rule of relevance.")


def _combined(is_first: bool, is_logarithm: bool, earlier: Sequence[Tensor], later: Sequence[Tensor]) -> list[Tensor]:
    """Combine two steps of a recurrence.

    Args:
        is_first: Whether the decay comes before the input; else it comes after it.
        is_logarithm: Whether the decay is given by its logarithm.
        earlier: Decay and input.
        later: Decay and input.

    Returns:
        Decay and input of both steps.
    """
    (a, x), (b, y) = (step if is_first else step[::-1] for step in (earlier, later))
    steps = [a + b, b.exp() * x + y] if is_logarithm else [a * b, b * x + y]
    return steps if is_first else steps[::-1]


def _is(combine: Callable[..., Any], other: Callable[..., Any], size: int) -> bool:
    """Whether two functions of neighbouring steps agree on some numbers."""
    some = [torch.linspace(0.1, 0.9 + n, 6, dtype=torch.float64, device="cpu") for n in range(2 * size)]
    earlier, later = some[::2], some[1::2]
    try:
        found, wanted = (
            f(tuple(earlier), tuple(later)) if size == 2 else f(*earlier, *later) for f in (combine, other)
        )
    except (RuntimeError, TypeError, ValueError):
        return False
    return all(torch.allclose(f, w) for f, w in zip(tree_leaves(found), tree_leaves(wanted)))
