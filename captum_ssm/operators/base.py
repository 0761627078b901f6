"""The interface of an operator on token sequences, and operators that read the tokens in another order."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import cached_property
from typing import ClassVar, Self

import torch
from torch import Tensor

Index = slice | Tensor
"""A selection of channels: a slice, or a 1-D tensor of channel numbers."""


class Operator(ABC):
    """An affine map of token sequences, ``x -> A x + bias``.

    Subclasses declare which axes they mix. An operator that does not mix channels is *channelwise*: it is one (L, L)
    matrix for each channel. An operator that mixes channels but no tokens is *tokenwise*.
    """

    mixes_tokens: ClassVar[bool] = False
    mixes_channels: ClassVar[bool] = False
    causal: ClassVar[bool] = False
    """Whether no output depends on a later input. Such an operator implements :meth:`after`."""
    anticausal: ClassVar[bool] = False
    """Whether no output depends on an earlier input."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Names of the fields that may be None: the terms that :meth:`without` can leave out."""

    @abstractmethod
    def apply(self, x: Tensor, bias: bool = False) -> Tensor:
        """Return ``A x``, or ``A x + bias``.

        Args:
            x: (..., B, L, input channels).
            bias: Whether to add the constant term.

        Returns:
            (..., B, L, output channels).
        """

    @abstractmethod
    def adjoint(self, u: Tensor) -> Tensor:
        """Return ``A^T u`` for ``u`` (..., B, L, output channels), shape (..., B, L, input channels)."""

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the optional terms that this operator has."""
        return tuple(name for name in self.optional if getattr(self, name) is not None)

    def without(self, *terms: str) -> Self:
        """Return the operator without some of its optional terms.

        Args:
            *terms: Names out of :attr:`terms`.

        Returns:
            A copy; the operator itself if no term is named.

        Raises:
            ValueError: If the operator has no such term.
        """
        for term in terms:
            if term not in self.terms:
                raise ValueError(f"{type(self).__name__} has no term {term!r}; it has {list(self.terms)}.")
        return replace(self, **dict.fromkeys(terms)) if terms else self  # type: ignore[type-var]

    def channels(self, index: Index) -> Self:
        """Return the operator on a selection of channels, ``x[..., index] -> apply(x)[..., index]``.

        Args:
            index: The channels.

        Raises:
            ValueError: If the operator mixes channels.
        """
        raise ValueError(f"{type(self).__name__} mixes channels, so none can be taken alone.")

    def after(self, start: int) -> Operator:
        """Return the operator on the tokens from ``start`` on, for inputs that are 0 before.

        Args:
            start: The first token.

        Returns:
            The operator ``x[..., start:, :] -> apply(x)[..., start:, :]``.

        Raises:
            NotImplementedError: If the operator reads the future, so that outputs before ``start`` exist.
        """
        raise NotImplementedError(f"{type(self).__name__} is not known to be causal.")

    def flipped(self) -> Operator:
        """Return the operator on the sequence read from its last token to its first, ``x -> flip(A flip(x))``."""
        return Flip(self)

    def diagonal(self, like: Tensor) -> Tensor:
        """Return the weight of each token in its own output, ``A^d_ii``, broadcastable to (B, L, D).

        Args:
            like: Any tensor (B, L, D) of the shape, type and device of the input.

        Raises:
            ValueError: If the operator mixes channels, or reads both earlier and later tokens.
        """
        raise ValueError(f"The diagonal of {type(self).__name__} is not defined.")

    def columns(self, v: Tensor, tokens: slice) -> Tensor:
        """Return the contributions of single tokens: column j of the operator, times ``v_j``.

        Args:
            v: Values (B, L, input channels).
            tokens: The columns j, a slice with a start and a stop.

        Returns:
            (J, B, L, output channels): entry ``[j, :, i]`` is the contribution of the j-th of the tokens to token i.
        """
        return self.apply(one_hot(v, tokens))

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """Output and input channels; None where any number fits."""
        return None, None


@dataclass(frozen=True)
class Rearranged(Operator):
    """An operator on the sequence with its tokens in another order: ``y = back(A there(x))``.

    Coefficients that differ by token belong to the rearranged sequence. Subclasses say what the order is.

    Args:
        operator: A.
    """

    operator: Operator

    @abstractmethod
    def there(self, x: Tensor) -> Tensor:
        """Return the tokens of ``x`` (..., L, channels) in the order in which A reads them."""

    @abstractmethod
    def back(self, y: Tensor) -> Tensor:
        """Return the tokens of ``y`` (..., L, channels), in the order in which A reads them, in their own."""

    @property
    def mixes_tokens(self) -> bool:  # type: ignore[override]
        """Whether A mixes tokens."""
        return self.operator.mixes_tokens

    @property
    def mixes_channels(self) -> bool:  # type: ignore[override]
        """Whether A mixes channels."""
        return self.operator.mixes_channels

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the optional terms of A."""
        return self.operator.terms

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """Output and input channels."""
        return self.operator.sizes

    def apply(self, x: Tensor, bias: bool = False) -> Tensor:
        """Return ``back(A there(x))``. Cost: one pass of A."""
        return self.back(self.operator.apply(self.there(x), bias))

    def adjoint(self, u: Tensor) -> Tensor:
        """Return ``back(A^T there(u))``: an order is undone by its transpose. Cost: one pass of A^T."""
        return self.back(self.operator.adjoint(self.there(u)))

    def without(self, *terms: str) -> Self:
        """Return the operator in this order without these terms."""
        return replace(self, operator=self.operator.without(*terms))

    def channels(self, index: Index) -> Self:
        """Return the operator in this order on a selection of channels."""
        return replace(self, operator=self.operator.channels(index))


