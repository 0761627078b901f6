"""The record of every family, by name.

A record whose name has a space is a variant of the family before it, with the layers that differ.
"""

from typing import Any

import torch
from torch import Tensor

from tests import oracles, oracles_delta, oracles_gated, oracles_softmax, oracles_ssd
from tests.families import options
from tests.families.configurations import (
    CONV,
    EXPERTS,
    FALCON_H1,
    GDN,
    HEADS,
    HYBRID,
    KDA,
    MAMBA,
    MIXED,
    ROPE,
    S6,
    SSD,
    ZAMBA,
    tiny,
    tiny_glm5_next,
)
from tests.families.record import Block, Family, Layer, by_type, in_each

GRANITE_TYPES = ["mamba", "attention"] * 2
NEMOTRON_TYPES = ["mamba", "moe", "attention", "mamba"]
"""Transformers rewrites the names of these two in its configurations."""


# --- Layers by kernel ----------------------------------------------------------------------------------------------


def s6() -> Layer:
    return Layer(oracles.s6, ("out", "gate", "scan", "act", "conv", "in"), options.S6)


def hybrid_s6(table: options.Table) -> Layer:
    return Layer(oracles_ssd.hybrid_s6, ("out", "gate", "scan", "act", "conv", "in"), table)


def ssd(table: options.Table, norm: bool = True) -> Layer:
    return Layer(oracles_ssd.ssd, ("out", *(["norm"] if norm else []), "gate", "scan", "act", "conv", "in"), table)


def gdn(table: options.Table = options.GDN) -> Layer:
    return Layer(oracles_delta.gdn, ("out", "gate", "norm", "scan", "act", "conv", "in"), table)


def kda(table: options.Table = options.KDA) -> Layer:
    return Layer(oracles_delta.kda, ("out", "gate", "norm", "scan", "act", "conv", "in"), table)


def short_conv() -> Layer:
    return Layer(oracles_gated.short_conv, ("out", "gate", "conv", "input", "in"), options.SHORT_CONV)


def softmax(
    table: options.Table | None = None, gate: bool = False, latent: bool = False, sparse: bool = False
) -> Layer:
    """Softmax attention: with a gate on its output, values that are read off a latent vector, selected keys."""
    value = ("value", "norm") if latent else ()
    factors = ("out", *(["gate"] if gate else []), "attention", *value, "in")
    return Layer(oracles_softmax.layer, factors, table or {}, sparse=sparse)


def positions(x: Tensor) -> dict[str, Any]:
    """Return the arguments that RecurrentGemma passes on to its recurrent blocks."""
    place = torch.arange(x.shape[1]).expand(x.shape[:2])
    return {"position_ids": place, "attention_mask": None, "use_cache": False}


def no_positions(x: Tensor) -> dict[str, Any]:
    return {"position_embeddings": None}


# --- Where layers stand --------------------------------------------------------------------------------------------


def linear_or(recurrent: str, attention: str, linear: str = "linear_attn", **more: Any) -> Any:
    """Say that layers are recurrent or softmax attention, as ``layer_types`` has it, in the attribute ``linear``."""
    mixers = {"linear_attention": (linear, recurrent), "full_attention": ("self_attn", attention)}
    return by_type("model.layers", mixers, **more)


def conv_or(conv: str, attention: str) -> Any:
    softmax = ("self_attn", attention)
    mixers = {"conv": ("conv", conv), "full_attention": softmax, "sliding_attention": softmax}
    return by_type("model.layers", mixers)


def every_other(config: Any) -> list[str]:
    period, offset = config.attn_layer_period, config.attn_layer_offset
    return ["attention" if i % period == offset else "mamba" for i in range(config.num_hidden_layers)]


def at_indices(config: Any) -> list[str]:
    return ["attention" if i in config.attn_layer_indices else "mamba" for i in range(config.num_hidden_layers)]


