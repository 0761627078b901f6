"""The methods by name, and one run of a method on a batch with all that belongs to its sum."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from captum_ssm.attr.attribution import ImplicitAttentionAttribution
from captum_ssm.attr.inner_relevance import LayerImplicitAttentionRelevance
from captum_ssm.attr.model_method import ModelMethod
from captum_ssm.attr.raw import RawImplicitAttention
from captum_ssm.attr.relevance import ImplicitAttentionRelevance
from captum_ssm.attr.rollout import ImplicitAttentionRollout
from captum_ssm.datasets.examples import Batch
from captum_ssm.datasets.forward import Forward
from captum_ssm.errors import InvalidInputError
from captum_ssm.layers.mixers import known_mixers

METHODS: dict[str, Callable[..., ModelMethod]] = {
    "relevance": ImplicitAttentionRelevance,
    "attribution": partial(ImplicitAttentionAttribution, rectify=None),
    "rollout": ImplicitAttentionRollout,
    "raw": RawImplicitAttention,
}
"""The methods by name: each is made from a forward function and the model."""

NAN = float("nan")


def method_of(method: str | Callable[..., ModelMethod]) -> Callable[..., ModelMethod]:
    """Return the constructor of a method, given by its name or itself.

    Raises:
        InvalidInputError: If there is none of this name.
    """
    if callable(method):
        return method
    if method not in METHODS:
        raise InvalidInputError(f"there is no method {method!r}; choose from {', '.join(METHODS)}, or pass a class.")
    return METHODS[method]


@dataclass(frozen=True)
class Result:
    """The scores of a batch, and how exact they are.

    Attributes:
        scores: The scores of each input.
        reference_value: F(x') of each row; NaN if the method knows none.
        completeness: Of each row the absolute error of the sum of its scores and of the terms that belong to no input;
            NaN if the method's scores have no sum.
        fidelity: Largest relative error of a layer's decomposition; NaN if no layer is decomposed.
        layers: Of each row the part of F(x) - F(x') that passes each known layer; empty if not asked for.
    """

    scores: tuple[Tensor, ...]
    reference_value: list[float]
    completeness: list[float]
    fidelity: float
    layers: list[list[float]]


class Explainer:
    """A method on a model.

    Args:
        make: The constructor of the method.
        forward: The function that runs the model.
        model: The model.
        patches: Return the scores of an image's patches.
        layers: Return also the part of the score that passes each known layer.

    Raises:
        InvalidInputError: If the method is none of relevance and the layers' parts are asked for.
        UnsupportedModelError: If the method does not know the model.
    """

    def __init__(
        self, make: Callable[..., ModelMethod], forward: Forward, model: Any, *, patches: bool, layers: bool
    ) -> None:
        self._method = make(forward, model)
        self._options = {"patches": True} if patches else {}
        self.layers = list(known_mixers(model)) if layers else []
        if layers and not isinstance(self._method, ImplicitAttentionRelevance):
            raise InvalidInputError("layers= takes the shares of a relevance; add method='relevance', or leave it out.")
        options = {name: getattr(self._method, name) for name in ("gate_rule", "value_share", "tolerance") if layers}
        self._inner = LayerImplicitAttentionRelevance(forward, self.layers, model, **options) if self.layers else None

    def explain(self, batch: Batch, target: Tensor | None, contrast: Tensor | None, value: Tensor) -> Result:
        """Explain a batch.

        Args:
            batch: The batch.
            target: The outcome of each row, (B,); None if the model gives one number for each.
            contrast: The one that it is explained against, (B,), or None.
            value: F(x) of each row as the model gives it, (B,), in float64.

        Returns:
            The scores with all that belongs to their sum.
        """
        scores = self._run(self._method, batch, target, contrast)
        if isinstance(self._method, ImplicitAttentionRelevance):
            reference = self._method.reference_value.double().cpu()
            terms = sum((term.double().cpu() for term in self._method.terms.values()), torch.zeros_like(reference))
            explained = value - reference.nan_to_num(0.0)
            error = (_sums(scores) + terms - explained).abs()
        else:
            reference = error = torch.full_like(value, NAN)
        inner = self._run(self._inner, batch, target, contrast) if self._inner is not None else ()  # of each layer
        parts = [_sums((part,)).tolist() for part in inner]
        fidelity = max(getattr(self._method, "fidelity", {}).values(), default=NAN)
        return Result(scores, reference.tolist(), error.tolist(), fidelity, [list(row) for row in zip(*parts)])

    def _run(
        self, method: ModelMethod, batch: Batch, target: Tensor | None, contrast: Tensor | None
    ) -> tuple[Tensor, ...]:
        """Return the scores of each input, or of each layer, by a method."""
        options: dict[str, Any] = dict(self._options)
        if isinstance(method, ImplicitAttentionRelevance):
            options["baselines"] = batch.baselines
        scores = method.attribute(batch.inputs, target, batch.args or None, contrast=contrast, **options)
        return tuple(scores) if isinstance(scores, (tuple, list)) else (scores,)


def _sums(scores: tuple[Tensor, ...]) -> Tensor:
    """Return the sum of each row's scores, (B,), in float64."""
    return sum((s.detach().double().cpu().flatten(1).sum(1) for s in scores), torch.zeros(len(scores[0])).double())
