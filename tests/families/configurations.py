"""The configurations of the tiny random models: small enough for the laws, odd enough to hide nothing."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch
import transformers as hf
from torch import nn

Model = TypeVar("Model", bound=nn.Module)
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


def perturbed(model: Model, seed: int = 0, std: float = 0.3) -> Model:
    """Move every parameter off its initial value, so that no symmetry hides an error; return the model in eval mode."""
    random = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(std * torch.randn(parameter.shape, generator=random).to(parameter))
    return model.eval()


def tiny(model: str, config: str, defaults: dict[str, Any], std: float = 0.3) -> Callable[..., Any]:
    """Return a builder of a tiny model: class names in transformers, configuration, size of the perturbation."""

    def build(**options: Any) -> Any:
        torch.manual_seed(0)
        return perturbed(getattr(hf, model)(getattr(hf, config)(**{**defaults, **options})), std=std)

    return build


def tiny_glm5_next(**options: Any) -> Any:
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


ZAMBA = {**HYBRID, "num_attention_heads": 4, "num_key_value_heads": 4, "intermediate_size": 24, "mamba_d_state": 3,
         "layers_block_type": ["mamba", "hybrid", "mamba", "hybrid"]}  # fmt: skip
FALCON_H1 = {**HYBRID, **HEADS, **SSD, "num_hidden_layers": 2, "mamba_d_ssm": 32}
ROPE = {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.25, "mrope_section": [1, 1, 0],
        "mrope_interleaved": True}  # fmt: skip
