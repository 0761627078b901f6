#!/usr/bin/env bash
# A transformers Mamba that is loaded with `load_in_8bit=True` fails in its first forward pass.
#
# Versions: transformers 5.23.0, bitsandbytes 0.50.2, accelerate 1.15.0, torch 2.13.0 (CPU), Python 3.11.
# Behaviour: all linear modules but the output are replaced by 8-bit ones, `dt_proj` among them, whose weight Mamba's
#   code multiplies by itself: an int8 matrix then. Loading warns of nothing. With `llm_int8_skip_modules=['dt_proj',
#   'lm_head']` it runs.
# Seen: with `dt_proj` left out the logits have shape (1, 5, 50); as it is loaded by default: RuntimeError: expected
#   scalar type Float but found Char.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0
"$work/env/bin/pip" install --quiet transformers==5.23.0 bitsandbytes==0.50.2 accelerate==1.15.0
"$work/env/bin/python" -W ignore - "$work/saved" <<'PYTHON'
import sys

import torch
from transformers import BitsAndBytesConfig, MambaConfig, MambaForCausalLM

torch.manual_seed(0)
folder, ids = sys.argv[1], torch.arange(1, 6).unsqueeze(0)
MambaForCausalLM(MambaConfig(vocab_size=50, hidden_size=64, num_hidden_layers=2, state_size=4)).save_pretrained(folder)


def logits(skipped):
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skipped)
    model = MambaForCausalLM.from_pretrained(folder, quantization_config=config, device_map="cpu").eval()
    with torch.no_grad():
        return model(ids, use_cache=False).logits


print(f"without dt_proj: logits of shape {tuple(logits(['dt_proj', 'lm_head']).shape)}")
try:
    logits(None)
except RuntimeError as error:
    print(f"as it is loaded by default: RuntimeError: {error}")
    assert "Char" in str(error)
else:
    raise AssertionError("it runs now")
PYTHON
