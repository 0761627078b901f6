"""Measurements of a model, kept while nothing that they depend on changes.

A measurement holds for the weights, buffers, hooks, modes and attributes that the model had, for the function that ran
it and for the arguments. A summary of all of these is compared before a measurement is used again. It contains the
norms of the weights: a change through ``weight.data`` shows neither in the address nor in the version of a tensor.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass, field
from functools import partial
from types import FunctionType, MethodType
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from captum_ssm.network.threads import Substituted, hides_a_class, is_passing, original

Measurement = TypeVar("Measurement")

LARGEST_ARGUMENT = 2**16
"""The number of bytes up to which a tensor among the arguments is compared by its entries."""

_ARGUMENTS = 256
"""For how many different arguments of one function the measurements are kept."""

_KINDS = (bool, str, FunctionType, MethodType, Substituted)
"""Types of the attributes of a module that are compared."""

_SIMPLE = (bool, int, float, str, bytes, torch.dtype, torch.device)

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


class UnknownStateError(Exception):
    """Something that cannot be compared with what it was, so that nothing that depends on it may be kept."""


@dataclass
class _OfModel(Generic[Measurement]):
    """The measurements of one model, and the state that they hold for."""

    state: Hashable
    functions: WeakKeyDictionary[Any, dict[Hashable, dict[Any, Measurement]]] = field(default_factory=WeakKeyDictionary)


class Measurements(Generic[Measurement]):
    """Measurements by model, function and arguments; they live as long as the model and the function."""

    def __init__(self) -> None:
        self._models: WeakKeyDictionary[nn.Module, _OfModel[Measurement]] = WeakKeyDictionary()

    def of(self, model: nn.Module, function: Callable[..., Any], args: tuple[Any, ...]) -> dict[Any, Measurement]:
        """Return the measurements that hold for the model as it is, to be read and to be added to.

        Args:
            model: The model.
            function: The function that runs it. A :class:`functools.partial` is its function with further arguments.
            args: The additional arguments of the function.

        Returns:
            A dictionary with keys of the caller's choice; an empty one that is not kept if the state of the model, the
            function or an argument cannot be compared.
        """
        function, args = _with_all_arguments(function, args)
        try:
            state, key = model_state(model), (_value_state(function), tuple(map(_value_state, args)))
            known = self._models.get(model)
            if known is None or known.state != state:
                known = self._models[model] = _OfModel(state)
            by_arguments = known.functions.setdefault(function, {})
        except (UnknownStateError, TypeError, RuntimeError):  # not hashable, no weak references; tensors without memory
            return {}
        if key not in by_arguments and len(by_arguments) >= _ARGUMENTS:
            by_arguments.clear()
        return by_arguments.setdefault(key, {})


def _with_all_arguments(function: Any, args: tuple[Any, ...]) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """Return a function and its arguments, those among them that a partial already has."""
    while isinstance(function, partial):
        function, args = function.func, (function.args, *function.keywords.items(), *args)
    return function, args


def model_state(model: nn.Module) -> Hashable:
    """Return a summary of all that decides how a model runs: equal summaries, equal behaviour.

    Args:
        model: The model.

    Returns:
        Its modules with their modes, hooks, flags and functions; its parameters and buffers by address, version and
        norm.

    Raises:
        UnknownStateError: If a weight cannot be compared.

    Cost: one pass over the weights.
    """
    modules = tuple((ref(module), module.training, *_hooks(module), *_attributes(module)) for module in model.modules())
    tensors = [part for tensor in (*model.parameters(), *model.buffers()) for part in _stored(tensor)]
    if any(tensor.is_inference() or tensor.is_meta for tensor in tensors):
        raise UnknownStateError
    places = tuple((tensor.data_ptr(), tensor._version) for tensor in tensors)
    return modules, places, _norms(tensors)


def _stored(tensor: Tensor) -> Iterator[Tensor]:
    """Yield the tensors that hold a tensor's numbers: itself, or those that one quantised or in shards is made of."""
    if type(tensor) in (nn.Parameter, Tensor) or not hasattr(tensor, "__tensor_flatten__"):
        yield tensor
        return
    names, _ = tensor.__tensor_flatten__()
    parts = (getattr(tensor, name) for name in names)
    for part in parts:
        if isinstance(part, Tensor):
            yield from _stored(part)


def _norms(tensors: list[Tensor]) -> tuple[float, ...]:
    """Return the norm of each tensor, in a fixed order."""
    by_type: dict[Any, list[Tensor]] = {}
    for tensor in tensors:
        by_type.setdefault((tensor.dtype, tensor.device), []).append(tensor.detach())
    norms: list[float] = []
    with torch.no_grad():
        for (dtype, _), alike in by_type.items():
            if dtype.is_floating_point and dtype.itemsize > 1:
                norms += torch.stack(torch._foreach_norm(alike)).tolist()
            else:
                norms += [float((tensor if tensor.is_complex() else tensor.double()).norm()) for tensor in alike]
    return tuple(norms)


def _hooks(module: nn.Module) -> tuple[Hashable, ...]:
    """Return the functions that are hooked to a module for longer than a call of ours."""
    attributes = vars(module)
    hooks = [hook for name in _HOOKS if attributes[name] for hook in attributes[name].values()]
    return tuple(_value_state(hook) for hook in hooks if not is_passing(hook))


def _attributes(module: nn.Module) -> tuple[Hashable, ...]:
    """Return the flags and functions among a module's attributes; numbers may count its calls."""
    attributes = [(name, value) for name, value in vars(module).items() if isinstance(value, _KINDS)]
    return tuple([(name, _value_state(original(value))) for name, value in attributes if not hides_a_class(value)])


def _value_state(value: Any) -> Hashable:
    """Return a summary of an argument, or of a function with the values that it has enclosed.

    Raises:
        UnknownStateError: If the value cannot be compared.
    """
    if value is None or isinstance(value, _SIMPLE):
        return type(value), value
    if isinstance(value, Tensor):
        return _tensor_state(value)
    if isinstance(value, (tuple, list)):
        return type(value), tuple(map(_value_state, value))
    if isinstance(value, partial):
        return _value_state((value.func, value.args, tuple(value.keywords.items())))
    if isinstance(value, MethodType):
        return ref(value.__self__), value.__func__
    if isinstance(value, FunctionType):
        return ref(value), _enclosed(value)
    return ref(value)


def _enclosed(function: FunctionType) -> tuple[Hashable, ...]:
    """Return the numbers and texts that a function has enclosed by value, and all else by identity."""
    values = []
    for cell in function.__closure__ or ():
        try:
            values.append(cell.cell_contents)
        except ValueError:  # not yet filled
            values.append(None)
    simple = (bool, int, float, str)
    return tuple((type(value), value) if isinstance(value, simple) else id(value) for value in values)


def _tensor_state(tensor: Tensor) -> Hashable:
    """Return a tensor's type, shape and entries.

    Raises:
        UnknownStateError: If it is large.
    """
    if tensor.numel() * tensor.element_size() > LARGEST_ARGUMENT or tensor.layout is not torch.strided:
        raise UnknownStateError
    entries = tensor.detach().contiguous().reshape(-1).view(torch.uint8).cpu().numpy().tobytes()
    return tensor.dtype, tuple(tensor.shape), entries
