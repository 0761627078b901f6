#!/usr/bin/env bash
# TransformerLens's effective attention of a Mamba asks for a run with cache that it has had.
#
# Versions: transformer-lens 4.3.0, transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11.
# Behaviour: transformers' Mamba no longer calls its projection of the step sizes, but multiplies by its weight, so the
#   hook on that module never fires. TransformerLens, which takes transformers >= 5.9.0, then misses its output, and
#   says to run with cache first. What helps is the mixers' `eager_scan`, a loop of its own that calls the module.
# Seen: after run_with_cache: RuntimeError: S6 reconstruction needs 'blocks.0.mixer.dt_proj.hook_out' in cache. Run
#   `run_with_cache()` on the bridge before calling this. With eager_scan: a matrix of shape (1, 16, 3, 3).
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0
"$work/env/bin/pip" install --quiet transformers==5.23.0 transformer-lens==4.3.0
WORK="$work" "$work/env/bin/python" -W ignore - <<'PYTHON'
import os
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformer_lens.model_bridge import TransformerBridge
from transformers import AutoTokenizer, MambaConfig, MambaForCausalLM, PreTrainedTokenizerFast

words = ["<unk>", "<eos>", "a", "good", "film"]
splitter = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
splitter.pre_tokenizer = pre_tokenizers.Whitespace()
names = dict(unk_token="<unk>", bos_token="<eos>", eos_token="<eos>", pad_token="<eos>")
PreTrainedTokenizerFast(tokenizer_object=splitter, **names).save_pretrained(os.environ["WORK"])
config = MambaConfig(vocab_size=len(words), hidden_size=8, num_hidden_layers=1, state_size=4)
bridge = TransformerBridge.boot_transformers(
    "mamba", hf_model=MambaForCausalLM(config).eval(), tokenizer=AutoTokenizer.from_pretrained(os.environ["WORK"])
)
ids = torch.tensor([[2, 3, 4]])
_, cache = bridge.run_with_cache(ids)
try:
    cache.compute_ssm_effective_attention(layer=0)
except RuntimeError as error:
    print(f"after run_with_cache: RuntimeError: {error}")
    assert "Run `run_with_cache()`" in str(error)
else:
    raise AssertionError("it finds what it needs now")
bridge.blocks[0].mixer.eager_scan = True
_, cache = bridge.run_with_cache(ids, use_cache=False)
print(f"with eager_scan: {tuple(cache.compute_ssm_effective_attention(layer=0).shape)}")
PYTHON
