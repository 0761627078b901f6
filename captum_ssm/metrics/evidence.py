"""What is read off a model's output: the evidence for the explained class."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_ssm._captum import select_targets
from captum_ssm.errors import InvalidInputError, ModelStateError
from captum_ssm.network.forward import run_model
from captum_ssm.network.inputs import Target, refuse_bad_state, refuse_wrong_counts

Evidence = Literal["probability", "logit"] | Callable[[Tensor], Tensor]
"""What the model's output is turned into before ``target`` selects from it.

* ``"probability"``: the softmax over the classes, the output's last dimension;
* ``"logit"``: the output as it is;
* a callable from outputs (rows, ...) to what the target selects from, or to one number for each row (no target needed).
  Of a single logit: ``torch.sigmoid``.

With a ``contrast`` it is the target's less the contrast's; as a probability that of the target among the two.
"""

Read = Callable[[Tensor, Tensor], Tensor]
"""From outputs (rows, ...) and the example of each row (rows,) to one number for each row."""


def refuse_training(forward_func: Callable[..., Any]) -> None:
    """Raise if the model is in training mode, where two runs differ by chance.

    Raises:
        ModelStateError: If it is.
    """
    if isinstance(forward_func, nn.Module):
        refuse_bad_state(forward_func)


def run(forward_func: Callable[..., Any], inputs: Tensor, args: tuple[Any, ...]) -> Tensor:
    """Return the model's output for each row of inputs, (rows, ...), in 32 bits or more.

    Raises:
        InvalidInputError: If it is not a tensor with one row for each row of inputs.
    """
    output = run_model(forward_func, inputs, *args)
    if not isinstance(output, Tensor) or output.dim() == 0 or len(output) != len(inputs):
        got = f"shape {tuple(output.shape)}" if isinstance(output, Tensor) else f"type {type(output).__name__}"
        raise InvalidInputError(
            f"forward_func must return a tensor with one row for each of its {len(inputs)} examples, not {got}. Do not "
            "sum over the batch; of a model's output return the logits."
        )
    return output.detach().to(torch.promote_types(output.dtype, torch.float32))


def of_examples(value: Any, examples: Tensor, count: int) -> Any:
    """Return the parts of a target that belong to these of ``count`` examples, or all of a shared one."""
    if isinstance(value, Tensor) and value.dim() > 0 and len(value) == count:
        return value[examples.to(value.device)]
    if isinstance(value, list) and len(value) == count:
        return [value[example] for example in examples.tolist()]
    return value


def args_of_examples(args: tuple[Any, ...], examples: Tensor, count: int) -> tuple[Any, ...]:
    """Return additional arguments for these of ``count`` examples; only tensors go with examples, as in Captum."""
    return tuple(of_examples(arg, examples, count) if isinstance(arg, Tensor) else arg for arg in args)


def transformed(evidence: Evidence) -> Callable[[Tensor], Tensor]:
    """Return what turns outputs into evidence.

    Raises:
        InvalidInputError: If it is unknown.
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


def reader(evidence: Evidence, target: Target, contrast: Target, count: int) -> Read:
    """Return what reads the target's evidence off the outputs of some of ``count`` examples.

    Raises:
        InvalidInputError: If the evidence is unknown.
        AssertionError: If there are several targets and not as many as examples, as in Captum.
    """
    refuse_wrong_counts(count, (target, contrast), None)
    transform = transformed(evidence)
    if contrast is None:
        return lambda output, examples: _selected(transform(output), of_examples(target, examples, count))
    of_two = evidence == "probability"

    def lead(output: Tensor, examples: Tensor) -> Tensor:
        read = output if of_two else transform(output)
        chosen, other = (_selected(read, of_examples(which, examples, count)) for which in (target, contrast))
        return (chosen - other).sigmoid() if of_two else chosen - other

    return lead


def _selected(evidence: Tensor, target: Target) -> Tensor:
    """Return what the target selects, by Captum's rules: one number for each row."""
    rows, shape = len(evidence), tuple(evidence.shape)
    if target is None and evidence[0].numel() != 1:
        raise InvalidInputError(
            f"Target not provided when necessary: each example has {shape[1:]} outputs, so pass target=, such as the "
            "class that was explained."
        )
    try:
        selected = select_targets(evidence, target)
    except (IndexError, RuntimeError) as error:
        raise AssertionError(f"Target {target!r} does not fit an output of shape {shape}.") from error
    if selected.numel() != rows:
        raise InvalidInputError(
            f"The target selects shape {tuple(selected.shape)} from an output of shape {shape}, but it must select one "
            "number for each example. Where outputs have positions, the target names position and class: (-1, 3)."
        )
    return finite(selected.reshape(rows))


def finite(numbers: Tensor) -> Tensor:
    """Return the numbers.

    Raises:
        ModelStateError: If one is NaN or infinite.
    """
    if not bool(numbers.isfinite().all()):
        raise ModelStateError(
            "The model's output is NaN or infinite on a perturbed input. Check the weights and the baselines, or run "
            "the model in a wider floating-point type."
        )
    return numbers
