#!/usr/bin/env bash
# Nemotron-H of transformers up to 5.14 lets later tokens change earlier outputs, once a text has several chunks.
#
# Versions: transformers 5.14.1, torch 2.13.0 (CPU), Python 3.11.
# Behaviour: the torch code that runs without CUDA kernels hands the states of chunks on by a sum over the wrong axis,
#   so beyond `chunk_size` tokens (128 by default, 4 here) the outputs are not those of the recurrence: another last
#   token changes the logits of tokens before it, and the logits of a text's beginning depend on whether the text goes
#   on. No warning. Zamba2 has the same line. transformers 5.15 and later have the sum right.
# Seen: another last token changes 11 of the 15 tokens before it, by up to 0.18; the logits of the first 8 tokens alone
#   and of the same tokens in the text of 16 differ by 0.95, where the largest logit is 5.1. Within the first chunk
#   nothing differs.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0
"$work/env/bin/pip" install --quiet transformers==5.14.1
"$work/env/bin/python" -W ignore - <<'PYTHON'
import torch
from transformers import NemotronHConfig, NemotronHForCausalLM

torch.manual_seed(0)
size = dict(vocab_size=50, hidden_size=16, num_attention_heads=2, num_key_value_heads=2, head_dim=8)
experts = dict(n_routed_experts=4, num_experts_per_tok=2, intermediate_size=16)
mamba = dict(mamba_num_heads=8, mamba_head_dim=4, n_groups=2, ssm_state_size=4, chunk_size=4)
model = NemotronHForCausalLM(NemotronHConfig(**size, **experts, **mamba, layers_block_type=["mamba"])).eval()
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(20)
    model.model.layers[0].mixer.A_log.fill_(-2.0)  # states that last
    model.model.layers[0].mixer.dt_bias.fill_(0.0)
text = torch.arange(1, 17).unsqueeze(0)
other = text.clone()
other[0, -1] = 40


def logits(ids):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


whole = logits(text)
changed = (logits(other) - whole)[:, :-1].abs().amax((0, 2))
beginning = (logits(text[:, :8]) - whole[:, :8]).abs().max()
print(f"another last token changes {int((changed > 1e-3).sum())} of 15 tokens before it, by up to {changed.max():.2g}")
print(f"the first 8 tokens alone: {beginning:.2g}, the largest logit {whole.abs().max():.2g}")
assert changed.max() > 0.02 * whole.abs().max() and beginning > 0.1 * whole.abs().max()
assert (logits(other[:, :4]) - whole[:, :4]).abs().max() < 1e-4  # within one chunk nothing is wrong
PYTHON
