"""A file explained here: in parts that are whole or not there, resumed where it stopped, each bad input named."""

from __future__ import annotations

import csv
import errno
import io
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from captum_ssm import ImplicitAttentionRelevance, InvalidInputError, cli, metrics
from captum_ssm.datasets import Explain, Source, explain_file, measure, stored, summary
from captum_ssm.datasets.parts import Output
from captum_ssm.models import REVIEWS
from tests.ray.conftest import BAD, TEXTS, parts, rows_of

ANSWERS = ("negative", "positive")
SMALL = 8
"""Rows of a part."""


def source(path: Path, **options: Any) -> Source:
    return Source(str(path), block_rows=SMALL, **options)


def run(*arguments: object) -> int:
    return cli.main([str(word) for word in arguments])


def test_all_rows_are_there_once_in_order_with_their_errors(reviews: Path, tmp_path: Path) -> None:
    report = explain_file(Explain(REVIEWS), source(reviews), tmp_path / "out")
    rows = rows_of(tmp_path / "out")
    lines = reviews.read_text().splitlines()
    assert [row["row"] for row in rows] == list(range(len(lines))) and report.rows == len(rows) == 87
    assert report.failed == len(BAD) + 1 == sum(bool(row["error"]) for row in rows)
    assert sorted(report.failures.values()) == [1] * 6
    good = [row for row in rows if not row["error"]]
    assert [row["text"] for row in good] == [*TEXTS, "[5, 6, 7]"]
    assert [row["number"] for row in good] == [*map(str, range(80)), None]
    assert report.completeness and report.fidelity
    assert report.completeness[0] == max(row["completeness"] for row in good) < 1e-3
    assert rows[report.completeness[1]]["completeness"] == report.completeness[0]
    assert report.fidelity[0] == max(row["fidelity"] for row in good) < 1e-5
    alone = Explain(REVIEWS)({"text": [row["text"] for row in good[:-1]]})
    for row, scores in zip(good, alone["scores"]):
        np.testing.assert_allclose(row["scores"], scores, atol=1e-5)
    assert len(parts(tmp_path / "out")) == 11


@pytest.mark.parametrize("form", ["csv", "txt", "parquet", "folder"])
def test_every_form_of_file_gives_the_same_scores(tmp_path: Path, form: str) -> None:
    texts = TEXTS[:20]
    path = tmp_path / f"a.{form}"
    table = pyarrow.table({"text": texts, "n": pyarrow.array(range(20), pyarrow.int8()), "when": [None] * 20})
    if form == "csv":
        with path.open("w", newline="") as file:
            csv.writer(file).writerows([("text", "n"), *((text, k) for k, text in enumerate(texts))])
    elif form == "txt":
        path.write_text("\n".join(texts))
    elif form == "parquet":
        pyarrow.parquet.write_table(table, path, row_group_size=7)
    else:
        path.mkdir()
        pyarrow.parquet.write_table(table[:11], path / "1.parquet")
        pyarrow.parquet.write_table(table[11:], path / "2.parquet")
    explain_file(Explain(REVIEWS), source(path), tmp_path / "out")
    (tmp_path / "b.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    explain_file(Explain(REVIEWS), source(tmp_path / "b.jsonl"), tmp_path / "same")
    rows, same = rows_of(tmp_path / "out"), rows_of(tmp_path / "same")
    for name in ("text", "ids", "scores", "value", "target_name"):
        assert [row[name] for row in rows] == [row[name] for row in same]
    if form in ("parquet", "folder"):
        assert [row["n"] for row in rows] == list(range(20))
        assert pyarrow.parquet.read_schema(tmp_path / "out" / "part-000000.parquet").field("n").type == pyarrow.int8()
    elif form == "csv":
        assert [row["n"] for row in rows] == [str(n) for n in range(20)]
    assert source(path).count() == 20


def test_standard_input_is_a_file_of_texts(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO("\n".join(TEXTS[:6]).encode())))
    assert run("explain-file", "-", tmp_path / "out", "--part-rows", 4) == 0
    shown = capsys.readouterr()
    assert "6, 6 explained, 0 failed" in shown.out and "Traceback" not in shown.err
    assert [row["text"] for row in rows_of(tmp_path / "out")] == TEXTS[:6]


# --- Killed and resumed -----------------------------------------------------------------------------------------------


