"""Blocks whose mixers join the residual stream otherwise than as ``x + mix(norm(x))``.

Which mixers run side by side or on a branch of their own is measured (:mod:`captum_ssm.network.examination`); here are
the factors that cannot be.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from captum_ssm.layers.wires import Wire, register_wire


@register_wire("GraniteMoeHybridDecoderLayer")
def granite(block: Any, mixer: Any, state: Tensor) -> Wire:
    """``x + residual_multiplier * mix(norm(x))``. Source: transformers ``modeling_granitemoehybrid.py``."""
    return Wire(write=block.residual_multiplier)


@register_wire("FalconH1DecoderLayer")
def falcon_h1(block: Any, mixer: Any, state: Tensor) -> Wire:
    """``x + ssm_out * mamba(norm(x)) + attn_out * attention(norm(x))``. Source: ``modeling_falcon_h1.py``."""
    return Wire(write=block.ssm_out_multiplier if mixer is block.mamba else block.attn_out_multiplier)


@register_wire("MiniMaxDecoderLayer")
def minimax(block: Any, mixer: Any, state: Tensor) -> Wire:
    """``alpha * n + beta * mix(n)`` with ``n = norm(x)``. Source: transformers ``modeling_minimax.py``."""
    return Wire(keep=block.attn_alpha_factor, write=block.attn_beta_factor)


@register_wire("ZambaAttentionDecoderLayer", "Zamba2AttentionDecoderLayer")
def zamba(block: Any, mixer: Any, state: Tensor) -> Wire:
    """The attention of the shared transformer reads the stream and, in the second half, the embeddings.

    Source: transformers ``modeling_zamba.py``, ``modeling_zamba2.py``.
    """
    return Wire(embeddings=slice(state.shape[-1], None))


@register_wire("Qwen4ExpTextDecoderLayer")
def qwen4_exp(block: Any, mixer: Any, state: Tensor) -> Wire:
    """Several streams ``s_k + w_k * mix(.)``: a token's streams are taken as one, their mean.

    Source: transformers ``modeling_qwen4_exp.py``, ``Qwen4ExpTextGatedResidual``.
    """
    _, _, weights = block.attn_hyper_connection(state)  # (B, L, streams)
    return Wire(write=weights.mean(-1))


@register_wire("Glm5NextTextDecoderLayer")
def glm5_next(block: Any, mixer: Any, state: Tensor) -> Wire:
    """Several streams ``sum_j comb_jk s_j + post_k * mix(.)``: a token's streams are taken as one, their mean.

    The weights that keep the streams sum to 1 over each of them.

    Source: transformers ``modeling_glm5_next.py``, ``Glm5NextTextHyperConnection``.
    """
    post, _, _ = block.attn_hc(state)  # (B, L, streams)
    return Wire(write=post.mean(-1))


@register_wire("RWKV7Block")
def rwkv7(block: Any, mixer: Any, state: Tensor) -> Wire:
    """``x + mix(norm(x), v_first)``: all but the first layer read the first one's input too.

    Source: flash-linear-attention ``modeling_rwkv7.py``.
    """
    first = slice(state.shape[-1], None)
    return Wire(embeddings=first if mixer is block.attn and mixer.layer_idx > 0 else None)
