"""Coefficients of a recurrence: products of factors with shared axes, and records of them by name."""

from __future__ import annotations

from collections import namedtuple
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache, reduce
from math import e, log2
from operator import mul
from typing import Any, Generic, NamedTuple, TypeVar

import torch
from torch import Tensor

_LOG2_E = log2(e)

S = TypeVar("S")
T = TypeVar("T")


@dataclass(frozen=True)
class Product:
    """A coefficient as the product of broadcastable factors, evaluated a few tokens at a time.

    Mamba's decay ``exp(delta * A)`` and input weight ``delta * B`` have L·D·N entries but only L·D + D·N and
    L·(D + N) independent numbers; as factors they never take more memory than these.

    Args:
        factors: Each (B or 1, L or 1, H or 1, N or 1).
        exponential: Whether the coefficient is the exponential of the product.

    Raises:
        ValueError: If a factor does not have four axes, or the factors do not broadcast to one shape.
    """

    factors: tuple[Tensor, ...]
    exponential: bool = False

    def __post_init__(self) -> None:
        for factor in self.factors:
            if factor.dim() != 4:
                raise ValueError(
                    f"A scan coefficient has shape (B, L, H, N) with 1 where it is shared, not {tuple(factor.shape)}."
                )
        shared_shape(*(factor.shape for factor in self.factors))

    @cached_property
    def shape(self) -> torch.Size:
        """(B, L, H, N) with 1 where the coefficient is shared."""
        return shared_shape(*(factor.shape for factor in self.factors))

    def map(self, function: Callable[[Tensor], Tensor], axis: int) -> Product:
        """Apply ``function`` to every factor that is not shared along ``axis``."""
        return replace(self, factors=tuple(function(f) if f.shape[axis] > 1 else f for f in self.factors))

    def tokens(self, start: int, stop: int, heads_innermost: bool = False) -> Tensor:
        """Evaluate at some tokens.

        Args:
            start: The first token.
            stop: The token behind the last one.
            heads_innermost: Whether heads follow one another in memory, not states, where the factors leave it open.

        Returns:
            (B or 1, stop - start, H or 1, N or 1).
        """
        by_token = self._at(start, stop)
        if heads_innermost:
            value = self.of_factors([f.transpose(2, 3) for f in by_token]).transpose(2, 3)
        else:
            value = self.of_factors(by_token)
        return value.expand(-1, stop - start, -1, -1)

    def terms(self, start: int, stop: int) -> list[Tensor]:
        """Return tensors at some tokens whose product is the coefficient: its factors, or their exponential."""
        factors = self._at(start, stop)
        return [self.of_factors(factors)] if self.exponential else factors

    def apart(self, L: int) -> tuple[Tensor, Tensor]:
        """Return two tensors whose product is the coefficient at L tokens: what all states share, and the rest.

        Args:
            L: The number of tokens.

        Returns:
            (B or 1, L or 1, H or 1, 1) and (B or 1, L, H or 1, N or 1).
        """
        terms = self.terms(0, L)
        one = terms[0].new_ones(1, 1, 1, 1)
        shared = reduce(mul, (term for term in terms if term.shape[3] == 1), one)
        others = reduce(mul, (term for term in terms if term.shape[3] > 1), one)
        return shared, others.expand(-1, L, -1, -1)

    @property
    def shapes_of_terms(self) -> list[torch.Size]:
        """The shapes of :meth:`terms` at all tokens."""
        return [self.shape] if self.exponential else [factor.shape for factor in self.factors]

    def _at(self, start: int, stop: int) -> list[Tensor]:
        return [f[:, start:stop] if f.shape[1] > 1 else f for f in self.factors]

    def of_factors(self, factors: Sequence[Tensor]) -> Tensor:
        """Return the coefficient that has these factors instead, of any axes.

        An exponential is a power of two, which torch computes four times as fast on some processors. The factor
        ``log2 e`` goes to the smallest of the factors.
        """
        if not self.exponential:
            return reduce(mul, factors)
        smallest = min(range(len(factors)), key=lambda number: factors[number].numel())
        return reduce(mul, (f * _LOG2_E if n == smallest else f for n, f in enumerate(factors))).exp2()


Coefficient = Tensor | Product
"""(B, L, H, N) with 1 where an axis is shared, or a :class:`Product` of such tensors."""


class ScanCoefficients(NamedTuple, Generic[T]):
    """One entry for each coefficient of a :class:`~captum_ssm.operators.Scan`."""

    a: T
    """Of the decay."""
    b: T
    """Of the weight of the input."""
    c: T
    """Of the weight of the state in the output."""


class DeltaCoefficients(NamedTuple, Generic[T]):
    """One entry for each coefficient of a :class:`~captum_ssm.operators.DeltaScan`."""

    a: T
    """Of the decay."""
    b: T
    """Of the weight of the input."""
    c: T
    """Of the weight of the state in the output."""
    recall: T
    """Of the key that is looked up in the state."""
    erase: T
    """Of the direction in which the recalled value is subtracted."""


Coefficients = ScanCoefficients[T] | DeltaCoefficients[T]
"""One entry for each coefficient of a recurrence, by name."""


def each(function: Callable[[S], T], entries: Coefficients[S]) -> Coefficients[T]:
    """Return the function of every entry, by the same names."""
    of_same_names: type[Any] = type(entries)
    return of_same_names(*map(function, entries))


@lru_cache
def record(names: tuple[str, ...]) -> type[Any]:
    """Return the class of named tuples with one entry for each of these coefficients."""
    known: dict[tuple[str, ...], type[Any]] = {r._fields: r for r in (ScanCoefficients, DeltaCoefficients)}
    return known.get(names) or namedtuple("Coefficients", names)


def as_product(coefficient: Coefficient) -> Product:
    """Return the coefficient as a product; a tensor is its only factor."""
    return coefficient if isinstance(coefficient, Product) else Product((coefficient,))


@lru_cache
def shared_shape(*shapes: torch.Size) -> torch.Size:
    """Return the shape that all of these broadcast to, far faster than ``torch.broadcast_shapes``.

    Args:
        *shapes: Shapes with the same number of axes.

    Returns:
        The common shape.

    Raises:
        ValueError: If the shapes do not broadcast.
    """
    sizes = [{*axis} - {1} for axis in zip(*shapes)]
    if any(len(different) > 1 for different in sizes):
        raise ValueError(f"Coefficients of shapes {', '.join(str(tuple(s)) for s in shapes)} do not fit each other.")
    return torch.Size(different.pop() if different else 1 for different in sizes)
