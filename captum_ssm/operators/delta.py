"""The delta rule: a linear recurrence that erases before it writes."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from captum_ssm.operators.heads import Coefficient, Recurrence, decays_between


@dataclass(frozen=True)
class DeltaScan(Recurrence):
    """Linear recurrence that erases before it writes: the delta rule, exactly.

    Head ``h`` with its P channels keeps a state of (N, P)::

        h_t = a_t h_{t-1} - erase_t <recall_t, h_{t-1}> + b_t x_t
        y_t = <c_t, h_t> + skip_t x_t

    Gated DeltaNet and Kimi delta attention, ``h_t = (I - beta k k^T) diag(a) h_{t-1} + beta k x_t``, have
    ``erase = b = beta k`` and ``recall = a k``; RWKV-7 has a transition of the same form with other vectors.

    Within a chunk what is recalled, ``w_t = <recall_t, h_{t-1}>``, depends on what was erased before: one
    unit-triangular solve of (T, T) a head, no inverse, no (L, L) matrix. Transposition exchanges ``erase`` with
    ``recall`` and ``b`` with ``c``, so the adjoint is the same pass from the last token to the first.

    Args:
        a: Decay, a tensor (B, L, H, N) with 1 where it is shared, or a :class:`Product` of such.
        b: Weight of the input, likewise.
        c: Weight of the state in the output, likewise.
        recall: What is looked up in the state before the token is written, likewise.
        erase: Where the state is changed by what was found, likewise.
        head_size: As in :class:`HeadOperator`, with ``skip`` and ``bonus``; ``chunk`` as in :class:`Recurrence`.

    Cost: O(L·H·(T·N + T·P + N·P)) time for one right-hand side, and O(T²·H·N) memory where decays differ by state.

    Source:
        Yang et al. 2024 (arXiv 2412.06464), equation 10, gated delta rule; Kimi Team 2025 (arXiv 2510.26692),
        decays by state; chunks as in Yang et al. 2024 (arXiv 2406.06484), section 3.
    """

    a: Coefficient
    b: Coefficient
    c: Coefficient
    recall: Coefficient
    erase: Coefficient

    coefficients = ("a", "b", "c", "recall", "erase")

    def _transposed(self) -> DeltaScan:
        a, b, c, recall, erase = self.map(lambda f: f.flip(1), axis=1).products
        # the transition between two neighbours belongs to the later one, which is now the earlier
        a, recall, erase = (p.map(lambda f: f.roll(1, 1), axis=1) for p in (a, recall, erase))
        return replace(self, a=a, b=c, c=b, recall=erase, erase=recall)

    def _mix(self, x: Tensor) -> Tensor:
        """Run the recurrence on ``x`` (B, L, H, P): a loop over chunks that hands on the state."""
        B, L, H, P = x.shape
        N = max(p.shape[3] for p in self.products)
        T = self.chunk or min(64 if self.products[0].shape[3] == 1 else 16, L)
        h = x.new_zeros(B, H, N, P)
        outputs = []
        for start in range(0, L, T):
            stop = min(start + T, L)
            a, b, c, recall, erase = (p.tokens(start, stop) for p in self.products)
            y, h = _delta_chunk(a, b, c, recall, erase, x[:, start:stop], h)
            outputs.append(y)
        return torch.cat(outputs, dim=1)


def _delta_chunk(
    a: Tensor, b: Tensor, c: Tensor, recall: Tensor, erase: Tensor, x: Tensor, h: Tensor
) -> tuple[Tensor, Tensor]:
    """Run one chunk of the delta rule.

    Args:
        a: Decays (B or 1, T, H or 1, N or 1).
        b: Weights of the input, likewise.
        c: Weights of the state, likewise.
        recall: What is looked up, likewise.
        erase: Where the state is changed, likewise.
        x: (B, T, H, P).
        h: (B, H, N, P), the state before the chunk.

    Returns:
        Output (B, T, H, P) and the state after the chunk (B, H, N, P).
    """
    B, T, H, _ = x.shape
    between = decays_between(a)  # [t, s]: the decay until t of what s wrote
    since = a.cumprod(1)  # the decay until t of the state before the chunk
    ahead = torch.cat([torch.zeros_like(between[:, :1]), between[:, :-1]], dim=1)  # until t - 1, for s < t
    before = torch.cat([torch.ones_like(since[:, :1]), since[:, :-1]], dim=1)

    # recalled: w = recall (before h + ahead (b x - erase w)), so (I + R) w = recall (before h + ahead b x)
    found = torch.einsum("bthn,bhnp->bhtp", (recall * before).expand(B, -1, H, -1), h)
    found = found + torch.einsum("bhts,bshp->bhtp", _scores(recall, ahead, b, B, H), x)
    unit = torch.eye(T, dtype=x.dtype, device=x.device) + _scores(recall, ahead, erase, B, H)
    w = torch.linalg.solve_triangular(unit, found, upper=False, unitriangular=True)  # (B, H, T, P)

    y = torch.einsum("bthn,bhnp->bthp", (c * since).expand(B, -1, H, -1), h)
    y = y + torch.einsum("bhts,bshp->bthp", _scores(c, between, b, B, H), x)
    y = y - torch.einsum("bhts,bhsp->bthp", _scores(c, between, erase, B, H), w)
    last = between[:, -1]  # (B, T, H, N)
    h = since[:, -1].unsqueeze(-1) * h
    h = h + torch.einsum("bshn,bshp->bhnp", (last * b).expand(B, -1, H, -1), x)
    h = h - torch.einsum("bshn,bhsp->bhnp", (last * erase).expand(B, -1, H, -1), w)
    return y, h


def _scores(rows: Tensor, between: Tensor, columns: Tensor, B: int, H: int) -> Tensor:
    """Return ``[t, s] = sum_n rows_tn between_tsn columns_sn``, (B, H, T, T)."""
    if between.shape[-1] == 1:
        products = torch.einsum("bthn,bshn->btsh", *torch.broadcast_tensors(rows, columns))
        scores = products * between.squeeze(-1)
    else:
        scores = (rows.unsqueeze(2) * between * columns.unsqueeze(1)).sum(-1)
    return scores.permute(0, 3, 1, 2).expand(B, H, -1, -1)
