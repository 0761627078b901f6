"""The picture of a summary."""

from __future__ import annotations

from typing import Any

from matplotlib.figure import Figure

from captum_ssm.datasets.findings import Findings

_FOR, _AGAINST, _NEUTRAL = "#2166ac", "#b2182b", "#5a5a5a"
_CLASSES = 6
"""Classes that are drawn at most, the most frequent ones."""


def summary_figure(summary: Findings, count: int) -> Figure:
    """Draw a summary.

    Args:
        summary: The summary.
        count: How many words for and against each class.

    Returns:
        A figure with the words of each class, the scores by position, and the shares of the layers; save it with
        ``figure.savefig(path)``.
    """
    classes = list(summary.classes)[:_CLASSES]
    panels = len(classes) + 1 + bool(summary.layers)
    figure = Figure((4.2 * panels, max(3.6, 0.36 * 2 * count)), dpi=150, layout="constrained", facecolor="white")
    axes = figure.subplots(1, panels, squeeze=False)[0]
    for name, axis in zip(classes, axes):
        for_it, against = summary.spoken(name, count)
        lines = [*for_it, *reversed(against)]
        _bars(
            axis,
            [f"{line.word} ({line.times})" for line in lines],
            [line.mean for line in lines],
            [line.error for line in lines],
        )
        axis.set_title(f"{name}, {summary.classes[name]} rows", parse_math=False)
        axis.set_xlabel("mean score of the word")
    _positions(axes[len(classes)], summary)
    if summary.layers:
        _bars(axes[-1], list(summary.layers), list(summary.layers.values()), None)
        axes[-1].set_title("share that passes each layer")
    return figure


def _bars(axis: Any, names: list[str], values: list[float], errors: list[float] | None) -> None:
    """Draw one bar for each name, the first on top."""
    places = range(len(names))
    colors = [_FOR if value >= 0 else _AGAINST for value in values]
    axis.barh(places, values, xerr=errors, color=colors, ecolor=_NEUTRAL)
    axis.set_yticks(places, names, parse_math=False)
    axis.invert_yaxis()
    axis.axvline(0, color=_NEUTRAL, linewidth=0.8)


def _positions(axis: Any, summary: Findings) -> None:
    """Draw the mean score of words by where they stand, with and without sign."""
    bins = len(summary.positions)
    middle = [(k + 0.5) / bins for k in range(bins)]
    for number, (name, color) in enumerate((("with sign", _FOR), ("without", _NEUTRAL))):
        tallies = [pair[number] for pair in summary.positions]
        means, errors = [t.mean for t in tallies], [t.error for t in tallies]
        axis.errorbar(middle, means, errors, marker="os"[number], color=color, label=name)
    axis.set(title="where words stand", xlabel="from the first token to the last", ylabel="mean score of a word")
    axis.axhline(0, color=_NEUTRAL, linewidth=0.8)
    axis.legend()
