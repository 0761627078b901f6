"""The operators of flash-linear-attention that erase what they find at a key before they write there."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.errors import UnsupportedModelError
from captum_ssm.layers.delta_rule import log_decay, unit
from captum_ssm.layers.heads import to_heads
from captum_ssm.relevance.kernels.generalized_delta_rule import diagonal_plus_low_rank
from captum_ssm.relevance.kernels.kernel import kernel


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

    Raises:
        UnsupportedModelError: If beta has a number for each channel.
    """
    H = v.shape[2]
    if g is not None and use_gate_in_kernel:
        A_log = torch.zeros_like(v[0, 0, :, 0]) if A_log is None else A_log
        dt_bias = torch.zeros_like(g[0, 0].flatten()) if dt_bias is None else dt_bias
        g = log_decay(g.flatten(2), A_log, dt_bias, lower_bound)
    if beta is None:
        beta = torch.ones_like(v[..., 0])
    if beta.dim() == 4:
        raise UnsupportedModelError(
            "A delta rule was called with a 'beta' for each channel, which its rule does not follow."
        )
    if use_beta_sigmoid_in_kernel:
        beta = (2 if allow_neg_eigval else 1) * beta.sigmoid()
    q, k = (to_heads(unit(t) if use_qk_l2norm_in_kernel else t, H) for t in (q, k))
    return _erasing(q, v, g, write=beta.unsqueeze(-1) * k, recall=k, scale=scale)


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
    return _erasing(q, v, g.unsqueeze(-1), write=write, recall=p, scale=scale)


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


def _erasing(q: Tensor, v: Tensor, g: Tensor | None, *, write: Tensor, recall: Tensor, scale: float | None) -> Tensor:
    """Run a delta rule that writes in the direction in which it erases, (B, L, H, P)."""
    decayed = recall if g is None else g.exp() * recall
    return diagonal_plus_low_rank(q, write, v, decayed, -write, g, scale)
