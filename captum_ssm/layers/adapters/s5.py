"""S5, a recurrence with complex diagonal states that all channels share."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from captum_ssm.errors import UnsupportedModelError
from captum_ssm.layers.complex_states import complex_states
from captum_ssm.layers.initial_state import refuse_state
from captum_ssm.layers.mixers import register
from captum_ssm.operators import Chain, Sum


@register("s5.S5", kernel="S5", family="s5")
def s5(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose an S5 layer, whose coefficients do not depend on its input.

    Equation::

        y_t = Re(C z_t) + diag(skip) x_t,  z_t = exp(lambda delta) z_{t-1} + B x_t

    In both directions, a second C reads the states of the sequence from its end.

    Args:
        mixer: ``S5`` of s5-pytorch.
        x: Input (B, L, E).
        kwargs: Arguments of the call; ``step_scale`` is a number. A ``state`` of an earlier call is refused.

    Returns:
        Chain of ``out``, ``scan``, ``in``; in both directions of ``directions``, the sum of ``forward`` and
        ``backward``, which are such chains.

    Raises:
        UnsupportedModelError: If the decays depend on the input (liquid), or the call has steps of its own.
        ModelStateError: If the call has a state.

    Source:
        s5-pytorch ``s5_model.py``; Smith et al. 2022 (arXiv 2208.04933), equations 2 and 6.
    """
    refuse_state(mixer, kwargs, "state")
    layer, scale = mixer.seq, kwargs.get("step_scale", 1.0)
    if layer.liquid or isinstance(scale, Tensor):
        raise UnsupportedModelError(
            f"An S5 layer {'that is liquid' if layer.liquid else 'with a step for each token or example'} is not "
            "supported. Register an adapter of your own for it (captum_ssm.register)."
        )
    B, C = (t.detach() for t in layer.get_BC_tilde())
    decay, B = layer.discretize(layer.Lambda.detach(), B, scale * layer.log_step.detach().exp())
    B, skip, N = B**layer.degree, layer.D.detach(), len(decay)
    forward = complex_states(decay, B, C[:, :N], skip, x)
    if not layer.bidir:
        return forward
    backward = complex_states(decay, B, C[:, N:], torch.zeros_like(skip), x).flipped()
    return Chain({"directions": Sum({"forward": forward, "backward": backward})})
