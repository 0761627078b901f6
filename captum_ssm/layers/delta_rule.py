"""The gated delta rule, in the form that the layers of transformers and of flash-linear-attention share."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from captum_ssm.layers.norms import inverse_length
from captum_ssm.operators import DeltaScan

EPS = 1e-6
"""Added to the squared length of every query and key. A constant of transformers and of the kernels."""


def log_decay(f: Tensor, A_log: Tensor, dt_bias: Tensor, lower_bound: float | None = None) -> Tensor:
    """Compute the logarithms of the decays.

    ``-exp(A_log) softplus(f + dt_bias)``, or with a lower bound ``lower_bound * sigmoid(exp(A_log) (f + dt_bias))``.

    Args:
        f: Projected input (B, L, H·N): N is 1 in Gated DeltaNet, the state size in Kimi delta attention.
        A_log: Logarithm of each head's rate, with H entries.
        dt_bias: (H·N,).
        lower_bound: Negative, or None.

    Returns:
        (B, L, H, N), not above 0.

    Source:
        Yang et al. 2024 (arXiv 2412.06464), section 3; Kimi Team 2025 (arXiv 2510.26692), equation 1.
    """
    rate = A_log.exp().view(-1, 1)  # (H, 1)
    f = (f + dt_bias).unflatten(-1, (len(rate), -1))  # (B, L, H, N)
    return -rate * F.softplus(f) if lower_bound is None else lower_bound * (rate * f).sigmoid()


def unit(t: Tensor) -> Tensor:
    """Scale queries or keys (..., N) to length 1."""
    return t * inverse_length(t, EPS)


def delta_scan(q: Tensor, k: Tensor, a: Tensor, beta: Tensor, P: int) -> DeltaScan:
    """Build the recurrence ``h_t = (I - beta_t k_t k_t^T) diag(a_t) h_{t-1} + beta_t k_t v_t``, read by q.

    Args:
        q: Queries (B, L, H, N); they are divided by the root of N.
        k: Keys (B, L, H, N), or (B, L, 1, N) where all heads share them.
        a: Decays (B, L, H, N), with 1 where they are shared.
        beta: Share of the value found at its key that a token erases and rewrites, (B, L, H).
        P: Channels of a head.

    Returns:
        The recurrence.

    Source:
        Yang et al. 2024 (arXiv 2412.06464), equation 10.
    """
    write = beta.unsqueeze(-1) * k
    return DeltaScan(a=a, b=write, c=q * q.shape[-1] ** -0.5, recall=a * k, erase=write, head_size=P)
