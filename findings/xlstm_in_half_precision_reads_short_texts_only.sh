#!/usr/bin/env bash
# A transformers xLSTM in bfloat16 or float16 fails on a CPU once a text fills a chunk, and runs on shorter ones.
#
# Versions: transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11.
# Behaviour: the torch code of the recurrence multiplies keys in float32 by values in the model's type. Only whole chunks
#   of `chunk_size` tokens (64 by default) come there; the rest of a text is read token by token, which converts. So a model
#   that was tried on a short text fails on the next one. inference_state_dtype='bfloat16' does not help; float32 does.
# Seen: 63 tokens give logits in all three types; 64 tokens in float32 alone, else RuntimeError: expected m1 and m2 to have
#   the same dtype, but got: float != c10::BFloat16 (c10::Half).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$work/env/bin/python" -W ignore - <<'PYTHON'
import torch
from transformers import xLSTMConfig, xLSTMForCausalLM

torch.manual_seed(0)
size = dict(vocab_size=200, hidden_size=64, num_hidden_layers=2, num_heads=2)


def run(dtype, length, **options):
    """Return the shape of the logits, or the error."""
    model = xLSTMForCausalLM(xLSTMConfig(**size, **options)).to(dtype).eval()
    try:
        with torch.no_grad():
            return tuple(model(torch.arange(1, 1 + length).unsqueeze(0), use_cache=False).logits.shape)
    except RuntimeError as error:
        return f"RuntimeError: {error}"


for dtype in (torch.float32, torch.bfloat16, torch.float16):
    short, full = run(dtype, 63), run(dtype, 64)
    print(dtype, short, full)
    assert short == (1, 63, 200)
    assert full == (1, 64, 200) if dtype == torch.float32 else "same dtype" in full
assert "same dtype" in run(torch.bfloat16, 64, inference_state_dtype="bfloat16")
PYTHON
