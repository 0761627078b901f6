"""The recipes of the papers' code for Vision Mamba, which use nothing but the class token's row."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from captum_ssm.attr.base import ImplicitAttentionMethod
from captum_ssm.errors import InvalidInputError, UnsupportedModelError
from captum_ssm.matrices.split_layer import SplitLayer
from captum_ssm.network.graph import ResidualGraph
from captum_ssm.operators import Chain, Operator, Rearranged, Scan

Recipe = Literal["raw", "rollout", "attribution-2024", "attribution-2025"]
"""The treatment of the class token's row of every channel, ``a_dj`` of a layer:

* ``"raw"``: ``a`` is scaled to 0 to 1; mean over channels and layers;
* ``"rollout"``: mean over channels;
* ``"attribution-2024"``: ``max(a, 0)`` is scaled to 0 to 1; mean over channels, times the gradient;
* ``"attribution-2025"``: mean over channels of ``max(a, 0)``, times the gradient, is scaled to 0 to 1.

The gradient of token j is ``max_e max(g_je, 0)``, scaled to 0 to 1, g that of the score at the layer's output. To scale
is ``(a - min a) / (max a - min a)``. But for ``"raw"``, the layers are then rolled out with the class token's row in
the place of every row: ``r <- (r + a) / (1 + sum_j a_j)``.
"""


class ClassTokenAttention(ImplicitAttentionMethod):
    """The published recipes for Vision Mamba, by the rules of their code, so that its figures can be compared.

    They know one row of each layer, that of the class token, both directions added up, without skip and bias, and have
    every token attend as the class token does. The code of 2024 reads the state before the class token's own decay and
    input. For the rollout of the whole matrices of both directions, from any token, see
    :class:`~captum_ssm.ImplicitAttentionRollout`. The class token's own score is 0, and so are negative ones. If all
    entries to be scaled are equal, which the code turns into NaN, they count as 0.

    Args:
        forward_func: A transformers model, any other module, or any callable whose output Captum accepts.
        model: The model whose layers are explained; needed if ``forward_func`` is not a module.
        recipe: See :data:`Recipe`. The papers' attention goes with it: ``attention="scan"`` in 2024, ``"unified"``, the
            default, in 2025.
        start_layer: Number of the first layer that counts; the papers' code has 15, of 24.
        **options: ``attention``, ``without`` and ``tolerance``, see
            :class:`~captum_ssm.attr.base.ImplicitAttentionMethod`.

    Raises:
        InvalidInputError: If there is no such recipe or layer; when called, if the score is not read at one token.

    Cost: O(L·D·N) a layer.

    Source:
        Ali, Zimerman & Wolf 2024 (arXiv 2403.01590), https://github.com/AmeenAli/HiddenMambaAttn ``vim/xai_utils.py``;
        Zimerman, Ali & Wolf 2025 (arXiv 2405.16504), https://github.com/Itamarzimm/UnifiedImplicitAttnRepr
        ``MambaVision/imagenet_seg_eval.py``; the rows in both ones' ``mamba-1p1p1/mamba_ssm``.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        model: nn.Module | None = None,
        *,
        recipe: Recipe = "attribution-2025",
        start_layer: int = 0,
        **options: Any,
    ) -> None:
        super().__init__(forward_func, model, **options)
        if recipe not in get_args(Recipe):
            raise InvalidInputError(f"recipe must be one of {', '.join(get_args(Recipe))}, not {recipe!r}.")
        if not isinstance(start_layer, int) or start_layer < 0:
            raise InvalidInputError(f"start_layer must be an int of at least 0, not {start_layer!r}.")
        self.recipe: Recipe = recipe
        self.start_layer = start_layer

    def _aggregate(self, layers: Sequence[SplitLayer], graph: ResidualGraph, query: Tensor) -> Tensor:
        count = len(layers)
        if self.start_layer >= count:
            raise InvalidInputError(f"start_layer is {self.start_layer}, but the model has {count} layers.")
        if bool((query > 0).sum(-1).ne(1).any()):
            raise InvalidInputError(
                "The score is read at several tokens, and the published recipes know a single class token. Pass its "
                "position as `query`, or use ImplicitAttentionRollout."
            )
        if not graph.is_in_order:
            raise UnsupportedModelError(
                "A layer has the tokens in another order than the inputs, which the published recipes do not know. Use "
                "ImplicitAttentionRollout or ImplicitAttentionAttribution, which follow it."
            )
        token = (query > 0).to(query)
        rows = [self._row(layers[number], token) for number in range(self.start_layer, count)]
        if self.recipe == "raw":
            result = torch.stack(rows).mean(0)
        else:
            result = token
            for row in reversed(rows):
                result = (result + row) / (1 + row.sum(-1, keepdim=True))
        return result.clamp(min=0) * (1 - token)

    def _row(self, layer: SplitLayer, token: Tensor) -> Tensor:
        """Return the weights of a layer's row, (B, L)."""
        late = self.recipe != "attribution-2025"
        a = sum(_channels(split.core.summands(), token, split.channels, late) for split in layer.splits)
        assert isinstance(a, Tensor)
        if self.recipe == "rollout":
            return a.mean(-1)
        if self.recipe == "raw":
            return _scaled(a).mean(-1)
        a = a.clamp(min=0)
        gradient = layer.splits[0].gradient
        assert gradient is not None
        slope = _scaled(gradient.amax(-1).clamp(min=0))
        if self.recipe == "attribution-2024":
            return _scaled(a).mean(-1) * slope
        return _scaled(a.mean(-1) * slope)


def _channels(directions: dict[str, Chain], token: Tensor, channels: int, late: bool) -> Tensor:
    """Return the token's row of every channel, (B, L, D): of each direction up to the token.

    ``late``: without the token's own decay and its own column, as the code of 2024.
    """
    one = token.unsqueeze(-1).expand(-1, -1, channels)
    rows = []
    for chain in directions.values():
        kept = chain.without(*(term for term in ("skip", "bonus", "half") if term in chain.terms))
        if late:
            kept = Chain({name: _late(operator) for name, operator in kept.factors.items()})
        rows.append(kept.adjoint(one))
    return torch.stack(rows).sum(0)


def _late(operator: Operator) -> Operator:
    """Return a recurrence that reads its state before it writes it; any other operator as it is."""
    if isinstance(operator, Rearranged):
        return replace(operator, operator=_late(operator.operator))
    return replace(operator, lag=1) if isinstance(operator, Scan) else operator


def _scaled(a: Tensor) -> Tensor:
    """Return each example's entries, moved and scaled to lie between 0 and 1; 0 where all are equal."""
    low, high = (function(a.flatten(1), 1) for function in (torch.amin, torch.amax))
    low, high = (bound.view(-1, *[1] * (a.dim() - 1)) for bound in (low, high))
    return torch.where(high > low, (a - low) / (high - low), 0)