def two_of_three(config: Any) -> list[str]:
    return [("recurrent", "recurrent", "attention")[i % 3] for i in range(config.num_hidden_layers)]


def in_streams(config: Any, kind: str) -> dict[str, Any]:
    return {"shape": "streams"}


def minimax_factors(config: Any, kind: str) -> dict[str, Any]:
    prefix = {"linear_attention": "linear", "full_attention": "full"}[kind]
    keep, write = (getattr(config, f"{prefix}_attn_{factor}_factor") for factor in ("alpha", "beta"))
    return {"keep": keep, "write": (write,)}


def falcon_h1_blocks(config: Any) -> list[Block]:
    write = (config.ssm_out_multiplier, config.attention_out_multiplier)
    classes = ["FalconH1Mixer", "FalconH1Attention"]
    mixers = [[f"model.layers.{i}.{name}" for name in ("mamba", "self_attn")] for i in range(config.num_hidden_layers)]
    return [Block("parallel", names, classes, write=write) for names in mixers]


def with_branches(shared: str, attention: str, mamba: str) -> Any:
    """Say that in every other block of Zamba the shared attention adds to what the Mamba layer reads."""

    def blocks(config: Any) -> list[Block]:
        return [
            Block("branch", [f"model.layers.{i}.{shared}.self_attn", f"model.layers.{i}.mamba_decoder.mamba"],
                  [attention, mamba])
            if kind == "hybrid" else Block("residual", [f"model.layers.{i}.mamba"], [mamba])
            for i, kind in enumerate(ZAMBA["layers_block_type"])
        ]  # fmt: skip

    return blocks


# --- Families ------------------------------------------------------------------------------------------------------

