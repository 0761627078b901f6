"""The states of chunks as decayed sums of outer products: best where many channels share a state's decay."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_ssm.operators.chunk import states_between
from captum_ssm.operators.coefficient import Coefficients, DeltaCoefficients
from captum_ssm.operators.decays import ChunkDecays, chunk_decays, decayed_products, heads_first
from captum_ssm.operators.delta import hand_on_with_erasures, unit_triangular_solution
from captum_ssm.relevance.stacked import Stacked
from captum_ssm.relevance.states import BackwardStates, ForwardStates, Mean, States


class InnerProducts:
    """The products ``u v^T`` over channels of the tensors of some chunks, each computed once.

    The multipliers of several coefficients are contractions of the same inputs, outputs and states.
    """

    def __init__(self) -> None:
        self._known: dict[tuple[int, int], tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, u: Tensor | Mean, v: Tensor) -> Tensor:
        """Return ``u v^T``, (..., T, S), for ``u`` (..., T, P) and ``v`` (..., S, P)."""
        if isinstance(u, Mean):
            return torch.lerp(self(u.reference, v), self(u.value, v), u.share)
        if (id(v), id(u)) in self._known:
            return self._known[id(v), id(u)][0].mT
        if (id(u), id(v)) not in self._known:
            self._known[id(u), id(v)] = u @ v.mT, u, v  # which keeps the tensors, and their numbers
        return self._known[id(u), id(v)][0]


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
        products: Of the values and edges, in all states of the chunks.
    """

    terms: Sequence[OuterProducts]
    edge_decay: Tensor
    edge: Tensor
    products: InnerProducts

    def over_channels(self, v: Tensor | Mean) -> Tensor:
        """Return ``sum_p state_np v_p``, (B, H, T, N), for ``v`` (B, H, T, P)."""
        total = self.edge_decay * self.products(v, self.edge)  # (B, H, T, N)
        for decay, keys, values in self.terms:
            total += _decayed_sum(decay, keys, weights=self.products(v, values))
        return total

    def over_states(self, q: Tensor) -> Tensor:
        """Return ``sum_n q_n state_np``, (B, H, T, P), for ``q`` (B, H, T, N)."""
        total = (q * self.edge_decay) @ self.edge  # (B, H, T, P)
        for decay, keys, values in self.terms:
            total += decayed_products(q, decay, keys) @ values
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
                crossed = keys * self.products(values, two.edge)  # (B, H, S, N)
                summed = (
                    _decayed_sum(decay, crossed) if by_state else decay.squeeze(-1) @ crossed.sum(-1, keepdim=True)
                )  # (B, H, T, N or 1)
                total = total + summed * two.edge_decay
        for one_term in self.terms:
            for other_term in other.terms:
                total = total + self._inner_of_terms(one_term, other_term, by_state)
        return total

    def _inner_of_terms(self, one: OuterProducts, two: OuterProducts, by_state: bool) -> Tensor:
        """Return the product of two states over p, (B, H, T, N) by state, else its sum over n too, (B, H, T, 1)."""
        of_values = self.products(one.values, two.values)  # (B, H, S, S)
        if by_state:
            shared = torch.einsum("...ij,...jn,...tjn->...tin", of_values, two.keys, two.decay)
            return torch.einsum("...tin,...in,...tin->...tn", one.decay, one.keys, shared)
        pairs = (one.keys @ two.keys.mT) * of_values
        return ((one.decay.squeeze(-1) @ pairs) * two.decay.squeeze(-1)).sum(-1, keepdim=True)


@dataclass(frozen=True)
class ImplicitPair:
    """The states of the value, and the states of the reference.

    Args:
        value: Of B examples.
        reference: The same.
    """

    value: ImplicitStates
    reference: ImplicitStates

    def mean(self, function: Callable[[ImplicitStates], Tensor], share: float = 0.5) -> Tensor:
        """Return the mean of the function of the value's states, with this share, and of the reference's."""
        return torch.lerp(function(self.reference), function(self.value), share)


def implicit_states(coefficients: Coefficients[Tensor], x: Mean, h: Tensor, products: InnerProducts) -> ForwardStates:
    """Return the states of chunks of a recurrence.

    Args:
        coefficients: Of value and reference, stacked, each (2B or 1, T, H or 1, N or 1).
        x: Input, (B, H, T, P) on each side.
        h: State before each chunk, stacked, (2B, H, N, P).
        products: Of the tensors of these chunks.

    Returns:
        The states after and before each token, as :class:`ImplicitPair`, and with a delta rule the recalled values.
    """
    N, stacked_x = h.shape[2], torch.cat([x.value, x.reference])
    decays = chunk_decays(coefficients.a)  # between (2B, H, T, T, N or 1), since_start (2B, H, T, N or 1)
    before_token = decays.before_token()
    b = heads_first(coefficients.b, N)  # (2B, H, T, N)
    terms, w = [(Stacked(b).pair, (x.value, x.reference))], None
    if isinstance(coefficients, DeltaCoefficients):  # w depends on itself: the chunk's own erasures are in h_{t-1}
        recall, erase = heads_first(coefficients.recall, N), heads_first(coefficients.erase, N)  # (2B, H, T, N)
        R = decayed_products(recall, before_token.between, erase)  # (2B, H, T, T), strictly lower triangular
        writes = [OuterProducts(before_token.between, b, stacked_x)]
        without_erasures = ImplicitStates(writes, before_token.since_start, h, products).over_states(recall)
        w = Mean(*Stacked(unit_triangular_solution(R, without_erasures)).pair)
        terms.append((Stacked(-erase).pair, (w.value, w.reference)))  # (B, H, T, N) and (B, H, T, P)
    edges = Stacked(h).pair

    def pair(decays: ChunkDecays) -> ImplicitPair:
        between, since_start = Stacked(decays.between).pair, Stacked(decays.since_start).pair
        sides = (
            ImplicitStates(
                [OuterProducts(between[side], keys[side], values[side]) for keys, values in terms],
                since_start[side],
                edges[side],
                products,
            )
            for side in range(2)
        )
        return ImplicitPair(*sides)

    return ForwardStates(pair(decays), pair(before_token), w)


