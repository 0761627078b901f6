"""The delta rule: a linear recurrence that erases before it writes."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from captum_ssm.operators.chunk import size_by_matrix
from captum_ssm.operators.coefficient import Coefficient, DeltaCoefficients
from captum_ssm.operators.decays import chunk_decays, decayed_products, heads_first
from captum_ssm.operators.recurrence import Recurrence


@dataclass(frozen=True)
class DeltaScan(Recurrence):
    """Linear recurrence that erases before it writes: the delta rule, exactly.

    Head ``h`` with its P channels has a state of (N, P)::

        h_t = a_t h_{t-1} - erase_t <recall_t, h_{t-1}> + b_t x_t
        y_t = <c_t, h_t> + (bonus_t + skip_t) x_t

    Gated DeltaNet and Kimi delta attention, ``h_t = (I - beta k k^T) diag(a) h_{t-1} + beta k x_t``, have
    ``erase = b = beta k`` and ``recall = a k``; RWKV-7 has a transition of the same form with other vectors.

    Within a chunk the recalled value ``w_t = <recall_t, h_{t-1}>`` depends on the values erased before: one
    unit-triangular solve of (T, T) a head, no inverse, no (L, L) matrix. Transposition exchanges ``erase`` with
    ``recall`` and ``b`` with ``c``, so the adjoint is the same pass from the last token to the first.

    Args:
        a: Decay, a tensor (B, L, H, N) with 1 where an axis is shared, or a :class:`Product` of such tensors.
        b: Weight of the input, a tensor (B, L, H, N) or a :class:`Product`.
        c: Weight of the state in the output, a tensor (B, L, H, N) or a :class:`Product`.
        recall: Key that is looked up in the state before the token is written, (B, L, H, N) or a :class:`Product`.
        erase: Direction in which the recalled value is subtracted, (B, L, H, N) or a :class:`Product`.
        chunk: T, tokens of a chunk; None chooses by size. It changes speed and memory, never the result.
        head_size: P, the number of channels that share one head's coefficients.
        skip: Direct path beside the recurrence, broadcastable to (B, L, D), or None.
        bonus: Further weight of the current token, broadcastable to (B, L, D), or None.

    Raises:
        ValueError: If ``chunk`` is less than 1, or the coefficients' shapes do not fit each other.

    Cost: O(L·H·(T·N + T·P + N·P)) time for one right-hand side, and O(T²·H·N) memory where decays differ by state.

    Source:
        Yang et al. 2024 (arXiv 2412.06464), equation 10, gated delta rule; Kimi Team 2025 (arXiv 2510.26692),
        decays by state; chunks: Yang et al. 2024 (arXiv 2406.06484), section 3.
    """

    a: Coefficient
    b: Coefficient
    c: Coefficient
    recall: Coefficient
    erase: Coefficient

    coefficients: ClassVar[tuple[str, ...]] = DeltaCoefficients._fields

    def transposed(self) -> DeltaScan:
        """Return the delta scan whose matrices are the transposed ones, with tokens in reverse order."""
        a, b, c, recall, erase = (product.map(lambda factor: factor.flip(1), axis=1) for product in self.products)
        # the transition between two neighbours belongs to the later one, which is now the earlier
        a, recall, erase = (p.map(lambda factor: factor.roll(1, 1), axis=1) for p in (a, recall, erase))
        return replace(self, a=a, b=c, c=b, recall=erase, erase=recall)

    def chunk_size(self, x: Tensor) -> int:
        """Return T, the tokens of a chunk for ``x`` (B, L, H, P)."""
        return self.chunk or min(size_by_matrix(self.products.a), x.shape[1])

    def chunks(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Run the recurrence chunk by chunk.

        Args:
            x: (B, L, H, P).

        Yields:
            The outputs of a chunk (B, T, H, P), and the state before it (B, H, N, P).
        """
        B, L, H, P = x.shape
        products, T = self.products, self.chunk_size(x)
        h = x.new_zeros(B, H, self.states, P)
        for start in range(0, L, T):
            stop = min(start + T, L)
            coefficients = DeltaCoefficients(*(product.tokens(start, stop) for product in products))
            before = h
            y, h = _delta_chunk(coefficients, x[:, start:stop], h)
            yield y, before


def _delta_chunk(coefficients: DeltaCoefficients[Tensor], x: Tensor, h: Tensor) -> tuple[Tensor, Tensor]:
    """Run one chunk of the delta rule.

    Args:
        coefficients: Each (B or 1, T, H or 1, N or 1).
        x: (B, T, H, P).
        h: (B, H, N, P), the state before the chunk.

    Returns:
        Output (B, T, H, P) and the state after the chunk (B, H, N, P).
    """
    N, P = h.shape[2:]
    decays = chunk_decays(coefficients.a)  # between (B, H, T, T, N), since_start (B, H, T, N)
    before = decays.before_token()
    b, c, recall, erase = (heads_first(t, N) for t in coefficients[1:])  # (B, H, T, N)
    x = heads_first(x, P)  # (B, H, T, P)

    # w_t = <recall_t, h_{t-1}> with the chunk's own writes in h_{t-1}: (I + R) w = recall before h + recall before b x
    looked_up = (recall * before.since_start) @ h + decayed_products(recall, before.between, b) @ x  # (B, H, T, P)
    R = decayed_products(recall, before.between, erase)  # (B, H, T, T), strictly lower triangular
    w = torch.linalg.solve_triangular(R, looked_up, upper=False, unitriangular=True)  # (B, H, T, P); it adds the I

    y = (
        (c * decays.since_start) @ h
        + decayed_products(c, decays.between, b) @ x
        - decayed_products(c, decays.between, erase) @ w
    )  # (B, H, T, P)
    until_end = decays.until_end()  # (B, H, T, N)
    h = decays.of_chunk() * h + (until_end * b).mT @ x - (until_end * erase).mT @ w  # (B, H, N, P)
    return y.transpose(1, 2), h
