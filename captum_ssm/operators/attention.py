"""Attention between tokens: with given weights, and softmax attention, whose weights are those of queries and keys."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from captum_ssm.operators.base import tokens_from
from captum_ssm.operators.heads import HeadOperator
from captum_ssm.operators.score_blocks import HIDDEN, ScoreBlocks


@dataclass(frozen=True)
class Attention(HeadOperator):
    """Attention with given weights, ``y_i = sum_j weights_ij x_j``: they are the head's matrix.

    Args:
        weights: (B, H, L, L); row i is the query, column j the key. All 0 in the rows of padding.
        head_size: P, the number of channels of a head.
        skip: Direct path, broadcastable to (B, L, D), or None.
        bonus: Further weight of the current token, broadcastable to (B, L, D), or None.

    Cost: O(L²·D) time for one right-hand side.
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


@dataclass(frozen=True)
class SoftmaxAttention(HeadOperator):
    """Softmax attention, ``y_i = sum_j w_ij x_j`` with ``w_i = attends_i softmax(scale <q_i, k_j> + mask_ij)``.

    The weights are computed where they are read; a product with one input needs none of the L².

    Args:
        queries: (B, H, L, N).
        keys: (B, H, L, N).
        scale: Of the scores.
        mask: Added to the scores, (B or 1, H or 1, L, L); at most :data:`HIDDEN` where query i does not see key j. None
            for a mask of 0.
        sees_earlier: Whether each token sees itself and earlier ones alone, which a ``mask`` says otherwise.
        attends: 0 for a token that attends to none, as padding, else 1, (B or 1, H or 1, L or 1, 1). None
            for 1.
        head_size: P, the number of channels of a head.
        skip: Direct path, broadcastable to (B, L, D), or None.
        bonus: Further weight of the current token, broadcastable to (B, L, D), or None.

    Cost: O(L²·D) time and O(L·D) memory for one right-hand side with P at most N; B·H·L² numbers once the weights are
    read, and in :meth:`mix` of further right-hand sides on a processor.

    Source:
        Vaswani et al. 2017 (arXiv 1706.03762), equation 1.
    """

    queries: Tensor
    keys: Tensor
    scale: float
    mask: Tensor | None = field(default=None, kw_only=True)
    sees_earlier: bool = field(default=False, kw_only=True)
    attends: Tensor | None = field(default=None, kw_only=True)

    @cached_property
    def weights(self) -> Tensor:
        """(B, H, L, L); row i is the query, column j the key."""
        scores = self.queries @ self.keys.mT * self.scale
        if self.sees_earlier:
            later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
            scores = scores.masked_fill(later, -torch.inf)
        if self.mask is not None:
            scores = scores + self.mask
        weights = scores.softmax(-1)
        return weights if self.attends is None else weights * self.attends

    @cached_property
    def causal(self) -> bool:  # type: ignore[override]
        """Whether no token attends to a later one."""
        if self.sees_earlier:
            return True
        L, like = self.queries.shape[2], self.queries
        sees = torch.ones(1, 1, L, L, dtype=torch.bool, device=like.device) if self.mask is None else self.mask > HIDDEN
        return not bool((sees if self.attends is None else sees & (self.attends != 0)).triu(1).any())

    @property
    def heads(self) -> int:
        """H, the number of heads."""
        return self.queries.shape[1]

    def mix(self, x: Tensor) -> Tensor:
        """Return the weighted sums of ``x`` (B, L, H, P), of the same shape."""
        y = weighted_sums(self.queries, self.keys, x.transpose(1, 2), self.mask, self.sees_earlier, self.scale)
        return (y if self.attends is None else y * self.attends).transpose(1, 2)

    def adjoint(self, u: Tensor) -> Tensor:
        """Return the transposed output for ``u`` (..., B, L, D)."""
        return self.on_heads(u, self._mix_transposed)

    def _mix_transposed(self, u: Tensor) -> Tensor:
        """Return the sums over the queries, ``sum_i w_ij u_i``, of ``u`` (B, L, H, P), of the same shape."""
        u = (u if self.attends is None else u * self.attends.transpose(1, 2)).transpose(1, 2)
        queries, sums = self.queries * self.scale, torch.zeros_like(u)
        for block in ScoreBlocks(queries, self.keys, self.mask, self.sees_earlier, queries.shape[:2]):
            weights = block.masked(block.scores(queries, self.keys)).softmax(-1)
            block.of_keys(sums).add_(weights.mT @ block.of_rows(u))
        return sums.transpose(1, 2)

    def transposed(self) -> Attention:
        """Return the attention with the transposed weights, with tokens in reverse order."""
        return self._with_weights.transposed()

    def take_heads(self, head: Tensor) -> SoftmaxAttention:
        """Return the attention of a selection of heads, given by their numbers."""
        heads = head.to(self.queries.device)
        mask, attends = (t if t is None or t.shape[1] == 1 else t[:, heads] for t in (self.mask, self.attends))
        return replace(self, queries=self.queries[:, heads], keys=self.keys[:, heads], mask=mask, attends=attends)

    def after(self, start: int) -> Attention:
        """Return the attention between the tokens from ``start`` on."""
        return self._with_weights.after(start)

    def head_diagonal(self, like: Tensor) -> Tensor:
        """Return the weight of each token for itself, (B, L, H)."""
        return self._with_weights.head_diagonal(like)

    def matrices(self, like: Tensor) -> Tensor:
        """Return the weights."""
        return self.weights

    def head_columns(self, like: Tensor, tokens: slice) -> Tensor:
        """Return the weights of these keys, (J, B, L, H)."""
        return self._with_weights.head_columns(like, tokens)

    @property
    def _with_weights(self) -> Attention:
        return Attention(self.weights, head_size=self.head_size, skip=self.skip, bonus=self.bonus)


def weighted_sums(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sees_earlier: bool, scale: float) -> Tensor:
    """Compute ``softmax(scale q k^T + mask) v``, as a function that a rule of relevance takes over.

    Args:
        q: Queries (..., I, N).
        k: Keys (..., J, N).
        v: Values (..., J, P).
        mask: Broadcastable to (..., I, J), or None.
        sees_earlier: Whether query i sees the keys up to i alone; there is no ``mask`` then.
        scale: Of the scores.

    Returns:
        (..., I, P).
    """
    if has_torch_function((q, k, v)):
        return handle_torch_function(weighted_sums, (q, k, v), q, k, v, mask, sees_earlier, scale)
    N, P = q.shape[-1], v.shape[-1]
    if P < N:  # as in latent attention; torch goes block by block where queries, keys and values are of one size
        v = F.pad(v, (0, N - P))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=sees_earlier, scale=scale)[..., :P]
