"""Matrices between tokens, given by their products or by their entries."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class DenseMatrix:
    """A token matrix given by its entries.

    Args:
        matrix: (..., B, L, L); row i is the query, column j the key.
    """

    matrix: Tensor

    def apply(self, s: Tensor) -> Tensor:
        """Return ``C s``. Cost: O(L²)."""
        return torch.einsum("...ij,...j->...i", self.matrix, s)

    def adjoint(self, r: Tensor) -> Tensor:
        """Return ``C^T r``. Cost: O(L²)."""
        return torch.einsum("...ij,...i->...j", self.matrix, r)

    def dense(self) -> Tensor:
        """Return the entries."""
        return self.matrix


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
        return torch.as_tensor(self.factor).to(matrix).expand(matrix.shape[:2]).unsqueeze(-1) * matrix
