"""Matrices between tokens, given by their products or by their entries."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import reduce
from operator import add
from typing import Protocol

import torch
from torch import Tensor


class TokenMatrix(Protocol):
    """A matrix between tokens, (B, L, L), given by its products."""

    def apply(self, s: Tensor) -> Tensor:
        """Return ``C s`` for ``s`` (B, L)."""

    def adjoint(self, r: Tensor) -> Tensor:
        """Return ``C^T r`` for ``r`` (B, L)."""

    def dense(self) -> Tensor:
        """Return the entries (B, L, L); row i is the query, column j the key."""

    def on_rows(self, rows: Tensor) -> TokenMatrix:
        """Return a matrix that is this one in those rows, (B, L) of booleans, and may be 0 in all others."""


@dataclass(frozen=True)
class DenseMatrix:
    """A token matrix given by its entries.

    Args:
        entries: (..., B, L, L); row i is the query, column j the key.
    """

    entries: Tensor

    def apply(self, s: Tensor) -> Tensor:
        """Return ``C s``. Cost: O(L²)."""
        return torch.einsum("...ij,...j->...i", self.entries, s)

    def adjoint(self, r: Tensor) -> Tensor:
        """Return ``C^T r``. Cost: O(L²)."""
        return torch.einsum("...ij,...i->...j", self.entries, r)

    def dense(self) -> Tensor:
        """Return the entries."""
        return self.entries

    def on_rows(self, rows: Tensor) -> DenseMatrix:
        """Return the matrix itself."""
        return self


@dataclass(frozen=True)
class SomeRows:
    """A token matrix that is 0 in all rows but a few.

    Args:
        rows: Their numbers, (R,).
        entries: Their entries (..., B, R, L).
    """

    rows: Tensor
    entries: Tensor

    def apply(self, s: Tensor) -> Tensor:
        """Return ``C s``. Cost: O(R·L)."""
        product = self.entries.new_zeros(*self.entries.shape[:-2], self.entries.shape[-1])
        product[..., self.rows] = torch.einsum("...rj,...j->...r", self.entries, s)
        return product

    def adjoint(self, r: Tensor) -> Tensor:
        """Return ``C^T r``. Cost: O(R·L)."""
        return torch.einsum("...rj,...r->...j", self.entries, r[..., self.rows])

    def dense(self) -> Tensor:
        """Return the entries of all rows."""
        matrix = self.entries.new_zeros(*self.entries.shape[:-2], *2 * self.entries.shape[-1:])
        matrix[..., self.rows, :] = self.entries
        return matrix

    def on_rows(self, rows: Tensor) -> SomeRows:
        """Return the matrix itself."""
        return self


@dataclass(frozen=True)
class MatrixProduct:
    """The product of token matrices, the first applied last.

    Args:
        matrices: At least one.
    """

    matrices: tuple[TokenMatrix, ...]

    def apply(self, s: Tensor) -> Tensor:
        """Return ``C_1 C_2 ... s``."""
        for matrix in reversed(self.matrices):
            s = matrix.apply(s)
        return s

    def adjoint(self, r: Tensor) -> Tensor:
        """Return ``... C_2^T C_1^T r``."""
        for matrix in self.matrices:
            r = matrix.adjoint(r)
        return r

    def dense(self) -> Tensor:
        """Return the product's entries. Cost: O(L³) a factor."""
        return reduce(torch.matmul, (matrix.dense() for matrix in self.matrices))

    def on_rows(self, rows: Tensor) -> MatrixProduct:
        """Return the product whose first factor is needed on these rows."""
        return MatrixProduct((self.matrices[0].on_rows(rows), *self.matrices[1:]))


@dataclass(frozen=True)
class MatrixSum:
    """The sum of token matrices.

    Args:
        matrices: At least one.
    """

    matrices: tuple[TokenMatrix, ...]

    def apply(self, s: Tensor) -> Tensor:
        """Return ``(C_1 + C_2 + ...) s``."""
        return reduce(add, (matrix.apply(s) for matrix in self.matrices))

    def adjoint(self, r: Tensor) -> Tensor:
        """Return ``(C_1 + C_2 + ...)^T r``."""
        return reduce(add, (matrix.adjoint(r) for matrix in self.matrices))

    def dense(self) -> Tensor:
        """Return the sum's entries."""
        return reduce(add, (matrix.dense() for matrix in self.matrices))

    def on_rows(self, rows: Tensor) -> MatrixSum:
        """Return the sum of the matrices on these rows."""
        return MatrixSum(tuple(matrix.on_rows(rows) for matrix in self.matrices))


@dataclass(frozen=True)
class RearrangedMatrix:
    """A token matrix of tokens in another order, as a matrix of the tokens in the order of the inputs.

    Args:
        matrix: The matrix; its token i is token ``order[b, i]`` of the inputs.
        order: (B, L).
    """

    matrix: TokenMatrix
    order: Tensor

    def apply(self, s: Tensor) -> Tensor:
        """Return ``P^T C P s``, P the rearrangement."""
        return rearranged(self.matrix.apply(rearranged(s, self.order)), self.order.argsort(-1))

    def adjoint(self, r: Tensor) -> Tensor:
        """Return ``P^T C^T P r``."""
        return rearranged(self.matrix.adjoint(rearranged(r, self.order)), self.order.argsort(-1))

    def dense(self) -> Tensor:
        """Return the entries ``P^T C P``."""
        place = self.order.argsort(-1).unsqueeze(-2)  # (B, 1, L)
        columns = rearranged(self.matrix.dense(), place)
        return rearranged(columns.transpose(-1, -2), place).transpose(-1, -2)

    def on_rows(self, rows: Tensor) -> RearrangedMatrix:
        """Return the matrix on these tokens of the inputs."""
        return replace(self, matrix=self.matrix.on_rows(rearranged(rows, self.order)))


def rearranged(values: Tensor, order: Tensor) -> Tensor:
    """Return values (..., B, L) with ``values[..., b, order[b, i]]`` at token i."""
    return values.gather(-1, order.expand(values.shape))


@dataclass(frozen=True)
class ScaledMatrix:
    """A token matrix whose rows are scaled.

    Args:
        matrix: The matrix.
        factor: Factor of the rows, a number or (B, L).
    """

    matrix: TokenMatrix
    factor: float | Tensor

    def apply(self, s: Tensor) -> Tensor:
        """Return ``diag(factor) C s``."""
        return self.factor * self.matrix.apply(s)

    def adjoint(self, r: Tensor) -> Tensor:
        """Return ``C^T diag(factor) r``."""
        return self.matrix.adjoint(self.factor * r)

    def dense(self) -> Tensor:
        """Return the entries of the scaled matrix."""
        matrix = self.matrix.dense()
        return (
            torch.as_tensor(self.factor, device=matrix.device).to(matrix).expand(matrix.shape[:2]).unsqueeze(-1)
            * matrix
        )

    def on_rows(self, rows: Tensor) -> ScaledMatrix:
        """Return the scaled matrix on these rows."""
        return replace(self, matrix=self.matrix.on_rows(rows))
