"""What an operator on token sequences is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from typing import ClassVar, TypeVar

import torch
from torch import Tensor

Index = slice | Tensor
"""Which channels: a slice, or a 1-D tensor of channel numbers."""

Self = TypeVar("Self", bound="Operator")


class Operator(ABC):
    """An affine map of token sequences, ``x -> A x + bias``.

    Subclasses say which axes they mix. A factor that mixes neither, or tokens only, is *channelwise*: it
    is one (L, L) matrix for each channel. A factor that mixes channels only is *tokenwise*.
    """

    mixes_tokens: ClassVar[bool] = False
    mixes_channels: ClassVar[bool] = False
    causal: ClassVar[bool] = False
    """Whether no output depends on a later input, and :meth:`after` is there to make use of it."""
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

    def without(self: Self, *terms: str) -> Self:
        """Return the operator with these optional terms left out.

        Raises:
            ValueError: If the operator has no such term.
        """
        for term in terms:
            if term not in self.terms:
                raise ValueError(f"{type(self).__name__} has no term {term!r}; it has {list(self.terms)}.")
        return replace(self, **dict.fromkeys(terms)) if terms else self  # type: ignore[type-var]

    def channels(self: Self, index: Index) -> Self:
        """Return the operator on these channels alone; taking channels before or after is the same.

        Raises:
            ValueError: If the operator mixes channels.
        """
        raise ValueError(f"{type(self).__name__} mixes channels, so none can be taken alone.")

    def after(self: Self, start: int) -> Self:
        """Return the operator on the tokens from ``start`` on, for inputs that are 0 before.

        Raises:
            NotImplementedError: If the operator reads the future, so that outputs before ``start`` exist.
        """
        raise NotImplementedError(f"{type(self).__name__} is not known to be causal.")

    def flipped(self) -> Operator:
        """Return the operator on the sequence read from its last token to its first, ``x -> flip(A flip(x))``."""
        return Flip(self)

    def diagonal(self, like: Tensor) -> Tensor:
        """Return what each token contributes to itself for each unit of its own, ``A^d_ii``.

        Args:
            like: Any tensor (B, L, D) of the shape, type and device of the input.

        Returns:
            Broadcastable to (B, L, D).

        Raises:
            ValueError: If the operator mixes channels, or reads both earlier and later tokens.
        """
        raise ValueError(f"The diagonal of {type(self).__name__} is not at hand.")

    def columns(self, v: Tensor, tokens: slice) -> Tensor:
        """Return what each of these tokens contributes: column j of the operator, times ``v_j``.

        Args:
            v: Values (B, L, input channels).
            tokens: Which columns j, a slice with a start and a stop.

        Returns:
            (J, B, L, output channels), J tokens.
        """
        return self.apply(one_hot(v, tokens))

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """Output and input channels; None where any number fits."""
        return None, None


@dataclass(frozen=True)
class Flip(Operator):
    """A factor on the sequence read from its last token to its first: ``y = flip(A flip(x))``.

    Made by :meth:`Operator.flipped`, for factors that mix tokens. A causal one becomes one that reads the future alone.
    Coefficients that differ by token are those of the flipped sequence: the first belongs to the last token.

    Args:
        operator: A.
    """

    operator: Operator

    @property
    def mixes_tokens(self) -> bool:  # type: ignore[override]
        """Whether the operator does."""
        return self.operator.mixes_tokens

    @property
    def mixes_channels(self) -> bool:  # type: ignore[override]
        """Whether the operator does."""
        return self.operator.mixes_channels

    @property
    def anticausal(self) -> bool:  # type: ignore[override]
        """Whether the operator is causal."""
        return self.operator.causal

    @property
    def terms(self) -> tuple[str, ...]:
        """What can be left out of the operator."""
        return self.operator.terms

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """Output and input channels."""
        return self.operator.sizes

    def apply(self, x: Tensor, bias: bool = False) -> Tensor:
        """Return ``flip(A flip(x))``. Cost: that of A."""
        return self.operator.apply(x.flip(-2), bias).flip(-2)

    def adjoint(self, u: Tensor) -> Tensor:
        """Return ``flip(A^T flip(u))``. Cost: that of A^T."""
        return self.operator.adjoint(u.flip(-2)).flip(-2)

    def flipped(self) -> Operator:
        """Return A itself."""
        return self.operator

    def diagonal(self, like: Tensor) -> Tensor:
        """Return the diagonal of A, flipped."""
        return self.operator.diagonal(like).expand(like.shape).flip(-2)

    def without(self, *terms: str) -> Flip:
        """Return the flipped operator without these terms."""
        return Flip(self.operator.without(*terms))

    def channels(self, index: Index) -> Flip:
        """Return the flipped operator on these channels alone."""
        return Flip(self.operator.channels(index))

    def columns(self, v: Tensor, tokens: slice) -> Tensor:
        """Return what each of these tokens contributes, (J, B, L, output channels), see :class:`Operator`."""
        L = v.shape[1]
        mirrored = slice(L - tokens.stop, L - tokens.start)
        return self.operator.columns(v.flip(1), mirrored).flip(0, 2)


def one_hot(v: Tensor, tokens: slice) -> Tensor:
    """Return (J, B, L, channels): ``v`` at one of the tokens in each of J copies, and 0 elsewhere.

    The copies lie innermost in memory, where a recurrence and the sum over channels want them.
    """
    keys = v[:, tokens]
    number = torch.arange(keys.shape[1], device=v.device)
    columns = v.new_zeros(*v.shape, len(number)).movedim(-1, 0)
    columns[number, :, tokens.start + number] = keys.transpose(0, 1)
    return columns


def since(tensor: Tensor, start: int) -> Tensor:
    """Cut the token axis, the last but one, unless it is shared (size 1 or absent)."""
    return tensor if tensor.dim() < 2 or tensor.shape[-2] == 1 else tensor[..., start:, :]


def take(tensor: Tensor, index: Index) -> Tensor:
    """Index the last axis, unless it is shared (size 1)."""
    return tensor if tensor.dim() == 0 or tensor.shape[-1] == 1 else tensor[..., index]
