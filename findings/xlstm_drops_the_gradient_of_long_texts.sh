#!/usr/bin/env bash
# A transformers xLSTM in evaluation mode has no gradient at its inputs for texts longer than `max_inference_chunksize`.
#
# Versions: transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11.
# Behaviour: such a text is read in parts, all layers under torch.no_grad(), also where a gradient is asked for. The logits
#   still require a gradient, that of the output layer, so `backward` passes in silence and the embeddings get none. With
#   output_hidden_states=True, or with use_cache=False in training mode, the layers are differentiated.
# Seen: max_inference_chunksize 8 (16384 by default): 8 tokens: largest gradient 0.89; 9 tokens: none, though the logits
#   require one; 9 tokens with output_hidden_states=True: 0.95.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$work/env/bin/python" -W ignore - <<'PYTHON'
import torch
from transformers import xLSTMConfig, xLSTMForCausalLM

torch.manual_seed(0)
size = dict(vocab_size=50, hidden_size=64, num_hidden_layers=2, num_heads=2, chunk_size=4, max_inference_chunksize=8, qk_dim_factor=1.0)
model = xLSTMForCausalLM(xLSTMConfig(**size)).eval()


def gradient(length, **options):
    """Return whether the logits require a gradient, and the largest one at the embeddings; None if there is none."""
    embeddings = model.get_input_embeddings()(torch.arange(1, 1 + length).unsqueeze(0)).detach().requires_grad_()
    logits = model(inputs_embeds=embeddings, use_cache=False, **options).logits
    logits.logsumexp(-1).sum().backward()
    return logits.requires_grad, None if embeddings.grad is None else embeddings.grad.abs().max().item()


short, long, shown = gradient(8), gradient(9), gradient(9, output_hidden_states=True)
print("requires a gradient, largest gradient at the embeddings:", short, long, shown)
assert short[1] > 0 and long == (True, None) and shown[1] > 0
PYTHON
