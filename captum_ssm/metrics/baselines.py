"""Baselines: the values that replace removed features."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from captum_ssm.errors import InvalidInputError
from captum_ssm.metrics.features import finite_tensor
from captum_ssm.network.inputs import refuse_bad_inputs
from captum_ssm.network.interface import is_language_model

Baselines = float | Tensor | tuple[float | Tensor, ...]
"""A number, such as the id of ``<unk>``; or a tensor that broadcasts to the inputs, such as the embedding (E,) of
``<unk>``, a colour (C, 1, 1), or a tensor of the inputs' shape; or a tuple of one of these."""


def broadcast_baselines(baselines: Baselines | None, inputs: Tensor, forward_func: Callable[..., Any]) -> Tensor:
    """Broadcast the baselines to the shape and type of the inputs.

    Args:
        baselines: The values that replace removed features.
        inputs: Token ids (B, L), embeddings (B, L, E) or images (B, C, H, W).
        forward_func: The model, whose vocabulary the ids must belong to, or any callable.

    Returns:
        A tensor of the inputs' shape, type and device.

    Raises:
        InvalidInputError: If baselines is None, does not broadcast to the inputs, or has ids outside the vocabulary.
    """
    if baselines is None:
        raise InvalidInputError(
            "baselines is missing: say what takes the place of a feature, such as the id of <unk>, the embedding of "
            "<unk>, or a colour as the model gets it."
        )
    (value,) = baselines if isinstance(baselines, tuple) and len(baselines) == 1 else (baselines,)
    tensor = finite_tensor(torch.as_tensor(value, device=inputs.device), "baselines")
    try:
        tensor = tensor.broadcast_to(inputs.shape)
    except RuntimeError as error:
        raise InvalidInputError(
            f"baselines of shape {tuple(tensor.shape)} do not broadcast to inputs of shape {tuple(inputs.shape)}."
        ) from error
    if not inputs.is_floating_point() and not torch.equal(tensor, tensor.long().to(tensor.dtype)):
        raise InvalidInputError("baselines of token ids must be ids, that is, whole numbers.")
    tensor = tensor.to(inputs.dtype)
    refuse_unfit_inputs(forward_func, tensor, "baselines")
    return tensor


def refuse_unfit_inputs(forward_func: Callable[..., Any], inputs: Tensor, name: str) -> None:
    """Raise if a language model cannot take these inputs; any other callable may take all.

    Args:
        forward_func: The model, or any callable.
        inputs: Token ids (B, L) or embeddings (B, L, E).
        name: The name of the argument, for the message.

    Raises:
        InvalidInputError: If the inputs have a wrong shape or type, or ids outside the model's vocabulary.
    """
    if isinstance(forward_func, nn.Module) and is_language_model(forward_func):
        try:
            refuse_bad_inputs(forward_func, inputs)
        except InvalidInputError as error:
            raise InvalidInputError(f"{name}: {error}") from error
