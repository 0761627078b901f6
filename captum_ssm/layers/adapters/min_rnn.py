"""minGRU and minLSTM, recurrent networks whose gates do not read their state: one state for each channel."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_ssm.layers.activations import secant
from captum_ssm.layers.initial_state import refuse_state
from captum_ssm.layers.mixers import register
from captum_ssm.layers.parameters import parameters, projection, projections, sizes_of
from captum_ssm.operators import Chain, Diagonal, Operator, Projection, Scan


@register("minGRU_pytorch.minGRU", kernel="minGRU", family="minGRU_pytorch")
def min_gru(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose a minGRU.

    Equation::

        y = W_out S g(W_h x),  g(u) = diag(act) u + 1/2
        S: h_t = (1 - z_t) h_{t-1} + z_t v_t,  y_t = h_t
        z = sigmoid(W_z x)

    Args:
        mixer: ``minGRU`` of minGRU-pytorch.
        x: Input (B, L, E).
        kwargs: Arguments of the call; a state of an earlier one (``prev_hidden``) is refused.

    Returns:
        Chain of ``out`` (where the layer has one), ``scan``, ``act``, ``in``.

    Source:
        minGRU-pytorch ``minGRU.py``; Feng et al. 2024 (arXiv 2410.01201), section 3.1 and appendix B.
    """
    refuse_state(mixer, kwargs, "prev_hidden")
    weights = parameters(mixer, x)
    rows = sizes_of(weights, "to_hidden_and_gate")[0] // 2
    into, gate = projections(weights, "to_hidden_and_gate", [rows] * 2)
    z = gate.apply(x)
    return _chain(mixer, weights, x, into, keep=(-z).sigmoid(), write=z.sigmoid())


@register("minGRU_pytorch.minLSTM", kernel="minLSTM", family="minGRU_pytorch")
def min_lstm(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose a minLSTM, whose two gates are divided by their sum.

    Equation::

        y = W_out S g(W_h x),  g(u) = diag(act) u + 1/2
        S: h_t = f_t h_{t-1} + i_t v_t,  y_t = h_t
        f = sigmoid(W_f x) / (sigmoid(W_f x) + sigmoid(W_i x)),  i = 1 - f

    Args:
        mixer: ``minLSTM`` of minGRU-pytorch.
        x: Input (B, L, E).
        kwargs: Arguments of the call; a state of an earlier one (``prev_hidden``) is refused.

    Returns:
        Chain of ``out`` (where the layer has one), ``scan``, ``act``, ``in``.

    Source:
        minGRU-pytorch ``minLSTM.py``; Feng et al. 2024 (arXiv 2410.01201), section 3.2 and appendix B.
    """
    refuse_state(mixer, kwargs, "prev_hidden")
    weights = parameters(mixer, x)
    rows = sizes_of(weights, "to_hidden_and_f_i_gate")[0] // 3
    into, *gates = projections(weights, "to_hidden_and_f_i_gate", [rows] * 3)
    f, i = (gate.apply(x) for gate in gates)
    more = F.softplus(-f) - F.softplus(-i)  # the logarithm of sigmoid(i) / sigmoid(f)
    return _chain(mixer, weights, x, into, keep=(-more).sigmoid(), write=more.sigmoid())


def _chain(
    mixer: Any, weights: Mapping[str, Tensor], x: Tensor, into: Projection, keep: Tensor, write: Tensor
) -> Chain:
    """Build the chain of a layer, given its gates.

    Args:
        mixer: The layer.
        weights: Its parameters by name.
        x: Input (B, L, E).
        into: Projection of the candidate states.
        keep: Decays (B, L, D).
        write: Weights of the candidate states (B, L, D).

    Returns:
        Chain of ``out`` (where the layer has one), ``scan``, ``act``, ``in``.
    """
    act = secant("linear_sigmoid", into.apply(x))
    scan = Scan(a=keep.unsqueeze(-1), b=write.unsqueeze(-1), c=x.new_ones(1, 1, 1, 1))
    out: dict[str, Operator] = {}
    if not isinstance(mixer.to_out, nn.Identity):
        out = {"out": projection(weights, "to_out")}
    return Chain(
        {**out, "scan": scan, "act": Diagonal(act, torch.tensor(0.5, dtype=x.dtype, device=x.device)), "in": into}
    )
