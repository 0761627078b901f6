"""Softmax attention of mamba_ssm, whose code gives no weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.errors import UnsupportedModelError
from captum_ssm.layers.bypass import Bypass
from captum_ssm.layers.heads import rows_to_heads
from captum_ssm.layers.mixers import register
from captum_ssm.layers.parameters import Rows, convolution, parameters, projection, projections, sizes_of
from captum_ssm.layers.rotary import rotary_angles, rotate
from captum_ssm.operators import Chain, Diagonal, Operator, Projection, SoftmaxAttention


@register("MHA", kernel="softmax attention", family="mamba_ssm", parts=("in_proj", "rotary_emb_dim", "mlp_dim"))
def native_attention(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose a softmax attention, which may convolve queries, keys and values, and have a gated MLP beside it.

    Equation::

        y = W_out [weights M_conv W_v x; silu(W_gate x) W_up x] + bias
        weights = softmax(q k^T / sqrt(P))

    Args:
        mixer: ``MHA`` of mamba_ssm.
        x: Input (B, L, E).
        kwargs: Arguments of the call; the layer takes no mask.

    Returns:
        Chain of ``out``, ``gate`` (with an MLP), ``attention``, ``conv`` (with a convolution), ``in``.

    Raises:
        UnsupportedModelError: If positions also scale queries and keys (XPos).

    Source:
        mamba_ssm ``modules/mha.py``; rotary positions of flash_attn ``layers/rotary.py``.
    """
    weights, H, P = parameters(mixer, x), mixer.num_heads, mixer.head_dim
    q, k, v = _reading_factors(mixer, weights)
    queries, keys = (Chain(factors).apply(x, bias=True).unflatten(-1, (H, P)) for factors in (q, k))
    if mixer.rotary_emb_dim:
        queries, keys = (rotate(t, _angles(mixer.rotary_emb, x), mixer.rotary_emb.interleaved) for t in (queries, keys))

    queries, keys = queries.transpose(1, 2), keys.transpose(1, 2)
    scale = mixer.softmax_scale or P**-0.5
    attention = SoftmaxAttention(queries, keys, scale, sees_earlier=mixer.causal, head_size=P)
    factors: dict[str, Any] = {"attention": attention, **v}
    if mixer.mlp_dim:
        factors = _with_mlp(weights, x, factors, mixer.mlp_dim // 2)
    return Chain({"out": projection(weights, "out_proj"), **factors})


def _reading_factors(mixer: Any, weights: Mapping[str, Tensor]) -> list[dict[str, Operator]]:
    """Build the factors that make queries, keys and values of all heads: ``conv``, if there is one, and ``in``."""
    H, groups, P = mixer.num_heads, mixer.num_heads_kv, mixer.head_dim
    sizes = [H * P, groups * P, groups * P]

    def rows(number: int) -> Rows:
        heads = sizes[number] // P
        return lambda t: rows_to_heads(t[: sum(sizes)].split(sizes)[number], heads, H)

    factors: list[dict[str, Operator]] = [{"in": projection(weights, "in_proj", rows(k))} for k in range(3)]
    if mixer.d_conv:
        factors = [{"conv": convolution(weights, "conv1d", rows(k)), **into} for k, into in enumerate(factors)]
    return factors


def _angles(rotary: Any, x: Tensor) -> Tensor:
    """Compute the angles (1, L, 1, A) by which positions turn queries and keys.

    Args:
        rotary: The layer's module of rotary positions.
        x: Input (B, L, E).

    Returns:
        (1, L, 1, A).

    Raises:
        UnsupportedModelError: If their lengths change with the position too (XPos).
    """
    if rotary.scale_base is not None:
        raise UnsupportedModelError(
            "Rotary positions that also scale queries and keys (scale_base) are not supported. Register an adapter of "
            "your own for this MHA layer (captum_ssm.register)."
        )
    return rotary_angles(rotary.base, rotary.dim // 2, x)


def _with_mlp(weights: Mapping[str, Tensor], x: Tensor, factors: Mapping[str, Any], M: int) -> dict[str, Operator]:
    """Extend the factors of an attention by the M channels of a gated MLP: see :class:`Bypass`.

    Args:
        weights: Parameters by name; ``in_proj`` ends with the M rows of the channels and the M rows of their gates.
        x: Input (B, L, E).
        factors: ``attention``, ``conv``, if there is one, and ``in``.
        M: Number of channels of the MLP.

    Returns:
        ``gate``, ``attention``, ``conv``, if there is one, and ``in``.
    """
    attention, into = factors["attention"], factors["in"]
    bypass, D = Bypass(M, attention.head_size, first=False), attention.sizes[0]
    _, up, gate = projections(weights, "in_proj", [sizes_of(weights, "in_proj")[0] - 2 * M, M, M])
    bias = None if up.bias is None else torch.cat([into.bias, up.bias])
    gates = F.silu(gate.apply(x, bias=True))
    extended = {
        **factors,
        "attention": replace(
            attention,
            queries=bypass.heads(attention.queries, -3),
            keys=bypass.heads(attention.keys, -3),
            attends=bypass.heads(x.new_ones(1, attention.heads, 1, 1), -3),
            head_size=bypass.head_size,
            skip=F.pad(x.new_ones(M), (D, 0)),
        ),
        "in": Projection(torch.cat([into.W, up.W]), bias),
    }
    if "conv" in factors:
        extended["conv"] = bypass.convolution(factors["conv"])
    return {"gate": Diagonal(F.pad(gates, (D, 0), value=1.0)), **extended}
