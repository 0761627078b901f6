"""Columns of rows, in whichever form a library hands them over."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

from captum_ssm.errors import InvalidInputError

Columns = dict[str, Any]
"""Columns by name: lists, or arrays, of one length."""


def columns_of(table: Any) -> Columns:
    """Return columns by name.

    Args:
        table: A mapping from names to lists, arrays or tensors, or a list of rows, each a mapping.

    Returns:
        The columns, of one length.

    Raises:
        InvalidInputError: If it is anything else.
    """
    if isinstance(table, Mapping):
        columns = dict(table)
    elif isinstance(table, Sequence) and all(isinstance(row, Mapping) for row in table):
        names = dict.fromkeys(name for row in table for name in row)
        columns = {name: [row.get(name) for row in table] for name in names}
    else:
        raise InvalidInputError(
            f"rows are columns by name, or a list of rows, each a dictionary, not a {type(table).__name__}."
        )
    lengths = {name: len(column) for name, column in columns.items()}
    if len(set(lengths.values())) > 1:
        raise InvalidInputError(f"the columns have different lengths: {lengths}.")
    return columns


def rows_of(columns: Columns, needed: Sequence[str]) -> list[dict[str, Any]]:
    """Return each row as its columns by name.

    Args:
        columns: The columns, of one length.
        needed: Names of columns that have to be there.

    Returns:
        The rows; numbers are Python's own.

    Raises:
        InvalidInputError: If a column is missing.
    """
    refuse_missing(needed, list(columns))
    lists = {name: _values(column) for name, column in columns.items()}
    count = len(next(iter(lists.values()), []))
    return [{name: values[k] for name, values in lists.items()} for k in range(count)]


def refuse_missing(needed: Sequence[str], names: Sequence[str]) -> None:
    """Raise if a column is missing.

    Args:
        needed: The columns that have to be there.
        names: Those that are.

    Raises:
        InvalidInputError: With the names that there are.
    """
    missing = [name for name in needed if name not in names]
    if missing:
        there = ", ".join(map(repr, names)) or "none at all"
        raise InvalidInputError(f"there is no column {missing[0]!r}; the rows have {there}.")


def with_input(columns: Columns, explanation: Columns) -> Columns:
    """Return the columns of the input and of the explanation together.

    Args:
        columns: Those of the input.
        explanation: Those of the explanation, whose names win: a column of the input keeps its values as ``input_`` and
            its name.

    Returns:
        All columns.

    Raises:
        InvalidInputError: If that name is taken, too.
    """
    kept: Columns = {}
    for name, column in columns.items():
        new = input_name(name, list(explanation))
        if new in kept or (new != name and new in columns):
            raise InvalidInputError(f"the column {name!r} would be kept as {new!r}, which is there too; rename one.")
        kept[new] = column
    return {**kept, **explanation}


def input_name(name: str, explanation: Sequence[str]) -> str:
    """Return the name under which a column of the input is kept beside those of the explanation."""
    return f"input_{name}" if name in explanation else name


def _values(column: Any) -> list[Any]:
    """Return the values of a column; a tensor of several dimensions row by row."""
    if isinstance(column, np.ndarray):
        return column.tolist() if column.dtype != object and column.ndim == 1 else list(column)
    if isinstance(column, Tensor):
        return column.tolist() if column.dim() == 1 else list(column)
    return list(column)
