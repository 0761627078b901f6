"""Write RESULTS.md, its picture, and the summary of docs/choose.md from the stored figures.

    python -m benchmarks.report

Every number in the tables comes from ``benchmarks/data``; nothing is measured here.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch

from benchmarks.cases import SEQUENCES
from benchmarks.methods import METHODS, STEPS
from benchmarks.run import DATA, SEEDS
from captum_ssm.metrics import Curve
from captum_ssm.visualization import curves_figure
from scripts.sections import write_section

HERE = Path(__file__).parent
FAMILIES = {
    "mamba": "Mamba",
    "mamba2": "Mamba-2",
    "rwkv": "RWKV-4",
    "recurrent_gemma": "Griffin",
    "qwen3_5": "delta hybrid",
    "vision_mamba": "Vision Mamba",
    "transformer": "transformer",
}
GROUPS = {
    "control": "controls",
    "peer": "general methods",
    "published": "published for recurrent models",
    "ours": "ours",
    "ablation": "ours, with a factor left out",
    "variant": "variants",
}
INTRODUCTION = """
Which explanation of a recurrent model finds what matters. `make benchmark` measures, stores the figures in
`benchmarks/data` and writes this page from them; what is stored already is not measured again
(`python -m benchmarks.run --again` does). All is seeded. The models' weights are in `benchmarks/weights`, so a second
run gives the same figures, but for rounding and the times; delete a file, and its model is trained again
(on another kind of processor the rounding, and so the weights, may come out otherwise).

Cells: mean over three seeds ± their standard deviation. Of the shipped models there is one each: three draws of inputs
take the place of seeds. In bold the best method and those within a spread of it. A dash: not for this model. torch
{torch}, transformers {transformers}, Captum {captum}.
""".strip()

Cell = tuple[float, float]
"""Mean and standard deviation over the seeds."""


@dataclass(frozen=True)
class Column:
    """One column of a table: a figure, and of which models.

    Attributes:
        title: Its heading.
        task: Name of the task.
        figure: Name of the figure.
        family: Of the models; None for the mean over all that have learnt the task, the transformer left out.
        higher: Whether higher is better.
    """

    title: str
    task: str
    figure: str
    family: str | None = None
    higher: bool = True


def records() -> list[dict[str, Any]]:
    """Return what is stored of the families that have learnt their task with every seed."""
    stored = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(DATA.glob("*.json"))]
    learnt = Counter((record["task"], record["family"]) for record in stored if record["learnt"])
    return [record for record in stored if learnt[record["task"], record["family"]] == len(SEEDS)]


def cell(stored: Iterable[Mapping[str, Any]], column: Column, method: str) -> Cell | None:
    """Return a method's figure over the seeds; None if there is none, or not for all families of a mean."""
    by_family: dict[str, list[float]] = {}
    families = set()
    for record in stored:
        found = record["methods"].get(method)
        wanted = record["family"] == column.family or (column.family is None and record["family"] != "transformer")
        if record["task"] == column.task and wanted:
            families.add(record["family"])
            if found is not None:
                by_family.setdefault(record["family"], []).append(found["figures"][column.figure][0])
    if not by_family or by_family.keys() != families:
        return None
    spreads = [stdev(values) if len(values) > 1 else 0.0 for values in by_family.values()]
    return mean(map(mean, by_family.values())), mean(spreads)


def leaders(cells: Mapping[str, Cell | None], higher: bool) -> set[str]:
    """Return the best method, and those that lie within a spread of it."""
    sign = 1 if higher else -1
    known = {method: found for method, found in cells.items() if found is not None}
    if not known:
        return set()
    best, spread = max(known.values(), key=lambda found: sign * found[0])
    return {method for method, (value, own) in known.items() if sign * (best - value) <= max(spread, own)}


