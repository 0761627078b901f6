"""Leave a model as it was, whatever it writes on itself when it runs.

Some models do: RWKV-4 divides weights when it first runs, RecurrentGemma keeps its states on its modules, and an
embedding with ``max_norm`` shortens the vectors that it looks up. After an explanation all of them are as before, bit
by bit: contents and identity of parameters and buffers, and of the tensors that modules keep beside them.

The first run of a model is watched. Later ones are not, since it takes time: the tensors that the first run wrote into
are saved beforehand, and a mixer that keeps tensors on itself runs as a copy that shares its parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Collection, Hashable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from operator import is_
from threading import Condition, Lock
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from captum_ssm.layers.mixers import find_mixers
from captum_ssm.network.eager import run_eagerly
from captum_ssm.network.threads import current_thread, hook_for_others, is_substituted, substitute

_ABSENT = object()
_OF_TORCH = frozenset(vars(nn.Module()))
"""Attributes that torch itself keeps on every module, such as its hooks."""
_TABLES = ("_parameters", "_buffers", "_modules")
_KINDS = 64
"""How many kinds of runs of one model are known at most."""


@contextmanager
def unchanged(model: nn.Module, forward_func: Callable[..., Any], inputs: Any) -> Iterator[None]:
    """Run a model while the context is open, and leave it as it was.

    Threads: explanations of one model run at once. Only the first of each kind, and those of a model that writes into
    its parameters or buffers, such as RWKV-4 before its own first run, take turns; and if another thread runs such a
    model in the meantime, all that was written stays, as after a run without an explanation.

    Args:
        model: The model.
        forward_func: The callable that runs it.
        inputs: The inputs, a tensor or a tuple of one: with another callable, or with embeddings instead of ids, a
            model may write into other tensors.

    Yields:
        None.

    Cost: the first time one call of Python for each operation; then a walk over the modules, and a copy of the tensors
    that the model writes into.
    """
    turns = _turns(model)
    if turns.is_inside:
        yield
        return
    code = getattr(forward_func, "__code__", type(forward_func))
    tensors = [t for t in (inputs if isinstance(inputs, tuple) else (inputs,)) if isinstance(t, Tensor)]
    kind = code, *[(tensor.is_floating_point(), tensor.dim()) for tensor in tensors]
    with turns.taken(model, kind) as turn, ExitStack() as stack:
        run_eagerly(turn.state.modules, stack)
        if turn.known is None:
            stack.enter_context(_Watch(turn.state))
        else:
            turn.state.save(turn.known.tensors)
        turn.state.leave_out([mixer for mixer in turn.keepers(model) if _run_as_copy(mixer, stack)])
        yield
        turn.is_complete = True


Place = tuple[int, str, Any]
"""Where a model keeps a tensor: the number of the module, and a key in a table or list, or None, of an attribute."""


@dataclass(frozen=True)
class _Writes:
    """What a run writes: where tensors are that it writes into, and mixers on which it leaves other tensors."""

    tensors: frozenset[Place] = frozenset()
    keepers: tuple[ReferenceType[nn.Module], ...] = ()


class _State:
    """All that a run of a model may change on it, as it is now.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self.modules = _plain_modules(model)
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
        self._versions = _versions(self._registered)
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
            and self._versions == _versions(self._registered)
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

    def keepers(self, model: nn.Module) -> list[nn.Module]:
        """Return the mixers that keep tensors on themselves or on a module within, now or when the state was taken."""
        modules = {
            module
            for module, now, old in zip(self.modules, self._now, self._attributes)
            if any(key not in _OF_TORCH and _has_tensor(value) for key, value in [*now.items(), *old.items()])
        }
        return [mixer for mixer in dict.fromkeys(find_mixers(model).values()) if modules & set(mixer.modules())]

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
                if before is not after and (flags or _has_tensor(before) or _has_tensor(after)):
                    now.update({key: before})
                    if before is _ABSENT:
                        del now[key]
        for _, _, part, old_part in self._kept_parts:
            if not _same(_entries(part), _entries(old_part)) and (_has_tensor(part) or _has_tensor(old_part)):
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


class _Watch(TorchDispatchMode):
    """Saves each tensor of a state before an operation writes into its memory.

    Args:
        state: The state.
    """

    def __init__(self, state: _State) -> None:
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
        return func(*args, **kwargs)


@lru_cache
def _written_arguments(operation: Any) -> list[tuple[int, str]]:
    """Return place and name of the arguments that an operation of torch writes into."""
    arguments = enumerate(operation._schema.arguments)
    return [(place, a.name) for place, a in arguments if a.alias_info is not None and a.alias_info.is_write]


