#!/usr/bin/env bash
# quantus's Completeness says False of exact attributions of a linear model.
#
# Versions: captum 0.9.0, quantus 0.6.0, torch 2.13.0 (CPU), Python 3.11.
# Behaviour: the metric compares the sum of the scores with the difference of the model's outputs by `==`, without a
#   tolerance. Rounding decides: weight x input, which is the exact attribution of a linear model to 0, is hardly ever
#   complete in float32.
# Seen: complete: 0 of 20, where the sums are off by 5e-08 of the largest difference.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0
"$work/env/bin/pip" install --quiet captum==0.9.0 quantus==0.6.0
"$work/env/bin/python" -W ignore - <<'PYTHON'
import numpy as np
import quantus
import torch

torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 3)).eval()
x = np.random.default_rng(0).normal(size=(20, 1, 8, 8)).astype(np.float32)
scores = x * model[1].weight[0].detach().numpy().reshape(1, 1, 8, 8)
metric = quantus.Completeness(abs=False, normalise=False, disable_warnings=True, display_progressbar=False)
answers = metric(model=model, x_batch=x, y_batch=np.zeros(20, dtype=int), a_batch=scores, device="cpu")
with torch.no_grad():
    differences = (model(torch.from_numpy(x)) - model(torch.zeros(1, 1, 8, 8)))[:, 0].numpy()
missing = np.abs(scores.sum((1, 2, 3)) - differences).max() / np.abs(differences).max()
print(f"complete: {sum(map(bool, answers))} of 20, the sums are off by {missing:.0e} of the largest difference")
assert missing < 1e-5 and sum(map(bool, answers)) < 10
PYTHON
