"""How the matrices of a layer's channels become one."""

from __future__ import annotations

from typing import Literal, get_args

from torch import Tensor

from captum_ssm.errors import InvalidInputError
from captum_ssm.matrices.core_matrix import CoreMatrix, FusedMatrix
from captum_ssm.matrices.entrywise import ABSOLUTE, POSITIVE, SQUARE
from captum_ssm.matrices.split_layer import Split, SplitLayer
from captum_ssm.matrices.token_matrix import DenseMatrix, MatrixProduct, MatrixSum, TokenMatrix
from captum_ssm.operators import Chain, Diagonal, Projection

Fusion = Literal["absolute", "mean", "positive", "norm", "root"]
"""Fusion of the channels' matrices ``A^d`` into ``C``:

* ``"absolute"``: ``C_ij = mean_d |A^d_ij|``, as published;
* ``"mean"``: ``C_ij = mean_d A^d_ij``, signed, in linear time;
* ``"positive"``: ``C_ij = mean_d max(A^d_ij, 0)``;
* ``"norm"``: the Euclidean length of token j's contribution to token i's output, ``|W_out (A_ij v_j)|``;
  O(L²·D·(N + E));
* ``"root"``: ``sqrt(sum_d (|w_d| A^d_ij v_jd)²)`` with the columns ``w_d`` of ``W_out``: equal to ``"norm"`` if the
  channels write in orthogonal directions, in the time of ``"absolute"``. The default of rollout and raw attention, as
  ``benchmarks/RESULTS.md`` has it ahead.

If a layer mixes channels between two factors that mix tokens, as RWKV between its token shift and its recurrence,
there is no matrix for each channel: each of these factors is fused separately, and their matrices multiplied (except
for ``"norm"`` and ``"root"``, which need none). If a layer is a sum of such parts, the parts' matrices are added.
"""


def check_fusion(fusion: str) -> None:
    """Raise if there is no such fusion.

    Raises:
        InvalidInputError: With the names of those that there are.
    """
    if fusion not in get_args(Fusion):
        raise InvalidInputError(f"fusion must be one of {', '.join(get_args(Fusion))}, not {fusion!r}.")


def fuse(layer: SplitLayer, fusion: Fusion) -> TokenMatrix:
    """Fuse the channels of a layer.

    Args:
        layer: The split layer.
        fusion: How, see :data:`Fusion`.

    Returns:
        The layer's matrix (B, L, L), the sum over its splits.

    Raises:
        InvalidInputError: If there is no such fusion.

    Cost: O(L·D·N) for each product with ``"mean"``; else O(L²·D·N) once and O(L²) memory.
    """
    check_fusion(fusion)
    return MatrixSum(tuple(_fuse(split, layer.mask, fusion) for split in layer.splits))


def _fuse(split: Split, mask: Tensor, fusion: Fusion) -> TokenMatrix:
    """Fuse the channels of one summand of a layer."""
    if fusion == "norm":
        lengths = CoreMatrix(split.core, u=split.v, v=split.v).lengths(split.output)
        return DenseMatrix(lengths * mask)
    if fusion == "root":
        weights = _squared_column_norms(split).sqrt() * mask  # (B, L, D)
        return FusedMatrix(CoreMatrix(split.core, weights, split.v), SQUARE, lambda sums: sums.clamp(min=0).sqrt())
    return MatrixProduct(tuple(_fuse_channels(core, mask, fusion) for core in split.core.channelwise()))


def _squared_column_norms(split: Split) -> Tensor:
    """Return ``|w_d|²``, how much each channel writes to the layer's output, (1 or B, 1 or L, D).

    Several projections in a row are taken as if each kept its input channels in orthogonal directions.
    """
    squares = split.v.new_ones(1, 1, 1)
    for operator in split.output.leaves():
        if isinstance(operator, Projection):
            squares = squares.expand(-1, -1, operator.W.shape[0]) @ operator.W.square()
        elif isinstance(operator, Diagonal):
            squares = squares * operator.s.square()
    return squares.expand(-1, -1, split.channels)


def _fuse_channels(core: Chain, mask: Tensor, fusion: Fusion) -> TokenMatrix:
    """Fuse the channels of a channelwise core."""
    channels = next(size for size in core.sizes if size is not None)
    one = mask.expand(-1, -1, channels)
    matrix = CoreMatrix(core, u=one / channels, v=one)
    if fusion == "mean":
        return matrix
    return FusedMatrix(matrix, ABSOLUTE if fusion == "absolute" else POSITIVE)
