"""S6, the selective scan of Mamba, in the layers of mamba_ssm, of flash-linear-attention and of Vision Mamba."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from captum_ssm.errors import UnsupportedModelError
from captum_ssm.layers.mixers import register
from captum_ssm.layers.padding import padding_mask, refuse_packed
from captum_ssm.layers.parameters import parameters
from captum_ssm.layers.selective_scan import backward_names, bidirectional_layer, one_head, selective_layer
from captum_ssm.operators import Chain, Diagonal


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
        UnsupportedModelError: If the call packs several sequences into one, or Vision Mamba's layer has directions that
            share their convolution.

    Source:
        mamba_ssm ``modules/mamba_simple.py``; flash-linear-attention ``layers/mamba.py``.
    """
    refuse_packed(mixer, kwargs)
    if hasattr(mixer, "A_b_log"):
        return bidirectional(mixer, x)
    return selective_layer(x, mixer.activation, one_head(parameters(mixer, x)), padding_mask(kwargs, x))


def bidirectional(mixer: Any, x: Tensor) -> Chain:
    """Decompose the layer of Vision Mamba, which reads the sequence from both ends.

    Equation::

        y = W_out diag(silu(z)) [S M + flip S_b M_b flip] W_in x / 2 + bias

    ``S M`` are the factors of one direction; the direction from the end has a second convolution and recurrence.

    Args:
        mixer: ``Mamba`` of Vision Mamba's fork of mamba_ssm, with ``bimamba_type="v2"``.
        x: Input (B, L, E).

    Returns:
        Chain of ``layer_scale`` (where the layer has one), ``out``, ``gate``, ``half`` (where the layer divides by 2),
        ``directions``, ``in``. ``directions`` is the sum of ``forward`` and ``backward``, chains of ``scan``, ``act``,
        ``conv``.

    Raises:
        UnsupportedModelError: If the directions share their convolution (``bimamba_type="v1"``).

    Source:
        hustvl/Vim ``mamba-1p1p1/mamba_ssm/modules/mamba_simple.py``; Zhu et al. 2024 (arXiv 2401.09417), algorithm 1.
    """
    weights = parameters(mixer, x)
    if "conv1d_b.weight" not in weights:
        raise UnsupportedModelError(
            f"This Mamba layer has bimamba_type={getattr(mixer, 'bimamba_type', None)!r}. Of those that read both ways "
            'the adapter knows "v2" alone, that of the published Vision Mamba. Register an adapter of your own for it '
            "(captum_ssm.register)."
        )
    divides = getattr(mixer, "if_divide_out", getattr(mixer, "if_devide_out", False))  # the forks differ in spelling
    layer = bidirectional_layer(x, mixer.activation, weights, _BACKWARD, divides)
    return Chain({**({"layer_scale": Diagonal(weights["gamma"])} if "gamma" in weights else {}), **layer.factors})


_BACKWARD = backward_names({"A_log": "A_b_log", "D": "D_b"})
"""The parameters of the direction from the end, by the names of the other direction's."""
