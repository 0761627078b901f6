"""Pictures of explanations: coloured text and pages, heat maps between tokens, the flow of relevance, and curves.

Figures are objects of matplotlib made without pyplot: no function opens a window or changes a setting (in a notebook
that does not use pyplot, ``%matplotlib inline`` lets it show them). Characters that the font lacks, such as Chinese
ones in the default font, become boxes; name a font that has them in ``matplotlib.rcParams["font.family"]``.
"""

from captum_ssm.pages import Passage, Piece, Views, text_html, token_texts, views_html
from captum_ssm.visualization.curves import curves_figure
from captum_ssm.visualization.flow import flow_figure, rollout_steps
from captum_ssm.visualization.matrices import layers_figure, token_heatmap
from captum_ssm.visualization.text import text_figure, text_terminal

__all__ = [
    "Passage",
    "Piece",
    "Views",
    "curves_figure",
    "flow_figure",
    "layers_figure",
    "rollout_steps",
    "text_figure",
    "text_html",
    "text_terminal",
    "token_heatmap",
    "token_texts",
    "views_html",
]
