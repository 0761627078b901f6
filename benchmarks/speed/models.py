"""Random models of transformers, by kernel, and calls of them."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import transformers as hf
from torch import Tensor

VOCABULARY = 1000
TARGET = 5

HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 768}
EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
SHARED: dict[str, Any] = {"moe_intermediate_size": 128, "shared_expert_intermediate_size": 128}
GDN: dict[str, Any] = {
    "head_dim": 64, "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}  # fmt: skip


def linear(layers: int) -> dict[str, Any]:
    """Return the layer types of a model without softmax attention."""
    return {"layer_types": ["linear_attention"] * layers}


def random_model(name: str, width: int, layers: int, **options: Any) -> Any:
    """Return a random language model of transformers.

    Args:
        name: Its name in transformers, such as ``"Mamba2"``.
        width: E.
        layers: Their number.
        **options: What its configuration has besides.
    """
    torch.manual_seed(0)
    config = getattr(hf, f"{name}TextConfig", None) or getattr(hf, f"{name}Config")
    common = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    options = {**common, "hidden_size": width, "num_hidden_layers": layers, **options}
    return getattr(hf, f"{name}ForCausalLM")(config(**options)).eval()


def mamba(layers: int, width: int, **options: Any) -> Any:
    """Return a Mamba with N = 16."""
    return random_model("Mamba", width, layers, state_size=16, **options)


def mamba2(layers: int, width: int, head: int = 64, states: int = 128, **options: Any) -> Any:
    """Return a Mamba-2 with heads of ``head`` channels and ``states`` states."""
    heads = 2 * width // head
    sizes = {"state_size": states, "head_dim": head, "num_heads": heads, "n_groups": 1}
    return random_model("Mamba2", width, layers, **sizes, **options)


def gated_delta(layers: int, width: int, softmax: bool = True) -> Any:
    """Return a Qwen3-Next with experts: gated delta rule, and softmax attention in every fourth layer if asked for."""
    types = {} if softmax else linear(layers)
    experts = {"num_experts": 4, "num_experts_per_tok": 2, **SHARED}
    return random_model("Qwen3Next", width, layers, **{**HEADS, **GDN, **experts, **types, "intermediate_size": 512})


def delta_hybrid(layers: int, width: int) -> Any:
    """Return a Qwen3.5: gated delta rule and softmax attention in turn."""
    return random_model(
        "Qwen3_5", width, layers, layer_types=["linear_attention", "full_attention"] * (layers // 2),
        **{**HEADS, "intermediate_size": 3 * width, "head_dim": width // 4}, linear_num_key_heads=2,
        linear_num_value_heads=4, linear_key_head_dim=32, linear_value_head_dim=64,
    )  # fmt: skip


def by_kernel(layers: int, width: int) -> dict[str, Callable[[], Any]]:
    """Return models of transformers whose heads and states have the sizes of published checkpoints, by kernel."""
    options: dict[str, tuple[str, dict[str, Any]]] = {
        "KDA": ("KimiLinear", {
            **HEADS, **EXPERTS, **linear(layers), "linear_num_heads": 4, "linear_head_dim": 64,
            "num_key_value_heads": 4, "kv_lora_rank": 64, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32,
            "v_head_dim": 64, "moe_intermediate_size": 256}),
        "lightning": ("MiniMax", {**HEADS, **EXPERTS, **linear(layers), "head_dim": 64, "intermediate_size": 384}),
        "mLSTM": ("xLSTM", {"num_heads": 2, "qk_dim_factor": 0.5, "v_dim_factor": 1.0}),
        "short convolution": ("Lfm2", {**HEADS, "layer_types": ["conv"] * layers}),
        "RG-LRU": ("RecurrentGemma", {**HEADS, "lru_width": width, "block_types": ["recurrent"]}),
        "WKV-4": ("Rwkv", {}),
    }  # fmt: skip
    return {kernel: partial(random_model, name, width, layers, **given) for kernel, (name, given) in options.items()}


def random_ids(L: int) -> Tensor:
    """Return random token ids (1, L)."""
    return torch.randint(3, VOCABULARY, (1, L), generator=torch.Generator().manual_seed(0))


def forward_pass(model: Any, *inputs: Any) -> Callable[[], object]:
    """Return a call of the model's forward pass without a graph."""
    options = {"use_cache": False} if hasattr(model, "config") else {}
    return torch.no_grad()(lambda: model(*inputs, **options))


def last_logits(model: Any, ids: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return embeddings of tokens (1, L, E), and the logits at the last token as a function of embeddings."""
    embeddings = model.get_input_embeddings()(ids).detach()
    return embeddings, lambda inputs: model(inputs_embeds=inputs, use_cache=False).logits[:, -1]
