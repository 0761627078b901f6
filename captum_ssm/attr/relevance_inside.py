"""Relevance inside a model: at a layer's input, in the channels of a mixer, and of a neuron."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from captum_ssm._captum import LayerAttribution, NeuronAttribution, format_additional_forward_args, log_usage
from captum_ssm.attr.base import ModelMethod
from captum_ssm.attr.form import Form
from captum_ssm.attr.relevance import ImplicitAttentionRelevance
from captum_ssm.errors import InvalidInputError
from captum_ssm.readout import scores
from captum_ssm.relevance.traced import traced


class LayerImplicitAttentionRelevance(ImplicitAttentionRelevance, LayerAttribution):
    """Relevance at the input of a layer, or of one factor of a mixer's decomposition: which channels carried it.

    Where all that reaches the output passes the layer, as it does each block of a residual stream, it sums to what
    the tokens' relevance and its terms sum to.

    Args:
        forward_func: As in :class:`ImplicitAttentionRelevance`, with ``model``.
        layer: Any module of the model, or its dotted name.
        model: Likewise.
        factor: For a mixer: name of a factor of its chain, such as ``"scan"`` or ``"out"``, to get the relevance of
            what enters that factor, by channel.
        **options: Those of :class:`ImplicitAttentionRelevance`, but for ``checkpoints``.

    Raises:
        InvalidInputError: If the model has no such layer; when called, if the layer was not run, or has no such factor.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | str,
        model: nn.Module | None = None,
        *,
        factor: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(forward_func, model, **options)
        if self.checkpoints:
            raise InvalidInputError("checkpoints keep nothing inside a model; leave them out for a layer's relevance.")
        self.layer_name, self.layer = find_layer(self, layer)
        self.factor = factor

    def _shaped(self, relevance: Tensor, form: Form) -> Tensor:
        return relevance

    def _ask(self, asked: list[Tensor], stack: ExitStack) -> Callable[[str, str, Tensor], None] | None:
        met: list[str] = []

        def enter(module: nn.Module, args: Any, kwargs: Any) -> None:
            asked.extend(traced((args, kwargs))[:1])

        def entering(name: str, factor: str, x: Tensor) -> None:
            if name == self.layer_name:
                met.append(factor)
                asked.extend([x] if factor == self.factor else [])

        def refuse() -> None:
            if not asked:
                known = f"; its factors are {', '.join(reversed(met))}" if met else ", or not on the tokens"
                raise InvalidInputError(
                    f"Layer '{self.layer_name}' "
                    + (f"has no factor {self.factor!r}{known}." if self.factor else "was not run by forward_func.")
                )

        stack.push(lambda kind, error, trace: refuse() if kind is None else None)
        if self.factor is not None:
            return entering
        stack.callback(self.layer.register_forward_pre_hook(enter, with_kwargs=True).remove)
        return None

    def _asked(self, found: Sequence[Tensor], asked: Sequence[Tensor]) -> Tensor:
        if len(found) != 1:
            raise InvalidInputError(
                f"Layer '{self.layer_name}' ran {len(asked)} times, {len(found)} of them on the tokens. Explain a "
                "layer that runs once."
            )
        return found[0]


class NeuronImplicitAttentionRelevance(ModelMethod, NeuronAttribution):
    """Relevance of a neuron: which tokens an activation inside the model comes from.

    Args:
        forward_func: As in :class:`ImplicitAttentionRelevance`, with ``model``.
        layer: The module whose output the neuron is part of, or its dotted name.
        model: Likewise.
        **options: Those of :class:`ImplicitAttentionRelevance`.

    Raises:
        InvalidInputError: If the model has no such layer; when called, if the layer was not run.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | str,
        model: nn.Module | None = None,
        **options: Any,
    ) -> None:
        super().__init__(forward_func, model, tolerance=options.get("tolerance"))
        self.layer_name, self.layer = find_layer(self, layer)
        self._options = options
        self.terms: dict[str, Tensor] = {}
        self.completeness = 0.0

    @log_usage
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        neuron_selector: int | tuple[int, ...] | Callable[[Tensor], Tensor],
        additional_forward_args: Any = None,
        **arguments: Any,
    ) -> Any:
        """Return the relevance of each token for the neuron.

        Args:
            inputs: Token ids (B, L), or embeddings (B, L, E), or a tuple of one such tensor.
            neuron_selector: Where the neuron is in the layer's output, without the axis of examples, such as
                ``(token, channel)``; or a function of the whole output that returns one number for each example.
            additional_forward_args: As for :class:`ImplicitAttentionRelevance`.
            **arguments: ``baselines`` and all that its ``attribute`` takes besides.

        Returns:
            As :meth:`ImplicitAttentionRelevance.attribute`; the sum is that of the neuron's activation.
        """

        def select(output: Tensor) -> Tensor:
            if callable(neuron_selector):
                return neuron_selector(output)
            place: tuple[Any, ...] = neuron_selector if isinstance(neuron_selector, tuple) else (neuron_selector,)
            return output[(slice(None), *place)]

        def neuron(inputs: Tensor, *args: Any) -> Tensor:
            outputs: list[Tensor] = []

            def leave(module: nn.Module, args: Any, output: Any) -> None:
                outputs.append(output if isinstance(output, Tensor) else output[0])

            hook = self.layer.register_forward_hook(leave)
            try:
                scores(self.forward_func, inputs, *args)
            finally:
                hook.remove()
            if len(outputs) != 1:
                raise InvalidInputError(
                    f"Layer '{self.layer_name}' ran {len(outputs)} times; a neuron is part of a layer that runs once."
                )
            return select(outputs[0])

        method = ImplicitAttentionRelevance(neuron, self.model, **self._options)
        args = format_additional_forward_args(additional_forward_args)
        result = method.attribute(inputs, None, args, **arguments)
        self.terms, self.completeness, self.fidelity = method.terms, method.completeness, method.fidelity
        return result


def find_layer(method: ModelMethod, layer: nn.Module | str) -> tuple[str, nn.Module]:
    """Return the name and the module of a layer of the method's model.

    Raises:
        InvalidInputError: If the model has no such layer.
    """
    for name, module in method.model.named_modules():
        if module is layer or (name and name == layer):
            return name, module
    what = type(layer).__name__ if isinstance(layer, nn.Module) else repr(layer)
    raise InvalidInputError(f"{type(method.model).__name__} has no layer {what}; see its named_modules().")
