"""The state space duality of Mamba-2, SSD, in the form that its layers share: one decay for each head.

One projection reads ``z, x, B, C, delta``; ``x, B, C`` are then convolved and activated, and delta is bounded by the
layer's limits. Each group of consecutive heads shares its B and C. The libraries name the sizes differently, and norm
in other groups and orders. Their adapters say just that, and the functions below build the factors.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.layers.activations import secant
from captum_ssm.layers.bypass import Bypass
from captum_ssm.layers.heads import to_heads
from captum_ssm.layers.norms import group_norm
from captum_ssm.layers.padding import padding_mask
from captum_ssm.layers.parameters import convolution, projection, sizes_of
from captum_ssm.operators import CausalConv, Chain, Diagonal, Operator, Product, Scan


class OutputNorm(NamedTuple):
    """Root-mean-square norm of the recurrence's output."""

    groups: int
    """Number of groups of consecutive channels that are normed separately."""
    eps: float
    before_gate: bool


class SSDOptions(NamedTuple):
    """Properties of a layer that are not parameters."""

    activation: str
    """Name of the activation after the convolution."""
    groups: int
    """Number of groups of heads that share their B and C."""
    limits: tuple[float, float]
    """The smallest and the largest step."""
    norm: OutputNorm | None


def ssd_layer(x: Tensor, kwargs: Mapping[str, Any], weights: Mapping[str, Tensor], options: SSDOptions) -> Chain:
    """Build the chain of an SSD layer, of either library.

    The channels of a gated MLP beside the recurrence (mamba_ssm's d_ssm < d_inner), ``silu(z0) x0``, are neither
    convolved nor normed: see :class:`~captum_ssm.layers.bypass.Bypass`.

    Args:
        x: Input (B, L, E).
        kwargs: Arguments of the call; ``attention_mask`` (B, L) is 0 at padding.
        weights: Parameters by ``Mamba2Mixer``'s names, from which all sizes are read; ``D`` has one number for each
            head or channel.
        options: Other properties of the layer.

    Returns:
        Chain of ``out``, ``norm``, ``gate``, ``scan``, ``act``, ``conv``, ``in`` and ``mask``, where they exist.

    Source:
        Dao & Gu 2024 (arXiv 2405.21060), section 7.
    """
    mask = padding_mask(kwargs, x)
    H, inner = len(weights["A_log"]), sizes_of(weights, "out_proj")[1]
    GN = (sizes_of(weights, "in_proj")[0] - 2 * inner - H) // 2
    D = len(weights["conv1d.weight"]) - 2 * GN
    M = inner - D  # channels beside the recurrence, which come first
    bypass, masked = Bypass(M, D // H, first=True), Chain(mask).apply(x)

    gates = projection(weights, "in_proj", lambda t: _rows_of_gates(t, M, D)).apply(masked, bias=True)  # (B, L, M + D)
    into = projection(weights, "in_proj", lambda t: _rows_of_values(t, M, D))
    read = projection(weights, "in_proj", lambda t: t[2 * (M + D) :])
    u, low = read.apply(masked, bias=True).split([2 * GN, H], dim=-1)
    conv = convolution(weights, "conv1d", lambda t: t[:D])
    act, v = _activated(conv, bypass.own(into.apply(masked, bias=True)), options.activation, mask)
    b, c = _activated(convolution(weights, "conv1d", lambda t: t[D:]), u, options.activation, mask)[1].chunk(2, dim=-1)
    scan = _recurrence(weights, options, bypass, low, b, c)

    return Chain(
        {
            "out": projection(weights, "out_proj"),
            **_norm_and_gate(weights, options.norm, bypass, scan, v, gates),
            "scan": scan,
            "act": Diagonal(bypass.channels(act, 1.0)),
            "conv": bypass.convolution(conv),
            "in": into,
            **mask,
        }
    )


def _rows_of_gates(t: Tensor, M: int, D: int) -> Tensor:
    """Select the rows of the input projection, weight or bias, that make the gates of all channels."""
    rows = t[2 * M : 2 * M + D]
    return torch.cat([t[:M], rows]) if M else rows


def _rows_of_values(t: Tensor, M: int, D: int) -> Tensor:
    """Select the rows of the input projection, weight or bias, that make the input of all channels."""
    rows = t[2 * M + D : 2 * (M + D)]
    return torch.cat([t[M : 2 * M], rows]) if M else rows


def _activated(conv: CausalConv, u: Tensor, activation: str, mask: Mapping[str, Operator]) -> tuple[Tensor, Tensor]:
    """Convolve and activate channels.

    Args:
        conv: Their convolution.
        u: The channels (B, L, D).
        activation: Name of the activation.
        mask: Factor that sets padding to 0, or an empty dictionary: the convolution's bias leaves entries there.

    Returns:
        The gate that the activation puts on its input, and its product with that input, both (B, L, D).
    """
    pre = conv.apply(u, bias=True)
    act = Chain(mask).apply(secant(activation, pre))
    return act, act * pre


def _recurrence(
    weights: Mapping[str, Tensor], options: SSDOptions, bypass: Bypass, low: Tensor, b: Tensor, c: Tensor
) -> Scan:
    """Build the recurrence of all channels.

    Args:
        weights: Parameters by ``Mamba2Mixer``'s names.
        options: Other properties of the layer.
        bypass: Channels beside the recurrence.
        low: Delta before its bias and the softplus (B, L, H).
        b: Weights of the input (B, L, G·N).
        c: Weights of the state in the output (B, L, G·N).

    Returns:
        The recurrence; its skip is 1 for the channels beside it.
    """
    H, skip = low.shape[-1], weights["D"]
    delta = F.softplus(low + weights["dt_bias"]).clamp(*options.limits)
    b, c = (to_heads(t.unflatten(-1, (options.groups, -1)), H) for t in (b, c))  # (B, L, H, N)
    b, c = (t if t.shape[2] == 1 else bypass.heads(t.mT).mT for t in (b, c))
    step, rate = bypass.heads(delta).unsqueeze(-1), bypass.heads(-weights["A_log"].exp())
    return Scan(
        a=Product((step, rate.view(1, 1, -1, 1)), exponential=True),
        b=Product((step, b)),
        c=c,
        skip=bypass.channels(skip.repeat_interleave(H * bypass.P // len(skip)), 1.0),
        head_size=bypass.head_size,
    )


def _norm_and_gate(
    weights: Mapping[str, Tensor], norm: OutputNorm | None, bypass: Bypass, scan: Scan, v: Tensor, z: Tensor
) -> dict[str, Operator]:
    """Build the norm and the gate of all channels.

    Args:
        weights: Parameters by ``Mamba2Mixer``'s names.
        norm: The norm, or None.
        bypass: Channels beside the recurrence, which are not normed.
        scan: The recurrence of all channels.
        v: Input of the recurrence (B, L, D).
        z: Gates of all channels before the activation (B, L, M + D).

    Returns:
        ``norm``, if there is one, and ``gate``, in the order of the equation.
    """
    gate = F.silu(z)
    gates: dict[str, Operator] = {"gate": Diagonal(gate)}
    if norm is None:
        return gates
    y = bypass.own(scan.apply(bypass.channels(v, 0.0)))
    scale = group_norm(y if norm.before_gate else bypass.own(gate) * y, norm.groups, norm.eps, weights["norm.weight"]).s
    norms: dict[str, Operator] = {"norm": Diagonal(bypass.channels(scale, 1.0))}
    return {**gates, **norms} if norm.before_gate else {**norms, **gates}
