"""The kernels of RWKV's own code, each a function of autograd, and those of RWKV-4 in transformers and fla."""

from __future__ import annotations

from torch import Tensor

from captum_ssm.errors import UnsupportedModelError
from captum_ssm.layers.averages import averages
from captum_ssm.relevance.kernels.generalized_delta_rule import diagonal_plus_low_rank
from captum_ssm.relevance.kernels.kernel import kernel
from captum_ssm.relevance.kernels.linear_attention import rwkv6

_WIDTH = 64
"""Channels of a head of RWKV-7, where the kernel gets its channels without heads."""


@kernel("WKV", "RUN_CUDA", ignored="B T C")
@kernel("fused_recurrent_rwkv4")
@kernel("RwkvLinearAttention", "rwkv_linear_attention", time_decay="w", time_first="u", key="k", value="v")
def wkv4(w: Tensor, u: Tensor, k: Tensor, v: Tensor, state: Tensor | None = None) -> Tensor:
    """Average values with exponential weights, see :func:`captum_ssm.layers.averages.averages`.

    Args:
        w: Logarithms of the rates of decay (D,).
        u: Added to the key of the current token (D,).
        k: Keys (B, L, D).
        v: Values (B, L, D).
        state: Numerators, denominators and exponents before the first token (B, 3, 1, D), if the kernel wants them.

    Returns:
        (B, L, D).

    Raises:
        UnsupportedModelError: If something was averaged before the first token.

    Source:
        RWKV-v4 ``src/model.py``; transformers ``modeling_rwkv.py``; Peng et al. 2023 (arXiv 2305.13048).
    """
    if state is not None and (not isinstance(state, Tensor) or bool(state[:, :2].any())):
        raise UnsupportedModelError("A WKV kernel starts from a 'state', which its rule does not follow.")
    return averages(k, w.exp(), u).apply(v)


@kernel("WKV_5", "WKV_6", "RUN_CUDA_RWKV5", "RUN_CUDA_RWKV6", ignored="B T C")
def wkv5(H: int, r: Tensor, k: Tensor, v: Tensor, w: Tensor, u: Tensor) -> Tensor:
    """Run linear attention with a bonus for the current token and decays ``exp(-exp(w))``.

    Args:
        H: Number of heads.
        r: Queries (B, L, D).
        k: Keys (B, L, D).
        v: Values (B, L, D).
        w: Logarithms of the rates: constants (H, N) or (D,) in RWKV-5, (B, L, D) in RWKV-6.
        u: Bonus (H, N) or (D,).

    Returns:
        (B, L, D).

    Source:
        RWKV-v5 ``src/model.py``; Peng et al. 2024 (arXiv 2404.05892).
    """
    r, k, v = (t.unflatten(-1, (H, -1)) for t in (r, k, v))
    g = w.unflatten(-1, (H, -1)) if w.dim() == 3 else w.reshape(1, 1, H, -1)
    return rwkv6(r, k, v, -g.exp(), u.reshape(H, -1), 1.0).flatten(2)


@kernel("WindBackstepping", w="g", z="a")
@kernel("WKV_7", r="q", w="g")
def wkv7(g: Tensor, q: Tensor, k: Tensor, v: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Run :func:`diagonal_plus_low_rank` with decays ``exp(-exp(g))``, on (B, L, H, N) or on channels (B, L, D)."""
    parts = [t if t.dim() == 4 else t.unflatten(-1, (-1, _WIDTH)) for t in (q, k, v, a, b, g)]
    q_, k_, v_, a_, b_, g_ = parts
    return diagonal_plus_low_rank(q_, k_, v_, a_, b_, -g_.exp(), 1.0).reshape(v.shape)
