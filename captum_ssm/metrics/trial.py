"""Run a model while more and more features of its inputs are taken away."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, TypedDict

import torch
from torch import Tensor

from captum_ssm._captum import format_additional_forward_args
from captum_ssm._progress import progress_bar
from captum_ssm.errors import InvalidInputError
from captum_ssm.metrics.baselines import Baselines, expanded, refuse_unknown
from captum_ssm.metrics.curve import Curve
from captum_ssm.metrics.evidence import Read, args_of_examples, finite, refuse_training, run
from captum_ssm.metrics.features import draws, feature_scores, ranks, spread
from captum_ssm.network.forward import checked_mask
from captum_ssm.network.inputs import single_tensor
from captum_ssm.network.interface import is_language_model

TENTHS = tuple(step / 10 for step in range(11))
"""0, 0.1, ..., 1."""


class Options(TypedDict, total=False):
    """What every perturbation metric takes besides its own arguments; all by keyword, all optional.

    Attributes:
        additional_forward_args: Passed on after the inputs, as in Captum: a tensor whose first dimension is the batch
            goes with its example, anything else is shared. For a transformers model: its attention mask (B, L);
            padding is then neither perturbed nor counted. For any other callable name the padding by ``keep``.
        keep: (B, L) bool, True at features that are never perturbed or counted: tokens that the answer is read at, or
            padding. Of images (B, patches), or (B, H, W) with ``patch_size`` 1.
        fractions: (S,) ascending shares of the features, in [0, 1]. Default 0, 0.1, ..., 1; for images 0.1, ..., 0.9.
        patch_size: Images are perturbed in square patches of so many pixels; default 1.
        seed: Features with equal scores are taken in a random order, drawn from this seed and the example's own
            content: the same for every method, in any batch and with any padding, another for each example. So
            scores that are all equal do as well as random ones, and nothing profits from its position. Default 0.
        internal_batch_size: Run the model on so many rows at a time, a row being one example at one step; default
            as many as there are examples.
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
    """A model, its inputs, and which of their features are taken away at each step; see :class:`Options`.

    Args:
        name: Of the metric, for the progress bar.
        forward_func: The model as the attribution method got it.
        inputs: Token ids (B, L), embeddings (B, L, E), images (B, C, H, W), or a tuple of one of them.
        attributions: Their scores by any method.
        whole: Take the whole features that fit into a fraction; else as many as are needed to fill it.

    Attributes:
        inputs: The tensor of the inputs.
        scores: (B, N) of the features.
        fractions: (S,).

    Raises:
        InvalidInputError: If something does not fit; the message says what.
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
        whole: bool = False,
    ) -> None:
        refuse_training(forward_func)
        self.inputs = single_tensor(inputs)
        self.scores = feature_scores(attributions, self.inputs, patch_size).to(self.inputs.device)
        refuse_unknown(forward_func, self.inputs, "inputs")
        self.fractions = _checked_fractions(fractions).to(self.inputs.device)
        self._forward_func, self._name = forward_func, name
        self._args: tuple[Any, ...] = format_additional_forward_args(additional_forward_args) or ()
        self._patch_size, self._show_progress = patch_size, show_progress
        self._size = _checked_size(internal_batch_size, len(self.inputs))
        self._real = _real_tokens(forward_func, self.inputs, self._args, self.scores)
        self._free = self._real & ~_checked_keep(keep, self.scores)
        self._ties = draws(self.inputs, self._free, seed, patch_size)
        parts = self.fractions * self._free.sum(1, keepdim=True)
        # 0.1 of 10 tokens is one, although 0.1 in 32 bits is a little more.
        self._counts = ((parts * (1 + 1e-6)).floor() if whole else (parts * (1 - 1e-6)).ceil()).long()
        if empty := (~self._free.any(1)).nonzero().flatten().tolist():
            raise InvalidInputError(
                f"Example {empty[0]} has no feature to perturb: all of it is padding or kept. Drop it, or keep less."
            )

    def outputs(self) -> Tensor:
        """Return the model's outputs for the inputs as they are."""
        every = torch.arange(len(self.inputs), device=self.inputs.device)
        with torch.no_grad():
            parts = [
                run(self._forward_func, self.inputs[part], self._args_of(part)) for part in every.split(self._size)
            ]
        return torch.cat(parts)

    def replace(
        self, scores: Tensor, baselines: Baselines | None, read: Read, *, insert: bool = False, name: str = ""
    ) -> Curve:
        """Return what is read as features are replaced by baselines, those with high scores first.

        Args:
            scores: (B, N) for the order.
            baselines: What takes their place.
            read: What is read off the outputs.
            insert: Start from the baselines instead, and insert the features.
            name: Of the order, for the progress bar.
        """
        baseline = expanded(baselines, self.inputs, self._forward_func)

        def perturbed(examples: Tensor, taken: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
            gone = self._free[examples] & ~taken if insert else taken
            where = spread(gone, self.inputs, self._patch_size)
            return torch.where(where, baseline[examples], self.inputs[examples]), self._args_of(examples)

        rows = torch.arange(len(self.fractions) * len(self.inputs), device=self.inputs.device)
        return self._measure(scores, rows.split(self._size), perturbed, read, name)

    def delete(self, scores: Tensor, read: Read, name: str = "") -> Curve:
        """Return what is read as tokens are deleted, those with high scores first; the sequences get shorter.

        Raises:
            InvalidInputError: If the inputs are images or nothing is left of an example.
        """
        if self.inputs.dim() == 4:
            raise InvalidInputError("Of an image no pixel can be deleted. Pass removal='replace' and baselines.")
        left = (self._real.sum(1, keepdim=True) - self._counts).amin(1)
        if not bool((left > 0).all()):
            raise InvalidInputError(
                f"At the largest fraction no token is left of example {int(left.argmin())}. Name the tokens that "
                "always stay by keep=, such as those that the answer is read at, or end fractions= below 1."
            )

        def perturbed(examples: Tensor, taken: Tensor) -> tuple[Tensor, tuple[Any, ...]]:
            stays = (~taken).nonzero()[:, 1].view(len(examples), -1)
            return self.inputs[examples.unsqueeze(1), stays], self._shortened_args(examples, stays)

        # Row s * B + b is example b at step s; rows of a batch have as many tokens deleted.
        counts = self._counts.T.flatten()
        groups = [(counts == count).nonzero().flatten() for count in counts.unique()]
        return self._measure(
            scores, [part for group in groups for part in group.split(self._size)], perturbed, read, name
        )

    def _measure(
        self,
        scores: Tensor,
        batches: Sequence[Tensor],
        perturbed: Callable[[Tensor, Tensor], tuple[Tensor, tuple[Any, ...]]],
        read: Read,
        name: str,
    ) -> Curve:
        places = ranks(scores, self._free, self._ties)
        examples, steps = len(self.inputs), len(self.fractions)
        parts: list[Tensor] = []
        with torch.no_grad(), progress_bar(self._name + name, examples * steps, self._show_progress, "row") as advance:
            for rows in batches:
                example, step = rows % examples, rows // examples
                taken = places[example] < self._counts[example, step].unsqueeze(1)
                output = run(self._forward_func, *perturbed(example, taken))
                parts.append(finite(read(output, example)).to(self.inputs.device))
                advance(len(rows))
        order = torch.cat(tuple(batches)).argsort()
        values = torch.cat(parts)[order].view(steps, examples).T.contiguous()
        return Curve(self.fractions.to(values), values)

    def _args_of(self, examples: Tensor) -> tuple[Any, ...]:
        return args_of_examples(self._args, examples, len(self.inputs))

    def _shortened_args(self, examples: Tensor, stays: Tensor) -> tuple[Any, ...]:
        """Return the arguments for these examples; of those that go with tokens, what belongs to the ones that stay."""
        return tuple(
            arg[examples.to(arg.device).unsqueeze(1), stays.to(arg.device)]
            if isinstance(arg, Tensor) and arg.shape[:2] == self.inputs.shape[:2]
            else part
            for arg, part in zip(self._args, self._args_of(examples))
        )


def _checked_fractions(fractions: Sequence[float] | Tensor) -> Tensor:
    steps = torch.as_tensor(fractions, dtype=torch.float64)
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


def _real_tokens(forward_func: Callable[..., Any], inputs: Tensor, args: tuple[Any, ...], scores: Tensor) -> Tensor:
    """Return where there is no padding, (B, N)."""
    if is_language_model(forward_func) and args and args[0] is not None:
        return checked_mask(inputs, args[0]).bool().to(scores.device)
    return torch.ones_like(scores, dtype=torch.bool)
