#!/usr/bin/env bash
# inseq does not load a decoder whose configuration names no `bos_token_id`.
#
# Versions: transformers 5.23.0, inseq 0.7.1, torch 2.13.0 (CPU), Python 3.11.
# Behaviour: transformers writes with such a model, as the id is optional. `load_model` turns the id into a token
#   without looking, and fails by a TypeError that names neither the id nor a remedy.
# Seen: transformers writes 2 tokens; inseq: TypeError: 'NoneType' object is not iterable.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0
"$work/env/bin/pip" install --quiet transformers==5.23.0 inseq==0.7.1
"$work/env/bin/python" -W ignore - <<'PYTHON'
import inseq
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

words = ["<unk>", "<eos>", "a", "good", "film", "bad"]
splitter = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
splitter.pre_tokenizer = pre_tokenizers.Whitespace()
tokenizer = PreTrainedTokenizerFast(tokenizer_object=splitter, unk_token="<unk>", eos_token="<eos>", pad_token="<eos>")
torch.manual_seed(0)
size = dict(vocab_size=len(words), n_embd=8, n_layer=1, n_head=2, n_positions=16)
model = GPT2LMHeadModel(GPT2Config(**size, bos_token_id=None, eos_token_id=1)).eval()
ids = tokenizer("a good", return_tensors="pt")
print(f"transformers writes {model.generate(**ids, min_new_tokens=2, max_new_tokens=2).shape[1] - 2} tokens")
try:
    inseq.load_model(model, "saliency", tokenizer=tokenizer)
except TypeError as error:
    print(f"inseq: TypeError: {error}")
    assert "NoneType" in str(error)
else:
    raise AssertionError("it loads now")
PYTHON
