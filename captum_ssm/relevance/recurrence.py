"""The multipliers of a recurrence, in linear time and without a loop over tokens.

The recurrence::

    w_t = <recall_t, h_{t-1}>
    h_t = a_t h_{t-1} - erase_t w_t + b_t x_t
    y_t = <c_t, h_t>

(a scan has no ``recall``, ``erase`` and ``w``) runs once for the value and once for the reference. Let Δ be the
difference of the two, and ``dy`` the known multipliers of the outputs. Each input and each coefficient of each token
needs a multiplier, such that exactly::

    sum_t <dy_t, Δy_t> = sum_t (multiplier of x_t) Δx_t + (multiplier of a_t) Δa_t + ...

**One product.** ``Δ(u v) = [v] Δu + [u] Δv`` holds for the means ``[v] = p v + (1 - p) v'`` and
``[u] = (1 - p) u + p u'`` of value and reference, with any share p: u has that share of the joint change ``Δu Δv``.
Here p is 1/2, but for the state that ``c`` reads: the state has ``state_share``.

**One step.** The rule, applied to each product, turns the recurrence into one of the differences::

    Δw_t = <[recall_t], Δh_{t-1}> + <[h_{t-1}], Δrecall_t>
    Δh_t = [a_t] Δh_{t-1} + [h_{t-1}] Δa_t - [erase_t] Δw_t - [w_t] Δerase_t + [b_t] Δx_t + [x_t] Δb_t
    Δy_t = <[c_t], Δh_t> + <[h_t], Δc_t>

**All steps.** These are linear in the differences, so the multiplier ``g_t`` of ``h_t`` is a sum over the three uses of
the state: ``y_t`` reads it, it decays into ``h_{t+1}``, and it is recalled in ``w_{t+1}``, whose multiplier is
``-k_{t+1}``::

    k_t = <[erase_t], g_t>
    g_t = [a_{t+1}] g_{t+1} - [recall_{t+1}] k_{t+1} + [c_t] dy_t

This is the same recurrence with the mean coefficients, from the last token to the first, where ``b`` and ``c`` have
changed places, and ``recall`` and ``erase``.

**The multipliers** of inputs and coefficients are then the factors of their differences in Δw, Δh and Δy, each
contracted with the multiplier ``-k``, ``g`` or ``dy`` of that line::

    x_t: <[b_t], g_t>        a_t: g_t . [h_{t-1}]           c_t: <[h_t], dy_t>
    b_t: <g_t, [x_t]>        recall_t: -<[h_{t-1}], k_t>    erase_t: -<g_t, [w_t]>

With ``lag`` 1, token t reads ``h_{t-1}`` instead of ``h_t``.

**Factors.** A coefficient may be a product (``b = delta B``), or the exponential of one (``a = exp(delta A)``); its
multiplier goes on to the factors, and ``b x`` is one product of x and the factors of b, see
:mod:`captum_ssm.relevance.shares`.

**Chunks.** The forward run stores the state before each chunk. The backward run takes the chunks from the last to the
first, each of which hands its first ``g`` on to the one before; all else is done for several chunks at once, as if they
were examples. The contractions of h and g within a chunk are in :mod:`captum_ssm.relevance.states`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_ssm.operators import Recurrence, Scan
from captum_ssm.operators.coefficient import Coefficients, DeltaCoefficients, ScanCoefficients, each
from captum_ssm.operators.decays import heads_first
from captum_ssm.relevance.explicit_states import explicit_multipliers, explicit_states
from captum_ssm.relevance.implicit_states import InnerProducts, implicit_multipliers, implicit_states
from captum_ssm.relevance.shares import ChunkCoefficient
from captum_ssm.relevance.stacked import Stacked
from captum_ssm.relevance.states import BackwardStates, ForwardStates, Mean


def linear_scan(scan: Recurrence, x: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Run a recurrence with constant coefficients for an input and a reference.

    Args:
        scan: The recurrence.
        x: (B, L, H, P).
        reference: (B, L, H, P).

    Returns:
        The outputs (B, L, H, P) for both. The gradient of the first is the adjoint, for which nothing is stored.
    """
    with torch.no_grad():
        if not bool(reference.any()):
            y = scan.mix(x)
            other = torch.zeros_like(y)
        elif x.shape[3] > 1:  # channels share a matrix, which is then computed once for both
            y, other = scan.mix(torch.cat([x, reference], dim=3)).chunk(2, dim=3)
        else:
            y, other = scan.mix(x), scan.mix(reference)
    return _Adjoint.apply(x, y, scan), other  # type: ignore[no-untyped-call]