def table(stored: Sequence[Mapping[str, Any]], columns: Sequence[Column], kinds: Sequence[str]) -> str:
    """Return a table of methods and columns; the best and those within a spread of it in bold."""
    methods = [name for name, method in METHODS.items() if method.kind in kinds]
    cells = {column: {method: cell(stored, column, method) for method in methods} for column in columns}
    compared = [name for name in methods if METHODS[name].kind not in ("ablation", "variant")]
    bold = {column: leaders({m: cells[column][m] for m in compared or methods}, column.higher) for column in columns}
    lines = ["| method | " + " | ".join(column.title for column in columns) + " |", "|---" * (len(columns) + 1) + "|"]
    for kind in kinds:
        rows = [name for name in methods if METHODS[name].kind == kind]
        rows = [name for name in rows if any(cells[column][name] for column in columns)]
        if rows and len(kinds) > 1:
            lines.append(f"| *{GROUPS[kind]}* |" + " |" * len(columns))
        lines += [
            f"| {name} | " + " | ".join(shown(cells[c][name], name in bold[c]) for c in columns) + " |" for name in rows
        ]
    return "\n".join(lines)


def shown(found: Cell | None, bold: bool) -> str:
    """Return a cell's text."""
    if found is None:
        return "–"
    text = f"{found[0]:.3f} ± {found[1]:.3f}"
    return f"**{text}**" if bold else text


def times(stored: Sequence[Mapping[str, Any]]) -> dict[str, float]:
    """Return each method's time in that of gradient × input, the median over all models."""
    ratios: dict[str, list[float]] = {}
    for record in stored:
        unit = record["methods"]["gradient × input"]["seconds"]
        for method, found in record["methods"].items():
            if found is not None and record["family"] != "transformer":
                ratios.setdefault(method, []).append(found["seconds"] / unit)
    return {method: median(values) for method, values in ratios.items() if method in METHODS}


@dataclass(frozen=True)
class Claim:
    """A claim of the papers, and the two figures that it compares.

    Attributes:
        text: What is claimed.
        columns: The figures, each for itself.
        better: The method that should be ahead.
        worse: The method that should be behind.
    """

    text: str
    columns: Sequence[Column]
    better: str
    worse: str

    def line(self, stored: Sequence[Mapping[str, Any]]) -> list[str]:
        """Return a line of the list for each column, over the families that have both figures."""
        lines = []
        stored = [record for record in stored if all(record["methods"].get(m) for m in (self.better, self.worse))]
        for column in self.columns:
            ahead, behind = (cell(stored, column, method) for method in (self.better, self.worse))
            if ahead is None or behind is None:
                continue
            gain = (ahead[0] - behind[0]) * (1 if column.higher else -1)
            spread = max(ahead[1], behind[1])
            verdict = "held" if gain > spread else "within the spread" if gain >= -spread else "not held"
            lines.append(f"| {self.text} | {column.title} | {ahead[0]:.2f} | {behind[0]:.2f} | {verdict} |")
        return lines


def ground_truth(task: str, figure: str) -> list[Column]:
    """Return a column for each family that a task has, their mean, and the means of the other figures."""
    of_one = [Column(title, task, figure, family) for family, title in FAMILIES.items() if family != "vision_mamba"]
    others = [name for name in ("recall", "AP", "AUC") if name != figure]
    means = [Column("mean", task, figure), *(Column(f"mean {name}", task, name) for name in others)]
    return [*of_one[:-1], *means, of_one[-1]]


SENTENCES = [
    Column("LeRF − MoRF, `<unk>`", "sentences", "LeRF - MoRF, replaced", "mamba"),
    Column("LeRF − MoRF, deleted", "sentences", "LeRF - MoRF, deleted", "mamba"),
    Column("AUAC", "sentences", "AUAC", "mamba"),
    Column("AU-MSE (lower is better)", "sentences", "AU-MSE", "mamba", higher=False),
]
CANVASES = [
    Column("pixel accuracy", "canvases", "pixel accuracy", "vision_mamba"),
    Column("mIoU", "canvases", "mIoU", "vision_mamba"),
    Column("mAP", "canvases", "mAP", "vision_mamba"),
    Column("positive (lower is better)", "canvases", "positive perturbation", "vision_mamba", higher=False),
    Column("negative", "canvases", "negative perturbation", "vision_mamba"),
]
TASKS = {
    "marker-needle": ("recall", "A value matters only because a marker precedes it; recall of the two tokens."),
    "two-votes": ("sign accuracy", "Tokens vote for and against the answer; share of the votes with the right sign."),
    "induction": ("recall", "The token after the earlier occurrence of the last one is the answer; recall of both."),
    "copying": ("recall", "The answer stands at a known place; recall of what decides."),
}
MAIN = ("control", "peer", "published", "ours")


