"""The states of a chunk, and the multipliers of its states, known by their contractions.

A *state* is a matrix (N, P) for each token. A chunk of a recurrence has two families of states: h, run from the first
token to the last, and their multipliers g, run from the last to the first. The multipliers of inputs and coefficients
are contractions of these two families (see :mod:`captum_ssm.relevance.recurrence`), whose entries need not be stored:

* :class:`~captum_ssm.relevance.explicit_states.ExplicitStates` have entries. They are best where few channels share a
  state's decay.
* :class:`~captum_ssm.relevance.implicit_states.ImplicitStates` are decayed sums of outer products, so every contraction
  is a product of (T, T) matrices. They are best where many channels share a state's decay.

Shapes have the heads before the tokens, (B, H, T, ...). Stacked tensors have 2B examples, see
:class:`~captum_ssm.relevance.stacked.Stacked`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, NamedTuple, Protocol, Self

import torch
from torch import Tensor


class Mean(NamedTuple):
    """A mean of a value and its reference, ``share * value + (1 - share) * reference``, that is not computed yet."""

    value: Tensor
    reference: Tensor
    share: float = 0.5

    @property
    def tensor(self) -> Tensor:
        """The mean."""
        return torch.lerp(self.reference, self.value, self.share)


class States(ABC):
    """A state (N, P) for each token of a chunk."""

    @abstractmethod
    def over_channels(self, v: Tensor | Mean) -> Tensor:
        """Return ``sum_p state_np v_p``, (B, H, T, N), for ``v`` (B, H, T, P)."""

    @abstractmethod
    def over_states(self, q: Tensor) -> Tensor:
        """Return ``sum_n q_n state_np``, (B, H, T, P), for ``q`` (B, H, T, N)."""

    @abstractmethod
    def inner(self, other: Self) -> Tensor:
        """Return ``sum_p state_np other_np``, (B, H, T, N), or its sum over n too, (B, H, T, 1)."""


Contraction = Callable[[Any], Tensor]
"""From states (B, ...) to a contraction of them that is linear."""


class StatesOfBoth(Protocol):
    """The states of the value and of the reference."""

    def mean(self, function: Contraction, share: float = 0.5) -> Tensor:
        """Return the mean of a linear function: of the value's states, with this share, and of the reference's.

        Args:
            function: A contraction.
            share: Weight of the value; the reference has the rest.

        Returns:
            The mean, with B examples.
        """


class ForwardStates(NamedTuple):
    """The states of a chunk, of the value and the reference."""

    after: StatesOfBoth
    """The state after each token, h_t."""
    before: StatesOfBoth
    """The state before each token, h_{t-1}."""
    recalled: Mean | None
    """The mean of the values that each token looks up, w_t, (B, H, T, P); None without a delta rule."""


class BackwardStates(NamedTuple):
    """The multipliers of the states of a chunk."""

    g: Any
    """Of the state after each token, g_t, :class:`States` of the same class as the chunk's."""
    k: Tensor | None
    """``<erase_t, g_t>``, (B, H, T, P): the multiplier of w_t is -k_t. None without a delta rule."""
    before_chunks: Tensor
    """Of the state before the first chunk, (B, H, N, P)."""
