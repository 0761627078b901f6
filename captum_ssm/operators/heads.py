"""Token mixers whose channels share one matrix a head."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any, Self

import torch
from torch import Tensor

from captum_ssm.operators.base import Index, Operator, flip_tokens, one_hot, take_channels


@dataclass(frozen=True)
class HeadOperator(Operator):
    """A token mixer whose H heads each apply one (L, L) matrix to all of their P channels.

    Subclasses define the number of heads, the product with every head's matrix and its transpose.

    Args:
        head_size: P, the number of channels that share one head's matrix.
        skip: Direct path beside the heads' matrices (Mamba's D), broadcastable to (B, L, D), or None.
        bonus: Further weight of the current token (RWKV's u), broadcastable to (B, L, D), or None.
    """

    mixes_tokens = True

    head_size: int = field(default=1, kw_only=True)
    skip: Tensor | None = field(default=None, kw_only=True)
    bonus: Tensor | None = field(default=None, kw_only=True)

    optional = ("skip", "bonus")

    @property
    @abstractmethod
    def heads(self) -> int:
        """H, the number of heads."""

    @abstractmethod
    def take_heads(self, head: Tensor) -> Self:
        """Return the operator on a selection of heads, given by their numbers; its direct paths are unchanged."""

    @abstractmethod
    def mix(self, x: Tensor) -> Tensor:
        """Return every head's matrix times ``x`` (B, L, H, P), without the direct paths."""

    @abstractmethod
    def transposed(self) -> HeadOperator:
        """Return the operator whose matrices are the transposed ones, with tokens in reverse order."""

    @abstractmethod
    def head_diagonal(self, like: Tensor) -> Tensor:
        """Return the diagonal of every head's matrix, (B or 1, L or 1, H), for an input ``like`` (B, L, D)."""

    def head_columns(self, like: Tensor, tokens: slice) -> Tensor:
        """Return columns of every head's matrix, (J, B, L, H), for an input ``like`` (B, L, D)."""
        one = like.new_ones(1, 1, 1).expand(*like.shape[:2], self.heads)  # (B, L, H)
        return replace(self, head_size=1, skip=None, bonus=None).apply(one_hot(one, tokens))

    def matrices(self, like: Tensor) -> Tensor:
        """Return every head's matrix, (B, H, L, L), without the direct paths, for an input ``like`` (B, L, D).

        Cost: one pass with L right-hand sides.
        """
        B, L, _ = like.shape
        one = torch.eye(L, dtype=like.dtype, device=like.device)[None, :, None]  # (1, L, 1, L)
        return self.mix(one.expand(B, L, self.heads, L)).transpose(1, 2)

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """Output and input channels."""
        return self.heads * self.head_size, self.heads * self.head_size

    def apply(self, x: Tensor, bias: bool = False) -> Tensor:
        """Return the output for ``x`` (..., B, L, D).

        Args:
            x: Leading axes are further right-hand sides; they go through the heads' matrices as further channels.
            bias: Without effect: there is no constant term.

        Returns:
            (..., B, L, D).

        Raises:
            ValueError: If D is not H·P.
        """
        return self.on_heads(x, self.mix)

    def on_heads(self, x: Tensor, mix: Callable[[Tensor], Tensor]) -> Tensor:
        """Return a function of the heads, and the direct paths, for ``x`` (..., B, L, D).

        Args:
            x: The input.
            mix: From (B, L, H, P·J) to the same shape, where further right-hand sides are further channels.

        Returns:
            (..., B, L, D).

        Raises:
            ValueError: If D is not H·P.
        """
        B, L, D = x.shape[-3:]
        H, P = self.heads, self.head_size
        if D != H * P:
            raise ValueError(f"The scan has {H} heads of {P} channels, but the input has {D} channels.")
        columns = x.reshape(-1, B, L, H, P).permute(1, 2, 3, 4, 0)  # (B, L, H, P, J)
        y = mix(columns.flatten(3)).view(columns.shape).permute(4, 0, 1, 2, 3).reshape(x.shape)  # (..., B, L, D)
        for direct in (self.bonus, self.skip):
            if direct is not None:
                y = y + direct * x
        return y

    def adjoint(self, u: Tensor) -> Tensor:
        """Return the transposed output for ``u`` (..., B, L, D): the same kind of pass, last token to first."""
        return replace(self.transposed(), **self._direct_paths(flip_tokens)).apply(u.flip(-2)).flip(-2)

    def columns(self, v: Tensor, tokens: slice) -> Tensor:
        """Return column j times ``v_j`` for each of the tokens, (J, B, L, D); each head's matrix is computed once."""
        values = v[:, tokens].transpose(0, 1).unsqueeze(2).unflatten(-1, (self.heads, -1))  # (J, B, 1, H, P)
        columns = (self.head_columns(v, tokens).unsqueeze(-1) * values).flatten(-2)  # (J, B, L, D)
        direct = [path for path in (self.skip, self.bonus) if path is not None]
        return columns + sum(direct) * one_hot(v, tokens) if direct else columns

    def diagonal(self, like: Tensor) -> Tensor:
        """Return the weight of each token in its own output, (B or 1, L or 1, D), for an input ``like`` (B, L, D)."""
        by_channel = self.head_diagonal(like).repeat_interleave(self.head_size, dim=-1)  # (B or 1, L or 1, D)
        return sum((path for path in (self.skip, self.bonus) if path is not None), by_channel)

    def channels(self, index: Index) -> Self:
        """Return the operator on a selection of channels: whole heads stay heads, parts become heads of one channel."""
        H, P = self.heads, self.head_size
        direct = self._direct_paths(lambda path: take_channels(path, index))
        channel = torch.arange(H * P, device="cpu")[index.cpu() if isinstance(index, Tensor) else index]
        if H == 1:
            return replace(self, **direct, head_size=len(channel))
        first = channel[::P]  # the first channel of each head, if whole heads are selected
        are_whole_heads = torch.equal(channel, (first.unsqueeze(1) // P * P + torch.arange(P, device="cpu")).flatten())
        head = (first if are_whole_heads else channel) // P
        return replace(self.take_heads(head), **direct, head_size=P if are_whole_heads else 1)

    def _direct_paths(self, function: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Return the function of each direct path, by the name of its field, for ``dataclasses.replace``."""
        return {name: function(getattr(self, name)) for name in self.terms}
