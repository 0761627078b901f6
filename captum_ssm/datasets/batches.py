"""Rows into batches of similar length: a function of the rows alone, so that each engine makes the same ones."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from itertools import groupby

BATCH_TOKENS = 512
"""Tokens of a batch, padding included: on a CPU larger ones leave its caches and are slower for each token."""

BATCH_ROWS = 64
"""Rows of a batch at most."""


def batches(
    keys: Sequence[tuple[Hashable, int]], tokens: int = BATCH_TOKENS, rows: int = BATCH_ROWS
) -> list[list[int]]:
    """Cut rows into batches.

    Args:
        keys: For each row the key that all rows of its batch share, and its length.
        tokens: Largest number of rows times the longest of them; a longer row has a batch of its own.
        rows: Largest number of rows.

    Returns:
        The numbers of the rows of each batch, the shortest first. Together they are all rows once.

    Example:
        >>> batches([("a", 3), ("a", 9), ("b", 3), ("a", 4), ("a", 10)], tokens=20)
        [[0, 3], [1, 4], [2]]
    """
    kinds = {key: number for number, key in enumerate(dict.fromkeys(key for key, _ in keys))}
    order = sorted(range(len(keys)), key=lambda row: (kinds[keys[row][0]], keys[row][1], row))
    found: list[list[int]] = []
    for _, same in groupby(order, key=lambda row: keys[row][0]):
        batch: list[int] = []
        for row in same:
            if batch and ((len(batch) + 1) * keys[row][1] > tokens or len(batch) == rows):
                found.append(batch)
                batch = []
            batch.append(row)
        found.append(batch)
    return found
