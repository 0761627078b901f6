"""The diagonal linear recurrence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate
from operator import mul
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.operators.heads import Coefficient, Product, Recurrence, decays_between


@dataclass(frozen=True)
class Scan(Recurrence):
    """Diagonal linear recurrence, the common form of S6, SSD, RG-LRU, WKV, mLSTM and lightning.

    Head ``h`` with its P channels keeps a state of (N, P)::

        h_t = a_t h_{t-1} + b_t x_t
        y_t = <c_t, h_{t-lag}> + (bonus_t + skip_t) x_t

    so channel d of head h has the attention, for i >= j + lag,
    ``alpha[i, j] = sum_n c_in (prod_{j < k <= i - lag} a_kn) b_jn``, plus ``bonus + skip`` for i = j.

    The sequence is walked in chunks that hand on the state. All decays are products within one chunk:
    nothing is divided and no logarithms are subtracted, so decays may be zero or negative.

    Args:
        a: Decay, a tensor (B, L, H, N) with 1 where it is shared, or a :class:`Product` of such.
        b: Weight of the input, likewise.
        c: Weight of the state in the output, likewise.
        lag: 1 if the state is read before the current token is written (RWKV), else 0.
        head_size: As in :class:`HeadOperator`, with ``skip`` and ``bonus``; ``chunk`` as in :class:`Recurrence`.

    Cost: O(L·D·N) time for one right-hand side; memory for the states of one chunk.

    Source:
        Gu & Dao 2023 (arXiv 2312.00752), equations 2a and 2b; the attention form is equation 13 of Ali,
        Zimerman & Wolf 2024 (arXiv 2403.01590).
    """

    a: Coefficient
    b: Coefficient
    c: Coefficient
    lag: int = field(default=0, kw_only=True)

    coefficients = ("a", "b", "c")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lag not in (0, 1):
            raise ValueError(f"lag must be 0 or 1, not {self.lag}.")

    def transposed(self) -> Scan:
        """Return the scan whose matrix is this one's, transposed and read backwards in time."""
        a, b, c = self.map(lambda f: f.flip(1), axis=1).products
        if self.lag == 0:  # the decay between two neighbours belongs to the later one, which is now the earlier
            a = a.map(lambda f: f.roll(1, 1), axis=1)
        return replace(self, a=a, b=c, c=b)

    def _own(self, like: Tensor) -> Tensor:
        return super()._own(like) if self.lag == 0 else like.new_zeros(1, 1, self.heads)

    def rows(self, band: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Walk through the products of every channel's matrix and a banded one, a few rows at a time.

        The state is kept for each column by itself, so that a row costs as much as one step for all columns.

        Args:
            band: (K, B, L, D): entry ``[k, :, t]`` is what token t - k contributes to the input at t. A channel a head.

        Yields:
            Which rows i, and their entries (B, D, rows, columns), of the columns j up to the last of these rows; all
            others are 0. They are overwritten in the next step.

        Cost: O(L²·D·N) time; memory for the states of all columns, B·D·N·L.
        """
        K, B, L, D = band.shape
        T = _ROWS
        a, b, c = (_chunked(p.tokens(0, L), T) for p in self.products)
        near, last = _chunk_matrices(a, b, c, self.lag)
        since = torch.stack([*accumulate(a, mul)])  # (T, B, D, chunks, N)
        reads = (c * (torch.cat([torch.ones_like(a[:1]), since[:-1]]) if self.lag else since)).movedim(0, -2)
        entering = _unbanded(band, T)
        added, written = near @ entering, last @ entering
        for direct in (self.skip, self.bonus):
            if direct is not None:
                added += _chunked(direct.expand(B, L, D).unsqueeze(-1), T).movedim(0, -2) * entering

        h, buffer = band.new_zeros(B, D, last.shape[-2], L), band.new_empty(B * D * T * L)
        for g, start in enumerate(range(0, L, T)):
            stop = min(start + T, L)
            new = slice(max(0, start - K + 1), stop)  # the columns that enter these rows
            own = slice(new.start - (start - K + 1), stop - (start - K + 1))
            y = buffer[: B * D * (stop - start) * stop].view(B, D, stop - start, stop)
            y[..., start:] = 0
            torch.matmul(reads[:, :, g, : stop - start], h[..., :start], out=y[..., :start])
            y[..., new] += added[:, :, g, : stop - start, own]
            yield slice(start, stop), y
            h[..., :start] *= since[-1, :, :, g, :, None]
            h[..., new] += written[:, :, g, :, own]

    def by_states(self, x: Tensor) -> bool:
        """Whether ``x`` (B, L, H, P) goes through all states: a matrix pays off where many columns share it."""
        a, *others = self.products
        P, N = x.shape[3], max(p.shape[3] for p in (a, *others))
        return P == 1 or (P <= N and a.shape[3] > 1)

    def chunk_size(self, x: Tensor) -> int:
        """Return T, the tokens of a chunk for ``x`` (B, L, H, P)."""
        B, L, H, P = x.shape
        N = max(p.shape[3] for p in self.products)
        T = max(_STATES // (B * H * N * P), 16) if self.by_states(x) else matrix_size(self.products[0])
        return self.chunk or min(T, L)

    def chunks(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Run the recurrence on ``x`` (B, L, H, P), see :meth:`Recurrence.chunks`."""
        B, L, H, P = x.shape
        a, b, c = self.products
        step, T = _by_states if self.by_states(x) else _by_matrix, self.chunk_size(x)
        h = x.new_zeros(B, H, max(p.shape[3] for p in (a, b, c)), P)
        for start in range(0, L, T):
            stop = min(start + T, L)
            before = h
            at, bt, ct = (p.tokens(start, stop) for p in (a, b, c))
            y, h = step(at, bt, ct, x[:, start:stop], h, self.lag)
            yield y, before


_STATES = 2**17
"""Number of states of a chunk that fit a processor's cache."""

_ROWS = 16
"""Rows of a step of :meth:`Scan.rows`."""

_FEW = 32
"""Tokens that :func:`prefix` takes one by one: fewer operations than those of pairs."""


def _chunked(coefficient: Tensor, T: int) -> Tensor:
    """Return ``coefficient`` (B, L, D or 1, N) in chunks of T tokens, (T, B, D or 1, chunks, N), filled up with 0."""
    filled = F.pad(coefficient, (0, 0, 0, 0, 0, -coefficient.shape[1] % T))
    return filled.unflatten(1, (-1, T)).permute(2, 0, 3, 1, 4).contiguous()


def _unbanded(band: Tensor, T: int) -> Tensor:
    """Return what enters each chunk of T rows, (B, D, chunks, T, T + K - 1), of a band (K, B, L, D).

    The first column of a chunk is that of the token K - 1 before its first row.
    """
    K, _, L, _ = band.shape
    rows = F.pad(band, (0, 0, 0, -L % T)).unflatten(2, (-1, T)).permute(1, 4, 2, 3, 0)  # (B, D, chunks, T, K)
    matrix = band.new_zeros(*rows.shape[:-1], T + K - 1)
    t = torch.arange(T, device=band.device)
    for k in range(K):
        matrix[..., t, t + K - 1 - k] = rows[..., k]
    return matrix


def _chunk_matrices(a: Tensor, b: Tensor, c: Tensor, lag: int) -> tuple[Tensor, Tensor]:
    """Return the matrices of chunks, and what each of their tokens leaves in the state after them.

    Args:
        a: Decays (T, B or 1, D or 1, chunks, N or 1).
        b: Weights of the input, likewise.
        c: Weights of the state, likewise.
        lag: As in :class:`Scan`.

    Returns:
        (B, D, chunks, T, T) and (B, D, chunks, N, T).
    """
    shape = torch.broadcast_shapes(a.shape, b.shape, c.shape)
    left, matrix = a.new_empty(shape), a.new_zeros(*shape[1:-1], shape[0], shape[0])
    for t in range(len(left)):
        if lag:
            matrix[..., t, :t] = torch.einsum("...n,s...n->...s", c[t], left[:t])
        left[:t] *= a[t]
        left[t] = b[t]
        if not lag:
            matrix[..., t, : t + 1] = torch.einsum("...n,s...n->...s", c[t], left[: t + 1])
    return matrix, left.movedim(0, -1)


def _by_states(a: Tensor, b: Tensor, c: Tensor, x: Tensor, h: Tensor, lag: int) -> tuple[Tensor, Tensor]:
    """Run one chunk through all its states: best where few channels share a state's decay.

    Args:
        a: Decays (B or 1, T, H or 1, N or 1).
        b: Weights of the input, likewise.
        c: Weights of the state, likewise.
        x: (B, T, H, P).
        h: (B, H, N, P), the state before the chunk.
        lag: As in :class:`Scan`.

    Returns:
        Output (B, T, H, P) and the state after the chunk (B, H, N, P). Cost: O(T·H·N·P).
    """
    y, h = _States.apply(a, b, c, x, h, lag)  # type: ignore[no-untyped-call]
    return y, h


class _States(torch.autograd.Function):
    """The chunk of :func:`_by_states`, and its gradient: the same recurrence from the last token to the first.

    With ``g`` the gradient at the states, ``g_t = a_{t+1} g_{t+1} + c_t dF/dy_t``, the gradients of the coefficients
    are ``dF/da_t = g_t h_{t-1}``, ``dF/db_t = g_t x_t`` and ``dF/dc_t = dF/dy_t h_t``. The states are computed anew
    rather than kept, and each gradient takes one pass over them.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor, c: Tensor, x: Tensor, h: Tensor, lag: int) -> tuple[Tensor, Tensor]:
        states = _states(a, b, x, h)
        return (c.unsqueeze(-1) * (states[:, :-1] if lag else states[:, 1:])).sum(-2), states[:, -1].clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.lag = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dh: Tensor) -> tuple[Tensor | None, ...]:
        a, b, c, x, h = ctx.saved_tensors
        states = _states(a, b, x, h)
        before, states = states[:, :-1], states[:, 1:]
        reads = (c.unsqueeze(-1) * dy.unsqueeze(-2)).expand_as(states)  # what each read adds to the gradient
        last = dh.unsqueeze(1)
        if ctx.lag:  # token t reads the state before it
            writes = torch.cat([reads[:, 1:], last], dim=1)
        else:
            writes = torch.cat([reads[:, :-1], reads[:, -1:] + last], dim=1)
        g = suffix(a.unsqueeze(-1), writes)
        first = a[:, 0].unsqueeze(-1) * g[:, 0] + (reads[:, 0] if ctx.lag else 0)
        gradients = (
            (g * before).sum(-1),
            (g * x.unsqueeze(-2)).sum(-1),
            (dy.unsqueeze(-2) * (before if ctx.lag else states)).sum(-1),
            (b.unsqueeze(-1) * g).sum(-2),
            first,
        )
        return *(d.sum_to_size(t.shape) for d, t in zip(gradients, (a, b, c, x, h))), None


def _states(a: Tensor, b: Tensor, x: Tensor, h: Tensor) -> Tensor:
    """Return the state before a chunk and those after each of its tokens, (B, T + 1, H, N, P)."""
    writes = (b.unsqueeze(-1) * x.unsqueeze(-2)).expand(-1, -1, *h.shape[1:])
    return states_from(h, a.unsqueeze(-1), writes)


def prefix(a: Tensor, v: Tensor) -> Tensor:
    """Return all states of ``h_t = a_t h_{t-1} + v_t``, ``h_{-1} = 0``, along axis 1.

    A few tokens follow one after the other. Of more, neighbours are merged into pairs, the sequence of pairs, half as
    long, is solved likewise, and the states between the pairs follow in one step. Cost: O(T) work in O(log T) steps.

    Args:
        a: Decays, broadcastable to ``v``, of full length T along axis 1; the first one is not used.
        v: What each token writes, (B, T, ...).

    Returns:
        The states, shaped as ``v``.
    """
    T = v.shape[1]
    if T <= _FEW:
        return torch.stack(_in_turn(a.unbind(1)[1:], v.unbind(1)), 1)
    odd = prefix(a[:, 1::2] * a[:, : T - 1 : 2], v[:, 1::2] + a[:, 1::2] * v[:, : T - 1 : 2])
    h = torch.empty_like(v)
    h[:, 0] = v[:, 0]
    h[:, 1::2] = odd
    h[:, 2::2] = v[:, 2::2] + a[:, 2::2] * odd[:, : (T - 1) // 2]
    return h


def states_from(h: Tensor, a: Tensor, v: Tensor) -> Tensor:
    """Return ``h`` and all states of ``h_t = a_t h_{t-1} + v_t`` after it, (B, T + 1, ...), see :func:`prefix`."""
    if v.shape[1] <= _FEW:
        return torch.stack(_in_turn(a.unbind(1), [h, *v.unbind(1)]), 1)
    return prefix(torch.cat([a[:, :1], a], 1), torch.cat([h.unsqueeze(1), v], 1))


def suffix(a: Tensor, v: Tensor) -> Tensor:
    """Return all states of ``g_t = a_{t+1} g_{t+1} + v_t``, ``g_T = 0``, along axis 1: :func:`prefix` from the end."""
    if v.shape[1] <= _FEW:
        return torch.stack(_in_turn(a.unbind(1)[:0:-1], v.unbind(1)[::-1])[::-1], 1)
    return prefix(a.roll(-1, 1).flip(1), v.flip(1)).flip(1)


def _in_turn(a: Sequence[Tensor], v: Sequence[Tensor]) -> list[Tensor]:
    """Return the states of tokens that write ``v``, one after the other, with the decays between them."""
    return [*accumulate(zip(a, v[1:]), lambda h, step: torch.addcmul(step[1], step[0], h), initial=v[0])]


def _by_matrix(a: Tensor, b: Tensor, c: Tensor, x: Tensor, h: Tensor, lag: int) -> tuple[Tensor, Tensor]:
    """Run one chunk through its (T, T) attention: best where many channels or columns share it.

    Arguments and results are those of :func:`_by_states`. Cost: O(T²·H·(N + P) + T·H·N·P).
    """
    between, since = decays(a)
    b, c, x = (heads_first(t, size) for t, size in ((b, h.shape[2]), (c, h.shape[2]), (x, h.shape[3])))
    carried = since[:, :, -1:].mT * h + (between[:, :, -1] * b).mT @ x
    if lag:  # the state is read one token earlier
        between, since = earlier(between, since)
    y = scores(c, between, b) @ x + (c * since) @ h
    return y.transpose(1, 2), carried


def matrix_size(a: Product) -> int:
    """Return T, the tokens of a chunk that goes through its (T, T) matrices: few if each state has its own."""
    return 64 if a.shape[3] == 1 else 8


def heads_first(t: Tensor, size: int) -> Tensor:
    """Return ``t`` (B, T, H, size), or 1 in place of the size, as (B, H, T, size)."""
    return t.expand(-1, -1, -1, size).transpose(1, 2)


def decays(a: Tensor) -> tuple[Tensor, Tensor]:
    """Return how far the decays ``a`` (B, T, H, N) of a chunk take, until t, what s wrote and the state before it.

    Returns:
        ``[t, s]`` (B, H, T, T, N), 0 for s > t, and ``[t]`` (B, H, T, N).
    """
    return decays_between(a).permute(0, 3, 1, 2, 4), a.transpose(1, 2).cumprod(2)


def earlier(between: Tensor, since: Tensor) -> tuple[Tensor, Tensor]:
    """Return what :func:`decays` gave, until t - 1 in place of t."""
    return F.pad(between[:, :, :-1], (0, 0, 0, 0, 1, 0)), F.pad(since[:, :, :-1], (0, 0, 1, 0), value=1.0)


def scores(rows: Tensor, between: Tensor, columns: Tensor) -> Tensor:
    """Return ``[t, s] = sum_n rows_tn between_tsn columns_sn``, (B, H, T, T), of rows and columns (B, H, T, N)."""
    if between.shape[-1] == 1:
        return rows @ columns.mT * between.squeeze(-1)
    return (rows.unsqueeze(3) * between * columns.unsqueeze(2)).sum(-1)
