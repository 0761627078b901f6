"""This package's methods as peers: with the terms of their sums, and with the errors of their layers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.methods import Question, explained
from benchmarks.peers.peer import Explained


def ours(method: Callable[..., Any], references: int = 0, **options: Any) -> Callable[[Question], Explained]:
    """Return one of this package's classes as a peer, see :func:`benchmarks.methods.explained`."""

    def explain(question: Question) -> Explained:
        made, scores = explained(method, question, references, **options)
        return Explained(scores, getattr(made, "terms", {}), max(made.fidelity.values(), default=None))

    return explain
