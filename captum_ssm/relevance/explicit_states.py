"""The states of a chunk of a scan with all their entries: best where few channels share a state's decay."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from captum_ssm.operators.coefficient import Coefficients
from captum_ssm.operators.decays import heads_first
from captum_ssm.operators.prefix import states_from, suffix
from captum_ssm.relevance.stacked import Stacked
from captum_ssm.relevance.states import BackwardStates, ForwardStates, Mean, States


@dataclass(frozen=True)
class ExplicitStates(States):
    """States with all their entries.

    Args:
        h: (B, H, T, N, P).
    """

    h: Tensor

    def over_channels(self, v: Tensor | Mean) -> Tensor:
        """Return ``sum_p state_np v_p``, (B, H, T, N), for ``v`` (B, H, T, P)."""
        v = v.tensor if isinstance(v, Mean) else v
        return _sum(self.h * v.unsqueeze(-2), -1)

    def over_states(self, q: Tensor) -> Tensor:
        """Return ``sum_n q_n state_np``, (B, H, T, P), for ``q`` (B, H, T, N)."""
        return _sum(self.h * q.unsqueeze(-1), -2)

    def inner(self, other: ExplicitStates) -> Tensor:
        """Return ``sum_p state_np other_np``, (B, H, T, N)."""
        return _sum(self.h * other.h, -1)


@dataclass(frozen=True)
class ExplicitPair:
    """The states of the value and of the reference.

    Args:
        h: Stacked, (2B, H, T, N, P).
    """

    h: Tensor

    def mean(self, function: Callable[[ExplicitStates], Tensor], share: float = 0.5) -> Tensor:
        """Return the function of the mean states: it is linear."""
        return function(ExplicitStates(Stacked(self.h).mean(share)))


def explicit_states(coefficients: Coefficients[Tensor], x: Tensor, h: Tensor) -> ForwardStates:
    """Return the states of a chunk of a scan.

    Args:
        coefficients: Of value and reference, stacked, each (2B or 1, T, H or 1, N or 1).
        x: Input, stacked, (2B, H, T, P).
        h: State before the chunk, stacked, (2B, H, N, P).

    Returns:
        The states after and before each token, as :class:`ExplicitPair`.
    """
    decay = heads_first(coefficients.a, coefficients.a.shape[3]).unsqueeze(-1)  # (2B, H, T, N or 1, 1)
    b = heads_first(coefficients.b, h.shape[2])  # (2B, H, T, N)
    writes = b.unsqueeze(-1) * x.unsqueeze(-2)  # (2B, H, T, N, P)
    states = _along_tokens(partial(states_from, h), decay, writes)  # (2B, H, T + 1, N, P)
    return ForwardStates(ExplicitPair(states[:, :, 1:]), ExplicitPair(states[:, :, :-1]), None)


def explicit_multipliers(coefficients: Coefficients[Tensor], dy: Tensor, G: Tensor, lag: int) -> BackwardStates:
    """Return the multipliers of the states of a chunk of a scan.

    Args:
        coefficients: Means over value and reference, each (B or 1, T, H or 1, N or 1).
        dy: Multipliers of the output (B, H, T, P).
        G: Multipliers of the state after the chunk (B, H, N, P).
        lag: 1 if the state is read before the current token is written, else 0.

    Returns:
        The multipliers of the state after each token, as :class:`ExplicitStates`, and of the state before the chunk.
    """
    decay = heads_first(coefficients.a, coefficients.a.shape[3]).unsqueeze(-1)  # (B, H, T, N or 1, 1)
    c = heads_first(coefficients.c, G.shape[2])  # (B, H, T, N)
    reads = c.unsqueeze(-1) * dy.unsqueeze(-2)  # (B, H, T, N, P): multiplier of the state that token t reads
    if lag:
        writes = torch.cat([reads[:, :, 1:], G.unsqueeze(2)], dim=2)
    else:
        writes = reads
        writes[:, :, -1] += G
    g = _along_tokens(suffix, decay, writes)  # (B, H, T, N, P)
    before_chunks = decay[:, :, 0] * g[:, :, 0] + (reads[:, :, 0] if lag else 0)
    return BackwardStates(ExplicitStates(g), None, before_chunks)


def _along_tokens(recurrence: Callable[[Tensor, Tensor], Tensor], decay: Tensor, writes: Tensor) -> Tensor:
    """Run a recurrence along axis 2 instead of 1."""
    return recurrence(decay.transpose(1, 2), writes.transpose(1, 2)).transpose(1, 2)


def _sum(tensor: Tensor, axis: int) -> Tensor:
    """Sum over an axis; one of size 1 is only dropped."""
    return tensor.squeeze(axis) if tensor.shape[axis] == 1 else tensor.sum(axis)
