"""Gradient-weighted attribution as a method of the embedding layer, for Captum's tools that ask for one."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from captum_ssm._captum import LayerGradientXActivation, format_additional_forward_args, log_usage
from captum_ssm.attr.attribution import ImplicitAttentionAttribution, Rectify
from captum_ssm.attr.inputs import Target, refuse_bad_inputs, single_tensor
from captum_ssm.attr.view import Attention
from captum_ssm.errors import InvalidInputError
from captum_ssm.readout import input_embeddings, is_language_model


class LayerImplicitAttentionAttribution(LayerGradientXActivation):
    """:class:`~captum_ssm.ImplicitAttentionAttribution` at the embedding layer of a model.

    For Captum's tools that take a method of a layer and not of the inputs: its stock ``LLMGradientAttribution``
    accepts this class, as it derives from ``LayerGradientXActivation``. Explaining a generation that way runs the
    model once for every token; :class:`~captum_ssm.LLMImplicitAttention` runs it once.

    Args:
        forward_func: A transformers model, or any callable that Captum accepts.
        layer: The embedding layer, ``model.get_input_embeddings()``.
        model: The model that holds the layers; needed if ``forward_func`` is not a module.
        rectify: As in :class:`~captum_ssm.ImplicitAttentionAttribution`, with ``attention``, ``without`` and
            ``tolerance``.
        attention: Likewise.
        without: Likewise.
        tolerance: Likewise.

    Raises:
        InvalidInputError: If the layer is not the model's embedding layer, or an option is unknown.
        UnsupportedModelError: If the model has no supported layer.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module,
        model: nn.Module | None = None,
        *,
        rectify: Rectify = None,
        attention: Attention = "unified",
        without: Sequence[str] = (),
        tolerance: float | None = None,
    ) -> None:
        options: dict[str, Any] = {
            "rectify": rectify,
            "attention": attention,
            "without": without,
            "tolerance": tolerance,
        }
        self._model = ImplicitAttentionAttribution(forward_func, model, **options).model
        if layer is not (input_embeddings(self._model) or layer):
            raise InvalidInputError(
                f"The layer must be the model's embedding layer, model.get_input_embeddings(), not a "
                f"{type(layer).__name__}: the scores are those of the tokens. For the attention of a layer see "
                "LayerImplicitAttention."
            )
        super().__init__(forward_func, layer)
        self._options = options
        self.fidelity: dict[str, float] = {}

    @log_usage
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        attribute_to_layer_input: bool = False,
        grad_kwargs: dict[str, Any] | None = None,
    ) -> Tensor:
        """Return the scores of the tokens that the embedding layer sees.

        Args:
            inputs: What ``forward_func`` takes first.
            target: What to explain, in any form that Captum takes.
            additional_forward_args: Passed on after the inputs.
            attribute_to_layer_input: Token ids have no components to share a score: must be False.
            grad_kwargs: Not used; must be None.

        Returns:
            (B, L, E), as the layer's output: each component carries an equal share, and the sum over E is the token's
            score.

        Raises:
            InvalidInputError: If an argument asks for what there is not.
            ModelStateError, UnsupportedModelError, FidelityError: As in ``ImplicitAttentionAttribution``.
        """
        if attribute_to_layer_input or grad_kwargs:
            raise InvalidInputError("The scores are those of the layer's output; there is no attribute_to_layer_input.")
        method = ImplicitAttentionAttribution(self.forward_func, self._model, **self._options)
        args = format_additional_forward_args(additional_forward_args)
        with torch.inference_mode(False), without_cache(self._model):
            tokens = single_tensor(inputs)
            if is_language_model(self.forward_func):
                refuse_bad_inputs(self._model, tokens)
            per_token = method._attribute(tokens, target, None, args, None, False)
        self.fidelity.clear()  # the one dictionary: Captum works with a copy of the method
        self.fidelity.update(method.fidelity)
        width: int = self.layer.weight.shape[-1]
        return (per_token / width).unsqueeze(-1).repeat(1, 1, width)


@contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """Let a transformers model run without a cache where the caller does not say, while the context is open."""
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    cached = [config for config in configs.values() if getattr(config, "use_cache", False)]
    for config in cached:
        config.use_cache = False
    try:
        yield
    finally:
        for config in cached:
            config.use_cache = True
