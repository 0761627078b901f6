#!/usr/bin/env bash
# Beam search with MiniMax continues each beam from the states of other beams.
#
# Versions: transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11.
# Behaviour: beam search reorders the cache when beams change places. The keys and values of attention layers move; the
#   states of the lightning layers, which the cache keeps in a list of their own, stay. The texts that come out have a
#   lower probability than those of the same search without a cache. No warning. Greedy search is right.
# Seen: log-probability of 6 written tokens under the model, 5 random models and 2 texts: the mean is -14.2 with the cache
#   and -12.9 without; greedy search writes the same tokens with and without.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$work/env/bin/python" -W ignore - <<'PYTHON'
import torch
from transformers import MiniMaxConfig, MiniMaxForCausalLM

SIZES = dict(
    vocab_size=97, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64, head_dim=8,
    num_hidden_layers=4, block_size=4, num_local_experts=4, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
torch.manual_seed(0)
ids = torch.randint(3, 97, (2, 13))


def log_probability(model, text):
    with torch.no_grad():
        logits = model(text, use_cache=False).logits[:, 12:-1].log_softmax(-1)
    return logits.gather(-1, text[:, 13:, None]).sum((1, 2))


with_cache, without = [], []
for seed in range(5):
    torch.manual_seed(seed)
    model = MiniMaxForCausalLM(MiniMaxConfig(**SIZES)).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    options = dict(max_new_tokens=6, min_new_tokens=6, do_sample=False)
    greedy = [model.generate(ids, **options, use_cache=use) for use in (True, False)]
    assert torch.equal(*greedy)
    with_cache.append(log_probability(model, model.generate(ids, **options, num_beams=3)))
    without.append(log_probability(model, model.generate(ids, **options, num_beams=3, use_cache=False)))
mean, right = torch.cat(with_cache).mean().item(), torch.cat(without).mean().item()
print(f"mean log-probability of what beam search writes: {mean:.1f} with the cache, {right:.1f} without")
assert mean < right - 0.5
PYTHON
