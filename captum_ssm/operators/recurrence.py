"""The common part of all linear recurrences: their coefficients, and the walk in chunks."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any, ClassVar, Self

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from captum_ssm.operators.base import tokens_from
from captum_ssm.operators.coefficient import Coefficients, Product, as_product, record, shared_shape
from captum_ssm.operators.heads import HeadOperator


@dataclass(frozen=True)
class Recurrence(HeadOperator):
    """A linear recurrence whose coefficients differ by token, head and state.

    Subclasses name their coefficients, and walk through the sequence in chunks, each of which hands its state on to
    the next.

    Args:
        chunk: T, tokens of a chunk; None chooses by size. It changes speed and memory, never the result.
        head_size: P, the number of channels that share one head's coefficients.
        skip: Direct path beside the recurrence (Mamba's D), broadcastable to (B, L, D), or None.
        bonus: Further weight of the current token (RWKV's u), broadcastable to (B, L, D), or None.

    Raises:
        ValueError: If ``chunk`` is less than 1, or the coefficients' shapes do not fit each other.
    """

    chunk: int | None = field(default=None, kw_only=True)

    causal = True
    coefficients: ClassVar[tuple[str, ...]]
    """Names of the fields that are coefficients."""

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk must be at least 1 token, not {self.chunk}.")
        shared_shape(*(product.shape for product in self.products))

    @cached_property
    def products(self) -> Coefficients[Product]:
        """The coefficients as products, by name: ``scan.products.a``."""
        products = (as_product(getattr(self, name)) for name in self.coefficients)
        return record(self.coefficients)(*products)

    @cached_property
    def heads(self) -> int:
        """H, the number of heads."""
        return max(product.shape[2] for product in self.products)

    @cached_property
    def states(self) -> int:
        """N, the number of states of a channel."""
        return max(product.shape[3] for product in self.products)

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The factors of all coefficients, in the order of :attr:`products`."""
        return tuple(factor for product in self.products for factor in product.factors)

    def with_factors(self, factors: Sequence[Tensor]) -> Self:
        """Return the recurrence with other factors instead of :attr:`factors`, without direct paths."""
        remaining = iter(factors)
        products = (replace(p, factors=tuple(next(remaining) for _ in p.factors)) for p in self.products)
        named: dict[str, Any] = dict(zip(self.coefficients, products))
        return replace(self, **named, skip=None, bonus=None)

    def map(self, function: Callable[[Tensor], Tensor], axis: int) -> Self:
        """Apply ``function`` to every factor of every coefficient that is not shared along ``axis``."""
        mapped: dict[str, Any] = {name: p.map(function, axis) for name, p in zip(self.coefficients, self.products)}
        return replace(self, **mapped)

    def mix(self, x: Tensor) -> Tensor:
        """Return the outputs of the recurrence for ``x`` (B, L, H, P), of the same shape."""
        return recur(self, x, self.factors)

    @abstractmethod
    def chunks(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Run the recurrence chunk by chunk.

        Args:
            x: (B, L, H, P).

        Yields:
            The outputs of a chunk (B, T, H, P), and the state before it (B, H, N, P).
        """

    @abstractmethod
    def chunk_size(self, x: Tensor) -> int:
        """Return T, the tokens of a chunk for ``x`` (B, L, H, P)."""

    def head_diagonal(self, like: Tensor) -> Tensor:
        """Return ``<c_t, b_t>``, (B or 1, L, H): the part of a token's output that it has just written."""
        L, T = like.shape[1], self.chunk_size(like.unflatten(-1, (self.heads, -1)))
        b, c = self.products.b, self.products.c
        spans = [(start, min(start + T, L)) for start in range(0, L, T)]
        inner = [(b.tokens(*span) * c.tokens(*span)).sum(-1) for span in spans]  # each (B or 1, T, H or 1)
        return torch.cat(inner, dim=1).expand(-1, -1, self.heads)

    def after(self, start: int) -> Self:
        """Return the recurrence from token ``start`` on, with no state before it."""
        direct = self._direct_paths(lambda path: tokens_from(path, start))
        return replace(self.map(lambda factor: factor[:, start:], axis=1), **direct)

    def take_heads(self, head: Tensor) -> Self:
        """Return the recurrence of a selection of heads, given by their numbers."""
        return self.map(lambda factor: factor[:, :, head.to(factor.device)], axis=2)


def recur(scan: Recurrence, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
    """Run a recurrence: a separate function, so that a rule of relevance can replace it.

    Args:
        scan: The recurrence.
        x: (B, L, H, P).
        factors: The recurrence's own :attr:`Recurrence.factors`.

    Returns:
        (B, L, H, P).
    """
    tensors = (x, *factors)
    if has_torch_function(tensors):
        return handle_torch_function(recur, tensors, scan, x, factors)
    return torch.cat([y for y, _ in scan.chunks(x)], dim=1)