FAMILIES: dict[str, Family] = {
    "mamba": Family(
        build=tiny("MambaForCausalLM", "MambaConfig", S6),
        layers={"MambaMixer": s6()},
        blocks=in_each("backbone.layers", mixer="MambaMixer")),
    "falcon_mamba": Family(
        build=tiny("FalconMambaForCausalLM", "FalconMambaConfig", S6),
        layers={"FalconMambaMixer": s6()},
        blocks=in_each("backbone.layers", mixer="FalconMambaMixer")),
    "jamba": Family(
        build=tiny("JambaForCausalLM", "JambaConfig", {
            **HYBRID, **HEADS, **MAMBA, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
            "expert_layer_offset": 1, "num_experts": 4, "num_experts_per_tok": 2}),
        layers={
            "JambaMambaMixer": hybrid_s6(options.JAMBA),
            "JambaAttention": softmax({**options.HEADS, **options.WIDTH})},
        blocks=by_type("model.layers", {
            "mamba": ("mamba", "JambaMambaMixer"), "attention": ("self_attn", "JambaAttention")}, types=every_other),
        earlier=({"use_mamba_kernels": False},)),
    "zamba": Family(
        build=tiny("ZambaForCausalLM", "ZambaConfig", {**ZAMBA, "mamba_dt_rank": 2, "n_mamba_heads": 2}),
        layers={
            "ZambaMambaMixer": hybrid_s6(options.ZAMBA),
            "ZambaAttention": softmax(options.named([{"num_key_value_heads": 2}]))},
        blocks=with_branches("shared_transf", "ZambaAttention", "ZambaMambaMixer"),
        earlier=({"use_mamba_kernels": False}, {"layers_block_type": ["linear_attention", "hybrid"] * 2})),
    "mamba2": Family(
        build=tiny("Mamba2ForCausalLM", "Mamba2Config", {
            **HYBRID, "num_hidden_layers": 2, "state_size": 3, "num_heads": 8, "head_dim": 4, "n_groups": 2,
            "chunk_size": 4, "time_step_limit": (0.5, 0.9)}),
        layers={"Mamba2Mixer": ssd(options.MAMBA2)},
        blocks=in_each("backbone.layers", mixer="Mamba2Mixer")),
    "bamba": Family(
        build=tiny("BambaForCausalLM", "BambaConfig", {
            **HYBRID, **HEADS, **SSD, "attn_layer_indices": [1, 3], "time_step_limit": (0.5, 0.9)}),
        layers={"BambaMixer": ssd(options.HYBRID_SSD), "BambaAttention": softmax({**options.BIAS, **options.HEADS})},
        blocks=by_type("model.layers", {
            "mamba": ("mamba", "BambaMixer"), "attention": ("self_attn", "BambaAttention")}, types=at_indices)),
    "granitemoehybrid": Family(
        build=tiny("GraniteMoeHybridForCausalLM", "GraniteMoeHybridConfig", {
            **HYBRID, **HEADS, **SSD, "layer_types": GRANITE_TYPES, "num_local_experts": 4,
            "num_experts_per_tok": 2, "shared_intermediate_size": 16, "embedding_multiplier": 2.0,
            "residual_multiplier": 0.5}),
        layers={"GraniteMoeHybridMambaLayer": ssd(options.GRANITE), "GraniteMoeHybridAttention": softmax(
            {**options.BIAS, **options.named([{"position_embedding_type": "rope", "attention_multiplier": 0.3}])})},
        blocks=by_type("model.layers", {
            "mamba": ("mamba", "GraniteMoeHybridMambaLayer"), "attention": ("self_attn", "GraniteMoeHybridAttention")},
            types=lambda config: GRANITE_TYPES, factors=lambda config, kind: {"write": (config.residual_multiplier,)})),
    "falcon_h1": Family(
        build=tiny("FalconH1ForCausalLM", "FalconH1Config", {
            **FALCON_H1, "mamba_rms_norm": True, "mamba_norm_before_gate": False,
            "ssm_multipliers": [0.5, 0.6, 0.7, 0.8, 0.9], "ssm_in_multiplier": 1.3, "ssm_out_multiplier": 0.7,
            "attention_in_multiplier": 0.9, "attention_out_multiplier": 1.2}),
        layers={"FalconH1Mixer": ssd(options.FALCON_H1), "FalconH1Attention": softmax(
            {**options.BIAS, **options.named([{"key_multiplier": 0.4}])})},
        blocks=falcon_h1_blocks),
    "falcon_h1 without norm": Family(
        build=tiny("FalconH1ForCausalLM", "FalconH1Config", {**FALCON_H1, "mamba_rms_norm": False}),
        layers={"FalconH1Mixer": ssd(options.FALCON_H1_WITHOUT_NORM, norm=False)},
        blocks=falcon_h1_blocks),
    "nemotron_h": Family(
        build=tiny("NemotronHForCausalLM", "NemotronHConfig", {
            **HYBRID, **HEADS, "head_dim": 4, "layers_block_type": NEMOTRON_TYPES,
            "mamba_num_heads": 8, "mamba_head_dim": 4, "n_groups": 2, "ssm_state_size": 3, "chunk_size": 4,
            "n_routed_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "moe_shared_expert_intermediate_size": 16}),
        layers={
            "NemotronHMamba2Mixer": ssd(options.NEMOTRON),
            "NemotronHAttention": softmax({**options.HEADS, **options.WIDTH})},
        blocks=by_type("model.layers", {
            "mamba": ("mixer", "NemotronHMamba2Mixer"), "attention": ("mixer", "NemotronHAttention"), "moe": None},
            types=lambda config: NEMOTRON_TYPES),
        earlier=({"chunk_size": 64},)),
    "zamba2": Family(
        build=tiny("Zamba2ForCausalLM", "Zamba2Config", {
            **ZAMBA, "n_mamba_heads": 8, "mamba_headdim": 4, "mamba_ngroups": 2, "chunk_size": 4, "num_mem_blocks": 2,
            "adapter_rank": 3, "use_shared_attention_adapter": True, "time_step_min": 0.8}),
        layers={"Zamba2MambaMixer": ssd(options.ZAMBA2), "Zamba2Attention": softmax(options.named([
            {"use_shared_attention_adapter": True}, {"use_shared_attention_adapter": True, "num_mem_blocks": 2},
            {"use_mem_rope": True},
            {"use_mem_rope": True, "use_shared_attention_adapter": True, "num_key_value_heads": 4}]))},
        blocks=with_branches("shared_transformer", "Zamba2Attention", "Zamba2MambaMixer"),
        earlier=({"chunk_size": 64}, {"num_mem_blocks": 1, "chunk_size": 64})),
    "recurrent_gemma": Family(
        build=tiny("RecurrentGemmaForCausalLM", "RecurrentGemmaConfig", {
            **HYBRID, "num_hidden_layers": 3, "intermediate_size": 24, "num_attention_heads": 4,
            "num_key_value_heads": 1, "head_dim": 4, "lru_width": 24, "attention_window_size": 4}),
        layers={
            "RecurrentGemmaRecurrentBlock": Layer(
                oracles_gated.rg_lru, ("out", "gate", "scan", "conv", "in"), options.RG_LRU, takes_mask=False,
                arguments=positions),
            "RecurrentGemmaAttention": softmax({
                **options.BIAS, **options.HEADS,
                **options.named([{"attention_window_size": 1}, {"attention_window_size": 20}])})},
        blocks=by_type("model.layers", {
            "recurrent": ("temporal_block", "RecurrentGemmaRecurrentBlock"),
            "attention": ("temporal_block", "RecurrentGemmaAttention")}, types=two_of_three)),
    "rwkv": Family(
        build=tiny("RwkvForCausalLM", "RwkvConfig", {**HYBRID, "context_length": 64, "rescale_every": 2,
            "intermediate_size": 20}),
        layers={
            "RwkvSelfAttention": Layer(
                oracles_gated.wkv, ("out", "gate", "scan", "value", "shift"), options.WKV, takes_mask=False),
            "RwkvFeedForward": Layer(
                oracles_gated.channel_mix, ("gate", "value", "act", "key", "shift"), options.CHANNEL_MIX,
                takes_mask=False)},
        blocks=in_each("rwkv.blocks", attention="RwkvSelfAttention", feed_forward="RwkvFeedForward")),
    "xlstm": Family(
        build=tiny("xLSTMForCausalLM", "xLSTMConfig", {
            **HYBRID, "num_hidden_layers": 2, "hidden_size": 32, "num_heads": 2, "qk_dim_factor": 0.5,
            "v_dim_factor": 2.0, "chunk_size": 4}),
        layers={"xLSTMLayer": Layer(
            oracles_gated.mlstm, ("out", "gate", "norm", "scan", "centre", "in"), options.MLSTM, takes_mask=False)},
        blocks=in_each("backbone.blocks", mlstm_layer="xLSTMLayer"),
        earlier=({"chunk_size": 64},)),
    "qwen3_next": Family(
        build=tiny("Qwen3NextForCausalLM", "Qwen3NextConfig", {
            **HYBRID, **HEADS, **GDN, **EXPERTS, "head_dim": 4, "layer_types": MIXED,
            "shared_expert_intermediate_size": 16}),
        layers={
            "Qwen3NextGatedDeltaNet": gdn(),
            "Qwen3NextAttention": softmax({**options.BIAS, **options.HEADS}, gate=True)},
        blocks=linear_or("Qwen3NextGatedDeltaNet", "Qwen3NextAttention")),
    "qwen3_5": Family(
        build=tiny("Qwen3_5ForCausalLM", "Qwen3_5TextConfig", {
            **HYBRID, **HEADS, **GDN, "head_dim": 4, "layer_types": MIXED}),
        layers={"Qwen3_5GatedDeltaNet": gdn(), "Qwen3_5Attention": softmax({
            **options.BIAS, **options.WIDTH, "all of a head is turned": {"rope_parameters": {
                "rope_type": "default", "rope_theta": 100.0, "partial_rotary_factor": 1.0}}}, gate=True)},
        blocks=linear_or("Qwen3_5GatedDeltaNet", "Qwen3_5Attention")),
    "qwen3_5_moe": Family(
        build=tiny("Qwen3_5MoeForCausalLM", "Qwen3_5MoeTextConfig", {
            **HYBRID, **HEADS, **GDN, **EXPERTS, "head_dim": 4, "layer_types": MIXED,
            "shared_expert_intermediate_size": 16}),
        layers={"Qwen3_5MoeGatedDeltaNet": gdn(), "Qwen3_5MoeAttention": softmax(options.BIAS, gate=True)},
        blocks=linear_or("Qwen3_5MoeGatedDeltaNet", "Qwen3_5MoeAttention")),
    "qwen4_exp": Family(
        build=tiny("Qwen4ExpForCausalLM", "Qwen4ExpTextConfig", {
            **HYBRID, **HEADS, **GDN, **EXPERTS, "head_dim": 16, "shared_expert_intermediate_size": 16, "hc_count": 2,
            "hc_lowrank": 4, "layer_types": ["linear_attention", "indexed_attention"] * 2, "indexer_n_heads": 2,
            "indexer_kv_heads": 1, "indexer_head_dim": 16, "indexer_budget": 4, "indexer_compress_ratio": 2,
            "rope_parameters": ROPE}),
        layers={"Qwen4ExpTextGatedDeltaNet": gdn(options.QWEN4), "Qwen4ExpTextAttention": softmax({
            **options.BIAS, **options.named([
                {"indexer_n_heads": 3, "indexer_budget": 2, "indexer_compress_ratio": 1},
                {"indexer_budget": 3, "indexer_compress_ratio": 3}])}, gate=True, sparse=True)},
        blocks=by_type("model.layers", {
            "linear_attention": ("linear_attn", "Qwen4ExpTextGatedDeltaNet"),
            **dict.fromkeys(["indexed_attention", "qwen_sparse_attention", "full_attention"],
                            ("self_attn", "Qwen4ExpTextAttention"))}, factors=in_streams),
        connection=("attn_hyper_connection", 2),
        earlier=({"layer_types": MIXED},)),
    "olmo_hybrid": Family(
        build=tiny("OlmoHybridForCausalLM", "OlmoHybridConfig", {
            **HYBRID, **HEADS, **GDN, "layer_types": MIXED}),
        layers={"OlmoHybridGatedDeltaNet": gdn(options.OLMO), "OlmoHybridAttention": softmax({
            **options.BIAS, **options.HEADS, "no positions": {"rope_parameters": {
                "rope_type": "default", "rope_theta": None}}})},
        blocks=linear_or("OlmoHybridGatedDeltaNet", "OlmoHybridAttention")),
    "kimi_linear": Family(
        build=tiny("KimiLinearForCausalLM", "KimiLinearConfig", {**HYBRID, **KDA}),
        layers={"KimiLinearDeltaAttention": kda(), "KimiLinearAttention": softmax({
            **options.BIAS, **options.named([
                {"q_lora_rank": 5},
                {"qk_nope_head_dim": 6, "v_head_dim": 4, "q_lora_rank": 5, "attention_bias": True},
                {"qk_nope_head_dim": 10, "v_head_dim": 6, "qk_rope_head_dim": 2}])}, latent=True)},
        blocks=linear_or("KimiLinearDeltaAttention", "KimiLinearAttention", linear="self_attn")),
    "bailing_hybrid": Family(
        build=tiny("BailingHybridForCausalLM", "BailingHybridConfig", {
            **HYBRID, **KDA, "q_lora_rank": 6, "n_group": 1, "topk_group": 1}),
        layers={"BailingHybridDeltaAttention": kda(options.BAILING), "BailingHybridAttention": softmax({
            **options.BIAS, "four channels are turned": {"qk_rope_head_dim": 4, "rope_parameters": {
                "rope_type": "default", "rope_theta": 100.0}}}, gate=True, latent=True)},
        blocks=linear_or("BailingHybridDeltaAttention", "BailingHybridAttention", linear="self_attn")),
    "glm5_next": Family(
        build=tiny_glm5_next,
        layers={"Glm5NextTextLinearAttention": kda(options.GLM5), "Glm5NextTextAttention": softmax({
            **options.BIAS, **options.named([
                {"index_topk": 6, "index_kpool": 3},
                {"index_topk": 2, "index_kpool": 1},
                {"index_kpool_always_select_tail": False, "index_topk": 2},
                {"index_kpool_always_select_tail": False, "index_kpool": 10, "index_topk": 10}]),
            "a shared index": {"layer_types": ["linear_attention"] + 3 * ["full_attention"],
                               "indexer_types": ["full", "full", "shared", "full"]}}, latent=True, sparse=True)},
        blocks=by_type("model.language_model.layers", {
            "linear_attention": ("self_attn", "Glm5NextTextLinearAttention"),
            **dict.fromkeys(["indexed_attention", "deepseek_sparse_attention"],
                            ("self_attn", "Glm5NextTextAttention"))}, factors=in_streams),
        connection=("attn_hc", 0)),
    "minimax": Family(
        build=tiny("MiniMaxForCausalLM", "MiniMaxConfig", {
            **HYBRID, **HEADS, "head_dim": 4, "block_size": 4, "num_local_experts": 4, "num_experts_per_tok": 2,
            "layer_types": MIXED, "linear_attn_alpha_factor": 0.7, "linear_attn_beta_factor": 1.3,
            "full_attn_alpha_factor": 1.2, "full_attn_beta_factor": 0.8}),
        layers={
            "MiniMaxLightningAttention": Layer(
                oracles_delta.lightning, ("out", "gate", "norm", "scan", "act", "in"), options.LIGHTNING,
                arguments=no_positions),
            "MiniMaxAttention": softmax({
                **options.HEADS, **options.WIDTH, **options.named([{"sliding_window": 3}])})},
        blocks=linear_or("MiniMaxLightningAttention", "MiniMaxAttention", linear="self_attn", factors=minimax_factors)),
    "lfm2": Family(
        build=tiny("Lfm2ForCausalLM", "Lfm2Config", {**HYBRID, **CONV}),
        layers={"Lfm2ShortConv": short_conv(), "Lfm2Attention": softmax(options.HEADS)},
        blocks=conv_or("Lfm2ShortConv", "Lfm2Attention")),
    "lfm2_moe": Family(
        build=tiny("Lfm2MoeForCausalLM", "Lfm2MoeConfig", {**HYBRID, **CONV, **EXPERTS, "num_dense_layers": 1}),
        layers={"Lfm2MoeShortConv": short_conv(), "Lfm2MoeAttention": softmax()},
        blocks=conv_or("Lfm2MoeShortConv", "Lfm2MoeAttention")),
    "lfm3": Family(
        build=tiny("Lfm3ForCausalLM", "Lfm3Config", {
            **HYBRID, **CONV, "head_dim": 4, "sliding_window": 4,
            "layer_types": ["conv", "sliding_attention", "conv", "full_attention"]}),
        layers={"Lfm3ShortConv": short_conv(), "Lfm3Attention": softmax({
            **options.BIAS, **options.WIDTH, **options.named([
                {"use_attention_gate": False}, {"sliding_window": 2, "attention_bias": True}])}, gate=True)},
        blocks=conv_or("Lfm3ShortConv", "Lfm3Attention")),
}  # fmt: skip
"""A record of each family: every test that takes ``family`` runs on each."""
