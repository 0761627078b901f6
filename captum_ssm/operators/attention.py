"""Softmax attention, given its weights."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property

from torch import Tensor

from captum_ssm.operators.base import tokens_from
from captum_ssm.operators.heads import HeadOperator


@dataclass(frozen=True)
class Attention(HeadOperator):
    """Softmax attention with given weights, ``y_i = sum_j weights_ij x_j``: they are the head's matrix.

    Args:
        weights: (B, H, L, L); row i is the query, column j the key. All 0 in the rows of padding.
        head_size: P, the number of channels of a head.
        skip: Direct path, broadcastable to (B, L, D), or None.
        bonus: Further weight of the current token, broadcastable to (B, L, D), or None.

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

    def mix(self, x: Tensor) -> Tensor:
        """Return the weighted sums of ``x`` (B, L, H, P), of the same shape."""
        return (self.weights @ x.transpose(1, 2)).transpose(1, 2)

    def transposed(self) -> Attention:
        """Return the attention with the transposed weights, with tokens in reverse order."""
        return replace(self, weights=self.weights.transpose(-1, -2).flip(-1, -2))

    def take_heads(self, head: Tensor) -> Attention:
        """Return the attention of a selection of heads, given by their numbers."""
        return replace(self, weights=self.weights[:, head.to(self.weights.device)])

    def after(self, start: int) -> Attention:
        """Return the attention between the tokens from ``start`` on."""
        direct = self._direct_paths(lambda path: tokens_from(path, start))
        return replace(self, weights=self.weights[:, :, start:, start:], **direct)

    def head_diagonal(self, like: Tensor) -> Tensor:
        """Return the weight of each token for itself, (B, L, H)."""
        return self.weights.diagonal(dim1=-2, dim2=-1).transpose(1, 2)

    def matrices(self, like: Tensor) -> Tensor:
        """Return the weights."""
        return self.weights

    def head_columns(self, like: Tensor, tokens: slice) -> Tensor:
        """Return the weights of these keys, (J, B, L, H)."""
        return self.weights[..., tokens].permute(3, 0, 2, 1)
