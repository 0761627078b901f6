"""The reference x' that relevance compares an input with."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_ssm.errors import InvalidInputError
from captum_ssm.network.forward import checked_mask
from captum_ssm.network.inputs import refuse_bad_values, refuse_no_values
from captum_ssm.network.interface import is_language_model

Baseline = int | float | Tensor


@dataclass(frozen=True)
class Reference:
    """The reference of one input; without a baseline, vectors of 0.

    Args:
        baseline: For ids: an id that replaces every token; ids or embeddings that broadcast to the inputs; a float for
            all components. For floating-point inputs: a number, or a tensor that broadcasts to them. Or None.
        inputs: Token ids (B, L) or of any other shape, embeddings (B, L, E), or any floating-point tensor.
        padding: True at padding, (B, L), which keeps its embeddings; None if there is none.
    """

    baseline: Baseline | None
    inputs: Tensor
    padding: Tensor | None = None

    @classmethod
    def of(
        cls, baseline: Baseline | None, inputs: Tensor, forward_func: Callable[..., Any], args: tuple[Any, ...]
    ) -> Reference:
        """Return the reference of a call, whose padding a transformers model's attention mask tells.

        Args:
            baseline: The caller's baseline, or None.
            inputs: The inputs of the call.
            forward_func: The model, or a callable that runs it.
            args: The additional forward arguments.

        Raises:
            InvalidInputError: If the mask does not fit the inputs.
        """
        masked = baseline is not None and is_language_model(forward_func) and args and isinstance(args[0], Tensor)
        return cls(baseline, inputs, ~checked_mask(inputs, args[0]).bool() if masked else None)

    def check(self, model: nn.Module) -> None:
        """Raise if the baseline does not fit the inputs or the model.

        Raises:
            InvalidInputError: If its type or shape does not fit, it names unknown tokens, or is not finite.
        """
        if self.baseline is None:
            return
        if not isinstance(self.baseline, (int, float, Tensor)):
            raise InvalidInputError(
                f"A baseline is a token id, ids, a number or embeddings, not {type(self.baseline).__name__}. For a "
                "word take its id: tokenizer.convert_tokens_to_ids(word)."
            )
        reference, shape = torch.as_tensor(self.baseline, device=self.inputs.device), self.inputs.shape
        refuse_no_values(reference, "A baseline")
        token_ids = not self.inputs.is_floating_point()
        vectors = token_ids and reference.is_floating_point() and reference.dim() > 0
        try:
            fits = torch.broadcast_shapes(reference.shape[:-1] if vectors else reference.shape, shape) == shape
        except RuntimeError:
            fits = False
        if not fits:
            raise InvalidInputError(
                f"The baseline of shape {tuple(reference.shape)} does not fit inputs of shape {tuple(shape)}. Pass a "
                "number, or a tensor that broadcasts to the inputs, such as a token id, ids or embeddings for all "
                "positions; or a list of several such baselines."
            )
        if token_ids and not reference.is_floating_point():
            refuse_bad_values(model, reference.expand(shape))
        elif not bool(reference.isfinite().all()):
            raise InvalidInputError("The baseline has NaN or infinite entries.")

    @property
    def ids(self) -> Tensor | None:
        """The reference as a text in the shape of the inputs, padding with its own ids; None if it is no text."""
        if self.baseline is None or self.inputs.is_floating_point():
            return None
        ids = torch.as_tensor(self.baseline, device=self.inputs.device)
        if ids.is_floating_point():
            return None
        ids = ids.to(self.inputs.dtype).expand(self.inputs.shape)
        return ids if self.padding is None else torch.where(self.padding, self.inputs, ids)

    def vectors(self, value: Tensor, looked_up: Tensor | None = None, tokens: Tensor | None = None) -> Tensor:
        """Return the reference of vectors; padding is its own reference.

        Args:
            value: Floating-point inputs, or the embeddings (..., E) of ids (...), or with ``tokens`` any (n, E).
            looked_up: The embeddings of the reference's ids, in the shape of ``value``, if it is a text.
            tokens: The number of the token (n,) among all that each vector belongs to; a vector of none, negative, is
                its own reference.

        Returns:
            A tensor of the shape and type of ``value``.

        Raises:
            InvalidInputError: If the baseline's embeddings have another width than the model's.
        """
        if looked_up is not None:
            return looked_up.to(value)
        reference = torch.as_tensor(0 if self.baseline is None else self.baseline, device=value.device)
        if reference.dim() > 0 and reference.shape[-1] not in (1, value.shape[-1]):
            raise InvalidInputError(
                f"The baseline's embeddings have {reference.shape[-1]} components, the model's {value.shape[-1]}."
            )
        each = value.shape if tokens is None else (*self.inputs.shape, value.shape[-1])
        reference, keep = reference.to(value).expand(each), self.padding
        if tokens is not None:
            reference = reference.flatten(0, -2)[tokens]
            keep = tokens < 0 if keep is None else keep.flatten()[tokens] | (tokens < 0)
        return reference if keep is None else torch.where(keep[..., None], value.detach(), reference)


def expanded_baseline(baseline: Any, inputs: Tensor) -> Any:
    """Return the baseline for all examples, so that it can be cut into batches with them.

    Args:
        baseline: A number, a tensor, or None.
        inputs: The inputs of all examples.

    Returns:
        A tensor in the shape of the inputs, (B, L, E) for embeddings in place of ids. A number, and a tensor that does
        not fit (which :meth:`Reference.check` refuses), stay unchanged.
    """
    if not isinstance(baseline, Tensor) or baseline.dim() == 0:
        return baseline
    vectors = baseline.is_floating_point() and not inputs.is_floating_point()
    shape = (*inputs.shape, *baseline.shape[-1:]) if vectors else inputs.shape
    try:
        return baseline.expand(shape)
    except RuntimeError:
        return baseline


def stacked_baselines(baselines: Sequence[Any], inputs: Tensor) -> Tensor | None:
    """Return several baselines of the same inputs one after the other.

    Args:
        baselines: R ids, numbers or tensors.
        inputs: The inputs (B, ...).

    Returns:
        (R·B, ...); None if they are of several kinds, one does not fit, or one is a number for the embeddings of ids.
    """
    if not all(isinstance(baseline, (int, float, Tensor)) for baseline in baselines):
        return None
    given = [torch.as_tensor(baseline, device=inputs.device) for baseline in baselines]
    each = [b.expand_as(inputs) if b.dim() == 0 else expanded_baseline(b, inputs) for b in given]
    if len({(b.shape, b.is_floating_point()) for b in each}) > 1 or len(each[0]) != len(inputs):
        return None
    is_number_for_vectors = any(b.dim() == 0 and b.is_floating_point() != inputs.is_floating_point() for b in given)
    return None if is_number_for_vectors else torch.cat(each)
