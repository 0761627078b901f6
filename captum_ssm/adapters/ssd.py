"""SSD, the state space duality of Mamba-2: one decay for each head.

``y = W_out diag(norm) diag(silu(z)) [S + diag(skip)] diag(act) M_conv W_in diag(mask) x + bias``, where
``z, x, B, C, delta`` are read by one projection, ``x, B, C`` then convolved and activated, and delta kept within
the layer's limits. Each group of consecutive heads shares its B and C. The libraries name the sizes differently and
norm in other groups and orders, so each has a function that says just that, and :func:`ssd` builds the chain of all.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.adapters.reading import padding, parameters, refuse_packed, to_heads
from captum_ssm.errors import UnsupportedModelError
from captum_ssm.gates import inverse_rms, secant
from captum_ssm.layers.mixers import register
from captum_ssm.operators import CausalConv, Chain, Diagonal, Operator, Product, Projection, Scan


class Norm(NamedTuple):
    """The root-mean-square norm of what the recurrence gives."""

    groups: int
    """How many groups of consecutive channels have a scale of their own."""
    eps: float
    before_gate: bool


@register("Mamba2Mixer", kernel="SSD", family="mamba2")
@register("BambaMixer", kernel="SSD", family="bamba")
@register("GraniteMoeHybridMambaLayer", kernel="SSD", family="granitemoehybrid")
@register("FalconH1Mixer", kernel="SSD", family="falcon_h1")
@register("NemotronHMamba2Mixer", kernel="SSD", family="nemotron_h")
@register("Zamba2MambaMixer", kernel="SSD", family="zamba2")
def transformers_ssd(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """SSD of transformers' layers: see :func:`ssd`.

    Each group of heads has an RMS norm of its own. Falcon-H1 scales what goes into and comes out of the projection, may
    have its norm before the gate, or none.

    Args:
        mixer: ``Mamba2Mixer``, ``BambaMixer``, ``GraniteMoeHybridMambaLayer``, ``FalconH1Mixer``,
            ``NemotronHMamba2Mixer`` or ``Zamba2MambaMixer`` of transformers.
        x: Input (B, L, E).
        kwargs: ``attention_mask`` (B, L), 0 at padding, is respected.

    Source:
        transformers ``modeling_mamba2.py``, ``modeling_bamba.py``, ``modeling_granitemoehybrid.py``,
        ``modeling_falcon_h1.py``, ``modeling_nemotron_h.py``, ``modeling_zamba2.py``.
    """
    weights, norm = parameters(mixer, x), None
    if "norm.weight" in weights:
        norm = Norm(mixer.n_groups, mixer.norm.variance_epsilon, getattr(mixer.norm, "norm_before_gate", False))
    if "mup_vector" in weights:  # Falcon-H1's constant scales
        scale = weights["mup_vector"].flatten()
        weights["in_proj.weight"] = mixer.ssm_in_multiplier * scale.unsqueeze(1) * weights["in_proj.weight"]
        if "in_proj.bias" in weights:
            weights["in_proj.bias"] = scale * weights["in_proj.bias"]
    return ssd(x, kwargs, weights, mixer.activation, mixer.n_groups, mixer.time_step_limit, norm)


@register("Mamba2", kernel="SSD", family="mamba_ssm")
def native_mamba2(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """SSD of the packages' own Mamba2 layer, which may have no norm, and gated channels beside it: see :func:`ssd`.

    Args:
        mixer: ``Mamba2`` of mamba_ssm, or of flash-linear-attention.
        x: Input (B, L, E).
        kwargs: ``attention_mask`` (B, L) of the latter, 0 at padding, is respected.

    Raises:
        UnsupportedModelError: If the call packs several sequences into one.

    Source:
        mamba_ssm ``modules/mamba2.py``; flash-linear-attention ``layers/mamba2.py``.
    """
    refuse_packed(mixer, kwargs)
    weights, norm = parameters(mixer, x), None
    groups = mixer.ngroups if hasattr(mixer, "ngroups") else mixer.n_groups
    if "norm.weight" in weights:
        norm = Norm(groups, mixer.norm.eps, mixer.norm_before_gate)
    return ssd(x, kwargs, weights, mixer.activation, groups, mixer.dt_limit, norm)


@register("Mamba2Simple", kernel="SSD", family="mamba_ssm")
def native_mamba2_simple(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """SSD of mamba_ssm's simple Mamba-2 layer: see :func:`ssd`.

    Its fused kernel norms each group of heads by itself, its other code all channels together.

    Raises:
        UnsupportedModelError: If the call packs several sequences into one, or the layer starts from states that it has
            learnt.

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
    norm = Norm(mixer.ngroups if mixer.use_mem_eff_path else 1, mixer.norm.eps, before_gate=False)
    return ssd(x, kwargs, weights, mixer.activation, mixer.ngroups, mixer.dt_limit, norm)


