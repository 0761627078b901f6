"""The shape in which scores are returned: of tokens, of components, or of the pixels and patches of an image."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from torch import Tensor, nn

from captum_ssm.errors import InvalidInputError
from captum_ssm.network.inputs import select_examples
from captum_ssm.network.patches import Patches, find_patches


@dataclass(frozen=True)
class ScoreShape:
    """The shape in which the scores of these inputs are returned.

    Args:
        model: The model that holds the mixers.
        forward_func: The callable that runs it.
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
        if self.grid and not self._are_images:
            raise InvalidInputError(
                f"Only images (batch, channels, height, width) have a grid of patches; inputs has shape "
                f"{tuple(self.inputs.shape)}. Leave out `patches`."
            )

    def from_tokens(self, scores: Tensor) -> Tensor:
        """Return the scores of tokens (B, L) in the shape of the inputs: components carry equal shares."""
        if self._are_images:
            patches = self._patches
            return (patches.grid(scores) if self.grid else patches.spread(scores)).to(self.inputs)
        if self.inputs.is_floating_point():
            width = self.inputs.shape[-1]
            return (scores / width).to(self.inputs.dtype).unsqueeze(-1).repeat(1, 1, width)
        return scores

    def from_components(self, scores: Tensor) -> Tensor:
        """Return the scores of embeddings (B, L, E) or pixels (B, C, H, W) in the shape of the inputs."""
        if not self.inputs.is_floating_point():
            return scores.sum(-1)
        scores = scores.to(self.inputs.dtype)
        return self._patches.grid(self._patches.collect(scores)) if self.grid else scores

    def position(self, query: int | tuple[int, int] | Tensor | None) -> int | Tensor | None:
        """Return the explained position; for a patch (row, column) the number of its token.

        Raises:
            InvalidInputError: If there is no such patch.
        """
        if not isinstance(query, tuple):
            return query
        if not self._are_images:
            raise InvalidInputError(f"query {query} is a patch, but the inputs are no images. Pass a position.")
        places = self._patches.places
        if len(query) != 2 or not all(0 <= index < size for index, size in zip(query, places.shape)):
            raise InvalidInputError(
                f"query {query} lies outside the grid of {places.shape[0]} x {places.shape[1]} patches."
            )
        return int(places[query])

    @property
    def _are_images(self) -> bool:
        return self.inputs.is_floating_point() and self.inputs.dim() == 4

    @cached_property
    def _patches(self) -> Patches:
        args = select_examples(self.args or (), len(self.inputs), slice(0, 1))
        return find_patches(self.model, self.forward_func, self.inputs[:1], args)
