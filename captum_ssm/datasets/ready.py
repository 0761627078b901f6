"""A loaded model with its method, and the explanation of one batch."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from captum_ssm.datasets.examples import Examples, Tensors
from captum_ssm.datasets.forward import Forward, LastToken, Scored
from captum_ssm.datasets.loading import loaded, vocabulary_digest, weights_digest
from captum_ssm.datasets.methods import NAN, Explainer, method_of
from captum_ssm.datasets.outcomes import Outcomes
from captum_ssm.datasets.padding import measured_padding
from captum_ssm.datasets.question import RUNNER_UP, Answers, Outcome
from captum_ssm.datasets.settings import Settings
from captum_ssm.datasets.texts import Texts
from captum_ssm.errors import InvalidInputError
from captum_ssm.network.forward import run_model
from captum_ssm.network.hosts import inside
from captum_ssm.network.inputs import refuse_bad_state
from captum_ssm.network.interface import input_embeddings, is_language_model

_UNLIMITED = 10**9
"""Tokens of the longest text where neither tokenizer nor model has a limit; tokenizers say 10³⁰ then."""


class Ready:
    """A model that is loaded, with all that an explanation of rows needs.

    Args:
        settings: The settings.

    Raises:
        InvalidInputError: If a reference or a class is unknown, or the model takes no tokens and there is no
            ``prepare``.
        ModelStateError: If the model is in training mode.
        UnsupportedModelError: If the method does not know the model.
    """

    def __init__(self, settings: Settings) -> None:
        self.model, tokenizer = loaded(settings.model, settings.tokenizer, settings.device)
        refuse_bad_state(self.model)
        self._outcomes = Outcomes(self.model, tokenizer)
        device = next((p.device for p in self.model.parameters() if not p.is_meta), torch.device("cpu"))
        is_text = settings.prepare is None
        if is_text and not is_language_model(self.model):
            raise InvalidInputError(
                f"a {type(self.model).__name__} takes no tokens; pass prepare=, a function from a row to the tensors "
                "that it takes."
            )
        self.examples: Examples
        if settings.prepare is None:
            self.examples = _texts(settings, self._outcomes, device)
            run = _text_forward(self._outcomes, device)
        else:
            self.examples = Tensors(settings.prepare, settings.reference, device)
            run = partial(settings.forward or run_model, self.model)
        log_probability = settings.score == "log-probability" or (settings.score is None and is_text)
        self._forward = Scored(run, log_probability)
        self._explainer = Explainer(
            method_of(settings.method), self._forward, self.model, patches=settings.patches, layers=settings.layers
        )
        self._names = settings.classes
        self._classes: list[int] | None = None
        if is_text:
            self._check_outcomes(settings, device)

    def identity(self) -> dict[str, Any]:
        """Return the identity of the model: class, digests of weights and vocabulary, layers."""
        return {
            "class": type(inside(self.model)).__name__,
            "weights": weights_digest(self.model),
            "vocabulary": vocabulary_digest(self._outcomes.tokenizer),
            "layers": self.layers,
        }

    @property
    def layers(self) -> list[str]:
        """Names of the layers whose parts of the score are returned."""
        return self._explainer.layers

    def rows(self, examples: Sequence[Any], asked: Sequence[tuple[Outcome, Outcome]]) -> list[dict[str, Any]]:
        """Explain one batch.

        Args:
            examples: The examples, which fit together.
            asked: Target and contrast of each.

        Returns:
            The columns of each row by name.
        """
        batch = self.examples.batch(examples)
        with torch.no_grad():
            outputs = self._forward(*batch.inputs, *batch.args)
        answers = Answers(outputs.detach().cpu(), self._outcomes, self._numbers(outputs))
        targets, contrasts = answers.chosen(asked)
        value = answers.values(targets, contrasts)
        tensors = [_tensor(numbers, outputs.device) for numbers in (targets, contrasts)]
        result = self._explainer.explain(batch, tensors[0], tensors[1], value)
        predictions, probabilities = answers.predictions(), answers.probabilities()
        scores = self.examples.scores(examples, result.scores)
        return [
            {
                **self.examples.describe(example),
                "scores": scores[k],
                **self._outcome("target", targets[k]),
                **self._outcome("contrast", contrasts[k]),
                **self._outcome("prediction", predictions[k]),
                "probability": probabilities[k],
                "value": float(value[k]),
                "reference_value": result.reference_value[k],
                "completeness": result.completeness[k],
                "fidelity": result.fidelity,
                **({"layers": np.array(result.layers[k], dtype=np.float32)} if self.layers else {}),
                "error": "",
            }
            for k, example in enumerate(examples)
        ]

    def failed(self, example: Any, error: str) -> dict[str, Any]:
        """Return the columns of a row that could not be explained.

        Args:
            example: The example; None if the row is none.
            error: The reason.

        Returns:
            The columns by name, empty but for the reason and the example.
        """
        return {
            **self.examples.describe(example),
            "scores": np.zeros(0, dtype=np.float32),
            **self._outcome("target", -1),
            **self._outcome("contrast", -1),
            **self._outcome("prediction", -1),
            **dict.fromkeys(("probability", "value", "reference_value", "completeness", "fidelity"), NAN),
            **({"layers": np.zeros(0, dtype=np.float32)} if self.layers else {}),
            "error": error,
        }

    def _outcome(self, column: str, number: int) -> dict[str, Any]:
        """Return the columns of an outcome: its number, and its name."""
        return {column: number, f"{column}_name": self._outcomes.name(number) if number >= 0 else ""}

    @torch.no_grad()
    def _check_outcomes(self, settings: Settings, device: torch.device) -> None:
        """Raise if an outcome that is named for all rows of texts is not known."""
        outputs = self._forward(torch.zeros(1, 1, dtype=torch.long, device=device))
        self._numbers(outputs)
        for outcome in (settings.target, settings.contrast):
            if outcome is not None and outcome != RUNNER_UP and outputs.dim() == 2:
                self._outcomes.target(str(outcome), outputs.shape[1])

    def _numbers(self, outputs: Tensor) -> list[int] | None:
        """Return the numbers of the outcomes that a prediction is chosen among; None for all.

        Raises:
            InvalidInputError: If one is not known, or the model gives one number for each row.
        """
        if self._names is not None and self._classes is None:
            if outputs.dim() != 2:
                raise InvalidInputError("the model gives one number for each row; leave classes out.")
            self._classes = [self._outcomes.target(str(name), outputs.shape[1]) for name in self._names]
        return self._classes


def _texts(settings: Settings, outcomes: Outcomes, device: torch.device) -> Texts:
    """Return the kind of rows that are texts."""
    model, tokenizer = outcomes.model, outcomes.tokenizer
    config = getattr(inside(model), "config", None)
    pads = [getattr(config, "pad_token_id", None), getattr(tokenizer, "pad_token_id", None), 0]
    pad = next(int(pad) for pad in pads if pad is not None)
    limits = [getattr(tokenizer, "model_max_length", None), getattr(config, "max_position_embeddings", None)]
    limit = min([int(limit) for limit in limits if limit is not None and 0 < limit < _UNLIMITED], default=_UNLIMITED)
    if settings.reference is None or isinstance(settings.reference, (int, str)):
        word = settings.reference if settings.reference is None else str(settings.reference)
    else:
        raise InvalidInputError(f"the reference of texts is a word or an id, not {settings.reference!r}.")
    embedding: Any = input_embeddings(model)
    return Texts(
        settings.column,
        tokenizer,
        outcomes.reference(word),
        settings.padding or measured_padding(model, pad),
        pad,
        len(embedding.weight),
        settings.max_tokens or limit,
        settings.truncate,
        device,
    )


def _text_forward(outcomes: Outcomes, device: torch.device) -> Forward:
    """Return the function that runs a language model on ids: its output layer on the last token alone, if it can."""
    if not outcomes.classifies:
        last, embedding = LastToken(outcomes.model), input_embeddings(outcomes.model)
        ids = torch.arange(1, 5, device=device).unsqueeze(0) % len(getattr(embedding, "weight", range(5)))
        if last.agrees(ids):
            return last
    return partial(run_model, outcomes.model)


def _tensor(numbers: Sequence[int], device: torch.device) -> Tensor | None:
    """Return outcomes as a tensor; None if there are none."""
    return None if numbers[0] < 0 else torch.tensor(numbers, device=device)