def test_a_run_that_is_killed_three_times_gives_the_same_bytes(reviews: Path, tmp_path: Path) -> None:
    whole, out = tmp_path / "whole", tmp_path / "out"
    assert run("explain-file", reviews, whole, "--part-rows", SMALL, "--quiet") == 0
    command = [
        sys.executable,
        "-m",
        "captum_ssm.cli",
        "explain-file",
        str(reviews),
        str(out),
        "--part-rows",
        str(SMALL),
    ]
    kept = -1
    for parts_before in (1, 4, 7):
        process = subprocess.Popen([*command, *(["--resume"] if kept >= 0 else [])], stderr=subprocess.DEVNULL)
        while len(list(out.glob("part-*.parquet"))) < parts_before:
            assert process.poll() is None
            time.sleep(0.01)
        process.send_signal(signal.SIGKILL)
        assert process.wait() == -signal.SIGKILL
        there = parts(out)
        assert len(there) >= parts_before > kept
        assert all(parts(whole)[name] == content for name, content in there.items())
        kept = len(there)
    assert run("explain-file", reviews, out, "--part-rows", SMALL, "--resume", "--quiet") == 0
    assert parts(out) == parts(whole) and not list(out.glob(".part-*"))


def test_parts_that_are_there_are_not_made_again(reviews: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    first = explain_file(Explain(REVIEWS), source(reviews), out)
    before = {path: path.stat().st_mtime_ns for path in out.glob("part-*")}
    (out / "part-000003.parquet").unlink()
    (out / ".part-000009.parquet").write_bytes(b"half")
    assert explain_file(Explain(REVIEWS), source(reviews), out, resume=True) == first
    after = {path: path.stat().st_mtime_ns for path in out.glob("part-*")}
    assert [path.name for path in after if before[path] != after[path]] == ["part-000003.parquet"]
    assert not list(out.glob(".part-*"))


# --- Bad input --------------------------------------------------------------------------------------------------------


def perturbed_copy(folder: Path) -> str:
    model = AutoModelForCausalLM.from_pretrained(REVIEWS)
    with torch.no_grad():
        model.backbone.norm_f.weight[3] *= 1.001
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(REVIEWS).save_pretrained(folder)
    return str(folder)


def test_an_output_is_not_gone_on_with_otherwise(reviews: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    explain_file(Explain(REVIEWS), source(reviews), out)
    before = parts(out)
    other = perturbed_copy(tmp_path / "other")
    for explain, words in (
        (Explain(other), "another model: weights"),
        (Explain(REVIEWS, method="raw"), 'another settings: method "relevance", now "raw"'),
        (Explain(REVIEWS, contrast="runner-up"), 'another settings: contrast null, now "runner-up"'),
    ):
        with pytest.raises(InvalidInputError, match=words):
            explain_file(explain, source(reviews), out, resume=True)
    with pytest.raises(InvalidInputError, match="another rows of a part: 8, now 9"):
        explain_file(Explain(REVIEWS), Source(str(reviews), block_rows=9), out, resume=True)
    with pytest.raises(InvalidInputError, match=r"holds an output already, 11 parts of it; go on with resume"):
        explain_file(Explain(REVIEWS), source(reviews), out)
    lines = reviews.read_text().splitlines()
    lines[20] = lines[21]
    reviews.write_text("\n".join(lines))
    with pytest.raises(InvalidInputError, match=r"the rows 16 to 23 of .* are not those that the output was made of"):
        explain_file(Explain(REVIEWS), source(reviews), out, resume=True)
    assert parts(out) == before
    same = perturbed_copy(tmp_path / "same")
    assert same != other and explain_file(Explain(same), source(reviews), tmp_path / "two").rows == 87


def test_two_runs_on_one_output(reviews: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    with Output(out).held():
        command = [sys.executable, "-m", "captum_ssm.cli", "explain-file", str(reviews), str(out)]
        done = subprocess.run(command, text=True, capture_output=True, check=False)
        assert done.returncode == 2 and f"another run writes into '{out}' (process {os.getpid()} on " in done.stderr
    assert run("explain-file", reviews, out, "--quiet") == 0  # the lock of a process that ended holds nothing


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_full_disk(reviews: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    """The part that was being written leaves nothing, and the run goes on when there is space again."""
    out, write = tmp_path / "out", pyarrow.parquet.write_table
    whole = tmp_path / "whole"
    explain_file(Explain(REVIEWS), source(reviews), whole)
    written: list[Path] = []

    def full(table: Any, path: Path, **options: Any) -> None:
        written.append(path)
        if len(written) == 3:
            Path(path).write_bytes(b"PAR1 half of it")
            raise OSError(number, os.strerror(number))
        write(table, path, **options)

    monkeypatch.setattr(pyarrow.parquet, "write_table", full)
    with pytest.raises(InvalidInputError, match=r"cannot write .*part-000002.parquet': .*mend the cause, and go on"):
        explain_file(Explain(REVIEWS), source(reviews), out)
    assert sorted(parts(out)) == ["part-000000.parquet", "part-000001.parquet"] and not list(out.glob(".part-*"))
    explain_file(Explain(REVIEWS), source(reviews), out, resume=True)
    assert parts(out) == parts(whole)


def test_a_real_disk_without_space(reviews: Path) -> None:
    """/dev/full is a disk without space: the folder cannot even hold the output's manifest."""
    with pytest.raises(InvalidInputError, match="cannot write into '/dev/full'"):
        explain_file(Explain(REVIEWS), source(reviews), "/dev/full")


def test_a_folder_that_cannot_be_written(reviews: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(InvalidInputError, match=r"cannot write into .*file"):
        explain_file(Explain(REVIEWS), source(reviews), tmp_path / "file" / "out")
    with pytest.raises(InvalidInputError, match="cannot write into '/proc/out'"):
        explain_file(Explain(REVIEWS), source(reviews), "/proc/out")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.tex").write_text("")
    with pytest.raises(
        InvalidInputError, match=r"no output, and holds other files \('thesis.tex'\); name a new folder"
    ):
        explain_file(Explain(REVIEWS), source(reviews), tmp_path / "other")


@pytest.mark.parametrize(
    "damage", [lambda data: data[: len(data) // 2], lambda data: b"", lambda data: data[:-9] + data[9:18]]
)
def test_a_damaged_part_is_named(reviews: Path, tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    out = tmp_path / "out"
    report, whole = explain_file(Explain(REVIEWS), source(reviews), out), parts(out)
    part = out / "part-000004.parquet"
    part.write_bytes(damage(part.read_bytes()))
    for again in (partial(explain_file, Explain(REVIEWS), source(reviews), out, resume=True), partial(summary, out)):
        with pytest.raises(
            InvalidInputError, match=r"part-000004.parquet' is damaged .*; delete it, and go on with resume"
        ):
            again()
    part.unlink()
    assert explain_file(Explain(REVIEWS), source(reviews), out, resume=True) == report and parts(out) == whole


def test_other_files_beside_the_parts(reviews: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    explain_file(Explain(REVIEWS), source(reviews), out)
    pyarrow.parquet.write_table(pyarrow.table({"a": [1]}), out / "part-000099.parquet")
    with pytest.raises(InvalidInputError, match=r"part-000099.parquet' is no part of this output"):
        explain_file(Explain(REVIEWS), source(reviews), out, resume=True)
    with pytest.raises(InvalidInputError, match="holds no parts of an output"):
        summary(tmp_path)
    (out / "_manifest.json").write_text("{")
    with pytest.raises(InvalidInputError, match=r"cannot read .*_manifest.json"):
        explain_file(Explain(REVIEWS), source(reviews), out, resume=True)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--text-column", "review"], "there is no column 'review'; the rows have 'text', 'number'"),
        (["--target-column", "label"], "there is no column 'label'"),
        (["--engine", "local", "--workers", "2"], "--workers is of the engine ray"),
        (["--target", "positive", "--target-column", "number"], "leave one of them out"),
        (["--method", "raw", "--layers"], "--layers is no option of the method raw"),
        (["--method", "raw", "--reference", "pad"], "--reference is no option of the method raw"),
        (["--batch-tokens", "0"], "batch_tokens must be a number"),
        (["--part-rows", "0"], "a part has at least one row"),
        (["--model", "./nowhere"], "there is no such folder"),
        (["--classes", "positive", "nope-nope"], "'nope-nope' is not one token"),
        (["--target", "nope-nope"], "'nope-nope' is not one token"),
        (["--contrast", "99999"], "target 99999 is out of range"),
    ],
)
def test_a_wrong_command_is_refused(
    reviews: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    status = run("explain-file", reviews, tmp_path / "out", "--quiet", *arguments)
    shown = capsys.readouterr()
    assert status == 2 and words in shown.err and "Traceback" not in shown.err


# --- What the corpus says ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def explained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("explained")
    labels = [ANSWERS["dull" not in text and "tedious" not in text and "mess" not in text] for text in TEXTS]
    lines = [json.dumps({"text": text, "label": label}) for text, label in zip([*TEXTS, ""], [*labels, ""])]
    (folder / "in.jsonl").write_text("\n".join(lines))
    explain = Explain(REVIEWS, classes=ANSWERS, target_column="label", contrast="runner-up", layers=True)
    explain_file(explain, Source(str(folder / "in.jsonl"), block_rows=30), folder / "out")
    return folder / "out"


def test_the_summary_counts_words_positions_layers_and_surprises(explained: Path) -> None:
    found, rows = summary(explained, surprises=4), [row for row in rows_of(explained) if not row["error"]]
    assert found.report.rows == 81 and found.report.failed == 1 and sum(found.classes.values()) == 80
    for name in ANSWERS:
        own = [row for row in rows if row["target_name"] == name]
        assert found.classes[name] == len(own)
        plain = [row for row in own if row["text"].endswith("movie .")]
        scores = [s for row in plain for word, s in zip(row["text"].split(), row["scores"]) if word == "movie"]
        tally = found.words[name]["movie"]
        assert tally.count == len(scores) and tally.mean == pytest.approx(np.mean(scores))
        assert tally.error == pytest.approx(np.std(scores, ddof=1) / len(scores) ** 0.5)
    for_it, against = found.spoken("negative", 3)
    assert for_it[0].word in ("dull", "tedious", "mess", "wooden") and all(line.mean < 0 for line in against)
    assert found.right == pytest.approx(np.mean([row["target"] == row["prediction"] for row in rows]))
    differences = [row["value"] - row["reference_value"] for row in rows]
    for k, share in enumerate(found.layers.values()):
        total = sum(np.sign(d) * row["layers"][k] for d, row in zip(differences, rows))
        assert share == pytest.approx(total / sum(map(abs, differences)))
    least = sorted(rows, key=lambda row: row["value"])[:4]
    assert [s.row for s in found.surprises] == [row["row"] for row in least]
    sizes = [abs(score) for row in rows for score in row["scores"][:-1]]
    assert sum(size.mean * size.count for _, size in found.positions) <= sum(sizes) + 1e-3
    with pytest.raises(InvalidInputError, match="no row is explained for the class 'maybe'; there are"):
        found.spoken("maybe")


def test_the_summary_as_table_picture_and_page(
    explained: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    page, picture = tmp_path / "a" / "page.html", tmp_path / "a" / "picture.png"
    assert run("summary", explained, "--html", page, "--png", picture, "--words", 4) == 0
    shown = capsys.readouterr().out
    for words in (
        "81, 80 explained, 1 failed",
        "for 'negative'",
        "backbone.layers.2.mixer",
        "most surprising",
        "± standard",
    ):
        assert words in shown
    assert picture.read_bytes().startswith(b"\x89PNG")
    text = page.read_text(encoding="utf-8")
    assert text.startswith("<!DOCTYPE html>") and "http" not in text and "<script" not in text
    assert "tedious" in text and 'title="+' in text and text.count("<table") == 2 * 2 + 2
    assert summary(explained)._repr_html_().startswith('<div class="captum-ssm-summary">')
    assert run("summary", tmp_path / "nothing") == 2 and "holds no parts" in capsys.readouterr().err


def test_stored_scores_are_measured_as_fresh_ones(explained: Path) -> None:
    model, tokenizer = AutoModelForCausalLM.from_pretrained(REVIEWS).eval(), AutoTokenizer.from_pretrained(REVIEWS)
    options: dict[str, Any] = {"baselines": tokenizer.unk_token_id}
    curves = measure(metrics.morf, model, explained, batch_rows=7, **options)
    assert curves.values.shape[0] == 80
    texts = [row for row in rows_of(explained) if not row["error"]]
    method = ImplicitAttentionRelevance(model)
    for k in (0, 33, 79):
        ids = torch.tensor([texts[k]["ids"]])
        baseline = torch.full_like(ids, tokenizer.unk_token_id)
        baseline[0, -1] = ids[0, -1]
        target, contrast = texts[k]["target"], texts[k]["contrast"]
        scores = method.attribute(ids, target, baselines=baseline, contrast=contrast)
        fresh = metrics.morf(model, ids, scores, target=target, contrast=contrast, **options)
        torch.testing.assert_close(curves.values[k : k + 1], fresh.values, atol=1e-4, rtol=1e-3)
    assert [row for batch in stored(explained, batch_rows=7) for row in batch.rows] == list(range(80))
