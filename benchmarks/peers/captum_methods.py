"""Captum's methods that the benchmark has not: the other three go through :mod:`benchmarks.methods`."""

from __future__ import annotations

from typing import Any

from captum.attr import DeepLift, LayerIntegratedGradients
from torch import Tensor, nn

from benchmarks.methods import STEPS, NotApplicableError, Question


class Outputs(nn.Module):
    """What is explained as a module of embeddings or images: DeepLift takes no function.

    Args:
        question: The question.
    """

    def __init__(self, question: Question) -> None:
        super().__init__()
        self.model, self._question = question.model, question

    def forward(self, inputs: Tensor, rows: Tensor) -> Tensor:
        """Return the explained score (R, 1) of inputs in the place of those at ``rows`` (R,)."""
        return self._question.score(inputs, rows)[:, None]


def deep_lift(question: Question) -> Tensor:
    """Return DeepLift's scores (B, N), with the question's reference."""
    vectors = question.vectors(question.inputs)
    found = DeepLift(Outputs(question)).attribute(
        vectors, question.vectors(question.reference), target=0, additional_forward_args=question.rows
    )
    return question.by_feature(found).detach()


def layer_integrated_gradients(question: Question) -> Tensor:
    """Return integrated gradients (B, L) of the embedding layer's output: the model is called with ids.

    Raises:
        NotApplicableError: If there is no such layer, as for images.
    """
    if question.images:
        raise NotApplicableError("Images go through no embedding layer.")
    layer: Any = question.model.get_input_embeddings()
    found = LayerIntegratedGradients(question.score, layer).attribute(
        question.inputs,
        baselines=question.reference,
        additional_forward_args=question.rows,
        n_steps=STEPS,
        internal_batch_size=max(len(question.inputs), 128),
    )
    return question.by_feature(found).detach()
