"""Settings of the documentation site; ``make docs`` builds it (scripts/build_docs.py)."""

from __future__ import annotations

import sys
from typing import Any

from sphinx.application import Sphinx
from sphinx.pycode import ModuleAnalyzer
from sphinx.util import logging

import captum_ssm

project = "captum_ssm"
author = "the captum_ssm authors"
copyright = f"2026, {author}"
release = captum_ssm.__version__
version = release

extensions = [
    "sphinx.ext.autodoc",
    "sphinx.ext.napoleon",
    "sphinx.ext.viewcode",
    "sphinx_copybutton",
    "myst_nb",
]
html_theme = "furo"
html_title = f"captum_ssm {release}"
html_static_path = ["_static"]
html_css_files = ["site.css"]
source_suffix = {".md": "myst-nb", ".ipynb": "myst-nb"}
exclude_patterns = ["conf.py"]

nb_output_stderr = "remove"  # warnings about the machine that built the site
nb_execution_mode = "off"  # scripts/build_docs.py runs them, in the interpreter that builds the site
myst_heading_anchors = 3
myst_enable_extensions = ["attrs_inline", "dollarmath"]

autodoc_typehints = "signature"
autodoc_typehints_format = "short"
autodoc_inherit_docstrings = False
autodoc_member_order = "bysource"
napoleon_use_ivar = True
add_module_names = False
python_display_short_literal_types = True

nitpicky = True
nitpick_ignore_regex = [
    (r"py:.*", r"(?!captum_ssm).*"),  # other packages, and type variables
    (r"py:.*", r"captum_ssm\.(_captum|attr|cli|layers|matrices|network|pages|relevance)\..*"),  # internal: plain code
    (r"py:.*", r"captum_ssm\.(datasets|metrics|operators|visualization)\.\w+\.\w+"),  # a public name by its module
    (r"py:mod", r"captum_ssm\.datasets\.\w+"),
    (r"py:.*", r"captum_ssm\.errors\._\w+"),
]

_LOG = logging.getLogger(__name__)


def _refuse_missing(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Warn, which is an error here, of anything documented that has no docstring.

    A constant that a package takes from one of its modules has the docstring below it there.
    """
    package, _, constant = name.rpartition(".")
    if what == "data" and not lines:
        analyzers = [ModuleAnalyzer.for_module(module) for module in sys.modules if module.startswith(f"{package}.")]
        found = (analyzer.find_attr_docs().get(("", constant)) for analyzer in analyzers)
        lines[:] = next(filter(None, found), [])
    if not any(line.strip() for line in lines):
        _LOG.warning("%s %s has no docstring", what, name)


def setup(app: Sphinx) -> None:
    """Connect the check of docstrings, before others fill them in."""
    app.connect("autodoc-process-docstring", _refuse_missing, priority=1)
