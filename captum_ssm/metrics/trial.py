"""Run a model while a growing share of the features of its inputs is removed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from captum_ssm._captum import format_additional_forward_args
from captum_ssm._progress import progress_bar
from captum_ssm.errors import InvalidInputError
from captum_ssm.metrics.baselines import Baselines, broadcast_baselines, refuse_unfit_inputs
from captum_ssm.metrics.curve import Curve
from captum_ssm.metrics.evidence import Reader, checked_finite, model_output, refuse_training
from captum_ssm.metrics.features import expand_features, feature_scores, ranks, tie_breakers
from captum_ssm.network.forward import checked_mask
from captum_ssm.network.inputs import select_examples, single_tensor
from captum_ssm.network.interface import is_language_model

TENTHS = tuple(step / 10 for step in range(11))
"""0, 0.1, ..., 1."""


class Options(TypedDict, total=False):
    """Arguments that all perturbation metrics share; all by keyword, all optional.

    Attributes:
        additional_forward_args: Passed on after the inputs, by Captum's rule: a tensor whose first dimension is the
            batch is split with the examples, any other value is shared. For a transformers model: its attention mask
            (B, L); padding is then neither perturbed nor counted. For any other callable mark the padding by ``keep``.
        keep: (B, L) bool, True at features that are never perturbed or counted: tokens at which the answer is read, or
            padding. For images (B, patches), or (B, H, W) with ``patch_size`` 1.
        fractions: (S,) ascending shares of the features, in [0, 1]. Default 0, 0.1, ..., 1; for images 0.1, ..., 0.9.
        patch_size: Side in pixels of the square patches in which images are perturbed; default 1.
        seed: Features with equal scores are taken in a random order, drawn from this seed and the example's content:
            one order for every method, batch and padding, another for each example. So scores that are all equal do as
            well as random ones, and no feature profits from its position. Default 0.
        internal_batch_size: Number of rows that the model runs on at a time, a row being one example at one step;
            default: the number of examples.
        show_progress: Show a progress bar if the call takes more than two seconds.
    """

    additional_forward_args: Any
    keep: Tensor | None
    fractions: Sequence[float] | Tensor
    patch_size: int
    seed: int
    internal_batch_size: int | None
    show_progress: bool


class Trial:
    """A model, its inputs, and the number of features that are removed at each step.

    Args:
        name: The name of the metric, for the progress bar.
        forward_func: The explained model: a language model, or any callable.
        inputs: Token ids (B, L), embeddings (B, L, E), images (B, C, H, W), or a tuple of one of them.
        attributions: Scores of the inputs by any method.
        additional_forward_args: See :class:`Options`, as for all arguments up to ``show_progress``.
        keep: (B, N) bool, True at features that are never removed.
        fractions: (S,) ascending shares of the features.
        patch_size: Side in pixels of the square patches of an image.
        seed: Seed of the order of features with equal scores.
        internal_batch_size: Number of rows that the model runs on at a time; None: the number of examples.
        show_progress: Show a progress bar if a call takes more than two seconds.
        round_down: Round the number of features in a fraction down; else up.

    Attributes:
        inputs: The tensor of the inputs.
        scores: (B, N) the scores of the features.
        fractions: (S,) the shares of the features.

    Raises:
        InvalidInputError: If shapes, types or options do not fit.
        ModelStateError: If the model is in training mode.
    """

    def __init__(
        self,
        name: str,
        forward_func: Callable[..., Any],
        inputs: Any,
        attributions: Any,
        *,
        additional_forward_args: Any = None,
        keep: Tensor | None = None,
        fractions: Sequence[float] | Tensor = TENTHS,
        patch_size: int = 1,
        seed: int = 0,
        internal_batch_size: int | None = None,
        show_progress: bool = False,
        round_down: bool = False,
    ) -> None:
        refuse_training(forward_func)
        self.inputs = single_tensor(inputs)
        self.scores = feature_scores(attributions, self.inputs, patch_size).to(self.inputs.device)
        refuse_unfit_inputs(forward_func, self.inputs, "inputs")
        self.fractions = _checked_fractions(fractions).to(self.inputs.device)
        self._forward_func, self._name = forward_func, name
        self._args: tuple[Any, ...] = format_additional_forward_args(additional_forward_args) or ()
        self._patch_size, self._show_progress = patch_size, show_progress
        self._batch_size = _checked_size(internal_batch_size, len(self.inputs))
        self._mask = _padding_mask(forward_func, self.inputs, self._args, self.scores)
        self._removable = self._mask & ~_checked_keep(keep, self.scores)
        self._ties = tie_breakers(self.inputs, self._removable, seed, patch_size)
        counts = self.fractions * self._removable.sum(1, keepdim=True)  # (B, S)
        # 0.1 of 10 tokens is one, although 0.1 in 32 bits is a little more.
        self._counts = ((counts * (1 + 1e-6)).floor() if round_down else (counts * (1 - 1e-6)).ceil()).long()
        if empty := (~self._removable.any(1)).nonzero().flatten().tolist():
            raise InvalidInputError(
                f"Example {empty[0]} has no feature to perturb: all of it is padding or kept. Drop it, or keep less."
            )

    def outputs(self) -> Tensor:
        """Return the model's outputs for the unchanged inputs, (B, ...)."""
        batches = torch.arange(len(self.inputs), device=self.inputs.device).split(self._batch_size)
        with torch.no_grad():
            return torch.cat(
                [model_output(self._forward_func, self.inputs[batch], self._args_of(batch)) for batch in batches]
            )

    def replace(
        self, scores: Tensor, baselines: Baselines | None, read: Reader, *, insert: bool = False, name: str = ""
    ) -> Curve:
        """Replace the features by baselines, those with high scores first.

        Args:
            scores: (B, N) scores that order the features.
            baselines: The values that replace them, see :data:`~captum_ssm.metrics.Baselines`.
            read: The reader of one number off each output.
            insert: Start from the baselines, and insert the features.
            name: The name of the order, for the progress bar.

        Returns:
            The numbers, (B, S), at each fraction.

        Raises:
            InvalidInputError: If the baselines do not fit the inputs.
        """
        baseline = broadcast_baselines(baselines, self.inputs, self._forward_func)

        def perturb(examples: Tensor, first: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
            replaced = self._removable[examples] & ~first if insert else first
            mask = expand_features(replaced, self.inputs, self._patch_size)
            return torch.where(mask, baseline[examples], self.inputs[examples]), self._args_of(examples)

        rows = torch.arange(len(self.fractions) * len(self.inputs), device=self.inputs.device)
        return self._measure(scores, rows.split(self._batch_size), perturb, read, name)

    def delete(self, scores: Tensor, read: Reader, name: str = "") -> Curve:
        """Delete tokens, those with high scores first; the sequences get shorter.

        Args:
            scores: (B, L) scores that order the tokens.
            read: The reader of one number off each output.
            name: The name of the order, for the progress bar.

        Returns:
            The numbers, (B, S), at each fraction.

        Raises:
            InvalidInputError: If the inputs are images, or no token of an example is left.
        """
        if self.inputs.dim() == 4:
            raise InvalidInputError("Of an image no pixel can be deleted. Pass removal='replace' and baselines.")
        remaining = (self._mask.sum(1, keepdim=True) - self._counts).amin(1)
        if not bool((remaining > 0).all()):
            raise InvalidInputError(
                f"At the largest fraction no token is left of example {int(remaining.argmin())}. Name the tokens that "
                "always stay by keep=, such as those that the answer is read at, or end fractions= below 1."
            )

        def perturb(examples: Tensor, first: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
            remaining = (~first).nonzero()[:, 1].view(len(examples), -1)
            return self.inputs[examples.unsqueeze(1), remaining], self._shortened_args(examples, remaining)

        # Row s * B + b is example b at step s; all rows of a batch have the same number of tokens deleted.
        counts = self._counts.T.flatten()
        groups = [(counts == count).nonzero().flatten() for count in counts.unique()]
        batches = [batch for group in groups for batch in group.split(self._batch_size)]
        return self._measure(scores, batches, perturb, read, name)

    def _measure(
        self,
        scores: Tensor,
        batches: Sequence[Tensor],
        perturb: Callable[[Tensor, Tensor], tuple[Tensor, tuple[Any, ...]]],
        read: Reader,
        name: str,
    ) -> Curve:
        """Run the model on all rows, and read one number off each output.

        Args:
            scores: (B, N) scores that order the features.
            batches: The numbers of the rows, s * B + b for example b at step s, in batches.
            perturb: From examples (rows,) and the features that come first (rows, N) to inputs and arguments.
            read: The reader of one number off each output.
            name: The name of the order, for the progress bar.

        Returns:
            The numbers, (B, S), at each fraction.
        """
        places = ranks(scores, self._removable, self._ties)
        examples, steps = len(self.inputs), len(self.fractions)
        numbers: list[Tensor] = []
        with torch.no_grad(), progress_bar(self._name + name, examples * steps, self._show_progress, "row") as advance:
            for rows in batches:
                example, step = rows % examples, rows // examples
                first = places[example] < self._counts[example, step].unsqueeze(1)  # (rows, N)
                output = model_output(self._forward_func, *perturb(example, first))
                numbers.append(checked_finite(read(output, example)).to(self.inputs.device))
                advance(len(rows))
        order = torch.cat(tuple(batches)).argsort()
        values = torch.cat(numbers)[order].view(steps, examples).T.contiguous()
        return Curve(self.fractions.to(values), values)

    def _args_of(self, examples: Tensor) -> tuple[Any, ...]:
        selected: tuple[Any, ...] = select_examples(self._args, len(self.inputs), examples)
        return selected

    def _shortened_args(self, examples: Tensor, remaining: Tensor) -> tuple[Any, ...]:
        """Return the arguments of the examples; of a tensor (B, L, ...) only the entries of the remaining tokens."""
        return tuple(
            arg[examples.to(arg.device).unsqueeze(1), remaining.to(arg.device)]
            if isinstance(arg, Tensor) and arg.shape[:2] == self.inputs.shape[:2]
            else taken
            for arg, taken in zip(self._args, self._args_of(examples))
        )


def _checked_fractions(fractions: Sequence[float] | Tensor) -> Tensor:
    steps = torch.as_tensor(fractions, dtype=torch.float64, device="cpu")
    if steps.dim() != 1 or len(steps) < 2 or not bool((steps.diff() > 0).all() & (steps[0] >= 0) & (steps[-1] <= 1)):
        raise InvalidInputError(
            f"fractions must be two or more numbers from 0 to 1 in ascending order, not {steps.tolist()}."
        )
    return steps


def _checked_size(size: int | None, examples: int) -> int:
    if size is not None and size < 1:
        raise InvalidInputError(f"internal_batch_size must be at least 1, not {size}.")
    return examples if size is None else size


def _checked_keep(keep: Tensor | None, scores: Tensor) -> Tensor:
    if keep is None:
        return torch.zeros_like(scores, dtype=torch.bool)
    if keep.dtype != torch.bool or keep.dim() < 2 or keep.flatten(1).shape != scores.shape:
        raise InvalidInputError(
            f"keep must be a bool tensor of shape {tuple(scores.shape)} (batch, features), True where a feature is "
            f"never perturbed, not {keep.dtype} of shape {tuple(keep.shape)}."
        )
    return keep.flatten(1).to(scores.device)


def _padding_mask(forward_func: Callable[..., Any], inputs: Tensor, args: tuple[Any, ...], scores: Tensor) -> Tensor:
    """Return a bool tensor (B, N): False at padding, as the attention mask of a language model marks it."""
    if is_language_model(forward_func) and args and args[0] is not None:
        return checked_mask(inputs, args[0]).bool().to(scores.device)
    return torch.ones_like(scores, dtype=torch.bool)
