"""Explain a tiny model of some of transformers' families, and save the results to a file.

Run as a program, ``python -m tests.native.explain_transformers FILE``, it does so as if the packages of kernels were
not installed.
"""

import sys
from typing import Any

if __name__ == "__main__":
    modules: dict[str, Any] = dict.fromkeys(("mamba_ssm", "causal_conv1d", "fla"))
    sys.modules.update(modules)  # importing one of these now fails

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from captum_ssm import ImplicitAttentionAttribution, reference_kernels
from tests.families import FAMILIES, VOCABULARY

NAMES = ["mamba", "falcon_mamba", "jamba", "mamba2", "bamba", "falcon_h1", "zamba2", "qwen3_next", "lfm2"]
"""Families whose layers look for kernels: those of mamba_ssm, of flash-linear-attention, of causal_conv1d alone."""


def explained(name: str, reference: bool) -> tuple[Tensor, Tensor]:
    """Return the scores of a model's tokens and its logits, with ``reference`` on transformers' own code in torch."""
    ids = torch.randint(1, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))
    model: nn.Module = FAMILIES[name].build()
    context: AbstractContextManager[None] = reference_kernels(model) if reference else nullcontext()
    with context:
        return ImplicitAttentionAttribution(model).attribute(ids, 5), model(ids, use_cache=False).logits.detach()


if __name__ == "__main__":
    torch.save({name: explained(name, reference=False) for name in NAMES}, sys.argv[1])
