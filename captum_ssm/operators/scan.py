"""The diagonal linear recurrence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, cast

from torch import Tensor

from captum_ssm.operators.chunk import chunk_by_matrix, chunk_by_states, size_by_matrix, size_by_states
from captum_ssm.operators.coefficient import Coefficient, Product, ScanCoefficients
from captum_ssm.operators.recurrence import Recurrence
from captum_ssm.operators.scan_rows import rows_of_matrix


@dataclass(frozen=True)
class Scan(Recurrence):
    """Diagonal linear recurrence, the common form of S6, SSD, RG-LRU, WKV, mLSTM and lightning.

    Head ``h`` with its P channels has a state of (N, P)::

        h_t = a_t h_{t-1} + b_t x_t
        y_t = <c_t, h_{t-lag}> + (bonus_t + skip_t) x_t

    so channel d of head h has the attention, for i >= j + lag,
    ``alpha[i, j] = sum_n c_in (prod_{j < k <= i - lag} a_kn) b_jn``, plus ``bonus + skip`` for i = j.

    The sequence is cut into chunks, each of which hands its state on to the next. All decays are products within one
    chunk: nothing is divided and no logarithms are subtracted, so decays may be zero or negative.

    Args:
        a: Decay, a tensor (B, L, H, N) with 1 where an axis is shared, or a :class:`Product` of such tensors.
        b: Weight of the input, a tensor (B, L, H, N) or a :class:`Product`.
        c: Weight of the state in the output, a tensor (B, L, H, N) or a :class:`Product`.
        lag: 1 if the state is read before the current token is written (RWKV), else 0.
        chunk: T, tokens of a chunk; None chooses by size. It changes speed and memory, never the result.
        head_size: P, the number of channels that share one head's coefficients.
        skip: Direct path beside the recurrence (Mamba's D), broadcastable to (B, L, D), or None.
        bonus: Further weight of the current token (RWKV's u), broadcastable to (B, L, D), or None.

    Raises:
        ValueError: If ``lag`` or ``chunk`` is out of range, or the coefficients' shapes do not fit each other.

    Cost: O(L·D·N) time for one right-hand side; memory for the states of one chunk.

    Source:
        Gu & Dao 2023 (arXiv 2312.00752), equations 2a and 2b; the attention form is equation 13 of Ali,
        Zimerman & Wolf 2024 (arXiv 2403.01590).
    """

    a: Coefficient
    b: Coefficient
    c: Coefficient
    lag: int = field(default=0, kw_only=True)

    coefficients: ClassVar[tuple[str, ...]] = ScanCoefficients._fields

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.lag not in (0, 1):
            raise ValueError(f"lag must be 0 or 1, not {self.lag}.")

    def transposed(self) -> Scan:
        """Return the scan whose matrices are the transposed ones, with tokens in reverse order."""
        a, b, c = (product.map(lambda factor: factor.flip(1), axis=1) for product in self.products)
        if self.lag == 0:  # the decay between two neighbours belongs to the later one, which is now the earlier
            a = a.map(lambda factor: factor.roll(1, 1), axis=1)
        return replace(self, a=a, b=c, c=b)

    def head_diagonal(self, like: Tensor) -> Tensor:
        """Return the part of a token's output that it has just written, (B or 1, L or 1, H): 0 if read before."""
        return super().head_diagonal(like) if self.lag == 0 else like.new_zeros(1, 1, self.heads)

    def rows(self, band: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Walk through the products of every channel's matrix and a banded one, a few rows at a time.

        Every column has a state that is carried from row to row, so that a row costs as much as one step of the
        recurrence for all columns. Each head has one channel.

        Args:
            band: (K, B, L, D): entry ``[k, :, t]`` is the weight of token t - k in the input at t.

        Yields:
            A slice of rows i, and their entries (B, D, rows, columns), of the columns j up to the last of these rows;
            all others are 0. The entries are overwritten in the next step.

        Cost: O(L²·D·N) time; memory for the states of all columns, B·D·N·L.
        """
        direct = [path for path in (self.skip, self.bonus) if path is not None]
        products = cast(ScanCoefficients[Product], self.products)
        yield from rows_of_matrix(products, direct, self.lag, band)

    def by_states(self, x: Tensor) -> bool:
        """Whether ``x`` (B, L, H, P) goes through all states: a matrix pays off where many columns share it."""
        P, a = x.shape[3], self.products.a
        return P == 1 or (self.states >= P and a.shape[3] > 1)

    def chunk_size(self, x: Tensor) -> int:
        """Return T, the tokens of a chunk for ``x`` (B, L, H, P)."""
        if self.chunk:
            return self.chunk
        B, L, H, P = x.shape
        T = size_by_states(B * H * self.states * P) if self.by_states(x) else size_by_matrix(self.products.a)
        return min(T, L)

    def chunks(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Run the recurrence chunk by chunk.

        Args:
            x: (B, L, H, P).

        Yields:
            The outputs of a chunk (B, T, H, P), and the state before it (B, H, N, P).
        """
        B, L, H, P = x.shape
        run_chunk, T = chunk_by_states if self.by_states(x) else chunk_by_matrix, self.chunk_size(x)
        h = x.new_zeros(B, H, self.states, P)
        for start in range(0, L, T):
            stop = min(start + T, L)
            a, b, c = (product.tokens(start, stop) for product in self.products)  # (B or 1, T, H or 1, N or 1)
            before = h
            y, h = run_chunk(a, b, c, x[:, start:stop], h, self.lag)
            yield y, before
