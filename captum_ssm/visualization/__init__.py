"""Pictures of explanations: coloured text in the terminal, as HTML and as a figure."""

from captum_ssm.visualization.text import Passage, Piece, text_figure, text_html, text_terminal

__all__ = ["Passage", "Piece", "text_figure", "text_html", "text_terminal"]
