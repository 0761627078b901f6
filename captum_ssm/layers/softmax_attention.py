"""Softmax attention, read from the layer's own forward pass.

Rotary positions, norms of queries and keys, windows and sparse selections differ by family, and enter nothing but the
weights. So an isolated copy of the layer computes what these are made of, whatever implementation of attention the
user's layer was loaded with: it is left where it calls torch's function. A layer that does not call it computes the
weights itself, and they are read where they meet the values.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_ssm.errors import UnsupportedModelError
from captum_ssm.layers.attention_masks import additive_mask, as_scores, attending, causal_mask
from captum_ssm.layers.eager_weights import weights_of_eager_code
from captum_ssm.layers.isolated import cast_like, isolated_copy, without_cache
from captum_ssm.operators import Attention, SoftmaxAttention

_SELECTORS = ("build_attention_mask_from_topk", "indexer")
"""Sources of a sparse layer's mask: a method of GLM-5's attention, a submodule of Qwen4's."""


def softmax_attention(
    mixer: nn.Module, x: Tensor, kwargs: Mapping[str, Any], head_size: int
) -> SoftmaxAttention | Attention:
    """Read the attention of a layer's call, in the type of ``x`` and differentiable in it.

    Rows of padding are 0, and so is the row of a token for which a sparse layer selects no key.

    Args:
        mixer: Attention layer of transformers.
        x: Input (B, L, E).
        kwargs: Other arguments of the call. A cache among them is not used.
        head_size: P, the channels of a head's values.

    Returns:
        The attention of H heads; with given weights if the layer computes them itself.

    Raises:
        UnsupportedModelError: If the mask of the call is no tensor, as flex attention has it, or the layer calls a
            kernel that gives no weights.

    Cost: one run of the layer as far as its queries and keys; O(L²·D) time and B·H·L² numbers if it computes weights.
    """
    arguments = without_cache(kwargs)
    mask = additive_mask(kwargs.get("attention_mask"), x, getattr(mixer, "sliding_window", None))
    visible, selectors = mask, {}
    selector = next((name for name in _SELECTORS if hasattr(mixer, name)), None)
    if selector is not None:
        selected = _selected(mixer, selector, x, arguments)
        visible = additive_mask(selected, x)
        selection = torch.ones_like(selected) if selected.dtype == torch.bool else visible
        selectors = dict.fromkeys(_SELECTORS, lambda *_, **__: selection)
    attends = attending(mask, visible)

    def layer(implementation: str) -> Any:
        copy = isolated_copy(mixer, x, lambda config: _Configured(config, implementation))
        vars(copy).update(selectors)
        return copy

    call = _call_of_torch(layer("sdpa"), x, {**arguments, "attention_mask": visible})
    if call is not None:
        return call.attention(attends, head_size)
    seen = causal_mask(x) if visible is None else visible
    weights = weights_of_eager_code(layer("eager"), x, {**arguments, "attention_mask": seen})
    if weights is None:
        raise UnsupportedModelError(
            f"The kernel that a {type(mixer).__name__} layer calls gives no weights. Load the model with another "
            "attention: attn_implementation='sdpa' or 'eager'."
        )
    return Attention(weights if attends is None else weights * attends, head_size=head_size)


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
    layer = isolated_copy(mixer, None, lambda config: _Configured(config, "eager"))
    select, results = getattr(layer, selector), []

    def record(*args: Any, **kwargs: Any) -> Tensor:
        results.append(select(*args, **kwargs))
        return results[0]

    vars(layer)[selector] = record
    narrow = x.to(next(mixer.parameters()).dtype)
    with torch.no_grad():
        type(mixer).forward(layer, narrow, **cast_like(dict(arguments), narrow))
    return results[0]


# --- Layers that call torch's attention ---------------------------------------------------------------------------


class _Call(NamedTuple):
    """A call of torch's attention, with its arguments."""

    query: Tensor
    key: Tensor
    value: Tensor
    attn_mask: Tensor | None = None
    dropout_p: float = 0.0
    is_causal: bool = False
    scale: float | None = None
    enable_gqa: bool = False

    def attention(self, attends: Tensor | None, head_size: int) -> SoftmaxAttention:
        """Return the attention, with a key for each query's head.

        Args:
            attends: See :class:`SoftmaxAttention`.
            head_size: P, the channels of a head's values.
        """
        keys, mask = self.key, self.attn_mask
        queries = self.query.reshape(len(keys), -1, keys.shape[2], keys.shape[3])  # of one token, heads may be packed
        keys = keys.repeat_interleave(queries.shape[1] // keys.shape[1], 1)
        return SoftmaxAttention(
            queries,
            keys,
            keys.shape[3] ** -0.5 if self.scale is None else self.scale,
            mask=None if mask is None else as_scores(mask, keys),
            sees_earlier=self.is_causal,
            attends=attends,
            head_size=head_size,
        )


class _CallReachedError(Exception):
    """The call of torch's attention, at which a layer's code is left."""

    def __init__(self, call: _Call) -> None:
        super().__init__()
        self.call = call


class _UntilTorchAttention(TorchFunctionMode):
    """Leaves the code of a layer where it calls torch's attention."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function, unless it is torch's attention."""
        if func is F.scaled_dot_product_attention:
            raise _CallReachedError(_Call(*args, **(kwargs or {})))
        return func(*args, **(kwargs or {}))


def _call_of_torch(layer: Any, x: Tensor, arguments: Mapping[str, Any]) -> _Call | None:
    """Return the call of torch's attention by an isolated copy of a layer; None if it calls something else."""
    try:
        with _UntilTorchAttention():
            type(layer).forward(layer, x, **cast_like(arguments, x))
    except _CallReachedError as found:
        return found.call
    return None


class _Configured:
    """A layer's configuration, except for the implementation of attention."""

    def __init__(self, config: Any, implementation: str) -> None:
        self._config = config
        self._attn_implementation = implementation

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)
