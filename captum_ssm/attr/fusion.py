"""How the matrices of a layer's channels become one."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor

from captum_ssm.attention import ExplicitAttention, ImplicitAttention, ProductAttention, SumAttention, TokenMatrix
from captum_ssm.attr.view import Cut, LayerView
from captum_ssm.errors import InvalidInputError
from captum_ssm.operators import Chain, Diagonal, Projection

Fusion = Literal["absolute", "mean", "positive", "norm", "root"]
"""Fusion of the channels' matrices ``A^d`` into ``C``:

* ``"absolute"``: ``C_ij = mean_d |A^d_ij|``, as published;
* ``"mean"``: ``C_ij = mean_d A^d_ij``, signed, in linear time;
* ``"positive"``: ``C_ij = mean_d max(A^d_ij, 0)``;
* ``"norm"``: the Euclidean length of what token j adds to token i's output, ``|W_out (A_ij v_j)|``; O(L²·D·(N + E));
* ``"root"``: ``sqrt(sum_d (|w_d| A^d_ij v_jd)²)`` with the columns ``w_d`` of ``W_out``: what ``"norm"`` is where all
  channels write in directions of their own, in the time of ``"absolute"``. The default of rollout and raw attention, as
  ``benchmarks/RESULTS.md`` has it ahead.

Where a layer mixes channels between two factors that mix tokens, as RWKV between its token shift and its recurrence,
there is no matrix for each channel: the factors are fused by themselves, and their matrices multiplied (except for
``"norm"`` and ``"root"``, which need none). Where a layer is a sum of such parts, the parts' matrices are added.
"""


def check_fusion(fusion: str) -> None:
    """Raise if there is no such fusion.

    Raises:
        InvalidInputError: With the names of those that there are.
    """
    if fusion not in get_args(Fusion):
        raise InvalidInputError(f"fusion must be one of {', '.join(get_args(Fusion))}, not {fusion!r}.")


def fuse(layer: LayerView, fusion: Fusion) -> TokenMatrix:
    """Fuse the channels of a layer.

    Raises:
        InvalidInputError: If there is no such fusion.

    Cost: O(L·D·N) for each product with ``"mean"``; else O(L²·D·N) once and O(L²) memory.
    """
    check_fusion(fusion)
    return SumAttention(tuple(_fuse(cut, layer.real, fusion) for cut in layer.cuts))


def _fuse(cut: Cut, real: Tensor, fusion: Fusion) -> TokenMatrix:
    """Fuse the channels of a part of a layer."""
    if fusion == "norm":
        lengths = ImplicitAttention(cut.core, u=cut.v, v=cut.v).lengths(cut.output)
        return ExplicitAttention(lengths * real)
    if fusion == "root":
        weights = _written(cut).sqrt() * real
        return ExplicitAttention(ImplicitAttention(cut.core, weights, cut.v).dense(torch.square).clamp(min=0).sqrt())
    return ProductAttention(tuple(_fuse_channels(core, real, fusion) for core in cut.core.channelwise()))


def _written(cut: Cut) -> Tensor:
    """Return ``|w_d|²``, how much each channel writes to the layer's output, (1 or B, 1 or L, D).

    Of several projections in a row each is taken to keep apart what it gets.
    """
    written = cut.v.new_ones(1, 1, 1)
    for operator in cut.output.leaves():
        if isinstance(operator, Projection):
            written = written.expand(-1, -1, operator.W.shape[0]) @ operator.W.square()
        elif isinstance(operator, Diagonal):
            written = written * operator.s.square()
    return written.expand(-1, -1, cut.channels)


def _fuse_channels(core: Chain, real: Tensor, fusion: Fusion) -> TokenMatrix:
    """Fuse the channels of a channelwise core."""
    channels = next(size for size in core.sizes if size is not None)
    one = real.expand(-1, -1, channels)
    attention = ImplicitAttention(core, u=one / channels, v=one)
    if fusion == "mean":
        return attention
    return ExplicitAttention(attention.dense(torch.abs if fusion == "absolute" else torch.relu))
