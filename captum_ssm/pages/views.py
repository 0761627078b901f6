"""Several views of one text: where each written token comes from, or what each layer reads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from html import escape

import torch
from torch import Tensor

from captum_ssm.errors import InvalidInputError
from captum_ssm.pages import document
from captum_ssm.pages.document import asset, description, fragment, number
from captum_ssm.pages.palette import level
from captum_ssm.pages.passage import Passage, coloured
from captum_ssm.pages.token_texts import label

_CELLS = 10_000
"""Scores of the largest table that is open at first: to lay a larger one out takes a browser seconds."""


@dataclass(frozen=True)
class Views:
    """A text with several views of its tokens' scores; a notebook shows it.

    Args:
        total: The first view, with the text, the title and the facts. Each of its pieces with a score is a token.
        name: The name of the first view, such as ``"all layers"``.
        names: (M,) the names of the others.
        scores: (M, L) their scores, one for each token.
        first: Number of the token that the first of the others explains, if each explains one token that the model
            wrote, one after the other; it shows where that token comes from, and has no scores from that token on. None
            if they belong to no token.

    Raises:
        InvalidInputError: If shapes or numbers do not fit, or a score is NaN or infinite.
    """

    total: Passage
    name: str
    names: Sequence[str]
    scores: Tensor = field(repr=False)
    first: int | None = None

    def __post_init__(self) -> None:
        M, L = len(self.names), len(self.total.tokens)
        if self.scores.shape != (M, L):
            raise InvalidInputError(
                f"There are {M} names of views and {L} tokens, but scores of shape {tuple(self.scores.shape)}. Pass "
                "one row for each name, with one score for each token."
            )
        if self.first is not None and not 0 <= self.first <= L - M:
            raise InvalidInputError(f"{M} views from token {self.first} on do not fit {L} tokens.")
        if not bool(self.scores.isfinite().all()):
            raise InvalidInputError("The scores have NaN or infinite entries. Check the explanation that they are of.")

    @classmethod
    def of_answer(
        cls,
        texts: Sequence[str],
        names: Sequence[str],
        scores: Tensor,
        title: str = "",
        facts: Mapping[str, str] | None = None,
    ) -> Views:
        """Return one view for each token that a model wrote: where it comes from.

        Args:
            texts: (L,) the characters that each token of prompt and answer adds, see :func:`token_texts`.
            names: (L,) the tokens by name, for those that add none.
            scores: (M, L - 1) row i has the scores for the (L - M + i)-th token, such as ``token_attr`` of
                :class:`~captum_ssm.LLMImplicitAttention`'s result.
            title: Title above the text.
            facts: Facts that a reader needs beside the text, by name.

        Returns:
            The views, the first of which is the sum.

        Raises:
            InvalidInputError: If shapes or numbers do not fit, or a score is NaN or infinite.
        """
        M, L = len(scores), len(texts)
        if M < 1 or scores.shape[1:] != (L - 1,) or M >= L:
            raise InvalidInputError(
                f"There are {L} tokens, but scores of shape {tuple(scores.shape)}. Pass one row for each written token "
                "with one score for each token but the last, which explains nothing."
            )
        scores = torch.nn.functional.pad(scores.detach().to("cpu").double(), (0, 1))
        total = Passage.from_tokens(texts, names, scores.sum(0), title, facts)
        written = [label(piece.text) for piece in total.tokens[L - M :]]
        return cls(total, "all written tokens", written, scores, L - M)

    def _repr_html_(self) -> str:
        """Show the views in a notebook."""
        return views_html(self, page=False)


def views_html(views: Views, *, page: bool = True) -> str:
    """Return a text whose views a reader chooses with mouse, finger or keyboard, and all scores as a table.

    A token that was written shows where it comes from when it is pointed at or reached by Tab or the arrows; a click,
    Enter or the space bar keeps it; Escape shows the sum again. Views of no token have buttons. The strongest scores
    are spelled out below the text, where a screen reader announces them. Without JavaScript the page shows the first
    view and the table. All text is escaped.

    Args:
        views: The views.
        page: Return a complete page, for a file. Else one ``<div>`` with its style and script, as for a notebook.

    Returns:
        HTML that refers to no other file, and holds no ``id``. Its size grows with the number of scores.
    """
    total = views.total
    heading = "h1" if page else "p"
    part = fragment(
        f'<{heading} class="title">{escape(total.title)}</{heading}>\n{coloured(total)}'
        f'<p class="status" role="status" aria-live="polite"></p>\n{_table(views)}{description(total.facts)}\n'
        f"<script>\n{asset('views.js')}</script>\n",
        asset("views.css"),
        "views",
    )
    return document.page(total.title, part) if page else part


def _table(views: Views) -> str:
    """Return all scores as a table: a row for each view, a column for each token."""
    tokens = views.total.tokens
    columns = "".join(f'<th scope="col"><bdi>{escape(label(token.text))}</bdi></th>' for token in tokens)
    rows = [_row(views.name, [token.score or 0.0 for token in tokens])]
    for k, (name, scores) in enumerate(zip(views.names, views.scores.tolist())):
        token = None if views.first is None else views.first + k
        rows.append(_row(name, scores[:token], len(tokens), token))
    opened = " open" if len(tokens) * len(rows) <= _CELLS else ""
    return (
        f"<details{opened}><summary>All scores; the colours of each row end at its largest one</summary>\n"
        '<div class="table" tabindex="0" role="region" aria-label="All scores, a column for each token">'
        f"<table>\n<thead><tr><td></td>{columns}</tr></thead>\n<tbody>\n{''.join(rows)}</tbody>\n</table>"
        "</div></details>\n"
    )


def _row(name: str, scores: Sequence[float], length: int = 0, token: int | None = None) -> str:
    """Return one view as a row of the table, whose colours end at its own largest score.

    Args:
        name: The name of the view.
        scores: Its scores.
        length: The number of columns; those without a score are empty.
        token: Number of the token that the view belongs to, if any.
    """
    scale = max(map(abs, scores), default=0.0) or 1.0
    cells = "".join(f'<td class="{level(score / scale)}">{number(score)}</td>' for score in scores)
    cells += "<td></td>" * (length - len(scores))
    owner = "" if token is None else f' data-token="{token}"'
    return f'<tr{owner}><th scope="row"><bdi>{escape(name)}</bdi></th>{cells}</tr>\n'
