"""S6 of MambaVision, which has a convolution beside the scan instead of a gate."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.layers.activations import secant
from captum_ssm.layers.mixers import register
from captum_ssm.layers.parameters import parameters, projection
from captum_ssm.layers.selective_scan import selective_recurrence
from captum_ssm.operators import Chain, Conv, Diagonal, Scan


@register("MambaVisionMixer", kernel="S6", family="mambavision")
def mambavision_mixer(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose the mixer of MambaVision: half of its channels are scanned, the other half pass by.

    Equation::

        y = W_out [S + diag(skip), 1] diag(act) M_conv W_in x + bias
        S: h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t,  y_t = <C_t, h_t>

    The convolutions of both halves read tokens ahead too. The bias of delta is added twice, as the layer does.

    Args:
        mixer: ``MambaVisionMixer`` of mambavision.
        x: Input (B, L, E).
        kwargs: Arguments of the call, not used: the layer takes none.

    Returns:
        Chain of ``out``, ``scan``, ``act``, ``conv``, ``in``.

    Source:
        mambavision ``models/mamba_vision.py``; Hatamizadeh & Kautz 2024 (arXiv 2407.08083), equations 6 and 7.
    """
    weights = parameters(mixer, x)
    weights["dt_proj.bias"] = 2 * weights["dt_proj.bias"]
    into, conv = projection(weights, "in_proj"), _convolution(weights)
    pre = conv.apply(into.apply(x, bias=True), bias=True)
    act = secant("silu", pre)
    scan = selective_recurrence(weights, (act * pre)[..., : len(weights["D"])])
    return Chain(
        {
            "out": projection(weights, "out_proj"),
            "scan": _with_channels_beside(scan, len(conv.w) - len(weights["D"])),
            "act": Diagonal(act),
            "conv": conv,
            "in": into,
        }
    )


def _convolution(weights: Mapping[str, Tensor]) -> Conv:
    """Build the convolutions of both halves as one; torch lets the same length read half of the taps ahead."""
    w = torch.cat([weights[f"conv1d_{half}.weight"].squeeze(1) for half in "xz"])
    biases = [weights[name] for half in "xz" if (name := f"conv1d_{half}.bias") in weights]
    return Conv(w, ahead=w.shape[1] // 2, bias=torch.cat(biases) if biases else None)


def _with_channels_beside(scan: Scan, M: int) -> Scan:
    """Extend a scan by M channels whose input weights are 0: their values pass by the skip."""
    assert scan.skip is not None
    wider = scan.map(lambda factor: F.pad(factor, (0, 0, 0, M)), axis=2)
    return replace(wider, skip=F.pad(scan.skip, (0, M), value=1.0))
