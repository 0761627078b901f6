#!/usr/bin/env bash
# inseq's gradient methods fail on RWKV, by an error about a tensor deep inside.
#
# Versions: inseq 0.7.1, transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11.
# Behaviour: inseq calls the model without `use_cache=False`, so the model also makes the state from which it would write
#   on; RWKV writes its own in place, within the graph. One gradient needs no state: the same model runs
#   backwards when it is called with `use_cache=False`, and in inseq when its configuration says so.
# Seen: RWKV in inseq: "one of the variables needed for gradient computation has been modified by an inplace operation";
#   with config.use_cache = False it is attributed.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0
"$work/env/bin/pip" install --quiet transformers==5.23.0 inseq==0.7.1
"$work/env/bin/python" -W ignore - <<'PYTHON'
import inseq
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, RwkvConfig, RwkvForCausalLM

words = ["<unk>", "<eos>", "a", "good", "film"]
splitter = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
splitter.pre_tokenizer = pre_tokenizers.Whitespace()
names = dict(unk_token="<unk>", bos_token="<eos>", eos_token="<eos>", pad_token="<eos>")
tokenizer = PreTrainedTokenizerFast(tokenizer_object=splitter, **names)
size = dict(vocab_size=len(words), hidden_size=8, num_hidden_layers=2, context_length=16)
model = RwkvForCausalLM(RwkvConfig(**size, bos_token_id=1, eos_token_id=1, pad_token_id=1)).eval()


def attributed():
    explainer = inseq.load_model(model, "saliency", tokenizer=tokenizer)
    return explainer.attribute("a good", "a good film", show_progress=False).sequence_attributions[0]


embeddings = model.get_input_embeddings()(tokenizer("a good", return_tensors="pt").input_ids).detach().requires_grad_()
model(inputs_embeds=embeddings, use_cache=False).logits[0, -1, 4].backward()
print(f"transformers: a gradient of shape {tuple(embeddings.grad.shape)}")
try:
    attributed()
except RuntimeError as error:
    print(f"inseq: {str(error)[:95]}")
    assert "inplace operation" in str(error)
else:
    raise AssertionError("it attributes now")
model.config.use_cache = False
print(f"inseq with config.use_cache = False: scores of shape {tuple(attributed().target_attributions.shape)}")
PYTHON
