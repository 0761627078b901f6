#!/usr/bin/env bash
# A transformers xLSTM whose keys or values have no multiple of 64 channels cannot run with a cache, nor `generate`.
#
# Versions: transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11.
# Behaviour: the configuration rounds the channels of keys and values up to multiples of 64, and the empty cache, which is
#   made before the first token in evaluation mode, has states of these sizes. The layers have the sizes as they are given.
#   Training, and use_cache=False, run; generation fails in the first step.
# Seen: hidden_size 64 with the default qk_dim_factor 0.5: layers with 32 channels of keys, a configuration that says 64;
#   6 tokens give logits with use_cache=False, else ValueError: matC_old has wrong shape; with hidden_size 128 it writes 3
#   tokens.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$work/env/bin/python" -W ignore - <<'PYTHON'
import torch
from transformers import xLSTMConfig, xLSTMForCausalLM

ids = torch.arange(1, 7).unsqueeze(0)


def model(hidden_size):
    torch.manual_seed(0)
    config = xLSTMConfig(vocab_size=50, hidden_size=hidden_size, num_hidden_layers=2, num_heads=2)
    return xLSTMForCausalLM(config).eval()


small, large = model(64), model(128)
print("channels of keys:", small.backbone.blocks[0].mlstm_layer.qk_dim, "in the layers,", small.config.qk_dim, "in the configuration")
print("without a cache:", tuple(small(ids, use_cache=False).logits.shape))
for call in (small, lambda ids: small.generate(ids, max_new_tokens=3)):
    try:
        call(ids)
    except ValueError as error:
        print("ValueError:", error)
        assert "matC_old has wrong shape" in str(error)
    else:
        raise SystemExit("it runs")
written = large.generate(ids, max_new_tokens=3, min_new_tokens=3, do_sample=False)[:, 6:]
print("hidden_size 128 writes", written.shape[1], "tokens")
assert small.config.qk_dim == 64 and written.shape[1] == 3
PYTHON
