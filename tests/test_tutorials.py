"""The tutorials run from top to bottom, check themselves, and are committed without outputs."""

import os
import sys
from pathlib import Path

import nbformat
import pytest
from jupyter_client.manager import AsyncKernelManager
from nbclient import NotebookClient

import captum_ssm

ROOT = Path(captum_ssm.__file__).parents[1]
NOTEBOOKS = sorted((Path(__file__).parents[1] / "tutorials").glob("*.ipynb"))
KERNEL = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]

ELSEWHERE = {"07_a_whole_data_set"}
"""Notebooks that need packages of another environment, whose tests run them: tests/ray/test_tutorial.py."""

every_notebook = pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


class ThisPython(AsyncKernelManager):
    """Runs the kernel in the interpreter of the tests, whichever kernels are registered."""

    def format_kernel_cmd(self, extra_arguments: list[str] | None = None) -> list[str]:
        assert self.kernel_spec is not None
        self.kernel_spec.argv = KERNEL
        return super().format_kernel_cmd(extra_arguments)


def test_there_are_tutorials() -> None:
    assert NOTEBOOKS


@pytest.mark.slow
@pytest.mark.parametrize("path", [path for path in NOTEBOOKS if path.stem not in ELSEWHERE], ids=lambda path: path.stem)
def test_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run_notebook(path, tmp_path, monkeypatch)


def run_notebook(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Run a notebook from top to bottom, in an empty folder, which it leaves empty."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    path_of_imports = f"{ROOT}{os.pathsep}{path.parent}"  # the package that is tested here, installed or not
    monkeypatch.setenv("PYTHONPATH", path_of_imports)
    monkeypatch.delenv("MPLBACKEND", raising=False)  # ipykernel then draws into the notebook
    notebook = nbformat.read(path, as_version=4)
    probe = nbformat.v4.new_code_cell("import sys; print(sys.executable)")
    notebook.cells.append(probe)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(notebook, timeout=300, resources=resources, kernel_manager_class=ThisPython).execute()
    assert probe.outputs[0].text.strip() == sys.executable
    pictures = [
        output for cell in notebook.cells for output in cell.get("outputs", []) if "image/png" in output.get("data", {})
    ]
    assert pictures
    assert not list(tmp_path.iterdir()), "a tutorial leaves no files behind"


@every_notebook
def test_is_committed_without_outputs(path: Path) -> None:
    assert all(not cell.outputs and cell.execution_count is None for cell in code_cells(path))


@every_notebook
def test_ends_in_assertions(path: Path) -> None:
    assert any(line.lstrip().startswith("assert ") for line in code_cells(path)[-1].source.splitlines())
