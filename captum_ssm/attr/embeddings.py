"""Gradient-weighted attribution as a method of the embedding layer, for Captum's tools that ask for one."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from captum_ssm._captum import LayerGradientXActivation, format_additional_forward_args, log_usage
from captum_ssm.attr.attribution import ImplicitAttentionAttribution, Rectify
from captum_ssm.errors import InvalidInputError
from captum_ssm.matrices.split_layer import AttentionScope
from captum_ssm.network.forward import without_cache
from captum_ssm.network.inputs import Target, refuse_bad_inputs, single_tensor
from captum_ssm.network.interface import input_embeddings, is_language_model
from captum_ssm.network.threads import hook
from captum_ssm.network.turns import unchanged


class LayerImplicitAttentionAttribution(LayerGradientXActivation):
    """:class:`~captum_ssm.ImplicitAttentionAttribution` at the embedding layer of a model.

    For Captum's tools that take a method of a layer and not of the inputs: its stock ``LLMGradientAttribution``
    accepts this class, as it derives from ``LayerGradientXActivation``. Explaining a generation that way runs the
    model once for every token; :class:`~captum_ssm.LLMImplicitAttention` runs it once.

    Args:
        forward_func: A transformers model, or any callable that Captum accepts.
        layer: The embedding layer, ``model.get_input_embeddings()``.
        model: The model that holds the layers; needed if ``forward_func`` is not a module.
        rectify: ``"channel"`` or ``"token"`` sets negative attention to 0 in each channel, or between tokens; None
            keeps the sign.
        attention: ``"unified"``: the whole layer between its projections. ``"scan"``: the recurrence alone, without its
            skip.
        without: Factors or terms to leave out of the attention, such as ``("conv", "gate", "skip")``.
        tolerance: Allowed relative error of the decomposition; None chooses by the model's type.

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
        attention: AttentionScope = "unified",
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
            inputs: The first argument of ``forward_func``: token ids (B, L), or embeddings (B, L, E).
            target: The class or token to explain, in any form that Captum takes.
            additional_forward_args: Passed on after the inputs.
            attribute_to_layer_input: Token ids have no components to share a score: must be False.
            grad_kwargs: Not used; must be None.

        Returns:
            (B, L, E), the shape of the layer's output: each component carries an equal share, and the sum over E is the
            token's score.

        Raises:
            InvalidInputError: If an argument is not supported, or the inputs are empty or out of range.
            ModelStateError: If the model is training, has a warm cache, or gives NaN or infinity.
            UnsupportedModelError: If another layer of the model mixes tokens.
            FidelityError: If a layer's decomposition misses the layer's own output.
        """
        if attribute_to_layer_input or grad_kwargs:
            raise InvalidInputError("The scores are those of the layer's output; there is no attribute_to_layer_input.")
        args = format_additional_forward_args(additional_forward_args)
        state = unchanged(self._model, self.forward_func, inputs)
        with torch.inference_mode(False), state, without_cache(self._model):
            tokens = single_tensor(inputs)
            if is_language_model(self.forward_func):
                refuse_bad_inputs(self._model, tokens)
                method = ImplicitAttentionAttribution(self.forward_func, self._model, **self._options)
                per_token = method.token_scores(tokens, target, args=args)
            else:
                call = self.layer, self.forward_func, tokens, args or ()
                method = ImplicitAttentionAttribution(partial(_output_for, *call), self._model, **self._options)
                per_token = method.token_scores(_ids_at(*call), target)
        self.fidelity.clear()  # the one dictionary: Captum works with a copy of the method
        self.fidelity.update(method.fidelity)
        width: int = self.layer.weight.shape[-1]
        return (per_token / width).unsqueeze(-1).repeat(1, 1, width)


def _ids_at(layer: nn.Module, forward_func: Callable[..., Any], inputs: Tensor, args: tuple[Any, ...]) -> Tensor:
    """Return the ids (B, L) that the embedding layer sees, as Captum puts those of an answer behind the inputs.

    Args:
        layer: The embedding layer.
        forward_func: The callable that runs the model.
        inputs: Its first argument.
        args: The others.

    Returns:
        The ids; the inputs if the layer sees none.

    Raises:
        InvalidInputError: If the layer runs more than once.
    """
    seen: list[Tensor] = []
    with ExitStack() as hooks, torch.no_grad():
        hook(layer.register_forward_pre_hook, lambda layer, args: seen.append(args[0]), hooks)
        forward_func(inputs, *args)
    if len(seen) > 1:
        raise InvalidInputError(f"forward_func runs the embedding layer {len(seen)} times. Explain one run.")
    return seen[0] if seen else inputs


def _output_for(
    layer: nn.Module, forward_func: Callable[..., Any], inputs: Tensor, args: tuple[Any, ...], ids: Tensor
) -> Any:
    """Return the output of ``forward_func`` when the embedding layer sees ``ids``, see :func:`_ids_at`."""
    if ids.is_floating_point():
        return forward_func(ids, *args)
    with ExitStack() as hooks:
        hook(layer.register_forward_pre_hook, lambda layer, args: (ids, *args[1:]), hooks)
        return forward_func(inputs, *args)
