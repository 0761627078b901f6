"""What an explanation of a fine-tuned or quantised model costs, against the plain model of the same size.

    .venv-deployed/bin/python -m benchmarks.deployed            about two minutes on one core, after make test-deployed
    .venv-deployed/bin/python -m benchmarks.deployed --quick    smaller sizes, for a look

Only ratios are meant to be quoted: the same explanation of both models is timed in turn in the same process. The
matrices of a model whose inputs are quantised too are an approximation, which its tolerance asks for.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from statistics import median
from typing import Any

import bitsandbytes as bnb
import peft
import torch
import torchao.quantization as ao
import transformers as hf
from torch import Tensor, nn

import captum_ssm as cs
from benchmarks.speed.timing import seconds

METHODS: dict[str, Callable[[nn.Module, Tensor], Any]] = {
    "relevance, a reference": lambda m, ids: cs.ImplicitAttentionRelevance(m).attribute(ids, 5, baselines=2),
    "relevance, frozen gates": lambda m, ids: cs.ImplicitAttentionRelevance(m).attribute(ids, 5),
    "attribution, signed": lambda m, ids: signed(m).attribute(ids, 5),
    "rollout": lambda m, ids: cs.ImplicitAttentionRollout(m, tolerance=0.1).attribute(ids),
}


def signed(model: nn.Module) -> cs.ImplicitAttentionAttribution:
    """Return the signed attribution, with the tolerance that 8-bit inputs need."""
    return cs.ImplicitAttentionAttribution(model, rectify=None, tolerance=0.1)


def lora(model: Any) -> nn.Module:
    """Return the model with adapters of rank 8 that are not zero."""
    config = peft.LoraConfig(r=8, target_modules=["in_proj", "x_proj"], init_lora_weights=False)
    tuned: Any = peft.get_peft_model(model, config).eval()
    return tuned.base_model.model


def bitsandbytes_8bit(model: Any) -> nn.Module:
    """Return the model with LLM.int8 projections."""
    for block in model.backbone.layers:
        for name in ("in_proj", "x_proj", "out_proj"):
            part: Any = getattr(block.mixer, name)
            new = bnb.nn.Linear8bitLt(part.in_features, part.out_features, False, has_fp16_weights=False)
            new.weight = bnb.nn.Int8Params(part.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
            setattr(block.mixer, name, new.to("cpu").eval())
    return model


def torchao_int8(model: Any) -> nn.Module:
    """Return the model with int8 weights."""
    names = ("in_proj", "x_proj", "out_proj")
    ao.quantize_(model, ao.Int8WeightOnlyConfig(), filter_fn=lambda _, name: name.endswith(names))
    return model


STATES: dict[str, Callable[[Any], nn.Module]] = {
    "LoRA, rank 8": lora,
    "bitsandbytes 8-bit": bitsandbytes_8bit,
    "torchao int8 weights": torchao_int8,
}


def ratio(state: nn.Module, plain: nn.Module, method: Callable[[nn.Module, Tensor], Any], L: int, runs: int) -> str:
    """Return the median of the times of one explanation of L tokens, relative to those of the plain model."""
    ids = torch.randint(3, 100, (1, L))
    for model in (state, plain):
        method(model, ids)
    pairs = [(seconds(lambda: method(state, ids)), seconds(lambda: method(plain, ids))) for _ in range(runs)]
    return f"{median(own / of_plain for own, of_plain in pairs):.2f}"


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller sizes")
    options = parser.parse_args()
    width, runs = (64, 3) if options.quick else (256, 9)
    torch.set_num_threads(1)
    torch.manual_seed(0)
    hf.logging.set_verbosity_error()  # that kernels are not installed
    plain: Any = hf.MambaForCausalLM(hf.MambaConfig(hidden_size=width, num_hidden_layers=4, vocab_size=100)).eval()
    plain.requires_grad_(False)
    print(f"Mamba, 4 layers of {width}; time relative to the plain model, at 128 / 20 tokens")
    for name, state in STATES.items():
        model = state(copy.deepcopy(plain))
        for label, method in METHODS.items():
            print(f"{name:<22} {label:<24} {' / '.join(ratio(model, plain, method, L, runs) for L in (128, 20))}")


if __name__ == "__main__":
    main()
