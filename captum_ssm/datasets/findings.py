"""The findings in the explanations of a whole data set: words, positions, layers, surprises."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from captum_ssm.datasets.report import Report
from captum_ssm.datasets.tally import Tally
from captum_ssm.errors import InvalidInputError

BINS = 10
"""Parts of a text, from its first tokens to its last ones."""


class Line(NamedTuple):
    """A word in a table.

    Attributes:
        word: The word.
        times: How often it occurs in texts that are explained for the class.
        mean: The mean of its scores.
        error: The standard error of the mean.
    """

    word: str
    times: int
    mean: float
    error: float


class Surprise(NamedTuple):
    """A row whose explained outcome the model thinks the least of.

    Attributes:
        row: The number of the row.
        value: F(x).
        columns: All columns of the row by name, as they are stored.
    """

    row: int
    value: float
    columns: dict[str, Any]


@dataclass(frozen=True)
class Findings:
    """All that the explanations of a whole data set say.

    Attributes:
        report: How many rows, which failures, how exact.
        classes: How many rows are explained for each class, the most frequent first.
        right: The share of the rows whose prediction is the target.
        words: For each class the scores of each word in the rows that are explained for it.
        positions: The scores of words by where they stand, and those without their sign: one pair for each part of a
            text.
        layers: For each layer the part of all scores that passes it; a path may pass several. Empty if the layers were
            not asked for.
        surprises: The rows whose target the model thinks the least of, the least first.
    """

    report: Report
    classes: dict[str, int]
    right: float
    words: dict[str, dict[str, Tally]]
    positions: list[tuple[Tally, Tally]]
    layers: dict[str, float]
    surprises: list[Surprise]
    text_column: str | None = field(default=None, repr=False)

    def spoken(self, name: str, count: int = 10, least: int = 3) -> tuple[list[Line], list[Line]]:
        """Return the words that speak most for and most against a class.

        They are ordered by the mean less, or and, two standard errors, so that a rare word has to speak clearly.

        Args:
            name: The class.
            count: How many words of each kind.
            least: How often a word has to occur, at least twice.

        Returns:
            Words with a positive mean, and words with a negative one.

        Raises:
            InvalidInputError: If no row is explained for the class.
        """
        if name not in self.words:
            raise InvalidInputError(f"no row is explained for the class {name!r}; there are {', '.join(self.words)}.")
        known = [(word, tally) for word, tally in self.words[name].items() if tally.count >= max(least, 2)]
        for_it = sorted((pair for pair in known if pair[1].mean > 0), key=lambda pair: (-pair[1].least, pair[0]))
        against = sorted((pair for pair in known if pair[1].mean < 0), key=lambda pair: (pair[1].most, pair[0]))
        lines = [[Line(word, t.count, t.mean, t.error) for word, t in some[:count]] for some in (for_it, against)]
        return lines[0], lines[1]

    def text(self, surprise: Surprise) -> str:
        """Return the text of a row; its tokens if it is a row of ids."""
        value = None if self.text_column is None else surprise.columns.get(self.text_column)
        return str(value) if value is not None else " ".join(surprise.columns.get("tokens") or [])
