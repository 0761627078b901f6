"""The rules of relevance for a recurrence, in linear time and without a loop over tokens.

Every product of ``h_t = a_t h_{t-1} - erase_t w_t + b_t x_t``, ``w_t = <recall_t, h_{t-1}>``, ``y_t = <c_t, h_t>`` has
two factors that may change. With a mean of the other factor as each one's multiplier (of equal weights, but for c and
the state that it reads), the multiplier ``g_t`` of the
state runs backwards through the same recurrence with mean coefficients, and each coefficient's is ``g`` times the mean
of what it is multiplied by::

    x_t: <b_t, g_t>          a_t: g_t . h_{t-1}           c_t: <h_t, dy_t>
    b_t: <g_t, x_t>          recall_t: -<h_{t-1}, k_t>    erase_t: -<g_t, w_t>

with ``k_t = <erase_t, g_t>``. All are contractions of two families of states, ``h`` and ``g``, that need not be there
as such: each is a sum of decayed outer products.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial, reduce
from operator import add, mul
from typing import Any, Protocol

import torch
from torch import Tensor

from captum_ssm.operators import Product, Recurrence, Scan
from captum_ssm.operators.scan import decays, earlier, heads_first, states_from, suffix
from captum_ssm.relevance.slopes import slope_of_exp

_NODES = {2: (0.5,), 4: (0.5 - 0.5 / 3**0.5, 0.5 + 0.5 / 3**0.5)}
"""Gauss's points on (0, 1). The mean over them of a product's gradient, each factor on the line from reference to
value, is the Shapley value of up to so many factors."""


def linear_scan(scan: Recurrence, x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Return a recurrence's outputs for ``x`` (B, L, H, P) and a reference, with constant coefficients.

    Nothing is kept for the gradient of the first: it is the adjoint.
    """
    with torch.no_grad():
        if x.shape[3] > 1:  # channels that share a matrix, which is then computed once
            y, other = scan.mix(torch.cat([x, reference], dim=3)).chunk(2, dim=3)
        else:
            y, other = scan.mix(x), scan.mix(reference)
    return _Adjoint.apply(x, y, scan), other  # type: ignore[no-untyped-call]


class _Adjoint(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, scan: Recurrence) -> Tensor:
        ctx.scan = scan
        return y.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return ctx.scan.transposed().mix(gradient.flip(1)).flip(1), None, None


