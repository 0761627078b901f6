"""Pictures of explanations: coloured text, heat maps between tokens, the flow of relevance, and curves of metrics.

Figures are matplotlib's own, made without pyplot: nothing opens a window or changes a setting (in a notebook that uses
no pyplot, ``%matplotlib inline`` lets it show them). Characters that its font lacks, such as Chinese ones in the
default font, become boxes; name one that has them in ``matplotlib.rcParams["font.family"]``.
"""

from captum_ssm.visualization.curves import curves_figure
from captum_ssm.visualization.flow import flow_figure, rollout_steps
from captum_ssm.visualization.matrices import layers_figure, token_heatmap
from captum_ssm.visualization.text import Passage, Piece, text_figure, text_html, text_terminal

__all__ = [
    "Passage",
    "Piece",
    "curves_figure",
    "flow_figure",
    "layers_figure",
    "rollout_steps",
    "text_figure",
    "text_html",
    "text_terminal",
    "token_heatmap",
]
