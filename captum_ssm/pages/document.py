"""What all pages have in common: the style of a fragment, the facts, and the page around it."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from html import escape
from pathlib import Path

from captum_ssm.pages import palette


def fragment(content: str, style: str = "", classes: str = "") -> str:
    """Return one ``<div>`` with its style, whose rules apply to this ``<div>`` and those like it alone.

    Args:
        content: What it holds, as HTML.
        style: Further rules.
        classes: Further classes of the ``<div>``.
    """
    style = f"{asset('document.css')}{palette.rules('.captum-ssm')}\n{style}"
    return f'<div class="{" ".join(["captum-ssm", *classes.split()])}">\n<style>\n{style}</style>\n{content}</div>\n'


def page(title: str, body: str) -> str:
    """Return a complete page, for a file.

    Args:
        title: The name of the page, which is escaped here.
        body: What it shows, as HTML.
    """
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="color-scheme" content="light dark">
<title>{escape(title or "Explanation")}</title>
<style>
:root {{ color-scheme: light dark; background: light-dark(#ffffff, #161616); }}
:root[data-theme="light"] {{ color-scheme: light; }}
:root[data-theme="dark"] {{ color-scheme: dark; }}
body {{ max-width: 60rem; margin: 1rem auto; }}
</style>
</head>
<body>
{body}</body>
</html>
"""


def description(facts: Mapping[str, str] | None) -> str:
    """Return facts by name as a list of HTML."""
    return "<dl>" + "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in (facts or {}).items()) + "</dl>"


def number(score: float) -> str:
    """Return a score with four digits and its sign, which is one that a screen reader speaks."""
    return f"{score:+.4g}".replace("-", "\N{MINUS SIGN}")


@cache
def asset(name: str) -> str:
    """Return the style or the script of this name, which stands beside this module."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")
