#!/usr/bin/env bash
# Texts that are packed into one row read one another in the recurrent layers of a hybrid, not in its attention layers.
#
# Versions: transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11.
# Behaviour: DataCollatorWithFlattening joins texts to one row and numbers the positions of each from 0. From these
#   numbers transformers builds masks by which attention layers keep the texts apart. Recurrences and convolutions without
#   CUDA kernels get no mask and hand their states on from text to text. No warning. (Given seq_idx or cu_seq_lens, Qwen3-Next
#   refuses; the collator gives neither unless it is asked to.)
# Seen: attention alone: the second text's logits differ by 4e-07 from those that it has by itself; with recurrent layers by
#   1.7 of 1.7 (Qwen3-Next), 0.05 of 1.5 (Falcon-H1) and 0.36 of 1.8 (MiniMax). The first text differs by 7e-07 at most.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$work/env/bin/python" -W ignore - <<'PYTHON'
import torch
from transformers import (
    DataCollatorWithFlattening,
    FalconH1Config,
    FalconH1ForCausalLM,
    MiniMaxConfig,
    MiniMaxForCausalLM,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
)

COMMON = dict(
    vocab_size=97, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, head_dim=8,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
DELTA = dict(linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8)
EXPERTS = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=16, shared_expert_intermediate_size=16)
SSM = dict(mamba_d_ssm=64, mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=2, mamba_d_state=8, mamba_chunk_size=4)
QWEN = COMMON | DELTA | EXPERTS
MODELS = {
    "attention alone": (Qwen3NextForCausalLM, Qwen3NextConfig(**QWEN, layer_types=["full_attention"] * 4, num_hidden_layers=4)),
    "Qwen3-Next": (Qwen3NextForCausalLM, Qwen3NextConfig(**QWEN, num_hidden_layers=4)),
    "Falcon-H1": (FalconH1ForCausalLM, FalconH1Config(**COMMON, **SSM, num_hidden_layers=2)),
    "MiniMax": (MiniMaxForCausalLM, MiniMaxConfig(**COMMON, num_hidden_layers=4, block_size=4, num_local_experts=4)),
}  # fmt: skip
texts = [[23, 5, 71, 40, 8, 66], [12, 90, 33, 7, 51, 28, 64]]
packed = DataCollatorWithFlattening()([{"input_ids": text} for text in texts])
print("positions", packed["position_ids"].tolist()[0])
far = {}
for name, (model_class, config) in MODELS.items():
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.08 * torch.randn(parameter.shape))
        together = model(packed["input_ids"], position_ids=packed["position_ids"], use_cache=False).logits[0].split([6, 7])
        alone = [model(torch.tensor([text]), use_cache=False).logits[0] for text in texts]
    first, far[name] = ((a - b).abs().max().item() for a, b in zip(together, alone))
    print(f"{name}: first text {first:.1g}, second text {far[name]:.2g}, the largest logit {alone[1].abs().max():.2g}")
    assert first < 1e-4
assert far.pop("attention alone") < 1e-4 and min(far.values()) > 1e-2
PYTHON
