"""From the token matrices of all layers to one score for each token."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from captum_ssm.attention import TokenMatrix


def rollout(layers: Iterable[TokenMatrix], query: Tensor) -> Tensor:
    """Follow the explained positions back through the layers: ``q prod_l rownorm(I + C_l)``.

    Each layer passes the relevance of a token on to the token itself (the residual path) and to the tokens
    that it attends to. Row i is divided by ``1 + |sum_j C_ij|``: for matrices without negative entries that
    is its sum, so relevance is handed on undiminished; for signed ones it bounds what a row adds up to, and
    never changes a sign.

    Args:
        layers: One matrix a layer, the last layer first.
        query: Weights of the explained positions, (B, L).

    Returns:
        Scores (B, L), without any product of two (L, L) matrices. Cost: two products a layer.

    Source:
        Abnar & Zuidema 2020 (arXiv 2005.00928), section 3; for recurrent layers equation 15 of Ali, Zimerman
        & Wolf 2024 (arXiv 2403.01590).
    """
    relevance = query
    for matrix in layers:
        share = relevance / (1 + matrix.apply(torch.ones_like(relevance)).abs())
        relevance = share + matrix.adjoint(share)
    return relevance


def mean_row(layers: Iterable[TokenMatrix], query: Tensor) -> Tensor:
    """Return the explained positions' row of the mean matrix of the layers, (B, L)."""
    rows = [matrix.adjoint(query) for matrix in layers]
    return torch.stack(rows).mean(0)
