"""Tokens along the axes of a figure, and the matrices between them."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil
from typing import Any

import numpy as np
from matplotlib.axis import Axis, XAxis
from numpy.typing import NDArray
from torch import Tensor

from captum_ssm.errors import InvalidInputError
from captum_ssm.pages.token_texts import label

Matrix = Tensor | NDArray[Any]
"""A tensor of torch, of any type and device, or an array of numpy."""

Array = NDArray[np.float64]

_SIZE, _INCHES = 7, 0.12  # font size of a label in points, and its room along the axis


def as_array(numbers: Matrix) -> Array:
    """Return the numbers as an array in float64, detached and on the CPU."""
    if isinstance(numbers, Tensor):
        numbers = numbers.detach().to("cpu").double().numpy()
    return np.asarray(numbers, dtype=np.float64)


def as_square_matrices(matrices: Sequence[Matrix] | Matrix) -> Array:
    """Stack one square matrix for each layer.

    Args:
        matrices: (layers, L, L), or a list of (L, L).

    Returns:
        (layers, L, L) in float64.

    Raises:
        InvalidInputError: If there is no layer, or a matrix is not square or differs in size from the first.
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


def token_labels(tokens: Sequence[str], count: int, places: str) -> list[str]:
    """Return a short printable label for each token.

    Line breaks and other invisible characters are written as Python's escapes, spaces of a token of spaces as visible
    characters, and characters beyond the sixteenth are left out.

    Args:
        tokens: The tokens, as the tokenizer writes them.
        count: The expected number of tokens.
        places: The places that the tokens name, such as "rows", for the message.

    Returns:
        One label for each token.

    Raises:
        InvalidInputError: If the number of tokens differs, or a token is not text.
    """
    if isinstance(tokens, str) or not all(isinstance(token, str) for token in tokens):
        raise InvalidInputError(
            "Tokens must be a list of texts; of token ids make them by tokenizer.convert_ids_to_tokens(ids)."
        )
    if len(tokens) != count:
        raise InvalidInputError(
            f"There are {len(tokens)} tokens but {count} {places}. Pass one token for each of them."
        )
    return [label(token) for token in tokens]


def label_axis(axis: Axis, labels: Sequence[str], inches: float) -> str:
    """Write labels along an axis: all, or every k-th if they would overlap.

    Args:
        axis: The axis of a figure.
        labels: One label for each token.
        inches: The length of the axis.

    Returns:
        A note for the name of the axis that labels are left out; empty if none is.
    """
    step = ceil(len(labels) * _INCHES / inches)
    rotation = 90 if isinstance(axis, XAxis) else 0
    axis.set_ticks(range(0, len(labels), step), labels[::step], fontsize=_SIZE, rotation=rotation, parse_math=False)
    axis.set_tick_params(length=2 if step > 1 else 0)
    return f", one in {step} named" if step > 1 else ""


def label_room(labels: Sequence[str]) -> float:
    """Return the inches that the longest label needs."""
    return 0.07 * max(map(len, labels))
