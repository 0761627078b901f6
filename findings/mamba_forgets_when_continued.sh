#!/usr/bin/env bash
# Mamba, Falcon-Mamba and Jamba forget their state when a cache is continued by more than one token.
#
# Versions: transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11.
# Behaviour: given a cache and one token, the recurrence goes on from the cached state. Given a cache and several tokens,
#   it starts from zero again, while the convolution and Jamba's attention do go on. No warning. So a prompt read in
#   parts is another prompt, and Jamba's `generate` with prefill_chunk_size writes another text. Mamba-2 goes on rightly.
# Seen: logits of 13 tokens read as 6 + 7 against those read at once: Mamba 0.1, Falcon-Mamba 0.8, Jamba 0.5, Mamba-2 7e-07;
#   Jamba writes other tokens with prefill_chunk_size=4.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$work/env/bin/python" -W ignore - <<'PYTHON'
import torch
from transformers import (
    FalconMambaConfig,
    FalconMambaForCausalLM,
    JambaConfig,
    JambaForCausalLM,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
)

COMMON = dict(vocab_size=97, hidden_size=32, pad_token_id=0, bos_token_id=1, eos_token_id=2)
S6 = dict(state_size=8, num_hidden_layers=2, time_step_rank=4)
JAMBA = dict(
    num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, num_hidden_layers=4, attn_layer_period=2,
    attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1, num_experts=4, num_experts_per_tok=2,
    mamba_d_state=8, mamba_dt_rank=4,
)  # fmt: skip
MODELS = {
    "Mamba": (MambaForCausalLM, MambaConfig(**COMMON, **S6)),
    "Falcon-Mamba": (FalconMambaForCausalLM, FalconMambaConfig(**COMMON, **S6)),
    "Jamba": (JambaForCausalLM, JambaConfig(**COMMON, **JAMBA)),
    "Mamba-2": (
        Mamba2ForCausalLM,
        Mamba2Config(**COMMON, state_size=8, num_hidden_layers=2, num_heads=8, head_dim=8, n_groups=2, chunk_size=4),
    ),
}
torch.manual_seed(1)
ids = torch.randint(3, 97, (2, 13))
far, models = {}, {}
for name, (model_class, config) in MODELS.items():
    torch.manual_seed(0)
    model = models[name] = model_class(config).eval()
    cache = "past_key_values" if name == "Jamba" else "cache_params"
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
        whole = model(ids, use_cache=False).logits
        first = model(ids[:, :6], use_cache=True)
        second = model(ids[:, 6:], use_cache=True, **{cache: first[cache]})
        one = model(ids[:, :12], use_cache=True)
        last = model(ids[:, 12:], use_cache=True, **{cache: one[cache]})
    far[name] = (second.logits - whole[:, 6:]).abs().max().item()
    by_one = (last.logits - whole[:, 12:]).abs().max().item()
    print(f"{name}: 6 + 7 tokens {far[name]:.1g}, 12 + 1 tokens {by_one:.1g}, the largest logit {whole.abs().max():.2g}")
    assert by_one < 1e-4
written = [
    models["Jamba"].generate(ids, max_new_tokens=6, do_sample=False, **options)[:, 13:].tolist()
    for options in ({}, {"prefill_chunk_size": 4})
]
print(f"Jamba writes {written[0]}, with prefill_chunk_size=4 {written[1]}")
assert far.pop("Mamba-2") < 1e-4 and min(far.values()) > 1e-2
assert written[0] != written[1]
PYTHON
