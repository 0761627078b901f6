"""The matrices of the last layers, as they are."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from captum_ssm.aggregate import mean_row
from captum_ssm.attention import TokenMatrix
from captum_ssm.attr.base import ImplicitAttentionMethod
from captum_ssm.attr.fusion import Fusion, check_fusion, fuse
from captum_ssm.attr.view import LayerView
from captum_ssm.errors import InvalidInputError
from captum_ssm.wiring import Wiring


class RawImplicitAttention(ImplicitAttentionMethod):
    """What the explained position attends to in the last layers, by the layers' fused attention.

    Score of token j: the mean over the last ``layers`` layers of ``C_ij`` at the explained position i. Not
    negative, except with ``fusion="mean"``. It depends on the target by its position only.

    Args:
        forward_func: As in :class:`~captum_ssm.attr.base.ImplicitAttentionMethod`, with ``model``.
        model: Likewise.
        layers: How many layers, counted from the last.
        fusion: How the channels' matrices become one, see :data:`~captum_ssm.attr.fusion.Fusion`; as published:
            ``"absolute"``.
        **options: ``attention``, ``without`` and ``tolerance``, likewise.

    Source:
        Ali, Zimerman & Wolf 2024 (arXiv 2403.01590), section 4 ("raw attention").
    """

    gradient_at, one_score = "last layer", False

    def __init__(
        self,
        forward_func: Callable[..., Any],
        model: nn.Module | None = None,
        *,
        layers: int = 1,
        fusion: Fusion = "root",
        **options: Any,
    ) -> None:
        super().__init__(forward_func, model, **options)
        if layers < 1:
            raise InvalidInputError(f"layers must be at least 1, not {layers}.")
        self.layers = layers
        check_fusion(fusion)
        self.fusion: Fusion = fusion

    def _matrix(self, layer: LayerView) -> TokenMatrix:
        return fuse(layer, self.fusion)

    def _aggregate(self, layer: Callable[[int], LayerView], wiring: Wiring, query: Tensor) -> Tensor:
        last = range(len(wiring.reads))[-self.layers :]
        return mean_row((self._matrix(layer(number)) for number in reversed(last)), query)
