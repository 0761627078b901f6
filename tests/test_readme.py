"""The README's Python runs as it stands, and it can be read on a package index: its links lead to pages and files."""

import re
import tomllib
from pathlib import Path
from typing import Any

import pytest

from scripts.build_docs import PAGES
from tests.families import FAMILIES

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
URLS = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]["urls"]
SITE, FILES = f"{URLS['Documentation']}/en/stable/", f"{URLS['Repository']}/blob/main/"
PICTURES = FILES.replace("github.com", "raw.githubusercontent.com").replace("/blob/", "/")
LINKS = sorted(set(re.findall(r"\]\(([^)]+)\)", README)))


def test_its_python_explains_the_shipped_model() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    names: dict[str, Any] = {}
    exec(block, names)
    assert names["scores"].shape == names["ids"].shape
    assert float(names["gap"].abs().max()) < 1e-4


def test_it_is_short_and_says_how_many_model_types_there_are() -> None:
    assert len(README.splitlines()) <= 150
    types = {name.partition(" ")[0] for name in FAMILIES}
    assert f"{len(types)} model types" in README


def source(page: str) -> Path:
    """The file of a page of the site, by its address within it."""
    name = (page or "index.html").removesuffix(".html")
    elsewhere = [path for path, place in PAGES.items() if place == f"{name}.md"]
    return ROOT / (elsewhere[0] if elsewhere else f"docs/{name}.md")


@pytest.mark.parametrize("link", LINKS)
def test_a_link_is_absolute_and_leads_somewhere(link: str) -> None:
    address, _, anchor = link.partition("#")
    if address.startswith(SITE):
        assert source(address.removeprefix(SITE)).is_file()
        assert not anchor, "an anchor moves unseen"
    elif address.startswith((FILES, PICTURES)):
        assert (ROOT / address.removeprefix(FILES).removeprefix(PICTURES)).is_file()
    else:
        assert address == URLS["Repository"] or re.match(r"https://(captum\.ai|arxiv\.org/abs/\d{4}\.\d{5})$", address)
