"""Completeness: the sum of the scores beside the difference that they explain."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_ssm._captum import format_additional_forward_args
from captum_ssm.errors import InvalidInputError
from captum_ssm.metrics.baselines import Baselines, broadcast_baselines, refuse_unfit_inputs
from captum_ssm.metrics.evidence import Evidence, evidence_reader, model_output, refuse_training
from captum_ssm.metrics.features import finite_tensor
from captum_ssm.network.inputs import Target, select_examples, single_tensor


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
    """Return the relative difference between the sum of the scores and F(x) - F(x').

    Args:
        forward_func: The explained model: a language model, or any callable.
        inputs: x: token ids (B, L), embeddings (B, L, E), images (B, C, H, W) or a tuple of one of them.
        attributions: Scores of the inputs by any method, of the inputs' shape; of ids also of their embeddings.
        baselines: x', the reference of the method: a number, or a tensor that broadcasts to the inputs.
        target: The explained class, in any form that Captum takes.
        contrast: The class that the target is explained against, in the same forms; None: no class.
        additional_forward_args: Passed on after the inputs, for x and for x'.
        evidence: The function F of the model's output, see :data:`~captum_ssm.metrics.Evidence`.
        internal_batch_size: Number of examples that the model runs on at a time; None: all.

    Returns:
        ``|sum of scores - difference| / |difference|`` for each example, (B,), see :func:`conservation_gap`.

    Raises:
        InvalidInputError: If shapes, types or options do not fit.
        ModelStateError: If the model is in training mode, or returns NaN or infinity.
        AssertionError: If ``target`` does not fit the output: Captum raises the same error.

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
    refuse_unfit_inputs(forward_func, tensor, "inputs")
    reference = broadcast_baselines(baselines, tensor, forward_func)
    args = format_additional_forward_args(additional_forward_args) or ()
    count = len(tensor)
    read = evidence_reader(evidence, target, contrast, count)
    if internal_batch_size is not None and internal_batch_size < 1:
        raise InvalidInputError(f"internal_batch_size must be at least 1, not {internal_batch_size}.")
    differences = []
    with torch.no_grad():
        for rows in torch.arange(count, device=tensor.device).split(internal_batch_size or count):
            arguments = select_examples(args, count, rows)
            value, base = (read(model_output(forward_func, x[rows], arguments), rows) for x in (tensor, reference))
            differences.append(value.double() - base.double())
    return conservation_gap(attributions, torch.cat(differences))


def conservation_gap(attributions: Any, difference: Tensor) -> Tensor:
    """Return the relative difference between the sum of the scores and a known difference.

    Args:
        attributions: Scores by any method, (B, ...), or a tuple of one tensor.
        difference: (B,) the expected sum of each example's scores, such as F(x) - F(x'), or a score less its bias term.

    Returns:
        ``|sum of scores - difference| / |difference|`` for each example, (B,): 0 if the scores add up, infinite if the
        difference is 0 and the sum of the scores is not.

    Raises:
        InvalidInputError: If shapes do not fit, or a number is NaN or infinite.
    """
    scores, expected = finite_tensor(attributions, "attributions"), finite_tensor(difference, "difference").double()
    if scores.dim() < 2 or expected.shape != scores.shape[:1]:
        raise InvalidInputError(
            "difference must have one number for each example of the attributions, not shape "
            f"{tuple(expected.shape)} for attributions of shape {tuple(scores.shape)}."
        )
    gap = (scores.double().flatten(1).sum(1) - expected.to(scores.device)).abs()
    return torch.where(gap == 0, 0.0, gap / expected.abs().to(gap.device))
