"""Weights of softmax attention, read from the layer's own forward pass.

Rotary positions, norms of queries and keys, windows and sparse selections differ by family, and enter nothing but the
weights. So an isolated copy of the layer computes them: the user's layer runs the implementation that it was loaded
with, and most of these return no weights.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_ssm.errors import UnsupportedModelError
from captum_ssm.layers.isolated import cast_like, isolated_copy

_MASKED = -1e4
"""Largest number that a library or a user adds to the score of a hidden key."""

_CACHES = ("past_key_values", "use_cache")

_SELECTORS = ("build_attention_mask_from_topk", "indexer")
"""Sources of a sparse layer's mask: a method of GLM-5's attention, a submodule of Qwen4's."""


def attention_weights(mixer: nn.Module, x: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Compute the weights of an attention layer's call, in the type of ``x`` and differentiable in it.

    Rows of padding are 0, and so is the row of a token for which a sparse layer selects no key.

    Args:
        mixer: Attention layer of transformers.
        x: Input (B, L, E).
        kwargs: Other arguments of the call. A cache among them is not used.

    Returns:
        (B, H, L, L); row i is the query, column j the key.

    Raises:
        UnsupportedModelError: If the mask of the call is no tensor, as flex attention has it, or the layer calls a
            kernel that gives no weights.

    Cost: O(L²·D) time and B·H·L² numbers.
    """
    mask = _additive(kwargs.get("attention_mask"), x, getattr(mixer, "sliding_window", None))
    padding = (mask <= _MASKED).diagonal(dim1=-2, dim2=-1).unsqueeze(-1)  # a key that is hidden from its own query
    arguments = {name: value for name, value in kwargs.items() if name not in _CACHES}
    layer = isolated_copy(mixer, x, _Eager)
    selector = next((name for name in _SELECTORS if hasattr(mixer, name)), None)
    if selector is not None:
        selected = _selected(mixer, selector, x, arguments)
        mask = _additive(selected, x)
        selection = torch.ones_like(selected) if selected.dtype == torch.bool else mask
        vars(layer).update(dict.fromkeys(_SELECTORS, lambda *_, **__: selection))
    weights = _weights_of_eager_code(layer, x, {**arguments, "attention_mask": mask})
    if weights is None:
        weights = _weights_of_torch(layer, x, arguments)
    blind = (mask <= _MASKED).all(-1, keepdim=True)  # the softmax over hidden keys alone is no attention
    no_attention = padding | blind
    return weights.masked_fill(no_attention, 0) if bool(no_attention.any()) else weights


def visible_keys(L: int, device: torch.device, window: int | None = None) -> Tensor:
    """Build the causal mask.

    Args:
        L: Number of tokens.
        device: Device of the mask.
        window: Number of keys that a token sees at most; None for all.

    Returns:
        (L, L), True where query i sees key j.
    """
    causal = torch.ones(L, L, dtype=torch.bool, device=device).tril()
    return causal.triu(1 - window) if window else causal


def _selected(mixer: nn.Module, selector: str, x: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Record the mask that a sparse layer selects.

    A selection may depend on the last digit, so it is the one that the layer makes in its own type, without a gradient.

    Args:
        mixer: The layer.
        selector: Name of the method or submodule that returns the mask.
        x: Input (B, L, E).
        arguments: Other arguments of the call.

    Returns:
        (B, 1, L, L), boolean or additive.
    """
    layer = isolated_copy(mixer, None, _Eager)
    select, results = getattr(layer, selector), []

    def record(*args: Any, **kwargs: Any) -> Tensor:
        results.append(select(*args, **kwargs))
        return results[0]

    vars(layer)[selector] = record
    narrow = x.to(next(mixer.parameters()).dtype)
    with torch.no_grad():
        type(mixer).forward(layer, narrow, **cast_like(dict(arguments), narrow))
    return results[0]


def _additive(mask: Any, x: Tensor, window: int | None = None) -> Tensor:
    """Build the additive mask of a call: the causal one where the call left it to the kernel.

    Args:
        mask: None or (B, L) if the kernel itself is causal, else (B, 1, L, L), True or 0 where a key is visible.
        x: Input (B, L, E).
        window: Number of keys that a token sees at most; None for all.

    Returns:
        (B or 1, 1, L, L), added to the scores of the keys.

    Raises:
        UnsupportedModelError: If the mask is no tensor.
    """
    if not (mask is None or isinstance(mask, Tensor)):
        raise UnsupportedModelError(
            f"An attention mask of type {type(mask).__name__} cannot be read. Load the model with another attention: "
            "attn_implementation='sdpa' or 'eager'."
        )
    if mask is None or mask.dim() == 2:
        visible = visible_keys(x.shape[1], x.device, window)
        mask = visible[None, None] if mask is None else visible & mask.to(visible)[:, None, None]
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, -math.inf)
    return mask.to(x).clamp(min=torch.finfo(torch.float32).min)  # finite also where the softmax runs in float32


def _weights_of_eager_code(layer: Any, x: Tensor, arguments: Mapping[str, Any]) -> Tensor | None:
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


def _weights_of_torch(layer: Any, x: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Read the weights of a layer that calls torch's attention itself, as some of earlier releases do.

    Args:
        layer: The isolated copy of the layer.
        x: Input (B, L, E).
        arguments: Other arguments of the call.

    Returns:
        (B, H, L, L).

    Raises:
        UnsupportedModelError: If the layer calls something else.
    """
    with _TorchAttention() as attention:
        type(layer).forward(layer, x, **cast_like(arguments, x))
    if attention.weights is None:
        raise UnsupportedModelError(
            f"The kernel that a {type(layer).__name__} layer calls gives no weights. Load the model with another "
            "attention: attn_implementation='sdpa' or 'eager'."
        )
    return attention.weights


class _TorchAttention(TorchFunctionMode):
    """Keeps the weights of the last call of torch's attention."""

    weights: Tensor | None = None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function; if it is torch's attention, compute its weights too."""
        if func is F.scaled_dot_product_attention:
            self.weights = _weights(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))


def _weights(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, **options: Any
) -> Tensor:
    """Compute the weights (B, H, L, L) of a call of torch's attention."""
    mask = torch.zeros_like(query[..., :1]) if attn_mask is None else attn_mask
    if is_causal:
        mask = visible_keys(query.shape[-2], query.device)
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=query.dtype).masked_fill(~mask, -math.inf)
    return (query @ key.mT * (options.get("scale") or query.shape[-1] ** -0.5) + mask).softmax(-1)


class _Eager:
    """A layer's configuration, except for the attention: the implementation that returns its weights."""

    _attn_implementation = "eager"

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)
