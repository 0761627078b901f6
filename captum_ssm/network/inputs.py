"""Check the inputs, targets and state of a call, and bring them into one form."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_ssm.errors import InvalidInputError, ModelStateError, UnsupportedModelError
from captum_ssm.layers.call import LayerCall, at_least_float32
from captum_ssm.network.interface import input_embeddings, is_language_model

Target = int | tuple[int, ...] | Tensor | list[int] | list[tuple[int, ...]] | None


def input_tensors(inputs: Any) -> tuple[Tensor, ...]:
    """Return the tensors of ``inputs``, one or a tuple of several, detached and usable with autograd.

    Raises:
        AssertionError: If inputs is not made of tensors, as Captum's own methods raise.
        InvalidInputError: If one of them is not ordinary, see :func:`refuse_no_values`.
    """
    tensors = inputs if isinstance(inputs, tuple) else (inputs,)
    assert tensors and all(isinstance(tensor, Tensor) for tensor in tensors), (
        f"inputs must be a tensor or a tuple of tensors, not {type(inputs).__name__}."
    )
    for tensor in tensors:
        refuse_no_values(tensor, "inputs")
    return tuple(outside_inference_mode(tensor.detach()) for tensor in tensors)


def single_tensor(inputs: Any) -> Tensor:
    """Return the one tensor of ``inputs``, detached and usable with autograd.

    Raises:
        AssertionError: If inputs is not made of tensors, as Captum's own methods raise.
        InvalidInputError: If inputs is not a single tensor with values.
    """
    tensors = input_tensors(inputs) if not isinstance(inputs, tuple) or inputs else ()
    if len(tensors) != 1:
        raise InvalidInputError(
            f"inputs must be one tensor of tokens, or a tuple of one, not {len(tensors)} of them. Pass whatever else "
            "the model needs as additional_forward_args. ImplicitAttentionRelevance takes several."
        )
    return tensors[0]


def refuse_no_values(tensor: Tensor, name: str) -> None:
    """Raise if a tensor is not an ordinary one of integers or real numbers: on device meta, complex or sparse.

    Raises:
        InvalidInputError: With its type, layout and device.
    """
    if tensor.is_meta or tensor.is_complex() or tensor.layout is not torch.strided:
        raise InvalidInputError(
            f"{name} must be an ordinary tensor of integers or real numbers, with its values, not one of "
            f"{tensor.dtype} and {tensor.layout} on {tensor.device}. Pass complex numbers as torch.view_as_real."
        )


def names(value: str | Sequence[str], option: str) -> tuple[str, ...]:
    """Return an option that is a name or several as a tuple.

    Raises:
        InvalidInputError: If it is anything else.
    """
    several = (value,) if isinstance(value, str) else value
    if not isinstance(several, (tuple, list, set, frozenset)) or not all(isinstance(name, str) for name in several):
        raise InvalidInputError(f"{option} must be a name, or a sequence of names, not {value!r}.")
    return tuple(several)


def outside_inference_mode(value: Any) -> Any:
    """Return a copy of a tensor that was made in inference mode, which autograd refuses; any other value unchanged."""
    return value.clone() if isinstance(value, Tensor) and value.is_inference() else value


_INTERPRETABLE = "InterpretableEmbeddingBase"
"""Captum's stand-in for an embedding layer: a new module, in training mode, that computes nothing."""


def select_examples(value: Any, count: int, rows: slice | Tensor) -> Any:
    """Return the part of a target or argument that belongs to some of ``count`` examples, or all of a shared one.

    Of several arguments only tensors have parts, by Captum's rule.

    Args:
        value: A target or argument, or a tuple of arguments.
        count: How many examples there are.
        rows: The examples that are selected: neighbours, or their numbers, each as often as it is wanted.
    """
    if isinstance(rows, slice) and rows.start == 0 and rows.stop >= count:
        return value
    if isinstance(value, tuple) and any(isinstance(part, Tensor) for part in value):
        return tuple(select_examples(part, count, rows) if isinstance(part, Tensor) else part for part in value)
    if isinstance(value, list) and len(value) == count:
        return value[rows] if isinstance(rows, slice) else [value[row] for row in rows.tolist()]
    if isinstance(value, Tensor) and value.dim() > 0 and len(value) == count:
        return value[rows if isinstance(rows, slice) else rows.to(value.device)]
    return value


def refuse_wrong_counts(count: int, targets: tuple[Any, ...], query: Any) -> None:
    """Raise if there are several targets or explained positions, and not as many as examples.

    Raises:
        AssertionError: For targets, as Captum does.
        InvalidInputError: For positions.
    """
    for target in targets:
        several = isinstance(target, list) or (isinstance(target, Tensor) and target.numel() > 1)
        assert not several or len(target) == count, f"There are {len(target)} targets for {count} examples."
        assert not isinstance(target, Tensor) or target.dim() < 2, f"Target has shape {tuple(target.shape)}, not (B,)."
    if isinstance(query, Tensor) and query.dim() > 0 and len(query) != count:
        raise InvalidInputError(f"query has the positions of {len(query)} examples, but there are {count}.")


