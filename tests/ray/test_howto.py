"""The blocks of code of the how-tos on data sets run as they stand."""

import re
import runpy
from pathlib import Path
from typing import Any

from ray.cluster_utils import Cluster

HOWTO = Path(__file__).parents[2] / "docs" / "howto"


def run(name: str, folder: Path) -> dict[str, Any]:
    """Return the names that a how-to's blocks of Python leave behind, run as one script."""
    page = (HOWTO / f"{name}.md").read_text(encoding="utf-8")
    script = folder / f"{name}_howto.py"
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    script.write_text("\n".join(blocks), encoding="utf-8")
    return runpy.run_path(str(script))


def test_a_data_set(tmp_path: Path) -> None:
    names = run("datasets", tmp_path)
    assert names["report"].rows == 4 and names["report"].failed == 1
    assert names["curve"].values.shape[0] == 3 and len(names["mapped"]) == 4
    assert names["rows"]["error"] == ["", ""] and [len(scores) for scores in names["rows"]["scores"]] == [3, 2]


def test_on_many_machines(tmp_path: Path, cluster: Cluster) -> None:
    names = run("ray", tmp_path)
    assert names["report"].rows == 2 and names["report"].failed == 0
    assert [row["error"] for row in names["rows"]] == ["", ""]
