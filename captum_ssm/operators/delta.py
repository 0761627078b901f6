"""The delta rule: a linear recurrence that erases before it writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from captum_ssm.operators.heads import Coefficient, Recurrence
from captum_ssm.operators.scan import decays, earlier, heads_first, matrix_size, scores


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

    def transposed(self) -> DeltaScan:
        """Return the delta scan whose matrix is this one's, transposed and read backwards in time."""
        a, b, c, recall, erase = self.map(lambda f: f.flip(1), axis=1).products
        # the transition between two neighbours belongs to the later one, which is now the earlier
        a, recall, erase = (p.map(lambda f: f.roll(1, 1), axis=1) for p in (a, recall, erase))
        return replace(self, a=a, b=c, c=b, recall=erase, erase=recall)

    def chunk_size(self, x: Tensor) -> int:
        """Return T, the tokens of a chunk for ``x`` (B, L, H, P)."""
        return self.chunk or min(matrix_size(self.products[0]), x.shape[1])

    def chunks(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Run the recurrence on ``x`` (B, L, H, P), see :meth:`Recurrence.chunks`."""
        B, L, H, P = x.shape
        products, T = self.products, self.chunk_size(x)
        h = x.new_zeros(B, H, max(p.shape[3] for p in products), P)
        for start in range(0, L, T):
            stop = min(start + T, L)
            before = h
            a, b, c, recall, erase = (p.tokens(start, stop) for p in products)
            y, h = _delta_chunk(a, b, c, recall, erase, x[:, start:stop], h)
            yield y, before


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
    N, P = h.shape[2:]
    b, c, recall, erase, x = (heads_first(t, size) for t, size in ((b, N), (c, N), (recall, N), (erase, N), (x, P)))
    between, since = decays(a)
    ahead, before = earlier(between, since)

    # recalled: w = recall (before h + ahead (b x - erase w)), so (I + R) w = recall (before h + ahead b x)
    found = (recall * before) @ h + scores(recall, ahead, b) @ x
    R = scores(recall, ahead, erase)
    w = torch.linalg.solve_triangular(R, found, upper=False, unitriangular=True)  # adds the I

    y = (c * since) @ h + scores(c, between, b) @ x - scores(c, between, erase) @ w
    last = between[:, :, -1]  # (B, H, T, N)
    h = since[:, :, -1:].mT * h + (last * b).mT @ x - (last * erase).mT @ w
    return y.transpose(1, 2), h
