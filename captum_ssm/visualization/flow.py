"""Rollout as a flow: which way the relevance of the explained position goes, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

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

_AGAINST, _FOR = (colormaps["RdBu"](end) for end in (0.1, 0.9))
_WIDTH, _NODE = 7.0, 110.0  # points of the strongest line, square points of the largest node


def rollout_steps(matrices: Sequence[Matrix] | Matrix) -> Array:
    """Return the matrices by which each layer of a rollout hands relevance on, ``rownorm(I + C_l)``.

    With them ``query @ steps[-1] @ ... @ steps[0]`` is the score of
    :class:`~captum_ssm.ImplicitAttentionRollout`, for a model whose layers follow one another on one residual stream.

    Args:
        matrices: ``C_l``, (layers, L, L) or a list of (L, L), such as :class:`~captum_ssm.LayerImplicitAttention`
            gives for each layer, the first one first, with the rollout's own ``fusion="root"``.

    Returns:
        (layers, L, L): what token i after layer l hands on to token j before it, as a share of its relevance. Row i is
        divided by ``1 + |sum_j C_ij|``, as in :func:`captum_ssm.matrices.rollout.rollout`. Where a model scales its
        residual path or runs layers side by side, the matrices of its steps are others, which :func:`flow_figure` draws
        as well.

    Raises:
        InvalidInputError: If the shapes do not fit.
    """
    layers = as_square_matrices(matrices)
    return (np.eye(layers.shape[-1]) + layers) / (1 + np.abs(layers.sum(-1, keepdims=True)))


def flow_figure(
    steps: Sequence[Matrix] | Matrix,
    tokens: Sequence[str],
    query: int | Matrix = -1,
    *,
    threshold: float = 0.01,
    title: str | None = None,
) -> Figure:
    """Draw the way that relevance takes from the explained position through the layers back to the embeddings.

    One column for each token, one row for the embeddings (below) and for the state after each layer (above). A line
    between token i after a layer and token j before it is as wide as the relevance handed on, ``r_i steps_ij``; the
    residual path goes straight down. A node is as large as the token's relevance there. The bars below are the scores.
    Blue is positive, red negative.

    Args:
        steps: (layers, L, L), or a list of (L, L), the first layer first: the share of its relevance that token i
            (row) after the layer hands on to token j (column) before it, residual path included; :func:`rollout_steps`
            makes them from the attention matrices.
        tokens: The L tokens.
        query: The explained position, or weights of positions (L,).
        threshold: Lines that carry a smaller share of the explained relevance than this are not drawn; the picture
            says how many there are.
        title: Above the picture; None names the explained token.

    Returns:
        A figure; save it with ``figure.savefig(path)``.

    Raises:
        InvalidInputError: If shapes, the number of tokens or the query do not fit, or a number is NaN or infinite.

    Example:
        >>> import torch
        >>> matrices = torch.rand(3, 4, 4).tril()  # LayerImplicitAttention(model, k).attribute(ids, fusion="root")[0]
        >>> figure = flow_figure(rollout_steps(matrices), ["A", "witty", "film", "."])
    """
    matrices = as_square_matrices(steps)
    if not np.isfinite(matrices).all():
        raise InvalidInputError("steps has NaN or infinite entries. Check the attention matrices they were made from.")
    layers, size = matrices.shape[:2]
    labels = token_labels(tokens, size, "rows and columns")
    weights = _weights(query, size)
    if not 0 <= threshold < 1:
        raise InvalidInputError(f"threshold must be a share from 0 to below 1, not {threshold}.")

    flow, nodes = _follow(matrices, weights)
    there = flow != 0
    drawn = there & (np.abs(flow) >= threshold * np.abs(weights).sum())

    across, down, below = max(5.0, min(0.3 * size, 16.0)), max(2.5, min(0.9 * layers, 14.0)), 1.4
    figure = Figure((across + 1.7, down + below + 2 * label_room(labels) + 1.5), dpi=150, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[down, below])
    order = np.abs(flow[drawn]).argsort()  # the strongest on top
    strength = _relative(flow[drawn][order])
    upper.add_collection(
        LineCollection(
            [((j, layer), (i, layer + 1)) for layer, i, j in np.argwhere(drawn)[order].tolist()],
            linewidths=_WIDTH * np.sqrt(np.abs(strength)),
            colors=[(*_color(part)[:3], 0.3 + 0.6 * abs(part)) for part in strength],
        )
    )
    layer, token = np.nonzero(nodes)
    strength = _relative(nodes[layer, token])
    upper.scatter(token, layer, s=_NODE * np.abs(strength), c=[_color(part) for part in strength], zorder=3)
    upper.set(xlim=(-0.7, size - 0.3), ylim=(-0.3, layers + 0.3))
    upper.set_yticks(range(layers + 1), ["embeddings", *(f"after layer {k}" for k in range(layers))], fontsize=9)
    lower.bar(range(size), nodes[0], color=[_color(score) for score in nodes[0]])
    lower.axhline(0, color="#000000", linewidth=0.6)
    lower.tick_params(axis="y", labelsize=8)
    for axes in (upper, lower):
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        left_out = label_axis(axes.xaxis, labels, across)
    lower.set_xlabel(f"token, and its relevance at the embeddings{left_out}")
    upper.tick_params(axis="x", length=0, labelbottom=False, labeltop=True)

    (explained, *others) = np.flatnonzero(weights).tolist()
    lower.set_ylabel(f"relevance\n(explained: {weights.sum():.3g})", fontsize=9)
    if title is None:
        name = "the explained tokens" if others else f"'{labels[explained]}'"
        title = f"Where the relevance of {name} comes from"
    figure.suptitle(title, fontsize=12, parse_math=False)
    notes = ["Followed from the top down: the wider a line, the more relevance it hands on."]
    if hidden := int(there.sum() - drawn.sum()):
        notes.append(f"Not drawn: {hidden} of {there.sum()} lines, which carry less than {100 * threshold:.3g} % each.")
    if (flow < 0).any():
        notes.append("Blue is positive, red negative.")
    upper.set_title("\n".join(notes), fontsize=9, color="#5a5a5a")
    return figure


def _follow(steps: Array, weights: Array) -> tuple[Array, Array]:
    """Follow relevance back: what each token hands on, (layers, L, L), and what each one has, (layers + 1, L)."""
    handed, relevance = [], [weights]  # from the last layer down
    for step in steps[::-1]:
        handed.append(relevance[-1][:, None] * step)
        relevance.append(handed[-1].sum(0))
    return np.stack(handed[::-1]), np.stack(relevance[::-1])


def _relative(numbers: Array) -> Array:
    """Return the numbers as parts of the largest absolute one."""
    return numbers / np.abs(numbers).max() if numbers.any() else numbers


def _color(number: float) -> tuple[float, float, float, float]:
    return _FOR if number > 0 else _AGAINST


def _weights(query: int | Matrix, size: int) -> Array:
    """Return the explained positions as weights, (L,)."""
    if isinstance(query, int) or query.ndim == 0:
        position = int(query)
        if not -size <= position < size:
            raise InvalidInputError(f"query {position} lies outside the {size} tokens; pass -{size} to {size - 1}.")
        return np.eye(size)[position]
    weights = as_array(query)
    if weights.shape != (size,) or not np.isfinite(weights).all() or not weights.any():
        raise InvalidInputError(
            f"query must be a position or {size} finite weights that are not all 0, not shape {weights.shape}."
        )
    return weights
