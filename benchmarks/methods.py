"""Every method that the benchmark compares, by name: from a question to one score for each token or patch.

All of them get the same question, that is, explain the same score against the same reference. Those of the literature
that do not look inside the model are Captum's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any, Literal

import torch
from captum.attr import FeatureAblation, InputXGradient, IntegratedGradients, NoiseTunnel, Saliency
from torch import Tensor

from captum_ssm import (
    ClassTokenAttention,
    ImplicitAttentionAttribution,
    ImplicitAttentionRelevance,
    ImplicitAttentionRollout,
    RawImplicitAttention,
)
from captum_ssm.metrics import random_attributions
from captum_ssm.network.forward import run_model
from tests.oracles_relevance import mamba_lrp

STEPS = 50
"""Of integrated gradients."""
SAMPLES = 25
"""Noisy copies of an input for SmoothGrad."""
NOISE = 0.1
"""Standard deviation of its noise, as a share of the inputs' range."""
ABLATED = ("conv", "act", "gate", "norm", "skip", "bias")


class NotApplicableError(Exception):
    """The model has not what the method needs."""


@dataclass(frozen=True)
class Question:
    """Why this answer to these inputs?

    Attributes:
        model: The model.
        inputs: Token ids (B, L), all of one length, or images (B, C, H, W).
        target: (B,) the answers.
        reference: What the inputs are compared with where a method compares, in their shape.
        prior: (N,) how much each token or patch matters on average over other inputs: all that positions can tell.
        contrast: (B,) explain the target's logit less that of this one; None: the target's logit.
        log_probability: Explain the target's log-probability instead.
        patch: Side of the patches that images are explained in.
    """

    model: Any
    inputs: Tensor
    target: Tensor
    reference: Tensor
    prior: Tensor
    contrast: Tensor | None = None
    log_probability: bool = False
    patch: int = 1

    @property
    def images(self) -> bool:
        """Whether the inputs are images."""
        return self.inputs.dim() == 4

    def outputs(self, inputs: Tensor) -> Tensor:
        """Return what target and contrast select from, (B, classes), for ids, embeddings or images."""
        logits = run_model(self.model, inputs)
        return logits.log_softmax(-1) if self.log_probability else logits

    def score(self, inputs: Tensor, rows: Tensor) -> Tensor:
        """Return the explained score (R,) of inputs in the place of those at ``rows`` (R,)."""
        return self.select(self.outputs(inputs), rows)

    def select(self, outputs: Tensor, rows: Tensor) -> Tensor:
        """Return the explained score (R,) from outputs (R, classes)."""
        score = outputs.gather(1, self.target[rows, None])[:, 0]
        return score if self.contrast is None else score - outputs.gather(1, self.contrast[rows, None])[:, 0]

    @property
    def rows(self) -> Tensor:
        """The number of each input, (B,)."""
        return torch.arange(len(self.inputs))

    def vectors(self, inputs: Tensor) -> Tensor:
        """Return embeddings (B, L, E), or images as they are."""
        return inputs if self.images else self.model.get_input_embeddings()(inputs).detach()

    def by_feature(self, attributions: Tensor) -> Tensor:
        """Return one score for each token or patch, (B, N), from those of components or pixels."""
        if not self.images:
            return attributions if attributions.dim() == 2 else attributions.sum(-1)
        pixels = attributions.sum(1)
        return pixels.unflatten(2, (-1, self.patch)).unflatten(1, (-1, self.patch)).sum((2, 4)).flatten(1)

    @cached_property
    def features(self) -> Tensor:
        """The number of the token or patch that each entry of an input belongs to, (1, ...)."""
        if not self.images:
            return torch.arange(self.inputs.shape[1])[None]
        height, width = (size // self.patch for size in self.inputs.shape[2:])
        numbers = torch.arange(height * width).view(1, 1, height, width)
        return numbers.repeat_interleave(self.patch, 2).repeat_interleave(self.patch, 3)


Function = Callable[[Question], Tensor]
Kind = Literal["control", "peer", "published", "ours", "ablation", "variant"]


@dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        kind: ``"control"``: knows nothing; ``"peer"``: anybody's; ``"published"``: implicit attention as others have
            it; ``"ours"``; ``"ablation"`` of ours; ``"variant"``: tried to see what helps.
        explain: From a question to scores (B, N).
    """

    kind: Kind
    explain: Function


# --- controls and peers ---------------------------------------------------------------------------


def random(question: Question) -> Tensor:
    """Return random scores."""
    return question.by_feature(random_attributions(question.inputs))


def position(question: Question) -> Tensor:
    """Return how much each position matters on average."""
    return question.prior.repeat(len(question.inputs), 1)


def saliency(question: Question) -> Tensor:
    """Return the sum of the absolute gradient."""
    return _gradients(question, Saliency(question.score))


def gradient_x_input(question: Question) -> Tensor:
    """Return gradient times input."""
    return _gradients(question, InputXGradient(question.score))


def smoothgrad(question: Question) -> Tensor:
    """Return the mean gradient at noisy inputs, times the input."""
    vectors = question.vectors(question.inputs)
    gradient = NoiseTunnel(Saliency(question.score)).attribute(
        vectors,
        nt_samples=SAMPLES,
        nt_samples_batch_size=1,
        stdevs=NOISE * float(vectors.max() - vectors.min()),
        abs=False,
        additional_forward_args=question.rows,
    )
    return question.by_feature(vectors * gradient).detach()


def integrated_gradients(question: Question) -> Tensor:
    """Return integrated gradients along the line from the reference."""
    return _gradients(
        question,
        IntegratedGradients(question.score),
        baselines=question.vectors(question.reference),
        n_steps=STEPS,
        internal_batch_size=max(len(question.inputs), 128),
    )


def occlusion(question: Question) -> Tensor:
    """Return by how much the score falls when the reference takes the place of one token or patch."""
    with torch.no_grad():
        found = FeatureAblation(question.score).attribute(
            question.inputs,
            baselines=question.reference,
            feature_mask=question.features.expand_as(question.inputs[:1]),
            additional_forward_args=question.rows,
        )
    # Captum writes what it found for a feature at each of its entries.
    return question.by_feature(found) / (question.patch**2 * question.inputs.shape[1] if question.images else 1)


def lrp_of_mamba(question: Question) -> Tensor:
    """Return MambaLRP's relevance of a Mamba-1, restated independently of this package."""
    if type(question.model).__name__ != "MambaForCausalLM":
        raise NotApplicableError
    return mamba_lrp(_Read(question), question.inputs, target=0).float()


class _Read:
    """A ``MambaForCausalLM`` in float64 whose one output is the explained score."""

    def __init__(self, question: Question) -> None:
        model: Any = copy.deepcopy(question.model).double()
        self.backbone, self._head, self._question = model.backbone, model.lm_head, question

    def double(self) -> _Read:
        return self

    def lm_head(self, h: Tensor) -> Tensor:
        logits = self._head(h)
        outputs = logits.log_softmax(-1) if self._question.log_probability else logits
        return self._question.select(outputs, self._question.rows)[:, None]


def _gradients(question: Question, method: Any, **options: Any) -> Tensor:
    vectors = question.vectors(question.inputs)
    found = method.attribute(vectors, additional_forward_args=question.rows, **options)
    return question.by_feature(found).detach()


# --- this package ---------------------------------------------------------------------------------


def explained(
    method: Callable[..., Any], question: Question, references: int = 0, **options: Any
) -> tuple[Any, Tensor]:
    """Return one of this package's methods after it has explained, and the scores (B, N).

    Args:
        method: The class.
        question: What is explained.
        references: How many it is given: the question's own, and embeddings of 0, which for images are the same.
        **options: Of the class.

    Raises:
        NotApplicableError: If it is to be given two, and the inputs are images.
    """
    if references == 2 and question.images:
        raise NotApplicableError
    baselines = [question.reference, 0.0][:references]
    forward = question.outputs if question.log_probability else question.model
    made = method(forward, model=question.model, **options)
    found = made.attribute(
        question.inputs,
        target=question.target,
        contrast=question.contrast,
        **({"baselines": baselines} if baselines else {}),
    )
    return made, question.by_feature(found.detach())


def implicit(method: Callable[..., Any], question: Question, references: int = 0, **options: Any) -> Tensor:
    """Return what one of this package's classes finds, see :func:`explained`."""
    return explained(method, question, references, **options)[1]


def of_class_token(question: Question, recipe: str, attention: str) -> Tensor:
    """Return a recipe of the papers' code for Vision Mamba."""
    if not question.images:
        raise NotApplicableError
    return implicit(ClassTokenAttention, question, recipe=recipe, attention=attention)


def with_log_probability(question: Question, explain: Function) -> Tensor:
    """Explain the log-probability instead of the logit; a contrast does so already."""
    if question.contrast is not None:
        raise NotApplicableError
    return explain(replace(question, log_probability=True))


def raw(**options: Any) -> Function:
    """Return the raw attention."""
    return partial(implicit, RawImplicitAttention, **{"fusion": "absolute", **options})


def rollout(**options: Any) -> Function:
    """Return the rollout."""
    return partial(implicit, ImplicitAttentionRollout, **{"fusion": "absolute", **options})


def weighted(**options: Any) -> Function:
    """Return the gradient-weighted rollout."""
    return partial(implicit, ImplicitAttentionAttribution, **options)


def relevance(**options: Any) -> Function:
    """Return the relevance, with a reference or with frozen gates."""
    return partial(implicit, ImplicitAttentionRelevance, **options)


METHODS: dict[str, Method] = {
    "random": Method("control", random),
    "position alone": Method("control", position),
    "saliency": Method("peer", saliency),
    "gradient × input": Method("peer", gradient_x_input),
    "SmoothGrad × input": Method("peer", smoothgrad),
    "integrated gradients": Method("peer", integrated_gradients),
    "occlusion": Method("peer", occlusion),
    "MambaLRP": Method("peer", lrp_of_mamba),
    "LaTIM ℓ2, last layer": Method("published", raw(fusion="norm")),
    "LaTIM ℓ2, rollout": Method("published", rollout(fusion="norm")),
    "scan alone, raw": Method("published", raw(attention="scan")),
    "scan alone, rollout": Method("published", rollout(attention="scan")),
    "scan alone, gradient-weighted": Method("published", weighted(attention="scan")),
    "class token 2024, raw": Method("published", partial(of_class_token, recipe="raw", attention="scan")),
    "class token 2024, rollout": Method("published", partial(of_class_token, recipe="rollout", attention="scan")),
    "class token 2024, attribution": Method(
        "published", partial(of_class_token, recipe="attribution-2024", attention="scan")
    ),
    "class token 2025, attribution": Method(
        "published", partial(of_class_token, recipe="attribution-2025", attention="unified")
    ),
    "unified, raw": Method("ours", raw()),
    "unified, rollout": Method("ours", rollout()),
    "unified, root, raw": Method("ours", raw(fusion="root")),
    "unified, root, rollout": Method("ours", rollout(fusion="root")),
    "gradient-weighted, channel": Method("ours", weighted()),
    "gradient-weighted, token": Method("ours", weighted(rectify="token")),
    "gradient-weighted, rows normalized": Method("ours", weighted(normalize="rows")),
    "gradient-weighted, signed": Method("ours", weighted(rectify=None)),
    "relevance, frozen, half": Method("ours", relevance(gate_rule="half")),
    "relevance, frozen, value": Method("ours", relevance(gate_rule="value")),
    "relevance, reference": Method("ours", relevance(references=1)),
    "relevance, two references": Method("ours", relevance(references=2)),
    "relevance, Shapley values": Method("variant", relevance(references=1, value_share=0.5)),
    "relevance, values first": Method("variant", relevance(references=1, value_share=1.0)),
    **{f"rollout without {term}": Method("ablation", rollout(without=(term,))) for term in ABLATED},
    **{f"gradient-weighted without {term}": Method("ablation", weighted(without=(term,))) for term in ABLATED},
}
METHODS |= {
    f"{name}, log p": Method("variant", partial(with_log_probability, explain=METHODS[name].explain))
    for name in (
        "gradient × input",
        "gradient-weighted, channel",
        "gradient-weighted, token",
        "gradient-weighted, signed",
        "relevance, reference",
    )
}
