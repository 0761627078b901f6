"""The state of a model before it runs, so that whatever it writes on itself can be undone.

Some models do: RWKV-4 divides weights when it first runs, RecurrentGemma keeps its states on its modules, and an
embedding with ``max_norm`` shortens the vectors that it looks up. Restored are contents and identity of parameters and
buffers, and of the tensors that modules keep beside them, bit by bit. A part with a quantised weight is left to itself:
some lay out their weight anew for the device when they first run, and note that where no tensor tells.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterable, Mapping
from functools import lru_cache
from itertools import islice
from operator import is_
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from captum_ssm.layers.stand_ins import is_packed_part

_ABSENT = object()
OF_TORCH = frozenset(vars(nn.Module()))
"""Attributes that torch itself keeps on every module, such as its hooks."""
_TABLES = ("_parameters", "_buffers", "_modules")

Place = tuple[int, str, Any]
"""Where a model keeps a tensor: the number of the module, and a key in a table or list, or None, of an attribute."""


class State:
    """All that a run of a model may change on it, as it is now.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = [module for module in _plain_modules(model) if not is_packed_part(module)]
        self._now = [vars(module) for module in self.modules]
        self._attributes = [now.copy() for now in self._now]
        self._kept_attributes = list(zip(self._now, self._attributes))
        self._own = [list(islice(old.items(), _first_own(old), None)) for old in self._attributes]
        tables = [(number, name, old[name]) for number, old in enumerate(self._attributes) for name in _TABLES]
        own = [
            (number, name, value)
            for number, items in enumerate(self._own)
            for name, value in items
            if type(value) is dict or type(value) is list
        ]
        self._parts = [(number, name, part, part.copy()) for number, name, part in [*tables, *own]]
        self._kept_parts = self._parts
        registered = [table for _, name, table in tables if name != "_modules"]
        self._registered = [tensor for table in registered for tensor in table.values() if tensor is not None]
        self._versions = versions(self._registered)
        self._held: dict[int, tuple[Tensor, Tensor]] = {}
        self._contents: dict[int, Tensor] = {}

    @property
    def kind(self) -> Hashable:
        """The flags of all modules, and the types of all attributes: what a run writes may depend on them."""
        values = [[value for _, value in items] for items in self._own]
        flags = [value for part in values for value in part if value is True or value is False]
        return tuple([tuple(map(type, part)) for part in values]), tuple(flags)

    @property
    def is_same(self) -> bool:
        """Whether nothing is changed, as far as parameters, buffers and attributes tell."""
        return (
            all(_same(now.values(), old.values()) for now, old in self._kept_attributes)
            and all(_same(_entries(part), _entries(old)) for _, _, part, old in self._kept_parts)
            and self._versions == versions(self._registered)
        )

    def leave_out(self, mixers: Iterable[nn.Module]) -> None:
        """Leave the attributes of some mixers, and of the modules within, to other threads: copies run instead."""
        modules = {module for mixer in mixers for module in mixer.modules()}
        if modules:
            kept = [module not in modules for module in self.modules]
            self._kept_attributes = [pair for pair, is_kept in zip(self._kept_attributes, kept) if is_kept]
            self._kept_parts = [part for part in self._parts if kept[part[0]]]

    def save(self, places: frozenset[Place]) -> None:
        """Save the contents of the tensors at these places."""
        tensors = self._tensors() if places else {}
        for place in places & tensors.keys():
            self.save_contents(tensors[place])

    def save_contents(self, tensor: Tensor) -> None:
        """Save the contents of a tensor, unless that was done before."""
        if id(tensor) not in self._contents:
            self._hold(tensor)
            self._contents[id(tensor)] = tensor.data.clone()

    def held(self) -> dict[int, list[Tensor]]:
        """Hold on to the memory of all tensors, and return them by its address."""
        tensors: dict[int, list[Tensor]] = {}
        for tensor in self._tensors().values():
            self._hold(tensor)
            tensors.setdefault(_address(tensor), []).append(tensor)
        tensors.pop(0, None)  # without memory
        return tensors

    def written(self) -> frozenset[Place]:
        """Return where the tensors are whose contents were saved, or that have other memory now."""
        return frozenset(
            place
            for place, tensor in self._tensors().items()
            if id(tensor) in self._contents
            or (id(tensor) in self._held and _address(tensor) != _address(self._held[id(tensor)][1]))
        )

    def restore(self) -> None:
        """Bring back the contents that were saved, and the tensors that modules held; with contents the flags too."""
        for number, (tensor, alias) in self._held.items():
            if number in self._contents:
                alias.copy_(self._contents[number])
            if _address(tensor) != _address(alias):
                tensor.data = alias
        for now, old in self._kept_attributes:
            for key in [*now.keys() | old.keys()]:
                before, after = old.get(key, _ABSENT), now.get(key, _ABSENT)
                flags = bool(self._contents) and _is_flag(before) and _is_flag(after)
                if before is not after and (flags or has_tensor(before) or has_tensor(after)):
                    now.update({key: before})
                    if before is _ABSENT:
                        del now[key]
        for _, _, part, old_part in self._kept_parts:
            if not _same(_entries(part), _entries(old_part)) and (has_tensor(part) or has_tensor(old_part)):
                part.clear()
                part.update(old_part) if isinstance(part, dict) else part.extend(old_part)

    def _tensors(self) -> dict[Place, Tensor]:
        """Return all tensors that the modules held, and those that these hold themselves."""
        attributes = [(n, name, None, v) for n, old in enumerate(self._attributes) for name, v in old.items()]
        entries = [
            (number, name, key, value)
            for number, name, _, part in self._parts
            for key, value in (part.items() if isinstance(part, dict) else enumerate(part))
        ]
        tensors: dict[Place, Tensor] = {}
        for number, name, key, value in [*attributes, *entries]:
            if isinstance(value, Tensor):
                tensors[number, name, key] = value
                within = [(inner, t) for inner, t in vars(value).items() if isinstance(t, Tensor)]
                tensors.update({(number, name, (key, inner)): t for inner, t in within})
        return tensors

    def _hold(self, tensor: Tensor) -> None:
        self._held.setdefault(id(tensor), (tensor, tensor.data))  # with its own count of versions


