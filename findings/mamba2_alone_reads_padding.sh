#!/usr/bin/env bash
# A left-padded text has other logits alone than in a batch, with Mamba-2 of transformers up to 5.14.
#
# Versions: transformers 5.14.1, torch 2.13.0 (CPU), Python 3.11.
# Behaviour: hidden states of padding are set to 0 only if a batch has more than one example, so a batch of one reads
#   its padding tokens although its attention mask is given. The same mask and ids within a batch of two give the logits
#   of the text without padding. No warning. transformers 5.15 and later mask a batch of one too.
# Seen: the padded text beside another one: 8e-07 from the logits of the text itself; alone: 1.3, where the largest
#   logit is 3.5.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0
"$work/env/bin/pip" install --quiet transformers==5.14.1
"$work/env/bin/python" -W ignore - <<'PYTHON'
import torch
from transformers import Mamba2Config, Mamba2ForCausalLM

torch.manual_seed(0)
size = dict(vocab_size=50, hidden_size=16, num_hidden_layers=2)
model = Mamba2ForCausalLM(Mamba2Config(**size, num_heads=8, head_dim=4, n_groups=2, state_size=4, chunk_size=8)).eval()
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(3)
ids = torch.tensor([[0, 0, 0, 7, 8, 9], [1, 2, 3, 4, 5, 6]])
mask = torch.tensor([[0, 0, 0, 1, 1, 1], [1, 1, 1, 1, 1, 1]])


def logits(ids, mask=None):
    with torch.no_grad():
        return model(ids, attention_mask=mask, use_cache=False).logits[0, -1]


text = logits(ids[:1, 3:])
in_two = (logits(ids, mask) - text).abs().max()
alone = (logits(ids[:1], mask[:1]) - text).abs().max()
print(f"padded, beside another text: {in_two:.1g} from the logits of the text itself")
print(f"padded, alone: {alone:.2g}, the largest logit {text.abs().max():.2g}")
assert in_two < 1e-5 and alone > 0.1 * text.abs().max()
PYTHON
