"""SSD, the state space duality of Mamba-2, in the layers of mamba_ssm and of flash-linear-attention."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from captum_ssm.errors import UnsupportedModelError
from captum_ssm.layers.mixers import register
from captum_ssm.layers.padding import refuse_packed
from captum_ssm.layers.parameters import parameters
from captum_ssm.layers.state_space_duality import OutputNorm, SSDOptions, ssd_layer
from captum_ssm.operators import Chain


@register("Mamba2", kernel="SSD", family="mamba_ssm", parts=("in_proj", "conv1d", "dt_bias", "A_log", "out_proj"))
def native_mamba2(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose the Mamba2 layer of a native package, which may have no norm, and gated channels beside it.

    Equation::

        y = W_out diag(norm) diag(silu(z)) [S + diag(skip)] diag(act) M_conv W_in diag(mask) x + bias
        S: h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t,  y_t = <C_t, h_t>

    Args:
        mixer: ``Mamba2`` of mamba_ssm, or of flash-linear-attention.
        x: Input (B, L, E).
        kwargs: Arguments of the call; ``attention_mask`` (B, L), of flash-linear-attention, is 0 at padding.

    Returns:
        Chain of ``out``, ``norm`` (where the layer has one), ``gate``, ``scan``, ``act``, ``conv``, ``in`` and, with a
        mask, ``mask``; ``gate`` before ``norm`` where the norm is applied first.

    Raises:
        UnsupportedModelError: If the call packs several sequences into one.

    Source:
        mamba_ssm ``modules/mamba2.py``; flash-linear-attention ``layers/mamba2.py``.
    """
    refuse_packed(mixer, kwargs)
    weights, norm = parameters(mixer, x), None
    groups = mixer.ngroups if hasattr(mixer, "ngroups") else mixer.n_groups
    if "norm.weight" in weights:
        norm = OutputNorm(groups, mixer.norm.eps, mixer.norm_before_gate)
    return ssd_layer(x, kwargs, weights, SSDOptions(mixer.activation, groups, mixer.dt_limit, norm))


@register("Mamba2Simple", kernel="SSD", family="mamba_ssm", parts=("in_proj", "conv1d", "dt_bias", "A_log"))
def native_mamba2_simple(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose the simple Mamba-2 layer of mamba_ssm.

    Equation::

        y = W_out diag(norm) diag(silu(z)) [S + diag(skip)] diag(act) M_conv W_in diag(mask) x + bias
        S: h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t,  y_t = <C_t, h_t>

    Its fused kernel norms each group of heads separately, its other code all channels together.

    Args:
        mixer: ``Mamba2Simple`` of mamba_ssm.
        x: Input (B, L, E).
        kwargs: Arguments of the call; the layer takes no mask.

    Returns:
        Chain of ``out``, ``norm``, ``gate``, ``scan``, ``act``, ``conv``, ``in``.

    Raises:
        UnsupportedModelError: If the call packs several sequences into one, or the layer starts from learnt states.

    Source:
        mamba_ssm ``modules/mamba2_simple.py``, ``ops/triton/ssd_combined.py``.
    """
    refuse_packed(mixer, kwargs)
    weights = parameters(mixer, x)
    if "init_states" in weights:
        raise UnsupportedModelError(
            "This Mamba2Simple layer starts from learnt states (learnable_init_states), which come from no token. Set "
            "learnable_init_states=False, or register an adapter of your own for it (captum_ssm.register)."
        )
    norm = OutputNorm(mixer.ngroups if mixer.use_mem_eff_path else 1, mixer.norm.eps, before_gate=False)
    return ssd_layer(x, kwargs, weights, SSDOptions(mixer.activation, mixer.ngroups, mixer.dt_limit, norm))
