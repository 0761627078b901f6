"""All states of a diagonal recurrence at once, in O(log T) steps."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

import torch
from torch import Tensor

_TOKEN_BY_TOKEN = 32
"""Length up to which tokens follow one after the other: that takes fewer operations than merging pairs."""


def prefix(a: Tensor, v: Tensor) -> Tensor:
    """Return all states of ``h_t = a_t h_{t-1} + v_t``, ``h_{-1} = 0``, along axis 1.

    Few tokens follow one after the other. Of many, neighbours are merged into pairs; the sequence of pairs, half as
    long, is solved by the same function, and one more step gives the states between the pairs.

    Args:
        a: Decays, broadcastable to ``v``, of full length T along axis 1; the first one is not used.
        v: Values written by each token, (B, T, ...).

    Returns:
        The states, shaped as ``v``. Cost: O(T) work in O(log T) steps.
    """
    T = v.shape[1]
    if T <= _TOKEN_BY_TOKEN:
        return torch.stack(_in_turn(a.unbind(1)[1:], v.unbind(1)), 1)
    # a pair of tokens (t - 1, t) decays by a_t a_{t-1} and writes v_t + a_t v_{t-1}
    odd = prefix(a[:, 1::2] * a[:, : T - 1 : 2], v[:, 1::2] + a[:, 1::2] * v[:, : T - 1 : 2])  # (B, T // 2, ...)
    h = torch.empty_like(v)
    h[:, 0] = v[:, 0]
    h[:, 1::2] = odd
    h[:, 2::2] = v[:, 2::2] + a[:, 2::2] * odd[:, : (T - 1) // 2]
    return h


def suffix(a: Tensor, v: Tensor) -> Tensor:
    """Return all states of ``g_t = a_{t+1} g_{t+1} + v_t``, ``g_T = 0``, along axis 1: :func:`prefix` from the end."""
    if v.shape[1] <= _TOKEN_BY_TOKEN:
        return torch.stack(_in_turn(a.unbind(1)[:0:-1], v.unbind(1)[::-1])[::-1], 1)
    return prefix(a.roll(-1, 1).flip(1), v.flip(1)).flip(1)


def states_from(h: Tensor, a: Tensor, v: Tensor) -> Tensor:
    """Return ``h`` and all later states of ``h_t = a_t h_{t-1} + v_t``.

    Args:
        h: The state before the first token, (B, ...).
        a: Decays, broadcastable to ``v``, of full length T along axis 1.
        v: Values written by each token, (B, T, ...).

    Returns:
        (B, T + 1, ...). Cost: O(T) work in O(log T) steps.
    """
    if v.shape[1] <= _TOKEN_BY_TOKEN:
        return torch.stack(_in_turn(a.unbind(1), [h, *v.unbind(1)]), 1)
    return prefix(torch.cat([a[:, :1], a], 1), torch.cat([h.unsqueeze(1), v], 1))


def _in_turn(a: Sequence[Tensor], v: Sequence[Tensor]) -> list[Tensor]:
    """Return the states after each of the values ``v``, one after the other, with the decays ``a`` between them."""
    return [*accumulate(zip(a, v[1:]), lambda h, step: torch.addcmul(step[1], step[0], h), initial=v[0])]
