#!/usr/bin/env bash
# Captum's DeepLift runs on a transformers Mamba without an error, and returns gradient x input.
#
# Versions: captum 0.9.0, transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11.
# Behaviour: DeepLift changes the gradients of the modules of activations that it knows. A Mamba multiplies its gates, and
#   calls its recurrence and most activations as functions, so no rule applies where the model is nonlinear. The scores are
#   those of InputXGradient to rounding; only the convergence delta, if it is asked for, tells that they do not sum.
# Seen: the largest difference to InputXGradient is 2e-6 of the largest score; the scores sum to 0.08, the difference of the
#   outputs is 0.88.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 captum==0.9.0 transformers==5.23.0
"$work/env/bin/python" -W ignore - <<'PYTHON'
import torch
from captum.attr import DeepLift, InputXGradient
from torch import nn
from transformers import MambaConfig, MambaForCausalLM

torch.manual_seed(0)
model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=16, num_hidden_layers=2, state_size=4)).eval()
with torch.no_grad():
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.mul_(3)


class Logits(nn.Module):
    def __init__(self):
        super().__init__()
        self.model = model

    def forward(self, embeddings):
        return self.model(inputs_embeds=embeddings, use_cache=False).logits[:, -1]


run, x = Logits(), model.get_input_embeddings()(torch.randint(0, 50, (1, 8))).detach()
baseline = torch.zeros_like(x)
lifted = DeepLift(run).attribute(x, baseline, target=3).detach()
gradient = InputXGradient(run).attribute(x, target=3).detach()
difference = float((run(x) - run(baseline))[0, 3])
apart = float((lifted - gradient).abs().max() / gradient.abs().max())
print(f"DeepLift and InputXGradient differ by {apart:.0e} of the largest score")
print(f"the scores sum to {float(lifted.sum()):.2f}, the outputs differ by {difference:.2f}")
assert apart < 1e-4 and abs(float(lifted.sum()) - difference) > 0.5 * abs(difference)
PYTHON
