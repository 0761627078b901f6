"""Attention rollout over the layers' implicit attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from torch import Tensor, nn

from captum_ssm.attr.base import ImplicitAttentionMethod
from captum_ssm.matrices.fusion import Fusion, check_fusion, fuse
from captum_ssm.matrices.rollout import LayersOnStream, rollout
from captum_ssm.matrices.split_layer import SplitLayer
from captum_ssm.network.graph import ResidualGraph


class ImplicitAttentionRollout(ImplicitAttentionMethod):
    """Attention rollout: where the explained position's information comes from, over all layers.

    Score of token j: row i of ``prod_l rownorm(I + C_l)`` at the explained position i. With any fusion but
    ``"mean"`` the scores are shares: not negative, summing to 1. It depends on the target by its position
    only; for a class or a word rather than a position see
    :class:`~captum_ssm.ImplicitAttentionAttribution`.

    Args:
        forward_func: A transformers model, any other module, or any callable whose output Captum accepts.
        model: The model whose layers are explained; needed if ``forward_func`` is not a module.
        fusion: How the channels' matrices become one, see :data:`~captum_ssm.matrices.fusion.Fusion`;
            ``"absolute"`` is the published one.
        **options: ``attention``, ``without`` and ``tolerance``, see
            :class:`~captum_ssm.attr.base.ImplicitAttentionMethod`.

    Source:
        Abnar & Zuidema 2020 (arXiv 2005.00928); Zimerman, Ali & Wolf 2025 (arXiv 2405.16504).
    """

    gradient_at, one_score = "last layer", False

    def __init__(
        self,
        forward_func: Callable[..., Any],
        model: nn.Module | None = None,
        *,
        fusion: Fusion = "root",
        **options: Any,
    ) -> None:
        super().__init__(forward_func, model, **options)
        check_fusion(fusion)
        self.fusion: Fusion = fusion

    def _aggregate(self, layers: Sequence[SplitLayer], graph: ResidualGraph, query: Tensor) -> Tensor:
        matrix = partial(fuse, fusion=self.fusion)
        return rollout(LayersOnStream(layers, matrix, gradient_weighted=False), graph, query)
