"""Time mixing of RWKV-7, in flash-linear-attention and in rwkv7-hf."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from captum_ssm.layers.fla_factors import unpacked_mask
from captum_ssm.layers.mixers import register
from captum_ssm.layers.norms import group_norm, inverse_length
from captum_ssm.layers.parameters import low_rank, parameters, projection, sizes_of
from captum_ssm.layers.sources import register_source
from captum_ssm.layers.token_shift import token_shift
from captum_ssm.operators import CausalConv, Centre, Chain, DeltaScan, Diagonal, Operator, Projection, Sum

_SLOWEST = -math.exp(-0.5)
"""The least logarithm of a decay of RWKV-7."""

_TINY = 1e-24
"""Added to the squared length of a key, which may be 0, where the layer takes torch's ``normalize``."""


@register("RWKV7TimeMix", kernel="WKV-7", family="rwkv7_hf", parts=("w_lora", "g_norm", "x_w"))
@register("fla.RWKV7Attention", kernel="WKV-7", family="fla")
def wkv7(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose the time mixing of RWKV-7.

    Equation::

        y = W_out diag(g) [diag(norm) S centre + diag(bonus)] v + bias
        v = diag(1 - m) W_v shift_v diag(mask) x + diag(m) v_first,  bonus = <r, r_k k>
        S: h_t = diag(a_t) h_{t-1} - e_t <kappa_t, h_{t-1}> + k_t v_t,  y_t = <r_t, h_t>

    ``v_first = W_v shift_v x`` are the values of the model's first layer, of its input and with its parameters. In a
    model ``x`` holds that input too, and the argument ``source`` is that layer. For a layer without its model
    ``v_first`` is a bias.

    Args:
        mixer: ``RWKV7Attention`` of fla, or ``RWKV7TimeMix`` of rwkv7-hf.
        x: Input (B, L, E); in a model (B, L, 2E), followed by the input of the first layer.
        kwargs: Arguments of the call: ``attention_mask`` (B, L) is 0 at padding, ``v_first`` is (B, L, D), ``source``
            is the first layer.

    Returns:
        Chain of ``out``, ``gate``, ``heads``, ``both`` (in a model), ``mix`` (in all but the first layer), ``value``,
        ``shift`` and, with a mask, ``padding`` before these, and ``mask``. ``heads`` is the sum of ``recurrence``, a
        chain of ``norm``, ``scan``, ``centre``, and ``bonus``.

    Source:
        flash-linear-attention ``layers/rwkv7.py``; rwkv7-hf ``modeling_rwkv7.py``; Peng et al. 2025
        (arXiv 2503.14456), section 4.
    """
    weights, mask = parameters(mixer, x), unpacked_mask(mixer, kwargs, x)
    masked, H, centre = Chain(mask).apply(x[..., : mixer.hidden_size]), mixer.num_heads, Centre(_channels(mixer))
    inputs = {name: _shift(weights[f"x_{name}"]).apply(masked) for name in "rwkvag"}
    scan, r, k = _recurrence(mixer, weights, inputs)
    value: dict[str, Operator] = {
        **({"padding": mask["mask"]} if mask else {}),  # the shift leaves the token before it there
        **_values(mixer, weights, inputs["v"], kwargs),
        **mask,
    }
    y, eps = scan.apply(centre.apply(Chain(value).apply(x, bias=True))), mixer.g_norm.eps
    norm = group_norm(y, H, eps, weights.get("g_norm.weight"), weights.get("g_norm.bias"))
    recurrence = Chain({"norm": norm, "scan": scan, "centre": centre})
    bonus = (r * weights["r_k"] * k).sum(-1).repeat_interleave(centre.size, -1)  # (B, L, D)
    return Chain(
        {
            "out": projection(weights, "o_proj"),
            "gate": Diagonal(low_rank(weights, "g_lora.lora", inputs["g"], torch.sigmoid)),
            "heads": Sum({"recurrence": recurrence, "bonus": Diagonal(bonus)}),
            **value,
        }
    )


def _recurrence(
    mixer: Any, weights: Mapping[str, Tensor], inputs: Mapping[str, Tensor]
) -> tuple[DeltaScan, Tensor, Tensor]:
    """Build the recurrence of a layer.

    A token erases in the direction ``e = eta kappa``, with ``eta`` between 0 and 1 for each state, the value found in
    the direction of the unit vector ``kappa``. Its key is ``k = W_k x (1 + (eta - 1) k_a)``.

    Args:
        mixer: The layer.
        weights: Parameters by name.
        inputs: The mixture (B, L, E) that each of ``r``, ``w``, ``k`` and ``a`` reads.

    Returns:
        The recurrence, and its r and k (B, L, H, N).
    """

    def heads(t: Tensor) -> Tensor:
        return t.unflatten(-1, (mixer.num_heads, -1))

    r, key = (projection(weights, f"{name}_proj").apply(inputs[name], bias=True) for name in "rk")
    eta = low_rank(weights, "a_lora.lora", inputs["a"]).sigmoid()
    log_a = _SLOWEST * low_rank(weights, "w_lora.lora", inputs["w"], torch.tanh).sigmoid()
    kappa = heads(key * weights["k_k"])  # (B, L, H, N)
    kappa = kappa * inverse_length(kappa, 1e-6 if getattr(mixer, "fuse_norm", False) else _TINY)
    r, k = heads(r), heads(key * (1 + (eta - 1) * weights["k_a"]))
    erase = kappa * heads(eta)
    scan = DeltaScan(a=heads(log_a).exp(), b=k, c=r, recall=kappa, erase=erase, head_size=_channels(mixer))
    return scan, r, k


def _values(mixer: Any, weights: Mapping[str, Tensor], x: Tensor, kwargs: Mapping[str, Any]) -> dict[str, Operator]:
    """Build the factors of the values.

    Args:
        mixer: The layer.
        weights: Parameters by name.
        x: The mixture (B, L, E) that the values read.
        kwargs: Arguments of the call.

    Returns:
        ``value`` and ``shift``; in all but the first layer ``mix`` before them, which adds the values of the first
        layer, and ``both`` before that, if ``x`` holds the input of the first layer.
    """
    value, mu, source = projection(weights, "v_proj"), weights["x_v"], kwargs.get("source")
    if mixer.layer_idx == 0:
        return {"value": value, "shift": _shift(mu)}
    m = low_rank(weights, "v_lora.lora", x).sigmoid()
    if source is None:
        return {"mix": Diagonal(1 - m, m * kwargs["v_first"].to(x)), "value": value, "shift": _shift(mu)}
    size = sizes_of(weights, "v_proj")[0]
    first, identity = parameters(source, x), torch.eye(size, dtype=x.dtype, device=x.device)
    return {
        "both": Projection(torch.cat([identity, identity], dim=1)),
        "mix": Diagonal(torch.cat([1 - m, m], dim=-1)),
        "value": Projection(torch.block_diag(value.W, projection(first, "v_proj").W)),
        "shift": _shift(torch.cat([mu.flatten(), first["x_v"].flatten()])),
    }


@register_source("RWKV7Attention", "RWKV7TimeMix")
def first_layer(mixer: Any, calls: Sequence[Any]) -> Any:
    """Find the call of the first layer, whose input makes the values ``v_first``.

    Args:
        mixer: The layer.
        calls: The calls before it.

    Returns:
        The latest call of a first layer, or None for a first layer.

    Source:
        flash-linear-attention ``modeling_rwkv7.py``.
    """
    first = (call for call in reversed(calls) if type(call.mixer) is type(mixer) and call.mixer.layer_idx == 0)
    return None if mixer.layer_idx == 0 else next(first, None)


def _channels(mixer: Any) -> int:
    """Return P, the channels of a head; fla's layer may have others than its keys."""
    return getattr(mixer, "head_v_dim", mixer.head_dim)


def _shift(mu: Tensor) -> CausalConv:
    """Build a token shift: the parameter weighs the token before."""
    return token_shift(before=mu, now=1 - mu)