def difference_of_scans(
    scan: Recurrence,
    value: tuple[Tensor, Sequence[Tensor]],
    reference: tuple[Tensor, Sequence[Tensor]],
    state_share: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Return a recurrence's outputs for a value and a reference; the first with the multipliers as its gradient.

    Args:
        scan: The recurrence; its own coefficients are not used.
        value: Input (B, L, H, P) and factors of the coefficients.
        reference: Likewise.
        state_share: Of what the state and c change together, the part that is the state's.
    """
    (x, factors), (other_x, other_factors) = value, reference
    with torch.no_grad():
        both = [torch.cat([x, other_x]), *(_beside(v, r, len(x)) for v, r in zip(factors, other_factors))]
    y, other = _Difference.apply(scan, state_share, both, x, *factors)  # type: ignore[no-untyped-call]
    return y, other


def _beside(value: Tensor, other: Tensor, B: int) -> Tensor:
    """Return the value and the reference as the two halves of a batch (2B, ...); a shared constant stays shared."""
    shared = value is other and len(value) == 1
    return value if shared else torch.cat([t.expand(B, -1, -1, -1) for t in (value, other)])


def _sides(beside: Tensor) -> Sequence[Tensor]:
    """Return the value and the reference again, each (B, ...), or (1, ...) if they share it."""
    return (beside, beside) if len(beside) == 1 else beside.chunk(2)


class _Difference(torch.autograd.Function):
    """A recurrence of value and reference beside each other forwards; backwards one, with mean coefficients."""

    @staticmethod
    def forward(
        ctx: Any, scan: Recurrence, state_share: float, beside: Sequence[Tensor], *own: Tensor
    ) -> tuple[Tensor, Tensor]:
        x, *factors = beside
        ys, before = zip(*scan.with_factors(factors).chunks(x))
        ctx.structure = scan.with_factors([x.new_empty((0,) * 4)] * len(factors))
        ctx.shapes, ctx.state_share = [t.shape for t in own], state_share
        ctx.save_for_backward(torch.stack(before), *beside)
        y, other = torch.cat(ys, dim=1).chunk(2)
        ctx.mark_non_differentiable(other)
        return y, other

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        before, x, *factors = ctx.saved_tensors
        scan = ctx.structure.with_factors(factors)
        dx, *into = (dy.new_zeros(shape) for shape in ctx.shapes)
        T, G = scan.chunk_size(x), torch.zeros_like(_mean(before[0]))
        for number in reversed(range(len(before))):
            part = slice(number * T, min((number + 1) * T, x.shape[1]))
            run = _Run(scan.map(lambda f, part=part: f[:, part], axis=1), x[:, part], before[number])
            dx[:, part], gradients, G = _chunk_gradients(run, dy[:, part], G, ctx.state_share)
            for total, gradient in zip(into, gradients):
                if gradient is not None:
                    where = total[:, part] if total.shape[1] > 1 else total
                    where += gradient.sum_to_size(where.shape)
        return None, None, None, dx, *into


@dataclass(frozen=True)
class _Run:
    """One chunk: the recurrence, input (2B, T, H, P) and state before it, of value and reference beside each other."""

    scan: Recurrence
    x: Tensor
    h: Tensor


def _chunk_gradients(
    run: _Run, dy: Tensor, G: Tensor, state_share: float
) -> tuple[Tensor, list[Tensor | None], Tensor]:
    """Run one chunk backwards.

    Args:
        run: The chunk.
        dy: Multipliers of the output (B, T, H, P).
        G: Multipliers of the state after the chunk (B, H, N, P).
        state_share: As in :func:`difference_of_scans`.

    Returns:
        Multipliers of the input, of every factor of every coefficient, None of a constant, and of the state before.
    """
    T, N = dy.shape[1], G.shape[2]
    exponents = [replace(p, exponential=False).tokens(0, T) if p.exponential else None for p in run.scan.products]
    evaluated = [p.tokens(0, T) if e is None else e.exp() for p, e in zip(run.scan.products, exponents)]
    means = [_mean(t, state_share if k == 2 else 0.5) for k, t in enumerate(evaluated)]  # the third is c
    shares = [_Shares(p, more=int(k == 1)) for k, p in enumerate(run.scan.products)]  # b meets x as a third factor
    means[1] = shares[1].mean().expand(-1, T, -1, -1)

    rest, mean_rest = ([heads_first(t, N) for t in some[1:]] for some in (evaluated, means))
    x, dy = run.x.transpose(1, 2), dy.transpose(1, 2)
    lag = getattr(run.scan, "lag", 0)
    by_states = isinstance(run.scan, Scan) and run.scan.by_states(run.x)
    forwards, backwards = (_explicit, _explicit_adjoint) if by_states else (_implicit, _implicit_adjoint)
    states: tuple[_States, _States, Tensor | None] = forwards(evaluated[0], rest, x, run.h)
    after, before, recalled = states
    adjoint: tuple[_States, Any, Tensor] = backwards(means[0], mean_rest, dy, G, lag)
    g, found, first = adjoint

    value, other = _sides(x)
    gradients: list[Callable[[float], Tensor]] = [
        lambda _: before.mean(g.inner),  # a
        lambda node: g.onto_keys(torch.lerp(other, value, node)),  # b
        lambda _: (before if lag else after).mean(lambda state: state.onto_keys(dy), 1 - state_share),  # c
    ]
    if recalled is not None:
        gradients += [
            lambda _: -before.mean(lambda state: state.onto_keys(found)),
            lambda _: -g.onto_keys(_mean(recalled)),
        ]
    dx = g.onto_values(mean_rest[0]).transpose(1, 2)
    return dx, _to_factors(shares, exponents, evaluated, gradients), first


class _States(Protocol):
    """A state (N, P) for each token of a chunk, known by what it does. Shapes (B, H, T, ...), further axes in front."""

    def onto_keys(self, p: Tensor) -> Tensor:
        """Return ``sum_p state[n, p] p``, (B, H, T, N), for ``p`` (B, H, T, P)."""

    def onto_values(self, q: Tensor) -> Tensor:
        """Return ``sum_n state[n, p] q``, (B, H, T, P), for ``q`` (B, H, T, N)."""

    def inner(self, other: Any) -> Tensor:
        """Return ``sum_p`` of the product of two states, (B, H, T, N), or the sum over n too, (B, H, T, 1)."""

    def mean(self, function: Callable[[Any], Tensor], share: float = 0.5) -> Tensor:
        """Return the mean of what a linear function makes of the value's states, with this share, and the reference's.

        Its own are those of both, (2B, ...).
        """


@dataclass(frozen=True)
class _Explicit:
    """States (B, H, T, N, P) themselves: best where few channels share a state's decay."""

    h: Tensor

    def onto_keys(self, p: Tensor) -> Tensor:
        return _sum(self.h * p.unsqueeze(-2), -1)

    def onto_values(self, q: Tensor) -> Tensor:
        return _sum(self.h * q.unsqueeze(-1), -2)

    def inner(self, other: _Explicit) -> Tensor:
        return _sum(self.h * other.h, -1)

    def mean(self, function: Callable[[_Explicit], Tensor], share: float = 0.5) -> Tensor:
        return function(_Explicit(_mean(self.h, share)))


def _sum(t: Tensor, axis: int) -> Tensor:
    return t.squeeze(axis) if t.shape[axis] == 1 else t.sum(axis)


def _explicit(a: Tensor, rest: Sequence[Tensor], x: Tensor, h: Tensor) -> tuple[_Explicit, _Explicit, None]:
    """Return the states after and before each token of a chunk that starts from ``h``."""
    decay = heads_first(a, a.shape[3]).unsqueeze(-1)
    states = _along_tokens(partial(states_from, h), decay, rest[0].unsqueeze(-1) * x.unsqueeze(-2))
    return _Explicit(states[:, :, 1:]), _Explicit(states[:, :, :-1]), None


def _explicit_adjoint(
    a: Tensor, rest: Sequence[Tensor], dy: Tensor, G: Tensor, lag: int
) -> tuple[_Explicit, None, Tensor]:
    """Return the multipliers of the states of a chunk that ``G`` comes after, and of the state before it."""
    decay = heads_first(a, a.shape[3]).unsqueeze(-1)
    reads = rest[1].unsqueeze(-1) * dy.unsqueeze(-2)
    writes = torch.cat([reads[:, :, 1:], G.unsqueeze(2)], dim=2) if lag else reads
    if not lag:
        writes[:, :, -1] += G
    g = _along_tokens(suffix, decay, writes)
    return _Explicit(g), None, decay[:, :, 0] * g[:, :, 0] + (reads[:, :, 0] if lag else 0)


def _along_tokens(states: Callable[[Tensor, Tensor], Tensor], decay: Tensor, writes: Tensor) -> Tensor:
    return states(decay.transpose(1, 2), writes.transpose(1, 2)).transpose(1, 2)


@dataclass(frozen=True)
class _Implicit:
    """States that are sums of outer products, ``sum_s M_ts beta_s xi_s + m_t E``: best where many channels share them.

    Args:
        terms: Decays M (B, H, T, S, N or 1), keys beta (B, H, S, N), values xi (B, H, S, P).
        m: Decay of the state at the edge of the chunk (B, H, T, N or 1).
        E: That state (B, H, N, P).
    """

    terms: Sequence[tuple[Tensor, Tensor, Tensor]]
    m: Tensor
    E: Tensor

    def onto_keys(self, p: Tensor) -> Tensor:
        found = self.m * (p @ self.E.mT)
        for M, beta, xi in self.terms:
            found = found + _spread(M, p @ xi.mT, beta)
        return found

    def onto_values(self, q: Tensor) -> Tensor:
        found = (q * self.m) @ self.E
        for M, beta, xi in self.terms:
            weights = (
                (q @ beta.mT) * M.squeeze(-1)
                if M.shape[-1] == 1
                else torch.einsum("...tn,...tsn,...sn->...ts", q, M, beta)
            )
            found = found + weights @ xi
        return found

    def inner(self, other: _Implicit) -> Tensor:
        each = self.m.shape[-1] > 1
        edges = (self.E * other.E).sum(-1).unsqueeze(-2)  # (B, H, 1, N)
        found = self.m * other.m * (edges if each else edges.sum(-1, keepdim=True))
        for one, two in ((self, other), (other, self)):
            for M, beta, xi in one.terms:
                crossed = (
                    _spread(M, None, beta * (xi @ two.E.mT)) * two.m
                    if each
                    else (M.squeeze(-1) @ (beta * (xi @ two.E.mT)).sum(-1, keepdim=True)) * two.m
                )
                found = found + crossed
        for M, beta, xi in self.terms:
            for K, gamma, eta in other.terms:
                if each:
                    rows = torch.einsum("...ij,...jn,...tjn->...tin", xi @ eta.mT, gamma, K)
                    found = found + torch.einsum("...tin,...in,...tin->...tn", M, beta, rows)
                else:
                    pairs = (beta @ gamma.mT) * (xi @ eta.mT)
                    found = found + ((M.squeeze(-1) @ pairs) * K.squeeze(-1)).sum(-1, keepdim=True)
        return found

    def mean(self, function: Callable[[_Implicit], Tensor], share: float = 0.5) -> Tensor:
        M, E = _sides(self.m), _sides(self.E)
        terms = [[_sides(t) for t in term] for term in self.terms]
        sides = (_Implicit([(K[k], beta[k], xi[k]) for K, beta, xi in terms], M[k], E[k]) for k in range(2))
        one, two = map(function, sides)
        return torch.lerp(two, one, share)


def _spread(M: Tensor, weights: Tensor | None, keys: Tensor) -> Tensor:
    """Return ``sum_s M_tsn weights_ts keys_sn``."""
    if weights is None:
        return torch.einsum("...tsn,...sn->...tn", M, keys)
    if M.shape[-1] == 1:
        return (M.squeeze(-1) * weights) @ keys
    return torch.einsum("...tsn,...ts,...sn->...tn", M, weights, keys)


def _implicit(a: Tensor, rest: Sequence[Tensor], x: Tensor, h: Tensor) -> tuple[_Implicit, _Implicit, Tensor | None]:
    """Return the states after and before each token of a chunk that starts from ``h``, and what is recalled."""
    between, since = decays(a)
    ahead, until = earlier(between, since)
    b, _, *delta = rest
    after, before = _Implicit([(between, b, x)], since, h), _Implicit([(ahead, b, x)], until, h)
    if not delta:
        return after, before, None
    recall, erase = delta
    R = _between(recall, ahead, erase)
    w = torch.linalg.solve_triangular(R, before.onto_values(recall), upper=False, unitriangular=True)
    after = replace(after, terms=[*after.terms, (between, -erase, w)])
    return after, replace(before, terms=[*before.terms, (ahead, -erase, w)]), w


def _implicit_adjoint(
    a: Tensor, rest: Sequence[Tensor], dy: Tensor, G: Tensor, lag: int
) -> tuple[_Implicit, Tensor | None, Tensor]:
    """Return the multipliers of a chunk's states, of what is recalled, and of the state before the chunk."""
    between, since = decays(a)
    ahead, until = earlier(between, since)
    now, later = (M.transpose(2, 3) for M in (between, ahead))
    _, c, *delta = rest
    g = _Implicit([(later if lag else now, c, dy)], between[:, :, -1], G)
    start = [((until if lag else since) * c, dy)]
    k = None
    if delta:
        recall, erase = delta
        R = _between(recall, ahead, erase)
        k = torch.linalg.solve_triangular(R.mT, g.onto_values(erase), upper=True, unitriangular=True)
        g = replace(g, terms=[*g.terms, (later, -recall, k)])
        start.append((-until * recall, k))
    first = since[:, :, -1].unsqueeze(-1) * G
    for keys, found in start:
        first = first + keys.mT @ found
    return g, k, first


def _between(rows: Tensor, M: Tensor, columns: Tensor) -> Tensor:
    """Return ``[t, s] = sum_n rows_tn M_tsn columns_sn``."""
    if M.shape[-1] == 1:
        return (rows @ columns.mT) * M.squeeze(-1)
    return torch.einsum("...tn,...tsn,...sn->...ts", rows, M, columns)


def _mean(beside: Tensor, share: float = 0.5) -> Tensor:
    """Return the mean of the value, with this share, and the reference."""
    one, two = _sides(beside)
    return one if one is two else torch.lerp(two, one, share)


@dataclass(frozen=True)
class _Shares:
    """A coefficient's factors, on the way from the reference to the value, and how many ``more`` they meet."""

    product: Product
    more: int = 0

    @property
    def nodes(self) -> tuple[float, ...]:
        """Points of the line that are enough for all factors."""
        return _NODES[2 if len(self.product.factors) + self.more <= 2 else 4]

    def at(self, node: float) -> list[Tensor]:
        """Return the factors at a point of the line."""
        sides = map(_sides, self.product.factors)
        return [v if v is r else torch.lerp(r, v, node) for v, r in sides]

    def mean(self) -> Tensor:
        """Return the multiplier of one more factor."""
        return reduce(add, (reduce(mul, self.at(node)) for node in self.nodes)) / len(self.nodes)

    def gradients(self, gradient: Callable[[float], Tensor]) -> list[Tensor | None]:
        """Return the factors' multipliers, None of a constant.

        Args:
            gradient: The multiplier (B, T, H, N or 1) of the product, at a point of the line.
        """
        found: list[Any] = [None if len(factor) == 1 else 0 for factor in self.product.factors]
        for node in self.nodes if any(part is not None for part in found) else ():
            at, whole = self.at(node), gradient(node)
            for k, factor in enumerate(at):
                if found[k] is not None:
                    others = [f for j, f in enumerate(at) if j != k]
                    found[k] = found[k] + _contracted(factor.shape, whole, *others)
        return [part if part is None else part / len(self.nodes) for part in found]


def _contracted(shape: torch.Size, *factors: Tensor) -> Tensor:
    """Return the product of four-dimensional tensors, summed to a shape."""
    kept = "".join(axis for axis, size in zip("bthn", shape) if size > 1)
    return torch.einsum(f"{','.join(['bthn'] * len(factors))}->{kept}", *factors).view(shape)


def _to_factors(
    shares: Sequence[_Shares],
    exponents: Sequence[Tensor | None],
    evaluated: Sequence[Tensor],
    gradients: Sequence[Callable[[float], Tensor]],
) -> list[Tensor | None]:
    """Return the multipliers of all factors from those of the coefficients, see :meth:`_Shares.gradients`."""
    found: list[Tensor | None] = []
    for share, exponent, coefficient, gradient in zip(shares, exponents, evaluated, gradients):
        slope = None if exponent is None else slope_of_exp(*_sides(exponent), *_sides(coefficient))

        def of_product(
            node: float, gradient: Callable[[float], Tensor] = gradient, slope: Tensor | None = slope
        ) -> Tensor:
            whole = gradient(node).transpose(1, 2)
            return whole if slope is None else whole * slope

        found += share.gradients(of_product)
    return found
