"""Tokens along the axis of a figure, and numbers between them."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np
from matplotlib.axis import Axis, XAxis
from numpy.typing import NDArray
from torch import Tensor

from captum_ssm.errors import InvalidInputError

Matrix = Tensor | NDArray[Any]
"""Numbers of torch, of any type and device, or of numpy."""

Array = NDArray[np.float64]

_CHARACTERS = 16  # of a token that a label shows
_SIZE, _INCHES = 7, 0.12  # of a label's font in points, and what it needs along the axis


def as_array(numbers: Matrix) -> Array:
    """Return the numbers, detached, on the CPU and in float64."""
    if isinstance(numbers, Tensor):
        numbers = numbers.detach().to("cpu").double().numpy()
    return np.asarray(numbers, dtype=np.float64)


def as_square_matrices(matrices: Sequence[Matrix] | Matrix) -> Array:
    """Return one matrix for each layer, (layers, L, L).

    Raises:
        InvalidInputError: If there is no layer, or a matrix is not square or of another size than the first.
    """
    layers = [as_array(matrix) for matrix in matrices]
    shapes = sorted({matrix.shape for matrix in layers})
    if len(shapes) != 1 or len(shapes[0]) != 2 or shapes[0][0] != shapes[0][1] or not shapes[0][0]:
        raise InvalidInputError(
            f"There must be one matrix (L, L) for each layer, but there are {len(layers)} of shape "
            f"{', '.join(map(str, shapes)) or '()'}. Of a batch take one example, such as `matrix[0]`; of the matrices "
            "of all channels a mean over channels, or one channel; a single matrix goes into a list."
        )
    return np.stack(layers)


def token_labels(tokens: Sequence[str], count: int, what: str) -> list[str]:
    """Return a short printable label for each token.

    Line breaks and other characters that would not be seen are written as Python writes them, a token of spaces is made
    visible, and what goes beyond 16 characters is left out.

    Args:
        tokens: As the tokenizer gives them.
        count: How many there must be.
        what: What they name, for the message.

    Raises:
        InvalidInputError: If there are more or fewer of them, or one is not text.
    """
    if isinstance(tokens, str) or not all(isinstance(token, str) for token in tokens):
        raise InvalidInputError(
            "Tokens must be a list of texts; of token ids make them by tokenizer.convert_ids_to_tokens(ids)."
        )
    if len(tokens) != count:
        raise InvalidInputError(f"There are {len(tokens)} tokens but {count} {what}. Pass one token for each of them.")
    return [_label(token) for token in tokens]


def _label(token: str) -> str:
    if token.strip(" ") == "":
        token = "␣" * len(token)
    visible = "".join(c if c.isprintable() else repr(c)[1:-1] for c in token)
    return visible if len(visible) <= _CHARACTERS else visible[: _CHARACTERS - 1] + "…"


def label_axis(axis: Axis, labels: Sequence[str], inches: float) -> str:
    """Write labels along an axis of this length: all, or every k-th if they would overlap.

    Returns:
        What to add to the axis' name: nothing, or that labels are left out.
    """
    step = ceil(len(labels) * _INCHES / inches)
    rotation = 90 if isinstance(axis, XAxis) else 0
    axis.set_ticks(range(0, len(labels), step), labels[::step], fontsize=_SIZE, rotation=rotation, parse_math=False)
    axis.set_tick_params(length=2 if step > 1 else 0)
    return f", one in {step} named" if step > 1 else ""


def label_room(labels: Sequence[str]) -> float:
    """Return the inches that the longest label needs."""
    return 0.07 * max(map(len, labels))
