"""S6, the selective scan of Mamba: one state for each channel.

``y = W_out diag(silu(z)) [S + diag(skip)] diag(act) M_conv W_in diag(mask) x + bias`` with ``delta, B, C`` read from
the convolved input. The families differ in how their parameters are laid out and in the norms of what is read, so each
has a function that says just that, and :func:`s6` builds the chain of all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.adapters.reading import padding, parameters, refuse_packed, to_heads
from captum_ssm.errors import UnsupportedModelError
from captum_ssm.gates import inverse_rms, secant
from captum_ssm.layers.mixers import register
from captum_ssm.operators import CausalConv, Chain, Diagonal, Operator, Product, Projection, Scan, Sum


@register("MambaMixer", kernel="S6", family="mamba")
def mamba(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """S6 of Mamba: see :func:`s6` for arguments and chain.

    Source:
        transformers ``modeling_mamba.py``; Gu & Dao 2023 (arXiv 2312.00752).
    """
    return s6(mixer, x, kwargs, _one_head(parameters(mixer, x)))


@register("Mamba", kernel="S6", family="mamba_ssm")
def native_mamba(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """S6 of the packages' own Mamba layer, laid out as transformers' one: see :func:`s6`, and :func:`bidirectional`.

    Raises:
        UnsupportedModelError: If the call packs several sequences into one.

    Source:
        mamba_ssm ``modules/mamba_simple.py``; flash-linear-attention ``layers/mamba.py``.
    """
    refuse_packed(mixer, kwargs)
    return bidirectional(mixer, x) if hasattr(mixer, "A_b_log") else mamba(mixer, x, kwargs)


def bidirectional(mixer: Any, x: Tensor) -> Chain:
    """S6 of Vision Mamba, which reads the sequence from both ends.

    ``y = W_out diag(silu(z)) [S M + flip S_b M_b flip] W_in x / 2``, where ``S M`` is all that :func:`direction` gives,
    and the direction from the end has a convolution and a recurrence of its own.

    Args:
        mixer: ``Mamba`` of Vision Mamba's fork of mamba_ssm, with ``bimamba_type="v2"``.
        x: Input (B, L, E).

    Returns:
        Chain of ``out, gate, half, directions, in``: ``directions`` is the sum of ``forward`` and ``backward``, each of
        ``scan, act, conv``. Without ``half`` where the layer does not divide by 2, and with ``layer_scale`` in front
        where it has one.

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
    own = ("conv1d", "x_proj", "dt_proj")
    named = {f"{name}.{kind}": f"{name}_b.{kind}" for name in own for kind in ("weight", "bias")}
    named |= {"A_log": "A_b_log", "D": "D_b"}
    weights_b = {name: weights[name_b] for name, name_b in named.items() if name_b in weights}

    in_w, gate_w = weights["in_proj.weight"].chunk(2)
    in_b, gate_b = weights["in_proj.bias"].chunk(2) if "in_proj.bias" in weights else (None, None)
    into = Projection(in_w, in_b)
    value = into.apply(x, bias=True)
    forward = Chain(direction(_one_head(weights), value, mixer.activation))
    backward = Chain(direction(_one_head(weights_b), value.flip(1), mixer.activation)).flipped()

    divides = getattr(mixer, "if_divide_out", getattr(mixer, "if_devide_out", False))  # the forks differ in spelling
    return Chain(
        {
            **({"layer_scale": Diagonal(weights["gamma"])} if "gamma" in weights else {}),
            "out": Projection(weights["out_proj.weight"], weights.get("out_proj.bias")),
            "gate": Diagonal(F.silu(F.linear(x, gate_w, gate_b))),
            **({"half": Diagonal(weights["D"].new_tensor(0.5))} if divides else {}),
            "directions": Sum({"forward": forward, "backward": backward}),
            "in": into,
        }
    )


