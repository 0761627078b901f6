"""Wires of the blocks whose mixers join the residual stream in another way than ``x + mix(norm(x))``.

Mixers that run side by side or on a separate branch are measured (:mod:`captum_ssm.network.examination`); here are the
factors that cannot be. Each rule gets the block, its mixer and the state of the residual stream before the block.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from captum_ssm.layers.wires import Wire, register_wire


@register_wire("GraniteMoeHybridDecoderLayer")
def granite(block: Any, mixer: Any, state: Tensor) -> Wire:
    """Wire a block of Granite.

    Equation::

        x + residual_multiplier * mix(norm(x))

    Args:
        block: ``GraniteMoeHybridDecoderLayer`` of transformers.
        mixer: Its mixer.
        state: Input of the block (B, L, E).

    Returns:
        The wire.

    Source:
        transformers ``modeling_granitemoehybrid.py``.
    """
    return Wire(write=block.residual_multiplier)


@register_wire("FalconH1DecoderLayer")
def falcon_h1(block: Any, mixer: Any, state: Tensor) -> Wire:
    """Wire a block of Falcon-H1, which runs two mixers side by side.

    Equation::

        x + ssm_out * mamba(norm(x)) + attention_out * attention(norm(x))

    Args:
        block: ``FalconH1DecoderLayer`` of transformers.
        mixer: One of its mixers.
        state: Input of the block (B, L, E).

    Returns:
        The wire.

    Source:
        transformers ``modeling_falcon_h1.py``.
    """
    return Wire(write=block.ssm_out_multiplier if mixer is block.mamba else block.attn_out_multiplier)


@register_wire("MiniMaxDecoderLayer")
def minimax(block: Any, mixer: Any, state: Tensor) -> Wire:
    """Wire a block of MiniMax.

    Equation::

        alpha * n + beta * mix(n)  with  n = norm(x)

    Args:
        block: ``MiniMaxDecoderLayer`` of transformers.
        mixer: Its mixer.
        state: Input of the block (B, L, E).

    Returns:
        The wire.

    Source:
        transformers ``modeling_minimax.py``.
    """
    return Wire(keep=block.attn_alpha_factor, write=block.attn_beta_factor)


@register_wire("ZambaAttentionDecoderLayer", "Zamba2AttentionDecoderLayer")
def zamba(block: Any, mixer: Any, state: Tensor) -> Wire:
    """Wire a shared transformer block of Zamba: its attention reads the stream and, in the second half, the embeddings.

    Equation::

        x + mix(norm([x, embeddings]))

    Args:
        block: ``ZambaAttentionDecoderLayer`` or ``Zamba2AttentionDecoderLayer`` of transformers.
        mixer: Its attention.
        state: Input of the block (B, L, E).

    Returns:
        The wire.

    Source:
        transformers ``modeling_zamba.py``, ``modeling_zamba2.py``.
    """
    return Wire(embeddings=slice(state.shape[-1], None))


@register_wire("Qwen4ExpTextDecoderLayer")
def qwen4_exp(block: Any, mixer: Any, state: Tensor) -> Wire:
    """Wire a block of Qwen4, which has several residual streams: a token's streams are taken as one, their mean.

    Equation::

        s_k + w_k * mix(.)  for each stream k

    Args:
        block: ``Qwen4ExpTextDecoderLayer`` of transformers.
        mixer: Its mixer.
        state: Input of the block (B, L, streams·E).

    Returns:
        The wire.

    Source:
        transformers ``modeling_qwen4_exp.py``, ``Qwen4ExpTextGatedResidual``.
    """
    _, _, weights = block.attn_hyper_connection(state)  # (B, L, streams)
    return Wire(write=weights.mean(-1))


@register_wire("Glm5NextTextDecoderLayer")
def glm5_next(block: Any, mixer: Any, state: Tensor) -> Wire:
    """Wire a block of GLM-5, which has several residual streams: a token's streams are taken as one, their mean.

    Equation::

        sum_j comb_jk s_j + post_k * mix(.)  for each stream k

    The weights ``comb`` add up to 1 over each of their axes.

    Args:
        block: ``Glm5NextTextDecoderLayer`` of transformers.
        mixer: Its mixer.
        state: Input of the block (B, L, streams, E).

    Returns:
        The wire.

    Source:
        transformers ``modeling_glm5_next.py``, ``Glm5NextTextHyperConnection``.
    """
    post, _, _ = block.attn_hc(state)  # (B, L, streams)
    return Wire(write=post.mean(-1))


@register_wire("RWKV7Block")
def rwkv7(block: Any, mixer: Any, state: Tensor) -> Wire:
    """Wire a block of RWKV-7: all but the first layer read the input of the first layer too.

    Equation::

        x + mix(norm(x), v_first)

    Args:
        block: ``RWKV7Block`` of fla or of rwkv7-hf.
        mixer: Its time mixing or channel mixing.
        state: Input of the block (B, L, E).

    Returns:
        The wire.

    Source:
        flash-linear-attention ``modeling_rwkv7.py``.
    """
    first = slice(state.shape[-1], None)
    return Wire(embeddings=first if mixer is block.attn and mixer.layer_idx > 0 else None)
