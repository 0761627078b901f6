"""An explanation in the terminal and in files."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from matplotlib.figure import Figure

from captum_ssm.cli.explanation import Explanation
from captum_ssm.cli.problems import MISSING_EXTRA, CommandError
from captum_ssm.visualization import Passage, text_terminal

if TYPE_CHECKING:
    from rich.console import Console


def terminal() -> Console:
    """Return the terminal to print to.

    Raises:
        CommandError: If rich is not installed.
    """
    try:
        from rich.console import Console
    except ImportError as error:
        raise CommandError(MISSING_EXTRA) from error
    return Console(highlight=False, soft_wrap=False)


def show(explanation: Explanation, console: Console, files: Mapping[str, Path | None]) -> None:
    """Print an explanation and write it to files.

    Args:
        explanation: The explanation.
        console: The terminal.
        files: The path of the page (``"html"``) and of the picture (``"png"``), or None.

    Raises:
        CommandError: If a file cannot be written.
    """
    passage = explanation.passage
    console.print(f"\n[bold]{_escaped(passage.title)}[/bold]\n")
    console.print(text_terminal(passage))
    console.print()
    console.print(text_terminal(Passage(passage.legend)))
    console.print()
    for line in explanation.details:
        console.print(_escaped(line), soft_wrap=True)
    for name, value in (passage.facts or {}).items():
        console.print(_fact(name, value), soft_wrap=True)
    writers = {"html": partial(_write_html, explanation), "png": partial(_write_figure, explanation.draw)}
    for name, write in writers.items():
        if (path := files[name]) is not None:
            try:
                path.parent.mkdir(parents=True, exist_ok=True)
                write(path)
            except (OSError, ValueError) as error:
                raise CommandError(f"cannot write {str(path)!r}: {error}") from error
            console.print(_fact("written", str(path)), soft_wrap=True)


def _fact(name: str, value: str) -> str:
    """Return a fact as a line of rich's markup."""
    return f"[dim]{name:<13}[/dim]{_escaped(value)}"


def _escaped(text: str) -> str:
    """Return a text in which rich finds no markup."""
    from rich.markup import escape

    return escape(text)


def _write_html(explanation: Explanation, path: Path) -> None:
    path.write_text(explanation.html(), encoding="utf-8")


def _write_figure(draw: Callable[[], Figure], path: Path) -> None:
    figure = draw()
    with path.open("wb") as file:
        figure.savefig(file, format=path.suffix.lstrip(".") or "png")
