"""Averages over all tokens so far, with exponential weights that decay: the recurrence of RWKV-4.

Weights are kept relative to the largest, so that no exponent is positive: a common factor of a row's weights cancels.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary

from captum_ssm.layers.log_domain import relative_gates, running_max
from captum_ssm.operators import Chain, Diagonal, Operator, Scan


def averages(k: Tensor, w: Tensor, bonus: Tensor) -> Operator:
    """Build the operator of the averages, one for each channel.

    Equation::

        S_ij = exp(e_ij) / sum_j exp(e_ij),  e_ij = k_j - (i - 1 - j) w for j < i,  e_ii = k_i + bonus

    A rule of relevance takes over this function through ``__torch_function__``.

    Args:
        k: Keys (B, L, D).
        w: Rate of decay (D,), positive.
        bonus: Added to the key of the current token (D,).

    Returns:
        Chain of ``total``, the division by the sums, and ``weights``.
    """
    if has_torch_function_unary(k):
        return handle_torch_function(averages, (k,), k, w, bonus)
    m = running_max(-w.expand_as(k), k)  # (B, L, D), the state is kept relative to exp(m)
    before = before_each(m, first=-torch.inf)
    largest = torch.maximum(before, k + bonus)  # of the exponents of a row
    a, b = relative_gates(-w, k, m, before)
    c, now = torch.exp(before - largest), torch.exp(k + bonus - largest)
    scan = Scan(a=a.unsqueeze(-1), b=b.unsqueeze(-1), c=c.unsqueeze(-1), lag=1, bonus=now)
    return Chain({"total": Diagonal(1 / scan.apply(torch.ones_like(k))), "weights": scan})


def before_each(states: Tensor, first: float) -> Tensor:
    """Shift states by one token.

    Args:
        states: States after each token (B, L, ...).
        first: The state before the first token.

    Returns:
        States before each token (B, L, ...).
    """
    return torch.cat([torch.full_like(states[:, :1], first), states[:, :-1]], dim=1)
