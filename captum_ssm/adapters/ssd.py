"""SSD, the state space duality of Mamba-2: one decay for each head."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from captum_ssm.adapters.reading import padding, parameters, to_heads
from captum_ssm.gates import inverse_rms, secant
from captum_ssm.operators import CausalConv, Chain, Diagonal, Operator, Product, Projection, Scan
from captum_ssm.registry import register


@register("Mamba2Mixer", kernel="SSD", family="mamba2")
@register("BambaMixer", kernel="SSD", family="bamba")
@register("GraniteMoeHybridMambaLayer", kernel="SSD", family="granitemoehybrid")
@register("FalconH1Mixer", kernel="SSD", family="falcon_h1")
@register("NemotronHMamba2Mixer", kernel="SSD", family="nemotron_h")
@register("Zamba2MambaMixer", kernel="SSD", family="zamba2")
def ssd(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """SSD: ``h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t``, ``y_t = <C_t, h_t> + skip x_t``, one A for each head.

    ``y = W_out diag(norm) diag(silu(z)) [S + diag(skip)] diag(act) M_conv W_in diag(mask) x + bias``, where
    ``z, x, B, C, delta`` are read by one projection, ``x, B, C`` then convolved and activated, and delta kept within
    the layer's limits. Each group of consecutive heads shares its B and C, and has an RMS norm of its own. Falcon-H1
    scales what goes into and comes out of the projection, may have its norm before the gate, or none.

    Args:
        mixer: ``Mamba2Mixer``, ``BambaMixer``, ``GraniteMoeHybridMambaLayer``, ``FalconH1Mixer``,
            ``NemotronHMamba2Mixer`` or ``Zamba2MambaMixer`` of transformers.
        x: Input (B, L, E).
        kwargs: ``attention_mask`` (B, L), 0 at padding, is respected.

    Returns:
        Chain of ``out, norm, gate, scan, act, conv, in`` (``gate`` before ``norm`` or no ``norm`` in Falcon-H1) and,
        with a mask, ``mask``.

    Source:
        transformers ``modeling_mamba2.py``, ``modeling_bamba.py``, ``modeling_granitemoehybrid.py``,
        ``modeling_falcon_h1.py``, ``modeling_nemotron_h.py``, ``modeling_zamba2.py``; Dao & Gu 2024
        (arXiv 2405.21060), section 7.
    """
    weights, mask = parameters(mixer, x), padding(kwargs, x)
    masked = Chain(mask).apply
    D, H, G, N = mixer.intermediate_size, mixer.num_heads, mixer.n_groups, mixer.ssm_state_size

    W, bias = _projection(mixer, weights)
    z, u, low = F.linear(masked(x), W, bias).split([D, D + 2 * G * N, H], dim=-1)
    conv = CausalConv(weights["conv1d.weight"].squeeze(1), weights.get("conv1d.bias"))
    pre = conv.apply(u, bias=True)
    act = masked(secant(mixer.activation, pre))  # the bias of the convolution puts something into padding again

    v, b, c = (act * pre).split([D, G * N, G * N], dim=-1)
    b, c = (to_heads(t.unflatten(-1, (G, N)), H) for t in (b, c))  # (B, L, H, N)
    delta = F.softplus(low + weights["dt_bias"]).clamp(*mixer.time_step_limit)
    step, decay = delta.unsqueeze(-1), -weights["A_log"].exp().view(1, 1, H, 1)  # (B, L, H, 1), (1, 1, H, 1)
    scan = Scan(
        a=Product((step, decay), exponential=True),
        b=Product((step, b)),
        c=c,
        skip=weights["D"].repeat_interleave(D // H),
        head_size=D // H,
    )
    factors: dict[str, Operator] = {
        "out": Projection(weights["out_proj.weight"], weights.get("out_proj.bias")),
        **_gate_and_norm(mixer, weights, scan.apply(v), F.silu(z)),
        "scan": scan,
        "act": Diagonal(act[..., :D]),
        "conv": conv.channels(slice(D)),
        "in": Projection(W[D : 2 * D], None if bias is None else bias[D : 2 * D]),
    }
    return Chain({**factors, **mask})


def _projection(mixer: Any, weights: Mapping[str, Tensor]) -> tuple[Tensor, Tensor | None]:
    """Return weight and bias of the projection of z, x, B, C and delta, Falcon-H1's constant scales included."""
    W, bias = weights["in_proj.weight"], weights.get("in_proj.bias")
    if "mup_vector" not in weights:
        return W, bias
    scale = weights["mup_vector"].flatten()
    return mixer.ssm_in_multiplier * scale.unsqueeze(1) * W, None if bias is None else scale * bias


def _gate_and_norm(mixer: Any, weights: Mapping[str, Tensor], y: Tensor, gate: Tensor) -> dict[str, Operator]:
    """Return the factors of the gate and, if there is one, of the norm, in the order of the equation.

    Args:
        mixer: The layer.
        weights: Its parameters by name.
        y: What the recurrence gives (B, L, D).
        gate: (B, L, D).
    """
    gates: dict[str, Operator] = {"gate": Diagonal(gate)}
    if "norm.weight" not in weights:
        return gates
    before_gate = getattr(mixer.norm, "norm_before_gate", False)
    groups = (y if before_gate else gate * y).unflatten(-1, (mixer.n_groups, -1))
    scale = inverse_rms(groups, mixer.norm.variance_epsilon).expand_as(groups).flatten(-2)
    norms: dict[str, Operator] = {"norm": Diagonal(scale * weights["norm.weight"])}
    return {**gates, **norms} if before_gate else {**norms, **gates}