@register("FalconMambaMixer", kernel="S6", family="falcon_mamba")
def falcon_mamba(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """S6 of Falcon-Mamba, whose low rank of delta, B and C have norms without a weight: see :func:`s6`.

    Source:
        transformers ``modeling_falcon_mamba.py``; Zuo et al. 2024 (arXiv 2410.05355).
    """
    weights = _one_head(parameters(mixer, x))
    return s6(mixer, x, kwargs, weights, norm=lambda _, read: read * inverse_rms(read, mixer.rms_eps))


@register("JambaMambaMixer", kernel="S6", family="jamba")
def jamba(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """S6 of Jamba, whose low rank of delta, B and C have norms with weights: see :func:`s6`.

    Source:
        transformers ``modeling_jamba.py``; Lieber et al. 2024 (arXiv 2403.19887).
    """
    weights = _one_head(parameters(mixer, x))

    def norm(name: str, read: Tensor) -> Tensor:
        eps = getattr(mixer, f"{name}_layernorm").variance_epsilon
        return read * inverse_rms(read, eps) * weights[f"{name}_layernorm.weight"]

    return s6(mixer, x, kwargs, weights, norm)


@register("ZambaMambaMixer", kernel="S6", family="zamba")
def zamba(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """S6 of Zamba, whose heads each read ``delta, B, C`` from their own channels alone: see :func:`s6`.

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
    return s6(mixer, x, kwargs, weights)


Norm = Callable[[str, Tensor], Tensor]
"""What is done to each head's low rank of delta ``"dt"`` (B, L, H, R), to ``"b"`` and to ``"c"`` (B, L, H, N)."""


def s6(
    mixer: Any,
    x: Tensor,
    kwargs: Mapping[str, Any],
    weights: Mapping[str, Tensor],
    norm: Norm = lambda _, read: read,
) -> Chain:
    """Build the chain of a selective scan: one state of N for each of its D channels, in H heads of P.

    Args:
        mixer: The layer.
        x: Input (B, L, E).
        kwargs: ``attention_mask`` (B, L), 0 at padding, is respected.
        weights: The parameters by ``MambaMixer``'s names, where ``x_proj.weight`` (H, R + 2N, P) and
            ``dt_proj.weight`` (H, P, R) have their heads first.
        norm: What is done to what is read from the convolved input.

    Returns:
        Chain of ``out, gate, scan, act, conv, in`` and, with a mask, ``mask``.
    """
    mask = padding(kwargs, x)
    real = Chain(mask).apply(x)
    in_w, gate_w = weights["in_proj.weight"].chunk(2)
    in_b, gate_b = weights["in_proj.bias"].chunk(2) if "in_proj.bias" in weights else (None, None)
    into = Projection(in_w, in_b)

    factors: dict[str, Operator] = {
        "out": Projection(weights["out_proj.weight"], weights.get("out_proj.bias")),
        "gate": Diagonal(F.silu(F.linear(real, gate_w, gate_b))),
        **direction(weights, into.apply(real, bias=True), mixer.activation, mask, norm),
        "in": into,
    }
    return Chain({**factors, **mask})


def direction(
    weights: Mapping[str, Tensor],
    value: Tensor,
    activation: str,
    mask: Mapping[str, Operator] = MappingProxyType({}),
    norm: Norm = lambda _, read: read,
) -> dict[str, Operator]:
    """Return the factors between the projections of a layer, for one direction of reading: ``scan, act, conv``.

    Args:
        weights: The parameters of this direction, as for :func:`s6`.
        value: What the convolution gets (B, L, D).
        activation: Name of the activation after it.
        mask: The factor that sets padding to 0, or nothing.
        norm: What is done to what is read from the convolved input.
    """
    read_w, step_w = weights["x_proj.weight"], weights["dt_proj.weight"]
    (H, P, R), N = step_w.shape, weights["A_log"].shape[-1]

    conv = CausalConv(weights["conv1d.weight"].squeeze(1), weights.get("conv1d.bias"))
    pre = conv.apply(value, bias=True)
    act = Chain(mask).apply(secant(activation, pre))  # the convolution's bias puts something into padding again

    reads = torch.einsum("blhp,hrp->blhr", (act * pre).unflatten(-1, (H, P)), read_w).split([R, N, N], dim=-1)
    low, b, c = (norm(name, read) for name, read in zip(("dt", "b", "c"), reads))
    b, c = (to_heads(read, H * P) for read in (b, c))
    delta = F.softplus(torch.einsum("blhr,hpr->blhp", low, step_w).flatten(2) + weights["dt_proj.bias"])
    step, decay = delta.unsqueeze(-1), -weights["A_log"].exp()[None, None]  # (B, L, D, 1), (1, 1, D, N)
    scan = Scan(
        a=Product((step, decay), exponential=True),
        b=Product((step, b)),
        c=c,
        skip=weights["D"],
    )
    return {"scan": scan, "act": Diagonal(act), "conv": conv}


def _one_head(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the parameters of a layer without heads as those of a layer with one."""
    return {**weights, **{name: weights[name].unsqueeze(0) for name in ("x_proj.weight", "dt_proj.weight")}}
