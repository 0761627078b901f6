"""The result of the command: a coloured text, and the facts about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import Figure

from captum_ssm.visualization import Passage, Views, text_html, views_html


@dataclass(frozen=True)
class Explanation:
    """An explained text, ready to be shown.

    Attributes:
        passage: The text coloured by its scores, with a title and the facts to print.
        draw: Draw the picture.
        details: Further lines to print below the text.
        views: Several views of the text, for a page: of each written token, or of each layer. None if there is one.
    """

    passage: Passage
    draw: Callable[[], Figure]
    details: tuple[str, ...] = ()
    views: Views | None = None

    def html(self, *, page: bool = True) -> str:
        """Return the explanation as HTML: a complete page, or one ``<div>`` for a page or a notebook."""
        return text_html(self.passage, page=page) if self.views is None else views_html(self.views, page=page)

    def _repr_html_(self) -> str:
        """Show the explanation in a notebook."""
        return self.html(page=False)
