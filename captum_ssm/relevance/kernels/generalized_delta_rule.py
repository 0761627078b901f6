"""The operators of flash-linear-attention with transitions that are diagonal plus a product of two vectors: RWKV-7."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_ssm.operators import DeltaScan, Product
from captum_ssm.relevance.kernels.kernel import kernel
from captum_ssm.relevance.kernels.over_heads import over_heads


@kernel("chunk_dplr_delta_rule", "fused_recurrent_dplr_delta_rule", gk="g", ignored="lower_bound")
@kernel("chunk_rwkv7", "fused_recurrent_rwkv7", r="q", w="g", ignored="lower_bound")
def diagonal_plus_low_rank(
    q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, g: Tensor | None, scale: float | None = None
) -> Tensor:
    """Run ``h_t = (diag(exp(g_t)) + b_t a_t^T) h_{t-1} + k_t v_t``, ``y_t = scale <q_t, h_t>``.

    Args:
        q: Queries (B, L, H, N).
        k: Keys (B, L, H, N).
        v: Values (B, L, H, P).
        a: Keys that are looked up in the state (B, L, H, N).
        b: Directions in which the value found is added (B, L, H, N).
        g: Logarithms of the decays (B, L, H, N); None for no decay.
        scale: Of the queries; None for one over the root of N.

    Returns:
        (B, L, H, P).

    Source:
        flash-linear-attention ``ops/generalized_delta_rule``; Peng et al. 2025 (arXiv 2503.14456).
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    log_a = torch.zeros_like(v[:1, :1, :1, :1]) if g is None else g
    scan = DeltaScan(a=Product((log_a,), exponential=True), b=k, c=q * scale, recall=a, erase=-b, head_size=v.shape[-1])
    return over_heads(scan, v)


@kernel("chunk_iplr_delta_rule", "fused_recurrent_iplr_delta_rule")
def identity_plus_low_rank(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, scale: float | None = None) -> Tensor:
    """Run :func:`diagonal_plus_low_rank` without decay."""
    return diagonal_plus_low_rank(q, k, v, a, b, None, scale)


@kernel("fused_mul_recurrent_rwkv7", r="q", w="g")
def rwkv7(q: Tensor, k: Tensor, v: Tensor, kk: Tensor, a: Tensor, g: Tensor, scale: float | None = None) -> Tensor:
    """Run :func:`diagonal_plus_low_rank` that erases the value found at ``kk`` in the direction ``kk * a``."""
    return diagonal_plus_low_rank(q, k, v, -kk, kk * a, g, scale)
