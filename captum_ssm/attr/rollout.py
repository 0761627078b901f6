"""Attention rollout over the layers' implicit attention."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from captum_ssm.attention import ScaledAttention, TokenMatrix
from captum_ssm.attr.base import ImplicitAttentionMethod
from captum_ssm.attr.fusion import Fusion, check_fusion, fuse
from captum_ssm.attr.view import LayerView
from captum_ssm.wiring import Wiring


class ImplicitAttentionRollout(ImplicitAttentionMethod):
    """Attention rollout: where the explained position's information comes from, over all layers.

    Score of token j: row i of ``prod_l rownorm(I + C_l)`` at the explained position i. With any fusion but
    ``"mean"`` the scores are shares: not negative, summing to 1. It depends on the target by its position
    only; for a class or a word rather than a position see
    :class:`~captum_ssm.ImplicitAttentionAttribution`.

    Args:
        forward_func: As in :class:`~captum_ssm.attr.base.ImplicitAttentionMethod`, with ``model``.
        model: Likewise.
        fusion: How the channels' matrices become one, see :data:`~captum_ssm.attr.fusion.Fusion`; as published:
            ``"absolute"``.
        **options: ``attention``, ``without`` and ``tolerance``, likewise.

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

    def _matrix(self, layer: LayerView) -> TokenMatrix:
        return ScaledAttention(fuse(layer, self.fusion), layer.wire.write)

    def _aggregate(self, layer: Callable[[int], LayerView], wiring: Wiring, query: Tensor) -> Tensor:
        return self._rollout(self._matrix, layer, wiring, query)
