"""The states of a chunk as decayed sums of outer products: best where many channels share a state's decay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from captum_ssm.operators.coefficient import Coefficients, DeltaCoefficients
from captum_ssm.operators.decays import chunk_decays, decayed_products, heads_first
from captum_ssm.relevance.stacked import Stacked
from captum_ssm.relevance.states import BackwardStates, ForwardStates, States


class OuterProducts(NamedTuple):
    """The states ``sum_s decay_ts (key_s value_s^T)``, where the decay weighs the rows, one for each n."""

    decay: Tensor
    """(B, H, T, S, N), or (B, H, T, S, 1) if all n share one."""
    keys: Tensor
    """(B, H, S, N)."""
    values: Tensor
    """(B, H, S, P)."""


@dataclass(frozen=True)
class ImplicitStates(States):
    """States that are sums of decayed outer products, ``sum_s decay_ts key_s value_s^T + edge_decay_t edge``.

    Args:
        terms: The sums over the tokens of the chunk.
        edge_decay: (B, H, T, N), or (B, H, T, 1) if all n share one: between token t and the edge of the chunk.
        edge: (B, H, N, P), the state at the edge of the chunk: before it for states, after it for multipliers.
    """

    terms: Sequence[OuterProducts]
    edge_decay: Tensor
    edge: Tensor

    def over_channels(self, v: Tensor) -> Tensor:
        """Return ``sum_p state_np v_p``, (B, H, T, N), for ``v`` (B, H, T, P)."""
        total = self.edge_decay * (v @ self.edge.mT)  # (B, H, T, N)
        for decay, keys, values in self.terms:
            total = total + _decayed_sum(decay, keys, weights=v @ values.mT)
        return total

    def over_states(self, q: Tensor) -> Tensor:
        """Return ``sum_n q_n state_np``, (B, H, T, P), for ``q`` (B, H, T, N)."""
        total = (q * self.edge_decay) @ self.edge  # (B, H, T, P)
        for decay, keys, values in self.terms:
            total = total + decayed_products(q, decay, keys) @ values
        return total

    def inner(self, other: ImplicitStates) -> Tensor:
        """Return ``sum_p state_np other_np``, (B, H, T, N), or its sum over n too, (B, H, T, 1), if decays are shared.

        The product of two sums of outer products has four parts: edge and edge, each edge with the other's terms, and
        terms with terms.
        """
        by_state = self.edge_decay.shape[-1] > 1  # else all n share the decays, and the sum over n comes first
        edges = (self.edge * other.edge).sum(-1).unsqueeze(-2)  # (B, H, 1, N)
        total = self.edge_decay * other.edge_decay * (edges if by_state else edges.sum(-1, keepdim=True))
        for one, two in ((self, other), (other, self)):
            for decay, keys, values in one.terms:
                crossed = keys * (values @ two.edge.mT)  # (B, H, S, N)
                summed = (
                    _decayed_sum(decay, crossed) if by_state else decay.squeeze(-1) @ crossed.sum(-1, keepdim=True)
                )  # (B, H, T, N or 1)
                total = total + summed * two.edge_decay
        for one_term in self.terms:
            for other_term in other.terms:
                total = total + _inner_of_terms(one_term, other_term, by_state)
        return total

    def mean(self, function: Callable[[ImplicitStates], Tensor], share: float = 0.5) -> Tensor:
        """Return the mean of the function of the value's states, with this share, and of the reference's."""
        value, reference = map(function, self._unstacked())  # each with B examples
        return torch.lerp(reference, value, share)

    def _unstacked(self) -> list[ImplicitStates]:
        """Return the states of the value, and the states of the reference."""
        terms = [[Stacked(t).pair for t in term] for term in self.terms]
        edge_decay, edge = Stacked(self.edge_decay).pair, Stacked(self.edge).pair
        return [
            ImplicitStates([OuterProducts(*(t[side] for t in term)) for term in terms], edge_decay[side], edge[side])
            for side in range(2)
        ]


def implicit_states(coefficients: Coefficients[Tensor], x: Tensor, h: Tensor) -> ForwardStates:
    """Return the states of a chunk of a recurrence.

    Args:
        coefficients: Of value and reference, stacked, each (2B or 1, T, H or 1, N or 1).
        x: Input, stacked, (2B, H, T, P).
        h: State before the chunk, stacked, (2B, H, N, P).

    Returns:
        The states after and before each token, as :class:`ImplicitStates`, and with a delta rule the recalled values.
    """
    N = h.shape[2]
    decays = chunk_decays(coefficients.a)  # between (2B, H, T, T, N or 1), since_start (2B, H, T, N or 1)
    before_token = decays.before_token()
    b = heads_first(coefficients.b, N)  # (2B, H, T, N)
    after = [OuterProducts(decays.between, b, x)]
    before = [OuterProducts(before_token.between, b, x)]
    w = None
    if isinstance(coefficients, DeltaCoefficients):  # w depends on itself: the chunk's own erasures are in h_{t-1}
        recall, erase = heads_first(coefficients.recall, N), heads_first(coefficients.erase, N)  # (2B, H, T, N)
        R = decayed_products(recall, before_token.between, erase)  # (2B, H, T, T), strictly lower triangular
        without_erasures = ImplicitStates(before, before_token.since_start, h).over_states(recall)  # (2B, H, T, P)
        w = torch.linalg.solve_triangular(R, without_erasures, upper=False, unitriangular=True)  # (2B, H, T, P)
        after.append(OuterProducts(decays.between, -erase, w))
        before.append(OuterProducts(before_token.between, -erase, w))
    return ForwardStates(
        ImplicitStates(after, decays.since_start, h),
        ImplicitStates(before, before_token.since_start, h),
        w if w is None else Stacked(w),
    )


def implicit_multipliers(coefficients: Coefficients[Tensor], dy: Tensor, G: Tensor, lag: int) -> BackwardStates:
    """Return the multipliers of the states of a chunk of a recurrence.

    Args:
        coefficients: Means over value and reference, each (B or 1, T, H or 1, N or 1).
        dy: Multipliers of the output (B, H, T, P).
        G: Multipliers of the state after the chunk (B, H, N, P).
        lag: 1 if the state is read before the current token is written, else 0.

    Returns:
        The multipliers of the state after each token, as :class:`ImplicitStates`, with a delta rule k, and the
        multipliers of the state before the chunk.
    """
    N = G.shape[2]
    decays = chunk_decays(coefficients.a)  # between (B, H, T, T, N or 1), since_start (B, H, T, N or 1)
    before_token = decays.before_token()
    # [t, s]: from the state after token t to the state after, or before, a later token s; (B, H, T, T, N or 1)
    to_after, to_before = (d.between.transpose(2, 3) for d in (decays, before_token))
    c = heads_first(coefficients.c, N)  # (B, H, T, N)
    terms = [OuterProducts(to_before if lag else to_after, c, dy)]
    from_start = (before_token if lag else decays).since_start * c  # (B, H, T, N): c_t, until the chunk's start
    reads_of_start = [(from_start, dy)]
    k = None
    if isinstance(coefficients, DeltaCoefficients):  # k depends on itself: later recalls are in g_t
        recall, erase = heads_first(coefficients.recall, N), heads_first(coefficients.erase, N)  # (B, H, T, N)
        R = decayed_products(recall, before_token.between, erase)  # (B, H, T, T), strictly lower triangular
        without_recalls = ImplicitStates(terms, decays.until_end(), G).over_states(erase)  # (B, H, T, P)
        k = torch.linalg.solve_triangular(R.mT, without_recalls, upper=True, unitriangular=True)  # (B, H, T, P)
        terms.append(OuterProducts(to_before, -recall, k))
        reads_of_start.append((-before_token.since_start * recall, k))
    before_chunk = decays.of_chunk() * G  # (B, H, N, P)
    for keys, values in reads_of_start:
        before_chunk = before_chunk + keys.mT @ values
    return BackwardStates(ImplicitStates(terms, decays.until_end(), G), k, before_chunk)


def _inner_of_terms(one: OuterProducts, two: OuterProducts, by_state: bool) -> Tensor:
    """Return ``sum_p`` of the product of two states, (B, H, T, N) by state, else its sum over n too, (B, H, T, 1)."""
    if by_state:
        shared = torch.einsum("...ij,...jn,...tjn->...tin", one.values @ two.values.mT, two.keys, two.decay)
        return torch.einsum("...tin,...in,...tin->...tn", one.decay, one.keys, shared)
    pairs = (one.keys @ two.keys.mT) * (one.values @ two.values.mT)  # (B, H, S, S)
    return ((one.decay.squeeze(-1) @ pairs) * two.decay.squeeze(-1)).sum(-1, keepdim=True)


def _decayed_sum(decay: Tensor, keys: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return ``sum_s decay_tsn weights_ts keys_sn``, (B, H, T, N), with weights (B, H, T, S) or without."""
    if weights is None:
        return torch.einsum("...tsn,...sn->...tn", decay, keys)
    if decay.shape[-1] == 1:
        return (decay.squeeze(-1) * weights) @ keys
    return torch.einsum("...tsn,...ts,...sn->...tn", decay, weights, keys)
