#!/usr/bin/env bash
# A transformers Falcon-H1 gives other logits for the embeddings of its tokens than for the tokens.
#
# Versions: transformers 5.23.0, torch 2.13.0 (CPU), Python 3.11.
# Behaviour: the configuration has an `embedding_multiplier`. The model multiplies the embeddings that it looks up, and not
#   those that it is given as inputs_embeds, which other models with such a factor do (Granite 4). No warning. Methods that
#   move the embeddings, such as integrated gradients, explain another model than that of the ids.
# Seen: embeddings of the tokens against the tokens: logits differ by 2 where the largest is 3.3; multiplied by hand by 0;
#   Granite 4 by 0.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/env"
"$work/env/bin/pip" install --quiet torch==2.13.0 transformers==5.23.0
"$work/env/bin/python" -W ignore - <<'PYTHON'
import torch
from transformers import FalconH1Config, FalconH1ForCausalLM, GraniteMoeHybridConfig, GraniteMoeHybridForCausalLM

SIZES = dict(
    vocab_size=97, hidden_size=32, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
    num_hidden_layers=2, mamba_n_heads=8, mamba_d_head=8, mamba_n_groups=2, mamba_d_state=8, mamba_chunk_size=4,
    embedding_multiplier=2.0, pad_token_id=0,
)  # fmt: skip
EXPERTS = dict(num_local_experts=4, num_experts_per_tok=2, shared_intermediate_size=32, layer_types=["mamba", "attention"])
ids = torch.tensor([[23, 5, 71, 40, 8, 66, 12]])


def differences(model_class, config):
    """Return how far the logits of embeddings are from those of ids, as they are and multiplied by hand."""
    torch.manual_seed(0)
    model = model_class(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.15 * torch.randn(parameter.shape))
        embeddings = model.get_input_embeddings()(ids)
        of_ids = model(ids, use_cache=False).logits
        for factor in (1, 2):
            yield (model(inputs_embeds=factor * embeddings, use_cache=False).logits - of_ids).abs().max().item()
        yield of_ids.abs().max().item()


plain, multiplied, size = differences(FalconH1ForCausalLM, FalconH1Config(**SIZES, mamba_d_ssm=64))
granite, _, _ = differences(GraniteMoeHybridForCausalLM, GraniteMoeHybridConfig(**SIZES, **EXPERTS))
print(f"Falcon-H1 {plain:.1g} of {size:.2g}, multiplied by hand {multiplied:.1g}; Granite 4 {granite:.1g}")
assert plain > 0.01 * size and multiplied < 1e-5 and granite < 1e-5
PYTHON
