"""The same rows on two nodes of a cluster of Ray, also if a worker is killed in the middle."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import ray
import torch
from ray.cluster_utils import Cluster
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM, AutoTokenizer

from captum_ssm import ImplicitAttentionRelevance, InvalidInputError, ModelStateError, cli
from captum_ssm.datasets import Explain, Ray, Source, explain_file
from captum_ssm.datasets.engines import Part, Work
from captum_ssm.models import REVIEWS
from tests.ray.conftest import TEXTS, parts, rows_of


def source(path: Path, rows: int = 8) -> Source:
    return Source(str(path), block_rows=rows)


def recorded(folder: str, loads: int, *arguments: Any, **options: Any) -> ImplicitAttentionRelevance:
    """A method that leaves a file for each process that makes it."""
    del loads
    node = ray.get_runtime_context().get_node_id() if ray.is_initialized() else "none"
    (Path(folder) / str(os.getpid())).write_text(node)
    return ImplicitAttentionRelevance(*arguments, **options)


def test_two_nodes_give_the_same_bytes_as_one_process(reviews: Path, tmp_path: Path, cluster: Cluster) -> None:
    here, there, seen = tmp_path / "here", tmp_path / "there", tmp_path / "seen"
    seen.mkdir()
    explain = Explain(REVIEWS, method=partial(recorded, str(seen), 0))
    report = explain_file(explain, source(reviews), there, engine=Ray(workers=2))
    nodes = {path.read_text() for path in seen.iterdir()}
    assert len(nodes) == 2, "both nodes explain"
    assert explain_file(explain, source(reviews), here) == report
    assert parts(here) == parts(there) and report.rows == 87


class Killed(Ray):
    """An engine one of whose workers is killed when a number of parts has come."""

    def parts(self, work: Work, on_rows: Callable[[int], object]) -> Iterator[Part]:
        folder = Path(work.explain.method.args[0])  # type: ignore[union-attr]
        for number, part in enumerate(super().parts(work, on_rows)):
            if number == 2:
                before = {int(path.name) for path in folder.iterdir()} - {os.getpid()}
                alive = [pid for pid in sorted(before) if Path(f"/proc/{pid}").exists()]
                os.kill(alive[-1], signal.SIGKILL)
                (folder.parent / "killed").write_text(str(alive[-1]))
            yield part


def test_a_worker_that_is_killed_loses_nothing_and_doubles_nothing(
    reviews: Path, tmp_path: Path, cluster: Cluster
) -> None:
    here, there, seen = tmp_path / "here", tmp_path / "there", tmp_path / "seen"
    seen.mkdir()
    explain = Explain(REVIEWS, method=partial(recorded, str(seen), 1))
    report = explain_file(explain, source(reviews), there, engine=Killed(workers=2))
    killed = (tmp_path / "killed").read_text()
    assert not Path(f"/proc/{killed}").exists() and len(list(seen.iterdir())) >= 3, "another one took its place"
    explain_file(explain, source(reviews), here)
    assert parts(here) == parts(there) and [row["row"] for row in rows_of(there)] == list(range(report.rows))


def test_what_one_engine_began_the_other_goes_on_with(
    reviews: Path, tmp_path: Path, cluster: Cluster, capsys: pytest.CaptureFixture[str]
) -> None:
    out, whole = tmp_path / "out", tmp_path / "whole"
    arguments = ["explain-file", str(reviews), str(out), "--part-rows", "8", "--quiet"]
    assert cli.main(arguments) == 0
    first = capsys.readouterr().out
    whole.mkdir()
    for number in (0, 4, 5, 10):
        (out / f"part-{number:06d}.parquet").rename(whole / f"part-{number:06d}.parquet")
    assert cli.main([*arguments, "--resume", "--engine", "ray", "--workers", "2"]) == 0
    assert capsys.readouterr().out == first
    assert all(parts(out)[name] == content for name, content in parts(whole).items())
    assert cli.main([*arguments, "--engine", "ray", "--resume", "--workers", "5"]) == 2
    assert "room for 2 workers, but 5 are asked for" in capsys.readouterr().err
    assert cli.main([*arguments, "--engine", "ray", "--resume", "--method", "raw"]) == 2
    assert "begun with another settings" in capsys.readouterr().err


def test_errors_of_workers_are_raised_as_they_are(reviews: Path, tmp_path: Path, cluster: Cluster) -> None:
    with pytest.raises(InvalidInputError, match="cannot load a model from"):
        explain_file(Explain(tmp_path / "nowhere"), source(reviews), tmp_path / "out", engine=Ray(workers=1))
    changed = tmp_path / "changed"
    explain_file(Explain(REVIEWS), source(reviews, 40), changed)
    (changed / "part-000001.parquet").unlink()
    reviews.write_text(reviews.read_text().replace("gorgeous", "ugly"))
    with pytest.raises(InvalidInputError, match="are not those that the output was made of"):
        explain_file(Explain(REVIEWS), source(reviews, 40), changed, engine=Ray(workers=1), resume=True)


class Liar(Explain):
    """An explanation whose model is another one on each worker."""

    def ready(self) -> Any:
        ready = super().ready()
        ready.identity = lambda: {"class": "Mamba", "layers": [], "process": os.getpid()}  # type: ignore[method-assign]
        return ready


def test_another_model_on_another_machine_is_refused(reviews: Path, tmp_path: Path, cluster: Cluster) -> None:
    with pytest.raises(ModelStateError, match="is another one than that of the first worker"):
        explain_file(Liar(REVIEWS), source(reviews, 40), tmp_path / "out", engine=Ray(workers=1))


# --- Bigger than one device -------------------------------------------------------------------------------------------


def spread(offload: str | None = None) -> Any:
    """Load the model over two devices, one of them the disk, the CPU or none of its own."""
    places = {"backbone.embeddings": "cpu", "backbone.layers.0": "cpu", "backbone.norm_f": "cpu", "lm_head": "cpu"}
    places |= {f"backbone.layers.{k}": "disk" if offload else "cpu" for k in (1, 2)}
    model = AutoModelForCausalLM.from_pretrained(REVIEWS, device_map=places, offload_folder=offload)
    return model, AutoTokenizer.from_pretrained(REVIEWS)


def sharded() -> Any:
    """Load the model under FSDP2, whose parameters are gathered for each layer's run."""
    if not torch.distributed.is_initialized():
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]
        torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    model = AutoModelForCausalLM.from_pretrained(REVIEWS)
    for layer in model.backbone.layers:
        fully_shard(layer)
    fully_shard(model)
    return model, AutoTokenizer.from_pretrained(REVIEWS)


