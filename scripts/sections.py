"""Sections of pages that scripts write: what stands between ``<!-- name -->`` and ``<!-- /name -->``."""

from __future__ import annotations

from pathlib import Path


def read_section(page: Path, name: str) -> str:
    """Return what a page has between the markers of a section.

    Args:
        page: The file.
        name: The name of the section.
    """
    return _parts(page, name)[1].strip()


def write_section(page: Path, name: str, text: str) -> None:
    """Replace what a page has between the markers of a section.

    Args:
        page: The file.
        name: The name of the section.
        text: What stands there from now on.
    """
    before, _, after = _parts(page, name)
    page.write_text(f"{before}<!-- {name} -->\n{text}\n<!-- /{name} -->{after}", encoding="utf-8")


def _parts(page: Path, name: str) -> tuple[str, str, str]:
    """Return what stands before, between and behind the markers.

    Raises:
        ValueError: If the page lacks them.
    """
    start, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found, rest = page.read_text(encoding="utf-8").partition(start)
    between, closed, after = rest.partition(end)
    if not found or not closed:
        raise ValueError(f"{page.name} lacks the markers {start} and {end}.")
    return before, between, after
