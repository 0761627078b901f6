"""The question that is put to a model about each row: which outcome is explained, and against which other one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_ssm.datasets.outcomes import Outcomes
from captum_ssm.errors import InvalidInputError

RUNNER_UP = "runner-up"
"""The contrast that is the most probable outcome but the target."""

Outcome = int | str | None
"""An outcome by its number or its name; None where there is none."""


@dataclass(frozen=True)
class Question:
    """Targets and contrasts as the user names them.

    Attributes:
        target: The outcome to explain in all rows; None: the prediction.
        target_column: The column that names it instead; where a row names none, the prediction.
        contrast: The outcome that it is explained against in all rows, ``"runner-up"``, or None.
        contrast_column: The column that names it instead.
        classes: The outcomes that a prediction is chosen among; None: all.
    """

    target: Outcome = None
    target_column: str | None = None
    contrast: Outcome = None
    contrast_column: str | None = None
    classes: tuple[int | str, ...] | None = None

    def columns(self) -> list[str]:
        """Return the names of the columns that it reads."""
        return [name for name in (self.target_column, self.contrast_column) if name is not None]

    def asked(self, row: Mapping[str, Any]) -> tuple[Outcome, Outcome]:
        """Return target and contrast of a row, as the row or the user names them."""
        target = self.target if self.target_column is None else _named(row.get(self.target_column))
        contrast = self.contrast if self.contrast_column is None else _named(row.get(self.contrast_column))
        return target, contrast


@dataclass(frozen=True)
class Answers:
    """The outputs of a model for a batch, and the outcomes that the rows ask about.

    Attributes:
        outputs: The outputs, (B, V) or one for each row (B,).
        outcomes: The words for them.
        classes: Numbers of the outcomes that a prediction is chosen among; None: all.
    """

    outputs: Tensor
    outcomes: Outcomes
    classes: Sequence[int] | None

    @property
    def is_choice(self) -> bool:
        """Whether the outputs are scores of several outcomes."""
        return self.outputs.dim() == 2 and self.outputs.shape[1] > 1

    def predictions(self) -> list[int]:
        """Return the most probable outcome of each row; -1 where the model gives one number."""
        return self._best(self.outputs) if self.is_choice else [-1] * len(self.outputs)

    def probabilities(self) -> list[float]:
        """Return the probability of each row's prediction, among the classes; NaN where the model gives one number."""
        if not self.is_choice:
            return [float("nan")] * len(self.outputs)
        among = self.outputs if self.classes is None else self.outputs[:, list(self.classes)]
        values: list[float] = among.double().softmax(-1).amax(-1).tolist()
        return values

    def chosen(self, asked: Sequence[tuple[Outcome, Outcome]]) -> tuple[list[int], list[int]]:
        """Return the target and the contrast of each row.

        Args:
            asked: Target and contrast of each row, as they are named.

        Returns:
            Two numbers for each row; -1 for none.

        Raises:
            InvalidInputError: If an outcome is not known, or the contrast is the target.
        """
        if not self.is_choice:
            if any(outcome is not None for pair in asked for outcome in pair):
                raise InvalidInputError("the model gives one number for each row, so there is no target to choose.")
            return [-1] * len(asked), [-1] * len(asked)
        predictions = self.predictions()
        targets = [p if t is None else self._number(t) for p, (t, _) in zip(predictions, asked)]
        others = self.outputs.clone()
        others[torch.arange(len(targets)), targets] = -torch.inf
        second = self._best(others)
        contrasts = [
            -1 if c is None else other if c == RUNNER_UP else self._number(c) for other, (_, c) in zip(second, asked)
        ]
        for target, contrast in zip(targets, contrasts):
            if target == contrast:
                raise InvalidInputError(
                    f"the contrast is the target itself, {self.outcomes.name(target)!r}; name another one."
                )
        return targets, contrasts

    def values(self, targets: Sequence[int], contrasts: Sequence[int]) -> Tensor:
        """Return the explained number of each row, F(x): the target's output, less the contrast's if there is one.

        Args:
            targets: The target of each row.
            contrasts: Its contrast, or -1.

        Returns:
            (B,), in float64.
        """
        outputs = self.outputs.double()
        if not self.is_choice:
            return outputs.flatten()
        rows = torch.arange(len(targets))
        against = torch.tensor([outputs[k, c] if c >= 0 else 0.0 for k, c in enumerate(contrasts)]).double()
        return outputs[rows, list(targets)] - against

    def _best(self, outputs: Tensor) -> list[int]:
        """Return the number of the highest output of each row among the classes."""
        if self.classes is None:
            return [int(k) for k in outputs.argmax(-1)]
        return [self.classes[int(k)] for k in outputs[:, list(self.classes)].argmax(-1)]

    def _number(self, outcome: int | str) -> int:
        """Return the number of an outcome.

        Raises:
            InvalidInputError: If there is none such.
        """
        return self.outcomes.target(str(outcome), self.outputs.shape[1])


def _named(value: Any) -> Outcome:
    """Return the value of a column as the name or number of an outcome; None for an empty one."""
    if isinstance(value, Tensor) or hasattr(value, "item"):
        value = value.item()
    if value is None or value == "" or (isinstance(value, float) and value != value):
        return None
    return int(value) if isinstance(value, float) and value.is_integer() else value
