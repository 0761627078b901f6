"""S6, the selective scan of Mamba, in the models of transformers: one state for each channel.

The vectors ``delta, B, C`` of the equation are read from the convolved and activated input.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from captum_ssm.layers.activations import activation
from captum_ssm.layers.mixers import register
from captum_ssm.layers.norms import inverse_rms, rms_norm
from captum_ssm.layers.padding import masking_function, padding_mask
from captum_ssm.layers.parameters import Parameters, parameters
from captum_ssm.layers.selective_scan import ReadNorm, selective_layer
from captum_ssm.operators import Chain


@register("MambaMixer", kernel="S6", family="mamba")
def mamba(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose an S6 layer of Mamba.

    Equation::

        y = W_out diag(silu(z)) [S + diag(skip)] diag(act) M_conv W_in diag(mask) x + bias
        S: h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t,  y_t = <C_t, h_t>

    Args:
        mixer: ``MambaMixer`` of transformers.
        x: Input (B, L, E).
        kwargs: Arguments of the call; ``attention_mask`` (B, L) is 0 at padding.

    Returns:
        Chain of ``out``, ``gate``, ``scan``, ``act``, ``conv``, ``in`` and, with a mask, ``mask``.

    Source:
        transformers ``modeling_mamba.py``; Gu & Dao 2023 (arXiv 2312.00752).
    """
    return _layer(mixer, x, kwargs, parameters(mixer, x))


@register("FalconMambaMixer", kernel="S6", family="falcon_mamba")
def falcon_mamba(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose an S6 layer of Falcon-Mamba, whose low rank of delta, B and C have norms without a weight.

    Equation::

        y = W_out diag(silu(z)) [S + diag(skip)] diag(act) M_conv W_in diag(mask) x + bias
        S: h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t,  y_t = <C_t, h_t>

    Args:
        mixer: ``FalconMambaMixer`` of transformers.
        x: Input (B, L, E).
        kwargs: Arguments of the call; ``attention_mask`` (B, L) is 0 at padding.

    Returns:
        Chain of ``out``, ``gate``, ``scan``, ``act``, ``conv``, ``in`` and, with a mask, ``mask``.

    Source:
        transformers ``modeling_falcon_mamba.py``; Zuo et al. 2024 (arXiv 2410.05355).
    """
    weights = parameters(mixer, x)

    def norm(name: str, read: Tensor) -> Tensor:
        return read * inverse_rms(read, mixer.rms_eps)

    return _layer(mixer, x, kwargs, weights, norm)


@register("JambaMambaMixer", kernel="S6", family="jamba")
def jamba(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose an S6 layer of Jamba, whose low rank of delta, B and C have norms with weights.

    Equation::

        y = W_out diag(silu(z)) [S + diag(skip)] diag(act) M_conv W_in diag(mask) x + bias
        S: h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t,  y_t = <C_t, h_t>

    Args:
        mixer: ``JambaMambaMixer`` of transformers.
        x: Input (B, L, E).
        kwargs: Arguments of the call; ``attention_mask`` (B, L) is 0 at padding.

    Returns:
        Chain of ``out``, ``gate``, ``scan``, ``act``, ``conv``, ``in`` and, with a mask, ``mask``.

    Source:
        transformers ``modeling_jamba.py``; Lieber et al. 2024 (arXiv 2403.19887).
    """
    weights = parameters(mixer, x)

    def norm(name: str, read: Tensor) -> Tensor:
        eps = getattr(mixer, f"{name}_layernorm").variance_epsilon
        return rms_norm(read, eps, weights[f"{name}_layernorm.weight"])

    return _layer(mixer, x, kwargs, weights, norm)


@register("ZambaMambaMixer", kernel="S6", family="zamba")
def zamba(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose an S6 layer of Zamba, whose heads each read ``delta, B, C`` from their channels.

    Equation::

        y = W_out diag(silu(z)) [S + diag(skip)] diag(act) M_conv W_in diag(mask) x + bias
        S: h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t,  y_t = <C_t, h_t>

    Args:
        mixer: ``ZambaMambaMixer`` of transformers.
        x: Input (B, L, E).
        kwargs: Arguments of the call; ``attention_mask`` (B, L) is 0 at padding.

    Returns:
        Chain of ``out``, ``gate``, ``scan``, ``act``, ``conv``, ``in`` and, with a mask, ``mask``.

    Source:
        transformers ``modeling_zamba.py``; Glorioso et al. 2024 (arXiv 2405.16712).
    """
    weights = parameters(mixer, x)
    for name in ("in_proj.weight", "in_proj.bias"):
        if name in weights:  # its rows alternate between value and gate
            weights[name] = weights[name].unflatten(0, (-1, 2)).transpose(0, 1).flatten(0, 1)
    for name in ("A_log", "D", "dt_proj_bias"):
        weights[name] = weights[name].flatten(0, 1)
    for name in ("x_proj.weight", "dt_proj.weight", "dt_proj.bias"):
        weights[name] = weights.pop(name.replace(".", "_"))
    return _layer(mixer, x, kwargs, weights)


def _layer(
    mixer: Any,
    x: Tensor,
    kwargs: Mapping[str, Any],
    weights: Parameters,
    norm: ReadNorm = lambda _, read: read,
) -> Chain:
    """Build the chain of a layer.

    The code of earlier releases, which has no function that masks, masks what it has projected: another thing if the
    projection has a bias. Its gate has the activation of the convolution.

    Args:
        mixer: The layer.
        x: Input (B, L, E).
        kwargs: Arguments of the call.
        weights: Parameters, laid out as for :func:`~captum_ssm.layers.selective_scan.selective_layer`.
        norm: Norm of the vectors that are read from the convolved input.

    Returns:
        The chain.
    """
    now, mask = masking_function(mixer) is not None, padding_mask(kwargs, x)
    gated = F.silu if now else partial(activation, mixer.activation)
    masks_input = now or "in_proj.bias" not in weights
    return selective_layer(x, mixer.activation, weights, mask, norm, masks_input=masks_input, gated=gated)
