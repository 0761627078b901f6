#!/usr/bin/env bash
# Recurrent and hybrid models that are turned to float64 go on computing in float32, or cannot run any more.
#
# Versions: transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11.
# Behaviour: after `model.double()` all weights are float64. But norms, time steps, decays and some models' logits ask for
#   float32 by name, so finite differences are noise: `torch.autograd.gradcheck`, which needs float64, fails on every one that
#   was tried, though nothing is wrong with the gradient. GPT-2 passes. With experts (Qwen3-Next) the model raises: torch's
#   grouped product of matrices takes no float64 on a CPU.
# Seen: gradcheck is False for Mamba, Mamba-2, xLSTM (logits in float32), RWKV-4, Qwen3.5, RecurrentGemma, LFM2 (in float64),
#   True for GPT-2; Qwen3-Next: RuntimeError, Expected mat_a to be Float32, BFloat16 or Float16 matrix, got Double.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$work/env/bin/python" -W ignore - <<'PYTHON'
import torch
import transformers as hf

hf.logging.set_verbosity_error()

COMMON = dict(vocab_size=97, hidden_size=16, num_hidden_layers=2, pad_token_id=0, bos_token_id=1, eos_token_id=2)
HEADS = dict(num_attention_heads=2, num_key_value_heads=1, head_dim=8, intermediate_size=32)
DELTA = dict(linear_num_value_heads=2, linear_num_key_heads=1, linear_key_head_dim=8, linear_value_head_dim=8)
EXPERTS = dict(num_experts=2, num_experts_per_tok=1, moe_intermediate_size=16, shared_expert_intermediate_size=16)
CONFIGS = {
    "Mamba": hf.MambaConfig(**COMMON, state_size=4),
    "Mamba-2": hf.Mamba2Config(**COMMON, state_size=8, num_heads=4, head_dim=8, n_groups=1),
    "RWKV-4": hf.RwkvConfig(**COMMON),
    "xLSTM": hf.xLSTMConfig(**COMMON, num_heads=2),
    "Qwen3.5": hf.Qwen3_5TextConfig(**COMMON, **HEADS, **DELTA, layer_types=["linear_attention", "full_attention"]),
    "RecurrentGemma": hf.RecurrentGemmaConfig(**COMMON, **HEADS, lru_width=16, block_types=["recurrent", "attention"]),
    "LFM2": hf.Lfm2Config(**COMMON, **HEADS, layer_types=["conv", "full_attention"]),
    "GPT-2": hf.GPT2Config(vocab_size=97, n_embd=16, n_layer=2, n_head=2, bos_token_id=1, eos_token_id=2),
    "Qwen3-Next": hf.Qwen3NextConfig(**COMMON, **HEADS, **DELTA, **EXPERTS),
}
found = {}
for name, config in CONFIGS.items():
    torch.manual_seed(0)
    model = hf.AutoModelForCausalLM.from_config(config).eval().double()
    embeddings = torch.randn(1, 5, 16, dtype=torch.float64, requires_grad=True)

    def logits(inputs):
        return model(inputs_embeds=inputs, use_cache=False).logits[:, -1, :2]

    try:
        passes = torch.autograd.gradcheck(logits, embeddings, raise_exception=False)
        found[name] = logits(embeddings).dtype, passes
    except RuntimeError as error:
        found[name] = str(error)
    print(f"{name}: {found[name]}")
assert found.pop("GPT-2") == (torch.float64, True)
assert "Expected mat_a to be Float32" in found.pop("Qwen3-Next")
assert not any(passes for _, passes in found.values())
assert {name for name, (dtype, _) in found.items() if dtype == torch.float32} == {"Mamba", "Mamba-2", "xLSTM"}
PYTHON
