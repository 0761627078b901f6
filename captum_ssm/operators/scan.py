"""The diagonal linear recurrence."""

from __future__ import annotations

from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from captum_ssm.operators.heads import Coefficient, Recurrence, decays_between


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

    def _transposed(self) -> Scan:
        a, b, c = self.map(lambda f: f.flip(1), axis=1).products
        if self.lag == 0:  # the decay between two neighbours belongs to the later one, which is now the earlier
            a = a.map(lambda f: f.roll(1, 1), axis=1)
        return replace(self, a=a, b=c, c=b)

    def _mix(self, x: Tensor) -> Tensor:
        """Run the recurrence on ``x`` (B, L, H, P): a loop over chunks that hands on the state."""
        B, L, H, P = x.shape
        a, b, c = self.products
        N = max(p.shape[3] for p in (a, b, c))
        step, T = (_by_states, _STATES // (B * H * N)) if P == 1 else (_by_matrix, 64 if a.shape[3] == 1 else 16)
        T = self.chunk or min(max(T, 16), L)
        h = x.new_zeros(B, H, N, P)
        outputs = []
        for start in range(0, L, T):
            stop = min(start + T, L)
            at, bt, ct = (p.tokens(start, stop) for p in (a, b, c))
            y, h = step(at, bt, ct, x[:, start:stop], h, self.lag)
            outputs.append(y)
        return torch.cat(outputs, dim=1)


_STATES = 2**18
"""Number of states of a chunk that fit a processor's cache."""


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
    a, writes = a.unsqueeze(-1), (b.unsqueeze(-1) * x.unsqueeze(-2)).expand(-1, -1, *h.shape[1:])
    first = writes[:, :1] + a[:, :1] * h.unsqueeze(1)
    states = prefix(a, torch.cat([first, writes[:, 1:]], dim=1))
    read = torch.cat([h.unsqueeze(1), states[:, :-1]], dim=1) if lag else states
    return (c.unsqueeze(-1) * read).sum(-2), states[:, -1]


def prefix(a: Tensor, v: Tensor) -> Tensor:
    """Return all states of ``h_t = a_t h_{t-1} + v_t``, ``h_{-1} = 0``, along axis 1.

    Neighbours are merged into pairs, the sequence of pairs, half as long, is solved likewise, and the
    states between the pairs follow in one step. Cost: O(T) work in O(log T) steps.

    Args:
        a: Decays, broadcastable to ``v``, of full length T along axis 1; the first one is not used.
        v: What each token writes, (B, T, ...).

    Returns:
        The states, shaped as ``v``.
    """
    T = v.shape[1]
    if T == 1:
        return v
    odd = prefix(a[:, 1::2] * a[:, : T - 1 : 2], v[:, 1::2] + a[:, 1::2] * v[:, : T - 1 : 2])
    h = torch.empty_like(v)
    h[:, 0] = v[:, 0]
    h[:, 1::2] = odd
    h[:, 2::2] = v[:, 2::2] + a[:, 2::2] * odd[:, : (T - 1) // 2]
    return h


def _by_matrix(a: Tensor, b: Tensor, c: Tensor, x: Tensor, h: Tensor, lag: int) -> tuple[Tensor, Tensor]:
    """Run one chunk through its (T, T) attention: best where many channels or columns share it.

    Arguments and results are those of :func:`_by_states`. Cost: O(T²·H·(N + P) + T·H·N·P).
    """
    between = decays_between(a)  # [t, s]: the decay until t of what s wrote
    since = a.cumprod(1)  # the decay until t of the state before the chunk
    carried = since[:, -1].unsqueeze(-1) * h + torch.einsum("bshn,bshp->bhnp", between[:, -1] * b, x)
    if lag:  # the state is read one token earlier
        between = torch.cat([torch.zeros_like(between[:, :1]), between[:, :-1]], dim=1)
        since = torch.cat([torch.ones_like(since[:, :1]), since[:, :-1]], dim=1)
    if a.shape[3] == 1:
        alpha = torch.einsum("bthn,bshn->btsh", c, b) * between.squeeze(-1)
    else:
        alpha = (c.unsqueeze(2) * between * b.unsqueeze(1)).sum(-1)
    y = torch.einsum("btsh,bshp->bthp", alpha, x) + torch.einsum("bthn,bhnp->bthp", c * since, h)
    return y, carried
