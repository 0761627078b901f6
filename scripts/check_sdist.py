"""Build the source distribution, and check that its own tests run in it.

Run from the root of a git checkout, with the extra ``dev`` installed::

    python -m scripts.check_sdist

The distribution must hold every file of the repository that is not hidden, and no other. All of its tests must be
found, and a few that read files all over the tree must pass. Takes about a minute.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path
from tempfile import TemporaryDirectory

ROOT = Path(__file__).resolve().parents[1]
BUILD = "from setuptools import build_meta; build_meta.build_sdist('dist')"
WHERE = "import captum_ssm; print(captum_ssm.__file__)"
QUICK = (
    "tests/test_imports.py",
    "tests/test_readme.py",
    "tests/test_cli.py::test_the_module_is_a_program",
    "tests/test_benchmarks.py::test_the_page_is_made_of_what_is_stored",
    "tests/test_benchmarks.py::test_the_weights_of_every_model_are_stored",
    "tests/test_tutorials.py::test_is_committed_without_outputs",
    "tests/test_vision_mamba.py::test_the_trained_model_is_small_and_says_how_good_it_is",
)
"""Tests that need most kinds of files: sources, pages, models, notebooks, data, and packages beside ``captum_ssm``."""


def tracked() -> set[str]:
    """Return the files of the repository, but for hidden ones."""
    command = ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"]
    listed = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    visible = (name for name in listed if name and not any(part.startswith(".") for part in Path(name).parts))
    return {name for name in visible if (ROOT / name).is_file()}


def build(files: set[str], folder: Path) -> Path:
    """Build the source distribution from a copy of these files, unpack it, and return its root."""
    for name in files:
        (folder / "copy" / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, folder / "copy" / name)
    subprocess.run([sys.executable, "-c", BUILD], cwd=folder / "copy", check=True, stdout=subprocess.DEVNULL)
    (archive,) = (folder / "copy" / "dist").glob("*.tar.gz")
    with tarfile.open(archive) as packed:
        packed.extractall(folder / "unpacked", filter="data")
    (root,) = (folder / "unpacked").iterdir()
    print(f"{archive.name}: {archive.stat().st_size / 1e6:.1f} MB")
    return root


def compare(files: set[str], root: Path) -> None:
    """Exit if the distribution lacks a file of the repository, or holds another."""
    packed = {path.relative_to(root).as_posix() for path in root.rglob("*") if path.is_file()}
    added = {name for name in packed - files if name != "PKG-INFO" and ".egg-info/" not in name}
    if missing := files - packed:
        sys.exit(f"not in the source distribution, see MANIFEST.in: {sorted(missing)}")
    if added:
        sys.exit(f"in the source distribution, but not in the repository: {sorted(added)}")


def run_tests(root: Path) -> None:
    """Collect all tests of the unpacked distribution and run a few, on its own ``captum_ssm``."""
    environment = {**os.environ, "PYTHONPATH": str(root), "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}

    def python(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments], cwd=root, env=environment, capture_output=True, text=True, check=False
        )
        if done.returncode:
            sys.exit(f"failed in the unpacked source distribution: {' '.join(arguments)}\n{done.stdout}{done.stderr}")
        return done.stdout.strip()

    if not Path(python("-c", WHERE)).is_relative_to(root):
        sys.exit("captum_ssm is not the one of the source distribution")
    for arguments in (("--collect-only", "-q"), ("-q", *QUICK)):
        print(python("-m", "pytest", *arguments).splitlines()[-1])


def main() -> None:
    """Build, compare, test."""
    files = tracked()
    with TemporaryDirectory() as folder:
        root = build(files, Path(folder))
        compare(files, root)
        run_tests(root)


if __name__ == "__main__":
    main()
