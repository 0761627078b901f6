"""The page of the comparison, ``docs/peers.md``, from the stored figures: nothing is measured here."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks import report

ROOT = Path(__file__).parents[2]
STORED, PAGE = ROOT / "benchmarks" / "peers.json", ROOT / "docs" / "peers.md"
IMAGES = {
    "Vision Mamba": "images: Vision Mamba",
    "convolutions": "convolutions",
    "determinants": "determinants",
    "outside torch": "NumPy inside",
}
"""Models beside the families of transformers, as columns."""
SUMS = {"difference": "F(x) − F(x′)", "output": "F(x)", None: "–"}
TEXT = (Path(__file__).parent / "page.md").read_text(encoding="utf-8")
"""The page without its tables and versions, which stand in braces."""

Stored = Mapping[str, Any]


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [" | ".join(row) for row in (head, ["---"] * len(head), *rows)]
    return "\n".join(f"| {line} |" for line in lines)


def shown(value: float | None) -> str:
    """Return an error or a ratio with two digits, what is tiny with one, what is missing as a dash."""
    if value is None:
        return "–"
    if 0 < value < 1e-3:
        return f"{value:.0e}".replace("e-0", "e-")
    return f"{value:,.0f}" if value >= 9.95 else f"{value:.2g}"


def spread(values: Sequence[float]) -> str:
    """Return the median and the largest of errors."""
    return f"{shown(median(values))}; {shown(max(values))}" if values else "–"


def errors(models: Mapping[str, Any], peer: str, what: str) -> list[float]:
    """Return the errors of a peer on those of the models that it explains."""
    return [found[peer][what] for found in models.values() if what in found[peer]]


def small(stored: Stored) -> dict[str, Any]:
    """Return what was found on the random models of the families of transformers."""
    return {name: found for name, found in stored["families"].items() if name not in IMAGES}


def which(stored: Stored) -> str:
    """Return the table of the models that each peer explains."""
    rows, models = [], small(stored)
    for peer in stored["peers"]:
        able = [name for name in models if "refused" not in models[name][peer]]
        refused = [name for name in models if name not in able]
        others = ["no" if "refused" in stored["families"][name][peer] else "yes" for name in IMAGES]
        named = f"not {', '.join(refused)}" if len(refused) < len(able) else ", ".join(able)
        rows.append([peer, f"{len(able)}: {named}" if refused else f"all {len(able)}", *others])
    return table(["method", f"families of transformers, of {len(models)}", *IMAGES.values()], rows)


def exactness(stored: Stored) -> str:
    """Return the table of errors: of the sums, and of the decomposition of layers."""
    rows = []
    for peer, about in stored["peers"].items():
        promise = SUMS[about["sum"]] + ("" if about["claimed"] or about["sum"] is None else " (not promised)")
        found = (
            errors(stored["trained"], peer, "sum"),
            errors(small(stored), peer, "sum"),
            errors(small(stored), peer, "layer"),
        )
        rows.append([peer, promise, *map(spread, found)])
    return table(["method", "the scores sum to", "off: trained models", "off: random models", "off: a layer"], rows)


def times(stored: Stored) -> str:
    """Return the table of times."""
    models = stored["times"]
    rows = [[peer, *(shown(models[model].get(peer)) for model in models)] for peer in stored["peers"]]
    return table(["method", *models], rows)


def joined(stored: Stored) -> list[dict[str, Any]]:
    """Return the benchmark's records with the figures of the peers that only this comparison has."""
    new = {(record["task"], record["family"], record["seed"]): record["methods"] for record in stored.get("tasks", ())}
    return [
        {**record, "methods": record["methods"] | new.get((record["task"], record["family"], record["seed"]), {})}
        for record in report.records()
    ]


def faithfulness(stored: Stored) -> str:
    """Return the table of what each peer finds on the tasks; the best, and those within a spread of it, in bold."""
    methods = {peer: about["stored"] or peer for peer, about in stored["peers"].items()}
    columns = [replace(column, family=column.family or "mamba") for column in report.summary()]
    merged = joined(stored)
    cells = [{peer: report.cell(merged, column, method) for peer, method in methods.items()} for column in columns]
    bold = [report.leaders(of_column, column.higher) for of_column, column in zip(cells, columns)]
    rows = [
        [peer, *(report.shown(of_column[peer], peer in best) for of_column, best in zip(cells, bold))]
        for peer in methods
    ]
    return table(["method", *(column.title for column in columns)], rows)


def refusals(stored: Stored) -> str:
    """Return what the peers of other packages say of the families that they do not explain."""
    causes: dict[tuple[str, str], list[str]] = {}
    for name, found in small(stored).items():
        for peer, answer in found.items():
            if answer.get("refused"):
                causes.setdefault((peer, answer["refused"].partition(". ")[0]), []).append(name)
    lines = (f"* {peer}, on {', '.join(names)}: ``{cause}``" for (peer, cause), names in causes.items())
    return "\n".join(sorted(lines))


def document(stored: Stored) -> str:
    """Return the whole page."""
    return TEXT.format(
        which=which(stored),
        refusals=refusals(stored),
        exactness=exactness(stored),
        times=times(stored),
        faithfulness=faithfulness(stored),
        **{name.replace("-", "_"): version for name, version in stored["versions"].items()},
    )


def read() -> dict[str, Any]:
    """Return the stored figures."""
    found: dict[str, Any] = json.loads(STORED.read_text(encoding="utf-8")) if STORED.exists() else {}
    return found


def write(stored: Stored) -> None:
    """Write the page."""
    PAGE.write_text(document(stored), encoding="utf-8")