class _Adjoint(torch.autograd.Function):
    """The output ``y`` of a scan for ``x``, with the adjoint as its gradient."""

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
    """Run a recurrence for a value and a reference that differ in inputs and coefficients.

    Args:
        scan: The recurrence; its own coefficients are not used.
        value: Input (B, L, H, P), and the factors of the coefficients, as :attr:`Recurrence.factors`.
        reference: Input and factors that the value is compared with, of the same shapes.
        state_share: Of the joint change of the state and c, the part that is the state's.

    Returns:
        The outputs (B, L, H, P) for both. The gradient of the first, with respect to the value's input and factors, are
        the multipliers.
    """
    (x, factors), (other_x, other_factors) = value, reference
    with torch.no_grad():
        both_x = Stacked(torch.cat([x, other_x]))  # (2B, L, H, P), also where it is a constant of one example
        both_factors = [Stacked.of(v, r, len(x)) for v, r in zip(factors, other_factors)]
    y, other = _Difference.apply(scan, state_share, both_x, both_factors, x, *factors)  # type: ignore[no-untyped-call]
    return y, other


class _Difference(torch.autograd.Function):
    """Forwards, the recurrence of value and reference; backwards, one recurrence with mean coefficients.

    Only ``inputs``, the value's input and factors, have a gradient: their multipliers.
    """

    @staticmethod
    def forward(
        ctx: Any, scan: Recurrence, state_share: float, x: Stacked, factors: Sequence[Stacked], *inputs: Tensor
    ) -> tuple[Tensor, Tensor]:
        tensors = [factor.tensor for factor in factors]  # each (2B or 1, L or 1, H or 1, N or 1)
        ys, before = zip(*scan.with_factors(tensors).chunks(x.tensor))  # by span: (2B, C·T, H, P), (2B·C, H, N, P)
        ctx.structure = scan.with_factors([x.tensor.new_empty((0,) * 4)] * len(factors))
        ctx.shapes, ctx.state_share = [t.shape for t in inputs], state_share
        ctx.save_for_backward(x.tensor, *tensors, *before)
        y, other = torch.cat(ys, dim=1).chunk(2)
        ctx.mark_non_differentiable(other)
        return y, other

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        x, *others = ctx.saved_tensors
        factors, before = others[: len(ctx.shapes) - 1], others[len(ctx.shapes) - 1 :]
        scan, B = ctx.structure.with_factors(factors), len(dy)
        of_x, *of_factors = (dy.new_zeros(shape) for shape in ctx.shapes)
        G = dy.new_zeros(B, *before[0].shape[1:])  # (B, H, N, P), of the state after the span
        P = G.shape[3]
        for span, h in reversed([*zip(scan.spans(x), before)]):
            chunks = _Chunks(scan.folded(span, 2 * B), heads_first(span.folded(x, 2 * B), P), h)
            multipliers = _multipliers_of_chunks(chunks, heads_first(span.folded(dy, B), P), G, ctx.state_share)
            of_x[:, span.tokens], G = span.unfolded(multipliers.of_x.transpose(1, 2), B), multipliers.before_chunks
            for total, multiplier in zip(of_factors, multipliers.of_factors):
                if multiplier is not None:
                    entries = total[:, span.tokens] if total.shape[1] > 1 else total
                    entries += span.unfolded(multiplier, B).sum_to_size(entries.shape)
        return None, None, None, None, of_x, *of_factors


@dataclass(frozen=True)
class _Chunks:
    """Chunks that follow one another of the recurrence of value and reference, those of an example side by side.

    Args:
        scan: The recurrence; its factors are stacked, (2B·C or 1, T or 1, H or 1, N or 1).
        x: Input, stacked, (2B·C, H, T, P).
        h: State before each chunk, stacked, (2B·C, H, N, P).
    """

    scan: Recurrence
    x: Tensor
    h: Tensor

    @property
    def lag(self) -> int:
        """1 if the state is read before the current token is written, else 0."""
        return getattr(self.scan, "lag", 0)

    @property
    def by_states(self) -> bool:
        """Whether the chunks go through explicit states, see :meth:`Scan.by_states`."""
        return isinstance(self.scan, Scan) and self.scan.by_states(self.x.transpose(1, 2))


