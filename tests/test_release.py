"""All places name one version and one address, and a release is refused while they do not."""

import re
import subprocess
import tomllib
from pathlib import Path

import pytest

import captum_ssm
from captum_ssm import errors
from scripts import build_docs
from scripts.release import problems, stated

ROOT = Path(__file__).parents[1]
METADATA = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
URLS = METADATA["urls"]


def test_all_places_name_one_version() -> None:
    assert {version for version, _ in stated(ROOT).values()} == {captum_ssm.__version__.removesuffix(".dev0")}


def test_all_places_name_one_address() -> None:
    assert f"{URLS['Documentation']}/en/stable/errors.html" == errors.PAGE
    assert URLS["Repository"] == build_docs.REPOSITORY
    citation = (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    assert f"repository-code: {URLS['Repository']}\n" in citation
    assert f"name: {METADATA['authors'][0]['name']}" in citation
    for template in (ROOT / ".github").rglob("*.yml"):
        for url in re.findall(r"https://captum-ssm\S+", template.read_text(encoding="utf-8")):
            assert url.startswith(URLS["Documentation"])


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A repository that may be released."""
    files = {
        "captum_ssm/__init__.py": '__version__ = "1.2.3"\n',
        "CHANGELOG.md": "# Changelog\n\n## 1.2.3 (2026-05-04)\n\n## 1.2.2 (2026-01-01)\n",
        "CITATION.cff": "version: 1.2.3\ndate-released: 2026-05-04\n",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text, encoding="utf-8")
    commit(tmp_path, "init", "-q")
    return tmp_path


def commit(root: Path, *first: str) -> None:
    name = ("-c", "user.name=a", "-c", "user.email=a@b.c")
    for command in (first, ("add", "-A"), (*name, "commit", "-qm", "x")):
        if command:
            subprocess.run(["git", *command], cwd=root, check=True)


def test_a_repository_whose_places_agree_may_be_released(tree: Path) -> None:
    assert not problems(tree)


@pytest.mark.parametrize(
    ("name", "old", "new", "problem"),
    [
        ("captum_ssm/__init__.py", "1.2.3", "1.2.4", "CHANGELOG.md states the version 1.2.3"),
        ("captum_ssm/__init__.py", "1.2.3", "1.2.3.dev0", "no version to release"),
        ("CHANGELOG.md", "2026-05-04", "unreleased", "CHANGELOG.md has no date of release"),
        ("CHANGELOG.md", "2026-05-04", "2026-05-05", "the dates differ"),
        ("CITATION.cff", "1.2.3", "1.2.2", "CITATION.cff states the version 1.2.2"),
        ("CITATION.cff", "date-released: 2026-05-04\n", "", "CITATION.cff has no date of release"),
    ],
)
def test_a_place_that_disagrees_is_named(tree: Path, name: str, old: str, new: str, problem: str) -> None:
    text = (tree / name).read_text(encoding="utf-8")
    (tree / name).write_text(text.replace(old, new), encoding="utf-8")
    commit(tree)
    assert any(problem in found for found in problems(tree))


def test_a_change_that_is_not_committed_and_a_tag_that_is_there_are_named(tree: Path) -> None:
    (tree / "new").touch()
    assert any("not clean" in found and "new" in found for found in problems(tree))
    commit(tree)
    subprocess.run(["git", "tag", "v1.2.3"], cwd=tree, check=True)
    assert problems(tree) == ["the tag v1.2.3 is there already"]


TARGETS = re.findall(r"(?:^|`)make ([\w-]+)", (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("target", sorted(set(TARGETS)))
def test_every_make_target_that_contributors_are_told_of_is_there(target: str) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    (overlays,) = re.findall(r"^OVERLAYS := (.*)$", makefile, re.MULTILINE)
    known = {"test-NAME", *(f"test-{name}" for name in overlays.split())}
    assert target in known or re.search(rf"^{target}:", makefile, re.MULTILINE)
