#!/usr/bin/env bash
# PEFT puts an adapter on `dt_proj` of a transformers Mamba, which never applies it, until it is merged.
#
# Versions: transformers 5.23.0, peft 0.21.2, torch 2.13.0 (CPU), Python 3.11.
# Behaviour: Mamba's code multiplies by `dt_proj.weight` and does not call the module, so an adapter there, which
#   `get_peft_model` accepts without a warning, changes no output and gets no gradient. `merge_and_unload` adds it to
#   the weight that the code reads, so the merged model is another one than the adapted one.
# Seen: of 4 random matrices none has a gradient, and they change the logits by 0; merging changes the logits by 4.8,
#   where the largest is 3.6.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0
"$work/env/bin/pip" install --quiet transformers==5.23.0 peft==0.21.2
"$work/env/bin/python" -W ignore - <<'PYTHON'
import torch
from peft import LoraConfig, get_peft_model
from transformers import MambaConfig, MambaForCausalLM

torch.manual_seed(0)
model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4)).eval()
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(3)
ids = torch.arange(1, 9).unsqueeze(0)


def logits(model):
    with torch.no_grad():
        return model(ids, use_cache=False).logits


plain = logits(model)
config = LoraConfig(r=2, target_modules=["in_proj", "dt_proj"], task_type="CAUSAL_LM")
adapted = get_peft_model(model, config).eval()
matrices = {name: matrix for name, matrix in adapted.named_parameters() if "dt_proj.lora" in name}
with torch.no_grad():
    for matrix in matrices.values():
        matrix.normal_()
before = logits(adapted)
adapted(ids, labels=ids, use_cache=False).loss.backward()
with_gradient = sum(matrix.grad is not None for matrix in matrices.values())
merged = logits(adapted.merge_and_unload())
print(f"random adapter matrices on dt_proj: {len(matrices)}, with a gradient: {with_gradient}")
print(f"they change the logits by {(before - plain).abs().max():.2g}")
print(f"merging changes the logits by {(merged - before).abs().max():.2g}, the largest logit {plain.abs().max():.2g}")
assert len(matrices) == 4 and with_gradient == 0 and torch.equal(before, plain)
assert (merged - before).abs().max() > 0.1 * plain.abs().max()
PYTHON
