#!/usr/bin/env bash
# PEFT's `merge_and_unload` of a LoRA on Zamba's shared block gives another function than the adapted model.
#
# Versions: transformers 5.23.0, peft 0.21.2, torch 2.13.0 (CPU), Python 3.11.
# Behaviour: Zamba's attention blocks are modules of their own with one set of weights. PEFT adapts each module by
#   matrices of its own, so the adapted model has a block that differs from place to place. Merging adds the matrices of
#   every place to the one weight. No warning.
# Seen: both places have one weight; merging changes the logits by 0.52, where the largest is 2.7.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0
"$work/env/bin/pip" install --quiet transformers==5.23.0 peft==0.21.2
"$work/env/bin/python" -W ignore - <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from transformers import ZambaConfig, ZambaForCausalLM

torch.manual_seed(0)
size = dict(vocab_size=50, hidden_size=32, intermediate_size=32, num_attention_heads=4, num_key_value_heads=4)
mamba = dict(attention_head_dim=16, mamba_d_state=4, mamba_dt_rank=2, n_mamba_heads=2)
types = dict(num_hidden_layers=4, layers_block_type=["linear_attention", "hybrid"] * 2)
model = ZambaForCausalLM(ZambaConfig(**size, **mamba, **types)).eval()
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(4)
ids = torch.arange(1, 9).unsqueeze(0)


def logits(model):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


blocks = [model.model.layers[i].shared_transf for i in (1, 3)]
shared = blocks[0].feed_forward.gate_proj.weight is blocks[1].feed_forward.gate_proj.weight
adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["gate_proj"], task_type="CAUSAL_LM")).eval()
with torch.no_grad():
    for name, matrix in adapted.named_parameters():
        if "lora" in name:
            matrix.normal_(std=0.3)
before = logits(adapted)
merged = logits(adapted.merge_and_unload())
print(f"one weight in both places: {shared}")
print(f"merging changes the logits by {(merged - before).abs().max():.2g}, the largest logit {before.abs().max():.2g}")
assert shared and (merged - before).abs().max() > 0.1 * before.abs().max()
PYTHON
