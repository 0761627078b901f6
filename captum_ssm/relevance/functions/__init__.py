"""The functions that relevance can pass: one table, one row for each.

To add a function, add its row and nothing else:

* a function of a known kind: a line in :mod:`~captum_ssm.relevance.functions.primitives`, for instance
  ``Function("erf", "elementwise")``; the columns of a row are explained at :class:`Function`;
* a function that can be written in others: its definition below the line ``@composed("its_name")``, which is the row,
  in the module of its subject or in :mod:`~captum_ssm.relevance.functions.composed`;
* a function that has no rule: its name in :mod:`~captum_ssm.relevance.functions.refused`, with the reason;
* a fused kernel or a module that torch's functions cannot show: its definition in
  :mod:`~captum_ssm.relevance.functions.external`.

The name of a row is the function's ``__name__`` without underscores at its ends. An elementwise function may also have
the closed form of its difference quotient, a definition in :mod:`~captum_ssm.relevance.slopes`. The tests of the table
take each row to the function that it names, and each slope to the quotient.
"""

from captum_ssm.relevance.functions import (  # noqa: F401  (they declare the rows)
    class_losses,
    complex_numbers,
    composed,
    convolutions,
    losses,
    normalization,
    order,
    pooling,
    powers,
    primitives,
    recurrent,
    refused,
    statistics,
    sums_of_products,
)
from captum_ssm.relevance.functions.external import EXTERNAL_CODE
from captum_ssm.relevance.functions.registration import register_rule, unregister_rule
from captum_ssm.relevance.functions.table import FUNCTIONS, Callee, Function, Kind, Origin

__all__ = ["EXTERNAL_CODE", "FUNCTIONS", "Callee", "Function", "Kind", "Origin", "register_rule", "unregister_rule"]
