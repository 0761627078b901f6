"""The attention matrices of one layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add
from typing import Any, cast

import torch
from torch import Tensor, nn

from captum_ssm._captum import LayerAttribution, format_additional_forward_args, log_usage
from captum_ssm.errors import InvalidInputError
from captum_ssm.layers.call import LayerCall
from captum_ssm.layers.fidelity import check_tolerance
from captum_ssm.layers.mixers import find_mixers
from captum_ssm.layers.precision import in_full_precision
from captum_ssm.matrices.core_matrix import channel_matrices
from captum_ssm.matrices.fusion import Fusion, fuse
from captum_ssm.matrices.layer_stack import LayerStack
from captum_ssm.matrices.split_layer import AttentionScope, SplitLayer, check_scope
from captum_ssm.network.forward import run_model
from captum_ssm.network.inputs import names, refuse_bad_inputs, refuse_bad_state, single_tensor, token_mask
from captum_ssm.network.recording import record_mixers
from captum_ssm.network.turns import unchanged


class LayerImplicitAttention(LayerAttribution):
    """The implicit attention of one layer: fused, or of every channel.

    Args:
        forward_func: The model, or a callable that runs it.
        layer: The mixer: the module itself, its dotted name, or its number among the model's mixers (negative
            counts from the last).
        model: The model that holds the layer; needed if ``forward_func`` is not a module.
        attention: ``"unified"``: the whole layer between its projections. ``"scan"``: the recurrence alone, without its
            skip.
        without: Factors or terms to leave out, such as ``("conv", "gate", "skip")``.
        tolerance: Allowed relative error of the decomposition; None chooses by the model's type.

    Raises:
        InvalidInputError: If the layer is not one of the model's supported mixers.
        UnsupportedModelError: If the model has no supported mixer.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | str | int,
        model: nn.Module | None = None,
        *,
        attention: AttentionScope = "unified",
        without: Sequence[str] = (),
        tolerance: float | None = None,
    ) -> None:
        check_scope(attention)
        check_tolerance(tolerance)
        if model is None and not isinstance(forward_func, nn.Module):
            raise InvalidInputError(
                "forward_func is a plain callable, so the model that it runs is not known. Pass it too: "
                "LayerImplicitAttention(forward_func, layer, model=model)."
            )
        self.model = cast(nn.Module, forward_func if model is None else model)
        self.layer_name = _find_layer(self.model, layer)
        super().__init__(forward_func, self.model.get_submodule(self.layer_name))
        self.attention: AttentionScope = attention
        self.without = names(without, "without")
        self.tolerance = tolerance
        self.fidelity: dict[str, float] = {}

    @log_usage
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        additional_forward_args: Any = None,
        *,
        fusion: Fusion | None = "absolute",
    ) -> Tensor:
        """Return the layer's attention for these inputs.

        Args:
            inputs: Token ids (B, L) or embeddings (B, L, E).
            additional_forward_args: For a transformers model its attention mask (B, L).
            fusion: How the channels become one matrix, see :data:`~captum_ssm.matrices.fusion.Fusion`; None
                keeps the matrix of every channel.

        Returns:
            (B, L, L), or (B, D, L, L) with ``fusion=None``. Row i is the query (output token), column j the key
            (source token); rows and columns of padding are 0. Cost: O(L²·D·N); B·D·L² numbers with
            ``fusion=None``, else O(L²) memory.

        Raises:
            InvalidInputError: If the inputs are empty, out of range or of the wrong type.
            ModelStateError: If the model is training, has a warm cache, or gives NaN or infinity.
            FidelityError: If the layer's decomposition misses the layer's own output.
        """
        tokens = single_tensor(inputs)
        refuse_bad_state(self.model)
        refuse_bad_inputs(self.model, tokens)
        args = format_additional_forward_args(additional_forward_args) or ()
        with torch.inference_mode(False), torch.no_grad(), unchanged(self.model, self.forward_func, tokens):
            with record_mixers(self.model) as calls:
                run_model(self.forward_func, tokens, *args)
            return self._matrix(self._call(calls), token_mask(self.forward_func, args, calls), fusion)

    @in_full_precision
    def _matrix(self, call: LayerCall, mask: Tensor, fusion: Fusion | None) -> Tensor:
        """Return the fused matrix (B, L, L) of a call, or with None that of every channel, (B, D, L, L)."""
        stack = LayerStack(self.model, [call], mask, self.attention, self.without, self.tolerance)
        layer = stack[0]
        self.fidelity = stack.fidelity
        stack.refuse_unknown_terms()
        shown = layer.mask * layer.mask.transpose(1, 2)  # (B, L, L), 0 in rows and columns of padding
        if fusion is not None:
            return fuse(layer, fusion).dense() * shown
        return self._channels(layer) * shown.unsqueeze(1)

    def _call(self, calls: Sequence[LayerCall]) -> LayerCall:
        """Return the one call of the layer.

        Raises:
            InvalidInputError: If there is none, or several.
        """
        named = [call for call in calls if call.name == self.layer_name]
        candidates = named or [call for call in calls if call.mixer is self.layer]
        if len(candidates) != 1:
            raise InvalidInputError(f"forward_func did not run layer '{self.layer_name}' on these inputs.")
        return candidates[0]

    def _channels(self, layer: SplitLayer) -> Tensor:
        """Return the matrix of every channel, (B, D, L, L).

        Raises:
            InvalidInputError: If the layer mixes its channels between two factors that mix tokens.
        """
        mixing = [split.core for split in layer.splits if split.core.mixes_channels]
        if mixing:
            raise InvalidInputError(
                f"Layer '{self.layer_name}' mixes its channels between {' and '.join(mixing[0].mixers)}, so its "
                "unified attention has no matrix for each channel. Choose a fusion, or attention='scan'."
            )
        return reduce(add, (channel_matrices(split.core, split.v) for split in layer.splits))


def _find_layer(model: nn.Module, layer: nn.Module | str | int) -> str:
    """Return the dotted name of a mixer, given as module, name or number.

    Raises:
        InvalidInputError: If it is not one of the model's mixers.
    """
    mixers = find_mixers(model)
    names = list(mixers)
    if isinstance(layer, int) and -len(names) <= layer < len(names):
        return names[layer]
    matches = [name for name, mixer in mixers.items() if mixer is layer or name == layer]
    if not matches:
        shown = type(layer).__name__ if isinstance(layer, nn.Module) else repr(layer)
        raise InvalidInputError(f"{shown} is not one of the model's {len(names)} mixers: {', '.join(names)}.")
    return matches[0]
