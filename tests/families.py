"""A tiny random model of every supported family, small enough for the laws and odd enough to hide nothing."""

from collections.abc import Callable
from typing import Any

import torch
import transformers as hf
from torch import nn

VOCABULARY = 23
COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY, "hidden_size": 8,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HYBRID: dict[str, Any] = {**COMMON, "hidden_size": 16, "num_hidden_layers": 4}
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 24}
EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MIXED = ["linear_attention", "full_attention"] * 2
S6: dict[str, Any] = {
    **COMMON,
    "num_hidden_layers": 2,
    "state_size": 3,
    "time_step_rank": 2,
    "conv_kernel": 3,
}
MAMBA: dict[str, Any] = {"mamba_d_state": 3, "mamba_dt_rank": 2, "mamba_d_conv": 3}
SSD: dict[str, Any] = {
    "mamba_n_heads": 8, "mamba_d_head": 4, "mamba_n_groups": 2, "mamba_d_state": 3, "mamba_chunk_size": 4,
}  # fmt: skip
GDN: dict[str, Any] = {
    "linear_num_value_heads": 4, "linear_num_key_heads": 2, "linear_key_head_dim": 4, "linear_value_head_dim": 6,
}  # fmt: skip
KDA: dict[str, Any] = {
    "linear_num_heads": 3, "linear_head_dim": 4, "layer_types": MIXED, "num_attention_heads": 4,
    "num_key_value_heads": 4, "kv_lora_rank": 6, "qk_nope_head_dim": 4, "qk_rope_head_dim": 2, "v_head_dim": 6,
    "intermediate_size": 24, "num_local_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
    "n_shared_experts": 1,
}  # fmt: skip
CONV: dict[str, Any] = {**HEADS, "layer_types": ["conv", "full_attention"] * 2}


