"""The callable unchanged in the loops of other libraries."""

from __future__ import annotations

from pathlib import Path

import datasets
import numpy as np
from accelerate import PartialState

from captum_ssm.datasets import Explain
from captum_ssm.models import REVIEWS
from tests.ray.conftest import TEXTS


def test_datasets_map_batched(tmp_path: Path) -> None:
    data = datasets.Dataset.from_dict({"text": [*TEXTS[:20], ""], "k": list(range(21))})
    explain = Explain(REVIEWS)
    mapped = data.map(explain, batched=True, batch_size=8)
    assert mapped["k"][:] == list(range(21)) and mapped[20]["error"].endswith("no token to explain.")
    for start in range(0, 21, 8):
        expected = explain(data[start : start + 8])
        for k, scores in enumerate(expected["scores"]):
            assert np.array_equal(np.array(mapped[start + k]["scores"], dtype=np.float32), scores)
            assert mapped[start + k]["target_name"] == expected["target_name"][k]
    assert data.map(explain, batched=True, batch_size=8)._fingerprint == mapped._fingerprint, "its cache knows it again"
    raw = data.map(Explain(REVIEWS, method="raw"), batched=True, batch_size=8)
    assert raw._fingerprint != mapped._fingerprint
    two = data.map(explain, batched=True, batch_size=8, num_proc=2)
    assert two["k"][:] == list(range(21)) and np.allclose(two[3]["scores"], mapped[3]["scores"], atol=1e-5)


def test_a_first_batch_of_bad_rows_alone_fixes_no_wrong_types() -> None:
    data = datasets.Dataset.from_dict({"text": ["", "", TEXTS[0], TEXTS[1]]})
    mapped = data.map(Explain(REVIEWS), batched=True, batch_size=2)
    assert [bool(error) for error in mapped["error"][:]] == [True, True, False, False]
    assert len(mapped[2]["scores"]) == len(mapped[2]["tokens"]) > 2


def test_accelerate_splits_the_rows() -> None:
    with PartialState(cpu=True).split_between_processes({"text": TEXTS[:4]}) as rows:
        found = Explain(REVIEWS)(rows)
    assert found["text"] == TEXTS[:4] and found["error"] == [""] * 4
