"""Rows of reviews, the shipped model, and a cluster of two nodes on this machine."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["RAY_DEDUP_LOGS"] = "0"

import pyarrow.parquet
import pytest
import ray
import torch
import transformers
from ray.cluster_utils import Cluster

import captum_ssm

ROOT = Path(captum_ssm.__file__).parents[1]
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
transformers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)

FIRST, SECOND = ("a gorgeous", "a wooden", "the", "an intriguing", "a tedious"), ("witty", "dull", "", "slow but funny")
THIRD = ("film", "mess of a plot, saved by its cast", "movie .", "hour and a half of my life that i want back")
TEXTS = [" ".join(filter(None, (a, b, c))) for a in FIRST for b in SECOND for c in THIRD]
"""80 texts of several lengths."""

BAD: list[Any] = ["", None, "word " * 600, [5, 99999], 7]
"""Rows that cannot be explained."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Let one process run all tests that start a cluster: two of them would starve each other."""
    for item in items:
        if "cluster" in getattr(item, "fixturenames", ()) or item.path.stem in ("test_howto", "test_tutorial"):
            item.add_marker(pytest.mark.xdist_group("cluster"))


@pytest.fixture
def reviews(tmp_path: Path) -> Path:
    """A file of 80 texts and five bad rows among them, a line that is no JSON, and a row of ids."""
    rows: list[Any] = [{"text": text, "number": k} for k, text in enumerate(TEXTS)]
    for k, bad in enumerate(BAD):
        rows.insert(13 * k + 5, {"text": bad, "number": -1})
    rows.append({"text": [5, 6, 7]})
    lines = [json.dumps(row) for row in rows]
    lines.insert(40, '{"text": "cut o')
    path = tmp_path / "reviews.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def parts(folder: Path) -> dict[str, bytes]:
    """Return the parts of an output, byte by byte."""
    return {path.name: path.read_bytes() for path in sorted(folder.glob("part-*.parquet"))}


def rows_of(folder: Path) -> list[dict[str, Any]]:
    """Return the rows of an output as any reader of Parquet finds them."""
    return list(pyarrow.parquet.read_table(folder).to_pylist())


@pytest.fixture(scope="session")
def cluster() -> Iterator[Cluster]:
    """Two nodes with one CPU each; this process is connected to the first."""
    node = {"num_cpus": 1, "object_store_memory": 200_000_000}
    nodes = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    nodes.add_node(**node)
    ray.init(address=nodes.address, log_to_driver=False, logging_level="ERROR")
    yield nodes
    ray.shutdown()
    nodes.shutdown()
