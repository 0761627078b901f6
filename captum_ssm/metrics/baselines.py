"""What takes the place of a feature that is taken away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from captum_ssm.errors import InvalidInputError
from captum_ssm.metrics.features import one_tensor
from captum_ssm.network.inputs import refuse_bad_inputs
from captum_ssm.network.interface import is_language_model

Baselines = float | Tensor | tuple[float | Tensor, ...]
"""A number, such as the id of ``<unk>``; or a tensor that broadcasts to the inputs, such as the embedding (E,) of
``<unk>``, a colour (C, 1, 1), or inputs of their shape; or a tuple of one of these."""


def expanded(baselines: Baselines | None, inputs: Tensor, forward_func: Callable[..., Any]) -> Tensor:
    """Return the baselines in the shape and type of the inputs.

    Raises:
        InvalidInputError: If there are none, they do not fit, or name tokens that the model does not have.
    """
    if baselines is None:
        raise InvalidInputError(
            "baselines is missing: say what takes the place of a feature, such as the id of <unk>, the embedding of "
            "<unk>, or a colour as the model gets it."
        )
    (value,) = baselines if isinstance(baselines, tuple) and len(baselines) == 1 else (baselines,)
    tensor = one_tensor(value if isinstance(value, Tensor) else torch.as_tensor(value), "baselines").to(inputs.device)
    try:
        tensor = tensor.broadcast_to(inputs.shape)
    except RuntimeError as error:
        raise InvalidInputError(
            f"baselines of shape {tuple(tensor.shape)} do not broadcast to inputs of shape {tuple(inputs.shape)}."
        ) from error
    if not inputs.is_floating_point() and not torch.equal(tensor, tensor.long().to(tensor.dtype)):
        raise InvalidInputError("baselines of token ids must be ids, that is, whole numbers.")
    tensor = tensor.to(inputs.dtype)
    refuse_unknown(forward_func, tensor, "baselines")
    return tensor


def refuse_unknown(forward_func: Callable[..., Any], inputs: Tensor, name: str) -> None:
    """Raise if a transformers model cannot take these inputs.

    Raises:
        InvalidInputError: If they have another shape or type than it takes, or ids that it does not have.
    """
    if isinstance(forward_func, nn.Module) and is_language_model(forward_func):
        try:
            refuse_bad_inputs(forward_func, inputs)
        except InvalidInputError as error:
            raise InvalidInputError(f"{name}: {error}") from error
