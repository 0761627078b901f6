"""Relevance inside a model: at the inputs of layers, in the channels of a mixer, and of a neuron."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import Tensor, nn

from captum_ssm._captum import (
    LayerAttribution,
    NeuronAttribution,
    format_additional_forward_args,
    format_output,
    log_usage,
)
from captum_ssm.attr.any_model import AnyModelMethod
from captum_ssm.attr.model_method import ModelMethod
from captum_ssm.attr.relevance import ImplicitAttentionRelevance
from captum_ssm.attr.score_shape import ScoreShape
from captum_ssm.errors import InvalidInputError
from captum_ssm.layers.call import first_output
from captum_ssm.network.forward import run_model
from captum_ssm.network.threads import hook
from captum_ssm.relevance.run import Probe
from captum_ssm.relevance.traced import Traced, traced


class LayerImplicitAttentionRelevance(ImplicitAttentionRelevance, LayerAttribution):
    """Relevance at the input of a layer, or of one factor of a mixer's decomposition: which channels carried it.

    If every path to the output passes the layer, which holds for each block of a residual stream, it has the same sum
    as the tokens' relevance and its terms.

    Args:
        forward_func: A transformers model, any other module, or any callable whose output Captum accepts.
        layer: Any module of the model, or its dotted name; or a list of them, all explained by one run:
            :meth:`attribute` then returns a list with the relevance of each.
        model: The model whose layers are explained; needed if ``forward_func`` is not a module.
        factor: For a mixer: name of a factor of its chain, such as ``"scan"`` or ``"out"``, to get the relevance of
            that factor's input, by channel.
        **options: Those of :class:`ImplicitAttentionRelevance`, but for ``checkpoints``.

    Raises:
        InvalidInputError: If the model has no such layer, or the list is empty; when called, if a layer was not run, or
            has no such factor.
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        layer: nn.Module | str | Sequence[nn.Module | str],
        model: nn.Module | None = None,
        *,
        factor: str | None = None,
        **options: Any,
    ) -> None:
        super().__init__(forward_func, model, **options)
        if self.checkpoints:
            raise InvalidInputError("checkpoints keep nothing inside a model; leave them out for a layer's relevance.")
        if isinstance(layer, str) or not isinstance(layer, Sequence):
            self._is_list, asked = False, [layer]
        else:
            self._is_list, asked = True, list(layer)
        if not asked:
            raise InvalidInputError("The list of layers is empty; pass at least one module of the model, or its name.")
        found = [find_layer(self, each) for each in asked]
        self.layers = dict(found)
        self.layer = [module for _, module in found] if self._is_list else found[0][1]
        self._names = [name for name, _ in found]
        self.factor = factor

    def probe(self) -> Probe:
        """Return a probe at the layers' inputs, or at the input of one factor of their chains."""
        return _LayerProbe(self.layers) if self.factor is None else _FactorProbe(self.layers, self.factor)

    def _result(self, relevance: tuple[Tensor, ...], shapes: Sequence[ScoreShape], is_tuple: bool) -> Any:
        by_name = dict(zip(self.layers, relevance))
        each = [by_name[name].contiguous() for name in self._names]
        return each if self._is_list else format_output(is_tuple, tuple(each))


class _InnerProbe(Probe):
    """Collects one traced tensor of each of some layers, which have to run once.

    Args:
        layers: The layers by dotted name.
    """

    def __init__(self, layers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.layers = layers
        self.places: list[str] = []
        """For each tensor the layer that it is of."""

    def attach(self, hooks: ExitStack) -> None:
        """Refuse, when the hooks are closed without another error, that a layer gave nothing."""
        hooks.push(lambda error_type, error, trace: self._refuse_nothing() if error_type is None else None)

    def note(self, layer: str, tensors: Sequence[Tensor]) -> None:
        """Collect traced tensors of a layer."""
        self.tensors.extend(tensors)
        self.places.extend([layer] * len(tensors))

    def _refuse_nothing(self) -> None:
        for layer in self.layers:
            if layer not in self.places:
                raise InvalidInputError(f"Layer '{layer}' {self._cause(layer)}.")

    def _cause(self, layer: str) -> str:
        """Return in words why nothing was collected."""
        return "was not run by forward_func"

    def select(self, relevances: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the relevance of each layer's one traced tensor.

        Raises:
            InvalidInputError: If there is none, or a layer ran several times.
        """
        places = [place for place, tensor in zip(self.places, self.tensors) if isinstance(tensor, Traced)]
        for layer in self.layers:
            if places.count(layer) != 1:
                raise InvalidInputError(
                    f"Layer '{layer}' ran {self.places.count(layer)} times, {places.count(layer)} of them on the "
                    "tokens. Explain a layer that runs once."
                )
        return tuple(relevances[places.index(layer)] for layer in self.layers)


class _LayerProbe(_InnerProbe):
    """Collects the inputs of layers."""

    def attach(self, hooks: ExitStack) -> None:
        """Watch the layers until the hooks are closed."""
        super().attach(hooks)
        for name, module in self.layers.items():
            hook(module.register_forward_pre_hook, partial(self._enter, name), hooks, with_kwargs=True)

    def _enter(self, name: str, module: nn.Module, args: Any, kwargs: Any) -> None:
        self.note(name, traced((args, kwargs))[:1])


class _FactorProbe(_InnerProbe):
    """Collects the inputs of one factor of the layers' chains."""

    watches_factors = True

    def __init__(self, layers: Mapping[str, nn.Module], factor: str) -> None:
        super().__init__(layers)
        self.factor = factor
        self._factors: dict[str, list[str]] = {}

    def on_factor(self, layer: str, factor: str, x: Tensor) -> None:
        """Note the factor's input if it is a wanted one, see :class:`~captum_ssm.relevance.run.Probe`."""
        if layer in self.layers:
            self._factors.setdefault(layer, []).append(factor)
            self.note(layer, [x] if factor == self.factor else [])

    def _cause(self, layer: str) -> str:
        factors = self._factors.get(layer)
        known = f"; its factors are {', '.join(reversed(factors))}" if factors else ", or not on the tokens"
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
                run_model(self.forward_func, inputs, *args, all_logits=True)
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
