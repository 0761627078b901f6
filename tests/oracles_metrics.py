"""Every metric written out for one example, by loops over features, pixels, pairs or orders.

Nothing here is fast and nothing here is taken from captum_ssm.
"""

import math
from collections.abc import Callable, Sequence
from fractions import Fraction
from itertools import pairwise, permutations

import torch
from torch import Tensor

Score = Callable[[Tensor], float]
"""From one input, without a batch dimension, to a number."""


def area(fractions: Sequence[float], values: Sequence[float]) -> float:
    """The area under straight lines between the points."""
    return sum((right - left) * (values[k] + values[k + 1]) / 2 for k, (left, right) in enumerate(pairwise(fractions)))


def descending(scores: Sequence[float], places: Sequence[int]) -> list[int]:
    """These places, that of the highest score first; there must be no equal scores."""
    assert len({scores[place] for place in places}) == len(places)
    return sorted(places, key=lambda place: -scores[place])


def first(fraction: Fraction, order: Sequence[int], whole: bool = False) -> list[int]:
    """The first places of an order that make up a fraction of it."""
    exact = fraction * len(order)
    return list(order[: math.floor(exact) if whole else math.ceil(exact)])


def replaced(x: Tensor, baseline: Tensor, places: Sequence[int]) -> Tensor:
    """The input with baselines at these places."""
    x = x.clone()
    for place in places:
        x[place] = baseline[place]
    return x


def deleted(x: Tensor, places: Sequence[int]) -> Tensor:
    """The input without these places."""
    return torch.stack([x[place] for place in range(len(x)) if place not in places])


def taken_away(
    score: Score, x: Tensor, order: Sequence[int], fractions: Sequence[Fraction], baseline: Tensor | None
) -> list[float]:
    """Scores as places are replaced by the baseline, or deleted if there is none."""
    values = []
    for fraction in fractions:
        places = first(fraction, order)
        values.append(score(deleted(x, places) if baseline is None else replaced(x, baseline, places)))
    return values


def inserted(
    score: Score, x: Tensor, order: Sequence[int], fractions: Sequence[Fraction], baseline: Tensor
) -> list[float]:
    """Scores as places are put into an input that is the baseline at all of them."""
    empty = replaced(x, baseline, order)
    return [score(replaced(empty, x, first(fraction, order))) for fraction in fractions]


def patch_sums(pixels: Tensor, side: int) -> list[float]:
    """The sum of the pixels (H, W) of each patch, row by row."""
    height, width = pixels.shape
    return [
        sum(float(pixels[top + i, left + j]) for i in range(side) for j in range(side))
        for top in range(0, height, side)
        for left in range(0, width, side)
    ]


def without_patches(image: Tensor, colour: Tensor, patches: Sequence[int], side: int) -> Tensor:
    """The image (C, H, W) with these patches in one colour (C,)."""
    image = image.clone()
    across = image.shape[2] // side
    for patch in patches:
        top, left = side * (patch // across), side * (patch % across)
        for i in range(side):
            for j in range(side):
                image[:, top + i, left + j] = colour
    return image


def auc(scores: Sequence[float], true: Sequence[bool]) -> float:
    """How often one that is true scores higher than one that is not; equal scores count one half."""
    pairs = [
        1.0 if s > t else 0.5 if s == t else 0.0
        for s, s_true in zip(scores, true)
        for t, t_true in zip(scores, true)
        if s_true and not t_true
    ]
    return sum(pairs) / len(pairs)


def average_precision(scores: Sequence[float], true: Sequence[bool]) -> float:
    """The sum over all thresholds, from above, of the gain in recall times the precision there."""
    total, recall = 0.0, 0.0
    for threshold in sorted(set(scores), reverse=True):
        found = [t for s, t in zip(scores, true) if s >= threshold]
        gain = sum(found) / sum(true) - recall
        total, recall = total + gain * sum(found) / len(found), recall + gain
    return total


def hits(scores: Sequence[float], true: Sequence[bool], k: int) -> float:
    """How many of the first k are true, on average over all orders in which no score precedes a higher one."""
    found = [
        sum(true[place] for place in order[:k])
        for order in permutations(range(len(scores)))
        if all(scores[a] >= scores[b] for a, b in pairwise(order))
    ]
    return sum(found) / len(found)


def bilinear(pixels: Tensor, height: int, width: int) -> Tensor:
    """A map (h, w) at another size: each new pixel's centre lies between four old ones, the border is repeated."""

    def between(place: int, new: int, old: int) -> tuple[int, int, float]:
        at = min(max((place + 0.5) * old / new - 0.5, 0.0), old - 1.0)
        return math.floor(at), min(math.floor(at) + 1, old - 1), at - math.floor(at)

    result = torch.zeros(height, width, dtype=pixels.dtype)
    for i in range(height):
        top, bottom, down = between(i, height, pixels.shape[0])
        for j in range(width):
            left, right, over = between(j, width, pixels.shape[1])
            above = (1 - over) * pixels[top, left] + over * pixels[top, right]
            below = (1 - over) * pixels[bottom, left] + over * pixels[bottom, right]
            result[i, j] = (1 - down) * above + down * below
    return result


def segmented(relevance: Tensor, mask: Tensor) -> tuple[int, int, list[int], list[int]]:
    """Pixels that are right, pixels that are judged, and intersection and union of background and foreground."""
    mean = sum(relevance.flatten().tolist()) / relevance.numel()
    right = judged = 0
    intersection, union = [0, 0], [0, 0]
    for r, m in zip(relevance.flatten().tolist(), mask.flatten().tolist()):
        if m == -1:
            continue
        found = int(r > mean)
        judged += 1
        right += found == m
        for side in (0, 1):
            intersection[side] += found == side and m == side
            union[side] += found == side or m == side
    return right, judged, intersection, union
