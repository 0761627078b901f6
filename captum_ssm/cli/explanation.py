"""The result of the command: a coloured text, and the facts about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from matplotlib.figure import Figure

from captum_ssm.visualization import Passage


@dataclass(frozen=True)
class Explanation:
    """An explained text, ready to be shown.

    Attributes:
        passage: The text coloured by its scores, with a title and the facts to print.
        draw: Draw the picture.
        details: Further lines to print below the text.
    """

    passage: Passage
    draw: Callable[[], Figure]
    details: tuple[str, ...] = ()