def implicit_multipliers(
    coefficients: Coefficients[Tensor], dy: Tensor, G: Tensor, lag: int, products: InnerProducts
) -> BackwardStates:
    """Return the multipliers of the states of chunks of a recurrence, those of an example side by side.

    Args:
        coefficients: Means over value and reference, each (B·C or 1, T, H or 1, N or 1).
        dy: Multipliers of the output (B·C, H, T, P).
        G: Multipliers of the state after the last chunk (B, H, N, P).
        lag: 1 if the state is read before the current token is written, else 0.
        products: Of the tensors of these chunks.

    Returns:
        The multipliers of the state after each token, as :class:`ImplicitStates`, with a delta rule k, and the
        multipliers of the state before the first chunk.
    """
    N = G.shape[2]
    decays = chunk_decays(coefficients.a)  # between (B·C, H, T, T, N or 1), since_start (B·C, H, T, N or 1)
    before_token, of_chunk = decays.before_token(), decays.of_chunk()
    # [t, s]: from the state after token t to the state after, or before, a later token s; (B·C, H, T, T, N or 1)
    to_after, to_before = (d.between.transpose(2, 3) for d in (decays, before_token))
    c = heads_first(coefficients.c, N)  # (B·C, H, T, N)
    terms = [OuterProducts(to_before if lag else to_after, c, dy)]
    from_start = (before_token if lag else decays).since_start * c  # (B·C, H, T, N): c_t, until the chunk's start
    reads = from_start.mT @ dy  # (B·C, H, N, P), of the state before each chunk
    until_end, k = decays.until_end(), None
    if isinstance(coefficients, DeltaCoefficients):  # k depends on itself: later recalls are in g_t
        recall, erase = heads_first(coefficients.recall, N), heads_first(coefficients.erase, N)  # (B·C, H, T, N)
        R = decayed_products(recall, before_token.between, erase)  # (B·C, H, T, T), strictly lower triangular
        of_reads = decayed_products(erase, terms[0].decay, c) @ dy  # (B·C, H, T, P)
        recalled = (before_token.since_start * recall).mT  # (B·C, H, N, T)
        equation = (R.mT, of_reads, erase * until_end)  # k = of_reads + <erase, G>, less what later tokens recall
        hand_on = partial(hand_on_with_erasures, upper=True)
        k, after, before_chunks = _in_reverse(hand_on, G, of_chunk, equation, recalled, reads)
        terms.append(OuterProducts(to_before, -recall, k))
    else:
        after, before_chunks = _in_reverse(states_between, G, of_chunk, reads)
    return BackwardStates(ImplicitStates(terms, until_end, after, products), k, before_chunks)


def _in_reverse(hand_on: Callable[..., tuple[Tensor, ...]], G: Tensor, *of_chunks: Any) -> tuple[Tensor, ...]:
    """Hand multipliers on from the last chunk to the first.

    Args:
        hand_on: Hands states on from the first chunk to the last.
        G: Multipliers of the state after the last chunk (B, H, N, P).
        *of_chunks: Its further arguments, each (B·C or 1, ...), or several of these.

    Returns:
        The results of each chunk (B·C, ...), the last one of them the multipliers of the state after it, and then those
        before the first one (B, H, N, P).
    """

    def reverse(t: Any) -> Any:
        if isinstance(t, tuple):
            return tuple(map(reverse, t))
        return t if len(t) <= len(G) else t.unflatten(0, (len(G), -1)).flip(1).flatten(0, 1)

    *results, before = hand_on(G, *map(reverse, of_chunks))
    return *map(reverse, results), before


def _decayed_sum(decay: Tensor, keys: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return ``sum_s decay_tsn weights_ts keys_sn``, (B, H, T, N), with weights (B, H, T, S) or without."""
    if weights is None:
        return torch.einsum("...tsn,...sn->...tn", decay, keys)
    if decay.shape[-1] == 1:
        return (decay.squeeze(-1) * weights) @ keys
    return torch.einsum("...tsn,...ts,...sn->...tn", decay, weights, keys)
