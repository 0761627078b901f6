"""Relevance inside a model: at a layer's input, in the channels of a mixer, and of a neuron."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from captum_ssm._captum import LayerAttribution, NeuronAttribution, format_additional_forward_args, log_usage
from captum_ssm.attr.any_model import AnyModelMethod
from captum_ssm.attr.model_method import ModelMethod
from captum_ssm.attr.relevance import ImplicitAttentionRelevance
from captum_ssm.attr.score_shape import ScoreShape
from captum_ssm.errors import InvalidInputError
from captum_ssm.layers.call import first_output
from captum_ssm.network.forward import run_model
from captum_ssm.network.threads import hook
from captum_ssm.relevance.run import Probe
from captum_ssm.relevance.traced import traced


class LayerImplicitAttentionRelevance(ImplicitAttentionRelevance, LayerAttribution):
    """Relevance at the input of a layer, or of one factor of a mixer's decomposition: which channels carried it.

    If every path to the output passes the layer, which holds for each block of a residual stream, it has the same sum
    as the tokens' relevance and its terms.

    Args:
        forward_func: A transformers model, any other module, or any callable whose output Captum accepts.
        layer: Any module of the model, or its dotted name.
        model: The model whose layers are explained; needed if ``forward_func`` is not a module.
        factor: For a mixer: name of a factor of its chain, such as ``"scan"`` or ``"out"``, to get the relevance of
            that factor's input, by channel.
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

    def probe(self) -> Probe:
        """Return a probe at the layer's input, or at the input of one factor of its chain."""
        if self.factor is None:
            return _LayerProbe(self.layer_name, self.layer)
        return _FactorProbe(self.layer_name, self.factor)

    def _in_shape(self, relevance: tuple[Tensor, ...], shapes: Sequence[ScoreShape]) -> tuple[Tensor, ...]:
        return relevance


class _InnerProbe(Probe):
    """Collects traced tensors of one layer, which has to run once.

    Args:
        layer: Dotted name of the layer.
    """

    def __init__(self, layer: str) -> None:
        super().__init__()
        self.layer = layer

    def attach(self, hooks: ExitStack) -> None:
        """Refuse, when the hooks are closed without another error, that nothing was collected."""
        hooks.push(lambda error_type, error, trace: self._refuse_nothing() if error_type is None else None)

    def _refuse_nothing(self) -> None:
        if not self.tensors:
            raise InvalidInputError(f"Layer '{self.layer}' {self._cause()}.")

    def _cause(self) -> str:
        """Return in words why nothing was collected."""
        return "was not run by forward_func"

    def select(self, relevances: Sequence[Tensor]) -> Tensor:
        """Return the relevance of the one traced tensor.

        Raises:
            InvalidInputError: If there is none, or the layer ran several times.
        """
        if len(relevances) != 1:
            raise InvalidInputError(
                f"Layer '{self.layer}' ran {len(self.tensors)} times, {len(relevances)} of them on the tokens. Explain "
                "a layer that runs once."
            )
        return relevances[0]


class _LayerProbe(_InnerProbe):
    """Collects the input of a layer."""

    def __init__(self, layer: str, module: nn.Module) -> None:
        super().__init__(layer)
        self.module = module

    def attach(self, hooks: ExitStack) -> None:
        """Watch the layer until the hooks are closed."""
        super().attach(hooks)
        hook(self.module.register_forward_pre_hook, self._enter, hooks, with_kwargs=True)

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.tensors.extend(traced((args, kwargs))[:1])


class _FactorProbe(_InnerProbe):
    """Collects the input of one factor of a mixer's chain."""

    watches_factors = True

    def __init__(self, layer: str, factor: str) -> None:
        super().__init__(layer)
        self.factor = factor
        self._factors: list[str] = []

    def on_factor(self, layer: str, factor: str, x: Tensor) -> None:
        """Note the factor's input if it is the wanted one, see :class:`~captum_ssm.relevance.run.Probe`."""
        if layer == self.layer:
            self._factors.append(factor)
            self.tensors.extend([x] if factor == self.factor else [])

    def _cause(self) -> str:
        known = f"; its factors are {', '.join(reversed(self._factors))}" if self._factors else ", or not on the tokens"
        return f"has no factor {self.factor!r}{known}"


class NeuronImplicitAttentionRelevance(AnyModelMethod, NeuronAttribution):
    """Relevance of a neuron: which tokens an activation inside the model comes from.

    Args:
        forward_func: A transformers model, any other module, or any callable whose output Captum accepts.
        layer: The module whose output the neuron is part of, or its dotted name.
        model: The model whose layers are explained; needed if ``forward_func`` is not a module.
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
            inputs: Those of :meth:`ImplicitAttentionRelevance.attribute`.
            neuron_selector: Where the neuron is in the layer's output, without the axis of examples, such as
                ``(token, channel)``; or a function of the whole output that returns one number for each example.
            additional_forward_args: Passed on after the inputs. For a transformers model: its attention mask (B, L).
            **arguments: ``baselines`` and the other arguments of :meth:`ImplicitAttentionRelevance.attribute`.

        Returns:
            Relevance in the shape of the inputs, see :meth:`ImplicitAttentionRelevance.attribute`, whose sum is the
            neuron's activation.
        """

        def select(output: Tensor) -> Tensor:
            if callable(neuron_selector):
                return neuron_selector(output)
            place: tuple[Any, ...] = neuron_selector if isinstance(neuron_selector, tuple) else (neuron_selector,)
            return output[(slice(None), *place)]

        def neuron(inputs: Tensor, *args: Any) -> Tensor:
            outputs: list[Tensor] = []

            def leave(module: nn.Module, args: Any, output: Any) -> None:
                outputs.append(first_output(output))

            with ExitStack() as hooks:
                hook(self.layer.register_forward_hook, leave, hooks)
                run_model(self.forward_func, inputs, *args)
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
    shown = type(layer).__name__ if isinstance(layer, nn.Module) else repr(layer)
    if type(method.model) is nn.Module:
        raise InvalidInputError(
            f"forward_func is a plain callable, so the model that has the layer {shown} is not known. Pass it too: "
            f"{type(method).__name__}(forward_func, layer, model)."
        )
    raise InvalidInputError(f"{type(method.model).__name__} has no layer {shown}; see its named_modules().")
