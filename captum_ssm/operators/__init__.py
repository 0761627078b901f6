"""Linear operators on token sequences, and their product.

Given its gates, a gated-linear layer is an affine map of its input. This package has the factors of that map. Each is a
small frozen value with a product (:meth:`Operator.apply`) and a transposed product (:meth:`Operator.adjoint`); the rest
of the library is derived from these two.

Glossary:
    *operator*: an affine map of token sequences. *Channelwise* operators do not mix channels: they are one (L, L)
    matrix for each channel. *Tokenwise* operators mix channels within a token, never tokens.

    *chain*: a product of named operators, its *factors*, in the order of the equation.

    *head*: a group of channels that share one matrix.

    *recurrence*: an operator with a state that decays and is written and read at each token. Its *coefficients* are
    weights by token, head and state, each a product of *factors*.

    *chunk*: neighbouring tokens that a recurrence treats at once.

Sizes:
    ``B`` batch, ``L`` tokens, ``D`` channels, ``E`` model width, ``N`` state size, ``K`` taps,
    ``H`` heads, ``P`` channels of one head (``D = H * P``), ``T`` tokens of a chunk, ``J`` columns.

Tensors and indices:
    ``x`` input, ``y`` output, ``u`` output side, ``v`` input side, ``h`` state, ``g`` gradient or multiplier of the
    state; ``t`` time, ``i`` query (row), ``j`` key (column), ``d`` channel, ``n`` state. Of a scan: ``a`` decay
    (A-bar), ``b`` input weight (B-bar), ``c`` read-out weight (C), ``skip`` (D), ``bonus`` (RWKV's u); of a delta scan
    also ``recall``, the key that is looked up, and ``erase``, the direction in which the recalled value is subtracted.

All operators take ``x`` of shape (..., B, L, channels): axes in front of B are further right-hand sides with the same
coefficients.
"""

from captum_ssm.operators.attention import Attention, SoftmaxAttention
from captum_ssm.operators.base import Flip, Index, Operator, Rearranged, Reordered
from captum_ssm.operators.chain import Chain
from captum_ssm.operators.coefficient import Coefficient, Product
from captum_ssm.operators.delta import DeltaScan
from captum_ssm.operators.elementary import CausalConv, Centre, Conv, Diagonal, Projection
from captum_ssm.operators.heads import HeadOperator
from captum_ssm.operators.recurrence import Recurrence
from captum_ssm.operators.scan import Scan
from captum_ssm.operators.sum import Sum

__all__ = [
    "Attention",
    "CausalConv",
    "Centre",
    "Chain",
    "Coefficient",
    "Conv",
    "DeltaScan",
    "Diagonal",
    "Flip",
    "HeadOperator",
    "Index",
    "Operator",
    "Product",
    "Projection",
    "Rearranged",
    "Recurrence",
    "Reordered",
    "Scan",
    "SoftmaxAttention",
    "Sum",
]
