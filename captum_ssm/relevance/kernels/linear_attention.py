"""The operators of flash-linear-attention that only decay before they write: linear attention and its decays."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from captum_ssm.errors import UnsupportedModelError
from captum_ssm.layers.heads import to_heads
from captum_ssm.operators import Product, Scan
from captum_ssm.relevance.kernels.kernel import kernel
from captum_ssm.relevance.kernels.over_heads import over_heads


@kernel("chunk_gla", "fused_recurrent_gla", "naive_recurrent_gla", gk="g")
def gla(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None = None, scale: float | None = None) -> Tensor:
    """Run ``h_t = diag(exp(g_t)) h_{t-1} + k_t v_t``, ``y_t = scale <q_t, h_t>``.

    Args:
        q: Queries (B, L, H, N).
        k: Keys (B, L, G, N), a group for H / G consecutive heads.
        v: Values (B, L, G, P).
        g: Logarithms of the decays (B, L, G, N), with 1 where an axis is shared; None for no decay.
        scale: Of the queries; None for one over the root of N.

    Returns:
        (B, L, H, P).

    Source:
        flash-linear-attention ``ops/gla``; Yang et al. 2023 (arXiv 2312.06635).
    """
    H, N = q.shape[2:]
    v = to_heads(v, H).expand(-1, -1, H, -1)
    a = torch.zeros_like(v[:1, :1, :1, :1]) if g is None else to_heads(g, H)
    scale = N**-0.5 if scale is None else scale
    scan = Scan(a=Product((a,), exponential=True), b=to_heads(k, H), c=q * scale, head_size=v.shape[-1])
    return over_heads(scan, v)


@kernel("chunk_simple_gla", "fused_chunk_simple_gla", "fused_recurrent_simple_gla", "parallel_simple_gla")
def simple_gla(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor | None = None,
    g_gamma: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """Run :func:`gla` with one decay for each head: ``g`` (B, L, H) of a token, ``g_gamma`` (H,) of all, or both."""
    parts = [None if g is None else g.unsqueeze(-1), None if g_gamma is None else g_gamma.view(1, 1, -1, 1)]
    given = [part for part in parts if part is not None]
    return gla(q, k, v, sum(given[1:], given[0]) if given else None, scale)


@kernel("chunk_retention", "fused_chunk_retention", "fused_recurrent_retention", "parallel_retention")
def retention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None) -> Tensor:
    """Run :func:`gla` with the constant decays of RetNet, ``1 - 2^(-5-h)`` of head h."""
    heads = torch.arange(q.shape[2], dtype=q.dtype, device=q.device)
    return simple_gla(q, k, v, None, torch.log1p(-(2.0 ** (-5 - heads))), scale)


@kernel("chunk_lightning_attn", "fused_recurrent_lightning_attn")
def lightning(q: Tensor, k: Tensor, v: Tensor, layer_idx: int, num_layers: int, scale: float | None = None) -> Tensor:
    """Run :func:`gla` with the constant decays of lightning attention, which differ by head and layer."""
    H = q.shape[2]
    heads = torch.arange(H, dtype=q.dtype, device=q.device)
    return simple_gla(q, k, v, None, -(8 / H * (1 - layer_idx / num_layers)) * heads, scale)


@kernel("chunk_linear_attn", "fused_chunk_linear_attn", "fused_recurrent_linear_attn")
def linear_attention(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, normalize: bool = True) -> Tensor:
    """Run :func:`gla` without decay; where ``normalize`` is true, divided by the sum of the weights."""
    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    return _without_decay(q, k, v, 1e-10 if normalize else None)


@kernel("parallel_based", "fused_chunk_based")
def based(q: Tensor, k: Tensor, v: Tensor, scale: float | None = None, use_norm: bool = True) -> Tensor:
    """Run linear attention with the weights ``1 + s + s²/2`` of ``s = scale <q, k>``, which are products of features.

    Args:
        q: Queries (B, L, H, N).
        k: Keys (B, L, H, N).
        v: Values (B, L, H, P).
        scale: Of the queries; None for one over the root of N.
        use_norm: Whether the result is divided by the sum of the weights.

    Returns:
        (B, L, H, P).

    Source:
        flash-linear-attention ``ops/based``; Arora et al. 2024 (arXiv 2402.18668).
    """

    def features(t: Tensor) -> Tensor:
        squares = (t.unsqueeze(-1) * t.unsqueeze(-2)).flatten(-2) * 0.5**0.5
        return torch.cat([torch.ones_like(t[..., :1]), t, squares], dim=-1)  # (B, L, H, 1 + N + N²)

    q = q * (q.shape[-1] ** -0.5 if scale is None else scale)
    return _without_decay(features(q), features(k), v, 1e-6 if use_norm else None)


def _without_decay(q: Tensor, k: Tensor, v: Tensor, eps: float | None) -> Tensor:
    """Run linear attention on (B, L, H, N), divided by the sum of the weights and ``eps`` if that is given."""
    y = gla(q, k, v, None, 1.0)
    return y if eps is None else y / ((q * k.cumsum(1)).sum(-1, keepdim=True) + eps)


@kernel("chunk_gsa", "fused_recurrent_gsa")
def gated_slots(q: Tensor, k: Tensor, v: Tensor, s: Tensor, g: Tensor | None, scale: float | None = None) -> Tensor:
    """Run gated slot attention: a softmax over slots that decay, and write keys and values.

    Equation::

        K_t = diag(exp(g_t)) K_{t-1} + s_t k_t,  V_t = diag(exp(g_t)) V_{t-1} + s_t v_t
        y_t = V_t^T softmax(scale K_t q_t)

    Args:
        q: Queries (B, L, H, N).
        k: Keys (B, L, G, N); each group serves consecutive heads.
        v: Values (B, L, G, P).
        s: Weights of the M slots (B, L, G, M).
        g: Logarithms of their decays (B, L, G, M); None, where the kernel makes them of ``s``, is refused.
        scale: Of the queries; None for one over the root of N.

    Returns:
        (B, L, H, P).

    Raises:
        UnsupportedModelError: If there are no decays.

    Source:
        flash-linear-attention ``ops/gsa``; Zhang et al. 2024 (arXiv 2409.07146).
    """
    if g is None:
        raise UnsupportedModelError("Gated slot attention was called without 'g', which its rule needs.")
    H, N = q.shape[2:]
    k, v, s, g = (to_heads(t, H).expand(-1, -1, H, -1) for t in (k, v, s, g))
    M = s.shape[-1]

    def by_slot(t: Tensor) -> Tensor:
        return t.unsqueeze(3).expand(-1, -1, -1, M, -1).flatten(2, 3)  # (B, L, H·M, N)

    a = Product((g.flatten(2).unsqueeze(-1),), exponential=True)
    scan = Scan(a=a, b=by_slot(k), c=by_slot(q * (N**-0.5 if scale is None else scale)))
    weights = scan.apply(s.flatten(2)).unflatten(2, (H, M)).softmax(-1)
    return gla(weights, s, v, g, 1.0)


@kernel("chunk_hgrn", "fused_recurrent_hgrn", "naive_recurrent_hgrn")
def hgrn(x: Tensor, g: Tensor) -> Tensor:
    """Run ``h_t = exp(g_t) h_{t-1} + x_t`` in each channel of ``x`` (B, L, D), with logarithms of decays ``g``."""
    one = torch.ones_like(x[:1, :1, :1, None])
    return Scan(a=Product((g.unsqueeze(-1),), exponential=True), b=one, c=one).apply(x)


@kernel("chunk_rwkv6", "fused_recurrent_rwkv6", r="q", w="g")
def rwkv6(q: Tensor, k: Tensor, v: Tensor, g: Tensor, u: Tensor, scale: float | None = None) -> Tensor:
    """Run ``h_t = diag(exp(g_t)) h_{t-1} + k_t v_t``, ``y_t = scale <q_t, h_{t-1} + diag(u) k_t v_t>``.

    Args:
        q: Queries (B, L, H, N).
        k: Keys (B, L, H, N).
        v: Values (B, L, H, P).
        g: Logarithms of the decays (B, L, H, N).
        u: Bonus of the current token (H, N).
        scale: Of the queries; None for one over the root of N.

    Returns:
        (B, L, H, P).

    Source:
        flash-linear-attention ``ops/rwkv6``; Peng et al. 2024 (arXiv 2404.05892).
    """
    P = v.shape[-1]
    q = q * (1 / math.sqrt(q.shape[-1]) if scale is None else scale)
    bonus = (q * u * k).sum(-1).repeat_interleave(P, -1)  # (B, L, D)
    scan = Scan(a=Product((g,), exponential=True), b=k, c=q, lag=1, bonus=bonus, head_size=P)
    return over_heads(scan, v)
