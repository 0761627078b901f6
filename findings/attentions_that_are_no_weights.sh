#!/usr/bin/env bash
# `output_attentions` of RWKV-4 and of MiniMax returns tensors that are no attention weights among its attentions.
#
# Versions: transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11.
# Behaviour: RWKV-4 returns the outputs of its mixers, (batch, tokens, channels). MiniMax returns for its lightning layers the
#   states, (batch, heads, channels, channels), between the weights of its attention layers; where a text has as many tokens as
#   a head has channels, the shapes do not tell. No warning. Other hybrids (Qwen3-Next) return the attention layers alone.
# Seen: 8 tokens, heads of 8 channels: MiniMax gives four tensors (1, 4, 8, 8), of which the rows of two sum to 1; RWKV-4 two
#   of shape (1, 8, 32); Qwen3-Next, with one attention layer of four, one, whose rows sum to 1.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$work/env/bin/python" -W ignore - <<'PYTHON'
import torch
from transformers import (
    MiniMaxConfig,
    MiniMaxForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
)

COMMON = dict(
    vocab_size=97, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, head_dim=8,
    num_hidden_layers=4, attn_implementation="eager", pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
DELTA = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
MODELS = {
    "MiniMax": (MiniMaxForCausalLM, MiniMaxConfig(**COMMON, block_size=4, num_local_experts=4)),
    "RWKV-4": (RwkvForCausalLM, RwkvConfig(vocab_size=97, hidden_size=32, num_hidden_layers=2, pad_token_id=0)),
    "Qwen3-Next": (Qwen3NextForCausalLM, Qwen3NextConfig(**COMMON, **DELTA, **EXPERTS)),
}
shapes, sums_to_1 = {}, {}
for name, (model_class, config) in MODELS.items():
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        attentions = model(torch.arange(1, 9).unsqueeze(0), use_cache=False, output_attentions=True).attentions
    shapes[name] = [tuple(a.shape) for a in attentions]
    sums_to_1[name] = [bool((a.sum(-1) - 1).abs().max() < 1e-4) for a in attentions]
    print(f"{name}: {shapes[name]}, rows sum to 1: {sums_to_1[name]}")
assert shapes["MiniMax"] == [(1, 4, 8, 8)] * 4 and sorted(sums_to_1["MiniMax"]) == [False, False, True, True]
assert shapes["RWKV-4"] == [(1, 8, 32)] * 2 and not any(sums_to_1["RWKV-4"])
assert sums_to_1["Qwen3-Next"] == [True]
PYTHON
