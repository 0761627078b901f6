"""Figures of a ranking of true and false entries by their scores, for a batch of rankings; O(N log N)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Ranking:
    """Numbers of entries, all and true ones, that score at least as high as each entry.

    The entries n of each example stand in ascending order of their scores.

    Attributes:
        true: (B, N) bool, True at entries that should rank high; False where nothing is judged.
        above: (B, N) the number of judged entries that score higher than entry n.
        at_least: (B, N) the number of judged entries that score as high as entry n or higher, entry n included.
        true_above: (B, N) the number of true entries that score higher.
        true_at_least: (B, N) the number of true entries that score as high or higher.
        judged: (B, 1) the number of judged entries.
    """

    true: Tensor
    above: Tensor
    at_least: Tensor
    true_above: Tensor
    true_at_least: Tensor
    judged: Tensor

    @classmethod
    def of(cls, scores: Tensor, true: Tensor, judged: Tensor) -> Ranking:
        """Rank the entries of each example.

        Args:
            scores: (B, N) finite scores.
            true: (B, N) bool, True at entries that should rank high.
            judged: (B, N) bool, True at entries that are judged.

        Returns:
            The numbers of all and of true entries above each entry.
        """
        ascending, order = scores.masked_fill(~judged, -torch.inf).sort(1)
        true = (true & judged).gather(1, order)
        true_from = F.pad(true.double().flip(1).cumsum(1).flip(1), (0, 1))  # (B, N + 1) true entries from n on
        first = torch.searchsorted(ascending, ascending)  # (B, N) the first entry with the score of entry n
        behind = torch.searchsorted(ascending, ascending, right=True)  # (B, N) the next one after the last such entry
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
        """The number of true entries, (B, 1)."""
        return self.true.sum(1, keepdim=True).double()

    def auc(self) -> Tensor:
        """Return how often a true entry scores higher than a false one, (B,); equal scores count one half."""
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
        """Return the number of true entries among the highest, the mean over all orders of equal scores.

        Args:
            k: (B, 1) the number of highest entries.

        Returns:
            (B,) a number from 0 to k.
        """
        within = ((k - self.above) / (self.at_least - self.above)).clamp(0, 1)
        return torch.where(self.true, within, 0.0).sum(1)
