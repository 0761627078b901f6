#!/usr/bin/env bash
# A transformers hybrid that is configured without attention layers writes nothing: `generate` fails by its cache.
#
# Versions: transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11.
# Behaviour: `layer_types` may name any mixture of layers, and with a single attention layer the model runs. Without one
#   the cache, which is on by default, is asked for the length of its sequence and refuses, as only attention layers
#   know it. `use_cache=False` works.
# Seen: a convolution and an attention layer write 3 tokens, as do convolutions alone with use_cache=False; else
#   ValueError: `get_seq_length` can only be called on Attention layers, and the current Cache seem to only contain
#   LinearAttention layers.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0
"$work/env/bin/pip" install --quiet transformers==5.23.0
"$work/env/bin/python" -W ignore - <<'PYTHON'
import torch
from transformers import Lfm2Config, Lfm2ForCausalLM

torch.manual_seed(0)
size = dict(vocab_size=50, hidden_size=16, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2)
ids = torch.arange(1, 6).unsqueeze(0)


def written(*types, **options):
    config = Lfm2Config(**size, num_hidden_layers=len(types), layer_types=list(types))
    return Lfm2ForCausalLM(config).eval().generate(ids, max_new_tokens=3, do_sample=False, **options).shape[1] - 5


print(f"convolution and attention: {written('conv', 'full_attention')} tokens")
print(f"convolutions alone, without a cache: {written('conv', 'conv', use_cache=False)} tokens")
try:
    written("conv", "conv")
except ValueError as error:
    print(f"convolutions alone: ValueError: {error}")
    assert "get_seq_length" in str(error)
else:
    raise AssertionError("it runs now")
PYTHON
