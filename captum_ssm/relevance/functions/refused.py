"""Functions that have no rule, with the reason; and those whose results are decisions of the input.

A function that is in no row is treated like a decision, so it is refused if its result has floating-point numbers. The
lists here say for every function of torch which it is.
"""

from __future__ import annotations

from captum_ssm.relevance.functions.table import FUNCTIONS, Function

REASONS: dict[str, str] = {
    "it is random": """
        bernoulli binomial multinomial normal poisson gumbel_softmax native_dropout fractional_max_pool2d
        fractional_max_pool2d_with_indices fractional_max_pool3d fractional_max_pool3d_with_indices cauchy
        exponential geometric log_normal random uniform svd_lowrank pca_lowrank lobpcg""",
    "an inverse, a decomposition or a function of a whole matrix has no rule": """
        inverse pinverse cholesky cholesky_inverse cholesky_solve det logdet slogdet geqrf lu lu_solve
        lu_unpack matrix_exp orgqr ormqr qr svd triangular_solve nuclear_norm linalg_cholesky
        linalg_cholesky_ex linalg_cond linalg_det linalg_eig linalg_eigh linalg_eigvals linalg_eigvalsh
        linalg_householder_product linalg_inv linalg_inv_ex linalg_ldl_factor linalg_ldl_factor_ex
        linalg_ldl_solve linalg_lstsq linalg_lu linalg_lu_factor linalg_lu_factor_ex linalg_lu_solve
        linalg_matrix_exp linalg_matrix_rank linalg_pinv linalg_qr linalg_slogdet linalg_solve_ex linalg_svd
        linalg_svdvals linalg_tensorinv linalg_tensorsolve linalg_vander""",
    "torch has no derivative of it, or of one of its arguments": """
        igamma igammac nextafter special_airy_ai special_bessel_j0 special_bessel_j1 special_bessel_y0
        special_bessel_y1 special_chebyshev_polynomial_t special_chebyshev_polynomial_u
        special_chebyshev_polynomial_v special_chebyshev_polynomial_w special_gammainc special_gammaincc
        special_hermite_polynomial_h special_hermite_polynomial_he special_laguerre_polynomial_l
        special_legendre_polynomial_p special_modified_bessel_i0 special_modified_bessel_i1
        special_modified_bessel_k0 special_modified_bessel_k1 special_scaled_modified_bessel_k0
        special_scaled_modified_bessel_k1 special_shifted_chebyshev_polynomial_t
        special_shifted_chebyshev_polynomial_u special_shifted_chebyshev_polynomial_v
        special_shifted_chebyshev_polynomial_w special_spherical_bessel_j0 special_zeta""",
    "it counts or picks entries, in a number that the input decides": """
        histc histogram histogramdd hash_tensor unique unique_consecutive nanquantile frexp""",
    "no definition in other functions has been written": "ctc_loss embedding_bag index_reduce multilabel_margin_loss",
    "its sequences are packed; pad them instead": "pack_padded_sequence pad_packed_sequence",
    "it works on integers, or on a sparse, nested or quantized tensor": """
        choose_qparams_optimized coalesce dequantize fake_quantize_per_channel_affine
        fake_quantize_per_tensor_affine fbgemm_linear_fp16_weight fbgemm_linear_fp16_weight_fp32_activation
        fbgemm_linear_int8_weight fbgemm_linear_int8_weight_fp32_activation fbgemm_linear_quantize_weight
        fbgemm_pack_gemm_matrix_fp16 fbgemm_pack_quantized_matrix fused_moving_avg_obs_fake_quant hsmm
        int_repr quantize_per_channel quantize_per_tensor quantize_per_tensor_dynamic quantized_batch_norm
        quantized_gru_cell quantized_lstm_cell quantized_max_pool1d quantized_max_pool2d
        quantized_max_pool3d quantized_rnn_relu_cell quantized_rnn_tanh_cell saddmm smm sparse_mask
        sparse_mask_projection sparse_resize sparse_resize_and_clear to_dense to_sparse values values_copy
        indices indices_copy resize_as_sparse ccol_indices ccol_indices_copy col_indices col_indices_copy
        crow_indices crow_indices_copy row_indices row_indices_copy nnz nested_tensor_size
        nested_tensor_storage_offsets nested_tensor_strides q_per_channel_axis q_per_channel_scales
        q_per_channel_zero_points q_scale q_zero_point qscheme sym_float sym_int sym_ite sym_max sym_min
        sym_not sym_sqrt sym_sum iand ior ixor lshift rshift ilshift irshift rlshift rrshift ror rxor""",
    "a kernel of one device or of autograd: call the function that torch.nn.functional has": """
        batch_norm_backward_elemt batch_norm_backward_reduce batch_norm_elemt batch_norm_gather_stats
        batch_norm_gather_stats_with_counts batch_norm_stats batch_norm_update_stats miopen_batch_norm
        miopen_convolution miopen_convolution_add_relu miopen_convolution_relu miopen_convolution_transpose
        miopen_depthwise_convolution miopen_rnn native_batch_norm native_channel_shuffle native_group_norm
        native_layer_norm native_norm to_mkldnn""",
    "it calls Python code for each entry": "apply map map2",
    "it changes how a tensor lies in memory": "as_strided_scatter module_load resize resize_as slice_inverse",
}
"""Names of functions by the reason why they are refused."""

DECISIONS = """
    all allclose any argmax argmin argsort argwhere bincount bitwise_and bitwise_left_shift bitwise_not bitwise_or
    bitwise_right_shift bitwise_xor bool bucketize byte char contains count_nonzero eq equal ge greater
    greater_equal gt int invert isclose isfinite isin isinf isnan isneginf isposinf isreal item le len less
    less_equal logical_and logical_not logical_or logical_xor long lt ne nonzero nonzero_static not_equal one_hot
    searchsorted short signbit tolist and or xor gcd lcm unravel_index is_nonzero index repr format rand
"""
"""Names of functions whose results are positions, truth values or numbers of Python, which the input decides."""

for _reason, _names in REASONS.items():
    FUNCTIONS.declare(*(Function(name, "refused", reason=_reason) for name in _names.split()))
