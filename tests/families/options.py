"""Options of the configurations that change the equation of a layer, by kernel: a record names those of its layers."""

from collections.abc import Iterable
from typing import Any

Table = dict[str, dict[str, Any]]


def named(options: Iterable[dict[str, Any]]) -> Table:
    """Name options by their values."""
    return {",".join(f"{key}={value}" for key, value in each.items()): each for each in options}


# --- S6 and SSD ----------------------------------------------------------------------------------------------------

S6: Table = {
    "biased projections": {"use_bias": True},
    "no bias in the convolution": {"use_conv_bias": False},
    "biased projections alone": {"use_bias": True, "use_conv_bias": False},
    "gelu": {"hidden_act": "gelu"},
    "relu": {"hidden_act": "relu"},
    "two taps": {"conv_kernel": 2},
    "more taps than tokens": {"conv_kernel": 9},
    "one state": {"state_size": 1},
    "rank one": {"time_step_rank": 1},
    "one channel for each width": {"expand": 1},
}
HYBRID_S6: Table = {
    "biased projections": {"mamba_proj_bias": True},
    "no bias in the convolution": {"mamba_conv_bias": False},
    "no bias anywhere": {"mamba_proj_bias": False, "mamba_conv_bias": False},
    "two taps": {"mamba_d_conv": 2},
    "more taps than tokens": {"mamba_d_conv": 9},
    "one state": {"mamba_d_state": 1},
    "rank one": {"mamba_dt_rank": 1},
    "one channel for each width": {"mamba_expand": 1},
}
JAMBA: Table = {**HYBRID_S6, "gelu": {"hidden_act": "gelu"}, "a large epsilon": {"rms_norm_eps": 0.5}}
ZAMBA: Table = {
    **HYBRID_S6,
    "gelu": {"hidden_mamba_act": "gelu"},
    "relu": {"hidden_mamba_act": "relu"},
    "one head": {"n_mamba_heads": 1},
    "four heads": {"n_mamba_heads": 4},
    "a head for each channel": {"n_mamba_heads": 32},
    "four biased heads": {"n_mamba_heads": 4, "mamba_proj_bias": True},
}
GRANITE: Table = {
    "biased projections": {"mamba_proj_bias": True},
    "no bias in the convolution": {"mamba_conv_bias": False},
    "gelu": {"hidden_act": "gelu"},
    "relu": {"hidden_act": "relu"},
    "two taps": {"mamba_d_conv": 2},
    "more taps than tokens": {"mamba_d_conv": 9},
    "one state": {"mamba_d_state": 1},
    "steps within limits": {"time_step_limit": (0.4, 0.8)},
    "a large epsilon": {"rms_norm_eps": 0.5},
    "one group": {"mamba_n_groups": 1},
}
HYBRID_SSD: Table = {
    **GRANITE,
    "four groups": {"mamba_n_groups": 4},
    "a group for each head": {"mamba_n_groups": 8},
    "two heads": {"mamba_n_heads": 2, "mamba_d_head": 16},
    "one head": {"mamba_n_heads": 1, "mamba_d_head": 32, "mamba_n_groups": 1},
    "heads of one channel": {"mamba_n_heads": 32, "mamba_d_head": 1},
    "three times as many channels": {"mamba_expand": 3, "mamba_d_head": 6},
    "one chunk": {"mamba_chunk_size": 64},
}
FALCON_H1: Table = {
    **HYBRID_SSD,
    "three times as many channels": {"mamba_expand": 3, "mamba_d_head": 6, "mamba_d_ssm": None},
    "norm before gate": {"mamba_norm_before_gate": True},
    "four groups, norm before gate": {"mamba_norm_before_gate": True, "mamba_n_groups": 4},
    "biased output": {"projectors_bias": True},
    "all biases": {"mamba_proj_bias": True, "projectors_bias": True},
    "biases and no multiplier": {"mamba_proj_bias": True, "ssm_multipliers": [1.0] * 5, "ssm_in_multiplier": 1.0},
    "other multipliers": {"ssm_multipliers": [1.5, 0.5, 2.0, 0.3, 0.7], "ssm_in_multiplier": 0.6},
    "fewer channels than the width": {"mamba_d_ssm": 8, "mamba_n_heads": 4, "mamba_d_head": 2},
}
FALCON_H1_WITHOUT_NORM: Table = {
    key: FALCON_H1[key] for key in ("biased projections", "steps within limits", "other multipliers", "one group")
}
MAMBA2: Table = {
    "biased projections": {"use_bias": True},
    "no bias in the convolution": {"use_conv_bias": False},
    "gelu": {"hidden_act": "gelu"},
    "relu": {"hidden_act": "relu"},
    "two taps": {"conv_kernel": 2},
    "more taps than tokens": {"conv_kernel": 9},
    "one state": {"state_size": 1},
    "steps within limits": {"time_step_limit": (0.4, 0.8)},
    "steps not too small": {"time_step_limit": (0.8, float("inf"))},
    "steps not too large": {"time_step_limit": (0.0, 0.3)},
    "a large epsilon": {"layer_norm_epsilon": 0.5},
    "one group": {"n_groups": 1},
    "four groups": {"n_groups": 4},
    "a group for each head": {"n_groups": 8},
    "two heads": {"num_heads": 2, "head_dim": 16},
    "one head": {"num_heads": 1, "head_dim": 32, "n_groups": 1},
    "heads of one channel": {"num_heads": 32, "head_dim": 1},
    "three times as many channels": {"expand": 3, "head_dim": 6},
    "one chunk": {"chunk_size": 64},
}
NEMOTRON: Table = {
    "biased projections": {"use_bias": True},
    "no bias in the convolution": {"use_conv_bias": False},
    "gelu": {"mamba_hidden_act": "gelu"},
    "two taps": {"conv_kernel": 2},
    "one state": {"ssm_state_size": 1},
    "steps not too small": {"time_step_min": 0.7},
    "a large epsilon": {"layer_norm_epsilon": 0.5},
    "one group": {"n_groups": 1},
    "a group for each head": {"n_groups": 8},
    "fewer heads": {"mamba_num_heads": 4},
    "channels that are no multiple of the width": {"mamba_num_heads": 6, "mamba_head_dim": 7},
    "one chunk": {"chunk_size": 64},
}
ZAMBA2: Table = {
    "biased projections": {"add_bias_linear": True},
    "two taps": {"mamba_d_conv": 2},
    "one state": {"mamba_d_state": 1},
    "steps not too small": {"time_step_min": 0.7},
    "one group": {"mamba_ngroups": 1},
    "a group for each head": {"mamba_ngroups": 8},
    "two heads": {"n_mamba_heads": 2, "mamba_headdim": 16},
    "three times as many channels": {"mamba_expand": 3, "mamba_headdim": 6},
    "one chunk": {"chunk_size": 64},
}

