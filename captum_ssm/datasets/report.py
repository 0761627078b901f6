"""The report of an output: how many rows, which failures, how exact."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from typing import Any

from captum_ssm.datasets.parts import Output
from captum_ssm.datasets.tables import ROW


@dataclass(frozen=True)
class Report:
    """The fate of the rows of an output.

    Attributes:
        rows: How many there are.
        failures: How many failed by cause, the most frequent first.
        completeness: The largest error of the sum of a row's scores, and the row; None if the method's have no sum.
        fidelity: The largest relative error of a layer's decomposition, and a row of its batch; None if no layer was
            decomposed.
    """

    rows: int
    failures: dict[str, int]
    completeness: tuple[float, int] | None
    fidelity: tuple[float, int] | None

    @classmethod
    def of(cls, output: Output) -> Report:
        """Read the report of an output, one part after the other.

        Args:
            output: The output.

        Returns:
            The report.
        """
        rows, causes = 0, Counter[str]()
        worst: dict[str, tuple[float, int] | None] = {"completeness": None, "fidelity": None}
        for table in output.tables([ROW, *worst, "error"]):
            columns: dict[str, list[Any]] = table.to_pydict()
            rows += len(columns[ROW])
            causes.update(cause(error) for error in columns["error"] if error)
            for name, before in worst.items():
                known = [(value, row) for value, row in zip(columns[name], columns[ROW]) if value == value]
                worst[name] = max([*known, *([before] if before else [])], key=lambda pair: pair[0], default=None)
        return cls(rows, dict(causes.most_common()), worst["completeness"], worst["fidelity"])

    @property
    def failed(self) -> int:
        """How many rows failed."""
        return sum(self.failures.values())

    def lines(self) -> list[str]:
        """Return the report in words, one line for each fact."""
        lines = [f"rows          {self.rows}, {self.rows - self.failed} explained, {self.failed} failed"]
        lines += [f"  {count:>8} × {reason}" for reason, count in self.failures.items()]
        for name, worst, what in (
            ("completeness", self.completeness, "largest error of a sum"),
            ("fidelity", self.fidelity, "largest relative error of a layer"),
        ):
            if worst is not None:
                lines.append(f"{name:<14}{what} {worst[0]:.1e}, row {worst[1]}")
        return lines


def cause(error: str) -> str:
    """Return the cause that an error shares with others: numbers and quoted words left out.

    Example:
        >>> cause("InvalidInputError: the row has 700 tokens, more than the 512 that the model allows; cut it")
        'InvalidInputError: the row has … tokens, more than the … that the model allows; cut it'
    """
    return re.sub(r"'[^']*'|\"[^\"]*\"|(?<![A-Za-z])-?\d+(?:\.\d+)?(?:e-?\d+)?", "…", error)
