"""Evidence: the number that a metric reads off a model's output for the explained class."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_ssm._captum import select_targets
from captum_ssm.errors import InvalidInputError, ModelStateError
from captum_ssm.network.forward import run_model
from captum_ssm.network.inputs import Target, refuse_bad_state, refuse_wrong_counts, select_examples
from captum_ssm.network.turns import unchanged

Evidence = Literal["probability", "logit"] | Callable[[Tensor], Tensor]
"""A function of the model's output, from whose result ``target`` selects.

* ``"probability"``: the softmax over the classes, the output's last dimension;
* ``"logit"``: the output itself;
* a callable from outputs (rows, ...) to a tensor that the target selects from, or to one number for each row, which
  needs no target. For a model with a single logit: ``torch.sigmoid``.

With a ``contrast`` the evidence is the target's less the contrast's; ``"probability"`` is then the probability of the
target among the two.
"""

Reader = Callable[[Tensor, Tensor], Tensor]
"""From outputs (rows, ...) and the example of each row (rows,) to one number for each row."""


def refuse_training(forward_func: Callable[..., Any]) -> None:
    """Raise if the model is in training mode, where two runs differ by chance.

    Raises:
        ModelStateError: If a module of the model is in training mode.
    """
    if isinstance(forward_func, nn.Module):
        refuse_bad_state(forward_func)


def model_output(forward_func: Callable[..., Any], inputs: Tensor, args: tuple[Any, ...]) -> Tensor:
    """Run the model on some rows of inputs.

    Args:
        forward_func: The model: a language model, or any callable.
        inputs: (rows, ...) token ids, embeddings or images.
        args: The additional arguments of these rows.

    Returns:
        The output, (rows, ...), detached, in 32 bits or more.

    Raises:
        InvalidInputError: If the output is not a tensor with one row for each row of inputs.
    """
    with unchanged(forward_func, forward_func, inputs) if isinstance(forward_func, nn.Module) else nullcontext():
        output = run_model(forward_func, inputs, *args)
    if not isinstance(output, Tensor) or output.dim() == 0 or len(output) != len(inputs):
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"type {type(output).__name__}"
        raise InvalidInputError(
            f"forward_func must return a tensor with one row for each of its {len(inputs)} examples, not {got}. Do not "
            "sum over the batch; of a model's output return the logits."
        )
    return output.detach().to(torch.promote_types(output.dtype, torch.float32))


def evidence_function(evidence: Evidence) -> Callable[[Tensor], Tensor]:
    """Return the function from outputs to evidence.

    Raises:
        InvalidInputError: If the name is unknown.
    """
    if callable(evidence):
        return evidence
    if evidence == "logit":
        return lambda output: output
    if evidence == "probability":
        return _probability
    raise InvalidInputError(f"evidence must be 'probability', 'logit' or a callable, not {evidence!r}.")


def _probability(output: Tensor) -> Tensor:
    if output.dim() < 2 or output.shape[-1] < 2:
        raise InvalidInputError(
            f"An output of shape {tuple(output.shape)} has no classes to take the softmax over. Pass evidence='logit', "
            "or evidence=torch.sigmoid if it is the logit of one class against another."
        )
    return output.softmax(-1)


def evidence_reader(evidence: Evidence, target: Target, contrast: Target, count: int) -> Reader:
    """Return a reader of the target's evidence.

    Args:
        evidence: The function of the output, see :data:`Evidence`.
        target: The explained class, in any form that Captum takes: one for all examples, or one for each.
        contrast: The class that the target is explained against, in the same forms; None: no class.
        count: The number of all examples.

    Returns:
        A function from outputs (rows, ...) and the example of each row (rows,) to the evidence (rows,).

    Raises:
        InvalidInputError: If the evidence is unknown.
        AssertionError: If there are several targets and not as many as examples: Captum raises the same error.
    """
    refuse_wrong_counts(count, (target, contrast), None)
    transform = evidence_function(evidence)
    if contrast is None:
        return lambda output, examples: _target_evidence(transform(output), select_examples(target, count, examples))
    is_probability = evidence == "probability"

    def read_difference(output: Tensor, examples: Tensor) -> Tensor:
        values = output if is_probability else transform(output)
        chosen, other = (
            _target_evidence(values, select_examples(label, count, examples)) for label in (target, contrast)
        )
        return (chosen - other).sigmoid() if is_probability else chosen - other

    return read_difference


def _target_evidence(evidence: Tensor, target: Target) -> Tensor:
    """Select the target by Captum's rules.

    Args:
        evidence: (rows, ...) the result of the evidence function.
        target: The targets of these rows.

    Returns:
        (rows,) one number for each row.

    Raises:
        InvalidInputError: If there is no target where one is needed, or it selects several numbers a row.
        AssertionError: If the target does not fit the evidence.
        ModelStateError: If a number is NaN or infinite.
    """
    rows, shape = len(evidence), tuple(evidence.shape)
    if target is None and evidence[0].numel() != 1:
        raise InvalidInputError(
            f"Target not provided when necessary: each example has {shape[1:]} outputs, so pass target=, such as the "
            "class that was explained."
        )
    selected = select_targets(evidence, target)
    if selected.numel() != rows:
        raise InvalidInputError(
            f"The target selects shape {tuple(selected.shape)} from an output of shape {shape}, but it must select one "
            "number for each example. Where outputs have positions, the target names position and class: (-1, 3)."
        )
    return checked_finite(selected.reshape(rows))


def checked_finite(numbers: Tensor) -> Tensor:
    """Return the numbers, of any shape, unchanged.

    Raises:
        ModelStateError: If a number is NaN or infinite.
    """
    if not bool(numbers.isfinite().all()):
        raise ModelStateError(
            "The model's output is NaN or infinite on a perturbed input. Check the weights and the baselines, or run "
            "the model in a wider floating-point type."
        )
    return numbers
