"""The form in which scores are returned: of tokens, of components, or of the pixels and patches of an image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from captum_ssm.attr.inputs import refuse_bad_inputs, refuse_bad_state, select_examples
from captum_ssm.capture import record_mixers
from captum_ssm.errors import InvalidInputError
from captum_ssm.readout import scores


@dataclass(frozen=True)
class Patches:
    """The pixels that each token reads.

    Args:
        fields: (L, H, W), True where token j reads the pixel; nowhere for a class token.
    """

    fields: Tensor

    def spread(self, scores: Tensor, channels: int) -> Tensor:
        """Return scores (B, L) as images (B, C, H, W): all that a token reads carries an equal share of its score.

        An image's entries sum to the scores of the tokens that read pixels.
        """
        shares = self.fields.to(scores) / self.fields.sum((1, 2)).clamp_min(1).view(-1, 1, 1) / channels
        image = torch.einsum("bl,lhw->bhw", scores, shares)
        return image.unsqueeze(1).repeat(1, channels, 1, 1)

    def collect(self, images: Tensor) -> Tensor:
        """Return the scores (B, L) of tokens by those of pixels (B, C, H, W): a pixel's is shared by all its tokens."""
        shares = self.fields.to(images) / self.fields.sum(0).clamp_min(1)
        return torch.einsum("bchw,lhw->bl", images, shares)

    @cached_property
    def places(self) -> Tensor:
        """The token of each patch, (rows, columns).

        Raises:
            InvalidInputError: If the patches do not form a grid.
        """
        reads = self.fields.any(2).any(1)
        corners = [
            (int(field.any(1).int().argmax()), int(field.any(0).int().argmax()), token)
            for token, field in enumerate(self.fields.cpu())
            if reads[token]
        ]
        rows, columns = (sorted({corner[axis] for corner in corners}) for axis in (0, 1))
        number = {(top, left): token for top, left, token in corners}
        if len(corners) != len(rows) * len(columns) or len(number) != len(corners):
            raise InvalidInputError(
                f"The {len(corners)} tokens that read pixels do not form a grid of patches, so there is no patch "
                "grid of scores. Leave out `patches`."
            )
        return torch.tensor([[number[top, left] for left in columns] for top in rows])

    def grid(self, scores: Tensor) -> Tensor:
        """Return scores (B, L) in the form of the grid, (B, rows, columns)."""
        return scores[:, self.places.to(scores.device)]


@dataclass(frozen=True)
class Form:
    """The form in which the scores of these inputs are returned.

    Args:
        model: The model that holds the mixers.
        forward_func: What runs it.
        inputs: Token ids (B, L), embeddings (B, L, E) or images (B, C, H, W).
        args: The additional forward arguments.
        grid: Whether images' scores are those of patches, (B, rows, columns).

    Raises:
        InvalidInputError: If a grid of patches is asked for, and the inputs are not images.
    """

    model: nn.Module
    forward_func: Callable[..., Any]
    inputs: Tensor
    args: tuple[Any, ...] | None
    grid: bool

    def __post_init__(self) -> None:
        if self.grid and not self._images:
            raise InvalidInputError(
                f"Only images (batch, channels, height, width) have a grid of patches; inputs has shape "
                f"{tuple(self.inputs.shape)}. Leave out `patches`."
            )

    def of_tokens(self, scores: Tensor) -> Tensor:
        """Return the scores of tokens (B, L) in the form of the inputs: components carry equal shares."""
        if self._images:
            patches = self._patches
            return (patches.grid(scores) if self.grid else patches.spread(scores, self.inputs.shape[1])).to(self.inputs)
        if self.inputs.is_floating_point():
            width = self.inputs.shape[-1]
            return (scores / width).to(self.inputs.dtype).unsqueeze(-1).repeat(1, 1, width)
        return scores

    def of_components(self, scores: Tensor) -> Tensor:
        """Return the scores of what enters the model, (B, L, E) or (B, C, H, W), in the form of the inputs."""
        if not self.inputs.is_floating_point():
            return scores.sum(-1)
        scores = scores.to(self.inputs.dtype)
        return self._patches.grid(self._patches.collect(scores)) if self.grid else scores

    def position(self, query: int | tuple[int, int] | Tensor | None) -> int | Tensor | None:
        """Return the explained position; that of a patch (row, column) by its token's number.

        Raises:
            InvalidInputError: If there is no such patch.
        """
        if not isinstance(query, tuple):
            return query
        if not self._images:
            raise InvalidInputError(f"query {query} is a patch, but the inputs are no images. Pass a position.")
        places = self._patches.places
        if len(query) != 2 or not all(0 <= index < size for index, size in zip(query, places.shape)):
            raise InvalidInputError(
                f"query {query} lies outside the grid of {places.shape[0]} x {places.shape[1]} patches."
            )
        return int(places[query])

    @property
    def _images(self) -> bool:
        return self.inputs.is_floating_point() and self.inputs.dim() == 4

    @cached_property
    def _patches(self) -> Patches:
        args = select_examples(self.args or (), len(self.inputs), slice(0, 1))
        return find_patches(self.model, self.forward_func, self.inputs[:1], args)


