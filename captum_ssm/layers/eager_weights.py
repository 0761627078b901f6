"""The weights of a softmax attention whose code computes them itself."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


def weights_of_eager_code(layer: Any, x: Tensor, arguments: Mapping[str, Any]) -> Tensor | None:
    """Read the weights of a layer that computes them itself.

    Args:
        layer: The isolated copy of the layer.
        x: Input (B, L, E).
        arguments: Other arguments of the call.

    Returns:
        (B, H, L, L); None if the layer returns no weights.
    """
    try:
        with _UntilWeights(x.shape[1]):
            output = type(layer).forward(layer, x, **arguments)
    except _WeightsReachedError as found:
        return found.weights
    return None if isinstance(output, Tensor) else output[1]


class _WeightsReachedError(Exception):
    """The weights, at which a layer's code is left."""

    def __init__(self, weights: Tensor) -> None:
        super().__init__()
        self.weights = weights


class _UntilWeights(TorchFunctionMode):
    """Leaves the code of a layer where its weights meet the values: all behind is the decomposition's.

    Args:
        length: L, the number of tokens.
    """

    def __init__(self, length: int) -> None:
        super().__init__()
        self.matrix = (length, length)
        self.after_softmax = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, unless it multiplies the weights with the values."""
        if func is torch.matmul and self.after_softmax and self._are_weights(args[0]):
            raise _WeightsReachedError(args[0])
        self.after_softmax |= func is F.softmax
        return func(*args, **(kwargs or {}))

    def _are_weights(self, factor: Tensor) -> bool:
        """Whether a factor has the shape of weights, and no query of L channels behind an indexer's softmax."""
        return factor.dim() == 4 and factor.shape[-2:] == self.matrix and bool((factor >= 0).all())