# --- RG-LRU, WKV-4, mLSTM and the short convolution ----------------------------------------------------------------

RG_LRU = named([
    {"lru_width": 24}, {"lru_width": 8}, {"lru_width": 24, "num_attention_heads": 2},
    {"num_attention_heads": 1}, {"num_attention_heads": 8}, {"conv1d_width": 1}, {"conv1d_width": 2},
    {"conv1d_width": 9}, {"hidden_activation": "gelu"}, {"hidden_activation": "silu"},
    {"hidden_activation": "relu"}, {"hidden_activation": "sigmoid"},
])  # fmt: skip
WKV = named([
    {"attention_hidden_size": 12}, {"attention_hidden_size": 24}, {"rescale_every": 0}, {"rescale_every": 1},
])  # fmt: skip
CHANNEL_MIX = named([{"intermediate_size": 12}, {"rescale_every": 0}, {"rescale_every": 1}])
MLSTM = named([
    {"num_heads": 1}, {"num_heads": 4}, {"qk_dim_factor": 0.5}, {"qk_dim_factor": 2.0}, {"v_dim_factor": 0.5},
    {"v_dim_factor": 2.0, "qk_dim_factor": 0.5}, {"gate_soft_cap": 1.0}, {"gate_soft_cap": 100.0}, {"eps": 0.1},
    {"norm_eps": 0.1}, {"use_bias": True}, {"use_bias": True, "v_dim_factor": 2.0},
    {"norm_reduction_force_float32": False}, {"chunk_size": 64}, {"chunk_size": 1},
    {"chunk_size": 7, "mode": "train"},
])  # fmt: skip
SHORT_CONV = named([{"conv_bias": True}, {"conv_L_cache": 1}, {"conv_L_cache": 2}, {"conv_L_cache": 9}])

# --- The delta rule and lightning attention ------------------------------------------------------------------------

DELTA: Table = {
    "one tap": {"linear_conv_kernel_dim": 1},
    "more taps than tokens": {"linear_conv_kernel_dim": 9},
    "gelu": {"hidden_act": "gelu"},
    "relu": {"hidden_act": "relu"},
    "large eps": {"rms_norm_eps": 0.5},
}
GDN: Table = {
    **DELTA,
    "a key for each value head": {"linear_num_key_heads": 4},
    "one key for all value heads": {"linear_num_key_heads": 1},
    "three value heads to a key": {"linear_num_key_heads": 2, "linear_num_value_heads": 6},
    "one head": {"linear_num_key_heads": 1, "linear_num_value_heads": 1},
    "one state": {"linear_key_head_dim": 1},
    "one channel": {"linear_value_head_dim": 1},
}
QWEN4: Table = {
    **{key: {"output_gate_type": "silu", **options} for key, options in GDN.items()},
    "sigmoid gate": {"output_gate_type": "sigmoid"},
    "gate like the activation": {"output_gate_type": None},
}
OLMO: Table = {**GDN, "no negative eigenvalues": {"linear_allow_neg_eigval": False}}
KDA: Table = {
    **DELTA,
    "one head": {"linear_num_heads": 1},
    "five heads": {"linear_num_heads": 5},
    "one state": {"linear_head_dim": 1},
}
BAILING: Table = {
    **KDA, "no lower bound": {"kda_safe_gate": False}, "high lower bound": {"kda_lower_bound": -0.5},
}  # fmt: skip
GLM5: Table = {
    **KDA, "no lower bound": {"linear_lower_bound": None}, "high lower bound": {"linear_lower_bound": -0.5},
}  # fmt: skip
LIGHTNING: Table = {
    "gelu": {"hidden_act": "gelu"},
    "relu": {"hidden_act": "relu"},
    "large eps": {"rms_norm_eps": 0.5},
    "two heads": {"num_attention_heads": 2},
    "one head": {"num_attention_heads": 1, "num_key_value_heads": 1},
    "wide heads": {"head_dim": 6},
    "heads by the width": {"head_dim": None},
    "blocks of one": {"block_size": 1},
    "uneven blocks": {"block_size": 5},
    "one block": {"block_size": 64},
}

# --- Softmax attention ---------------------------------------------------------------------------------------------

BIAS = named([{"attention_bias": True}])
HEADS = named([{"num_key_value_heads": 1}, {"num_key_value_heads": 4}])
WIDTH = named([{"head_dim": 6}])
