#!/usr/bin/env bash
# RecurrentGemma and xLSTM of transformers read the padding that the attention mask leaves out.
#
# Versions: transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11.
# Behaviour: both can be called with an `attention_mask`, as a tokenizer makes it. xLSTM drops it, RecurrentGemma uses it in its
#   attention layers alone, so the recurrences begin with the padding. A left-padded text, which is how batches are written,
#   has other logits than the text itself. No warning (RWKV-4 ignores the mask too, and logs it). Mamba and the hybrids set
#   the states of padding to 0.
# Seen: 6 tokens behind 4 of padding: logits off by 0.6 of 3.6 (RecurrentGemma), 3 of 2.9 (xLSTM), and by 0 (Mamba).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$work/env/bin/python" -W ignore - <<'PYTHON'
import torch
from transformers import (
    MambaConfig,
    MambaForCausalLM,
    RecurrentGemmaConfig,
    RecurrentGemmaForCausalLM,
    xLSTMConfig,
    xLSTMForCausalLM,
)

COMMON = dict(vocab_size=97, hidden_size=64, pad_token_id=0)
GEMMA = dict(num_hidden_layers=3, intermediate_size=96, num_attention_heads=4, num_key_value_heads=1, head_dim=16)
MODELS = {
    "RecurrentGemma": (RecurrentGemmaForCausalLM, RecurrentGemmaConfig(**COMMON, **GEMMA, lru_width=64)),
    "xLSTM": (xLSTMForCausalLM, xLSTMConfig(**COMMON, num_hidden_layers=2, num_heads=2, chunk_size=4)),
    "Mamba": (MambaForCausalLM, MambaConfig(**COMMON, num_hidden_layers=2)),
}
text = torch.tensor([[23, 5, 71, 40, 8, 66]])
padded = torch.nn.functional.pad(text, (4, 0))
mask = (padded > 0).long()
far = {}
for name, (model_class, config) in MODELS.items():
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.08 * torch.randn(parameter.shape))
        right = model(text, use_cache=False).logits
        behind = model(padded, attention_mask=mask, use_cache=False).logits[:, 4:]
    far[name] = (behind - right).abs().max().item()
    print(f"{name}: {far[name]:.1g}, the largest logit {right.abs().max():.2g}")
assert far.pop("Mamba") < 1e-4 and min(far.values()) > 1e-2
PYTHON
