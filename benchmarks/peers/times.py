"""What one explanation costs, in forward passes of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch

from benchmarks.peers.families import asked, own, tried
from benchmarks.peers.peer import Peer
from benchmarks.speed.models import TARGET, delta_hybrid, forward_pass, mamba, mamba2, random_ids
from benchmarks.speed.timing import ratios

L, LAYERS, WIDTH, ROUNDS = 32, 2, 64, 3
MODELS: dict[str, Callable[..., Any]] = {"Mamba": mamba, "Mamba-2": mamba2, "delta hybrid": delta_hybrid}


def measured(peers: Mapping[str, Peer]) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the shortest time of each peer in that of a forward pass without gradients, by the name of the model.

    All explain one sequence of L tokens, compared with another token everywhere. A peer that does not explain the model
    has no figure.
    """
    ids = random_ids(L)
    for name, create in MODELS.items():
        model = create(LAYERS, WIDTH).requires_grad_(False)
        question = asked(model, ids, torch.full_like(ids, 1), TARGET)
        able = {peer: found for peer, found in peers.items() if "refused" not in tried(found, own(question))}
        calls = {peer: partial(found.explain, own(question)) for peer, found in able.items()}
        taken = ratios(calls, forward_pass(model, ids), ROUNDS)
        yield name, {peer: float(f"{ratio:.2g}") for peer, ratio in taken.items()}
