"""Rows of the functions that a rule treats by their kind, and of those that need no rule."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from captum_ssm.relevance.functions.table import FUNCTIONS, Function, Kind, OtherKind
from captum_ssm.relevance.slopes import (
    slope_of_abs,
    slope_of_clamp,
    slope_of_exp,
    slope_of_gelu,
    slope_of_log,
    slope_of_pow,
    slope_of_reciprocal,
    slope_of_relu,
    slope_of_rsqrt,
    slope_of_sigmoid,
    slope_of_silu,
    slope_of_softplus,
    slope_of_sqrt,
    slope_of_square,
    slope_of_tanh,
)


def _declare(kind: Kind | OtherKind, names: str, **columns: Any) -> None:
    """Declare one row for each name, all with the same columns."""
    FUNCTIONS.declare(*(Function(name, kind, **columns) for name in names.split()))


# --- Linear in their tensors together -----------------------------------------------------------------------------

FUNCTIONS.declare(
    Function("add", "linear", aliases=("radd",), in_place=("iadd",), shared=True),
    Function("sub", "linear", in_place=("isub",)),
    Function("sum", "linear", contraction=True),
    Function("mean", "linear", contraction=True),
    Function("setitem", "linear", in_place=("setitem",)),
)
_declare("linear", "expand_as view_as reshape_as", constants_from=1)
_declare("linear", "rsub subtract neg negative positive nansum cumsum diff")
_declare("linear", "view reshape flatten unflatten ravel expand broadcast_to squeeze unsqueeze")
_declare("linear", "transpose permute movedim swapaxes swapdims t T mT H mH flip roll repeat tile repeat_interleave")
_declare("linear", "split split_with_sizes tensor_split chunk unbind unfold cat concat concatenate stack hstack vstack")
_declare("linear", "dstack pad constant_pad_nd select narrow diagonal diag_embed tril triu getitem gather")
_declare("linear", "take_along_dim index_select index_add index_copy index_put index_fill scatter scatter_add where")
_declare("linear", "masked_fill masked_select masked_scatter copy fill zero clone contiguous detach data real")
_declare("linear", "nan_to_num dropout avg_pool1d adaptive_avg_pool1d upsample interpolate")

# --- Linear in each of two tensors --------------------------------------------------------------------------------


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = input @ weight.mT
    return y if bias is None else y + bias


FUNCTIONS.declare(
    Function("mul", "product", aliases=("rmul",), in_place=("imul",), shared=True),
    Function("matmul", "product", aliases=("rmatmul",), contraction=True),
    Function("linear", "product", contraction=True, composition=_linear, shared=True),
    Function("conv1d", "product", contraction=True, one_factor=True),
    Function("conv2d", "product", one_factor=True),
    Function("causal_convolution", "product", shared=True),  # of captum_ssm.operators
)
_declare("product", "mm bmm einsum grouped_mm", contraction=True)
_declare("product", "multiply mv dot inner outer tensordot linalg_vecdot kron grouped_mm_fallback")

# --- Of each entry ------------------------------------------------------------------------------------------------

FUNCTIONS.declare(
    Function("rsqrt", "elementwise", slope=slope_of_rsqrt, origin="inverse"),
    Function("reciprocal", "elementwise", slope=slope_of_reciprocal, origin="inverse"),
    Function("sqrt", "elementwise", slope=slope_of_sqrt),
    Function("square", "elementwise", slope=slope_of_square),
    Function("pow", "elementwise", slope=slope_of_pow, in_place=("ipow",)),
    Function("abs", "elementwise", slope=slope_of_abs),
    Function("absolute", "elementwise", slope=slope_of_abs),
    Function("exp", "elementwise", slope=slope_of_exp),
    Function("log", "elementwise", slope=slope_of_log),
    Function("sigmoid", "elementwise", slope=slope_of_sigmoid),
    Function("special_expit", "elementwise", slope=slope_of_sigmoid),
    Function("tanh", "elementwise", slope=slope_of_tanh),
    Function("softplus", "elementwise", slope=slope_of_softplus),
    Function("silu", "elementwise", slope=slope_of_silu),
    Function("gelu", "elementwise", slope=slope_of_gelu),
    Function("relu", "elementwise", slope=slope_of_relu),
)
_declare("elementwise", "clamp clip clamp_min clamp_max", slope=slope_of_clamp)
_declare("elementwise", "exp2 expm1 log2 log10 log1p float_power log_sigmoid logit sign")
_declare("elementwise", "sin cos sinh cosh asinh arctan atan erf special_erf special_ndtr")
_declare("elementwise", "relu6 leaky_relu elu selu celu mish hardswish hardsigmoid hardtanh softsign tanhshrink")
_declare("elementwise", "softshrink hardshrink threshold")

# --- Constants, types and forms -----------------------------------------------------------------------------------

_declare("constant", "zeros_like ones_like empty_like full_like rand_like randn_like")
_declare("constant", "new_zeros new_ones new_empty new_full")
_declare("cast", "to type_as", constants_from=1)
_declare("cast", "cpu cuda type float double half bfloat16")
_declare("form", "shape dtype device ndim dim size numel is_floating_point")

# --- Decisions ----------------------------------------------------------------------------------------------------

_declare("selection", "sort max min median", axis=1)
_declare("selection", "topk kthvalue", axis=2)

# --- Autograd, this package, and other libraries ------------------------------------------------------------------

_declare("mark", "requires_grad retain_grad")
_declare("method", "recur secant")  # of captum_ssm.operators and captum_ssm.layers
_declare("method", "averages upper_bound normalized_exponentials log_of_sum")  # of captum_ssm.layers
_declare("outside", "data_ptr numpy array dlpack set backward register_hook")
