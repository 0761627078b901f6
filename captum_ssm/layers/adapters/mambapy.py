"""S6 in the layers of mambapy (mamba.py), in one direction and in both."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from captum_ssm.layers.mixers import register
from captum_ssm.layers.norms import inverse_rms
from captum_ssm.layers.parameters import parameters
from captum_ssm.layers.selective_scan import (
    ReadNorm,
    gated_layer,
    names_of_direction,
    selective_layer,
    two_directions,
)
from captum_ssm.operators import Chain, Diagonal, Sum


@register("mambapy.MambaBlock", kernel="S6", family="mambapy")
def mamba_block(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose the S6 layer of mambapy, whose low rank of delta, B and C may have norms.

    Equation::

        y = W_out diag(silu(z)) [S + diag(skip)] diag(act) M_conv W_in x + bias
        S: h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t,  y_t = <C_t, h_t>

    Args:
        mixer: ``MambaBlock`` of mambapy.
        x: Input (B, L, E).
        kwargs: Arguments of the call, not used: the layer takes none.

    Returns:
        Chain of ``out``, ``gate``, ``scan``, ``act``, ``conv``, ``in``.

    Source:
        mambapy ``mamba.py``; Gu & Dao 2023 (arXiv 2312.00752).
    """
    weights = parameters(mixer, x)
    return selective_layer(x, "silu", weights, {}, _read_norm(mixer, weights))


@register("mambapy.VMambaBlock", kernel="S6", family="mambapy")
def vision_mamba_block(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose the layer of mambapy's Vision Mamba, which reads the sequence from both ends.

    Equation::

        y = W_out diag(silu(z)) [S M + flip S_b M_b flip] W_in x / 2 + bias

    ``S M`` are the factors of one direction; the direction from the end has a second convolution and recurrence.

    Args:
        mixer: ``VMambaBlock`` of mambapy.
        x: Input (B, L, E).
        kwargs: Arguments of the call, not used: the layer takes none.

    Returns:
        Chain of ``out``, ``gate``, ``half`` (where the layer divides by 2), ``directions``, ``in``; ``directions`` is
        the sum of ``forward`` and ``backward``. Of a layer with one direction, the chain of :func:`mamba_block`.

    Source:
        mambapy ``vim.py``; Zhu et al. 2024 (arXiv 2401.09417), algorithm 1.
    """
    weights = parameters(mixer, x)
    norm = _read_norm(mixer, weights)
    if not mixer.config.bidirectional:
        return selective_layer(x, "silu", weights, {}, norm)
    half = {"half": Diagonal(weights["D"].new_tensor(0.5))} if mixer.config.divide_output else {}
    return gated_layer(
        x, weights, lambda value: {**half, "directions": Sum(two_directions(weights, _BACKWARD, value, "silu", norm))}
    )


_BACKWARD = names_of_direction("_b", {"A_log": "A_log_b", "D": "D_b"})
"""The parameters of the direction from the end, by the names of the other direction's."""


def _read_norm(mixer: Any, weights: Mapping[str, Tensor]) -> ReadNorm:
    """Return the norm of the vectors that are read from the convolved input; its weight may be absent (muP)."""

    def norm(name: str, read: Tensor) -> Tensor:
        module = f"{'dt' if name == 'dt' else name.upper()}_layernorm"
        scaled = read * inverse_rms(read, mixer.config.rms_norm_eps)
        return scaled * weights[f"{module}.weight"] if f"{module}.weight" in weights else scaled

    return norm if mixer.config.inner_layernorms else lambda _, read: read
