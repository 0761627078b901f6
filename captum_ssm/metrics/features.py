"""Inputs cut into features (tokens, pixels, patches), their scores, and the order that the scores put them in."""

from __future__ import annotations

from typing import Any
from zlib import crc32

import torch
from torch import Generator, Tensor

from captum_ssm.errors import InvalidInputError


def one_tensor(value: Any, name: str) -> Tensor:
    """Return the tensor of a tensor or a tuple of one, detached, as Captum's methods return it.

    Raises:
        InvalidInputError: If it is anything else, or has NaN or infinite entries.
    """
    tensors = value if isinstance(value, tuple) else (value,)
    if len(tensors) != 1 or not isinstance(tensors[0], Tensor):
        raise InvalidInputError(
            f"{name} must be a tensor or a tuple of one, not {type(value).__name__}. Measure one input at a time."
        )
    if not bool(tensors[0].isfinite().all()):
        raise InvalidInputError(f"{name} has NaN or infinite entries, which have no rank. Check what made them.")
    return tensors[0].detach()


def summed(attributions: Any, shape: tuple[int, ...], name: str = "attributions") -> Tensor:
    """Return one score for each token (B, L) or each pixel (B, H, W), in 32 bits or more.

    Args:
        attributions: (B, L) or (B, L, E); (B, H, W) or (B, C, H, W). A token's score is the sum over its components,
            a pixel's over its channels.
        shape: What is wanted.
        name: What they are, for the message.

    Raises:
        InvalidInputError: If they have another shape, or NaN or infinite entries.
    """
    tensor = one_tensor(attributions, name)
    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    if tensor.dim() == len(shape) + 1:
        tensor = tensor.sum(-1 if len(shape) == 2 else 1)
    if tensor.shape != shape:
        wanted = "(batch, tokens), or (batch, tokens, width)"
        if len(shape) == 3:
            wanted = "(batch, height, width), or (batch, channels, height, width)"
        got = tuple(one_tensor(attributions, name).shape)
        raise InvalidInputError(
            f"{name} must have the shape {wanted} with {tuple(shape)} in these places, not {got}. Pass what the "
            "attribution method returned for these very inputs."
        )
    return tensor


def feature_scores(attributions: Any, inputs: Tensor, patch_size: int) -> Tensor:
    """Return one score for each feature of the inputs, (B, N).

    Args:
        attributions: Of tokens or images, see :func:`summed`.
        inputs: Token ids (B, L), embeddings (B, L, E) or images (B, C, H, W).
        patch_size: Side of the square patches that an image is cut into, row by row; a patch has the sum of its pixels.

    Raises:
        InvalidInputError: If the shapes do not fit, there is no feature, or something is NaN or infinite.
    """
    if inputs.dim() not in (2, 3, 4) or inputs.numel() == 0:
        raise InvalidInputError(
            "inputs must be token ids (batch, tokens), embeddings (batch, tokens, width) or images (batch, channels, "
            f"height, width), and not empty; they have shape {tuple(inputs.shape)}."
        )
    if inputs.dim() < 4:
        if patch_size != 1:
            raise InvalidInputError("patch_size is for images (batch, channels, height, width); leave it out for text.")
        return summed(attributions, tuple(inputs.shape[:2]))
    size, _, height, width = inputs.shape
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise InvalidInputError(f"Patches of {patch_size} pixels do not tile images of {height} by {width} pixels.")
    pixels = summed(attributions, (size, height, width))
    return pixels.unflatten(2, (-1, patch_size)).unflatten(1, (-1, patch_size)).sum((2, 4)).flatten(1)


def spread(features: Tensor, inputs: Tensor, patch_size: int) -> Tensor:
    """Return what is said of features (R, N) for every entry of inputs like these, (R, ...) or broadcast to it."""
    if inputs.dim() == 2:
        return features
    if inputs.dim() == 3:
        return features.unsqueeze(-1)
    patches = features.unflatten(1, (inputs.shape[2] // patch_size, -1)).unsqueeze(1)
    return patches.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)


def example_seed(content: Tensor, seed: int) -> Generator:
    """Return a random generator that depends on an example's content and a seed, but not on the batch it is in."""
    raw = content.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return Generator().manual_seed(crc32(raw, seed % 2**32))


def draws(inputs: Tensor, free: Tensor, seed: int, patch_size: int = 1) -> Tensor:
    """Return a random number in [0, 1) for each feature, (B, N), from each example's free features and the seed.

    So the numbers of an example are the same in any batch, with any padding, and differ between examples: a draw of
    numbers by position would, over a data set, be a preference for some positions.
    """
    drawn = torch.zeros(free.shape, dtype=torch.float64)
    where = spread(free, inputs, patch_size).expand(inputs.shape)
    for example, features, entries, row in zip(inputs, free.cpu(), where, drawn):
        generator = example_seed(example[entries], seed)
        row[features] = torch.rand(int(features.sum()), generator=generator, dtype=torch.float64)
    return drawn.to(free.device)


def ranks(scores: Tensor, free: Tensor, ties: Tensor) -> Tensor:
    """Return the place of each feature in descending order of the scores, from 0; those that are not free come last.

    Args:
        scores: (B, N).
        free: (B, N) bool.
        ties: (B, N) numbers by which equal scores are ordered.
    """
    order = ties.argsort(1)
    positive_zero = 0.0  # a sort may tell -0.0 from it
    sought = (scores + positive_zero).masked_fill(~free, -torch.inf).gather(1, order)
    order = order.gather(1, sought.argsort(dim=1, descending=True, stable=True))
    return order.argsort(1)
