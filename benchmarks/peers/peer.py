"""What a peer is: a method of whatever package, that answers a question of the benchmark."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

from benchmarks.methods import Function, Question

Sum = Literal["difference", "output"]


@dataclass(frozen=True)
class Explained:
    """An answer, with all that it must be judged by.

    Attributes:
        scores: (B, N), one for each token or patch.
        terms: By name, parts of the sum (B,) that belong to no token.
        layer: Of a method that decomposes layers: the largest relative error of any of them.
    """

    scores: Tensor
    terms: Mapping[str, Tensor] = field(default_factory=dict)
    layer: float | None = None


@dataclass(frozen=True)
class Peer:
    """A method that users may compare with.

    Attributes:
        package: The package on PyPI that has it; None for a published rule that none has, restated in this repository.
        explain: From a question to its answer.
        sum: What the scores should sum to: ``"difference"``, F(x) - F(x'); ``"output"``, F(x); None if the
            scores are no shares of an output.
        claimed: Whether its authors promise that sum.
        stored: Its name in :data:`benchmarks.methods.METHODS`, whose stored figures are then its own.
    """

    package: str | None
    explain: Callable[[Question], Explained]
    sum: Sum | None
    claimed: bool = False
    stored: str | None = None


def alone(function: Function) -> Callable[[Question], Explained]:
    """Return a method of the benchmark as a peer explains: scores, and nothing beside them."""
    return lambda question: Explained(function(question))


def part(question: Question, rows: slice) -> Question:
    """Return the question about some of the inputs."""
    return replace(
        question,
        inputs=question.inputs[rows],
        target=question.target[rows],
        reference=question.reference[rows],
        contrast=None if question.contrast is None else question.contrast[rows],
    )


def in_parts(function: Function, size: int) -> Function:
    """Return a method that explains at most so many inputs at a time as one that takes any number."""
    return lambda question: torch.cat(
        [function(part(question, slice(row, row + size))) for row in range(0, len(question.inputs), size)]
    )


one_by_one = partial(in_parts, size=1)
