"""Gradient-weighted attention rollout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_ssm.attr.base import ImplicitAttentionMethod
from captum_ssm.errors import InvalidInputError
from captum_ssm.matrices.core_matrix import CoreMatrix, FusedMatrix
from captum_ssm.matrices.entrywise import POSITIVE
from captum_ssm.matrices.rollout import LayersOnStream, rollout
from captum_ssm.matrices.split_layer import SplitLayer
from captum_ssm.matrices.token_matrix import DenseMatrix, MatrixSum, TokenMatrix
from captum_ssm.network.graph import ResidualGraph

Normalize = Literal["rows"] | None
"""How each layer's matrix is scaled before the residual path joins it: each row to a sum of 1, or not at all."""

Rectify = Literal["channel", "token"] | None
"""Where negative gradient-weighted attention is set to 0: in each channel, between tokens, or nowhere."""


class ImplicitAttentionAttribution(ImplicitAttentionMethod):
    """Gradient-weighted attention rollout: which tokens the explained score comes from.

    Each channel's attention is weighed by the gradient of the score, ``(dF/dA^d ⊙ A^d)_ij = u_id A^d_ij v_jd``
    with ``u`` the gradient at the attention's output and ``v`` its input, so no gradient is propagated
    through a matrix. The channels become one matrix, and the matrices of the layers are rolled out as in
    :class:`~captum_ssm.ImplicitAttentionRollout`.

    Args:
        forward_func: A transformers model, any other module, or any callable whose output Captum accepts.
        model: The model whose layers are explained; needed if ``forward_func`` is not a module.
        rectify: ``"channel"``: ``C_ij = mean_d max(u A v, 0)``, as published; O(L²·D·N).
            ``"token"``: ``C_ij = max(sum_d u A v, 0)``; O(L²·D·N).
            ``None``: ``C_ij = sum_d u A v``, signed: tokens that lower the score, to first order, are negative;
            in linear time, two passes of the layer's recurrence and no (L, L) matrix. The score matters: a change that
            all logits share decides nothing, so a difference of two logits or a log-probability explains a
            decision better than a logit alone.
        normalize: ``"rows"``: each row of a layer's matrix is divided by its sum, so that the residual path and the
            attention have equal shares in it, however small the gradient is there. ``None``: the size of the gradient
            decides the share of the attention. Rows of a signed matrix may sum to 0, so ``"rows"`` needs ``rectify``.
        **options: ``attention``, ``without`` and ``tolerance``, see
            :class:`~captum_ssm.attr.base.ImplicitAttentionMethod`.

    Source:
        Chefer, Gur & Wolf 2021 (arXiv 2012.09838), equations 13 and 14; for recurrent layers Ali, Zimerman &
        Wolf 2024 (arXiv 2403.01590) and Zimerman, Ali & Wolf 2025 (arXiv 2405.16504).
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        model: nn.Module | None = None,
        *,
        rectify: Rectify = "channel",
        normalize: Normalize = None,
        **options: Any,
    ) -> None:
        super().__init__(forward_func, model, **options)
        if rectify not in ("channel", "token", None):
            raise InvalidInputError(f"rectify must be 'channel', 'token' or None, not {rectify!r}.")
        if normalize not in ("rows", None):
            raise InvalidInputError(f"normalize must be 'rows' or None, not {normalize!r}.")
        if normalize is not None and rectify is None:
            raise InvalidInputError(
                "normalize='rows' divides each row by its sum, which may be 0 if it has entries of both signs; add "
                "rectify='channel' or rectify='token', or leave it out."
            )
        self.rectify: Rectify = rectify
        self.normalize: Normalize = normalize

    def _matrix(self, layer: SplitLayer) -> TokenMatrix:
        """Return the gradient-weighted attention of a layer, normalized."""
        attention = self._weighted_attention(layer)
        if self.normalize is None:
            return attention
        C = attention.dense()
        total = C.sum(-1, keepdim=True)  # (B, L, 1)
        return DenseMatrix(torch.where(total > 0, C / total, 0))

    def _weighted_attention(self, layer: SplitLayer) -> TokenMatrix:
        """Return the gradient-weighted attention ``C`` of a layer."""
        if self.rectify == "channel":
            weighted = (CoreMatrix(s.core, s.u / s.channels, s.v) for s in layer.splits)
            return MatrixSum(tuple(FusedMatrix(matrix, POSITIVE) for matrix in weighted))
        attention = MatrixSum(tuple(CoreMatrix(s.core, s.u, s.v) for s in layer.splits))
        return DenseMatrix(attention.dense().relu()) if self.rectify == "token" else attention

    def _aggregate(self, layers: Sequence[SplitLayer], graph: ResidualGraph, query: Tensor) -> Tensor:
        return rollout(LayersOnStream(layers, self._matrix, gradient_weighted=True), graph, query)