def ssd(
    x: Tensor,
    kwargs: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    activation: str,
    groups: int,
    limits: tuple[float, float],
    norm: Norm | None,
) -> Chain:
    """SSD: ``h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t``, ``y_t = <C_t, h_t> + skip x_t``, one A for each head.

    The channels of a gated MLP beside the recurrence (mamba_ssm's d_ssm < d_inner), ``silu(z0) x0``, are neither
    convolved nor normed. They stand in the chain as further heads whose step is 0, so that nothing is written: all that
    they give passes by the skip.

    Args:
        x: Input (B, L, E).
        kwargs: ``attention_mask`` (B, L), 0 at padding, is respected.
        weights: The parameters by ``Mamba2Mixer``'s names; ``D`` is one number for each head or channel. All sizes are
            read from them.
        activation: Name of the activation after the convolution.
        groups: G, how many groups of heads have a B and C of their own.
        limits: The smallest and the largest step.
        norm: The norm of what the recurrence gives, if there is one.

    Returns:
        Chain of ``out, norm, gate, scan, act, conv, in`` (``gate`` before ``norm`` if that is applied first, no
        ``norm`` where there is none) and, with a mask, ``mask``.

    Source:
        Dao & Gu 2024 (arXiv 2405.21060), section 7.
    """
    mask = padding(kwargs, x)
    real = Chain(mask).apply(x)
    W, bias = weights["in_proj.weight"], weights.get("in_proj.bias")
    H, inner = len(weights["A_log"]), weights["out_proj.weight"].shape[1]
    GN = (len(W) - 2 * inner - H) // 2
    D = len(weights["conv1d.weight"]) - 2 * GN
    M = inner - D  # channels beside the recurrence, which come first

    gates, _, z, u, low = F.linear(real, W, bias).split([M, M, D, D + 2 * GN, H], dim=-1)
    conv = CausalConv(weights["conv1d.weight"].squeeze(1), weights.get("conv1d.bias"))
    pre = conv.apply(u, bias=True)
    act = Chain(mask).apply(secant(activation, pre))  # the convolution's bias puts something into padding again

    v, b, c = (act * pre).split([D, GN, GN], dim=-1)
    delta = F.softplus(low + weights["dt_bias"]).clamp(*limits)
    b, c = (to_heads(t.unflatten(-1, (groups, -1)), H) for t in (b, c))  # (B, L, H, N)
    beside = _Beside(M, D, H)
    step, rate = beside.heads(delta).unsqueeze(-1), beside.heads(-weights["A_log"].exp())
    scan = Scan(
        a=Product((step, rate.view(1, 1, -1, 1)), exponential=True),
        b=Product((step, beside.states(b))),
        c=beside.states(c),
        skip=beside.channels(weights["D"].repeat_interleave(D // len(weights["D"])), 1.0),
        head_size=beside.head_size,
    )
    gate = F.silu(z)
    factors: dict[str, Operator] = {"gate": Diagonal(torch.cat([F.silu(gates), gate], -1) if M else gate)}
    if norm is not None:
        y = scan.apply(beside.channels(v, 0.0))[..., M:]
        normed = (y if norm.before_gate else gate * y).unflatten(-1, (norm.groups, -1))
        scale = inverse_rms(normed, norm.eps).expand_as(normed).flatten(-2) * weights["norm.weight"]
        norms: dict[str, Operator] = {"norm": Diagonal(beside.channels(scale, 1.0))}
        factors = {**factors, **norms} if norm.before_gate else {**norms, **factors}

    return Chain(
        {
            "out": Projection(weights["out_proj.weight"], weights.get("out_proj.bias")),
            **factors,
            "scan": scan,
            "act": Diagonal(beside.channels(act[..., :D], 1.0)),
            "conv": beside.conv(conv.channels(slice(D))),
            "in": Projection(beside.values(W), None if bias is None else beside.values(bias)),
            **mask,
        }
    )


class _Beside(NamedTuple):
    """How channels beside the recurrence, M of them before its D channels, are taken into its factors."""

    M: int
    D: int
    H: int

    @property
    def head_size(self) -> int:
        """Channels of a head, such that both are made of whole heads."""
        return math.gcd(self.D // self.H, self.M)

    def heads(self, t: Tensor) -> Tensor:
        """Return ``t`` (..., H) for all heads, 0 for those beside the recurrence."""
        if not self.M:
            return t
        return F.pad(t.repeat_interleave(self.D // self.H // self.head_size, -1), (self.M // self.head_size, 0))

    def states(self, t: Tensor) -> Tensor:
        """Return ``t`` (B, L, H, N) for all heads; what all share stays shared."""
        return t if t.shape[2] == 1 else self.heads(t.mT).mT

    def channels(self, t: Tensor, value: float) -> Tensor:
        """Return ``t`` (..., D) for all channels, ``value`` for those beside the recurrence."""
        return F.pad(t, (self.M, 0), value=value) if self.M else t

    def values(self, t: Tensor) -> Tensor:
        """Return the rows of the projection, weight or bias, that give the input of all channels."""
        ours = t[2 * self.M + self.D : 2 * (self.M + self.D)]
        return torch.cat([t[self.M : 2 * self.M], ours]) if self.M else ours

    def conv(self, conv: CausalConv) -> CausalConv:
        """Return the convolution of all channels, the identity of those beside the recurrence."""
        if not self.M:
            return conv
        now = F.pad(conv.w.new_ones(self.M, 1), (conv.w.shape[1] - 1, 0))
        bias = None if conv.bias is None else self.channels(conv.bias, 0.0)
        return CausalConv(torch.cat([now, conv.w]), bias)
