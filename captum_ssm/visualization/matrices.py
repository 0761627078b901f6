"""Matrices between tokens as heat maps."""

from __future__ import annotations

from collections.abc import Sequence
from math import ceil, sqrt
from typing import Any, Literal, get_args

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from numpy.typing import NDArray

from captum_ssm.errors import InvalidInputError
from captum_ssm.visualization.tokens import (
    Array,
    Matrix,
    as_array,
    as_square_matrices,
    label_axis,
    label_room,
    token_labels,
)

Reads = Literal["up to itself", "before itself", "all"]
"""The keys that a query can read.

* ``"up to itself"``: the last query reads every key, each query before it one key less: the attention of a causal
  layer, or ``token_attr`` of :class:`~captum_ssm.LLMImplicitAttention`, whose keys end before the last generated token;
* ``"before itself"``: the last query reads every key but the last, each query before it one key less: generated tokens
  are the queries, and all tokens are the keys;
* ``"all"``: every query reads every key: a layer that reads in both directions, or a prompt as the keys.

Entries that cannot exist are left blank.
"""

Masked = np.ma.MaskedArray[Any, np.dtype[np.float64]]

_QUERY, _KEY = "query (output) token", "key (source) token"


def layers_figure(
    matrices: Sequence[Matrix] | Matrix,
    tokens: Sequence[str],
    titles: Sequence[str] | None = None,
    *,
    scale: Literal["layer", "common"] = "layer",
    quantile: float = 1.0,
    reads: Reads = "up to itself",
    label: str = "attention",
    title: str = "Attention between tokens, layer by layer",
) -> Figure:
    """Draw the matrix between tokens of every layer as a heat map, in a grid.

    Colours go from white at 0 to blue; if any entry is negative, from red over white at 0 to blue, with the same
    strength on both sides.

    Args:
        matrices: (layers, L, L), or a list of (L, L), such as the result of
            :class:`~captum_ssm.LayerImplicitAttention` for each layer; row i is the query (output token), column j the
            key (source token).
        tokens: The L tokens.
        titles: The names of the layers; None: their numbers.
        scale: ``"layer"``: the colours of each layer end at its largest entry. ``"common"``: the colours of all layers
            end at the largest entry of all.
        quantile: Share of the entries' sizes that the colours cover, such as 0.95 where a few large entries would
            leave all others pale; larger entries have the last colour, and the colour bar ends in an arrow.
        reads: The entries that can exist, see :data:`Reads`.
        label: Name of the numbers, with their unit if they have one.
        title: Title above all heat maps.

    Returns:
        A figure; save it with ``figure.savefig(path)``.

    Raises:
        InvalidInputError: If shapes or the number of tokens or titles do not fit, an entry is NaN or infinite, one
            that ``reads`` excludes is not 0, or an option is unknown.

    Example:
        >>> import torch
        >>> figure = layers_figure(torch.rand(3, 4, 4).tril(), ["A", "witty", "film", "."])
        >>> figure.savefig("layers.png")  # doctest: +SKIP
    """
    layers = as_square_matrices(matrices)
    count, size = layers.shape[:2]
    labels = token_labels(tokens, size, "rows and columns")
    names = [f"layer {number}" for number in range(count)] if titles is None else list(titles)
    if len(names) != count:
        raise InvalidInputError(f"There are {len(names)} titles but {count} layers. Pass one title for each layer.")
    if scale not in ("layer", "common"):
        raise InvalidInputError(f"scale must be 'layer' or 'common', not {scale!r}.")
    blank = _blank((size, size), reads)
    masked = [_masked(matrix, blank, f"{name}: ") for matrix, name in zip(layers, names)]
    stacked = np.ma.stack(masked)
    signed, common = bool((stacked < 0).any()), _top(stacked, quantile)

    columns = _columns(count)
    rows = ceil(count / columns)
    side = max(2.4, min(0.19 * size, 15 / columns))
    bar = 0.9  # inches of a colour bar with its numbers
    width = columns * (side + (bar if scale == "layer" else 0.15)) + label_room(labels) + 0.5
    height = rows * (side + 0.35) + label_room(labels) + 1.1
    figure = Figure((width + (bar if scale == "common" else 0), height), dpi=150, layout="compressed")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes in grid.flat[count:]:
        axes.remove()
    panels = list(grid.flat[:count])
    for number, (axes, matrix) in enumerate(zip(panels, masked)):
        top = common if scale == "common" else _top(matrix, quantile)
        image = _draw(axes, matrix, top, signed)
        axes.set_title(names[number], fontsize=10, parse_math=False)
        omission = label_axis(axes.xaxis, labels, side)
        label_axis(axes.yaxis, labels, side)
        last = number + 1 == count or (number + 1) % columns == 0
        axes.tick_params(labelleft=number % columns == 0, labelbottom=number + columns >= count)
        if scale == "layer":
            _color_bar(figure, image, top, matrix, [axes], label if last else "")
    if scale == "common":
        _color_bar(figure, image, common, stacked, panels, label)
    note = "each layer has its own colour scale" if scale == "layer" else "one colour scale for all layers"
    figure.suptitle(f"{title}\n({note})", fontsize=12, parse_math=False)
    figure.supxlabel(_KEY + omission, fontsize=10)
    figure.supylabel(_QUERY + omission, fontsize=10)
    return figure


