"""The common part of all linear recurrences: their coefficients, and the walk in chunks, some of them at once."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, reduce
from operator import mul
from typing import Any, ClassVar, NamedTuple, Self

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from captum_ssm.operators.base import tokens_from
from captum_ssm.operators.coefficient import Coefficients, Product, as_product, each, record, shared_shape
from captum_ssm.operators.device_sizes import DeviceSize
from captum_ssm.operators.heads import HeadOperator

_ENTRIES = DeviceSize(cpu=2**17, others=2**25)
"""Entries of a product of coefficients that are made at once: on a processor those that fit its cache."""


class Span(NamedTuple):
    """Some tokens of a sequence that are C whole chunks."""

    start: int
    """The first token."""
    T: int
    """Tokens of a chunk."""
    C: int
    """The number of chunks."""

    @property
    def tokens(self) -> slice:
        """The tokens."""
        return slice(self.start, self.start + self.C * self.T)

    def folded(self, tensor: Tensor, B: int) -> Tensor:
        """Return the chunks of a tensor (B or 1, L, ...) as examples, (B·C, T, ...); of one chunk also (1, T, ...)."""
        tokens = tensor[:, self.tokens]
        if self.C == 1:
            return tokens
        return tokens.expand(B, *[-1] * (tokens.dim() - 1)).reshape(B * self.C, self.T, *tokens.shape[2:])

    def unfolded(self, tensor: Tensor, B: int) -> Tensor:
        """Return the tokens (B, C·T, ...) of chunks (B·C, T, ...)."""
        return tensor.reshape(B, self.C * tensor.shape[1], *tensor.shape[2:])


@dataclass(frozen=True)
class Recurrence(HeadOperator):
    """A linear recurrence whose coefficients differ by token, head and state.

    Subclasses name their coefficients. The walk goes through the sequence in chunks, each of which hands its state on
    to the next. All but that is done for several chunks at once, as if they were examples.

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

    def chunks(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Run the recurrence span by span.

        Args:
            x: (B, L, H, P).

        Yields:
            The outputs of the C chunks of a span (B, C·T, H, P), and the state before each (B·C, H, N, P).
        """
        B, _, H, P = x.shape
        h = x.new_zeros(B, H, self.states, P)
        for span in self.spans(x):
            y, before, h = self.run_chunks(self.coefficients_of(span, B), span.folded(x, B), h)
            yield span.unfolded(y, B), before

    def coefficients_of(self, span: Span, B: int) -> Coefficients[Tensor]:
        """Evaluate the coefficients at the tokens of a span, each (B·C or 1, T, H or 1, N or 1)."""
        chunks, start = (self, span.start) if span.C == 1 else (self.folded(span, B), 0)
        return each(lambda p: p.tokens(start, start + span.T, heads_innermost=self.head_size == 1), chunks.products)

    @abstractmethod
    def run_chunks(self, coefficients: Coefficients[Tensor], x: Tensor, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Run chunks that follow one another, those of an example side by side.

        Args:
            coefficients: Each (B·C or 1, T, H or 1, N or 1).
            x: (B·C, T, H, P).
            h: The state before the first chunk (B, H, N, P).

        Returns:
            The outputs (B·C, T, H, P), the state before each chunk (B·C, H, N, P), and after the last one (B, H, N, P).
        """

    @abstractmethod
    def chunk_size(self, x: Tensor) -> int:
        """Return T, the tokens of a chunk for ``x`` (B, L, H, P)."""

    @abstractmethod
    def chunks_at_once(self, x: Tensor) -> int:
        """Return C, the largest number of chunks that are run at once for ``x`` (B, L, H, P)."""

    def spans(self, x: Tensor) -> list[Span]:
        """Cut the tokens of ``x`` (B, L, H, P) into spans; the last one may be a shorter chunk."""
        L, T, C = x.shape[1], self.chunk_size(x), self.chunks_at_once(x)
        whole = L - L % T
        spans = [Span(start, T, min(C, (whole - start) // T)) for start in range(0, whole, C * T)]
        return spans if whole == L else [*spans, Span(whole, L - whole, 1)]

    def folded(self, span: Span, B: int) -> Self:
        """Return the recurrence of a span's chunks, as a batch of B·C short sequences."""

        def fold(factor: Tensor) -> Tensor:
            if factor.shape[1] > 1:
                return span.folded(factor, B)
            return factor if len(factor) == 1 or span.C == 1 else factor.repeat_interleave(span.C, 0)

        return self.with_factors([fold(factor) for factor in self.factors])

    def head_diagonal(self, like: Tensor) -> Tensor:
        """Return ``<c_t, b_t>``, (B or 1, L, H): the part of a token's output that it has just written."""
        L, products = like.shape[1], (self.products.b, self.products.c)
        shapes = [shape for product in products for shape in product.shapes_of_terms if shape[3] > 1]
        B, _, H, N = shared_shape(*shapes) if shapes else (1, 1, 1, 1)
        T = max(_ENTRIES.of(like) // (B * H * N), 1)
        inner = [self._written_and_read(start, min(start + T, L)) for start in range(0, L, T)]
        return torch.cat(inner, dim=1).expand(-1, -1, self.heads)

    def _written_and_read(self, start: int, stop: int) -> Tensor:
        """Return ``sum_n c_tn b_tn`` at some tokens, (B or 1, T, H or 1): what all states share is not summed."""
        terms = [term for product in (self.products.b, self.products.c) for term in product.terms(start, stop)]
        of_states = [term for term in terms if term.shape[3] > 1]
        summed = reduce(mul, of_states).sum(-1) if of_states else terms[0].new_tensor(self.states).view(1, 1, 1)
        shared = (term.squeeze(-1) for term in terms if term.shape[3] == 1)
        return reduce(mul, shared, summed).expand(-1, stop - start, -1)

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
