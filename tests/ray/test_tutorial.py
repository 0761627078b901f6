"""The tutorial on whole data sets runs from top to bottom."""

from pathlib import Path

import pytest

from tests.test_tutorials import ELSEWHERE, NOTEBOOKS, run_notebook


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(ELSEWHERE))
def test_runs(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (path,) = (path for path in NOTEBOOKS if path.stem == name)
    run_notebook(path, tmp_path, monkeypatch)
