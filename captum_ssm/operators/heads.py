"""Token mixers whose channels share matrices by head, and the coefficients of recurrences."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache, reduce
from operator import mul
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from captum_ssm.operators.base import Index, Operator, one_hot, since, take

SelfHead = TypeVar("SelfHead", bound="HeadOperator")
SelfRecurrence = TypeVar("SelfRecurrence", bound="Recurrence")


@dataclass(frozen=True)
class Product:
    """A coefficient as the product of broadcastable factors, evaluated a few tokens at a time.

    Mamba's decay ``exp(delta * A)`` and input ``delta * B`` have L·D·N entries but only L·D + D·N and
    L·(D + N) numbers; kept as factors they never exist as a whole.

    Args:
        factors: Each (B or 1, L or 1, H or 1, N or 1).
        exponential: Whether the coefficient is the exponential of the product.
    """

    factors: tuple[Tensor, ...]
    exponential: bool = False

    def __post_init__(self) -> None:
        for factor in self.factors:
            if factor.dim() != 4:
                raise ValueError(
                    f"A scan coefficient has shape (B, L, H, N) with 1 where it is shared, not {tuple(factor.shape)}."
                )
        _shared_shape(*(factor.shape for factor in self.factors))

    @cached_property
    def shape(self) -> torch.Size:
        """(B, L, H, N) with 1 where the coefficient is shared."""
        return _shared_shape(*(factor.shape for factor in self.factors))

    def map(self, function: Callable[[Tensor], Tensor], axis: int) -> Product:
        """Apply ``function`` to every factor that is not shared along ``axis``."""
        return replace(self, factors=tuple(function(f) if f.shape[axis] > 1 else f for f in self.factors))

    def tokens(self, start: int, stop: int) -> Tensor:
        """Evaluate at tokens ``start`` to ``stop``, shape (B or 1, stop - start, H or 1, N or 1)."""
        value = reduce(mul, (f[:, start:stop] if f.shape[1] > 1 else f for f in self.factors))
        value = value.exp() if self.exponential else value
        return value.expand(-1, stop - start, -1, -1)


@lru_cache
def _shared_shape(*shapes: torch.Size) -> torch.Size:
    """Return the shape that all of these broadcast to, as ``torch.broadcast_shapes``, which is far slower.

    Raises:
        ValueError: If they do not.
    """
    sizes = [{*axis} - {1} for axis in zip(*shapes)]
    if any(len(different) > 1 for different in sizes):
        raise ValueError(f"Coefficients of shapes {', '.join(str(tuple(s)) for s in shapes)} do not fit each other.")
    return torch.Size(different.pop() if different else 1 for different in sizes)


Coefficient = Tensor | Product
"""(B, L, H, N) with 1 where it is shared, or a :class:`Product` of such."""


@dataclass(frozen=True)
class HeadOperator(Operator):
    """A token mixer whose H heads each apply one (L, L) matrix to all of their P channels.

    Subclasses say how many heads they have, and which heads a copy of theirs keeps.
    """

    mixes_tokens = True

    head_size: int = field(default=1, kw_only=True)
    """P, the number of channels that share one head's matrix."""
    skip: Tensor | None = field(default=None, kw_only=True)
    """Direct path that is not part of the recurrence (Mamba's D), broadcastable to (B, L, D)."""
    bonus: Tensor | None = field(default=None, kw_only=True)
    """Weight of the current token in the recurrence (RWKV's u), broadcastable to (B, L, D)."""

    optional = ("skip", "bonus")

    @property
    @abstractmethod
    def heads(self) -> int:
        """H, the number of heads."""

    @abstractmethod
    def _take_heads(self: SelfHead, head: Tensor) -> SelfHead:
        """Return the operator of these heads, by number, as it is otherwise."""

    @abstractmethod
    def mix(self, x: Tensor) -> Tensor:
        """Return every head's matrix times ``x`` (B, L, H, P), without the direct paths."""

    @abstractmethod
    def transposed(self: SelfHead) -> SelfHead:
        """Return the operator whose matrix is this one's, transposed and read backwards in time."""

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """Output and input channels."""
        return self.heads * self.head_size, self.heads * self.head_size

    def apply(self, x: Tensor, bias: bool = False) -> Tensor:
        """Return the output for ``x`` (..., B, L, D)."""
        B, L, D = x.shape[-3:]
        H, P = self.heads, self.head_size
        if D != H * P:
            raise ValueError(f"The scan has {H} heads of {P} channels, but the input has {D} channels.")
        columns = x.reshape(-1, B, L, H, P).permute(1, 2, 3, 4, 0)  # (B, L, H, P, J)
        y = self.mix(columns.flatten(3)).view(columns.shape).permute(4, 0, 1, 2, 3).reshape(x.shape)
        for direct in (self.bonus, self.skip):
            if direct is not None:
                y = y + direct * x
        return y

    def adjoint(self, u: Tensor) -> Tensor:
        """Return the transposed output for ``u`` (..., B, L, D): the same kind of pass, last token to first."""
        backwards = self.transposed()
        skip, bonus = (s if s is None or s.dim() < 2 else s.flip(-2) for s in (self.skip, self.bonus))
        return replace(backwards, skip=skip, bonus=bonus).apply(u.flip(-2)).flip(-2)

    def columns(self, v: Tensor, tokens: slice) -> Tensor:
        """Return column j times ``v_j`` for these tokens, (J, B, L, D); each head's matrix is computed once."""
        values = v[:, tokens].transpose(0, 1).unsqueeze(2).unflatten(-1, (self.heads, -1))
        columns = (self._matrix(v, tokens).unsqueeze(-1) * values).flatten(-2)
        direct = [s for s in (self.skip, self.bonus) if s is not None]
        return columns + sum(direct) * one_hot(v, tokens) if direct else columns

    def diagonal(self, like: Tensor) -> Tensor:
        """Return what each token contributes to itself, (B, L, D)."""
        found = self._own(like).repeat_interleave(self.head_size, dim=-1)
        return sum((s for s in (self.skip, self.bonus) if s is not None), found)

    @abstractmethod
    def _own(self, like: Tensor) -> Tensor:
        """Return the diagonal of every head's matrix, without the direct paths, (B or 1, L, H)."""

    def _matrix(self, like: Tensor, tokens: slice) -> Tensor:
        """Return these columns of every head's matrix, without the direct paths, (J, B, L, H)."""
        one = like.new_ones(1, 1, 1).expand(*like.shape[:2], self.heads)
        return replace(self, head_size=1, skip=None, bonus=None).apply(one_hot(one, tokens))

    def channels(self: SelfHead, index: Index) -> SelfHead:
        """Return the operator of these channels; whole heads stay shared, parts of heads become their own."""
        skip, bonus = (None if s is None else take(s, index) for s in (self.skip, self.bonus))
        P = self.head_size
        channel = torch.arange(self.heads * P)[index.cpu() if isinstance(index, Tensor) else index]
        if self.heads == 1:
            return replace(self, skip=skip, bonus=bonus, head_size=len(channel))
        first = channel[::P]
        whole = torch.equal(channel, (first.unsqueeze(1) // P * P + torch.arange(P)).flatten())
        head = (first if whole else channel) // P
        return replace(self._take_heads(head), skip=skip, bonus=bonus, head_size=P if whole else 1)


@dataclass(frozen=True)
class Recurrence(HeadOperator):
    """A linear recurrence whose coefficients differ by token, head and state.

    Subclasses name their coefficients, and walk the sequence in chunks that hand on the state.
    """

    chunk: int | None = field(default=None, kw_only=True)
    """T, tokens of a chunk; None chooses by size. It changes speed and memory, never the result."""

    causal = True
    coefficients: ClassVar[tuple[str, ...]]
    """Names of the fields that are coefficients."""

    def __post_init__(self) -> None:
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk must be at least 1 token, not {self.chunk}.")
        _shared_shape(*(p.shape for p in self.products))

    @cached_property
    def products(self) -> tuple[Product, ...]:
        """The coefficients in the order of their names, as products."""
        values = (getattr(self, name) for name in self.coefficients)
        return tuple(value if isinstance(value, Product) else Product((value,)) for value in values)

    @cached_property
    def heads(self) -> int:
        """H, the number of heads."""
        return max(p.shape[2] for p in self.products)

    @property
    def factors(self) -> tuple[Tensor, ...]:
        """The factors of all coefficients, in the order of :attr:`products`."""
        return tuple(factor for product in self.products for factor in product.factors)

    def with_factors(self: SelfRecurrence, factors: Sequence[Tensor]) -> SelfRecurrence:
        """Return the recurrence with these factors in the place of :attr:`factors`, without direct paths."""
        rest = iter(factors)
        products = (replace(p, factors=tuple(next(rest) for _ in p.factors)) for p in self.products)
        named: dict[str, Any] = dict(zip(self.coefficients, products))
        return replace(self, **named, skip=None, bonus=None)

    def map(self: SelfRecurrence, function: Callable[[Tensor], Tensor], axis: int) -> SelfRecurrence:
        """Apply ``function`` to every factor of every coefficient that is not shared along ``axis``."""
        mapped: dict[str, Any] = {name: p.map(function, axis) for name, p in zip(self.coefficients, self.products)}
        return replace(self, **mapped)

    def mix(self, x: Tensor) -> Tensor:
        """Run the recurrence on ``x`` (B, L, H, P)."""
        return recur(self, x, self.factors)

    @abstractmethod
    def chunks(self, x: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Run the recurrence on ``x`` (B, L, H, P) chunk by chunk.

        Yields:
            The outputs of a chunk (B, T, H, P), and the state before it (B, H, N, P).
        """

    @abstractmethod
    def chunk_size(self, x: Tensor) -> int:
        """Return T, the tokens of a chunk for ``x`` (B, L, H, P)."""

    def _own(self, like: Tensor) -> Tensor:
        """Return ``<c_t, b_t>``, what the state that a token is written to gives back at once."""
        L, step = like.shape[1], self.chunk_size(like.unflatten(-1, (self.heads, -1)))
        named = dict(zip(self.coefficients, self.products))
        spans = [(start, min(start + step, L)) for start in range(0, L, step)]
        own = [(named["b"].tokens(*span) * named["c"].tokens(*span)).sum(-1) for span in spans]
        return torch.cat(own, dim=1).expand(-1, -1, self.heads)

    def after(self: SelfRecurrence, start: int) -> SelfRecurrence:
        """Return the recurrence from token ``start`` on, with no state before it."""
        skip, bonus = (None if s is None else since(s, start) for s in (self.skip, self.bonus))
        return replace(self.map(lambda f: f[:, start:], axis=1), skip=skip, bonus=bonus)

    def _take_heads(self: SelfRecurrence, head: Tensor) -> SelfRecurrence:
        return self.map(lambda f: f[:, :, head.to(f.device)], axis=2)


def recur(scan: Recurrence, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
    """Run a recurrence on ``x`` (B, L, H, P): a function by itself, that a rule of relevance can take over.

    Args:
        scan: The recurrence.
        x: Its input.
        factors: Its own :attr:`Recurrence.factors`.
    """
    tensors = (x, *factors)
    if has_torch_function(tensors):
        return handle_torch_function(recur, tensors, scan, x, factors)
    return torch.cat([y for y, _ in scan.chunks(x)], dim=1)


def decays_between(a: Tensor) -> Tensor:
    """Return the products of decays ``[t, s] = prod_{s < k <= t} a_k`` of a chunk, 0 for s > t, (B, T, T, H, N).

    They are products, not exponentials of differences: decays may be zero or negative, and nothing overflows.
    """
    T = a.shape[1]
    upper = torch.ones(T, T, dtype=torch.bool, device=a.device).triu()  # [s, t]: the running axis last is the fast one
    steps = torch.where(upper.triu(1), a.permute(0, 2, 3, 1).unsqueeze(-2), 1)
    return (steps.cumprod(-1) * upper).permute(0, 4, 3, 1, 2)


@dataclass(frozen=True)
class Attention(HeadOperator):
    """Softmax attention with its weights: a head's matrix is the weights themselves.

    Args:
        weights: (B, H, L, L); row i is the query, column j the key. All 0 in the rows of padding.
        head_size: As in :class:`HeadOperator`, with ``skip`` and ``bonus``.

    Cost: O(L²·D) time for one right-hand side.

    Source:
        Vaswani et al. 2017 (arXiv 1706.03762), equation 1.
    """

    weights: Tensor

    @cached_property
    def causal(self) -> bool:  # type: ignore[override]
        """Whether no token attends to a later one."""
        return not bool(self.weights.triu(1).any())

    @property
    def heads(self) -> int:
        """H, the number of heads."""
        return self.weights.shape[1]

    def _take_heads(self, head: Tensor) -> Attention:
        return replace(self, weights=self.weights[:, head.to(self.weights.device)])

    def after(self, start: int) -> Attention:
        """Return the attention between the tokens from ``start`` on."""
        skip, bonus = (None if s is None else since(s, start) for s in (self.skip, self.bonus))
        return replace(self, weights=self.weights[:, :, start:, start:], skip=skip, bonus=bonus)

    def _own(self, like: Tensor) -> Tensor:
        return self.weights.diagonal(dim1=-2, dim2=-1).transpose(1, 2)

    def _matrix(self, like: Tensor, tokens: slice) -> Tensor:
        return self.weights[..., tokens].permute(3, 0, 2, 1)

    def transposed(self) -> Attention:
        """Return the attention whose matrix is this one's, transposed and read backwards in time."""
        return replace(self, weights=self.weights.transpose(-1, -2).flip(-1, -2))

    def mix(self, x: Tensor) -> Tensor:
        """Weigh ``x`` (B, L, H, P)."""
        return torch.einsum("bhij,bjhp->bihp", self.weights, x)
