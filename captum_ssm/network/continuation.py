"""The text that a language model writes after a prompt."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from captum_ssm.network.forward import language_logits
from captum_ssm.network.interface import is_mamba_ssm_model

_GREEDY = {"max_new_tokens", "do_sample"}
"""The options that :func:`greedy` knows."""


def continued(model: Any, prompt: Tensor, options: Mapping[str, Any], end: int | None) -> Tensor:
    """Return a prompt with what the model writes after it, by the model's own ``generate``.

    A model whose cache fails, as transformers' does in hybrids without a layer of attention, writes without one. One of
    mamba_ssm, whose ``generate`` needs a GPU, writes without a cache too, unless it gets options of its own.

    Args:
        model: A model of transformers or mamba_ssm.
        prompt: Token ids (1, L), without padding.
        options: The arguments of ``generate``; of mamba_ssm's, or ``max_new_tokens`` and ``do_sample=False``.
        end: Id of the token that ends a text of mamba_ssm's models; None if there is none.

    Returns:
        Prompt and answer (answers, L + new tokens).

    Raises:
        RuntimeError: From the model itself.
        ValueError: From the model itself, for wrong options for example.
    """
    if is_mamba_ssm_model(model):
        if set(options) <= _GREEDY and not options.get("do_sample"):
            return greedy(model, prompt, options.get("max_new_tokens", 25), end)
        return _sequences(model.generate(prompt, **options))
    options = {"attention_mask": torch.ones_like(prompt), **options}
    try:
        return _sequences(model.generate(prompt, **options))
    except (RuntimeError, ValueError):
        if "use_cache" in options:
            raise
        return _sequences(model.generate(prompt, **options, use_cache=False))


def greedy(model: Any, prompt: Tensor, count: int, end: int | None) -> Tensor:
    """Return a prompt with the most probable tokens after it, each from a run of the model over all before it.

    Args:
        model: A model of transformers or mamba_ssm.
        prompt: Token ids (1, L).
        count: The number of tokens to write.
        end: Id of the token that ends the text; None if there is none.

    Returns:
        Prompt and answer (1, L + new tokens), the token that ends the text included.
    """
    ids = prompt
    for _ in range(count):
        best = language_logits(model, ids)[:, -1].argmax(-1, keepdim=True)
        ids = torch.cat([ids, best], dim=1)
        if int(best) == end:
            break
    return ids


def _sequences(output: Any) -> Tensor:
    """Return the token ids of the output of ``generate``, which may hold scores beside them."""
    ids: Tensor = getattr(output, "sequences", output)
    return ids
