#!/usr/bin/env bash
# Without kernels, the gradient of transformers' Mamba takes time with the square of the length; the forward pass does not.
#
# Versions: transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11.
# Behaviour: the scan without mamba_ssm reads one token after the other of tensors that hold all of them. The gradient of
#   each such reading is a tensor of the size of all tokens, 0 but for one, and all of these are added up. Doubling the
#   length makes the backward pass write four times as many numbers (reading the entries of one unbind() would not).
# Seen: numbers written per token, L 64 and 256: forward 1.4e+04 and 1.4e+04, backward 2.8e+05 and 1.1e+06.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$work/env/bin/python" -W ignore - <<'PYTHON'
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import MambaConfig, MambaForCausalLM


class Written(TorchDispatchMode):
    count = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        self.count += sum(t.numel() for t in tree_leaves(result) if isinstance(t, torch.Tensor) and not t._is_view())
        return result


torch.manual_seed(0)
model = MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=32, num_hidden_layers=1, state_size=16)).eval()
per_token = []
for length in (64, 256):
    embeddings = torch.randn(1, length, 32, requires_grad=True)
    with Written() as forward:
        logit = model(inputs_embeds=embeddings, use_cache=False).logits[0, -1, 3]
    with Written() as backward:
        torch.autograd.grad(logit, embeddings)
    per_token.append((forward.count / length, backward.count / length))
    print(f"L {length}: written per token, forward {forward.count / length:.1e}, backward {backward.count / length:.1e}")
(short_forward, short_backward), (long_forward, long_backward) = per_token
assert long_forward < 1.2 * short_forward and long_backward > 3 * short_backward
PYTHON
