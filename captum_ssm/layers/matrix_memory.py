"""The memory of an mLSTM: a matrix for each head, written with exponential gates and divided by a normaliser."""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.layers.log_domain import relative_gates, running_max, upper_bound
from captum_ssm.operators import Chain, Diagonal, Product, Scan


def matrix_memory(
    q: Tensor, k: Tensor, i: Tensor, log_f: Tensor, eps: float, P: int, starts_at_0: bool = True
) -> Chain:
    """Build the recurrence of the memory, divided by its normaliser, in a form in which no exponent is positive.

    The memory is kept relative to ``exp(m_t)``, ``m_t = max(m_{t-1} + log f_t, i_t)``, which cancels but for the
    layer's ``eps``: that is relative to the m of the layer's own code.

    Args:
        q: Queries (B, L, H, N).
        k: Keys (B, L, H, N).
        i: Input gates, as exponents (B, L, H).
        log_f: Logarithms of the forget gates (B, L, H).
        eps: Added to the normaliser.
        P: Channels of a head.
        starts_at_0: Whether the layer's own m is 0 before the first token, instead of minus infinity.

    Returns:
        Chain of ``total``, the division by the normaliser, and ``weights``.
    """
    layer_m = _log_size(i, log_f) if starts_at_0 else running_max(log_f, i)  # (B, L, H)
    m = _log_size(upper_bound(i), upper_bound(log_f))
    a, b = relative_gates(log_f, i, m, before=F.pad(m, (0, 0, 1, -1)))
    scan = Scan(a=a.unsqueeze(-1), b=Product((b.unsqueeze(-1), k)), c=q * q.shape[-1] ** -0.5)
    total = torch.maximum(scan.apply(torch.ones_like(i)).abs(), torch.exp(-m)) + eps * torch.exp(layer_m - m)
    scale = (1 / total).repeat_interleave(P, -1)  # (B, L, D)
    return Chain({"total": Diagonal(scale), "weights": replace(scan, head_size=P)})


def _log_size(i: Tensor, log_f: Tensor) -> Tensor:
    """Compute the logarithm of the memory's size (B, L, H), which is 0 before the first token."""
    start = torch.maximum(i[:, :1], log_f[:, :1])
    return running_max(log_f, torch.cat([start, i[:, 1:]], dim=1))