def token_heatmap(
    matrix: Matrix,
    queries: Sequence[str],
    keys: Sequence[str] | None = None,
    *,
    quantile: float = 1.0,
    reads: Reads = "up to itself",
    label: str = "attention",
    title: str = "Attention between tokens",
) -> Figure:
    """Draw one matrix between tokens as a heat map.

    The matrix is the attention of a layer, (L, L), or the explanation of a generation, with one row for each generated
    token. Colours go from white at 0 to blue; if any entry is negative, from red over white at 0 to blue. Captum's
    ``LLMAttributionResult.plot_token_attr`` writes the number into every entry and is 1.3 inches wider with each token:
    use that method to read numbers between a few tokens.

    Args:
        matrix: (queries, keys); row i is the query (output token), column j the key (source token).
        queries: The tokens of the rows.
        keys: The tokens of the columns; None: the tokens of the rows.
        quantile: Share of the entries' sizes that the colours cover; larger entries have the last colour.
        reads: The entries that can exist, see :data:`Reads`.
        label: Name of the numbers, with their unit if they have one.
        title: Title above the heat map.

    Returns:
        A figure; save it with ``figure.savefig(path)``.

    Raises:
        InvalidInputError: If the shape or the number of tokens does not fit, an entry is NaN or infinite, one that
            ``reads`` excludes is neither 0 nor NaN, or an option is unknown.

    Example:
        Two generated tokens, explained by the prompt and by the tokens generated before:

        >>> import torch
        >>> prompt, generated = ["How", "was", "it", "?"], ["Not", "bad"]
        >>> scores = torch.randn(2, 6).tril(3)
        >>> figure = token_heatmap(scores, generated, prompt + generated, reads="before itself", label="logits")
    """
    numbers = as_array(matrix)
    if numbers.ndim != 2 or not numbers.size:
        raise InvalidInputError(
            f"matrix must have the shape (queries, keys), not {numbers.shape}. Of a batch take one example, such as "
            "`matrix[0]`; for several layers there is layers_figure."
        )
    rows, columns = numbers.shape
    left = token_labels(queries, rows, "rows")
    below = token_labels(queries if keys is None else keys, columns, "columns")
    masked = _masked(numbers, _blank(numbers.shape, reads), "")
    signed = bool((masked < 0).any())

    cell = min(0.22, 12 / columns, 12 / rows)
    across, down = max(2.6, cell * columns), max(1.6, cell * rows)
    width, height = across + label_room(left) + 1.7, down + label_room(below) + 1.1
    figure = Figure((width, height), dpi=150, layout="compressed" if rows == columns else "constrained")
    axes = figure.subplots()
    top = _top(masked, quantile)
    image = _draw(axes, masked, top, signed)
    axes.set_xlabel(_KEY + label_axis(axes.xaxis, below, across))
    axes.set_ylabel(_QUERY + label_axis(axes.yaxis, left, down))
    axes.set_title(title, fontsize=12, parse_math=False)
    _color_bar(figure, image, top, masked, [axes], label)
    return figure


