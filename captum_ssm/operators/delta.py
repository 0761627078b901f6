"""The delta rule: a linear recurrence that erases before it writes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from captum_ssm.operators.chunk import size_by_matrix, together_by_matrix
from captum_ssm.operators.coefficient import Coefficient, Coefficients, DeltaCoefficients
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
        return min(self.chunk or size_by_matrix(self.products.a), x.shape[1])

    def chunks_at_once(self, x: Tensor) -> int:
        """Return C, the largest number of chunks that are run at once for ``x`` (B, L, H, P)."""
        B, _, H, P = x.shape
        return together_by_matrix(self.products.a, B, H, self.states, P)

    def run_chunks(self, coefficients: Coefficients[Tensor], x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run chunks that follow one another, those of an example side by side.

        Args:
            coefficients: Each (B·C or 1, T, H or 1, N or 1).
            x: (B·C, T, H, P).
            h: The state before the first chunk (B, H, N, P).

        Returns:
            The outputs (B·C, T, H, P), the state before each chunk (B·C, H, N, P), and after the last one (B, H, N, P).
        """
        N, P = h.shape[2:]
        decays = chunk_decays(coefficients.a)  # between (B·C, H, T, T, N), since_start (B·C, H, T, N)
        before_token = decays.before_token()
        b, c, recall, erase = (heads_first(t, N) for t in coefficients[1:])  # (B·C, H, T, N)
        x = heads_first(x, P)  # (B·C, H, T, P)

        # w_t = <recall_t, h_{t-1}>, its own writes in h_{t-1}: (I + R) w = recall before h + recall before b x
        of_writes = decayed_products(recall, before_token.between, b) @ x  # (B·C, H, T, P)
        R = decayed_products(recall, before_token.between, erase)  # (B·C, H, T, T), strictly lower triangular
        until_end = decays.until_end()  # (B·C, H, T, N)
        writes, erased = (until_end * b).mT @ x, (until_end * erase).mT  # (B·C, H, N, P) and (B·C, H, N, T)
        of_state = recall * before_token.since_start  # (B·C, H, T, N)
        w, before, after = hand_on_with_erasures(h, decays.of_chunk(), (R, of_writes, of_state), erased, writes)
        y = (
            (c * decays.since_start) @ before
            + decayed_products(c, decays.between, b) @ x
            - decayed_products(c, decays.between, erase) @ w
        )  # (B·C, H, T, P)
        return y.transpose(1, 2), before, after


def hand_on_with_erasures(
    h: Tensor,
    decay: Tensor,
    equation: tuple[Tensor, Tensor, Tensor],
    erased: Tensor,
    writes: Tensor,
    *,
    upper: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Hand a state on from chunk to chunk, ``h' = decay h + writes - erased w``, with ``(I + R) w = own + of_state h``.

    Args:
        h: (B, H, N, P), the state before the first chunk.
        decay: Decay of the state over each chunk, (B·C or 1, H or 1, N or 1, 1).
        equation: R, strictly triangular (B·C or 1, H, T, T), own (B·C, H, T, P), and of_state (B·C or 1, H, T, N).
        erased: (B·C or 1, H, N, T).
        writes: What each chunk adds besides, (B·C, H, N, P).
        upper: Whether R is an upper triangle.

    Returns:
        w (B·C, H, T, P), the state before each chunk (B·C, H, N, P), and the state after the last one (B, H, N, P).
    """
    R, own, of_state = equation
    P = own.shape[-1]
    if len(own) == len(h):
        w = unit_triangular_solution(R, own + of_state @ h, upper=upper)
        return w, h, torch.addcmul(writes, decay, h) - erased @ w
    of_both = torch.cat([own, of_state.expand(*own.shape[:-1], -1)], dim=-1)  # (B·C, H, T, P + N)
    of_both = unit_triangular_solution(R, of_both, upper=upper)
    own, of_state = of_both[..., :P], of_both[..., P:]  # w = own + of_state h
    parts = (decay.expand(*writes.shape[:-1], 1), erased @ of_state, writes - erased @ own)
    steps = zip(*(part.unflatten(0, (len(h), -1)).unbind(1) for part in parts))
    *before, after = accumulate(steps, lambda h, step: torch.addcmul(step[2], step[0], h) - step[1] @ h, initial=h)
    of_chunks = torch.stack(before, 1).flatten(0, 1)
    return own + of_state @ of_chunks, of_chunks, after


def unit_triangular_solution(R: Tensor, y: Tensor, *, upper: bool = False) -> Tensor:
    """Return w of ``(I + R) w = y``, (..., T, P), for a strictly triangular R (..., T, T).

    It is solved transposed, ``w^T (I + R)^T = y^T``, as LAPACK has the rows where torch has the columns: no copies.
    """
    return torch.linalg.solve_triangular(R.mT, y.mT, upper=not upper, left=False, unitriangular=True).mT