class _Multipliers(NamedTuple):
    """The result of the chunks' backward run."""

    of_x: Tensor
    """(B·C, H, T, P)."""
    of_factors: list[Tensor | None]
    """Of every factor of every coefficient, in the factor's shape with B·C examples; None of a constant."""
    before_chunks: Tensor
    """Of the state before the first chunk, (B, H, N, P)."""


def _multipliers_of_chunks(chunks: _Chunks, dy: Tensor, G: Tensor, state_share: float) -> _Multipliers:
    """Run chunks that follow one another backwards.

    Args:
        chunks: The chunks.
        dy: Multipliers of the output (B·C, H, T, P).
        G: Multipliers of the state after the last chunk (B, H, N, P).
        state_share: Of the joint change of the state and c, the part that is the state's.

    Returns:
        The multipliers of the input, the factors and the state before the first chunk.
    """
    T, N, x = dy.shape[2], G.shape[2], Mean(*Stacked(chunks.x).pair)
    products = chunks.scan.products
    coefficients = each(lambda product: ChunkCoefficient(product, T), products)._replace(
        b=ChunkCoefficient(products.b, T, further_factors=1),  # x shares the product of b's factors
        c=ChunkCoefficient(products.c, T, share=state_share),
    )
    stacked = each(lambda coefficient: coefficient.evaluated.tensor, coefficients)  # (2B·C or 1, T, H or 1, N or 1)
    means = each(ChunkCoefficient.mean, coefficients)  # (B·C or 1, T, H or 1, N or 1)

    if chunks.by_states:
        h, backward = explicit_states(stacked, chunks.x, chunks.h), explicit_multipliers(means, dy, G, chunks.lag)
    else:
        known = InnerProducts()
        h = implicit_states(stacked, x, chunks.h, known)
        backward = implicit_multipliers(means, dy, G, chunks.lag, known)
    of_coefficients = _multipliers_of_coefficients(x, chunks.lag, h, backward, dy, state_share)
    of_factors = (c.multipliers_of_factors(m) for c, m in zip(coefficients, of_coefficients))
    return _Multipliers(
        of_x=backward.g.over_states(heads_first(means.b, N)),
        of_factors=[multiplier for multipliers in of_factors for multiplier in multipliers],
        before_chunks=backward.before_chunks,
    )


_Multiplier = Callable[[float], Tensor]
"""A coefficient's multiplier (B, H, T, N or 1) at a point of the line from reference to value. Only the multiplier of b
depends on the point, because x is one of the factors of the product."""


def _multipliers_of_coefficients(
    x: Mean, lag: int, states: ForwardStates, multipliers: BackwardStates, dy: Tensor, state_share: float
) -> Coefficients[_Multiplier]:
    """Return the multipliers of the coefficients as contractions of states: the table of this module.

    Args:
        x: Input (B·C, H, T, P).
        lag: 1 if the state is read before the current token is written, else 0.
        states: The states of the chunks, h and w.
        multipliers: The multipliers of their states, g and k.
        dy: Multipliers of the output (B·C, H, T, P).
        state_share: Of the joint change of the state and c, the part that is the state's.

    Returns:
        One function for each coefficient.
    """
    g, k = multipliers.g, multipliers.k
    before, read = states.before, states.before if lag else states.after
    of_scan: ScanCoefficients[_Multiplier] = ScanCoefficients(
        a=lambda _: before.mean(g.inner),
        b=lambda point: g.over_channels(x._replace(share=point)),
        c=lambda _: read.mean(lambda h: h.over_channels(dy), share=1 - state_share),
    )
    if states.recalled is None or k is None:
        return of_scan
    w = states.recalled
    return DeltaCoefficients(
        *of_scan,
        recall=lambda _: -before.mean(lambda h: h.over_channels(k)),
        erase=lambda _: -g.over_channels(w),
    )
