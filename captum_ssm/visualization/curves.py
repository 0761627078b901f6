"""Curves of a perturbation metric, one for each method."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
from matplotlib.figure import Figure

from captum_ssm.errors import InvalidInputError
from captum_ssm.metrics.curve import Curve, mean_and_error
from captum_ssm.visualization.tokens import as_array

_COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000")
_MARKERS = "osD^vPX"
"""One marker for each colour, so that either identifies a curve; from the eighth curve on the lines are dashed."""


def curves_figure(
    curves: Mapping[str, Curve],
    *,
    title: str | None = None,
    xlabel: str = "share of features perturbed",
    ylabel: str = "evidence for the explained class",
) -> Figure:
    """Draw the mean of each curve over its examples, with a band of one standard error around it.

    Args:
        curves: The curves by name, such as the name of the method, in the order of the legend, which also gives the
            area under each curve and its standard error.
        title: Title above the picture; None: the number of examples.
        xlabel: Name of the fractions: for :func:`~captum_ssm.metrics.activation` ``"share of tokens inserted"``.
        ylabel: Name of the values, with their unit if they have one.

    Returns:
        A figure; save it with ``figure.savefig(path)``.

    Raises:
        InvalidInputError: If there is no curve, or a value is NaN or infinite.

    Example:
        >>> import torch
        >>> from captum_ssm.metrics import Curve
        >>> curve = Curve(torch.linspace(0, 1, 11), torch.rand(20, 11))
        >>> figure = curves_figure({"random": curve})
        >>> figure.savefig("curves.png")  # doctest: +SKIP
    """
    if not curves:
        raise InvalidInputError('There is no curve to draw. Pass some by name, such as {"relevance": curve}.')
    for name, curve in curves.items():
        if not np.isfinite(as_array(curve.values)).all() or not len(curve.values):
            raise InvalidInputError(f"The curve {name!r} has no examples, or NaN or infinite values.")

    longest = max(map(len, curves))
    figure = Figure((5.6 + 0.08 * (longest + 16), max(3.8, 0.3 * len(curves) + 1.2)), dpi=150, layout="constrained")
    axes = figure.subplots()
    for number, curve in enumerate(curves.values()):
        color, marker = _COLORS[number % len(_COLORS)], _MARKERS[number % len(_MARKERS)]
        x, mean = as_array(curve.fractions), as_array(curve.mean)
        axes.plot(
            x,
            mean,
            color=color,
            marker=marker,
            markersize=4,
            linewidth=1.6,
            linestyle="--" if number >= len(_COLORS) else "-",
            label=str(number),
        )
        if len(curve.values) > 1:
            error = as_array(curve.standard_error)
            axes.fill_between(x, mean - error, mean + error, color=color, alpha=0.15, linewidth=0)
    axes.set_title(_default_title(curves) if title is None else title, fontsize=12, loc="left", parse_math=False)
    axes.set_xlabel(xlabel, parse_math=False)
    several = any(len(curve.values) > 1 for curve in curves.values())
    axes.set_ylabel(f"{ylabel}\n(mean ± one standard error)" if several else ylabel, parse_math=False)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    legend = figure.legend(
        loc="outside right upper", frameon=False, fontsize=9, title="area under the mean", alignment="left"
    )
    for text, (name, curve) in zip(legend.get_texts(), curves.items()):
        text.set(text=_label(name, curve), parse_math=False)  # set here: a label that starts with _ gets no entry
    return figure


def _label(name: str, curve: Curve) -> str:
    mean, error = mean_and_error(curve.area)
    return f"{name}: {mean:.3f}" if math.isnan(error) else f"{name}: {mean:.3f} ± {error:.3f}"


def _default_title(curves: Mapping[str, Curve]) -> str:
    counts = sorted({len(curve.values) for curve in curves.values()})
    if counts == [1]:
        return "One example"
    return f"{counts[0]} examples" if len(counts) == 1 else f"{counts[0]} to {counts[-1]} examples"
