"""Rollout as a flow: the paths of the relevance from the explained position, layer by layer."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
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

_AGAINST, _FOR = (colormaps["RdBu"](end) for end in (0.1, 0.9))
_WIDTH, _NODE = 7.0, 110.0  # points of the strongest line, square points of the largest node


def rollout_steps(matrices: Sequence[Matrix] | Matrix) -> Array:
    """Return the matrices by which each layer of a rollout passes relevance on, ``rownorm(I + C_l)``.

    The product ``query @ steps[-1] @ ... @ steps[0]`` is the score of :class:`~captum_ssm.ImplicitAttentionRollout`,
    for a model whose layers follow one another on one residual stream.

    Args:
        matrices: ``C_l``, (layers, L, L) or a list of (L, L), the first layer first: the results of
            :class:`~captum_ssm.LayerImplicitAttention` with ``fusion="root"``, the default of the rollout.

    Returns:
        The share, (layers, L, L), of its relevance that token i (row) after layer l passes on to token j (column)
        before the layer. Row i is divided by ``1 + |sum_j C_ij|``, like the rows of the rollout. A model that scales
        its residual path or runs layers side by side has other matrices, which :func:`flow_figure` can draw, too.

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
    """Draw the flow of relevance from the explained position through the layers back to the embeddings.

    The picture has one column for each token, and one row for the embeddings (below) and for the state after each layer
    (above). The width of a line between token i after a layer and token j before the layer shows the relevance passed
    on, ``r_i steps_ij``; the residual path goes straight down. The size of a node shows the relevance of the token
    there. The bars below are the scores. Blue is positive, red negative.

    Args:
        steps: (layers, L, L), or a list of (L, L), the first layer first: the share of its relevance that token i
            (row) after the layer passes on to token j (column) before the layer, residual path included;
            :func:`rollout_steps` computes them from the attention matrices.
        tokens: The L tokens.
        query: The explained position, or weights of positions (L,).
        threshold: Lines that carry a smaller share of the explained relevance than this number are not drawn; the
            picture says how many they are.
        title: Title above the picture; None: the explained token.

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
    nonzero = flow != 0
    drawn = nonzero & (np.abs(flow) >= threshold * np.abs(weights).sum())

    across, down, below = max(5.0, min(0.3 * size, 16.0)), max(2.5, min(0.9 * layers, 14.0)), 1.4
    figure = Figure((across + 1.7, down + below + 2 * label_room(labels) + 1.5), dpi=150, layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[down, below])
    _draw_lines(upper, flow, drawn)
    _draw_nodes(upper, nodes)
    upper.set(xlim=(-0.7, size - 0.3), ylim=(-0.3, layers + 0.3))
    upper.set_yticks(range(layers + 1), ["embeddings", *(f"after layer {k}" for k in range(layers))], fontsize=9)
    lower.bar(range(size), nodes[0], color=[_color(score) for score in nodes[0]])
    lower.axhline(0, color="#000000", linewidth=0.6)
    lower.tick_params(axis="y", labelsize=8)
    for axes in (upper, lower):
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        omission = label_axis(axes.xaxis, labels, across)
    lower.set_xlabel(f"token, and its relevance at the embeddings{omission}")
    upper.tick_params(axis="x", length=0, labelbottom=False, labeltop=True)

    (explained, *others) = np.flatnonzero(weights).tolist()
    lower.set_ylabel(f"relevance\n(explained: {weights.sum():.3g})", fontsize=9)
    if title is None:
        name = "the explained tokens" if others else f"'{labels[explained]}'"
        title = f"Where the relevance of {name} comes from"
    figure.suptitle(title, fontsize=12, parse_math=False)
    notes = ["Followed from the top down: the wider a line, the more relevance it hands on."]
    if hidden := int(nonzero.sum() - drawn.sum()):
        notes.append(
            f"Not drawn: {hidden} of {nonzero.sum()} lines, which carry less than {100 * threshold:.3g} % each."
        )
    if (flow < 0).any():
        notes.append("Blue is positive, red negative.")
    upper.set_title("\n".join(notes), fontsize=9, color="#5a5a5a")
    return figure


def _follow(steps: Array, weights: Array) -> tuple[Array, Array]:
    """Follow the relevance from the explained positions back to the embeddings.

    Args:
        steps: (layers, L, L) the share that token i (row) passes on to token j (column).
        weights: (L,) weights of the explained positions.

    Returns:
        The relevance passed on between tokens, (layers, L, L), and the relevance of each token at the embeddings and
        after each layer, (layers + 1, L).
    """
    flow, relevance = [], [weights]  # from the last layer down
    for step in steps[::-1]:
        flow.append(relevance[-1][:, None] * step)
        relevance.append(flow[-1].sum(0))
    return np.stack(flow[::-1]), np.stack(relevance[::-1])


def _draw_lines(axes: Axes, flow: Array, drawn: NDArray[np.bool_]) -> None:
    """Draw the relevance passed on between tokens, (layers, L, L), where ``drawn`` is True."""
    order = np.abs(flow[drawn]).argsort()  # the strongest is drawn last, on top
    strength = _relative(flow[drawn][order])
    axes.add_collection(
        LineCollection(
            [((j, layer), (i, layer + 1)) for layer, i, j in np.argwhere(drawn)[order].tolist()],
            linewidths=_WIDTH * np.sqrt(np.abs(strength)),
            colors=[(*_color(share)[:3], 0.3 + 0.6 * abs(share)) for share in strength],
        )
    )


def _draw_nodes(axes: Axes, nodes: Array) -> None:
    """Draw the relevance of each token at the embeddings and after each layer, (layers + 1, L)."""
    layer, token = np.nonzero(nodes)
    strength = _relative(nodes[layer, token])
    axes.scatter(token, layer, s=_NODE * np.abs(strength), c=[_color(share) for share in strength], zorder=3)


def _relative(numbers: Array) -> Array:
    """Return the numbers divided by the largest absolute one."""
    return numbers / np.abs(numbers).max() if numbers.any() else numbers


def _color(number: float) -> tuple[float, float, float, float]:
    return _FOR if number > 0 else _AGAINST


def _weights(query: int | Matrix, size: int) -> Array:
    """Return the explained positions as weights, (L,).

    Raises:
        InvalidInputError: If a position lies outside the tokens, or weights do not fit or are all 0.
    """
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
