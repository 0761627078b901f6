"""Features of the inputs (tokens, pixels, patches), their scores, and their order by score."""

from __future__ import annotations

from typing import Any
from zlib import crc32

import torch
from torch import Generator, Tensor

from captum_ssm.errors import InvalidInputError


def finite_tensor(value: Any, name: str) -> Tensor:
    """Return the one tensor of a result of Captum's methods, detached.

    Args:
        value: A tensor, or a tuple of one.
        name: The name of the argument, for the message.

    Returns:
        The tensor.

    Raises:
        InvalidInputError: If the value is anything else, or has NaN or infinite entries.
    """
    tensors = value if isinstance(value, tuple) else (value,)
    if len(tensors) != 1 or not isinstance(tensors[0], Tensor):
        raise InvalidInputError(
            f"{name} must be a tensor or a tuple of one, not {type(value).__name__}. Measure one input at a time."
        )
    if not bool(tensors[0].isfinite().all()):
        raise InvalidInputError(f"{name} has NaN or infinite entries, which have no rank. Check what made them.")
    return tensors[0].detach()


def sum_components(attributions: Any, shape: tuple[int, ...], name: str = "attributions") -> Tensor:
    """Sum the scores of a token over its components, or of a pixel over its channels.

    Args:
        attributions: Scores (B, L) or (B, L, E) of tokens, (B, H, W) or (B, C, H, W) of pixels.
        shape: The shape of the result: (B, L) or (B, H, W).
        name: The name of the argument, for the message.

    Returns:
        One score for each token (B, L) or each pixel (B, H, W), in 32 bits or more.

    Raises:
        InvalidInputError: If the attributions do not fit the shape, or have NaN or infinite entries.
    """
    tensor = finite_tensor(attributions, name)
    tensor = tensor.to(torch.promote_types(tensor.dtype, torch.float32))
    if tensor.dim() == len(shape) + 1:
        tensor = tensor.sum(-1 if len(shape) == 2 else 1)
    if tensor.shape != shape:
        wanted = "(batch, tokens), or (batch, tokens, width)"
        if len(shape) == 3:
            wanted = "(batch, height, width), or (batch, channels, height, width)"
        got = tuple(finite_tensor(attributions, name).shape)
        raise InvalidInputError(
            f"{name} must have the shape {wanted} with {tuple(shape)} in these places, not {got}. Pass what the "
            "attribution method returned for these very inputs."
        )
    return tensor


def feature_scores(attributions: Any, inputs: Tensor, patch_size: int) -> Tensor:
    """Return one score for each feature of the inputs, (B, N).

    Args:
        attributions: Scores (B, L) or (B, L, E) of tokens, (B, H, W) or (B, C, H, W) of pixels.
        inputs: Token ids (B, L), embeddings (B, L, E) or images (B, C, H, W).
        patch_size: Side of the square patches that an image is cut into, row by row.

    Returns:
        (B, N): N tokens, or N patches, whose score is the sum over their pixels.

    Raises:
        InvalidInputError: If the shapes do not fit, there is no feature, or a number is NaN or infinite.
    """
    if inputs.dim() not in (2, 3, 4) or inputs.numel() == 0:
        raise InvalidInputError(
            "inputs must be token ids (batch, tokens), embeddings (batch, tokens, width) or images (batch, channels, "
            f"height, width), and not empty; they have shape {tuple(inputs.shape)}."
        )
    if inputs.dim() < 4:
        if patch_size != 1:
            raise InvalidInputError("patch_size is for images (batch, channels, height, width); leave it out for text.")
        return sum_components(attributions, tuple(inputs.shape[:2]))
    size, _, height, width = inputs.shape
    if patch_size < 1 or height % patch_size or width % patch_size:
        raise InvalidInputError(f"Patches of {patch_size} pixels do not tile images of {height} by {width} pixels.")
    pixels = sum_components(attributions, (size, height, width))
    return pixels.unflatten(2, (-1, patch_size)).unflatten(1, (-1, patch_size)).sum((2, 4)).flatten(1)


def expand_features(features: Tensor, inputs: Tensor, patch_size: int) -> Tensor:
    """Expand one value for each feature to the entries of the inputs.

    Args:
        features: (R, N) one value for each feature.
        inputs: Token ids (B, L), embeddings (B, L, E) or images (B, C, H, W), for their shape.
        patch_size: Side of the square patches of an image.

    Returns:
        One value for each entry, in a shape that broadcasts to R examples of the inputs.
    """
    if inputs.dim() == 2:
        return features
    if inputs.dim() == 3:
        return features.unsqueeze(-1)
    patches = features.unflatten(1, (inputs.shape[2] // patch_size, -1)).unsqueeze(1)
    return patches.repeat_interleave(patch_size, 2).repeat_interleave(patch_size, 3)


def example_generator(content: Tensor, seed: int) -> Generator:
    """Return a random generator for an example, seeded by its content and a seed.

    Args:
        content: The entries of one example, of any shape.
        seed: A number, by which the seeds of all examples change.

    Returns:
        A generator that is the same in any batch.
    """
    raw = content.detach().to("cpu").contiguous().flatten().view(torch.uint8).numpy().tobytes()
    return Generator().manual_seed(crc32(raw, seed % 2**32))


def tie_breakers(inputs: Tensor, removable: Tensor, seed: int, patch_size: int = 1) -> Tensor:
    """Draw the numbers by which features of equal score are ordered.

    The numbers of an example depend on its content, not on its batch or padding, and differ between examples: numbers
    drawn by position would, over a data set, prefer some positions.

    Args:
        inputs: Token ids (B, L), embeddings (B, L, E) or images (B, C, H, W).
        removable: (B, N) bool, True at features that may be removed.
        seed: A number, by which all draws change.
        patch_size: Side of the square patches of an image.

    Returns:
        (B, N) a random number in [0, 1) for each removable feature, 0 for any other.
    """
    numbers = torch.zeros(removable.shape, dtype=torch.float64, device="cpu")
    mask = expand_features(removable, inputs, patch_size).expand(inputs.shape)
    for example, features, entries, row in zip(inputs, removable.cpu(), mask, numbers):
        generator = example_generator(example[entries], seed)
        row[features] = torch.rand(int(features.sum()), generator=generator, dtype=torch.float64, device="cpu")
    return numbers.to(removable.device)


def ranks(scores: Tensor, removable: Tensor, ties: Tensor) -> Tensor:
    """Return the rank of each feature in descending order of the scores.

    Args:
        scores: (B, N) one score for each feature.
        removable: (B, N) bool, True at features that may be removed.
        ties: (B, N) numbers by which features of equal score are ordered.

    Returns:
        (B, N) ranks from 0; features that are not removable come last.
    """
    order = ties.argsort(1)
    positive_zero = 0.0  # a sort may order -0.0 before it
    masked_scores = (scores + positive_zero).masked_fill(~removable, -torch.inf).gather(1, order)
    order = order.gather(1, masked_scores.argsort(dim=1, descending=True, stable=True))
    return order.argsort(1)
