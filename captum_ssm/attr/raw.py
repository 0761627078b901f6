"""The matrices of the last layers, without a rollout."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from captum_ssm.attr.base import ImplicitAttentionMethod
from captum_ssm.errors import InvalidInputError
from captum_ssm.matrices.fusion import Fusion, check_fusion, fuse
from captum_ssm.matrices.rollout import mean_row
from captum_ssm.matrices.split_layer import SplitLayer
from captum_ssm.matrices.token_matrix import RearrangedMatrix, TokenMatrix
from captum_ssm.network.graph import ResidualGraph


class RawImplicitAttention(ImplicitAttentionMethod):
    """The tokens that the explained position attends to in the last layers, by the layers' fused attention.

    Score of token j: the mean over the last ``layers`` layers of ``C_ij`` at the explained position i. Not
    negative, except with ``fusion="mean"``. It depends on the target by its position only.

    Args:
        forward_func: A transformers model, any other module, or any callable whose output Captum accepts.
        model: The model whose layers are explained; needed if ``forward_func`` is not a module.
        layers: How many layers, counted from the last.
        fusion: How the channels' matrices become one, see :data:`~captum_ssm.matrices.fusion.Fusion`;
            ``"absolute"`` is the published one.
        **options: ``attention``, ``without`` and ``tolerance``, see
            :class:`~captum_ssm.attr.base.ImplicitAttentionMethod`.

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
        if not isinstance(layers, int) or layers < 1:
            raise InvalidInputError(f"layers must be at least 1, an int, not {layers!r}.")
        self.layers = layers
        check_fusion(fusion)
        self.fusion: Fusion = fusion

    def _aggregate(self, layers: Sequence[SplitLayer], graph: ResidualGraph, query: Tensor) -> Tensor:
        last = range(len(layers))[-self.layers :]
        return mean_row((self._matrix(layers, graph, number) for number in reversed(last)), query)

    def _matrix(self, layers: Sequence[SplitLayer], graph: ResidualGraph, number: int) -> TokenMatrix:
        """Return the attention of a layer, its tokens in the order of the inputs."""
        matrix, order = fuse(layers[number], self.fusion), graph.order(number)
        return matrix if order is None else RearrangedMatrix(matrix, order)
