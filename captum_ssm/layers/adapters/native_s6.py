"""S6, the selective scan of Mamba, in the layers of mamba_ssm, of flash-linear-attention and of Vision Mamba."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from captum_ssm.layers.mixers import register
from captum_ssm.layers.padding import padding_mask, refuse_packed
from captum_ssm.layers.parameters import Parameters, parameters
from captum_ssm.layers.selective_scan import (
    gated_layer,
    names_of_direction,
    selective_factors,
    selective_layer,
    selective_recurrence,
    two_directions,
)
from captum_ssm.operators import Chain, Diagonal, Operator, Reordered, Sum


@register(
    "Mamba", kernel="S6", family="mamba_ssm", parts=("in_proj", "conv1d", "x_proj", "dt_proj", "A_log", "out_proj")
)
def native_mamba(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose the Mamba layer of a native package, which is laid out as the one of transformers.

    Equation::

        y = W_out diag(silu(z)) [S + diag(skip)] diag(act) M_conv W_in diag(mask) x + bias
        S: h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t,  y_t = <C_t, h_t>

    The layer of Vision Mamba has the equation and the chain of :func:`bidirectional`.

    Args:
        mixer: ``Mamba`` of mamba_ssm, of flash-linear-attention, or of Vision Mamba.
        x: Input (B, L, E).
        kwargs: Arguments of the call; ``attention_mask`` (B, L), of flash-linear-attention, is 0 at padding.

    Returns:
        Chain of ``out``, ``gate``, ``scan``, ``act``, ``conv``, ``in`` and, with a mask, ``mask``.

    Raises:
        UnsupportedModelError: If the call packs several sequences into one.

    Source:
        mamba_ssm ``modules/mamba_simple.py``; flash-linear-attention ``layers/mamba.py``.
    """
    refuse_packed(mixer, kwargs)
    if hasattr(mixer, "A_b_log"):
        return bidirectional(mixer, x)
    return selective_layer(x, mixer.activation, parameters(mixer, x), padding_mask(kwargs, x))


def bidirectional(mixer: Any, x: Tensor) -> Chain:
    """Decompose the layer of Vision Mamba, which reads the sequence from both ends.

    Equation::

        y = W_out diag(silu(z)) [S M + flip S_b M_b flip] W_in x / 2 + bias

    ``S M`` are the factors of one direction; the direction from the end has a second convolution and recurrence. In the
    first version (v1) it has the decays alone of its own: ``[S + flip S_b flip] M``. In SegMamba (v3) a third direction
    reads the first token of every slice of a volume, then the second of every slice, and so on.

    Args:
        mixer: ``Mamba`` of Vision Mamba's fork of mamba_ssm, of any ``bimamba_type``, or of SegMamba's.
        x: Input (B, L, E).

    Returns:
        Chain of ``layer_scale`` (where the layer has one), ``out``, ``gate``, ``half`` (where the layer divides by 2),
        ``directions``, ``in``. ``directions`` is the sum of ``forward``, ``backward`` and, in SegMamba, ``slices``,
        chains of ``scan``, ``act``, ``conv``. In v1 it is a sum of scans, and ``act``, ``conv`` stand after it.

    Source:
        hustvl/Vim ``mamba-1p1p1/mamba_ssm/modules/mamba_simple.py``; Zhu et al. 2024 (arXiv 2401.09417), algorithm 1;
        ge-xing/SegMamba ``mamba/mamba_ssm/modules/mamba_simple.py``; Xing et al. 2024 (arXiv 2401.13560), section 2.2.
    """
    weights = parameters(mixer, x)
    divides = getattr(mixer, "if_divide_out", getattr(mixer, "if_devide_out", False))  # the forks differ in spelling
    half = {"half": Diagonal(weights["D"].new_tensor(0.5))} if divides else {}

    def between(value: Tensor) -> dict[str, Operator]:
        if "conv1d_b.weight" not in weights:
            return _shared_convolution(weights, value, mixer.activation)
        directions = two_directions(weights, _BACKWARD, value, mixer.activation)
        if "A_s_log" in weights:
            order = torch.arange(value.shape[1], device=value.device).view(mixer.nslices, -1).T.flatten()
            other = weights.renamed(_SLICES)
            slices = Chain(selective_factors(other, value[:, order], mixer.activation))
            directions["slices"] = Reordered(slices, order)
        return {**half, "directions": Sum(directions)}

    scale = {"layer_scale": Diagonal(weights["gamma"])} if "gamma" in weights else {}
    return Chain({**scale, **gated_layer(x, weights, between).factors})


def _shared_convolution(weights: Parameters, value: Tensor, activation: str) -> dict[str, Operator]:
    """Build the factors of directions that read the same convolved input and differ in their decays alone."""
    factors = selective_factors(weights, value, activation)
    u = Chain({name: factors[name] for name in ("act", "conv")}).apply(value, bias=True)
    backward = selective_recurrence(weights.renamed({"A_log": "A_b_log"}), u.flip(1)).flipped()
    directions = Sum({"forward": factors["scan"], "backward": backward})
    return {"directions": directions, "act": factors["act"], "conv": factors["conv"]}


_BACKWARD = names_of_direction("_b", {"A_log": "A_b_log", "D": "D_b"})
_SLICES = names_of_direction("_s", {"A_log": "A_s_log", "D": "D_s"})
"""The parameters of the further directions, by the names of the first one's."""
