"""Explain the models' answers by every method, and store the figures.

    python -m benchmarks.run                                  everything that is not stored yet
    python -m benchmarks.run --only marker-needle mamba 0     one model
    python -m benchmarks.run --again                          measure anew what is stored already

One JSON for each model goes to ``benchmarks/data``. What is stored is not measured again, method by method, so a run
can be stopped at any time, and a new method costs its own time only. The weights, in half precision, are in
``benchmarks/weights``; a model without is trained first. Everything is seeded: another run on the same weights stores
the same figures, but for rounding and the seconds. ``report.py`` makes ``RESULTS.md`` of them.
"""

from __future__ import annotations

import argparse
import json
import platform
import sys
from collections.abc import Collection, Iterable, Iterator
from importlib.metadata import version
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
import transformers as hf
from safetensors.torch import load_model, save_model
from torch import Generator, Tensor
from tqdm import tqdm

from benchmarks.cases import Canvases, Case, Marks, Sentences, Synthetic
from benchmarks.methods import METHODS, Function, NotApplicableError
from benchmarks.tasks import FAMILIES, RATES, TASKS, accuracy, build, train
from captum_ssm.errors import InvalidInputError

ROOT = Path(__file__).parents[1]
DATA, WEIGHTS = ROOT / "benchmarks" / "data", ROOT / "benchmarks" / "weights"
SEEDS = (0, 1, 2)
LEARNT = 0.9
"""Accuracy below which a task was not learnt, and there is nothing to explain."""

Name = tuple[str, str, int]


ATTEMPTS = 3
"""How often training is begun with other random weights until a task is learnt."""

MODELS: dict[str, tuple[str, ...]] = {
    "marker-needle": tuple(FAMILIES),
    "two-votes": tuple(FAMILIES),
    "sentences": ("mamba",),
    "canvases": ("vision_mamba",),
    "induction": ("mamba", "mamba2", "rwkv", "qwen3_5"),
    "copying": ("mamba", "mamba2", "rwkv", "recurrent_gemma", "qwen3_5"),
}
"""The models of each task, the most important task first. The transformer is there to be compared with on two. Griffin
does not learn induction: 87 % after 6000 steps."""


def names() -> Iterator[Name]:
    """Yield task, family and seed of every model."""
    for task, families in MODELS.items():
        for seed in SEEDS:
            yield from ((task, family, seed) for family in families)


def trained(task: str, family: str, seed: int) -> Any:
    """Return a model that was trained on a task, from its stored weights, which are made now if there are none."""
    path = WEIGHTS / f"{task}-{family}-{seed}.safetensors"
    if not path.exists():
        for attempt in range(ATTEMPTS):
            model = build(family, seed + 10 * attempt)
            reached, _ = train(model, TASKS[task](), seed + 10 * attempt, rate=RATES[family])
            if reached >= LEARNT:
                break
        WEIGHTS.mkdir(exist_ok=True)
        save_model(model.half(), str(path))
    model = build(family, seed)
    load_model(model, path)
    return model.eval().requires_grad_(False)


def case(task: str, family: str, seed: int) -> Case | float:
    """Return what is explained; only the accuracy if the model has not learnt its task."""
    if task == "sentences":
        return Sentences(seed)
    if task == "canvases":
        return Canvases(seed)
    model = trained(task, family, seed)
    reached = accuracy(model, TASKS[task]().batch(1000, Generator().manual_seed(2**31 + 1)))
    return Synthetic(task, model) if reached >= LEARNT else reached


def measure(case: Case, methods: Iterable[str] = tuple(METHODS)) -> Iterator[tuple[str, dict[str, Any] | None]]:
    """Yield the figures of each method by its name, or None if it cannot explain this model."""
    for name in methods:
        try:
            yield name, marked(case, METHODS[name].explain)
        except NotApplicableError:
            yield name, None
        except InvalidInputError as error:
            if "has a factor named" not in str(error):  # left out what the family has not
                raise
            yield name, None


def marked(case: Case, explain: Function) -> dict[str, Any]:
    """Return the figures of one method, as they are stored."""
    count = sum(len(question.inputs) for question in case.questions)
    torch.manual_seed(0)
    start = perf_counter()
    scores = [explain(question) for question in case.questions]
    seconds = (perf_counter() - start) / count
    return {"seconds": float(f"{seconds:.2g}"), **stored(case.mark(scores))}


def stored(marks: Marks) -> dict[str, Any]:
    """Return marks as they are stored: of a figure its mean and the mean's standard error over the inputs."""

    def mean_and_error(figure: Tensor) -> list[float]:
        values = figure.double()
        if values.dim() == 0:
            return [round(float(values), 4)]
        return [round(float(values.mean()), 4), round(float(values.std() / len(values) ** 0.5), 4)]

    return {
        "figures": {name: mean_and_error(figure) for name, figure in marks.figures.items()},
        "curves": {name: [round(float(value), 4) for value in curve] for name, curve in marks.curves.items()},
    }


def run(name: Name, again: bool = False, methods: Collection[str] = tuple(METHODS)) -> None:
    """Measure and store what is not stored of one model."""
    path = DATA / ("-".join(map(str, name)) + ".json")
    record: dict[str, Any] = json.loads(path.read_text()) if path.exists() and not again else {"methods": {}}
    missing = [method for method in methods if method not in record["methods"]]
    if not missing or record.get("learnt") is False:
        return
    found = case(*name)
    record = {
        **dict(zip(("task", "family", "seed"), name)),
        "learnt": not isinstance(found, float),
        "accuracy": round(found if isinstance(found, float) else found.accuracy, 4),
        "inputs": 0 if isinstance(found, float) else sum(len(question.inputs) for question in found.questions),
        "versions": {package: version(package) for package in ("torch", "transformers", "captum")},
        "machine": platform.machine(),
        "methods": record["methods"],
    }
    DATA.mkdir(exist_ok=True)
    if not isinstance(found, float):
        for method, marks in tqdm(measure(found, missing), desc=path.stem, total=len(missing), disable=None):
            record["methods"][method] = marks
    order = {method: record["methods"][method] for method in METHODS if method in record["methods"]}
    path.write_text(dump(record | {"methods": order}))


def dump(record: dict[str, Any]) -> str:
    """Return a record as JSON, a line for each method."""
    items = record["methods"].items()
    methods = ",\n".join(f"  {json.dumps(name, ensure_ascii=False)}: {json.dumps(marks)}" for name, marks in items)
    head = json.dumps({key: value for key, value in record.items() if key != "methods"})
    return f'{head[:-1]}, "methods": {{\n{methods}\n}}}}\n'


def main() -> None:
    """Run what the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", metavar="WORD", help="task, family and seed; models that have all words")
    parser.add_argument("--again", action="store_true", help="measure anew what is stored already")
    parser.add_argument("--methods", nargs="+", choices=METHODS, metavar="METHOD", default=tuple(METHODS))
    options = parser.parse_args()
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    torch.set_num_threads(1)
    wanted = [name for name in names() if set(options.only or ()) <= {str(part) for part in name}]
    if not wanted:
        sys.exit(f"no model has all of these: {' '.join(options.only)}")
    for name in wanted:
        start = perf_counter()
        run(name, options.again, options.methods)
        print(f"{'-'.join(map(str, name))} {perf_counter() - start:.0f} s", flush=True)


if __name__ == "__main__":
    main()
