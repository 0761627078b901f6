"""What a peer finds on the benchmark's tasks, for those that the benchmark does not have anyway."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from typing import Any

from torch import Tensor

from benchmarks.methods import NotApplicableError, Question
from benchmarks.peers.peer import Peer, in_parts
from benchmarks.run import case, marked, names

MODELS = ("mamba", "vision_mamba")
"""The models: the one family that all peers for texts explain, and that of the images."""
SIZE = 10
"""Inputs that are explained at once: an effective attention takes memory for each channel, state and pair of tokens."""


def measured(peers: Mapping[str, Peer]) -> Iterator[dict[str, Any]]:
    """Yield a record as ``benchmarks/data`` has them for each model, with the peers that have no figures there."""
    new = {name: peer for name, peer in peers.items() if peer.stored is None}
    for task, family, seed in names():
        if family not in MODELS:
            continue
        asked = case(task, family, seed)
        if isinstance(asked, float):
            continue
        methods: dict[str, dict[str, Any] | None] = {}
        for name, peer in new.items():
            try:
                methods[name] = marked(asked, in_parts(partial(scores, peer), SIZE))
            except NotApplicableError:
                methods[name] = None
        yield {"task": task, "family": family, "seed": seed, "methods": methods}


def scores(peer: Peer, question: Question) -> Tensor:
    """Return the scores alone."""
    return peer.explain(question).scores
