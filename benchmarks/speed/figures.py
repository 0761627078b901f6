"""Figures of speed and memory: stored, compared with those of an earlier run, and shown in ``docs/speed.md``."""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
import transformers

from scripts.sections import write_section

ROOT = Path(__file__).parents[2]
STORED = ROOT / "benchmarks" / "speed.json"
PAGE, SECTION = ROOT / "docs" / "speed.md", "speed"
SLACK = 1.1
"""By what factor a figure may exceed the stored one."""


@dataclass(frozen=True)
class Figure:
    """A ratio of two times or amounts of memory, or a growth exponent; the lower, the better.

    Args:
        group: Name of the group that measured it.
        what: What was measured.
        against: What it is a multiple of.
        of: The model and the sizes.
        target: What is wanted at most, or None.
        value: What was found.
    """

    group: str
    what: str
    against: str
    of: str
    target: float | None
    value: float

    @property
    def key(self) -> tuple[str, str, str]:
        """What tells it from all other figures."""
        return self.what, self.against, self.of

    def __str__(self) -> str:
        """Return a line of a table."""
        wanted = "" if self.target is None else f"<= {shown(self.target)}"
        return f"{self.what:<58} {self.of:<42} {shown(self.value):>7} {wanted:<8} {self.against}"


def shown(value: float) -> str:
    """Return a figure with two or three digits, one far below 1 as a fraction."""
    if 0 < value < 0.095:
        return f"1/{1 / value:.0f}"
    return f"{value:.0f}" if value >= 9.95 else f"{value:.1f}" if value >= 1.995 else f"{value:.2f}"


def store(figures: Iterable[Figure], file: Path) -> None:
    """Write figures with the versions that they were found with."""
    document = {
        "torch": torch.__version__.partition("+")[0],
        "transformers": transformers.__version__,
        "threads": torch.get_num_threads(),
        "figures": [{**asdict(figure), "value": float(f"{figure.value:.3g}")} for figure in figures],
    }
    file.write_text(json.dumps(document, indent=1) + "\n", encoding="utf-8")


def read(file: Path) -> list[Figure]:
    """Return stored figures."""
    return [Figure(**figure) for figure in json.loads(file.read_text(encoding="utf-8"))["figures"]]


def joined(stored: Iterable[Figure], found: Iterable[Figure]) -> list[Figure]:
    """Return the stored figures with those of the found ones' groups replaced."""
    found = list(found)
    groups = {figure.group for figure in found}
    by_group = [figure for figure in stored if figure.group not in groups] + found
    order = list(dict.fromkeys([*(figure.group for figure in stored), *(figure.group for figure in found)]))
    return sorted(by_group, key=lambda figure: order.index(figure.group))


def better(first: Iterable[Figure], second: Iterable[Figure]) -> list[Figure]:
    """Return the first figures, each the lower of its two values if it was measured twice."""
    again = {figure.key: figure for figure in second}
    return [min(figure, again.get(figure.key, figure), key=lambda f: f.value) for figure in first]


def slower(stored: Iterable[Figure], found: Iterable[Figure]) -> list[tuple[Figure, Figure]]:
    """Return the figures, stored and found, that have become more than 10 % worse; only those of both are compared."""
    before = {figure.key: figure for figure in stored}
    pairs = [(before[figure.key], figure) for figure in found if figure.key in before]
    return [(old, new) for old, new in pairs if new.value > SLACK * old.value]


def report(pairs: Sequence[tuple[Figure, Figure]], compared: int) -> str:
    """Return in words what has become slower."""
    lines = [f"slower, {shown(old.value)} -> {shown(new.value)}: {', '.join(new.key)}" for old, new in pairs]
    return "\n".join([*lines, f"{len(pairs)} of {compared} figures became more than {SLACK - 1:.0%} worse"])


def table(figures: Iterable[Figure]) -> str:
    """Return the page's tables, one for each thing that figures are multiples of: a line a model, a column a method."""
    figures, parts = list(figures), []
    for against in dict.fromkeys(figure.against for figure in figures):
        cells = {(figure.of, figure.what): cell(figure) for figure in figures if figure.against == against}
        models, methods = (list(dict.fromkeys(names)) for names in zip(*cells))
        rows = [["model", *methods], ["---"] * (1 + len(methods))]
        rows += [[model, *(cells.get((model, method), "") for method in methods)] for model in models]
        parts.append(f"## As multiples of {against}\n\n" + "\n".join(f"| {' | '.join(row)} |" for row in rows))
    return "\n\n".join(parts)


def cell(figure: Figure) -> str:
    """Return a figure with what is wanted, in bold if it is more."""
    if figure.target is None:
        return shown(figure.value)
    mark = "**" if figure.value > figure.target else ""
    return f"{mark}{shown(figure.value)}{mark} (≤ {shown(figure.target)})"


def page_section(file: Path) -> str:
    """Return what stands in the page's section: what was measured with what, and the tables."""
    document = json.loads(file.read_text(encoding="utf-8"))
    return (
        "Ratios of one run of `python -m benchmarks.speed` (`make bench`): both sides timed in "
        f"turn in one process, {document['threads']} thread of a shared CPU, torch {document['torch']}, transformers "
        f"{document['transformers']}, whose own torch code a forward pass is, not a CUDA kernel. Stored in "
        "`benchmarks/speed.json`; `make bench-check` measures again and names what became more than "
        f"{SLACK - 1:.0%} slower.\n\n{table(read(file))}"
    )


def write_page(file: Path) -> None:
    """Write the page's section from stored figures."""
    write_section(PAGE, SECTION, page_section(file))
