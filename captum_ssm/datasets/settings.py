"""The settings of an explanation of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from captum_ssm.attr.model_method import ModelMethod
from captum_ssm.datasets.batches import BATCH_ROWS, BATCH_TOKENS
from captum_ssm.datasets.examples import Prepare
from captum_ssm.datasets.loading import Source, described
from captum_ssm.datasets.methods import method_of
from captum_ssm.datasets.padding import Padding
from captum_ssm.datasets.question import Outcome, Question
from captum_ssm.errors import InvalidInputError


@dataclass
class Settings:
    """The settings of an explanation of rows; :class:`~captum_ssm.datasets.Explain` describes each.

    Raises:
        InvalidInputError: If an option is unknown, or two do not go together.
    """

    model: Source
    tokenizer: Any = None
    method: str | Callable[..., ModelMethod] = "relevance"
    column: str = "text"
    prepare: Prepare | None = None
    forward: Callable[..., Tensor] | None = None
    target: Outcome = None
    target_column: str | None = None
    contrast: Outcome = None
    contrast_column: str | None = None
    classes: Sequence[int | str] | None = None
    score: str | None = None
    reference: Any = None
    patches: bool = False
    layers: bool = False
    max_tokens: int | None = None
    truncate: bool = False
    padding: Padding | None = None
    batch_tokens: int = BATCH_TOKENS
    batch_rows: int = BATCH_ROWS
    device: str | None = None
    threads: int | None = 1

    def __post_init__(self) -> None:
        method_of(self.method)
        if self.score not in (None, "log-probability", "logit"):
            raise InvalidInputError(f"score must be 'log-probability' or 'logit', not {self.score!r}.")
        for first, second in (("target", "target_column"), ("contrast", "contrast_column")):
            if getattr(self, first) is not None and getattr(self, second) is not None:
                raise InvalidInputError(f"{first} is for all rows, {second} for each; leave one of them out.")
        for name in ("batch_tokens", "batch_rows", "max_tokens", "threads"):
            value = getattr(self, name)
            if value is not None and (type(value) is not int or value < 1):
                raise InvalidInputError(f"{name} must be a number, at least 1, not {value!r}.")
        if self.prepare is None and self.forward is not None:
            raise InvalidInputError("forward is for rows of tensors; pass prepare= too, or leave it out.")
        if self.padding not in (None, "right", "left", "none", "alone"):
            raise InvalidInputError(f"padding must be 'right', 'left', 'none' or 'alone', not {self.padding!r}.")

    @property
    def question(self) -> Question:
        """The question about each row."""
        classes = None if self.classes is None else tuple(self.classes)
        return Question(self.target, self.target_column, self.contrast, self.contrast_column, classes)

    def settings(self) -> dict[str, Any]:
        """Return all that the scores depend on but the model, in words and numbers that JSON knows."""
        others = ("model", "tokenizer", "device")
        names = [name for name in self.__dataclass_fields__ if not name.startswith("_") and name not in others]
        return {name: described(getattr(self, name)) for name in names}
