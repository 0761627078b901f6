"""The command line loads and explains what the installed release of transformers saves."""

from pathlib import Path
from typing import Any

import pytest

from tests.conftest import HAD
from tests.families import FAMILIES
from tests.test_cli import GOOD, WORDS, run, save

__all__ = ["run"]


def test_the_shipped_model_is_explained(run: Any) -> None:
    for method in ("relevance", "attribution"):
        shown = run(GOOD, "--method", method)
        assert shown.status == 0 and not shown.err
        assert shown.fact("prediction").startswith("'positive'")
        assert float(shown.fact("exactness").split()[6]) <= 1e-5


@pytest.mark.parametrize("family", sorted({"mamba2", "jamba", "zamba", "qwen3_next", "lfm2", "recurrent_gemma"} & HAD))
def test_a_saved_model_is_explained(run: Any, tmp_path: Path, family: str) -> None:
    """With the configuration's own choice of kernels, which in earlier releases is one that runs on no CPU."""
    folder = save(tmp_path / "checkpoint", FAMILIES[family].build(vocab_size=len(WORDS)), pad_token="[PAD]")
    shown = run("a good film was seen", "--model", folder, "--reference", "pad")
    assert shown.status == 0, shown.err
