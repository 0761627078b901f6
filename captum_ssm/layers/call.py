"""One call of a token mixer, as it was recorded."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from captum_ssm.layers.stand_ins import Called

signature = lru_cache(inspect.signature)
"""The signature of a function, read once."""


@dataclass(frozen=True)
class LayerCall:
    """One call of a token mixer.

    Args:
        name: Dotted name of the mixer in the model. If several layers share one module, each call has the name that the
            module has in that layer.
        mixer: The module.
        x: Its input (B, L, E), part of the graph that leads to it.
        y: Its output (B, L, E), part of the graph that leads to the model's output.
        kwargs: The other arguments by parameter name.
        state: Input of the block around the mixer, if a wire is registered for the block
            (:func:`captum_ssm.register_wire`).
        own_input: Input of the mixer alone (B, L, E), if ``x`` also holds the input of an earlier call
            (:func:`captum_ssm.layers.sources.register_source`).
        called: The mixer's parts that its own code called, of those that stand in for plain weights
            (:mod:`captum_ssm.layers.stand_ins`); None if that was not noted.
    """

    name: str
    mixer: nn.Module
    x: Tensor
    y: Tensor
    kwargs: Mapping[str, Any]
    state: Tensor | None = None
    own_input: Tensor | None = None
    called: Called | None = None

    @property
    def wide_input(self) -> Tensor:
        """The input in float32 or wider, the type that the layer is decomposed in."""
        return at_least_float32(self.x)

    def detach(self) -> LayerCall:
        """Return the call free of the graph."""
        state, own_input = (None if t is None else t.detach() for t in (self.state, self.own_input))
        return replace(self, x=self.x.detach(), y=self.y.detach(), state=state, own_input=own_input)


def at_least_float32(tensor: Tensor) -> Tensor:
    """Return the tensor in float32, or in its own type if that is wider."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


def first_output(output: Any) -> Any:
    """Return the tensor that a mixer gives, without the values that it returns beside it, such as a cache."""
    return output if isinstance(output, Tensor) else output[0]


def call_arguments(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Split the arguments of a module's call into its input and the others, by parameter name.

    Args:
        module: The module.
        args: Positional arguments of the call.
        kwargs: Keyword arguments of the call.

    Returns:
        The first argument, and the others by name.
    """
    bound = _named_signature(type(module)).bind(module, *args, **kwargs)
    arguments = dict(list(bound.arguments.items())[1:])
    for parameter in bound.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name, {}))
    first = next(iter(arguments))
    x = arguments.pop(first)
    named = bound.signature.parameters.get(first)
    if named is not None and named.kind is named.VAR_POSITIONAL and len(x) == 1:
        (x,) = x  # of a wrapper's forward(*args, **kwargs)
    return x, arguments


def _named_signature(cls: type[nn.Module]) -> inspect.Signature:
    """Return the signature of a class's ``forward``, or of the next base's if it names no arguments, ``(*args)``."""
    signatures = [signature(vars(base)["forward"]) for base in cls.__mro__ if callable(vars(base).get("forward"))]

    def names_arguments(own: inspect.Signature) -> bool:
        parameters = list(own.parameters.values())
        return len(parameters) > 1 and parameters[1].kind is not inspect.Parameter.VAR_POSITIONAL

    return next(filter(names_arguments, signatures), signatures[0])
