"""Run a model and take the explained output, as a Captum user would write it by hand.

A language model is called without a cache, its logits are taken from its output and read at the last real token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from captum_ssm.errors import InvalidInputError, ModelStateError, is_own
from captum_ssm.layers.call import signature
from captum_ssm.layers.release import name_release
from captum_ssm.network.hosts import called, takes_features
from captum_ssm.network.interface import (
    input_embeddings,
    is_language_model,
    is_mamba_ssm_model,
    keeps_logits,
    models_inside,
)
from captum_ssm.network.reference_kernels import remedy_for
from captum_ssm.network.threads import hook


def run_model(forward_func: Callable[..., Any], inputs: Tensor, *args: Any, all_logits: bool = False) -> Tensor:
    """Run the model and return the output that a target selects from.

    Args:
        forward_func: A model of transformers or mamba_ssm, or any callable that Captum accepts.
        inputs: Token ids (B, L) or embeddings (B, L, E).
        args: The additional forward arguments. For a transformers model: the attention mask (B, L), if any.
        all_logits: Let a language model compute the logits of all tokens, because the inside of the run is read.

    Returns:
        For a language model the logits (B, V) at the last real token of each sequence, or (B, classes) of a
        classifier. For any other callable its output.

    Raises:
        InvalidInputError: If the mask does not fit the inputs, leaves a sequence empty, or the model takes none; or if
            a module that only holds a language model cannot be called with tokens.
        ModelStateError: If a kernel cannot take the model's tensors.
        RuntimeError: From the model itself.
        ValueError: From the model itself.
    """
    try:
        return _run_model(forward_func, inputs, *args, all_logits=all_logits)
    except (RuntimeError, ValueError) as error:
        remedy = remedy_for(error)
        if remedy is None:
            name_release(error)
            raise
        raise ModelStateError(f"A kernel cannot run this model here ({error}). {remedy}") from error
    except Exception as error:
        name_release(error)
        raise


def _run_model(forward_func: Callable[..., Any], inputs: Tensor, *args: Any, all_logits: bool) -> Tensor:
    if is_mamba_ssm_model(forward_func):
        _refuse_arguments(forward_func, args)
    forward_func = called(forward_func)
    if not is_language_model(forward_func):
        with _token_ids(forward_func, inputs) as ids:
            return _call(forward_func, ids, args)
    if len(args) > 1:
        raise InvalidInputError(
            f"A transformers model takes one additional forward argument, its attention mask, but got {len(args)}. "
            "For more, wrap it: ImplicitAttentionAttribution(lambda ids, *args: ..., model=model)."
        )
    mask = checked_mask(inputs, args[0]) if args and args[0] is not None else None
    after = inputs.new_zeros(len(inputs), dtype=torch.long)  # tokens of padding after the last real one, (B,)
    if mask is not None:
        after = mask.flip(1).bool().int().argmax(1)
    logits = language_logits(forward_func, inputs, mask, kept=None if all_logits else int(after.max()) + 1)
    if logits.dim() == 2:
        return logits
    examples = torch.arange(len(logits), device=logits.device)
    behind = after.to(logits.device)  # in front may be logits of virtual tokens, which a host adds
    return logits[examples, logits.shape[1] - 1 - behind]


def _call(forward_func: Callable[..., Any], inputs: Tensor, args: tuple[Any, ...]) -> Any:
    """Return the output of a callable that is no language model.

    Raises:
        InvalidInputError: If it is a module that holds a language model, and cannot be called so or returns no tensor,
            as a LightningModule may: the message names the attributes that hold one.
        AttributeError: From the callable itself, as all that follow.
        LookupError: If it takes a dictionary, for example.
        TypeError: If it takes other arguments, for example.
    """
    try:
        output = forward_func(inputs, *args)
    except (TypeError, NotImplementedError, LookupError, AttributeError) as error:
        names = [] if is_own(error) else models_inside(forward_func)
        if not names:
            raise
        cause = f"its forward fails ({type(error).__name__}: {error})"
        raise InvalidInputError(_holder(forward_func, cause, names)) from error
    names = [] if isinstance(output, Tensor) else models_inside(forward_func)
    if names:
        cause = f"its forward returns a {type(output).__name__}, no tensor"
        raise InvalidInputError(_holder(forward_func, cause, names))
    return output


def _holder(module: object, cause: str, names: list[str]) -> str:
    """Return the message that a module only holds language models, by the names of its attributes that do."""
    return (
        f"{type(module).__name__} is called with the tokens alone, and {cause}. It holds a language model, which is "
        f"explained if you pass it: {' or '.join(f'forward_func.{name}' for name in names)}. Or pass a function that "
        "returns the explained output, with model=."
    )


def language_logits(
    model: Callable[..., Any], inputs: Tensor, mask: Tensor | None = None, kept: int | None = None
) -> Tensor:
    """Run a language model without a cache and return its logits.

    Args:
        model: A model of transformers or mamba_ssm.
        inputs: Token ids (B, L) or embeddings (B, L, E).
        mask: Attention mask (B, L), 0 at padding, or None.
        kept: How many of the last tokens' logits are wanted: others are computed only by a model that computes all.
            None for all.

    Returns:
        The logits (B, L, V), or (B, kept, V), or (B, classes) of a classifier.
    """
    _refuse_other_width(model, inputs)
    if is_mamba_ssm_model(model):
        with _token_ids(model, inputs) as ids:
            return model(ids).logits
    name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
    if takes_features(model):
        return _features(model, {name: inputs, **({} if mask is None else {"attention_mask": mask})})
    options = {"logits_to_keep": kept} if kept is not None and keeps_logits(model) else {}
    output = model(**{name: inputs}, attention_mask=mask, use_cache=False, **options)
    logits: Tensor = output.logits if hasattr(output, "logits") else output[0]
    return logits


def _features(model: Callable[..., Any], features: dict[str, Tensor]) -> Tensor:
    """Return the sentence embeddings (B, E), the scores, or the hidden states (B, L, E) of a module of features."""
    output = model(features)
    names = ("sentence_embedding", "scores", "token_embeddings")
    return output[next(name for name in names if name in output)]


def _refuse_other_width(model: Callable[..., Any], inputs: Tensor) -> None:
    """Raise if the inputs are embeddings of another width than the model's.

    Raises:
        InvalidInputError: With both widths.
    """
    width = getattr(input_embeddings(model), "embedding_dim", None)
    if inputs.is_floating_point() and inputs.dim() == 3 and width not in (None, inputs.shape[-1]):
        raise InvalidInputError(
            f"The inputs are embeddings of {inputs.shape[-1]} components, but those of this model have {width}. Take "
            "them from the model: model.get_input_embeddings()(ids)."
        )


@contextmanager
def _token_ids(model: Any, inputs: Tensor) -> Iterator[Tensor]:
    """Give a model that takes nothing but token ids the inputs that the caller has.

    Yields:
        The ids to call the model with. If the inputs are embeddings, the ids have no meaning, and the model's embedding
        returns the embeddings while the context is open. For any other model, the inputs.
    """
    embedding = input_embeddings(model) if is_mamba_ssm_model(model) and inputs.is_floating_point() else None
    if embedding is None:
        yield inputs
        return
    with ExitStack() as hooks:
        hook(embedding.register_forward_hook, lambda *_: inputs, hooks)
        yield torch.zeros(inputs.shape[:2], dtype=torch.long, device=inputs.device)


def _refuse_arguments(model: Callable[..., Any], args: tuple[Any, ...]) -> None:
    """Raise if a model that takes no mask is given one.

    Raises:
        InvalidInputError: With the remedy.
    """
    if any(arg is not None for arg in args):
        raise InvalidInputError(
            f"{type(model).__name__} takes no attention mask, nor any other argument besides the tokens: it would read "
            "padding as text. Explain sequences of one length together, without padding, and all others one by one."
        )


def checked_mask(inputs: Tensor, mask: Any) -> Tensor:
    """Return the attention mask of a call.

    Args:
        inputs: Token ids (B, L) or embeddings (B, L, E).
        mask: The caller's mask, which should be a tensor (B, L) that is 0 at padding.

    Raises:
        InvalidInputError: If it does not fit the inputs or leaves a sequence empty.
    """
    if not isinstance(mask, Tensor) or mask.shape != inputs.shape[:2] or mask.is_meta:
        got = f"{tuple(mask.shape)} on {mask.device}" if isinstance(mask, Tensor) else type(mask).__name__
        raise InvalidInputError(
            f"The attention mask must be a tensor of shape {tuple(inputs.shape[:2])} (batch, tokens), not {got}."
        )
    if not bool(mask.bool().any(1).all()):
        raise InvalidInputError("The attention mask leaves a sequence without any real token; drop that sequence.")
    return mask


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Let a transformers model run without a cache while the context is open, if the caller does not ask for one.

    Yields:
        None.
    """

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        names = list(signature(type(module).forward).parameters)[1 : 1 + len(args)]
        if "use_cache" in names or kwargs.get("use_cache") is not None:
            return None
        return args, {**kwargs, "use_cache": False}

    with ExitStack() as hooks:
        for module in model.modules():
            if "use_cache" in signature(type(module).forward).parameters and hasattr(module, "config"):
                hook(module.register_forward_pre_hook, enter, hooks, with_kwargs=True)
        yield
