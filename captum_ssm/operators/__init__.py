"""Linear operators on token sequences, and their product.

Given its gates, a gated-linear layer is an affine map of its input. This module holds the factors of that
map. Each is a small frozen value with a product (:meth:`Operator.apply`) and a transposed product
(:meth:`Operator.adjoint`); everything else in the package is derived from these two.

Sizes:
    ``B`` batch, ``L`` tokens, ``D`` channels, ``E`` model width, ``N`` state size, ``K`` taps,
    ``H`` heads, ``P`` channels of one head (``D = H * P``), ``T`` tokens of a chunk, ``J`` columns.

Tensors and indices:
    ``x`` input, ``y`` output, ``u`` output side, ``h`` state; ``t`` time, ``i`` query (row), ``j`` key
    (column), ``d`` channel, ``n`` state. Of a scan: ``a`` decay (A-bar), ``b`` input (B-bar), ``c``
    read-out (C), ``skip`` (D), ``bonus`` (RWKV's u); of a delta scan also ``recall`` and ``erase``.

All operators take ``x`` of shape (..., B, L, channels): dimensions in front of B are further right-hand
sides that share the coefficients.
"""

from captum_ssm.operators.base import Flip, Index, Operator
from captum_ssm.operators.chain import Chain
from captum_ssm.operators.delta import DeltaScan
from captum_ssm.operators.elementary import CausalConv, Centre, Diagonal, Projection
from captum_ssm.operators.heads import Attention, Coefficient, HeadOperator, Product, Recurrence
from captum_ssm.operators.scan import Scan
from captum_ssm.operators.sum import Sum

__all__ = [
    "Attention",
    "CausalConv",
    "Centre",
    "Chain",
    "Coefficient",
    "DeltaScan",
    "Diagonal",
    "Flip",
    "HeadOperator",
    "Index",
    "Operator",
    "Product",
    "Projection",
    "Recurrence",
    "Scan",
    "Sum",
]
