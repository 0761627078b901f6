"""S6, the selective scan of Mamba: one state for each channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.adapters.reading import padding, parameters
from captum_ssm.gates import inverse_rms, secant
from captum_ssm.operators import CausalConv, Chain, Diagonal, Operator, Product, Projection, Scan
from captum_ssm.registry import register


@register("MambaMixer", kernel="S6", family="mamba")
@register("FalconMambaMixer", kernel="S6", family="falcon_mamba")
def s6(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """S6: selective scan, one state of N for each channel.

    ``y = W_out diag(silu(z)) [S + diag(skip)] diag(act) M_conv W_in diag(mask) x + bias`` with
    ``delta, B, C`` read from the convolved input; Falcon-Mamba normalises these three.

    Args:
        mixer: ``MambaMixer`` or ``FalconMambaMixer`` of transformers.
        x: Input (B, L, E).
        kwargs: ``attention_mask`` (B, L), 0 at padding, is respected.

    Returns:
        Chain of ``out, gate, scan, act, conv, in`` and, with a mask, ``mask``.

    Source:
        transformers ``modeling_mamba.py``, ``modeling_falcon_mamba.py``; Gu & Dao 2023 (arXiv 2312.00752).
    """
    weights = parameters(mixer, x)
    mask = padding(kwargs, x)
    real = mask["mask"].s if mask else x.new_ones(())  # (B, L, 1)
    sizes = [mixer.time_step_rank, mixer.ssm_state_size, mixer.ssm_state_size]

    in_w, gate_w = weights["in_proj.weight"].chunk(2)
    in_b, gate_b = weights["in_proj.bias"].chunk(2) if "in_proj.bias" in weights else (None, None)
    into = Projection(in_w, in_b)
    gate = F.silu(F.linear(real * x, gate_w, gate_b))  # (B, L, D)
    conv = CausalConv(weights["conv1d.weight"].squeeze(1), weights.get("conv1d.bias"))
    pre = conv.apply(into.apply(real * x, bias=True), bias=True)
    act = real * secant(mixer.activation, pre)

    low, b, c = torch.split(F.linear(act * pre, weights["x_proj.weight"]), sizes, dim=-1)
    if "Falcon" in type(mixer).__name__:
        low, b, c = (part * inverse_rms(part, mixer.rms_eps) for part in (low, b, c))
    delta = F.softplus(F.linear(low, weights["dt_proj.weight"], weights.get("dt_proj.bias")))
    step, decay = delta.unsqueeze(-1), -weights["A_log"].exp()[None, None]  # (B, L, D, 1), (1, 1, D, N)

    factors: dict[str, Operator] = {
        "out": Projection(weights["out_proj.weight"], weights.get("out_proj.bias")),
        "gate": Diagonal(gate),
        "scan": Scan(
            a=Product((step, decay), exponential=True),
            b=Product((step, b.unsqueeze(2))),
            c=c.unsqueeze(2),
            skip=weights["D"],
        ),
        "act": Diagonal(act),
        "conv": conv,
        "in": into,
    }
    return Chain({**factors, **mask})
