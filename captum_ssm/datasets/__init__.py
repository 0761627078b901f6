"""Explain a whole data set: a file of rows, or the rows of any library, on one machine or many.

:class:`Explain` turns columns into these columns and those of the explanation; :func:`explain_file` reads a file,
explains its rows by an engine, and writes them in parts.

* A row: :mod:`~captum_ssm.datasets.texts` and :mod:`~captum_ssm.datasets.examples` make it ready, and
  :mod:`~captum_ssm.datasets.question` says which outcome is explained, by the words of
  :mod:`~captum_ssm.datasets.outcomes`.
* A batch: :mod:`~captum_ssm.datasets.batches` cuts, :mod:`~captum_ssm.datasets.padding` finds the side of the padding,
  :mod:`~captum_ssm.datasets.forward` runs the model, :mod:`~captum_ssm.datasets.methods` a method on it, and
  :mod:`~captum_ssm.datasets.ready` is all of them around a model of :mod:`~captum_ssm.datasets.loading`.
* A file: :mod:`~captum_ssm.datasets.reading` has its blocks, :mod:`~captum_ssm.datasets.engines` explains them here and
  :mod:`~captum_ssm.datasets.ray_engine` on a cluster, :mod:`~captum_ssm.datasets.tables` gives them their types,
  :mod:`~captum_ssm.datasets.parts` writes them, and :mod:`~captum_ssm.datasets.report` says what became of them.
* An output: :func:`summary` sums it up, and :func:`measure` puts its scores to the metrics.
"""

from captum_ssm.datasets.explain import Explain
from captum_ssm.datasets.ray_engine import Ray
from captum_ssm.datasets.reading import Source
from captum_ssm.datasets.report import Report
from captum_ssm.datasets.run import explain_file
from captum_ssm.datasets.stored import Stored, measure, stored
from captum_ssm.datasets.summary import Summary, summary

__all__ = ["Explain", "Ray", "Report", "Source", "Stored", "Summary", "explain_file", "measure", "stored", "summary"]
