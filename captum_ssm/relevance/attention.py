"""The multipliers of softmax attention, in time O(L²·D) and memory O(L·D).

Attention runs once for the value and once for the reference. The rule is that of its functions: of both products, see
:class:`~captum_ssm.relevance.difference.Difference`, and of the softmax between them, see
:mod:`~captum_ssm.relevance.exponentials`. With the scores s, the weights w, the multipliers dy of the output, a mean
[.] of value and reference, and the one by halves m of the weights::

    dw_ij = <dy_i, [v_j]>        ds_ij = slope_ij (dw_ij - sum_k m_ik dw_ik)
    v_j: sum_i [w_ij] dy_i       q_i: sum_j ds_ij [k_j]       k_j: sum_i ds_ij [q_i]

The scores are computed block by block, and once more for the multipliers, of which each row has stored no more than the
logarithm of its sum of exponentials. Source: Dao et al. 2022 (arXiv 2205.14135), algorithms 1 and 4.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_ssm.operators.score_blocks import ScoreBlocks, by_heads
from captum_ssm.relevance.exponentials import over_mean_sum
from captum_ssm.relevance.slopes import slope_of_exp


class Side(NamedTuple):
    """The arguments of attention for the value or the reference."""

    q: Tensor
    """Queries (..., I, N)."""
    k: Tensor
    """Keys (..., J, N)."""
    v: Tensor
    """Values (..., J, P)."""


def difference_of_attentions(
    value: Side,
    reference: Side,
    mask: Tensor | None,
    sees_earlier: bool,
    scale: float,
    query_share: float = 0.5,
    weight_share: float = 0.5,
) -> tuple[Tensor, Tensor]:
    """Compute softmax attention for a value and a reference, the first with the multipliers as its gradient.

    Args:
        value: Queries, keys and values, whose leading axes may be shared.
        reference: Those of the reference, of the same shapes.
        mask: Added to the scores, broadcastable to (..., I, J), or None.
        sees_earlier: Whether query i sees the keys up to i alone; there is no ``mask`` then.
        scale: Of the scores.
        query_share: Of the joint change of a query and a key, the part that is the query's.
        weight_share: Of the joint change of a weight and a value, the part that is the weight's.

    Returns:
        Both outputs, (..., I, P).
    """
    lead = torch.broadcast_shapes(*(t.shape[:-2] for t in value))
    (q, k, v), others = ([by_heads(t, lead) for t in side] for side in (value, reference))
    blocks = ScoreBlocks(q, k, mask, sees_earlier, lead)
    shares = query_share, weight_share
    y, other = _Difference.apply(q, k, v, Side(*others), blocks, scale, shares)  # type: ignore[no-untyped-call]
    return y.view(*lead, *y.shape[2:]), other.view(*lead, *y.shape[2:])


class _Difference(torch.autograd.Function):
    """Attention of the value q, k, v and of the reference; backwards, the multipliers of q, k and v."""

    @staticmethod
    def forward(
        ctx: Any,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        reference: Side,
        blocks: ScoreBlocks,
        scale: float,
        shares: tuple[float, float],
    ) -> tuple[Tensor, Tensor]:
        y, log_sum = _attend(q * scale, k, v, blocks)
        other, other_log_sum = _attend(reference.q * scale, reference.k, reference.v, blocks)
        ctx.save_for_backward(q, k, v, *reference, log_sum, other_log_sum)
        ctx.blocks, ctx.scale, ctx.shares = blocks, scale, shares
        ctx.mark_non_differentiable(other)
        return y, other

    @staticmethod
    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *reference, log_sum, other_log_sum = ctx.saved_tensors
        query_share, weight_share = ctx.shares
        mean_q, mean_k, mean_v = (
            torch.lerp(theirs, ours, share)
            for ours, theirs, share in zip((q, k, v), reference, (1 - query_share, query_share, weight_share))
        )
        q, other_q, other_k = q * ctx.scale, reference[0] * ctx.scale, reference[1]
        d = log_sum - other_log_sum
        dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
        for block in ctx.blocks:
            s, t = block.scores(q, k), block.scores(other_q, other_k)
            w, u = (
                (block.masked(scores) - block.of_rows(sums)).exp_()
                for scores, sums in ((s, log_sum), (t, other_log_sum))
            )
            of_dy, of_d = block.of_rows(dy), block.of_rows(d)
            block.of_keys(dv).add_(torch.lerp(w, u, weight_share).mT @ of_dy)
            dw = of_dy @ block.of_keys(mean_v).mT
            dw -= (torch.lerp(u, w, 0.5) * dw).sum(-1, keepdim=True)
            ds = dw.mul_(slope_of_exp(s, t, *over_mean_sum(w, u, of_d)))
            block.of_rows(dq).copy_(ds @ block.of_keys(mean_k))
            block.of_keys(dk).add_(ds.mT @ block.of_rows(mean_q))
        return dq.mul_(ctx.scale), dk.mul_(ctx.scale), dv, None, None, None, None


def _attend(q: Tensor, k: Tensor, v: Tensor, blocks: ScoreBlocks) -> tuple[Tensor, Tensor]:
    """Return the output (B, H, I, P), and by row the logarithm of the sum of exponentials, (B, H, I, 1)."""
    y, log_sum = q.new_empty(*q.shape[:3], v.shape[3]), q.new_empty(*q.shape[:3], 1)
    for block in blocks:
        scores = block.masked(block.scores(q, k))
        largest = scores.amax(-1, keepdim=True)
        weights = scores.sub_(largest).exp_()
        total = weights.sum(-1, keepdim=True)
        block.of_rows(y).copy_((weights @ block.of_keys(v)).div_(total))
        block.of_rows(log_sum).copy_(total.log().add_(largest))
    return y, log_sum
