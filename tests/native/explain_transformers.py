"""Explain a tiny model of some of transformers' families, and save what came out: ``explain_transformers.py FILE``.

Run as a program it does so as if the packages of kernels were not installed.
"""

import sys

if __name__ == "__main__":
    sys.modules.update(dict.fromkeys(("mamba_ssm", "causal_conv1d", "fla")))  # importing one of these now fails
    sys.path.insert(0, f"{sys.path[0]}/..")

from contextlib import AbstractContextManager, nullcontext

import torch
from families import FAMILIES, VOCABULARY
from torch import Tensor, nn

from captum_ssm import ImplicitAttentionAttribution, reference_kernels

NAMES = ["mamba", "falcon_mamba", "jamba", "mamba2", "bamba", "falcon_h1", "zamba2", "qwen3_next", "lfm2"]
"""Families whose layers look for kernels: those of mamba_ssm, of flash-linear-attention, of causal_conv1d alone."""


def explained(name: str, reference: bool) -> tuple[Tensor, Tensor]:
    """Return the scores of a model's tokens and its logits, with ``reference`` on transformers' own code in torch."""
    ids = torch.randint(1, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    model: nn.Module = FAMILIES[name]()
    context: AbstractContextManager[None] = reference_kernels(model) if reference else nullcontext()
    with context:
        return ImplicitAttentionAttribution(model).attribute(ids, 5), model(ids, use_cache=False).logits.detach()


if __name__ == "__main__":
    torch.save({name: explained(name, reference=False) for name in NAMES}, sys.argv[1])
