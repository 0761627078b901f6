"""SSD, the state space duality of Mamba-2, in the models of transformers: one decay for each head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from captum_ssm.layers.mixers import register
from captum_ssm.layers.parameters import parameters
from captum_ssm.layers.state_space_duality import OutputNorm, SSDOptions, ssd_layer
from captum_ssm.operators import Chain


@register("Mamba2Mixer", kernel="SSD", family="mamba2")
@register("BambaMixer", kernel="SSD", family="bamba")
@register("GraniteMoeHybridMambaLayer", kernel="SSD", family="granitemoehybrid")
@register("FalconH1Mixer", kernel="SSD", family="falcon_h1")
@register("NemotronHMamba2Mixer", kernel="SSD", family="nemotron_h")
@register("Zamba2MambaMixer", kernel="SSD", family="zamba2")
def transformers_ssd(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose an SSD layer of transformers.

    Equation::

        y = W_out diag(norm) diag(silu(z)) [S + diag(skip)] diag(act) M_conv W_in diag(mask) x + bias
        S: h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t,  y_t = <C_t, h_t>

    Each group of heads is normed separately. Falcon-H1 scales the input and the output of the projection, and may have
    its norm before the gate, or none.

    Args:
        mixer: ``Mamba2Mixer``, ``BambaMixer``, ``GraniteMoeHybridMambaLayer``, ``FalconH1Mixer``,
            ``NemotronHMamba2Mixer`` or ``Zamba2MambaMixer`` of transformers.
        x: Input (B, L, E).
        kwargs: Arguments of the call; ``attention_mask`` (B, L) is 0 at padding.

    Returns:
        Chain of ``out``, ``norm`` (where the layer has one), ``gate``, ``scan``, ``act``, ``conv``, ``in`` and, with a
        mask, ``mask``; ``gate`` before ``norm`` where the norm is applied first.

    Source:
        transformers ``modeling_mamba2.py``, ``modeling_bamba.py``, ``modeling_granitemoehybrid.py``,
        ``modeling_falcon_h1.py``, ``modeling_nemotron_h.py``, ``modeling_zamba2.py``.
    """
    weights, norm = parameters(mixer, x), None
    if "norm.weight" in weights:
        norm = OutputNorm(mixer.n_groups, mixer.norm.variance_epsilon, getattr(mixer.norm, "norm_before_gate", False))
    if "mup_vector" in weights:  # Falcon-H1's constant scales
        scale = weights["mup_vector"].flatten()
        weights["in_proj.weight"] = mixer.ssm_in_multiplier * scale.unsqueeze(1) * weights["in_proj.weight"]
        if "in_proj.bias" in weights:
            weights["in_proj.bias"] = scale * weights["in_proj.bias"]
    return ssd_layer(x, kwargs, weights, SSDOptions(mixer.activation, mixer.n_groups, mixer.time_step_limit, norm))