def summary() -> list[Column]:
    """Return the columns of the summary: each task in one figure."""
    return [
        Column("marker-needle, recall", "marker-needle", "recall"),
        Column("two votes, recall", "two-votes", "recall"),
        Column("two votes, signs", "two-votes", "sign accuracy"),
        Column("induction, recall", "induction", "recall"),
        Column("copying, recall", "copying", "recall"),
        SENTENCES[0],
        SENTENCES[1],
        CANVASES[1],
        CANVASES[2],
    ]


def claims() -> list[Claim]:
    """Return the papers' claims."""
    columns = [column for column in summary() if column.figure != "sign accuracy"]
    parts = ("conv", "act", "gate")
    return [
        Claim("unified beats the scan alone, rollout", columns, "unified, rollout", "scan alone, rollout"),
        Claim("the same, gradient-weighted", columns, "gradient-weighted, channel", "scan alone, gradient-weighted"),
        *(
            Claim(f"{part} contributes, rollout", columns, "unified, rollout", f"rollout without {part}")
            for part in parts
        ),
        *(
            Claim(f"{part} contributes, gradient-weighted", columns, method, f"gradient-weighted without {part}")
            for part in parts
            for method in ("gradient-weighted, channel",)
        ),
    ]


def competitive(stored: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return how RWKV and Griffin compare with a transformer of the same size, each under the same method."""
    lines = []
    for method in ("unified, rollout", "unified, root, rollout", "gradient-weighted, channel", "relevance, reference"):
        for family in ("rwkv", "recurrent_gemma"):
            for task in TASKS:
                ours, theirs = (cell(stored, Column("", task, "recall", f), method) for f in (family, "transformer"))
                if ours is None or theirs is None:
                    continue
                held = ours[0] >= theirs[0] - max(ours[1], theirs[1])
                lines.append(
                    f"| {method} | {FAMILIES[family]} | {task}, recall | {ours[0]:.2f} | {theirs[0]:.2f} "
                    f"| {'held' if held else 'not held'} |"
                )
    return lines


def against_integrated_gradients(stored: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return how many times as long as ours integrated gradients take, the median over seeds, task by task."""
    ours = ("relevance, frozen, half", "relevance, reference", "relevance, two references")
    ratios: dict[tuple[str, str], dict[str, list[float]]] = {}
    for record in stored:
        row = ratios.setdefault((record["task"], FAMILIES[record["family"]]), {})
        whole = record["methods"]["integrated gradients"]["seconds"]
        for method in ours:
            found = record["methods"][method]
            if found is not None:
                row.setdefault(method, []).append(whole / found["seconds"])
    return [
        "| task | model | " + " | ".join(ours) + " |",
        "|---|---|" + "---|" * len(ours),
        *(
            f"| {task} | {model} | "
            + " | ".join(f"{median(row[method]):.0f} ×" if method in row else "–" for method in ours)
            + " |"
            for (task, model), row in ratios.items()
        ),
    ]


def curves(stored: Sequence[Mapping[str, Any]]) -> dict[str, Curve]:
    """Return the mean curve of some methods as words are replaced, least relevant first less most relevant first."""
    drawn = ("random", "integrated gradients", "occlusion", "scan alone, rollout", "unified, root, rollout",
             "gradient-weighted, channel", "relevance, reference")  # fmt: skip
    found: dict[str, list[list[float]]] = {}
    for record in stored:
        if record["task"] == "sentences":
            for method in drawn:
                of = record["methods"][method]["curves"]
                least, most = of["LeRF, replaced"], of["MoRF, replaced"]
                found.setdefault(method, []).append([a - b for a, b in zip(least, most)])
    return {m: Curve(torch.linspace(0, 1, len(rows[0])), torch.tensor(rows)) for m, rows in found.items()}


def document(stored: Sequence[Mapping[str, Any]]) -> str:
    """Return the whole of RESULTS.md."""
    taken = times(stored)
    parts = [
        "# Results",
        INTRODUCTION.format(**stored[0]["versions"]),
        "## Summary",
        "Synthetic tasks: mean over the families that learnt them.",
        table(stored, [c for c in summary() if any(cell(stored, c, "random") for _ in (0,))], MAIN),
    ]
    for task, (figure, what) in TASKS.items():
        columns = [c for c in ground_truth(task, figure) if cell(stored, c, "random")]
        if columns:
            parts += [f"## {task}", what, table(stored, columns, (*MAIN, "ablation", "variant"))]
    if cell(stored, SENTENCES[0], "random"):
        parts += [
            "## Sentences",
            "Held-out film reviews and the shipped model's verdict, right or wrong; words taken away one by one, "
            "replaced by `<unk>` or deleted. `<unk>` favours methods that have it as their reference.",
            table(stored, SENTENCES, (*MAIN, "ablation", "variant")),
        ]
        curves_figure(
            curves(stored),
            title="Words replaced, LeRF − MoRF: higher is better",
            xlabel="share of words replaced",
            ylabel="difference of the verdict's probability",
        ).savefig(HERE / "results.png", dpi=110)
        parts.append("![LeRF − MoRF over the share of words replaced, mean of three draws](results.png)")
    if cell(stored, CANVASES[0], "random"):
        parts += [
            "## Canvases",
            "Two digits side by side, of which one decides; the mask of its ink is the truth.",
            table(stored, CANVASES, (*MAIN, "ablation", "variant")),
        ]
    parts += [
        "## Time",
        "In that of gradient × input on the same inputs, median over all models.",
        "| method | time |\n|---|---|\n"
        + "\n".join(f"| {m} | {taken[m]:.1f} × |" for m in METHODS if m in taken and METHODS[m].kind in MAIN),
        f"Times that integrated gradients with {STEPS} steps take, in those of ours. Synthetic tasks: {SEQUENCES} "
        "sequences at once; sentences: those of one length at once, one to six, two on average.",
        "\n".join(against_integrated_gradients(stored)),
        "## The papers' claims",
        "| claim | on | with | against | |\n|---|---|---|---|---|\n"
        + "\n".join(line for claim in claims() for line in claim.line(stored)),
        "For RWKV and Griffin the methods should do about as well as for a transformer of the same size (softmax "
        "layers of the same hybrid), trained on the same task:",
        "| method | model | task | its figure | the transformer's | |\n|---|---|---|---|---|---|\n"
        + "\n".join(competitive(stored)),
        (HERE / "tried.md").read_text(encoding="utf-8").strip(),
    ]
    return "\n\n".join(parts) + "\n"


SHOWN = {
    "random": "random",
    "integrated gradients": "integrated gradients, 50 steps",
    "occlusion": "occlusion",
    "scan alone, rollout": "rollout of the scan alone, as published",
    "unified, rollout": 'rollout, `fusion="absolute"`, as published',
    "unified, root, rollout": "rollout",
    "gradient-weighted, channel": "attribution, as published",
    "gradient-weighted, signed": "attribution, `rectify=None`",
    "relevance, frozen, half": "relevance, frozen gates",
    "relevance, reference": "relevance, with a reference",
    "relevance, two references": "relevance, with two references",
}
"""The methods of the short summary, as it calls them."""
CHOOSE, SECTION = HERE.parent / "docs" / "choose.md", "results"
"""The page and its section that have it."""


def short_summary(stored: Sequence[Mapping[str, Any]]) -> str:
    """Return the summary of few methods: means alone, the best and those within a spread of it in bold."""
    columns, taken = [column for column in summary() if cell(stored, column, "random")], times(stored)
    cells = {column: {method: cell(stored, column, method) for method in SHOWN} for column in columns}
    lines = [
        "| method | " + " | ".join(column.title for column in columns) + " | time |",
        "|---" * (len(columns) + 2) + "|",
    ]
    for method, name in SHOWN.items():
        row = []
        for column in columns:
            found = cells[column][method]
            mark = "**" if method in leaders(cells[column], column.higher) else ""
            row.append("–" if found is None else f"{mark}{found[0]:.2f}{mark}")
        lines.append(f"| {name} | " + " | ".join(row) + f" | {taken[method]:.0f} × |")
    return "\n".join(lines)


def main() -> None:
    """Write the page and the summary."""
    stored = records()
    (HERE / "RESULTS.md").write_text(document(stored), encoding="utf-8")
    write_section(CHOOSE, SECTION, short_summary(stored))


if __name__ == "__main__":
    main()
