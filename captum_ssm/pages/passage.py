"""A text in pieces, each of which may have a score."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from torch import Tensor

from captum_ssm.pages import document
from captum_ssm.pages.document import description, fragment, number
from captum_ssm.pages.palette import level, on_light
from captum_ssm.pages.token_texts import label


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
    """A text cut into pieces, with a title and facts; a notebook shows it.

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

    @classmethod
    def from_tokens(
        cls,
        texts: Sequence[str],
        names: Sequence[str],
        scores: Tensor,
        title: str = "",
        facts: Mapping[str, str] | None = None,
    ) -> Passage:
        """Join a text from its tokens, each of which is a piece with a score.

        Args:
            texts: (L,) the characters that each token adds to the text, see
                :func:`~captum_ssm.visualization.token_texts`.
            names: (L,) the tokens by name. A token without a character that can be seen shows a name: one of white
                space its escape before the white space, a part of an emoji or one that the tokenizer added its own.
            scores: (L,) one score for each token.
            title: Title above the text.
            facts: Facts that a reader needs beside the text, by name.

        Returns:
            The text in pieces, L of which have a score.

        Raises:
            ValueError: If there are not as many texts, names and scores.
        """
        if not len(texts) == len(names) == len(scores):
            raise ValueError(f"There are {len(texts)} texts and {len(names)} names, but {len(scores)} scores.")
        pieces = []
        for text, name, score in zip(texts, names, scores.tolist()):
            seen = text.lstrip()
            blank = Piece(text[: len(text) - len(seen)])
            pieces += [blank, Piece(seen, score)] if seen else [Piece(label(text or name) or "␣", score), blank]
        return cls(tuple(piece for piece in pieces if piece.text or piece.score is not None), title, facts)

    @property
    def tokens(self) -> tuple[Piece, ...]:
        """The pieces that have a score."""
        return tuple(piece for piece in self.pieces if piece.score is not None)

    @property
    def scale(self) -> float:
        """The largest absolute score, which gets the full colour."""
        return max((abs(piece.score) for piece in self.pieces if piece.score is not None), default=0.0)

    def share(self, piece: Piece) -> float:
        """Return the score of a piece divided by the largest absolute one; 0 for one without a score."""
        return 0.0 if piece.score is None or self.scale == 0 else piece.score / self.scale

    def color(self, piece: Piece) -> tuple[str, str]:
        """Return background and text colour (hexadecimal): blue speaks for the target, red against it."""
        return on_light(self.share(piece))

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

    def _repr_html_(self) -> str:
        """Show the passage in a notebook."""
        return text_html(self, page=False)


def text_html(passage: Passage, *, page: bool = True) -> str:
    """Return the passage as HTML; hovering over a piece shows its score. All text is escaped.

    Args:
        passage: The coloured text.
        page: Return a complete page, for a file. Else one ``<div>`` with its style, for a page or a notebook; the rules
            of the style apply to this ``<div>`` and those like it alone.

    Returns:
        HTML that refers to no other file, light or dark as the reader's system or notebook is.
    """
    heading = "h1" if page else "p"  # the heading of a page, but a paragraph in another page
    part = fragment(
        f'<{heading} class="title">{escape(passage.title)}</{heading}>\n{coloured(passage)}'
        f"{description(passage.facts)}\n"
    )
    return document.page(passage.title, part) if page else part


def coloured(passage: Passage) -> str:
    """Return the text and the legend of a passage as two paragraphs of HTML."""

    def spans(pieces: Sequence[Piece]) -> str:
        return "".join(map(span, pieces))

    def span(piece: Piece) -> str:
        if piece.score is None:
            return escape(piece.text)
        colour = level(passage.share(piece))
        return f'<span class="{colour}" title="{number(piece.score)}">{escape(piece.text)}</span>'

    return f'<p class="text" dir="auto">{spans(passage.pieces)}</p>\n<p class="legend">{spans(passage.legend)}</p>\n'
