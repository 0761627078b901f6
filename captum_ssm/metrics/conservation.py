"""Whether the scores add up to what they explain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_ssm._captum import format_additional_forward_args
from captum_ssm.errors import InvalidInputError
from captum_ssm.metrics.baselines import Baselines, expanded, refuse_unknown
from captum_ssm.metrics.evidence import Evidence, args_of_examples, reader, refuse_training, run
from captum_ssm.metrics.features import one_tensor
from captum_ssm.network.inputs import Target, single_tensor


def conservation(
    forward_func: Callable[..., Any],
    inputs: Any,
    attributions: Any,
    *,
    baselines: Baselines,
    target: Target = None,
    contrast: Target = None,
    additional_forward_args: Any = None,
    evidence: Evidence = "logit",
    internal_batch_size: int | None = None,
) -> Tensor:
    """Return by how much the sum of the scores misses F(x) - F(x'), relative to it.

    Args:
        forward_func: What the attribution method got.
        inputs: x: token ids (B, L), embeddings (B, L, E), images (B, C, H, W) or a tuple of one of them.
        attributions: What the method returned for them.
        baselines: x', what the method compared with: a number, or a tensor that broadcasts to the inputs.
        target: The explained class, in any form that Captum takes.
        contrast: What it is explained against, likewise, if anything.
        additional_forward_args: Passed on after the inputs, in both calls.
        evidence: What F is, see :data:`~captum_ssm.metrics.Evidence`.
        internal_batch_size: Run the model on so many examples at a time; all at once by default.

    Returns:
        See :func:`conservation_gap`.

    Raises:
        InvalidInputError: If something does not fit; the message says what.
        ModelStateError: If the model is in training mode, or gives NaN or infinity.
        AssertionError: If ``target`` does not fit the output, as in Captum.

    Cost:
        Two forwards.

    Example:
        >>> import torch
        >>> weights, inputs = torch.tensor([3.0, 1.0, 2.0]), torch.ones(1, 3)
        >>> conservation(lambda x: x @ weights, inputs, inputs * weights * 0.9, baselines=0)
        tensor([0.1000], dtype=torch.float64)
    """
    refuse_training(forward_func)
    tensor = single_tensor(inputs)
    refuse_unknown(forward_func, tensor, "inputs")
    reference = expanded(baselines, tensor, forward_func)
    args = format_additional_forward_args(additional_forward_args) or ()
    count = len(tensor)
    read = reader(evidence, target, contrast, count)
    if internal_batch_size is not None and internal_batch_size < 1:
        raise InvalidInputError(f"internal_batch_size must be at least 1, not {internal_batch_size}.")
    parts = []
    with torch.no_grad():
        for rows in torch.arange(count, device=tensor.device).split(internal_batch_size or count):
            some = args_of_examples(args, rows, count)
            there, here = (read(run(forward_func, x[rows], some), rows) for x in (tensor, reference))
            parts.append(there.double() - here.double())
    return conservation_gap(attributions, torch.cat(parts))


def conservation_gap(attributions: Any, difference: Tensor) -> Tensor:
    """Return by how much the sum of the scores misses a known difference, relative to it.

    Args:
        attributions: What a method returned, (B, ...), or a tuple of one such tensor.
        difference: (B,) what they should add up to, such as F(x) - F(x'), or a score less its bias term.

    Returns:
        ``|sum of scores - difference| / |difference|`` for each example, (B,): 0 if they add up, infinite if there is
        no difference to explain but the scores do not add up to 0.

    Raises:
        InvalidInputError: If shapes do not fit or something is NaN or infinite.
    """
    scores, wanted = one_tensor(attributions, "attributions"), one_tensor(difference, "difference").double()
    if scores.dim() < 2 or wanted.shape != scores.shape[:1]:
        raise InvalidInputError(
            "difference must have one number for each example of the attributions, not shape "
            f"{tuple(wanted.shape)} for attributions of shape {tuple(scores.shape)}."
        )
    gap = (scores.double().flatten(1).sum(1) - wanted.to(scores.device)).abs()
    return torch.where(gap == 0, 0.0, gap / wanted.abs().to(gap.device))
