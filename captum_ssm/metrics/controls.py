"""Controls: scores that ignore the content of an input; a method that ranks no higher has explained nothing."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from captum_ssm.errors import InvalidInputError
from captum_ssm.metrics.features import example_generator, finite_tensor
from captum_ssm.network.inputs import single_tensor


def random_attributions(inputs: Any, seed: int = 0) -> Tensor:
    """Return random scores of the inputs' shape, uniform in [0, 1).

    Args:
        inputs: Token ids (B, L), embeddings (B, L, E), images (B, C, H, W), or a tuple of one of them.
        seed: The scores depend on this seed.

    Returns:
        Scores of the inputs' shape, drawn from the seed and the content of each example: they differ between examples,
        and do not depend on the batch that an example is in.

    Raises:
        InvalidInputError: If inputs is a tuple of several tensors.
        AssertionError: If inputs is neither a tensor nor a tuple of tensors.

    Example:
        >>> import torch
        >>> random_attributions(torch.tensor([[1, 2, 3], [4, 5, 6]])).shape
        torch.Size([2, 3])
    """
    tensor = single_tensor(inputs)
    rows = [torch.rand(example.shape, generator=example_generator(example, seed), device="cpu") for example in tensor]
    return torch.stack(rows).to(tensor.device)


def position_attributions(attributions: Any, mask: Tensor | None = None) -> Tensor:
    """Return scores that depend on the position alone: a method's mean score there over all other examples.

    Args:
        attributions: (B, L, ...) scores of two examples or more, or a tuple of one tensor.
        mask: (B, L) 0 at padding, which the means leave out; None: no padding. Positions are counted from the left:
            align tokens with the same role, such as the token at which the answer is read.

    Returns:
        Scores of the attributions' shape; 0 where no other example has this position.

    Raises:
        InvalidInputError: If there is only one example, or the mask does not fit.

    Example:
        >>> import torch
        >>> position_attributions(torch.tensor([[1.0, 0.0], [3.0, 2.0], [5.0, 4.0]]))
        tensor([[4., 3.],
                [3., 2.],
                [2., 1.]])
    """
    scores = finite_tensor(attributions, "attributions")
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    if scores.dim() < 2 or len(scores) < 2:
        raise InvalidInputError(
            f"Positions are told from contents by comparing examples, so two or more are needed, not shape "
            f"{tuple(scores.shape)}."
        )
    mask = torch.ones(scores.shape[:2], device=scores.device) if mask is None else mask
    if mask.shape != scores.shape[:2]:
        raise InvalidInputError(f"mask must have shape {tuple(scores.shape[:2])}, not {tuple(mask.shape)}.")
    mask = mask.bool().to(scores)[(..., *[None] * (scores.dim() - 2))]  # (B, L, 1, ...)
    others = (scores * mask).sum(0) - scores * mask
    return others / (mask.sum(0) - mask).clamp(min=1)
