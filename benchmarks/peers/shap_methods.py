"""shap's partition explainer: Owen values of a function that is called, never looked into."""

from __future__ import annotations

from typing import Any

import numpy as np
import shap
import torch
from torch import Tensor

from benchmarks.methods import Question
from benchmarks.peers.peer import one_by_one

BATCH = 64
"""Masked inputs that are run at once."""


class Reference(shap.maskers.Masker):
    """Puts the reference where a token or patch is masked; neighbours are grouped by twos, again and again.

    Args:
        question: The question about one input.
    """

    def __init__(self, question: Question) -> None:
        self.question, features = question, question.features
        self.shape = (None, int(features.max()) + 1)
        self.clustering = pairs(self.shape[1])

    def __call__(self, mask: Any, inputs: Any) -> tuple[Any, ...]:
        """Return the input with the reference at masked features, in a batch of one."""
        kept = torch.as_tensor(mask)[self.question.features].expand_as(self.question.inputs)
        return (torch.where(kept, self.question.inputs, self.question.reference).numpy(),)


def pairs(count: int) -> Any:
    """Return the balanced tree of neighbours as shap reads it: a row (left, right, distance, size) for each node."""
    level, rows = [(number, 1) for number in range(count)], []
    distance = 0
    while len(level) > 1:
        distance += 1
        above = []
        for left, right in zip(level[::2], level[1::2]):
            rows.append((left[0], right[0], distance, left[1] + right[1]))
            above.append((count + len(rows) - 1, left[1] + right[1]))
        level = above + level[len(above) * 2 :]
    return np.array(rows, dtype=float)


@one_by_one
def partition(question: Question) -> Tensor:
    """Return the partition explainer's values (1, N) with its own default of 500 evaluations at most."""

    def score(inputs: Any) -> Any:
        with torch.no_grad():
            found = torch.as_tensor(np.asarray(inputs))
            return question.score(found, torch.zeros(len(found), dtype=torch.long)).numpy()

    explainer = shap.explainers.Partition(score, Reference(question))
    rows = np.zeros((1, question.features.max() + 1))  # the masker has the input itself
    values = explainer(rows, batch_size=BATCH, silent=True).values
    return torch.as_tensor(values, dtype=torch.float32)
