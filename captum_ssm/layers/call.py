"""One call of a token mixer, as it was recorded."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache, partial, reduce
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from captum_ssm.layers.placement import Around, in_place, nothing_around
from captum_ssm.layers.precision import Autocast, computing_type, narrowest
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
        autocast: The autocast that the mixer ran under.
        around: Returns the modules around the mixer whose hooks fetch its tensors for each run.
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
    autocast: Autocast = ()
    around: Callable[[], Around] = nothing_around
    called: Called | None = None

    @property
    def mixer_in_place(self) -> nn.Module:
        """The mixer with its tensors on the device of the input, as it has them when it runs."""
        return in_place(self.mixer, self.x.device, self.around)

    @property
    def wide_input(self) -> Tensor:
        """The input in float32 or wider, the type that the layer is decomposed in."""
        return at_least_float32(self.x)

    @property
    def own_type(self) -> torch.dtype:
        """The type that the layer's own code computes in, which a caller's hook may widen behind it."""
        return narrowest([self.y.dtype, computing_type(self.mixer)])

    @property
    def narrowest_type(self) -> torch.dtype:
        """The type with the coarsest rounding among the layer's own and those of autocast."""
        return narrowest([self.own_type, *dict(self.autocast).values()])

    def on(self, device: torch.device) -> LayerCall:
        """Return the call with all of its tensors on a device."""
        if self.x.device == self.y.device == device:
            return self
        move = partial(tree_map_only, Tensor, lambda tensor: tensor.to(device))
        tensors = {name: move(getattr(self, name)) for name in ("x", "y", "kwargs", "state", "own_input")}
        return replace(self, **tensors)

    def detach(self) -> LayerCall:
        """Return the call free of the graph."""
        state, own_input = (None if t is None else t.detach() for t in (self.state, self.own_input))
        return replace(self, x=self.x.detach(), y=self.y.detach(), state=state, own_input=own_input)


def together(calls: Sequence[LayerCall]) -> list[LayerCall]:
    """Return calls whose matrices can be multiplied: free of the graph, on one device, with inputs in one type.

    Args:
        calls: The calls of one run, which may be on several devices and in several types.
    """
    dtype = reduce(torch.promote_types, {tensor.dtype for call in calls for tensor in (call.x, call.y)})
    placed = [call.detach().on(calls[-1].y.device) for call in calls]
    return [call if call.x.dtype == dtype else replace(call, x=call.x.to(dtype)) for call in placed]


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
