"""Scores that know nothing of what an input says; a method that does no better has explained nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from captum_ssm.errors import InvalidInputError
from captum_ssm.metrics.features import example_seed, one_tensor
from captum_ssm.network.inputs import single_tensor


def random_attributions(inputs: Any, seed: int = 0) -> Tensor:
    """Return random scores of the inputs' shape, uniform in [0, 1).

    Args:
        inputs: Token ids (B, L), embeddings (B, L, E), images (B, C, H, W), or a tuple of one of them.
        seed: Another seed, other scores.

    Returns:
        Scores drawn from the seed and each example's own content: the same in any batch, others for each example.

    Example:
        >>> import torch
        >>> random_attributions(torch.tensor([[1, 2, 3], [4, 5, 6]])).shape
        torch.Size([2, 3])
    """
    tensor = single_tensor(inputs)
    drawn = [torch.rand(example.shape, generator=example_seed(example, seed)) for example in tensor]
    return torch.stack(drawn).to(tensor.device)


def position_attributions(attributions: Any, mask: Tensor | None = None) -> Tensor:
    """Return what is left of a method's scores without the input: at each position their mean over other examples.

    Args:
        attributions: (B, ...) of two examples or more, or a tuple of one such tensor.
        mask: (B, L), 0 at padding, which is left out of the means. Positions are counted from the left: align what
            belongs together, such as the tokens that ask.

    Returns:
        Scores of the same shape; 0 where no other example has this position.

    Raises:
        InvalidInputError: If there is one example only, or the mask does not fit.

    Example:
        >>> import torch
        >>> position_attributions(torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 4.0]]))
        tensor([[4., 3.],
                [3., 2.],
                [2., 1.]])
    """
    scores = one_tensor(attributions, "attributions")
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if scores.dim() < 2 or len(scores) < 2:
        raise InvalidInputError(
            f"Positions are told from contents by comparing examples, so two or more are needed, not shape "
            f"{tuple(scores.shape)}."
        )
    real = torch.ones(scores.shape[:2]) if mask is None else mask
    if real.shape != scores.shape[:2]:
        raise InvalidInputError(f"mask must have shape {tuple(scores.shape[:2])}, not {tuple(real.shape)}.")
    real = real.bool().to(scores)[(..., *[None] * (scores.dim() - 2))]
    others = (scores * real).sum(0) - scores * real
    return others / (real.sum(0) - real).clamp(min=1)
