"""S4D, a convolution with the kernel of complex diagonal states, one set for each channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.errors import UnsupportedModelError
from captum_ssm.layers.activations import secant
from captum_ssm.layers.complex_states import complex_kernels
from captum_ssm.layers.mixers import register
from captum_ssm.layers.parameters import parameters
from captum_ssm.operators import Chain, Diagonal, Projection


@register("S4D", kernel="S4D", family="s4", parts=("kernel", "D", "output_linear", "transposed"))
def s4d(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose an S4D layer, whose recurrence does not depend on its input.

    Equation::

        y = diag(sigmoid(W_g act)) W_out diag(act) [S + diag(skip)] x + bias
        S: h_t = exp(A delta) h_{t-1} + x_t,  y_t = 2 Re <C (exp(A delta) - 1) / A, h_t>

    Args:
        mixer: ``S4D`` of state-spaces/s4, with ``transposed=False``.
        x: Input (B, L, E).
        kwargs: Arguments of the call, not used.

    Returns:
        Chain of ``gate``, ``out``, ``act``, ``scan``.

    Raises:
        UnsupportedModelError: If the layer reads (B, E, L).

    Source:
        state-spaces/s4 ``models/s4/s4d.py``; Gu et al. 2022 (arXiv 2206.11893), equations 2 and 5.
    """
    if mixer.transposed:
        raise UnsupportedModelError(
            "This S4D layer reads (batch, width, tokens). Build it with transposed=False, which reads (batch, tokens, "
            "width), or register an adapter of your own for the layer around it (captum_ssm.register)."
        )
    weights = parameters(mixer, x)
    A = torch.complex(-weights["kernel.log_A_real"].exp(), weights["kernel.A_imag"])  # (E, N)
    decay = torch.exp(A * weights["kernel.log_dt"].exp().unsqueeze(-1))
    C = torch.view_as_complex(weights["kernel.C"].contiguous()) * (decay - 1) / A
    scan = complex_kernels(decay.detach(), C.detach(), weights["D"], x)
    pre = scan.apply(x)
    act = secant("gelu", pre)
    out, gate = weights["output_linear.0.weight"].squeeze(-1).chunk(2)
    out_bias, gate_bias = weights["output_linear.0.bias"].chunk(2)
    return Chain(
        {
            "gate": Diagonal(F.linear(act * pre, gate, gate_bias).sigmoid()),
            "out": Projection(out, out_bias),
            "act": Diagonal(act),
            "scan": scan,
        }
    )
