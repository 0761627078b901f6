"""Run a model and read the explained score off its output, as a Captum user would write it by hand.

A transformers model is recognised by its interface, not imported: it has ``get_input_embeddings`` and its
``forward`` takes ``inputs_embeds``. It is called without a cache, its logits are taken from its output, and
those of a language model are read at the last real token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from captum_ssm.errors import InvalidInputError, ModelStateError
from captum_ssm.kernels import is_kernel_failure


def is_language_model(forward_func: object) -> bool:
    """Whether this is a model with transformers' interface rather than a plain Captum callable."""
    if not isinstance(forward_func, nn.Module) or not hasattr(forward_func, "get_input_embeddings"):
        return False
    return "inputs_embeds" in inspect.signature(forward_func.forward).parameters


def scores(forward_func: Callable[..., Any], inputs: Tensor, *args: Any) -> Tensor:
    """Run the model and return what a target selects from.

    Args:
        forward_func: A transformers model, or any callable that Captum accepts.
        inputs: Token ids (B, L) or embeddings (B, L, E).
        args: The additional forward arguments. For a transformers model: the attention mask (B, L), if any.

    Returns:
        For a transformers model the logits (B, V) at the last real token of each sequence, or (B, classes)
        of a classifier. For any other callable what it returns.

    Raises:
        InvalidInputError: If the mask does not fit the inputs or leaves a sequence empty.
        ModelStateError: If an installed kernel cannot take the model's tensors.
    """
    try:
        return _scores(forward_func, inputs, *args)
    except (RuntimeError, ValueError) as error:
        if not is_kernel_failure(error):
            raise
        raise ModelStateError(
            f"An installed kernel cannot run this model here ({error}). Run it on its reference implementation in "
            "torch: with captum_ssm.reference_kernels(model): ..."
        ) from error


def _scores(forward_func: Callable[..., Any], inputs: Tensor, *args: Any) -> Tensor:
    if not is_language_model(forward_func):
        return forward_func(inputs, *args)
    if len(args) > 1:
        raise InvalidInputError(
            f"A transformers model takes one additional forward argument, its attention mask, but got {len(args)}. "
            "For more, wrap it: ImplicitAttentionAttribution(lambda ids, *args: ..., model=model)."
        )
    mask = attention_mask(inputs, args[0]) if args and args[0] is not None else None
    logits = language_logits(forward_func, inputs, mask)
    if logits.dim() == 2:
        return logits
    positions = torch.arange(logits.shape[1], device=logits.device).expand(logits.shape[:2])
    last = positions[:, -1] if mask is None else (positions * mask.bool()).amax(1)
    return logits[torch.arange(len(logits), device=logits.device), last]


def language_logits(model: Callable[..., Any], inputs: Tensor, mask: Tensor | None = None) -> Tensor:
    """Run a transformers model without a cache and return its logits, (B, L, V) or (B, classes)."""
    name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
    output = model(**{name: inputs}, attention_mask=mask, use_cache=False)
    logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return logits


def attention_mask(inputs: Tensor, mask: Any) -> Tensor:
    """Return the mask of a call, checked.

    Raises:
        InvalidInputError: If it does not fit the inputs or leaves a sequence empty.
    """
    if not isinstance(mask, Tensor) or mask.shape != inputs.shape[:2]:
        got = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
        raise InvalidInputError(
            f"The attention mask must be a tensor of shape {tuple(inputs.shape[:2])} (batch, tokens), not {got}."
        )
    if not bool(mask.bool().any(1).all()):
        raise InvalidInputError("The attention mask leaves a sequence without any real token; drop that sequence.")
    return mask
