"""Softmax attention of transformers, which hybrid models have between their recurrences.

Its weights are read, not derived anew: see :mod:`captum_ssm.layers.softmax_attention`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from captum_ssm.layers.heads import rows_to_heads
from captum_ssm.layers.mixers import register
from captum_ssm.layers.norms import inverse_rms
from captum_ssm.layers.parameters import parameters, projection, sizes_of
from captum_ssm.layers.softmax_attention import softmax_attention
from captum_ssm.operators import Chain, Diagonal, Operator


@register("JambaAttention", kernel="softmax attention", family="jamba")
@register("ZambaAttention", kernel="softmax attention", family="zamba")
@register("Zamba2Attention", kernel="softmax attention", family="zamba2")
@register("BambaAttention", kernel="softmax attention", family="bamba")
@register("GraniteMoeHybridAttention", kernel="softmax attention", family="granitemoehybrid")
@register("FalconH1Attention", kernel="softmax attention", family="falcon_h1")
@register("NemotronHAttention", kernel="softmax attention", family="nemotron_h")
@register(
    "RecurrentGemmaAttention", "RecurrentGemmaSdpaAttention", kernel="softmax attention", family="recurrent_gemma"
)
@register("Qwen3NextAttention", kernel="softmax attention", family="qwen3_next")
@register("Qwen3_5Attention", kernel="softmax attention", family="qwen3_5")
@register("Qwen3_5MoeAttention", kernel="softmax attention", family="qwen3_5_moe")
@register("Qwen4ExpTextAttention", kernel="softmax attention", family="qwen4_exp")
@register("OlmoHybridAttention", kernel="softmax attention", family="olmo_hybrid")
@register("MiniMaxAttention", kernel="softmax attention", family="minimax")
@register("Lfm2Attention", kernel="softmax attention", family="lfm2")
@register("Lfm2MoeAttention", kernel="softmax attention", family="lfm2_moe")
@register("Lfm3Attention", kernel="softmax attention", family="lfm3")
def grouped_attention(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose a softmax attention whose query heads share the values of their group.

    Equation::

        y = W_out diag(sigmoid(gate)) weights W_v x + bias

    Only some families have the gate.

    Args:
        mixer: Attention layer of transformers with ``v_proj`` and ``o_proj`` or ``out_proj``.
        x: Input (B, L, E).
        kwargs: Arguments of the call, all that enter the weights; ``layer_idx`` tells which layer's turn a shared
            Zamba2 layer has.

    Returns:
        Chain of ``out``, ``gate`` (in gated layers), ``attention``, ``in``.

    Source:
        transformers ``modeling_<family>.py``; Vaswani et al. 2017 (arXiv 1706.03762), groups of Ainslie et al. 2023
        (arXiv 2305.13245), gate of Qiu et al. 2025 (arXiv 2505.06708).
    """
    weights, attention = parameters(mixer, x), softmax_attention(mixer, x, kwargs, mixer.head_dim)
    H, P = attention.heads, attention.head_size
    groups = H // mixer.num_key_value_groups
    gate = _gate_by_head(weights, x, P)
    if sizes_of(weights, "q_proj")[0] == 2 * H * P:  # each head's query is followed by its gate
        queries = projection(weights, "q_proj").apply(x, bias=True).unflatten(-1, (H, 2, P))
        gate = {"gate": Diagonal(queries[..., 1, :].flatten(-2).sigmoid())}
    if hasattr(mixer, "linear_v_adapter_list"):  # Zamba2: a term for each of the layers that share this one
        name = f"linear_v_adapter_list.{mixer.layer_dic[kwargs['layer_idx']]}"
        weights["v_proj.weight"] = weights["v_proj.weight"] + weights[f"{name}.1.weight"] @ weights[f"{name}.0.weight"]
    return Chain(
        {
            "out": projection(weights, "out_proj" if "out_proj.weight" in weights else "o_proj"),
            **gate,
            "attention": attention,
            "in": projection(weights, "v_proj", lambda t: rows_to_heads(t, groups, H)),
        }
    )


@register("KimiLinearAttention", kernel="softmax attention", family="kimi_linear")
@register("BailingHybridAttention", kernel="softmax attention", family="bailing_hybrid")
@register("Glm5NextTextAttention", kernel="softmax attention", family="glm5_next")
def latent_attention(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose a softmax attention whose keys and values are read from one small latent vector of each token.

    Equation::

        y = W_out diag(sigmoid(gate)) weights W_up diag(norm) W_down x + bias

    Only Bailing has the gate.

    Args:
        mixer: Multi-head latent attention of transformers.
        x: Input (B, L, E).
        kwargs: Arguments of the call, all that enter the weights.

    Returns:
        Chain of ``out``, ``gate`` (in gated layers), ``attention``, ``value``, ``norm``, ``in``.

    Source:
        transformers ``modeling_<family>.py``; DeepSeek-AI 2024 (arXiv 2405.04434), section 2.1.
    """
    weights, attention = parameters(mixer, x), softmax_attention(mixer, x, kwargs, mixer.v_head_dim)
    H, P, rank = attention.heads, attention.head_size, mixer.kv_lora_rank
    into = projection(weights, "kv_a_proj_with_mqa", lambda t: t[:rank])
    scale = inverse_rms(into.apply(x, bias=True), mixer.kv_a_layernorm.variance_epsilon)

    def values(t: Tensor) -> Tensor:
        """Select the rows of values: each head has the rows of its key and then the rows of its value."""
        return t.unflatten(0, (H, -1))[:, -P:].flatten(0, 1)

    return Chain(
        {
            "out": projection(weights, "o_proj"),
            **_gate_by_head(weights, x, P),
            "attention": attention,
            "value": projection(weights, "kv_b_proj", values),
            "norm": Diagonal(scale * weights["kv_a_layernorm.weight"]),
            "in": into,
        }
    )


def _gate_by_head(weights: Mapping[str, Tensor], x: Tensor, P: int) -> dict[str, Operator]:
    """Build the gate that weighs the P channels of each head by one number, if the layer has one: ``gate``."""
    if "g_proj.weight" not in weights:
        return {}
    return {"gate": Diagonal(projection(weights, "g_proj").apply(x, bias=True).sigmoid().repeat_interleave(P, -1))}
