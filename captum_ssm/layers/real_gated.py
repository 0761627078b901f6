"""The recurrence of an RG-LRU, whose gates are read from its convolved input."""

from __future__ import annotations

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.operators import Scan


def real_gated_recurrence(x: Tensor, weights: Mapping[str, Tensor], H: int, starts: Tensor) -> Scan:
    """Build the recurrence of a layer.

    Args:
        x: Convolved input (B, L, D).
        weights: Parameters by the names of ``RecurrentGemmaRecurrentBlock``.
        H: Number of heads that the gates are block-diagonal in.
        starts: (B or 1, L), True where a sequence starts.

    Returns:
        The recurrence.
    """
    starts, heads = starts.unsqueeze(-1), x.unflatten(-1, (H, -1))
    r, i = (
        torch.einsum("blhp,hpq->blhq", heads, weights[f"rg_lru.{name}_gate_weight"])
        .add(weights[f"rg_lru.{name}_gate_bias"])
        .sigmoid()
        .flatten(-2)
        for name in ("recurrent", "input")
    )
    log_a = -8 * r * F.softplus(weights["rg_lru.recurrent_param"])
    # not expm1: near a = 1 rounding is felt, and has to be the layer's; the bound is below it, for the gradient at 0
    scale = (1 - torch.exp(2 * log_a)).clamp(min=torch.finfo(x.dtype).tiny).sqrt()
    return Scan(
        a=torch.where(starts, 0, log_a.exp()).unsqueeze(-1),
        b=(torch.where(starts, 1, scale) * i).unsqueeze(-1),
        c=x.new_ones(1, 1, 1, 1),
    )
