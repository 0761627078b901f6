"""From the token matrices of all layers to one score for each token."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from captum_ssm.matrices.split_layer import SplitLayer
from captum_ssm.matrices.token_matrix import RearrangedMatrix, ScaledMatrix, TokenMatrix, rearranged
from captum_ssm.network.graph import EMBEDDINGS, ResidualGraph, Stream


@dataclass(frozen=True)
class RolloutLayer:
    """One layer of a rollout: its matrix, and the factor of the residual path around it.

    Args:
        matrix: Its token matrix.
        keep: Factor of the residual path around it, (B, L).
        embedding_share: Share of its input at each token that comes straight from the embeddings, (B, L).
    """

    matrix: TokenMatrix
    keep: Tensor
    embedding_share: Tensor

    def on_rows(self, rows: Tensor) -> RolloutLayer:
        """Return the layer for relevance in those rows alone, (B, L) of booleans."""
        return replace(self, matrix=self.matrix.on_rows(rows))

    def in_order_of_inputs(self, order: Tensor | None) -> RolloutLayer:
        """Return the layer with its tokens in the order of the inputs.

        Args:
            order: The token of the inputs that each token of the layer is, (B, L), or None if it has the same number.
        """
        if order is None:
            return self
        share = rearranged(self.embedding_share, order.argsort(-1))
        return replace(self, matrix=RearrangedMatrix(self.matrix, order), embedding_share=share)


class RolloutLayers(Protocol):
    """Layers by the number of their call."""

    def __getitem__(self, number: int, /) -> RolloutLayer:
        """Return the layer of this number."""


@dataclass(frozen=True)
class LayersOnStream:
    """Split layers on their residual streams, ``keep * stream + write * mix(stream)``, each made when it is asked for.

    The factors of a wire are applied here and nowhere else.

    Args:
        layers: The split layers.
        matrix: From a layer to its token matrix.
        gradient_weighted: Whether the matrix is weighted by the gradient of the score at the layer's output. That
            gradient has passed the factor ``write`` on its way back, so the matrix has the factor already; any other
            matrix gets it here.
    """

    layers: Sequence[SplitLayer]
    matrix: Callable[[SplitLayer], TokenMatrix]
    gradient_weighted: bool

    def __getitem__(self, number: int) -> RolloutLayer:
        """Split the layer of this number, and make its matrix."""
        layer = self.layers[number]
        matrix, wire, share = self.matrix(layer), layer.wire, layer.embedding_share
        if not self.gradient_weighted:
            matrix = ScaledMatrix(matrix, wire.write)
        return RolloutLayer(matrix, wire.keep * torch.ones_like(share), share)


def rollout(layers: RolloutLayers, graph: ResidualGraph, query: Tensor) -> Tensor:
    """Follow the explained positions back through the layers: ``q prod_l rownorm(I + C_l)``.

    Each layer passes the relevance of a token on to the token itself (the residual path) and to the tokens
    that it attends to. Row i is divided by ``1 + |sum_j C_ij|``: for matrices without negative entries that
    is its sum, so relevance is handed on undiminished; for signed ones it bounds the sum of a row, and
    never changes a sign. Layers side by side share a row: ``rownorm(I + C_1 + C_2)``. A factor of the residual path
    replaces the 1; without a residual path there is none.

    Args:
        layers: The layers by number; each is asked for once for each junction that it takes part in, last ones first.
        graph: Which streams the layers and the output read.
        query: Weights of the explained positions, (..., B, L); dimensions in front of B are further queries.

    Returns:
        Scores (..., B, L), without any product of two (L, L) matrices. Cost: two products a layer.

    Source:
        Abnar & Zuidema 2020 (arXiv 2005.00928), section 3; for recurrent layers equation 15 of Ali, Zimerman
        & Wolf 2024 (arXiv 2403.01590).
    """
    embeddings = frozenset({EMBEDDINGS})
    one = query.new_ones(query.shape[-2:])  # row sums are shared by several queries of the same sequences
    relevance: dict[Stream, Tensor] = {graph.output: query}

    def add(stream: Stream, share: Tensor) -> None:
        relevance[stream] = relevance[stream] + share if stream in relevance else share

    for junction in graph.junctions():
        if junction.stream not in relevance:
            continue
        rows = _with_relevance(relevance[junction.stream])
        parallel = [layers[number].in_order_of_inputs(graph.order(number)).on_rows(rows) for number in junction.mixers]
        row_sums = torch.stack([layer.matrix.apply(one) for layer in parallel]).sum(0)
        keep = parallel[0].keep if junction.base is not None else torch.zeros_like(query)
        total = keep + row_sums.abs()
        share = torch.where(total > 0, relevance.pop(junction.stream) / total, 0)
        if junction.base is not None:
            add(junction.base, keep * share)
        for number, layer in zip(junction.mixers, parallel):
            back = layer.matrix.adjoint(share)
            add(graph.reads[number], back * (1 - layer.embedding_share))
            add(embeddings, back * layer.embedding_share)
    return relevance.get(embeddings, torch.zeros_like(query))


def mean_row(layers: Iterable[TokenMatrix], query: Tensor) -> Tensor:
    """Return the explained positions' row of the mean matrix of the layers, (B, L)."""
    rows = [matrix.on_rows(_with_relevance(query)).adjoint(query) for matrix in layers]
    return torch.stack(rows).mean(0)


def _with_relevance(relevance: Tensor) -> Tensor:
    """Return where any of several relevances (..., B, L) is not 0, (B, L)."""
    return relevance.ne(0).reshape(-1, *relevance.shape[-2:]).any(0)
