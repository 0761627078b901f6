#!/usr/bin/env bash
# A transformers Bamba that is called with a cache counts the positions of its new tokens from 0.
#
# Versions: transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11.
# Behaviour: without `position_ids` the model numbers the tokens of the call by itself, from 0, whatever the cache holds,
#   so its attention layers turn queries and keys by wrong angles. No warning. `generate` passes positions and is right;
#   so is a call with position_ids. Other hybrids (Granite 4, Falcon-H1) count on from the cache.
# Seen: 6 tokens, then one more by the cache: logits off by 0.05 where the largest is 2.1; with position_ids by 1e-06;
#   Granite 4 without position_ids by 1e-06.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$work/env/bin/python" -W ignore - <<'PYTHON'
import torch
from transformers import BambaConfig, BambaForCausalLM, GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

SIZES = dict(
    vocab_size=97, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
    num_hidden_layers=4, mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=2, mamba_d_state=8, mamba_chunk_size=4,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GRANITE = dict(
    layer_types=["mamba", "attention"] * 2, num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=32,
    position_embedding_type="rope",
)  # fmt: skip
ids = torch.tensor([[23, 5, 71, 40, 8, 66, 12]])


def error(model_class, config, **options):
    """Return how far the logits of the last token are off when the cache holds those before it."""
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
        whole = model(ids, use_cache=False).logits[:, -1]
        cache = model(ids[:, :-1], use_cache=True).past_key_values
        last = model(ids[:, -1:], past_key_values=cache, **options).logits[:, -1]
    return (last - whole).abs().max().item(), whole.abs().max().item()


bamba = BambaForCausalLM, BambaConfig(**SIZES, attn_layer_indices=[1, 3])
plain, size = error(*bamba)
told, _ = error(*bamba, position_ids=torch.tensor([[6]]))
granite, _ = error(GraniteMoeHybridForCausalLM, GraniteMoeHybridConfig(**SIZES, **GRANITE))
print(f"Bamba {plain:.1g}, with position_ids {told:.1g}, Granite 4 {granite:.1g}; Bamba's largest logit {size:.2g}")
assert plain > 1e-3 and told < 1e-4 and granite < 1e-4
PYTHON
