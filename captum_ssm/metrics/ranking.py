"""How well scores rank what is true above what is not; each for a batch of rankings, O(N log N)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Ranking:
    """How many entries, true or not, score as high as each entry or higher; entries in ascending order of their scores.

    Attributes:
        true: (B, N) bool, what should rank high; False where nothing is judged.
        above: (B, N) how many judged entries score higher than this one.
        at_least: (B, N) how many score as high or higher, itself included.
        true_above: (B, N) how many true entries score higher.
        true_at_least: (B, N) how many true entries score as high or higher.
        judged: (B, 1) how many are judged at all.
    """

    true: Tensor
    above: Tensor
    at_least: Tensor
    true_above: Tensor
    true_at_least: Tensor
    judged: Tensor

    @classmethod
    def of(cls, scores: Tensor, true: Tensor, judged: Tensor) -> Ranking:
        """Count, from finite scores (B, N), what is true and what is judged, both (B, N) bool."""
        ascending, order = scores.masked_fill(~judged, -torch.inf).sort(1)
        true = (true & judged).gather(1, order)
        true_from = F.pad(true.double().flip(1).cumsum(1).flip(1), (0, 1))
        first = torch.searchsorted(ascending, ascending)  # of those that score as high as this one
        behind = torch.searchsorted(ascending, ascending, right=True)  # the next one after them
        size = scores.shape[1]
        return cls(
            true,
            (size - behind).double(),
            (size - first).double(),
            true_from.gather(1, behind),
            true_from.gather(1, first),
            judged.sum(1, keepdim=True).double(),
        )

    @property
    def count(self) -> Tensor:
        """How many entries are true, (B, 1)."""
        return self.true.sum(1, keepdim=True).double()

    def auc(self) -> Tensor:
        """Return how often a true entry scores higher than one that is not, (B,); equal scores count one half."""
        false = self.judged - self.count
        false_above = self.above - self.true_above
        false_at_least = self.at_least - self.true_at_least
        below = false - (false_above + false_at_least) / 2
        return (below * self.true).sum(1) / (self.count * false).squeeze(1)

    def average_precision(self) -> Tensor:
        """Return the mean over the true entries of the precision at their score, (B,)."""
        precision = torch.where(self.true, self.true_at_least / self.at_least, 0.0)
        return precision.sum(1) / self.count.squeeze(1)

    def hits(self, k: Tensor) -> Tensor:
        """Return how many of the first ``k`` (B, 1) entries are true, (B,); equal scores in every order, on average."""
        within = ((k - self.above) / (self.at_least - self.above)).clamp(0, 1)
        return torch.where(self.true, within, 0.0).sum(1)
