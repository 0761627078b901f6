"""A text whose pieces are coloured by their scores: in the terminal, as an HTML page, as a figure."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from itertools import groupby
from typing import TYPE_CHECKING

from matplotlib import colormaps
from matplotlib.colors import to_hex
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from torch import Tensor

if TYPE_CHECKING:
    from rich.text import Text

_COLORS = colormaps["RdBu"]
_COLUMNS, _NOTE_COLUMNS = 78, 120  # characters of a line of text, and of the smaller notes below it


@dataclass(frozen=True)
class Piece:
    """A piece of a text.

    Args:
        text: Its characters.
        score: Its score, or None for a piece without a score, such as white space.
    """

    text: str
    score: float | None = None


@dataclass(frozen=True)
class Passage:
    """A text cut into pieces, with a title and facts.

    Args:
        pieces: The pieces in reading order; joined they are the text.
        title: Title above the text, such as the prediction.
        facts: Facts that a reader needs beside the text, by name.
    """

    pieces: tuple[Piece, ...]
    title: str = ""
    facts: Mapping[str, str] | None = None

    @classmethod
    def from_offsets(
        cls,
        text: str,
        offsets: Sequence[tuple[int, int]],
        scores: Tensor,
        title: str = "",
        facts: Mapping[str, str] | None = None,
    ) -> Passage:
        """Cut a text where its tokens begin and end; characters between tokens get no score.

        Args:
            text: The original text.
            offsets: First character and end of each token, (0, 0) for tokens that the tokenizer added.
            scores: (L,) one score for each token.
            title: Title above the text.
            facts: Facts that a reader needs beside the text, by name.

        Returns:
            The text in pieces.

        Raises:
            ValueError: If there are not as many scores as tokens.
        """
        if len(offsets) != len(scores):
            raise ValueError(f"There are {len(offsets)} tokens but {len(scores)} scores.")
        pieces, position = [], 0
        for (start, end), score in zip(offsets, scores.tolist()):
            if end <= position:  # added by the tokenizer, or a further token of a character already shown
                continue
            start = max(start, position)
            token = text[start:end]
            blank = len(token) - len(token.lstrip())
            pieces += [Piece(text[position : start + blank]), Piece(token[blank:], score)]
            position = end
        pieces.append(Piece(text[position:]))
        return cls(tuple(piece for piece in pieces if piece.text), title, facts)

    def _repr_html_(self) -> str:
        """Show the passage in a notebook."""
        return text_html(self, page=False)

    @property
    def scale(self) -> float:
        """The largest absolute score, which gets the full colour."""
        return max((abs(piece.score) for piece in self.pieces if piece.score is not None), default=0.0)

    def color(self, piece: Piece) -> tuple[str, str]:
        """Return background and text colour (hexadecimal): blue speaks for the target, red against it."""
        share = 0.0 if piece.score is None or self.scale == 0 else piece.score / self.scale
        red, green, blue, _ = _COLORS(0.5 + 0.45 * share)
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in (red, green, blue)]
        luminance = 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
        dark = 1.05 / (luminance + 0.05) > (luminance + 0.05) / 0.05  # white has the larger contrast (WCAG 2)
        return to_hex((red, green, blue)), "#ffffff" if dark else "#000000"

    @property
    def signed(self) -> bool:
        """Whether any score is negative."""
        return any(piece.score is not None and piece.score < 0 for piece in self.pieces)

    @property
    def legend(self) -> tuple[Piece, ...]:
        """The scale of the colours, as pieces."""
        top = Piece(f" +{self.scale:.2g} ", self.scale)
        zero = Piece(" 0 ", 0.0)
        return (Piece(f" -{self.scale:.2g} ", -self.scale), zero, top) if self.signed else (zero, top)


def text_terminal(passage: Passage) -> Text:
    """Return the passage for ``rich.print``, each piece on a background in the colour of its score."""
    from rich.text import Text

    text = Text()
    for piece in passage.pieces:
        background, color = passage.color(piece)
        text.append(piece.text, style=f"{color} on {background}" if piece.score is not None else "")
    return text


def text_html(passage: Passage, *, page: bool = True) -> str:
    """Return the passage as HTML; hovering over a piece shows its score. All text is escaped.

    Args:
        passage: The coloured text.
        page: Return a complete page, for a file. Else one ``<div>`` with its style, for a page or a notebook; the rules
            of the style apply to this ``<div>`` alone.

    Returns:
        HTML that refers to no other file.
    """
    facts = "".join(f"<dt>{escape(k)}</dt><dd>{escape(v)}</dd>" for k, v in (passage.facts or {}).items())
    heading = "h1" if page else "p"  # the heading of a page, but a paragraph in another page
    fragment = f"""<div class="captum-ssm">
<style>
.captum-ssm {{ font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #ffffff; padding: 1rem; }}
.captum-ssm .title {{ font-size: 1.3rem; font-weight: bold; margin: 0.5em 0; }}
.captum-ssm .text {{ font-size: 1.2rem; line-height: 2.1; white-space: pre-wrap; overflow-wrap: anywhere; }}
.captum-ssm .text span, .captum-ssm .legend span {{ padding: 0.15em 0.2em; border-radius: 0.25em; }}
.captum-ssm .legend {{ font-size: 0.85rem; }}
.captum-ssm dl {{ display: grid; grid-template-columns: max-content 1fr; gap: 0.2rem 1rem; font-size: 0.9rem; }}
.captum-ssm dt {{ color: #5a5a5a; }}
.captum-ssm dd {{ margin: 0; overflow-wrap: anywhere; }}
</style>
<{heading} class="title">{escape(passage.title)}</{heading}>
<p class="text">{"".join(_span(passage, piece) for piece in passage.pieces)}</p>
<p class="legend">{"".join(_span(passage, piece) for piece in passage.legend)}</p>
<dl>{facts}</dl>
</div>
"""
    if not page:
        return fragment
    return f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(passage.title or "Explanation")}</title>
</head>
<body style="max-width: 48rem; margin: 2rem auto">
{fragment}</body>
</html>
"""


def _span(passage: Passage, piece: Piece) -> str:
    if piece.score is None:
        return escape(piece.text)
    background, color = passage.color(piece)
    return f'<span style="background:{background};color:{color}" title="{piece.score:+.4g}">{escape(piece.text)}</span>'


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
