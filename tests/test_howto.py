"""The how-tos run as they stand, each as one script that ends in assertions; so do the first pages of the site."""

import re
import runpy
import shlex
from pathlib import Path

import pytest

from captum_ssm import supported, unregister
from captum_ssm.cli import main

DOCS = Path(__file__).parents[1] / "docs"
ELSEWHERE = {"datasets", "inseq", "lora", "nnsight", "quantus", "ray"}
"""Those that need packages of other environments, and are run there."""
PAGES = sorted(path for path in (DOCS / "howto").glob("*.md") if path.stem not in {*ELSEWHERE, "command_line", "index"})
PAGES += [DOCS / "start.md", DOCS / "choose.md", DOCS / "relevance.md"]


def script(page: Path) -> str:
    """The Python of a page, all blocks one after the other."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", page.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_a_page_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    code = script(page)
    assert re.search(r"^assert ", code, re.MULTILINE), "a page shows that it is right"
    (tmp_path / "page.py").write_text(code, encoding="utf-8")
    before = set(supported())
    try:
        runpy.run_path(str(tmp_path / "page.py"))
    finally:
        for support in set(supported()) - before:
            unregister(support.layer)


def test_the_command_of_its_page_runs_and_has_the_options(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (DOCS / "howto" / "command_line.md").read_text(encoding="utf-8")
    (command,) = re.findall(r"^```sh\ncaptum-ssm (.*)\n```$", text, re.MULTILINE)
    assert main(shlex.split(command)) == 0
    assert (tmp_path / "page.html").stat().st_size > 1000 and (tmp_path / "picture.png").stat().st_size > 1000
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["explain", "--help"])
    named = set(re.findall(r"--[a-z][a-z-]*", text))
    assert {"--model", "--layers"} < named <= set(re.findall(r"--[a-z][a-z-]*", capsys.readouterr().out))
