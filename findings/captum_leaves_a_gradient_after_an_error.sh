#!/usr/bin/env bash
# A gradient method of Captum that fails leaves its input changed: it requires a gradient from then on.
#
# Versions: captum 0.9.0, torch 2.13.0 (CPU), Python 3.11.
# Behaviour: Saliency and InputXGradient set `requires_grad` of the tensor that they are given and set it back when they
#   are done, but not if an error comes between, such as that of a target out of range. The next `.numpy()` of the same
#   tensor fails, and a forward pass of it keeps a graph. IntegratedGradients, which copies, leaves it alone.
# Seen: requires_grad after success False, False, False; after an error True, True, False.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0
"$work/env/bin/pip" install --quiet captum==0.9.0
"$work/env/bin/python" -W ignore - <<'PYTHON'
import torch
from captum.attr import InputXGradient, IntegratedGradients, Saliency

model = torch.nn.Linear(4, 3)


def requires_grad_after(method, target):
    inputs = torch.rand(2, 4)
    try:
        method(model).attribute(inputs, target=target)
    except IndexError:
        pass
    return inputs.requires_grad


methods = (Saliency, InputXGradient, IntegratedGradients)
success, failure = ([requires_grad_after(method, target) for method in methods] for target in (1, 7))
print(f"requires_grad after success {success}, after an error {failure}")
assert not any(success) and failure == [True, True, False]
PYTHON