def refuse_bad_state(model: nn.Module) -> None:
    """Raise if a module of the model is in training mode (the root may be: a new wrapper is), or quantised by torch.

    Raises:
        ModelStateError: If dropout or a fused training kernel could be active.
        UnsupportedModelError: If torch quantised the model, whose layers then have no gradient.
    """
    modules = list(model.named_modules())
    quantised = [name.rpartition(".")[0] for name, _ in modules if name.endswith("._packed_params")]
    if quantised:
        raise UnsupportedModelError(
            f"Layer '{quantised[0]}' is quantised by torch, which has no gradient for it. Explain the model that was "
            "quantised, in floating-point numbers."
        )
    training = [
        name
        for name, module in modules
        if module.training and (name or not any(model.children())) and type(module).__name__ != _INTERPRETABLE
    ]
    if training:
        raise ModelStateError(
            f"The model is in training mode (layer '{training[0]}'), so its outputs may be random or come from another "
            "kernel. Call model.eval() first."
        )


def refuse_bad_inputs(model: nn.Module, inputs: Tensor) -> None:
    """Raise if the inputs are no tokens: of the wrong type or shape, or as :func:`refuse_bad_values` says.

    Raises:
        InvalidInputError: In each of these cases.
    """
    vectors = inputs.is_floating_point()
    if not vectors and inputs.dtype not in (torch.int64, torch.int32):
        raise InvalidInputError(f"Token ids must be of type int64 or int32, not {inputs.dtype}: call ids.long().")
    expected = "(batch, tokens, width), or (batch, channels, height, width)" if vectors else "(batch, tokens)"
    if not vectors and inputs.dim() == 3:
        raise InvalidInputError(
            f"inputs has several texts for each example, shape {tuple(inputs.shape)}, as a model of multiple choice "
            "takes them. Explain one text at a time: pass (batch, tokens), and let forward_func return the score of "
            "that text."
        )
    if inputs.dim() not in ((3, 4) if vectors else (2,)):
        raise InvalidInputError(f"inputs of type {inputs.dtype} must have shape {expected}, not {tuple(inputs.shape)}.")
    refuse_bad_values(model, inputs)


def refuse_bad_values(model: nn.Module, inputs: Tensor) -> None:
    """Raise if the inputs are empty, NaN or infinite, or name tokens that the model does not have.

    Raises:
        InvalidInputError: In each of these cases.
    """
    if inputs.numel() == 0:
        raise InvalidInputError(f"inputs is empty, shape {tuple(inputs.shape)}: there is no token to explain.")
    if inputs.is_floating_point():
        if not bool(inputs.isfinite().all()):
            raise InvalidInputError("inputs has NaN or infinite entries; replace them before explaining.")
        return
    size = getattr(input_embeddings(model), "num_embeddings", None)
    low, high = int(inputs.min()), int(inputs.max())
    if low < 0 or (size is not None and high >= size):
        raise InvalidInputError(
            f"Token ids must lie in 0 to {size - 1 if size else 'the vocabulary size'}, but inputs has {low} to {high}."
            " Does the tokenizer belong to this model?"
        )


def token_mask(forward_func: Callable[..., Any], args: tuple[Any, ...], calls: Sequence[LayerCall]) -> Tensor:
    """Return 1 at real tokens and 0 at padding, (B, L).

    For a transformers model the mask is the additional forward argument. Any other callable may make a mask, which the
    mixers then got.

    Args:
        forward_func: The model, or the callable that runs it.
        args: The additional forward arguments.
        calls: The calls of the mixers.
    """
    y = calls[-1].y
    candidates = args if is_language_model(forward_func) else [call.kwargs.get("attention_mask") for call in calls]
    masks = [mask for mask in candidates if isinstance(mask, Tensor) and mask.shape == y.shape[:2]]
    return masks[0].bool().to(torch.float32) if masks else torch.ones(y.shape[:2], dtype=torch.float32, device=y.device)


def query_weights(query: int | Tensor, inputs: Tensor) -> Tensor:
    """Return explained positions as weights (B, L).

    Args:
        query: A position, one position for each example (B,), or weights (B, L).
        inputs: Any tensor (B, L, ...).

    Raises:
        InvalidInputError: If a position lies outside the sequence or the shape does not fit.
    """
    shape = inputs.shape[:2]
    try:
        query = torch.as_tensor(query, device=inputs.device)
    except (RuntimeError, TypeError, ValueError, NotImplementedError) as error:
        raise InvalidInputError(
            f"query must be a position, or a tensor of positions or weights, not {query!r}."
        ) from error
    if query.shape == shape and query.is_floating_point():
        if not bool(query.isfinite().all()):
            raise InvalidInputError("The weights of query are NaN or infinite.")
        return at_least_float32(query)
    if (
        query.is_floating_point()
        or query.is_complex()
        or query.dim() > 1
        or (query.dim() == 1 and len(query) != shape[0])
    ):
        raise InvalidInputError(
            f"query must be a position, one position for each of {shape[0]} examples, or weights of shape "
            f"{tuple(shape)}; got {query.dtype} of shape {tuple(query.shape)}."
        )
    if not bool(((-shape[1] <= query) & (query < shape[1])).all()):
        raise InvalidInputError(f"query {query.tolist()} lies outside the {shape[1]} tokens.")
    position = (query % shape[1]).expand(shape[0])
    return F.one_hot(position, shape[1]).to(torch.float32)


def refuse_padding(query: Tensor, mask: Tensor) -> None:
    """Raise if an explained position is padding.

    Args:
        query: Weights of the explained positions (B, L).
        mask: 1 at real tokens and 0 at padding, (B, L).

    Raises:
        InvalidInputError: With the likely causes.
    """
    if bool((query * (1 - mask)).any()):
        raise InvalidInputError(
            "The explained score is read at padding, or `query` names padding. A transformers classifier that is given "
            "embeddings reads the last position, whatever the mask says: pad on the left, pass token ids, or explain "
            "sequences one by one."
        )