@pytest.mark.parametrize("way", ["cpu", "disk", "FSDP"])
def test_a_model_under_a_device_map_or_in_shards_in_an_actor(tmp_path: Path, cluster: Cluster, way: str) -> None:
    path, out, plain = tmp_path / "a.txt", tmp_path / "out", tmp_path / "plain"
    path.write_text("\n".join(TEXTS[:12]))
    explain = Explain(
        sharded if way == "FSDP" else partial(spread, str(tmp_path / "weights") if way == "disk" else None)
    )
    explain_file(explain, source(path, 6), out, engine=Ray(workers=1))
    explain_file(Explain(REVIEWS), source(path, 6), plain)
    assert len(rows_of(out)) == 12
    for one, other in zip(rows_of(out), rows_of(plain)):
        assert one["error"] == "" and one["ids"] == other["ids"]
        np.testing.assert_allclose(one["scores"], other["scores"], atol=1e-6)


# --- Ray Data itself --------------------------------------------------------------------------------------------


def test_the_callable_is_the_class_of_an_actor_pool(cluster: Cluster) -> None:
    data = ray.data.from_items([{"text": text, "k": k} for k, text in enumerate([*TEXTS[:10], ""])])
    rows = data.map_batches(
        Explain, fn_constructor_args=(str(REVIEWS),), fn_constructor_kwargs={"contrast": "runner-up"}, batch_size=11,
        concurrency=1, num_cpus=1,
    ).take_all()  # fmt: skip
    rows.sort(key=lambda row: row["k"])
    expected = Explain(REVIEWS, contrast="runner-up")({"text": [*TEXTS[:10], ""]})
    assert json.dumps([row["text"] for row in rows]) == json.dumps([*TEXTS[:10], ""])
    assert [row["error"] for row in rows] == expected["error"]
    for row, scores in zip(rows, expected["scores"]):
        assert np.array_equal(np.asarray(row["scores"], dtype=np.float32), scores)
