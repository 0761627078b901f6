"""The summary of a whole data set's explanations: as a table, a picture, a page."""

from __future__ import annotations

import heapq
from collections import defaultdict
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from captum_ssm.datasets.columns import input_name
from captum_ssm.datasets.findings import BINS, Findings, Surprise
from captum_ssm.datasets.parts import Output
from captum_ssm.datasets.report import Report
from captum_ssm.datasets.summary_figure import summary_figure
from captum_ssm.datasets.summary_page import summary_page
from captum_ssm.datasets.tables import ROW
from captum_ssm.datasets.tally import Tally
from captum_ssm.datasets.words import words_of


class Summary(Findings):
    """The findings in the explanations of a whole data set, ready to be shown."""

    def table(self, count: int = 10) -> str:
        """Return all of it as text.

        Args:
            count: How many words and surprises.
        """
        lines = [*self.report.lines(), f"right         {self.right:.1%} of the predictions are the target"]
        for name, rows in self.classes.items():
            for title, words in zip(("for", "against"), self.spoken(name, count)):
                lines += ["", f"{title} {name!r} ({rows} rows): word, times, mean score ± standard error"]
                lines += [f"  {w.word:<20} {w.times:>6}  {w.mean:+.3f} ± {w.error:.3f}" for w in words]
        lines += ["", "where words stand: mean score ± standard error, mean without sign"]
        for k, (signed, size) in enumerate(self.positions):
            part = f"{k / BINS:.0%} to {(k + 1) / BINS:.0%}"
            lines.append(f"  {part:<12} {signed.mean:+.3f} ± {signed.error:.3f}  {size.mean:.3f}")
        if self.layers:
            lines += ["", "share of the score that passes each layer"]
            lines += [f"  {name:<30} {share:+.1%}" for name, share in self.layers.items()]
        lines += ["", "most surprising: row, F(x), target, prediction"]
        for s in self.surprises[:count]:
            names = f"{s.columns['target_name']!r}, {s.columns['prediction_name']!r}"
            lines.append(f"  {s.row:>8}  {s.value:+.3f}  {names}  {self.text(s)[:80]}")
        return "\n".join(lines)

    def figure(self, count: int = 10) -> Figure:
        """Return a picture: the words of each class, positions, layers.

        Args:
            count: How many words for and against each class.
        """
        return summary_figure(self, count)

    def html(self, count: int = 10) -> str:
        """Return a page that refers to no other file.

        Args:
            count: How many words for and against each class, and surprises.
        """
        return summary_page(self, count)

    def __str__(self) -> str:
        return self.table()

    def _repr_html_(self) -> str:
        """Show the summary in a notebook."""
        return summary_page(self, 10, page=False)


def summary(folder: str | Path, *, surprises: int = 10) -> Summary:
    """Sum up the output of :func:`~captum_ssm.datasets.explain_file`.

    Args:
        folder: The folder of the output; it may still be growing.
        surprises: How many of the most surprising rows to keep.

    Returns:
        The words that speak for and against each class, with counts and errors; how the score depends on the position;
        its shares by layer; the most surprising rows.

    Raises:
        InvalidInputError: If the folder holds no output, or a part is damaged.

    Cost:
        One part of the output in memory at a time, and one entry for each word of each class.
    """
    output = Output(Path(folder))
    report, manifest = Report.of(output), output.manifest()
    column = manifest.get("settings", {}).get("column")
    gathered = _Gathered(surprises, None if column is None else column)
    for table in output.tables():
        names = table.schema.names
        stored = input_name(column, names) if column is not None and input_name(column, names) in names else column
        gathered.text_column = stored if stored in names else None
        for row in table.to_pylist():
            if not row["error"]:
                gathered.add(row)
    layers = manifest.get("model", {}).get("layers", [])
    return gathered.summary(report, layers)


class _Gathered:
    """All that is gathered row by row.

    Args:
        surprises: How many of the most surprising rows to keep.
        text_column: The column of texts.
    """

    def __init__(self, surprises: int, text_column: str | None) -> None:
        self.text_column = text_column
        self._count = surprises
        self._classes: dict[str, int] = defaultdict(int)
        self._right = Tally()
        self._words: dict[str, dict[str, Tally]] = defaultdict(lambda: defaultdict(Tally))
        self._positions = [(Tally(), Tally()) for _ in range(BINS)]
        self._layers: list[float] = []
        self._explained = 0.0
        self._surprises: list[tuple[float, int, dict[str, Any]]] = []

    def add(self, row: Mapping[str, Any]) -> None:
        """Add a row that was explained."""
        name = row["target_name"]
        self._classes[name] += 1
        self._right.add(float(row["target"] == row["prediction"]))
        if "tokens" in row:
            text = None if self.text_column is None else row[self.text_column]
            for word in words_of(row, text if isinstance(text, str) else None):
                self._words[name][word.text].add(word.score)
                signed, size = self._positions[min(int(word.position * BINS), BINS - 1)]
                signed.add(word.score)
                size.add(abs(word.score))
        if row.get("layers"):
            reference = row["reference_value"]
            difference = row["value"] - (0.0 if reference != reference else reference)
            sign = 1.0 if difference >= 0 else -1.0
            self._explained += abs(difference)
            sums = self._layers or [0.0] * len(row["layers"])
            self._layers = [total + sign * part for total, part in zip(sums, row["layers"])]
        entry = (-row["value"], -row[ROW], dict(row))
        (heapq.heappush if len(self._surprises) < self._count else heapq.heappushpop)(self._surprises, entry)

    def summary(self, report: Report, layers: list[str]) -> Summary:
        """Return the summary of all rows that were added.

        Args:
            report: The report of the output.
            layers: The names of the layers.
        """
        shares = [part / self._explained for part in self._layers] if self._explained else []
        found = sorted(self._surprises, key=lambda entry: (-entry[0], -entry[1]))
        order = sorted(self._classes, key=lambda name: (-self._classes[name], name))
        return Summary(
            report,
            {name: self._classes[name] for name in order},
            self._right.mean,
            {name: dict(self._words[name]) for name in order},
            self._positions,
            dict(zip(layers, shares)),
            [Surprise(row[ROW], -value, row) for value, _, row in found],
            self.text_column,
        )