class Watch(TorchDispatchMode):
    """Saves each tensor of a state before an operation writes into its memory.

    Args:
        state: The state.
    """

    def __init__(self, state: State) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._state = state
        self._tensors = state.held()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        for place, name in _written_arguments(func):
            argument = args[place] if place < len(args) else kwargs.get(name)
            for tensor in argument if isinstance(argument, (list, tuple)) else [argument]:
                for owner in self._tensors.get(_address(tensor), []) if isinstance(tensor, Tensor) else []:
                    self._state.save_contents(owner)
        with torch._C.DisableTorchFunctionSubclass():  # a subclass among the arguments has had its turn
            return func(*args, **kwargs)


@lru_cache
def _written_arguments(operation: Any) -> list[tuple[int, str]]:
    """Return place and name of the arguments that an operation of torch writes into."""
    arguments = enumerate(operation._schema.arguments)
    return [(place, a.name) for place, a in arguments if a.alias_info is not None and a.alias_info.is_write]


def _plain_modules(model: nn.Module) -> list[nn.Module]:
    """Return all modules that are made of Python objects, each once."""
    modules: dict[nn.Module, None] = {}
    pending = [model]
    while pending:
        module = pending.pop()
        if module not in modules and not isinstance(module, torch.jit.ScriptModule):
            modules[module] = None
            pending.extend([child for child in vars(module)["_modules"].values() if child is not None])
    return list(modules)


def _first_own(attributes: Mapping[str, Any]) -> int:
    """Return the number of the first attribute that is a module's own: torch sets those of every module first."""
    return len(OF_TORCH) if next(iter(attributes), None) == "training" else 0


def _same(now: Collection[Any], old: Collection[Any]) -> bool:
    """Whether two collections have the same objects in the same order."""
    return len(now) == len(old) and all(map(is_, now, old))


def _entries(part: Any) -> Collection[Any]:
    """Return the entries of a list or a dictionary."""
    return part.values() if isinstance(part, dict) else part


def has_tensor(value: Any) -> bool:
    """Whether ``value`` is a tensor, or a list, tuple or dictionary that holds one."""
    if isinstance(value, (list, tuple, dict)):
        return any(isinstance(part, Tensor) for part in _entries(value))
    return isinstance(value, Tensor)


def _is_flag(value: Any) -> bool:
    return value is None or value is _ABSENT or isinstance(value, (bool, int, float, str))


def versions(tensors: Iterable[Tensor]) -> list[Any]:
    """Return for each tensor a figure that is another one after each writing into it; None if torch keeps none."""
    try:
        return [tensor._version for tensor in tensors]
    except RuntimeError:  # made in inference mode
        return [None if tensor.is_inference() else tensor._version for tensor in tensors]


def _address(tensor: Tensor) -> int:
    """Return the address of a tensor's memory; 0 if it has none."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # such as a sparse tensor
        return 0
