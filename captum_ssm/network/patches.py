"""Measure which pixels of an image each token reads."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from captum_ssm.errors import InvalidInputError
from captum_ssm.network.forward import run_model
from captum_ssm.network.inputs import refuse_bad_inputs, refuse_bad_state
from captum_ssm.network.measurements import Measurements
from captum_ssm.network.recording import record_mixers


@dataclass(frozen=True)
class Patches:
    """The pixels that each token reads.

    Args:
        fields: (L, C, H, W), True where token j reads the channel of the pixel; nowhere for a class token.
    """

    fields: Tensor

    def spread(self, scores: Tensor) -> Tensor:
        """Return scores of tokens as images: the entries that a token reads carry equal shares of its score.

        Args:
            scores: (B, L).

        Returns:
            (B, C, H, W); an image's entries sum to the scores of the tokens that read pixels.
        """
        token, pixel = self._readings.to(scores.device)
        shares = scores[:, token] / token.bincount()[token]
        images = scores.new_zeros(len(scores), self.fields[0].numel())
        return images.index_add_(1, pixel, shares).unflatten(1, self.fields.shape[1:])

    def collect(self, images: Tensor) -> Tensor:
        """Return the scores (B, L) of tokens by those of pixels (B, C, H, W): a pixel's is shared by all its tokens."""
        token, pixel = self._readings.to(images.device)
        shares = images.flatten(1)[:, pixel] / pixel.bincount()[pixel]
        return images.new_zeros(len(images), len(self.fields)).index_add_(1, token, shares)

    @cached_property
    def _readings(self) -> Tensor:
        """The token and the entry of the image of each reading, (2, readings)."""
        return self.fields.flatten(1).nonzero().T

    @cached_property
    def places(self) -> Tensor:
        """The token of each patch, (rows, columns).

        Raises:
            InvalidInputError: If the patches do not form a grid.
        """
        reads = self.fields.flatten(1).any(1)
        corners = [
            (int(field.any(1).int().argmax()), int(field.any(0).int().argmax()), token)
            for token, field in enumerate(self.fields.any(1).cpu())
            if reads[token]
        ]
        rows, columns = (sorted({corner[axis] for corner in corners}) for axis in (0, 1))
        number = {(top, left): token for top, left, token in corners}
        if len(corners) != len(rows) * len(columns) or len(number) != len(corners):
            raise InvalidInputError(
                f"The {len(corners)} tokens that read pixels do not form a grid of patches, so there is no patch "
                "grid of scores. Leave out `patches`."
            )
        return torch.tensor([[number[top, left] for left in columns] for top in rows], device="cpu")

    def grid(self, scores: Tensor) -> Tensor:
        """Return scores of tokens (B, L) in the shape of the grid, (B, rows, columns)."""
        return scores[:, self.places.to(scores.device)]


_KNOWN: Measurements[Patches] = Measurements()


def find_patches(model: nn.Module, forward_func: Callable[..., Any], image: Tensor, args: tuple[Any, ...]) -> Patches:
    """Measure which pixels each token that enters the first mixer reads: those at which it has a gradient.

    The gradients are those at noise and at its negative, so that no pixel's value hides it.

    Args:
        model: The model that holds the mixers.
        forward_func: The callable that runs it.
        image: (1, C, H, W); the pixels' values do not matter.
        args: The additional forward arguments.

    Returns:
        The pixels that each token reads.

    Raises:
        InvalidInputError: If no token reads a pixel, or a pixel is NaN or infinite.
        ModelStateError: If the model is training.

    Cost: two forward passes and 2 L backward passes of the part before the first mixer, once for each model, function
    and size of images.
    """
    known = _KNOWN.of(model, forward_func, args)
    size = image.shape[1:]
    if size not in known:
        refuse_bad_state(model)
        refuse_bad_inputs(model, image)
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0), device="cpu").to(image)
        fields = _fields(model, forward_func, noise, args) | _fields(model, forward_func, -noise, args)
        if not bool(fields.any()):
            raise InvalidInputError(
                "The model's first layer reads nothing of these images, so their pixels cannot be explained. Check "
                "that forward_func runs this model on the inputs as they are."
            )
        known[size] = Patches(fields)
    return known[size]


def _fields(model: nn.Module, forward_func: Callable[..., Any], image: Tensor, args: tuple[Any, ...]) -> Tensor:
    """Return where each token has a gradient with respect to the image (1, C, H, W), shape (L, C, H, W)."""
    pixels = image.detach().clone().requires_grad_()
    with torch.enable_grad(), record_mixers(model, hold=True) as calls:
        run_model(forward_func, pixels, *args)
    x = calls[0].x
    weights = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(0), device="cpu").to(x)
    nowhere = torch.zeros_like(image)
    if not x.requires_grad:
        return nowhere.bool().expand(x.shape[1], -1, -1, -1)
    tokens = (x * weights).sum((0, 2))
    gradients = [torch.autograd.grad(t, pixels, retain_graph=True, allow_unused=True)[0] for t in tokens]
    return torch.cat([(nowhere if g is None else g).ne(0) for g in gradients])