@dataclass
class _Turn:
    """One explanation of a model: the state before it, and what runs of its kind write, if that is known."""

    state: _State
    kind: Hashable
    known: _Writes | None
    is_complete: bool = False
    others_ran: bool = False
    lock: Lock = field(default_factory=Lock)

    @property
    def is_exclusive(self) -> bool:
        """Whether no other explanation of the model may run at the same time."""
        return self.known is None or bool(self.known.tensors)

    def keepers(self, model: nn.Module) -> list[nn.Module]:
        """Return the mixers that keep tensors on themselves."""
        if self.known is None:
            return self.state.keepers(model)
        mixers = [mixer() for mixer in self.known.keepers]
        return [mixer for mixer in mixers if mixer is not None]

    def note_run(self, *_: Any) -> None:
        """Note that another thread runs the model; it waits while the state is brought back."""
        with self.lock:
            self.others_ran = True


class _Turns:
    """The explanations of one model that run now, and what earlier ones wrote."""

    def __init__(self) -> None:
        self._door = Lock()
        self._inside: dict[int, _Turn] = {}
        self._left = Condition()
        self._known: dict[Hashable, _Writes] = {}

    @property
    def is_inside(self) -> bool:
        """Whether this thread explains the model already."""
        return current_thread() in self._inside

    @contextmanager
    def taken(self, model: nn.Module, circumstances: Hashable) -> Iterator[_Turn]:
        """Wait for a turn, and bring the model's state back at its end.

        Args:
            model: The model.
            circumstances: What a run writes may depend on this.

        Yields:
            The turn.
        """
        thread = current_thread()
        with self._door, self._left:
            self._left.wait_for(lambda: not any(turn.is_exclusive for turn in self._inside.values()))
            state = _State(model)
            kind = circumstances, state.kind
            turn = _Turn(state, kind, self._known.get(kind))
            if turn.is_exclusive:
                self._left.wait_for(lambda: not self._inside)
            self._inside[thread] = turn
        try:
            with ExitStack() as hooks:
                if turn.is_exclusive:
                    hook_for_others(model.register_forward_pre_hook, turn.note_run, hooks)
                try:
                    yield turn
                finally:
                    self._settle(model, turn)
        finally:
            with self._left:
                del self._inside[thread]
                self._left.notify_all()

    def _settle(self, model: nn.Module, turn: _Turn) -> None:
        """Bring the state back, and remember what was written."""
        state, first = turn.state, turn.known is None
        if not first and not turn.is_exclusive and state.is_same:
            return
        writes = _Writes(state.written(), tuple(ref(mixer) for mixer in state.keepers(model))) if first else None
        if not first and not turn.is_exclusive:
            self._known.pop(turn.kind, None)  # it writes after all: watched the next time
        with turn.lock:
            if turn.others_ran:
                return
            state.restore()
        if writes is not None and turn.is_complete:
            if len(self._known) >= _KINDS:
                self._known.clear()
            self._known[turn.kind] = writes


_TURNS: WeakKeyDictionary[nn.Module, _Turns] = WeakKeyDictionary()
_TURNS_LOCK = Lock()


def _turns(model: nn.Module) -> _Turns:
    with _TURNS_LOCK:
        return _TURNS.setdefault(model, _Turns())


def _run_as_copy(mixer: nn.Module, stack: ExitStack) -> bool:
    """Run a copy of a mixer instead, which shares parameters and hooks, in this thread until the stack is closed.

    Returns:
        Whether it does: not if a function is patched into the mixer, which would run the original.
    """
    if "forward" in vars(mixer) and not is_substituted(vars(mixer)["forward"]):
        return False
    clone = _copy(mixer)
    substitute(mixer, "forward", lambda below: clone.forward, stack)
    return True


def _copy(module: nn.Module) -> nn.Module:
    """Return a copy of a module and of those within that keeps its own attributes."""
    clone = copy.copy(module)
    state = vars(clone)
    if is_substituted(state.get("forward")):
        del state["forward"]
    state.update({key: copy.copy(v) for key, v in state.items() if key not in _OF_TORCH and type(v) in (list, dict)})
    state.update({table: dict(state[table]) for table in ("_parameters", "_buffers")})
    state["_modules"] = {name: child and _copy(child) for name, child in module._modules.items()}
    return clone


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
    return len(_OF_TORCH) if next(iter(attributes), None) == "training" else 0


def _same(now: Collection[Any], old: Collection[Any]) -> bool:
    """Whether two collections have the same objects in the same order."""
    return len(now) == len(old) and all(map(is_, now, old))


def _entries(part: Any) -> Collection[Any]:
    """Return the entries of a list or a dictionary."""
    return part.values() if isinstance(part, dict) else part


def _has_tensor(value: Any) -> bool:
    """Whether ``value`` is a tensor, or a list, tuple or dictionary that holds one."""
    if isinstance(value, (list, tuple, dict)):
        return any(isinstance(part, Tensor) for part in _entries(value))
    return isinstance(value, Tensor)


def _is_flag(value: Any) -> bool:
    return value is None or value is _ABSENT or isinstance(value, (bool, int, float, str))


def _versions(tensors: Iterable[Tensor]) -> list[Any]:
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