def perturbed(model: nn.Module, seed: int = 0, std: float = 0.3) -> nn.Module:
    """Move every parameter off its initial value, so that no symmetry hides an error; return the model in eval mode."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += std * torch.randn(parameter.shape, generator=random).to(parameter)
    return model.eval()


def tiny(model: str, config: str, defaults: dict[str, Any], std: float = 0.3) -> Callable[..., nn.Module]:
    """Return a builder of a tiny model: class names in transformers, configuration, size of the perturbation."""

    def build(**options: Any) -> nn.Module:
        torch.manual_seed(0)
        return perturbed(getattr(hf, model)(getattr(hf, config)(**{**defaults, **options})), std=std)

    return build


def tiny_glm5_next(**options: Any) -> nn.Module:
    torch.manual_seed(0)
    text = {
        **HYBRID, **KDA, "intermediate_size": 24, "n_routed_experts": 4, "q_lora_rank": 6, "qk_rope_head_dim": 0,
        "index_topk": 4, "index_head_dim": 4, "index_n_heads": 8, "index_kpool": 2, "linear_num_heads": 3,
        "hc_mult": 2, "hc_sinkhorn_iters": 3, "mlp_layer_types": ["dense", "dense", "sparse", "sparse"], **options,
    }  # fmt: skip
    del text["bos_token_id"], text["eos_token_id"], text["num_local_experts"], text["n_shared_experts"]
    vision = {
        "depth": 1, "hidden_size": 8, "num_heads": 2, "out_hidden_size": text["hidden_size"], "intermediate_size": 8,
        "projection_intermediate_size": 8, "image_size": 28,
    }  # fmt: skip
    names = ("image_token_id", "video_token_id", "image_start_token_id", "image_end_token_id", "video_start_token_id",
             "video_end_token_id")  # fmt: skip
    tokens = {name: VOCABULARY - 1 - k for k, name in enumerate(names)}
    config = hf.Glm5NextConfig(text_config=text, vision_config=vision, **tokens)
    return perturbed(hf.Glm5NextForConditionalGeneration(config), std=0.1)


tiny_mamba = tiny("MambaForCausalLM", "MambaConfig", S6)
tiny_falcon_mamba = tiny("FalconMambaForCausalLM", "FalconMambaConfig", S6)

ZAMBA = {**HYBRID, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 24, "mamba_d_state": 3,
         "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]}  # fmt: skip
FALCON_H1 = {**HYBRID, **HEADS, **SSD, "num_hidden_layers": 2, "mamba_d_ssm": 32}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mrope_section": [1, 1, 0],
        "mrope_interleaved": True}  # fmt: skip

FAMILIES: dict[str, Callable[..., nn.Module]] = {
    "mamba": tiny_mamba,
    "falcon_mamba": tiny_falcon_mamba,
    "jamba": tiny("JambaForCausalLM", "JambaConfig", {
        **HYBRID, **HEADS, **MAMBA, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2}),
    "zamba": tiny("ZambaForCausalLM", "ZambaConfig", {**ZAMBA, "mamba_dt_rank": 2, "n_mamba_heads": 2}),
    "mamba2": tiny("Mamba2ForCausalLM", "Mamba2Config", {
        **HYBRID, "num_hidden_layers": 2, "state_size": 3, "num_heads": 8, "head_dim": 4, "n_groups": 2,
        "chunk_size": 4, "time_step_limit": (0.5, 0.9)}),
    "bamba": tiny("BambaForCausalLM", "BambaConfig", {
        **HYBRID, **HEADS, **SSD, "attn_layer_indices": [1, 3], "time_step_limit": (0.5, 0.9)}),
    "granitemoehybrid": tiny("GraniteMoeHybridForCausalLM", "GraniteMoeHybridConfig", {
        **HYBRID, **HEADS, **SSD, "layer_types": ["mamba", "attention"] * 2, "num_local_experts": 4,
        "num_experts_per_tok": 2, "shared_intermediate_size": 16, "embedding_multiplier": 2.0,
        "residual_multiplier": 0.5}),
    "falcon_h1": tiny("FalconH1ForCausalLM", "FalconH1Config", {
        **FALCON_H1, "mamba_rms_norm": True, "mamba_norm_before_gate": False,
        "ssm_multipliers": [0.5, 0.6, 0.7, 0.8, 0.9], "ssm_in_multiplier": 1.3, "ssm_out_multiplier": 0.7,
        "attention_in_multiplier": 0.9, "attention_out_multiplier": 1.2}),
    "falcon_h1 without norm": tiny("FalconH1ForCausalLM", "FalconH1Config", {**FALCON_H1, "mamba_rms_norm": False}),
    "nemotron_h": tiny("NemotronHForCausalLM", "NemotronHConfig", {
        **HYBRID, **HEADS, "head_dim": 4, "layers_block_type": ["mamba", "moe", "attention", "mamba"],
        "mamba_num_heads": 8, "mamba_head_dim": 4, "n_groups": 2, "ssm_state_size": 3, "chunk_size": 4,
        "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
        "moe_shared_expert_intermediate_size": 16}),
    "zamba2": tiny("Zamba2ForCausalLM", "Zamba2Config", {
        **ZAMBA, "n_mamba_heads": 8, "mamba_headdim": 4, "mamba_ngroups": 2, "chunk_size": 4, "num_mem_blocks": 2,
        "adapter_rank": 3, "use_shared_attention_adapter": True, "time_step_min": 0.8}),
    "recurrent_gemma": tiny("RecurrentGemmaForCausalLM", "RecurrentGemmaConfig", {
        **HYBRID, "num_hidden_layers": 3, "intermediate_size": 24, "num_attention_heads": 4, "num_key_value_heads": 1,
        "head_dim": 4, "lru_width": 24, "attention_window_size": 4}),
    "rwkv": tiny("RwkvForCausalLM", "RwkvConfig", {**HYBRID, "context_length": 64, "rescale_every": 2,
        "intermediate_size": 20}),
    "xlstm": tiny("xLSTMForCausalLM", "xLSTMConfig", {
        **HYBRID, "num_hidden_layers": 2, "hidden_size": 32, "num_heads": 2, "qk_dim_factor": 0.5, "v_dim_factor": 2.0,
        "chunk_size": 4}),
    "qwen3_next": tiny("Qwen3NextForCausalLM", "Qwen3NextConfig", {
        **HYBRID, **HEADS, **GDN, **EXPERTS, "head_dim": 4, "layer_types": MIXED,
        "shared_expert_intermediate_size": 16}),
    "qwen3_5": tiny("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", {
        **HYBRID, **HEADS, **GDN, "head_dim": 4, "layer_types": MIXED}),
    "qwen3_5_moe": tiny("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig", {
        **HYBRID, **HEADS, **GDN, **EXPERTS, "head_dim": 4, "layer_types": MIXED,
        "shared_expert_intermediate_size": 16}),
    "qwen4_exp": tiny("Qwen4ExpForCausalLM", "Qwen4ExpTextConfig", {
        **HYBRID, **HEADS, **GDN, **EXPERTS, "head_dim": 16, "shared_expert_intermediate_size": 16, "hc_count": 2,
        "hc_lowrank": 4, "layer_types": ["linear_attention", "indexed_attention"] * 2, "indexer_n_heads": 2,
        "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 4, "indexer_compress_ratio": 2,
        "rope_parameters": ROPE}),
    "olmo_hybrid": tiny("OlmoHybridForCausalLM", "OlmoHybridConfig", {
        **HYBRID, **HEADS, **GDN, "layer_types": MIXED}),
    "kimi_linear": tiny("KimiLinearForCausalLM", "KimiLinearConfig", {**HYBRID, **KDA}),
    "bailing_hybrid": tiny("BailingHybridForCausalLM", "BailingHybridConfig", {
        **HYBRID, **KDA, "q_lora_rank": 6, "n_group": 1, "topk_group": 1}),
    "glm5_next": tiny_glm5_next,
    "minimax": tiny("MiniMaxForCausalLM", "MiniMaxConfig", {
        **HYBRID, **HEADS, "head_dim": 4, "block_size": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
        "layer_types": MIXED, "linear_attn_alpha_factor": 0.7, "linear_attn_beta_factor": 1.3,
        "full_attn_alpha_factor": 1.2, "full_attn_beta_factor": 0.8}),
    "lfm2": tiny("Lfm2ForCausalLM", "Lfm2Config", {**HYBRID, **CONV}),
    "lfm2_moe": tiny("Lfm2MoeForCausalLM", "Lfm2MoeConfig", {**HYBRID, **CONV, **EXPERTS, "num_dense_layers": 1}),
    "lfm3": tiny("Lfm3ForCausalLM", "Lfm3Config", {
        **HYBRID, **CONV, "head_dim": 4, "sliding_window": 4,
        "layer_types": ["conv", "sliding_attention", "conv", "full_attention"]}),
}  # fmt: skip
"""A builder of a tiny model for each family, by name: every test that takes ``family`` runs on each."""
