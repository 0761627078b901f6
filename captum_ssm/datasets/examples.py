"""Rows made ready for a model: the kinds of rows, and how several become one batch."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from captum_ssm.errors import InvalidInputError


@dataclass(frozen=True)
class Batch:
    """Several rows as the arguments of a model and of a method.

    Attributes:
        inputs: The inputs, each of which begins with the batch.
        args: The additional forward arguments: the mask of padded texts.
        baselines: The reference of each input; None freezes the gates.
    """

    inputs: tuple[Tensor, ...]
    args: tuple[Tensor, ...]
    baselines: tuple[Any, ...] | None


class Examples(Protocol):
    """A kind of rows: texts, or tensors."""

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Return each row made ready, or in its place the error that says why it cannot be."""

    def key(self, example: Any) -> tuple[Hashable, int]:
        """Return the key that the examples of a batch share, and a length."""

    def batch(self, examples: Sequence[Any]) -> Batch:
        """Return several examples as one batch."""

    def scores(self, examples: Sequence[Any], scores: Sequence[Tensor]) -> list[np.ndarray]:
        """Return the scores of each example from those of the batch, without padding."""

    def describe(self, example: Any) -> dict[str, Any]:
        """Return the columns that describe a row; for None, one without an example, empty ones."""


Prepare = Callable[[Mapping[str, Any]], Tensor | tuple[Tensor, ...]]
"""A function from a row, its columns by name, to the inputs of a model for it, without the dimension of the batch."""


@dataclass(frozen=True)
class Tensors:
    """Rows that a function of one's own turns into tensors: images, series, several inputs.

    Attributes:
        make: The function.
        baselines: The reference of each input: a number, or a tensor of the input's shape; None freezes the gates.
        device: Where the model's inputs are.
    """

    make: Prepare
    baselines: Any
    device: torch.device

    def prepare(self, rows: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Return the inputs of each row, or the error of the function.

        Args:
            rows: The columns of each row by name.

        Returns:
            A tuple of tensors for each row, or an exception.
        """
        return [self._made(row) for row in rows]

    def key(self, example: tuple[Tensor, ...]) -> tuple[Hashable, int]:
        """Return the shapes of the inputs, which the examples of a batch share, and one as their length."""
        return tuple((tuple(x.shape), x.dtype) for x in example), 1

    def batch(self, examples: Sequence[tuple[Tensor, ...]]) -> Batch:
        """Return the inputs of several rows stacked."""
        inputs = tuple(torch.stack(list(each)).to(self.device) for each in zip(*examples))
        if self.baselines is None:
            return Batch(inputs, (), None)
        each = self.baselines if isinstance(self.baselines, tuple) else (self.baselines,) * len(inputs)
        return Batch(inputs, (), tuple(b.to(self.device) if isinstance(b, Tensor) else b for b in each))

    def scores(self, examples: Sequence[tuple[Tensor, ...]], scores: Sequence[Tensor]) -> list[np.ndarray]:
        """Return the scores of each row: those of all its inputs, one after the other, as one line of numbers."""
        return [np.concatenate([as_array(s[k]).ravel() for s in scores]) for k in range(len(examples))]

    def describe(self, example: tuple[Tensor, ...] | None) -> dict[str, Any]:
        """Return the shape of each input as text: ``3×8×8``, with blanks between several."""
        return {"shapes": " ".join("×".join(map(str, x.shape)) for x in example or ())}

    def _made(self, row: Mapping[str, Any]) -> tuple[Tensor, ...] | Exception:
        try:
            made = self.make(row)
        except Exception as error:  # of a function of the user's
            return error
        tensors = made if isinstance(made, tuple) else (made,)
        if not tensors or not all(isinstance(x, Tensor) for x in tensors):
            return InvalidInputError(f"prepare returned a {type(made).__name__}; return a tensor, or a tuple of them.")
        if not all(bool(x.isfinite().all()) and x.numel() for x in tensors):
            return InvalidInputError("the row's tensor is empty, or has NaN or infinite entries.")
        return tensors


def as_array(tensor: Tensor) -> np.ndarray:
    """Return a tensor's entries in at least 32 bits."""
    return tensor.detach().to(torch.promote_types(tensor.dtype, torch.float32)).cpu().numpy()
