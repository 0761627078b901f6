"""From the token matrices of all layers to one score for each token."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from captum_ssm.attention import TokenMatrix
from captum_ssm.wiring import EMBEDDINGS, Stream, Wiring


@dataclass(frozen=True)
class RolledLayer:
    """One layer of a rollout.

    Args:
        matrix: Its token matrix.
        keep: Weight of the residual path around it, (B, L).
        embedded: Share of what it reads at each token that comes straight from the embeddings, (B, L).
    """

    matrix: TokenMatrix
    keep: Tensor
    embedded: Tensor


def rollout(layer: Callable[[int], RolledLayer], wiring: Wiring, query: Tensor) -> Tensor:
    """Follow the explained positions back through the layers: ``q prod_l rownorm(I + C_l)``.

    Each layer passes the relevance of a token on to the token itself (the residual path) and to the tokens
    that it attends to. Row i is divided by ``1 + |sum_j C_ij|``: for matrices without negative entries that
    is its sum, so relevance is handed on undiminished; for signed ones it bounds what a row adds up to, and
    never changes a sign. Layers side by side share a row: ``rownorm(I + C_1 + C_2)``. A factor of the residual path
    takes the place of the 1; without a residual path there is none.

    Args:
        layer: The layer of a call's number; asked for once for each junction that it takes part in, last ones first.
        wiring: What the layers read.
        query: Weights of the explained positions, (..., B, L); dimensions in front of B are further queries.

    Returns:
        Scores (..., B, L), without any product of two (L, L) matrices. Cost: two products a layer.

    Source:
        Abnar & Zuidema 2020 (arXiv 2005.00928), section 3; for recurrent layers equation 15 of Ali, Zimerman
        & Wolf 2024 (arXiv 2403.01590).
    """
    embeddings = frozenset({EMBEDDINGS})
    one = query.new_ones(query.shape[-2:])  # row sums are shared by several queries of the same sequences
    relevance: dict[Stream, Tensor] = {wiring.output: query}

    def add(stream: Stream, share: Tensor) -> None:
        relevance[stream] = relevance[stream] + share if stream in relevance else share

    for junction in wiring.junctions():
        if junction.stream not in relevance:
            continue
        layers = [layer(number) for number in junction.mixers]
        rows = torch.stack([rolled.matrix.apply(one) for rolled in layers]).sum(0)
        keep = layers[0].keep if junction.base is not None else torch.zeros_like(query)
        whole = keep + rows.abs()
        share = torch.where(whole > 0, relevance.pop(junction.stream) / whole, 0)
        if junction.base is not None:
            add(junction.base, keep * share)
        for number, rolled in zip(junction.mixers, layers):
            back = rolled.matrix.adjoint(share)
            add(wiring.reads[number], back * (1 - rolled.embedded))
            add(embeddings, back * rolled.embedded)
    return relevance.get(embeddings, torch.zeros_like(query))


def mean_row(layers: Iterable[TokenMatrix], query: Tensor) -> Tensor:
    """Return the explained positions' row of the mean matrix of the layers, (B, L)."""
    rows = [matrix.adjoint(query) for matrix in layers]
    return torch.stack(rows).mean(0)
