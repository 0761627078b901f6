"""Rows of the functions that a rule treats by their kind, and of those that need no rule."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from captum_ssm.relevance.functions.complex_numbers import (
    complex_power,
    exponential,
    inverse,
    logarithm,
    modulus,
    square,
    square_root,
)
from captum_ssm.relevance.functions.order import clamped, largest, median, nanmedian, smallest
from captum_ssm.relevance.functions.powers import power
from captum_ssm.relevance.functions.sums_of_products import einsum
from captum_ssm.relevance.functions.table import FUNCTIONS, Function, Kind, OtherKind
from captum_ssm.relevance.multipliers import adjoint_of_matmul, adjoint_of_mul
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
    Function("sum_to_size", "linear", contraction=True, constants_from=1),
)
_declare("linear", "expand_as view_as reshape_as", constants_from=1)
_declare("linear", "nansum nanmean trace", contraction=True)
_declare("linear", "rsub subtract neg negative positive cumsum diff deg2rad rad2deg")
_declare("linear", "view reshape flatten unflatten ravel expand broadcast_to squeeze unsqueeze")
_declare("linear", "atleast_1d atleast_2d atleast_3d broadcast_tensors meshgrid as_strided")
_declare("linear", "transpose permute movedim moveaxis swapaxes swapdims t T mT H mH adjoint")
_declare("linear", "flip fliplr flipud reversed rot90 roll repeat tile repeat_interleave channel_shuffle")
_declare("linear", "split split_with_sizes tensor_split chunk dsplit hsplit vsplit unbind unfold")
_declare(
    "linear", "unsafe_chunk unsafe_split unsafe_split_with_sizes cat concat concatenate stack hstack vstack dstack"
)
_declare("linear", "column_stack row_stack block_diag cartesian_prod combinations pad constant_pad_nd select narrow")
_declare("linear", "diagonal linalg_diagonal diag diagflat diag_embed tril triu getitem gather take take_along_dim")
_declare("linear", "index_select index_add index_copy index_put index_fill put scatter scatter_add where")
_declare("linear", "select_scatter slice_scatter diagonal_scatter fill_diagonal")
_declare("linear", "masked_fill masked_select masked_scatter copy fill zero clone contiguous nan_to_num")
_declare("linear", "alias_copy as_strided_copy diagonal_copy expand_copy narrow_copy permute_copy select_copy")
_declare("linear", "slice_copy split_copy split_with_sizes_copy squeeze_copy t_copy transpose_copy unbind_copy")
_declare("linear", "unfold_copy unsqueeze_copy view_copy")
_declare("linear", "avg_pool1d avg_pool2d avg_pool3d fold", contraction=True)
_declare("linear", "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_avg_pool3d", contraction=True)
_declare("linear", "pixel_shuffle pixel_unshuffle interpolate pad_sequence")
_declare("linear", "affine_grid affine_grid_generator", contraction=True)
_declare("linear", "grid_sample grid_sampler grid_sampler_2d grid_sampler_3d", linear_in=0)
_declare("linear", "real imag conj conj_physical resolve_conj resolve_neg complex view_as_real view_as_complex")
_declare("linear", "view_as_real_copy fft_fftshift fft_ifftshift")
_declare("linear", "fft_fft fft_ifft fft_rfft fft_irfft fft_hfft fft_ihfft", contraction=True)
_declare("linear", "stft istft gradient", contraction=True, linear_in=0)
_declare("linear", "fft_fft2 fft_ifft2 fft_rfft2 fft_irfft2 fft_hfft2 fft_ihfft2", contraction=True)
_declare("linear", "fft_fftn fft_ifftn fft_rfftn fft_irfftn fft_hfftn fft_ihfftn", contraction=True)

# --- Linear in each of two tensors --------------------------------------------------------------------------------


def _linear(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = input @ weight.mT
    return y if bias is None else y + bias


FUNCTIONS.declare(
    Function("mul", "product", aliases=("rmul",), in_place=("imul",), adjoint=adjoint_of_mul, shared=True),
    Function("matmul", "product", contraction=True, adjoint=adjoint_of_matmul),
    Function("mm", "product", contraction=True, adjoint=adjoint_of_matmul),
    Function("bmm", "product", contraction=True, adjoint=adjoint_of_matmul),
    Function("linear", "product", contraction=True, composition=_linear, factors=1, shared=True),
    Function("einsum", "product", contraction=True, composition=einsum),
    Function("linalg_matmul", "product", aliases=("rmatmul",), contraction=True),  # the second's factors are reversed
    Function("linalg_cross", "product"),
    Function("causal_convolution", "product", shared=True),  # of captum_ssm.operators
)
_declare("product", "conv_tbc", contraction=True, factors=1)
_declare("product", "mv dot vdot inner tensordot linalg_vecdot grouped_mm grouped_mm_fallback", contraction=True)
_declare("product", "trapz trapezoid cumulative_trapezoid", contraction=True)
_declare("product", "multiply outer ger kron cross")

# --- Of each entry ------------------------------------------------------------------------------------------------

FUNCTIONS.declare(
    Function("rsqrt", "elementwise", slope=slope_of_rsqrt, origin="inverse"),
    Function("reciprocal", "elementwise", slope=slope_of_reciprocal, origin="inverse", of_complex=inverse),
    Function("sqrt", "elementwise", slope=slope_of_sqrt, of_complex=square_root),
    Function("square", "elementwise", slope=slope_of_square, of_complex=square),
    Function("pow", "elementwise", slope=slope_of_pow, in_place=("ipow",), composition=power, of_complex=complex_power),
    Function("abs", "elementwise", slope=slope_of_abs, of_complex=modulus),
    Function("absolute", "elementwise", slope=slope_of_abs, of_complex=modulus),
    Function("exp", "elementwise", slope=slope_of_exp, of_complex=exponential),
    Function("log", "elementwise", slope=slope_of_log, of_complex=logarithm),
    Function("sigmoid", "elementwise", slope=slope_of_sigmoid),
    Function("special_expit", "elementwise", slope=slope_of_sigmoid),
    Function("tanh", "elementwise", slope=slope_of_tanh),
    Function("softplus", "elementwise", slope=slope_of_softplus),
    Function("silu", "elementwise", slope=slope_of_silu),
    Function("gelu", "elementwise", slope=slope_of_gelu),
    Function("relu", "elementwise", slope=slope_of_relu),
)
_declare("elementwise", "clamp clip", slope=slope_of_clamp, composition=clamped)
_declare("elementwise", "clamp_min", slope=slope_of_clamp, composition=torch.maximum)
_declare("elementwise", "clamp_max", slope=slope_of_clamp, composition=torch.minimum)
_declare("elementwise", "exp2 expm1 log2 log10 log1p log_sigmoid logit sign sinc")
_declare("elementwise", "float_power", composition=power, of_complex=complex_power)
_declare("elementwise", "sin cos tan asin acos atan arcsin arccos arctan")
_declare("elementwise", "sinh cosh asinh acosh atanh arcsinh arccosh arctanh")
_declare("elementwise", "erf erfc erfinv lgamma digamma polygamma i0")
_declare("elementwise", "special_exp2 special_expm1 special_log1p special_logit special_sinc special_entr")
_declare(
    "elementwise", "special_erf special_erfc special_erfcx special_erfinv special_ndtr special_ndtri special_log_ndtr"
)
_declare("elementwise", "special_gammaln special_digamma special_psi special_polygamma")
_declare("elementwise", "special_i0 special_i0e special_i1 special_i1e")
_declare("elementwise", "relu6 leaky_relu elu selu celu mish hardswish hardsigmoid hardtanh softsign tanhshrink")
_declare("elementwise", "softshrink hardshrink threshold")

# --- Constants, types and forms -----------------------------------------------------------------------------------

_declare("constant", "zeros_like ones_like empty_like full_like rand_like randn_like")
_declare("constant", "new_zeros new_ones new_empty new_full")
_declare("cast", "to type_as", constants_from=1)
_declare("cast", "cpu cuda type float double half bfloat16 cfloat cdouble chalf pin_memory ipu mtia xpu")
_declare("form", "shape dtype device ndim ndimension dim size numel nelement is_floating_point is_complex layout")
_declare("form", "itemsize element_size nbytes stride storage_offset is_contiguous get_device")
_declare("form", "is_cpu is_cuda is_ipu is_maia is_meta is_mkldnn is_mps is_mtia is_vulkan is_xla is_xpu is_pinned")
_declare("form", "is_sparse is_sparse_csr is_coalesced is_quantized is_nested is_conj is_neg is_signed is_distributed")
_declare("form", "is_inference is_leaf is_view is_shared is_same_size is_set_to dim_order dense_dim sparse_dim")

# --- Decisions ----------------------------------------------------------------------------------------------------

FUNCTIONS.declare(
    Function("max", "selection", axis=1, composition=largest),
    Function("min", "selection", axis=1, composition=smallest),
    Function("median", "selection", axis=1, composition=median),
    Function("nanmedian", "selection", axis=1, composition=nanmedian),
    Function("mode", "selection", axis=1),
)
_declare("selection", "sort cummax cummin", axis=1)
_declare("selection", "topk kthvalue", axis=2)
_declare("step", "floor ceil round trunc fix special_round")
for _window in (1, 2, 3):
    _names = f"max_pool{_window}d_with_indices adaptive_max_pool{_window}d_with_indices"
    _declare("selection", _names, window=_window)

# --- Autograd, this package, and other libraries ------------------------------------------------------------------

_declare("mark", "requires_grad retain_grad")
_declare("method", "recur secant weighted_sums")  # of captum_ssm.operators and captum_ssm.layers
_declare("method", "averages upper_bound normalized_exponentials log_of_sum")  # of captum_ssm.layers
_declare("outside", "data_ptr const_data_ptr numpy array array_wrap dlpack dlpack_device set backward register_hook")
_declare("outside", "storage untyped_storage storage_type share_memory deepcopy reduce_ex setstate record_stream")
_declare("outside", "register_post_accumulate_grad_hook")
