"""Counts, means and errors of numbers that come one after the other."""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass
class Tally:
    """The count, the mean and its standard error of numbers that come one after the other.

    Attributes:
        count: How many came.
        mean: Their mean.

    Source:
        Welford 1962: sums of squares would lose the digits of a small spread.

    Example:
        >>> tally = Tally()
        >>> for number in (1.0, 3.0):
        ...     tally.add(number)
        >>> tally.count, tally.mean, tally.error
        (2, 2.0, 1.0)
    """

    count: int = 0
    mean: float = 0.0
    _squares: float = 0.0

    def add(self, number: float) -> None:
        """Add a number."""
        self.count += 1
        step = number - self.mean
        self.mean += step / self.count
        self._squares += step * (number - self.mean)

    @property
    def error(self) -> float:
        """The standard error of the mean; NaN for fewer than two numbers."""
        return math.sqrt(self._squares / (self.count - 1) / self.count) if self.count > 1 else math.nan

    @property
    def least(self) -> float:
        """The mean less two standard errors: a rare word has to speak clearly to be above a frequent one."""
        return self.mean - 2 * self.error

    @property
    def most(self) -> float:
        """The mean and two standard errors."""
        return self.mean + 2 * self.error
