"""Stored scores for the metrics: how good they are, without explaining again."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from captum_ssm.datasets.parts import Output
from captum_ssm.datasets.tables import ROW
from captum_ssm.errors import InvalidInputError
from captum_ssm.metrics import Curve


@dataclass(frozen=True)
class Stored:
    """Some explained texts as the functions of :mod:`captum_ssm.metrics` take them.

    Attributes:
        rows: The number of each in the file.
        inputs: Token ids (B, L), padded on the right.
        scores: The stored scores (B, L), 0 at padding.
        mask: 1 at tokens and 0 at padding, (B, L): the additional forward argument.
        target: The explained outcome of each, (B,).
        contrast: The outcome that it was explained against, (B,), or None.
    """

    rows: list[int]
    inputs: Tensor
    scores: Tensor
    mask: Tensor
    target: Tensor
    contrast: Tensor | None


def stored(folder: str | Path, *, batch_rows: int = 64) -> Iterator[Stored]:
    """Read the explained texts of an output.

    Args:
        folder: The folder of the output.
        batch_rows: Rows of a batch.

    Yields:
        The rows that did not fail, in order.

    Raises:
        InvalidInputError: If the output is damaged, or its rows are no texts.
    """
    for table in Output(Path(folder)).tables([ROW, "ids", "scores", "target", "contrast", "error"]):
        if "ids" not in table.schema.names:
            raise InvalidInputError(f"the rows of {str(folder)!r} are no texts; measure images with their own inputs.")
        good = [row for row in table.to_pylist() if not row["error"]]
        for start in range(0, len(good), batch_rows):
            yield _batch(good[start : start + batch_rows])


def measure(
    metric: Callable[..., Any], forward_func: Any, folder: str | Path, *, batch_rows: int = 64, **options: Any
) -> Any:
    """Measure the stored scores of a language model's texts.

    Args:
        metric: A function of :mod:`captum_ssm.metrics`, such as :func:`~captum_ssm.metrics.morf`.
        forward_func: The model.
        folder: The folder of the output.
        batch_rows: Rows of a batch.
        **options: Arguments of the metric, such as ``baselines``; targets and contrasts are those of the rows.

    Returns:
        The metric's result for all rows that did not fail, in order: one curve, or one figure for each.

    Raises:
        InvalidInputError: If there are no such rows, or an argument of the metric is wrong.
    """
    found: list[Any] = []
    for batch in stored(folder, batch_rows=batch_rows):
        question = {"target": batch.target} | ({} if batch.contrast is None else {"contrast": batch.contrast})
        found.append(
            metric(forward_func, batch.inputs, batch.scores, additional_forward_args=batch.mask, **question, **options)
        )
    if not found:
        raise InvalidInputError(f"{str(folder)!r} has no row that was explained.")
    return Curve.join(found) if isinstance(found[0], Curve) else torch.cat(found)


def _batch(rows: list[dict[str, Any]]) -> Stored:
    """Return rows as one batch."""
    ids, scores = ([torch.tensor(row[name]) for row in rows] for name in ("ids", "scores"))
    mask = [torch.ones(len(each), dtype=torch.long) for each in ids]
    padded = (torch.nn.utils.rnn.pad_sequence(each, batch_first=True) for each in (ids, scores, mask))
    contrasts = torch.tensor([row["contrast"] for row in rows])
    target = torch.tensor([row["target"] for row in rows])
    inputs, values, real = padded
    return Stored(
        [row[ROW] for row in rows],
        inputs.long(),
        values,
        real,
        target,
        contrasts if bool((contrasts >= 0).all()) else None,
    )
