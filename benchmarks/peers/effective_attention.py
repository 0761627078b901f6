"""TransformerLens: the effective attention of a recurrence, from the activations of a ``TransformerBridge``."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformer_lens.model_bridge import TransformerBridge
from transformer_lens.model_bridge.generalized_components import SSM2MixerBridge, SSMMixerBridge

from benchmarks.methods import NotApplicableError, Question
from benchmarks.peers.peer import Explained
from benchmarks.peers.words import tokenizer
from captum_ssm import LayerImplicitAttention
from captum_ssm.layers.mixers import find_mixers


def effective_attention(question: Question) -> Explained:
    """Return how the last token attends in the last recurrent layer, the mean of ``|A|`` over channels.

    The library has no sum over layers. What its matrices are off is measured against those of this package, each of
    which is checked by its layer's own output: of the recurrence alone, with the step sizes in it where the library
    can put them in.

    Raises:
        NotApplicableError: If the inputs are images.
    """
    if question.images:
        raise NotApplicableError("TransformerLens takes language models.")
    bridge = bridged(question.model)
    with torch.no_grad():
        _, cache = bridge.run_with_cache(question.inputs, use_cache=False)
        found = by_layer(cache.compute_ssm_effective_attention())
        scaled = found
        if loops(bridge):
            scaled = by_layer(cache.compute_ssm_effective_attention(include_dt_scaling=True))
    last = found[max(found)]
    return Explained(last[:, :, -1].abs().mean(1), layer=off(question, scaled))


def bridged(model: Any) -> Any:
    """Return a bridge to a copy of a model, with all that the library asks for.

    These are the class of the model in its configuration, as a saved one has it; a tokenizer that can be loaded from
    where it says; and, for Mamba and Mamba-2, the library's own loop in place of the model's code, which calls no
    submodule at which the library could read the parts of the recurrence.
    """
    model = copy.deepcopy(model)
    model.config.architectures = [type(model).__name__]
    words = tokenizer(model, unknown=1, end=2)
    bridge: Any = TransformerBridge.boot_transformers(model.config.model_type, hf_model=model, tokenizer=words)
    for mixer in loops(bridge):
        mixer.eager_scan = True
    return bridge


def loops(bridge: Any) -> list[Any]:
    """Return the layers of Mamba and Mamba-2, for which the library has a loop of its own."""
    kinds = SSMMixerBridge, SSM2MixerBridge
    return [part for part in bridge.modules() if isinstance(part, kinds) and hasattr(part.original_component, "A_log")]


def by_layer(found: Any) -> dict[int, Tensor]:
    """Return the matrices (B, D, L, L) by the number of the block; the library stacks them if all blocks have one."""
    return dict(found.items() if isinstance(found, Mapping) else enumerate(found))


def off(question: Question, found: Mapping[int, Tensor]) -> float:
    """Return the largest relative difference of the matrices of a layer to those that give the recurrence's output."""
    errors = []
    for block, matrices in found.items():
        layer = next(name for name in find_mixers(question.model) if f"layers.{block}." in name)
        exact = LayerImplicitAttention(question.model, layer, attention="scan").attribute(question.inputs, fusion=None)
        theirs = matrices.repeat_interleave(exact.shape[1] // matrices.shape[1], dim=1)
        errors.append(float((theirs - exact).abs().max() / exact.abs().max()))
    return max(errors)