_KNOWN: WeakKeyDictionary[nn.Module, WeakKeyDictionary[Any, dict[torch.Size, Patches]]] = WeakKeyDictionary()


def find_patches(model: nn.Module, forward_func: Callable[..., Any], image: Tensor, args: tuple[Any, ...]) -> Patches:
    """Measure which pixels each token that enters the first mixer reads: those that it has a gradient at.

    The gradients are those at noise and at its negative, so that no pixel's value hides it.

    Args:
        model: The model that holds the mixers.
        forward_func: What runs it.
        image: (1, C, H, W); the pixels' values do not matter.
        args: The additional forward arguments.

    Raises:
        InvalidInputError: If no token reads a pixel, or a pixel is NaN or infinite.
        ModelStateError: If the model is training.

    Cost: two forward passes and 2 L backward passes of what comes before the first mixer, once for each model, function
    and size of images.
    """
    known = _known(model, forward_func)
    size = image.shape[1:]
    if size not in known:
        refuse_bad_state(model)
        refuse_bad_inputs(model, image)
        noise = torch.randn(image.shape, generator=torch.Generator().manual_seed(0)).to(image)
        fields = _fields(model, forward_func, noise, args) | _fields(model, forward_func, -noise, args)
        if not bool(fields.any()):
            raise InvalidInputError(
                "The model's first layer reads nothing of these images, so their pixels cannot be explained. Check "
                "that forward_func runs this model on the inputs as they are."
            )
        known[size] = Patches(fields)
    return known[size]


def _known(model: nn.Module, forward_func: Callable[..., Any]) -> dict[torch.Size, Patches]:
    """Return what was measured before, by the size of images."""
    try:
        return _KNOWN.setdefault(model, WeakKeyDictionary()).setdefault(forward_func, {})
    except TypeError:  # a function that cannot be remembered: not hashable, or without weak references
        return {}


def _fields(model: nn.Module, forward_func: Callable[..., Any], image: Tensor, args: tuple[Any, ...]) -> Tensor:
    """Return where each token has a gradient with respect to the image (1, C, H, W), shape (L, H, W)."""
    pixels = image.detach().clone().requires_grad_()
    with torch.enable_grad(), record_mixers(model, hold=True) as calls:
        scores(forward_func, pixels, *args)
    x = calls[0].x
    weights = torch.randn(x.shape[-1], generator=torch.Generator().manual_seed(0)).to(x)
    nowhere = torch.zeros_like(image)
    if not x.requires_grad:
        return nowhere.any(1).expand(x.shape[1], -1, -1)
    tokens = (x * weights).sum((0, 2))
    gradients = [torch.autograd.grad(t, pixels, retain_graph=True, allow_unused=True)[0] for t in tokens]
    return torch.cat([(nowhere if g is None else g).ne(0).any(1) for g in gradients])
