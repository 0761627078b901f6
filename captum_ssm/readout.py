"""Run a model and read the explained score off its output, as a Captum user would write it by hand.

A model is recognised by its interface, not imported. One of transformers has ``get_input_embeddings`` and its
``forward`` takes ``inputs_embeds``; one of mamba_ssm takes ``inference_params`` with its ``input_ids``, and keeps its
embeddings in ``embedding``. A language model is called without a cache, its logits are taken from its output and read
at the last real token.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from captum_ssm.capture import signature
from captum_ssm.errors import InvalidInputError, ModelStateError
from captum_ssm.kernels import is_kernel_failure


def is_language_model(forward_func: object) -> bool:
    """Whether this is a model with transformers' or mamba_ssm's interface rather than a plain Captum callable."""
    if is_native(forward_func):
        return hasattr(forward_func, "lm_head")
    return hasattr(forward_func, "get_input_embeddings") and _takes(forward_func, "inputs_embeds")


def is_native(model: object) -> bool:
    """Whether this is a model with mamba_ssm's interface: token ids alone go in, no embeddings and no mask."""
    return _takes(model, "input_ids", "inference_params") and hasattr(getattr(model, "backbone", model), "embedding")


def _takes(model: object, *names: str) -> bool:
    if not isinstance(model, nn.Module):
        return False
    own = "forward" in vars(model)  # of the object, not of its class: nothing is to outlive the object
    found = inspect.signature(model.forward) if own else signature(type(model).forward)
    return {*names} <= found.parameters.keys()


def input_embeddings(model: Any) -> nn.Module | None:
    """Return the module that turns token ids into vectors; None if the model's interface does not say which it is."""
    if is_native(model):
        return getattr(model, "backbone", model).embedding
    return model.get_input_embeddings() if callable(getattr(model, "get_input_embeddings", None)) else None


def scores(forward_func: Callable[..., Any], inputs: Tensor, *args: Any) -> Tensor:
    """Run the model and return what a target selects from.

    Args:
        forward_func: A model of transformers or mamba_ssm, or any callable that Captum accepts.
        inputs: Token ids (B, L) or embeddings (B, L, E).
        args: The additional forward arguments. For a transformers model: the attention mask (B, L), if any.

    Returns:
        For a language model the logits (B, V) at the last real token of each sequence, or (B, classes)
        of a classifier. For any other callable what it returns.

    Raises:
        InvalidInputError: If the mask does not fit the inputs, leaves a sequence empty, or the model takes none.
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
    if is_native(forward_func):
        _refuse_arguments(forward_func, args)
    if not is_language_model(forward_func):
        with _as_ids(forward_func, inputs) as ids:
            return forward_func(ids, *args)
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
    """Run a language model without a cache and return its logits, (B, L, V) or (B, classes)."""
    if is_native(model):
        with _as_ids(model, inputs) as ids:
            return model(ids).logits
    name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
    output = model(**{name: inputs}, attention_mask=mask, use_cache=False)
    logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return logits


@contextmanager
def _as_ids(model: Any, inputs: Tensor) -> Iterator[Tensor]:
    """Return what to call a model with that takes nothing but token ids.

    For embeddings these are ids of no meaning, and the model's embedding hands out the embeddings while the context is
    open. Any other input is itself, as is that of any other model.
    """
    embedding = input_embeddings(model) if is_native(model) and inputs.is_floating_point() else None
    if embedding is None:
        yield inputs
        return
    hook = embedding.register_forward_hook(lambda *_: inputs)
    try:
        yield torch.zeros(inputs.shape[:2], dtype=torch.long, device=inputs.device)
    finally:
        hook.remove()


def _refuse_arguments(model: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Raise if a model that takes no mask is given one.

    Raises:
        InvalidInputError: With what to do instead.
    """
    if any(arg is not None for arg in args):
        raise InvalidInputError(
            f"{type(model).__name__} takes no attention mask, nor any other argument besides the tokens: it would read "
            "padding as text. Explain sequences of one length together, without padding, and all others one by one."
        )


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
