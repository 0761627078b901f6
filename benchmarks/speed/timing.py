"""Times of several calls side by side, and how a time grows."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence

import torch

Call = Callable[[], object]


def seconds(function: Call) -> float:
    """Return the processor time of one call."""
    start = time.process_time()
    function()
    return time.process_time() - start


def best(calls: Mapping[str, Call], rounds: int) -> dict[str, float]:
    """Return the shortest time of each call.

    Args:
        calls: What is timed, by name: each once in every round, so that a busy machine slows all of them.
        rounds: How often.
    """
    taken: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            taken[name].append(seconds(call))
    return {name: min(times) for name, times in taken.items()}


def ratios(calls: Mapping[str, Call], yardstick: Call, rounds: int) -> dict[str, float]:
    """Return the time of each call as a multiple of that of the yardstick."""
    times = best({"": yardstick, **calls}, rounds)
    return {name: times[name] / times[""] for name in calls}


def exponent(times: Mapping[int, float]) -> float:
    """Return k of time ~ L^k by least squares over all lengths L."""
    points = torch.tensor([[math.log(L), math.log(taken)] for L, taken in times.items()])
    x, y = (points - points.mean(0)).unbind(1)
    return float((x * y).sum() / (x * x).sum())


def growth(at: Callable[[int], Mapping[str, Call]], lengths: Sequence[int], rounds: int) -> dict[str, float]:
    """Return the growth exponent of the time of each of several calls.

    Args:
        at: From a length L to what is timed, by name.
        lengths: The lengths.
        rounds: How often each is timed.
    """
    times = {L: best(at(L), rounds) for L in lengths}
    return {name: exponent({L: taken[name] for L, taken in times.items()}) for name in times[lengths[0]]}
