"""SSD, the state space duality of Mamba-2, in the models of transformers: one decay for each head."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from captum_ssm.layers.mixers import register
from captum_ssm.layers.padding import own_masking
from captum_ssm.layers.parameters import parameters
from captum_ssm.layers.state_space_duality import OutputNorm, SSDOptions, ssd_layer
from captum_ssm.operators import Chain


@register("Mamba2Mixer", kernel="SSD", family="mamba2")
@register("BambaMixer", kernel="SSD", family="bamba")
@register("GraniteMoeHybridMambaLayer", kernel="SSD", family="granitemoehybrid")
@register("FalconH1Mixer", kernel="SSD", family="falcon_h1")
def transformers_ssd(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose an SSD layer of transformers.

    Equation::

        y = W_out diag(norm) diag(silu(z)) [S + diag(skip)] diag(act) M_conv W_in diag(mask) x + bias
        S: h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t,  y_t = <C_t, h_t>

    Each group of heads is normed separately, or all of them together, as earlier releases do. Falcon-H1 scales the
    input and the output of the projection, and may have its norm before the gate, or none.

    Args:
        mixer: ``Mamba2Mixer``, ``BambaMixer``, ``GraniteMoeHybridMambaLayer`` or ``FalconH1Mixer`` of transformers.
        x: Input (B, L, E).
        kwargs: Arguments of the call; ``attention_mask`` (B, L) is 0 at padding.

    Returns:
        Chain of ``out``, ``norm`` (where the layer has one), ``gate``, ``scan``, ``act``, ``conv``, ``in`` and, with a
        mask, ``mask``; ``gate`` before ``norm`` where the norm is applied first.

    Source:
        transformers ``modeling_mamba2.py``, ``modeling_bamba.py``, ``modeling_granitemoehybrid.py``,
        ``modeling_falcon_h1.py``.
    """
    return _chain(mixer, x, kwargs, mixer.time_step_limit)


@register("NemotronHMamba2Mixer", kernel="SSD", family="nemotron_h")
@register("Zamba2MambaMixer", kernel="SSD", family="zamba2")
def bounded_below(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose an SSD layer of transformers whose steps have a smallest size alone.

    The equation is that of :func:`transformers_ssd`. Earlier releases keep the smallest step beside limits that they do
    not apply.

    Args:
        mixer: ``NemotronHMamba2Mixer`` or ``Zamba2MambaMixer`` of transformers.
        x: Input (B, L, E).
        kwargs: Arguments of the call; ``attention_mask`` (B, L) is 0 at padding.

    Returns:
        Chain of ``out``, ``norm``, ``gate``, ``scan``, ``act``, ``conv``, ``in`` and, with a mask, ``mask``.

    Source:
        transformers ``modeling_nemotron_h.py``, ``modeling_zamba2.py``.
    """
    smallest = getattr(mixer, "time_step_min", None)
    return _chain(mixer, x, kwargs, mixer.time_step_limit if smallest is None else (smallest, math.inf))


def _chain(mixer: Any, x: Tensor, kwargs: Mapping[str, Any], limits: tuple[float, float]) -> Chain:
    """Build the chain of a layer whose steps have these limits."""
    weights, norm = parameters(mixer, x), None
    if "norm.weight" in weights:
        norm = OutputNorm(
            _groups(mixer.norm), mixer.norm.variance_epsilon, getattr(mixer.norm, "norm_before_gate", False)
        )
    if "mup_vector" in weights:  # Falcon-H1's constant scales
        scale = weights["mup_vector"].flatten()
        weights["in_proj.weight"] = mixer.ssm_in_multiplier * scale.unsqueeze(1) * weights["in_proj.weight"]
        if "in_proj.bias" in weights:
            weights["in_proj.bias"] = scale * weights["in_proj.bias"]
    return ssd_layer(
        x, own_masking(mixer, kwargs, x), weights, SSDOptions(mixer.activation, mixer.n_groups, limits, norm)
    )


def _groups(norm: Any) -> int:
    """Read how many groups of channels a norm has: by their size, by their number, or all channels are one."""
    size = getattr(norm, "group_size", None)
    return getattr(norm, "n_groups", 1) if size is None else len(norm.weight) // size
