"""The attention matrices of one layer themselves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import reduce
from operator import add
from typing import Any, cast

import torch
from torch import Tensor, nn

from captum_ssm._captum import LayerAttribution, format_additional_forward_args, log_usage
from captum_ssm.attention import dense
from captum_ssm.attr.fusion import Fusion, fuse
from captum_ssm.attr.inputs import real_tokens, refuse_bad_inputs, refuse_bad_state, single_tensor
from captum_ssm.attr.view import Attention, check_attention, known_terms, refuse_unknown_terms, view
from captum_ssm.capture import record_mixers
from captum_ssm.errors import InvalidInputError
from captum_ssm.fidelity import decompose
from captum_ssm.readout import scores
from captum_ssm.registry import find_mixers


class LayerImplicitAttention(LayerAttribution):
    """The implicit attention of one layer: fused, or of every channel.

    Args:
        forward_func: The model, or a callable that runs it.
        layer: The mixer: the module itself, its dotted name, or its number among the model's mixers (negative
            counts from the last).
        model: The model that holds the layer; needed if ``forward_func`` is not a module.
        attention: ``"unified"`` or ``"scan"``, as in :class:`~captum_ssm.attr.base.ImplicitAttentionMethod`.
        without: Factors or terms to leave out, likewise.
        tolerance: Allowed relative error of the decomposition, likewise.

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
        attention: Attention = "unified",
        without: Sequence[str] = (),
        tolerance: float | None = None,
    ) -> None:
        check_attention(attention)
        if model is None and not isinstance(forward_func, nn.Module):
            raise InvalidInputError(
                "forward_func is a plain callable, so the model that it runs is not known. Pass it too: "
                "LayerImplicitAttention(forward_func, layer, model=model)."
            )
        self.model = cast(nn.Module, forward_func if model is None else model)
        self.layer_name = _find_layer(self.model, layer)
        super().__init__(forward_func, self.model.get_submodule(self.layer_name))
        self.attention: Attention = attention
        self.without = (without,) if isinstance(without, str) else tuple(without)
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
            fusion: How the channels become one matrix, see :data:`~captum_ssm.attr.fusion.Fusion`; None keeps
                the matrix of every channel.

        Returns:
            (B, L, L), or (B, D, L, L) with ``fusion=None``. Row i is the query (output token), column j the key
            (source token); rows and columns of padding are 0. Cost: O(L²·D·N); B·D·L² numbers with
            ``fusion=None``, else O(L²) memory.

        Raises:
            InvalidInputError: If the inputs are empty, out of range or of the wrong kind.
            ModelStateError: If the model is training, has a warm cache, or gives NaN or infinity.
            FidelityError: If the layer's decomposition misses the layer's real output.
        """
        tokens = single_tensor(inputs)
        refuse_bad_state(self.model)
        refuse_bad_inputs(self.model, tokens)
        args = format_additional_forward_args(additional_forward_args) or ()
        with torch.no_grad():
            with record_mixers(self.model) as calls:
                scores(self.forward_func, tokens, *args)
            named = [call for call in calls if call.name == self.layer_name]
            called = named or [call for call in calls if call.mixer is self.layer]
            call = called[0] if len(called) == 1 else None
            if call is None:
                raise InvalidInputError(f"forward_func did not run layer '{self.layer_name}' on these inputs.")
            real = real_tokens(self.forward_func, args, calls)
            layer = decompose(call, self.tolerance, real)
            self.fidelity = {layer.name: layer.error}
            refuse_unknown_terms(known_terms(layer, self.attention), self.attention, self.without)
            cut = view(layer, self.attention, self.without, real)
            shown = cut.real * cut.real.transpose(1, 2)
            if fusion is not None:
                return fuse(cut, fusion).dense() * shown
            mixing = [part.core for part in cut.cuts if part.core.mixes_channels]
            if mixing:
                raise InvalidInputError(
                    f"Layer '{self.layer_name}' mixes its channels between {' and '.join(mixing[0].mixers)}, so its "
                    "unified attention has no matrix for each channel. Choose a fusion, or attention='scan'."
                )
            return reduce(add, (dense(part.core, part.v) for part in cut.cuts)) * shown.unsqueeze(1)


def _find_layer(model: nn.Module, layer: nn.Module | str | int) -> str:
    mixers = find_mixers(model)
    names = list(mixers)
    if isinstance(layer, int) and -len(names) <= layer < len(names):
        return names[layer]
    found = [name for name, mixer in mixers.items() if mixer is layer or name == layer]
    if not found:
        what = type(layer).__name__ if isinstance(layer, nn.Module) else repr(layer)
        raise InvalidInputError(f"{what} is not one of the model's {len(names)} mixers: {', '.join(names)}.")
    return found[0]
