"""The operators of flash-linear-attention that erase before they write: the delta rule and its generalisations."""

from __future__ import annotations

from typing import NoReturn

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.errors import UnsupportedModelError
from captum_ssm.layers.delta_rule import log_decay, unit
from captum_ssm.layers.heads import to_heads
from captum_ssm.operators import DeltaScan, Product
from captum_ssm.relevance.kernels.kernel import kernel
from captum_ssm.relevance.kernels.over_heads import over_heads


@kernel("chunk_delta_rule", "fused_recurrent_delta_rule")
def delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> Tensor:
    """Run the delta rule without decays, see :func:`gated_delta_rule`."""
    return gated_delta_rule(q, k, v, None, beta, scale, use_qk_l2norm_in_kernel)


@kernel("chunk_gated_delta_rule", "chunk_gdn", "fused_recurrent_gated_delta_rule", "fused_recurrent_gdn")
def gated_delta_rule(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
) -> Tensor:
    """Run the delta rule with one decay ``a_t = exp(g_t)`` for each head.

    Equation::

        h_t = (I - beta_t k_t k_t^T) a_t h_{t-1} + beta_t k_t v_t,  y_t = scale <q_t, h_t>

    Args:
        q: Queries (B, L, G, N); each group serves consecutive heads.
        k: Keys (B, L, G, N).
        v: Values (B, L, H, P).
        g: Logarithms of the decays (B, L, H), or what they are made of in the kernel; None for no decay.
        beta: (B, L, H); None for 1.
        scale: Of the queries; None for one over the root of N.
        use_qk_l2norm_in_kernel: Whether queries and keys are scaled to length 1.
        use_gate_in_kernel: Whether the logarithms are ``-exp(A_log) softplus(g + dt_bias)``.
        A_log: (H,), or None.
        dt_bias: (H,), or None.
        use_beta_sigmoid_in_kernel: Whether beta goes through a sigmoid.
        allow_neg_eigval: Whether beta is then doubled.

    Returns:
        (B, L, H, P).

    Source:
        flash-linear-attention ``ops/gated_delta_rule``; Yang et al. 2024 (arXiv 2412.06464).
    """
    if g is not None:
        g = g.unsqueeze(-1)
    return kimi_delta(
        q, k, v, g, beta, scale, use_qk_l2norm_in_kernel, use_gate_in_kernel, A_log, dt_bias,
        use_beta_sigmoid_in_kernel, allow_neg_eigval,
    )  # fmt: skip


@kernel("chunk_kda", "fused_recurrent_kda")
def kimi_delta(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor | None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
    use_gate_in_kernel: bool = False,
    A_log: Tensor | None = None,
    dt_bias: Tensor | None = None,
    use_beta_sigmoid_in_kernel: bool = False,
    allow_neg_eigval: bool = False,
    lower_bound: float | None = None,
) -> Tensor:
    """Run :func:`gated_delta_rule` with a decay for each state, ``g`` (B, L, H, N), and ``dt_bias`` (H·N,).

    With ``lower_bound`` the logarithms that the kernel makes are ``lower_bound * sigmoid(exp(A_log) (g + dt_bias))``.

    Returns:
        (B, L, H, P).
    """
    H = v.shape[2]
    if g is not None and use_gate_in_kernel:
        A_log = torch.zeros_like(v[0, 0, :, 0]) if A_log is None else A_log
        dt_bias = torch.zeros_like(g[0, 0].flatten()) if dt_bias is None else dt_bias
        g = log_decay(g.flatten(2), A_log, dt_bias, lower_bound)
    if beta is None:
        beta = torch.ones_like(v[..., 0])
    if beta.dim() == 4:
        _refuse("beta", "has a number for each channel")
    if use_beta_sigmoid_in_kernel:
        beta = (2 if allow_neg_eigval else 1) * beta.sigmoid()
    q, k = (to_heads(unit(t) if use_qk_l2norm_in_kernel else t, H) for t in (q, k))
    return _erasing(q, k, v, g, write=beta.unsqueeze(-1) * k, recall=k, scale=scale)


@kernel("chunk_comba", "fused_recurrent_comba")
def comba(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    p: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> Tensor:
    """Run :func:`gated_delta_rule` where a key ``p`` (B, L, H, N) looks up the value that is erased."""
    q, k, p = (unit(t) if use_qk_l2norm_in_kernel else t for t in (q, k, p))
    write = k if beta is None else beta.unsqueeze(-1) * k
    return _erasing(q, k, v, g.unsqueeze(-1), write=write, recall=p, scale=scale)


@kernel("chunk_gated_delta_product")
def gated_delta_product(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None,
    beta: Tensor,
    num_householder: int,
    scale: float | None = None,
    use_qk_l2norm_in_kernel: bool = False,
) -> Tensor:
    """Run :func:`gated_delta_rule` with several keys and values for each token, which decays before the first of them.

    Args:
        q: Queries (B, L, H, N).
        k: Keys (B, J·L, H, N), the J of a token one after the other.
        v: Values (B, J·L, H, P).
        g: Logarithms of the decays (B, L, H); None for no decay.
        beta: (B, J·L, H).
        num_householder: J.
        scale: Of the queries; None for one over the root of N.
        use_qk_l2norm_in_kernel: Whether queries and keys are scaled to length 1.

    Returns:
        (B, L, H, P).
    """
    J = num_householder
    g = None if g is None else F.pad(g.unsqueeze(2), (0, 0, 0, J - 1)).flatten(1, 2)  # (B, J·L, H)
    y = gated_delta_rule(q.repeat_interleave(J, dim=1), k, v, g, beta, scale, use_qk_l2norm_in_kernel)
    return y[:, J - 1 :: J]


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
    scan = DeltaScan(a=_decay(g, v), b=k, c=q * scale, recall=a, erase=-b, head_size=v.shape[-1])
    return over_heads(scan, v)


@kernel("chunk_iplr_delta_rule", "fused_recurrent_iplr_delta_rule")
def identity_plus_low_rank(q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor, scale: float | None = None) -> Tensor:
    """Run :func:`diagonal_plus_low_rank` without decay."""
    return diagonal_plus_low_rank(q, k, v, a, b, None, scale)


@kernel("fused_mul_recurrent_rwkv7", r="q", w="g")
def rwkv7(q: Tensor, k: Tensor, v: Tensor, kk: Tensor, a: Tensor, g: Tensor, scale: float | None = None) -> Tensor:
    """Run :func:`diagonal_plus_low_rank` that erases the value found at ``kk`` in the direction ``kk * a``."""
    return diagonal_plus_low_rank(q, k, v, -kk, kk * a, g, scale)


def _erasing(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, *, write: Tensor, recall: Tensor, scale: float | None
) -> Tensor:
    """Run a delta rule that writes in the direction in which it erases, (B, L, H, P)."""
    a = _decay(g, v)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    decayed = recall if g is None else g.exp() * recall
    scan = DeltaScan(a=a, b=write, c=q * scale, recall=decayed, erase=write, head_size=v.shape[-1])
    return over_heads(scan, v)


def _decay(g: Tensor | None, v: Tensor) -> Product:
    """Return the decays of these logarithms (B, L, H, N); 1 if there are none."""
    return Product((torch.zeros_like(v[:1, :1, :1, :1]) if g is None else g,), exponential=True)


def _refuse(argument: str, why: str) -> NoReturn:
    raise UnsupportedModelError(f"The argument {argument!r} of a delta rule {why}, which has no rule of relevance.")