def _columns(count: int) -> int:
    """Return the number of columns of a grid: about the number of rows, with a full last row if that is possible."""
    most = max(3, ceil(sqrt(count)))
    return count if count < most else next((c for c in range(most, most + 3) if count % c == 0), most)


def _blank(shape: tuple[int, ...], reads: Reads) -> NDArray[np.bool_]:
    """Return a bool array (queries, keys) that is True at entries that cannot exist.

    Raises:
        InvalidInputError: If ``reads`` is unknown or does not fit the shape.
    """
    if reads not in get_args(Reads):
        raise InvalidInputError(f"reads must be one of {', '.join(map(repr, get_args(Reads)))}, not {reads!r}.")
    rows, columns = shape
    if reads == "all":
        return np.zeros(shape, dtype=bool)
    if rows > columns:
        raise InvalidInputError(
            f"With {rows} queries and {columns} keys the queries cannot be the last of the keys. Pass all tokens that "
            "a query may read as keys, or reads='all' if the keys are others."
        )
    return ~np.tri(rows, columns, columns - rows - (reads == "before itself"), dtype=bool)


def _masked(matrix: Array, blank: NDArray[np.bool_], prefix: str) -> Masked:
    """Mask the entries that cannot exist.

    Args:
        matrix: (queries, keys) the entries.
        blank: (queries, keys) True at entries that cannot exist.
        prefix: The start of an error's message.

    Returns:
        The masked matrix.

    Raises:
        InvalidInputError: If an entry is NaN or infinite, or an entry that cannot exist is not 0.
    """
    if not np.isfinite(matrix[~blank]).all():
        raise InvalidInputError(
            f"{prefix}the matrix has NaN or infinite entries. Check the scores, or set to 0 what is not to be shown."
        )
    if np.nan_to_num(matrix[blank]).any():
        i, j = (int(index[0]) for index in np.nonzero(blank & (np.nan_to_num(matrix) != 0)))
        raise InvalidInputError(
            f"{prefix}row {i}, column {j} is {matrix[i, j]:.3g}, but query {i} cannot read that key. Rows are queries "
            "and columns are keys (is the matrix transposed?); pass reads='all' if every query can read every key."
        )
    return np.ma.masked_array(matrix, blank)


def _top(matrix: Masked, quantile: float) -> float:
    """Return the size of an entry at which the colours end.

    Raises:
        InvalidInputError: If the quantile is out of range.
    """
    if not 0 < quantile <= 1:
        raise InvalidInputError(f"quantile must lie above 0 and be at most 1, not {quantile}.")
    sizes = np.abs(matrix.compressed())
    return float(np.quantile(sizes, quantile)) or float(sizes.max()) if sizes.any() else 1.0


def _draw(axes: Axes, matrix: Masked, top: float, signed: bool) -> AxesImage:
    """Draw a matrix: from white at 0 to blue, or from red over white at 0 to blue."""
    axes.spines[:].set_visible(False)
    aspect: Literal["equal", "auto"] = "equal" if matrix.shape[0] == matrix.shape[1] else "auto"
    colors, low = ("RdBu", -top) if signed else ("Blues", 0.0)
    return axes.imshow(matrix, cmap=colors, vmin=low, vmax=top, aspect=aspect, interpolation="nearest")


def _color_bar(figure: Figure, image: AxesImage, top: float, matrix: Masked, axes: list[Axes], label: str) -> None:
    """Draw a colour bar; arrows say that entries lie beyond its ends."""
    above, below = bool((matrix > top).any()), bool((matrix < -top).any())
    extend = ("both" if below else "max") if above else ("min" if below else "neither")
    bar = figure.colorbar(image, ax=axes, extend=extend, shrink=0.9 if len(axes) == 1 else 0.6)
    bar.ax.tick_params(labelsize=8)
    bar.set_label(label, fontsize=9, parse_math=False)
