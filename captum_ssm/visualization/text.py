"""A text whose pieces are coloured by their scores: in the terminal, and as a figure."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby
from typing import TYPE_CHECKING

from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from captum_ssm.pages import Passage, Piece

if TYPE_CHECKING:
    from rich.text import Text

_COLUMNS, _NOTE_COLUMNS = 78, 120  # characters of a line of text, and of the smaller notes below it


def text_terminal(passage: Passage) -> Text:
    """Return the passage for ``rich.print``, each piece on a background in the colour of its score."""
    from rich.text import Text

    text = Text()
    for piece in passage.pieces:
        background, color = passage.color(piece)
        text.append(piece.text, style=f"{color} on {background}" if piece.score is not None else "")
    return text


def text_figure(passage: Passage) -> Figure:
    """Return a matplotlib figure of the passage; save it with ``figure.savefig(path)``."""
    lines = _wrap(passage.pieces, _COLUMNS)
    facts = [Piece(f"{name}: {value}") for name, value in (passage.facts or {}).items()]
    notes = ["".join(piece.text for piece in line) for fact in facts for line in _wrap([fact], _NOTE_COLUMNS)]
    note_width = _COLUMNS / _NOTE_COLUMNS  # of a character of the notes, in columns
    columns = max(
        30, *(sum(len(piece.text) for piece in line) for line in lines), *(note_width * len(n) for n in notes)
    )
    height = 2 + 1.6 * len(lines) + 2.2 + 1.1 * len(notes)
    figure = Figure(figsize=(9.5 / _COLUMNS * columns, 0.26 * height), dpi=150, facecolor="white")
    axes = figure.add_axes((0.02, 0.02, 0.96, 0.96))
    axes.set(xlim=(0, columns), ylim=(height, 0))
    axes.axis("off")
    axes.text(0, 0.8, passage.title, fontsize=13, weight="bold", va="center", parse_math=False)
    y = 2.4
    for line in [*lines, (), passage.legend]:
        x = 0
        for piece in line:
            background, color = passage.color(piece)
            if piece.score is not None:
                axes.add_patch(Rectangle((x, y - 0.65), len(piece.text), 1.3, color=background, lw=0))
            color = color if piece.score is not None else "#000000"
            for k, character in enumerate(piece.text):  # one cell each, so that text and colour stay aligned
                axes.text(
                    x + k + 0.5,
                    y,
                    character,
                    family="monospace",
                    fontsize=12.5,
                    color=color,
                    ha="center",
                    va="center",
                    parse_math=False,
                )
            x += len(piece.text)
        y += 1.6 if line else 0.6
    for note in notes:
        axes.text(0, y, note, fontsize=9, color="#5a5a5a", va="center", parse_math=False)
        y += 1.1
    return figure


def _wrap(pieces: Sequence[Piece], columns: int) -> list[list[Piece]]:
    """Break pieces into lines of at most ``columns`` characters, at white space where possible."""
    words: list[list[Piece]] = [[]]
    for piece in pieces:
        for blank, characters in groupby(piece.text, str.isspace):
            if blank:
                words.append([])
            else:
                words[-1].append(Piece("".join(characters), piece.score))
    lines: list[list[Piece]] = [[]]
    width = 0
    for word in filter(None, words):
        length = sum(len(piece.text) for piece in word)
        if width and width + 1 + length > columns:
            lines.append([])
            width = 0
        if width:
            lines[-1].append(Piece(" "))
            width += 1
        for piece in word:
            for start in range(0, len(piece.text), columns):
                segment = Piece(piece.text[start : start + columns], piece.score)
                if width + len(segment.text) > columns:
                    lines.append([])
                    width = 0
                lines[-1].append(segment)
                width += len(segment.text)
    return lines
