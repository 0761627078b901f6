"""The columns of a part as a table of Arrow, each with one type in all parts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from captum_ssm.datasets.columns import Columns, input_name
from captum_ssm.datasets.packages import needed
from captum_ssm.errors import InvalidInputError

ROW = "row"
"""The column with the number of a row in the file: the order of the rows."""

_TYPES = {
    "ids": "list<int32>", "tokens": "list<string>", "starts": "list<int32>", "ends": "list<int32>",
    "shapes": "string", "scores": "list<float32>", "target": "int64", "target_name": "string", "contrast": "int64",
    "contrast_name": "string", "prediction": "int64", "prediction_name": "string", "probability": "float64",
    "value": "float64", "reference_value": "float64", "completeness": "float64", "fidelity": "float64",
    "layers": "list<float32>", "error": "string",
}  # fmt: skip
"""Types of the columns of an explanation by name."""


def table_of(start: int, rows: Sequence[Mapping[str, Any]], kept: Mapping[str, Any], explanation: Columns) -> Any:
    """Return the table of a part.

    Args:
        start: The number of its first row.
        rows: The input columns of each row by name.
        kept: The input columns to keep by name, with their types of Arrow; None: a text, others as JSON.
        explanation: The columns of the explanation.

    Returns:
        A ``pyarrow.Table``: the number of each row, the input columns, those of the explanation.

    Raises:
        InvalidInputError: If two columns would have one name.
    """
    pyarrow = needed("pyarrow")
    names = [ROW, *explanation]
    arrays = {ROW: pyarrow.array(range(start, start + len(rows)), pyarrow.int64())}
    for name, kind in kept.items():
        values = [row.get(name) for row in rows]
        new = input_name(name, names)
        if new in arrays or (new != name and new in kept):
            raise InvalidInputError(f"the column {name!r} would be kept as {new!r}, which is there too; rename one.")
        arrays[new] = pyarrow.array(
            values if kind is not None else [_text(v) for v in values], kind or pyarrow.string()
        )
    for name, column in explanation.items():
        arrays[name] = pyarrow.array(column, _type(pyarrow, _TYPES[name]))
    return pyarrow.table(arrays)


def to_bytes(table: Any) -> bytes:
    """Return a table as bytes, in the format of Arrow's streams."""
    pyarrow = needed("pyarrow")
    sink = pyarrow.BufferOutputStream()
    with pyarrow.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table)
    return bytes(sink.getvalue())


def from_bytes(data: bytes) -> Any:
    """Return the table that :func:`to_bytes` wrote."""
    return needed("pyarrow").ipc.open_stream(data).read_all()


def _type(pyarrow: Any, name: str) -> Any:
    """Return a type of Arrow by its name."""
    if name.startswith("list<"):
        return pyarrow.list_(_type(pyarrow, name[5:-1]))
    return getattr(pyarrow, name)()


def _text(value: Any) -> str | None:
    """Return a value as text: a text itself, without parts of characters that UTF-8 does not have; others as JSON."""
    if value is None:
        return None
    text = value if isinstance(value, str) else json.dumps(value, default=str)
    return text.encode("utf-8", "replace").decode("utf-8")
