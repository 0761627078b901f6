"""The diagonal linear recurrence."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import ClassVar, cast

from torch import Tensor

from captum_ssm.operators.chunk import (
    chunk_by_states,
    chunks_by_matrix,
    size_by_matrix,
    size_by_states,
    together_by_matrix,
)
from captum_ssm.operators.coefficient import Coefficient, Coefficients, Product, ScanCoefficients
from captum_ssm.operators.decays import heads_first
from captum_ssm.operators.recurrence import Recurrence
from captum_ssm.operators.scan_blocks import ScanBlock, blocks_of_matrix


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

    def matrices(self, like: Tensor) -> Tensor:
        """Return every head's matrix, (B, H, L, L), without the direct paths, for an input ``like`` (B, L, D).

        Where all states of a head share one decay, it is what the decays leave of a value that is written with weight
        1, times the inner products of ``c`` and ``b``.

        Cost: one pass of all states with L right-hand sides, or of one state and a product (L, N) (N, L).
        """
        if self.states == 1 or self.products.a.shape[3] > 1:
            return super().matrices(like)
        (b, keys), (c, queries) = (p.apart(like.shape[1]) for p in (self.products.b, self.products.c))
        keys, queries = (heads_first(t, self.states) for t in (keys, queries))  # (B or 1, H or 1, L, N)
        return replace(self, b=b, c=c).matrices(like) * (queries @ keys.mT)

    def head_diagonal(self, like: Tensor) -> Tensor:
        """Return the part of a token's output that it has just written, (B or 1, L or 1, H): 0 if read before."""
        return super().head_diagonal(like) if self.lag == 0 else like.new_zeros(1, 1, self.heads)

    def blocks(self, band: Tensor, factor: Tensor, width: int) -> Iterator[ScanBlock]:
        """Cut the products of every channel's matrix and a banded one into blocks, each a product of few numbers.

        Each head has one channel.

        Args:
            band: (K, B, L, D): entry ``[k, :, t]`` is the weight of token t - k in the input at t.
            factor: Factor of the rows, (B, L, D).
            width: Number of channels that are treated at once.

        Yields:
            Blocks whose entries add up to the matrices. Those of a block are to be taken before the next one is asked
            for.

        Cost: O(L·D·N·log L) time, and O(L²·D·N) for the entries of all blocks; memory for the states of all columns
        of some channels, B·width·N·L.
        """
        direct = [path for path in (self.skip, self.bonus) if path is not None]
        products = cast(ScanCoefficients[Product], self.products)
        diagonal = self.head_diagonal(factor)
        yield from blocks_of_matrix(products, direct, diagonal, self.lag, band, factor, width)

    def by_states(self, x: Tensor) -> bool:
        """Whether ``x`` (B, L, H, P) goes through all states: a matrix pays off where many columns share it."""
        P, a = x.shape[3], self.products.a
        return P == 1 or (self.states >= P and a.shape[3] > 1)

    def chunk_size(self, x: Tensor) -> int:
        """Return T, the tokens of a chunk for ``x`` (B, L, H, P)."""
        if self.chunk:
            return min(self.chunk, x.shape[1])
        B, L, H, P = x.shape
        a, states = self.products.a, B * H * self.states * P
        T = size_by_states(a, states) if self.by_states(x) else size_by_matrix(a)
        return min(T, L)

    def chunks_at_once(self, x: Tensor) -> int:
        """Return C, the largest number of chunks that are run at once: 1 if they go through their states."""
        B, _, H, P = x.shape
        return 1 if self.by_states(x) else together_by_matrix(self.products.a, B, H, self.states, P)

    def run_chunks(self, coefficients: Coefficients[Tensor], x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run chunks that follow one another, those of an example side by side.

        Args:
            coefficients: Each (B·C or 1, T, H or 1, N or 1).
            x: (B·C, T, H, P).
            h: The state before the first chunk (B, H, N, P).

        Returns:
            The outputs (B·C, T, H, P), the state before each chunk (B·C, H, N, P), and after the last one (B, H, N, P).
        """
        run = chunk_by_states if self.by_states(x) else chunks_by_matrix
        return run(coefficients.a, coefficients.b, coefficients.c, x, h, self.lag)
