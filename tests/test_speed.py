"""Stored figures of speed are compared with new ones, and a page of the site shows them."""

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.speed import __main__ as command
from benchmarks.speed import figures
from benchmarks.speed.figures import Figure, better, joined, read, report, slower, store, table
from benchmarks.speed.groups import GROUPS
from benchmarks.speed.timing import exponent
from scripts.sections import read_section, write_section

ROLLOUT = Figure("rollouts", "rollout", "a forward pass", "Mamba", 4, 2.0)
RELEVANCE = Figure("relevance", "relevance", "`InputXGradient`", "Mamba", None, 1.0)


def at(value: float, figure: Figure = ROLLOUT) -> Figure:
    """The figure with another value."""
    return replace(figure, value=value)


def test_what_is_more_than_a_tenth_worse_is_named() -> None:
    stored = [ROLLOUT, RELEVANCE]
    assert slower(stored, [at(2.19), at(0.5, RELEVANCE)]) == []
    found = [at(2.21), RELEVANCE]
    assert slower(stored, found) == [(ROLLOUT, at(2.21))]
    lines = report(slower(stored, found), 2).splitlines()
    assert lines == ["slower, 2.0 -> 2.2: rollout, a forward pass, Mamba", "1 of 2 figures became more than 10% worse"]


def test_only_figures_of_the_same_thing_are_compared() -> None:
    assert slower([ROLLOUT], [replace(at(9.0), of="another model"), replace(at(9.0), against="a minute")]) == []
    assert slower([ROLLOUT], [replace(at(9.0), group="moved", target=1.0)]) != []


def test_a_figure_that_is_measured_twice_counts_with_its_better_value() -> None:
    assert better([at(3.0), RELEVANCE], [at(2.0)]) == [at(2.0), RELEVANCE]
    assert better([at(2.0)], [at(3.0)]) == [at(2.0)]


def test_groups_that_were_not_measured_stay_as_they_were(tmp_path: Path) -> None:
    file = tmp_path / "speed.json"
    store([ROLLOUT, RELEVANCE], file)
    assert read(file) == [ROLLOUT, RELEVANCE]
    assert joined(read(file), [at(3.0), replace(at(1.0), of="Mamba-2")]) == [
        at(3.0), replace(at(1.0), of="Mamba-2"), RELEVANCE,
    ]  # fmt: skip


def test_a_table_has_a_line_a_model_a_column_a_method_and_what_misses_what_is_wanted_in_bold() -> None:
    signed = replace(at(0.021, replace(ROLLOUT, of="Mamba-2", target=1 / 50)), what="signed")
    assert table([ROLLOUT, RELEVANCE, signed]).splitlines() == [
        "## As multiples of a forward pass",
        "",
        "| model | rollout | signed |",
        "| --- | --- | --- |",
        "| Mamba | 2.0 (≤ 4.0) |  |",
        "| Mamba-2 |  | **1/48** (≤ 1/50) |",
        "",
        "## As multiples of `InputXGradient`",
        "",
        "| model | relevance |",
        "| --- | --- |",
        "| Mamba | 1.00 |",
    ]


@pytest.mark.parametrize("power", [1.0, 2.0])
def test_the_exponent_is_that_of_the_power_law(power: float) -> None:
    assert exponent({L: 3 * L**power for L in (512, 1024, 32768)}) == pytest.approx(power, abs=1e-4)


@pytest.mark.parametrize(("values", "status"), [([2.0], 0), ([3.0, 2.1], 0), ([3.0, 2.9], 1)])
def test_the_command_fails_if_a_figure_stays_worse_when_it_is_measured_again(
    values: list[float],
    status: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    remaining = iter(values)

    def rollouts(quick: bool) -> Iterator[Figure]:
        yield at(next(remaining))

    file = tmp_path / "speed.json"
    store([ROLLOUT, RELEVANCE], file)
    monkeypatch.setattr(command, "GROUPS", {"rollouts": rollouts})
    monkeypatch.setattr(sys, "argv", ["speed", "--check", str(file)])
    found = 0
    try:
        command.main()
    except SystemExit as stop:
        found = int(str(stop.code))
    assert found == status and next(remaining, None) is None
    assert ("slower, 2.0 -> 2.9" in capsys.readouterr().out) == bool(status)


def test_the_page_shows_what_is_stored() -> None:
    shown = read_section(figures.PAGE, figures.SECTION)
    assert shown == figures.page_section(figures.STORED)
    stored = read(figures.STORED)
    assert len({figure.key for figure in stored}) == len(stored)
    assert all(figures.cell(figure) in shown for figure in stored)


def test_a_section_of_a_page_is_replaced_and_one_without_markers_is_named(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("before <!-- a -->old<!-- /a --> between <!-- b -->\n<!-- /b --> behind", encoding="utf-8")
    write_section(page, "b", "new")
    assert read_section(page, "a") == "old" and read_section(page, "b") == "new"
    assert (
        page.read_text(encoding="utf-8")
        == "before <!-- a -->old<!-- /a --> between <!-- b -->\nnew\n<!-- /b --> behind"
    )
    with pytest.raises(ValueError, match=r"page.md lacks the markers <!-- c --> and <!-- /c -->"):
        write_section(page, "c", "new")


def test_a_group_measures() -> None:
    assert all(figure.value > 0 for figure in GROUPS["sentence"](True))
