"""RWKV-6 and RWKV-7 of flash-linear-attention: time mixing, and the token shift of their channel mixing."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.adapters.fla_reading import function_name, low_rank, masked
from captum_ssm.adapters.reading import parameters
from captum_ssm.gates import activation, inverse_length, inverse_rms, secant
from captum_ssm.layers.mixers import register
from captum_ssm.layers.sources import register_source
from captum_ssm.operators import CausalConv, Centre, Chain, DeltaScan, Diagonal, Operator, Projection, Scan, Sum

_SLOWEST = -math.exp(-0.5)
"""The least logarithm of a decay of RWKV-7."""

_TINY = 1e-24
"""Keeps the length of a key of zeros from being divided by, where the layer takes torch's ``normalize``."""


@register("RWKV6Attention", kernel="WKV-6", family="fla")
def wkv6(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Time mixing of RWKV-6: ``h_t = diag(a_t) h_{t-1} + k_t v_t``, ``y_t = <r_t, h_{t-1} + diag(bonus) k_t v_t>``.

    ``y = W_out diag(act(g)) [diag(norm) S centre W_v shift_v diag(mask) x + bias]`` with ``a = exp(-exp(w))``. Each of
    ``r, w, k, v, g`` reads a mixture of a token and the one before it whose weights depend on the token. The layer norm
    of each head is centring and a diagonal; as a head's channels share one matrix, they may be centred before it.

    Args:
        mixer: ``RWKV6Attention`` of fla.
        x: Input (B, L, E).
        kwargs: ``attention_mask`` (B, L), 0 at padding, is respected.

    Returns:
        Chain of ``out, gate, norm, scan, centre, value, shift`` and, with a mask, ``padding`` before ``value`` and
        ``mask``.

    Source:
        flash-linear-attention ``layers/rwkv6.py``; Peng et al. 2024 (arXiv 2404.05892), section 4.2, Finch.
    """
    weights, mask = parameters(mixer, x), masked(mixer, kwargs, x)
    real, H, P = Chain(mask).apply(x), mixer.num_heads, mixer.head_v_dim
    step = _previous(real) - real

    low = F.linear(real + step * weights["x_proj.0.mu"], weights["x_proj.0.linear.weight"]).tanh()
    low, W = (t.unflatten(-1, (5, -1)) for t in (low, weights["x_proj.2.weight"]))  # (B, L, 5, rank), (E, 5, rank)
    mixed = torch.einsum("blnr,enr->blne", low, W) + weights["x_bias"]
    shift = {name: mixed[..., number, :] for number, name in enumerate("rwkvg")}
    inputs = {name: real + step * mu for name, mu in shift.items()}
    r, k, g = (F.linear(inputs[name], weights[f"{name}_proj.linear.weight"]) for name in "rkg")
    w = low_rank(weights, "w_proj.linear.lora", inputs["w"], torch.tanh)
    r, w, k = (t.unflatten(-1, (H, -1)) for t in (r, w, k))

    scan = Scan(
        a=torch.exp(-w.exp()),
        b=k,
        c=r,
        lag=1,
        bonus=(r * weights["bonus"] * k).sum(-1).repeat_interleave(P, -1),
        head_size=P,
    )
    value: dict[str, Operator] = {
        "centre": Centre(P),
        **({"padding": mask["mask"]} if mask else {}),  # which holds the token before it
        "value": Projection(weights["v_proj.linear.weight"]),
        "shift": Scan(
            a=torch.zeros_like(x[:1, :1, :1, None]),
            b=torch.ones_like(x[:1, :1, :1, None]),
            c=shift["v"].unsqueeze(-1),
            lag=1,
            bonus=1 - shift["v"],
        ),
        **mask,
    }
    return Chain(
        {
            "out": Projection(weights["o_proj.weight"]),
            "gate": Diagonal(activation(function_name(mixer.gate_fn), g)),
            "norm": _group_norm(mixer, weights, scan.apply(Chain(value).apply(x)), H),
            "scan": scan,
            **value,
        }
    )


@register("RWKV7Attention", kernel="WKV-7", family="fla")
def wkv7(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Time mixing of RWKV-7: ``h_t = diag(a_t) h_{t-1} - e_t <kappa_t, h_{t-1}> + k_t v_t``, ``y_t = <r_t, h_t>``.

    ``y = W_out diag(g) [diag(norm) S centre + diag(bonus)] v + bias`` with ``v = diag(1 - m) W_v shift_v diag(mask) x +
    diag(m) v_first``. A token erases in the direction ``e = eta kappa``, ``eta`` between 0 and 1 for each state, what
    it finds in the direction of the unit vector ``kappa``; its key is ``k (1 + (eta - 1) weight)``. The bonus of a head
    is ``<r, weight k>``.

    ``v_first = W_v shift_v x`` are the values of the model's first layer, of its input and with its parameters. In a
    model ``x`` holds that input too, and the argument ``source`` is that layer. Of a layer by itself ``v_first`` is a
    bias.

    Args:
        mixer: ``RWKV7Attention`` of fla.
        x: Input (B, L, E), or with that of the first layer (B, L, 2E).
        kwargs: ``attention_mask`` (B, L), 0 at padding, ``v_first`` (B, L, D) and ``source`` are respected.

    Returns:
        Chain of ``out, gate, heads, both, mix, value, shift``, by itself without ``both``, in the first layer without
        ``mix``, and, with a mask, ``padding`` before these and ``mask``. ``heads`` is the sum of ``recurrence``, a
        chain of ``norm, scan, centre``, and ``bonus``.

    Source:
        flash-linear-attention ``layers/rwkv7.py``; Peng et al. 2025 (arXiv 2503.14456), section 4.
    """
    weights, mask = parameters(mixer, x), masked(mixer, kwargs, x)
    real, H, P = Chain(mask).apply(x[..., : mixer.hidden_size]), mixer.num_heads, mixer.head_v_dim
    inputs = {name: _shift(weights[f"x_{name}"]).apply(real) for name in "rwkvag"}

    def heads(t: Tensor) -> Tensor:
        return t.unflatten(-1, (H, -1))

    r, key = (F.linear(inputs[name], weights[f"{name}_proj.weight"]) for name in "rk")
    eta = low_rank(weights, "a_lora.lora", inputs["a"]).sigmoid()
    log_a = _SLOWEST * low_rank(weights, "w_lora.lora", inputs["w"], torch.tanh).sigmoid()
    kappa = heads(key * weights["k_k"])
    kappa = kappa * inverse_length(kappa, 1e-6 if mixer.fuse_norm else _TINY)
    r, k = heads(r), heads(key * (1 + (eta - 1) * weights["k_a"]))

    scan = DeltaScan(a=heads(log_a).exp(), b=k, c=r, recall=kappa, erase=kappa * heads(eta), head_size=P)
    value: dict[str, Operator] = {
        **({"padding": mask["mask"]} if mask else {}),  # which holds the token before it
        **_values(mixer, weights, inputs["v"], kwargs),
        **mask,
    }
    centre = Centre(P)
    found = scan.apply(centre.apply(Chain(value).apply(x, bias=True)))
    recurrence = Chain({"norm": _group_norm(mixer, weights, found, H), "scan": scan, "centre": centre})
    bonus = (r * weights["r_k"] * k).sum(-1).repeat_interleave(P, -1)
    return Chain(
        {
            "out": Projection(weights["o_proj.weight"]),
            "gate": Diagonal(low_rank(weights, "g_lora.lora", inputs["g"], torch.sigmoid)),
            "heads": Sum({"recurrence": recurrence, "bonus": Diagonal(bonus)}),
            **value,
        }
    )


@register("RWKV6FeedForward", kernel="token shift", family="fla")
def channel_mix6(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Channel mixing of RWKV-6, ``y = diag(sigmoid(W_r shift_r x)) W_v diag(act) W_k shift_k diag(mask) x``.

    Args:
        mixer: ``RWKV6FeedForward`` of fla.
        x: Input (B, L, E).
        kwargs: ``attention_mask`` (B, L), 0 at padding, is respected.

    Returns:
        Chain of ``gate, value, act, key, shift`` and, with a mask, ``mask``.

    Source:
        flash-linear-attention ``models/rwkv6/modeling_rwkv6.py``; Peng et al. 2024 (arXiv 2404.05892), section 4.3.
    """
    weights, mask = parameters(mixer, x), masked(mixer, kwargs, x)
    shifted = _shift(weights["receptance.mu"]).apply(Chain(mask).apply(x))
    gate = F.linear(shifted, weights["receptance.linear.weight"]).sigmoid()
    inner = _feed_forward(mixer, weights, x, "key.linear.weight", weights["key.mu"], mask)
    return Chain({"gate": Diagonal(gate), **inner})


@register("RWKV7FeedForward", kernel="token shift", family="fla")
def channel_mix7(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Channel mixing of RWKV-7, ``y = W_v diag(act) W_k shift_k diag(mask) x``.

    Args:
        mixer: ``RWKV7FeedForward`` of fla.
        x: Input (B, L, E).
        kwargs: ``attention_mask`` (B, L), 0 at padding, is respected.

    Returns:
        Chain of ``value, act, key, shift`` and, with a mask, ``mask``.

    Source:
        flash-linear-attention ``models/rwkv7/modeling_rwkv7.py``; Peng et al. 2025 (arXiv 2503.14456), section 4.
    """
    weights, mask = parameters(mixer, x), masked(mixer, kwargs, x)
    return Chain(_feed_forward(mixer, weights, x, "key.weight", weights["x_k"], mask))


def _feed_forward(
    mixer: Any, weights: Mapping[str, Tensor], x: Tensor, name: str, mu: Tensor, mask: Mapping[str, Operator]
) -> dict[str, Operator]:
    """Return the factors ``value, act, key, shift`` and ``mask`` of a channel mixing."""
    into: dict[str, Operator] = {"key": Projection(weights[name]), "shift": _shift(mu), **mask}
    act = secant(function_name(mixer.act_fn), Chain(into).apply(x))
    return {"value": Projection(weights["value.weight"]), "act": Diagonal(act), **into}


def _values(mixer: Any, weights: Mapping[str, Tensor], x: Tensor, kwargs: Mapping[str, Any]) -> dict[str, Operator]:
    """Return the factors of the values: ``value, shift``, in all but the first layer with the first one's mixed in."""
    W, mu, source = weights["v_proj.weight"], weights["x_v"], kwargs.get("source")
    if mixer.layer_idx == 0:
        return {"value": Projection(W), "shift": _shift(mu)}
    m = low_rank(weights, "v_lora.lora", x).sigmoid()
    if source is None:
        mix = Diagonal(1 - m, m * kwargs["v_first"].to(x))
        return {"mix": mix, "value": Projection(W), "shift": _shift(mu)}
    first, one = parameters(source, x), torch.eye(len(W)).to(x)
    return {
        "both": Projection(torch.cat([one, one], dim=1)),
        "mix": Diagonal(torch.cat([1 - m, m], dim=-1)),
        "value": Projection(torch.block_diag(W, first["v_proj.weight"])),
        "shift": _shift(torch.cat([mu.flatten(), first["x_v"].flatten()])),
    }


@register_source("RWKV7Attention")
def first_layer(mixer: Any, calls: Sequence[Any]) -> Any:
    """The values of the first layer are made of its input. Source: ``modeling_rwkv7.py``."""
    same = (call for call in reversed(calls) if type(call.mixer) is type(mixer) and call.mixer.layer_idx == 0)
    return None if mixer.layer_idx == 0 else next(same, None)


def _group_norm(mixer: Any, weights: Mapping[str, Tensor], centred: Tensor, H: int) -> Diagonal:
    """Return the layer norm of each head as a diagonal.

    Args:
        mixer: The layer.
        weights: Its parameters by name.
        centred: What the recurrence gives for centred values (B, L, D).
        H: Number of heads.
    """
    groups = centred.unflatten(-1, (H, -1))
    scale = inverse_rms(groups, mixer.g_norm.eps).expand_as(groups).flatten(-2)
    weight = weights.get("g_norm.weight")
    return Diagonal(scale if weight is None else scale * weight, weights.get("g_norm.bias"))


def _previous(x: Tensor) -> Tensor:
    """Return the token before each, 0 before the first."""
    return F.pad(x, (0, 0, 1, -1))


def _shift(mu: Tensor) -> CausalConv:
    """Return the convolution ``(1 - mu) x_t + mu x_{t-1}``."""
    before = mu.flatten()
    return CausalConv(torch.stack([before, 1 - before], dim=-1))
