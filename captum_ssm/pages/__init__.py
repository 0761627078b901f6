"""Explanations as HTML: a coloured text, and a text with several views of its scores, for a file or a notebook.

Pages refer to nothing outside them, and hold no ``id``, so that many of them may stand in one document. Without
JavaScript, as in a notebook that is not trusted, all scores are there as a table.

* ``passage``: a text in pieces with scores, and its HTML;
* ``views``: several views of one text, such as one for each written token, or for each layer; its script is
  ``views.js``;
* ``token_texts``: the characters that each token adds to a text;
* ``palette``: the colours of scores, light and dark;
* ``document``: the style of all, and the page around them.
"""

from captum_ssm.pages.passage import Passage, Piece, text_html
from captum_ssm.pages.token_texts import token_texts
from captum_ssm.pages.views import Views, views_html

__all__ = ["Passage", "Piece", "Views", "text_html", "token_texts", "views_html"]
