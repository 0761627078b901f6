#!/usr/bin/env bash
# A transformers RWKV-4 writes other texts in a batch than one by one.
#
# Versions: transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11.
# Behaviour: a call with one token and the state of the tokens before it is right for a batch of one. With a batch of two,
#   texts of equal length and no padding, it returns two positions instead of one: the token shift takes the states of
#   the examples for tokens. `generate` goes on from the last of them. No warning. With use_cache=False it is right.
# Seen: logits of shape (2, 2, 50) for ids of shape (2, 1); of 6 written tokens 4 and 5 differ from those of the texts alone;
#   without the cache none.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$work/env/bin/python" -W ignore - <<'PYTHON'
import torch
from transformers import RwkvConfig, RwkvForCausalLM

torch.manual_seed(0)
size = dict(vocab_size=50, hidden_size=32, attention_hidden_size=32, intermediate_size=64, context_length=64)
model = RwkvForCausalLM(RwkvConfig(**size, num_hidden_layers=2, rescale_every=0, bos_token_id=1, eos_token_id=2)).eval()
with torch.no_grad():
    for parameter in model.parameters():
        parameter.add_(0.2 * torch.randn(parameter.shape))
ids = torch.tensor([[5, 9, 14, 3, 40, 22], [31, 7, 7, 18, 45, 11]])


def write(ids, **options):
    return model.generate(ids, max_new_tokens=6, min_new_tokens=6, do_sample=False, pad_token_id=0, **options)[:, 6:]


with torch.no_grad():
    before = model(ids, use_cache=True)
    step = model(ids[:, :1], state=before.state, use_cache=True).logits
alone = torch.cat([write(ids[:1]), write(ids[1:])])
together, without = write(ids), write(ids, use_cache=False)
print(f"ids (2, 1) give logits {tuple(step.shape)}")
print(f"alone {alone.tolist()}, in a batch {together.tolist()}, without a cache {without.tolist()}")
print(f"{(alone != together).sum(1).tolist()} of 6 tokens differ")
assert step.shape[1] == 2
assert (alone != together).any(1).all() and torch.equal(alone, without)
PYTHON