@dataclass(frozen=True)
class Flip(Rearranged):
    """An operator on the sequence read from its last token to its first: ``y = flip(A flip(x))``.

    :meth:`Operator.flipped` makes it of operators that mix tokens. The flip of a causal operator reads only the future.

    Args:
        operator: A.
    """

    @property
    def anticausal(self) -> bool:  # type: ignore[override]
        """Whether A is causal."""
        return self.operator.causal

    def there(self, x: Tensor) -> Tensor:
        """Return the tokens of ``x`` (..., L, channels) from the last to the first."""
        return x.flip(-2)

    def back(self, y: Tensor) -> Tensor:
        """Return the tokens of ``y`` (..., L, channels) from the last to the first."""
        return y.flip(-2)

    def flipped(self) -> Operator:
        """Return A itself."""
        return self.operator

    def diagonal(self, like: Tensor) -> Tensor:
        """Return the diagonal of A, flipped."""
        return self.operator.diagonal(like).expand(like.shape).flip(-2)

    def columns(self, v: Tensor, tokens: slice) -> Tensor:
        """Return the contributions of single tokens, (J, B, L, output channels), see :meth:`Operator.columns`."""
        L = v.shape[1]
        mirrored = slice(L - tokens.stop, L - tokens.start)
        return self.operator.columns(v.flip(1), mirrored).flip(0, 2)


@dataclass(frozen=True)
class Reordered(Rearranged):
    """An operator that reads the tokens in an order of its own: ``y[order] = A x[order]``.

    One of the four ways of a scan over the columns of an image, or over the slices of a volume. Of all orders it is
    neither causal nor anticausal.

    Args:
        operator: A.
        order: (L,), the number of the token that A reads at each place; each token once.

    Example:
        >>> columns = torch.arange(6).view(2, 3).T.flatten()  # of an image of 2 rows and 3 columns
        >>> columns.tolist()
        [0, 3, 1, 4, 2, 5]
    """

    order: Tensor

    @cached_property
    def _places(self) -> Tensor:
        """The place of each token in the order, (L,)."""
        return self.order.argsort()

    def there(self, x: Tensor) -> Tensor:
        """Return the tokens of ``x`` (..., L, channels) in this order."""
        return x[..., self.order, :]

    def back(self, y: Tensor) -> Tensor:
        """Return the tokens of ``y`` (..., L, channels), which are in this order, in their own."""
        return y[..., self._places, :]

    def diagonal(self, like: Tensor) -> Tensor:
        """Return the diagonal of A, its tokens in their own order."""
        return self.back(self.operator.diagonal(like).expand(like.shape))


def one_hot(v: Tensor, tokens: slice) -> Tensor:
    """Return one copy of ``v`` for each of the tokens, with 0 at all other tokens.

    Args:
        v: (B, L, channels).
        tokens: A slice with a start and a stop.

    Returns:
        (J, B, L, channels). The copies lie innermost in memory, where a recurrence and a sum over channels read them
        fastest.
    """
    values = v[:, tokens]  # (B, J, channels)
    number = torch.arange(values.shape[1], device=v.device)
    columns = v.new_zeros(*v.shape, len(number)).movedim(-1, 0)  # (J, B, L, channels)
    columns[number, :, tokens.start + number] = values.transpose(0, 1)
    return columns


def tokens_from(tensor: Tensor, start: int) -> Tensor:
    """Cut off the tokens before ``start``, unless the token axis, the last but one, is absent or shared (size 1)."""
    return tensor if tensor.dim() < 2 or tensor.shape[-2] == 1 else tensor[..., start:, :]


def flip_tokens(tensor: Tensor) -> Tensor:
    """Reverse the token axis, the last but one, unless it is absent."""
    return tensor if tensor.dim() < 2 else tensor.flip(-2)


def take_channels(tensor: Tensor, index: Index) -> Tensor:
    """Select channels, unless the channel axis, the last one, is absent or shared (size 1)."""
    return tensor if tensor.dim() == 0 or tensor.shape[-1] == 1 else tensor[..., index]
