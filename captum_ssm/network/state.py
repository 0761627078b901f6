"""Leave a model as it was, whatever it writes on itself when it runs.

Some models do: RWKV-4 divides weights when it first runs, RecurrentGemma keeps its states on its modules, and an
embedding with ``max_norm`` shortens the vectors that it looks up. After an explanation all of them are as before, bit
by bit: contents and identity of parameters and buffers, and of the tensors that modules keep beside them.

The first run of a model is watched. Later ones are not, since it takes time: the tensors that the first run wrote into
are saved beforehand, and a mixer that keeps tensors on itself runs as a copy that shares its parameters.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import lru_cache
from threading import Condition, Lock
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from captum_ssm.layers.mixers import find_mixers
from captum_ssm.network.threads import current_thread, hook_for_others, is_substituted, substitute

_ABSENT = object()
_OF_TORCH = frozenset(vars(nn.Module())) - {"training"}
"""Attributes that torch itself keeps on every module, such as its hooks."""
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
        if turn.known is None:
            stack.enter_context(_Watch(turn.state))
        else:
            turn.state.save(turn.known.tensors)
        for mixer in turn.state.keepers(model, turn.known or _Writes()):
            _run_as_copy(mixer, stack)
        yield
        turn.is_complete = True


@dataclass(frozen=True)
class _Writes:
    """Names of the tensors that a run writes into, and of the modules on which it leaves other tensors."""

    tensors: frozenset[str] = frozenset()
    modules: frozenset[str] = frozenset()


class _State:
    """All that a run of a model may change on it, as it is now.

    Args:
        model: The model.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = [_ModuleState(name, module) for name, module in _plain_modules(model)]
        self._tensors = {name: tensor for module in self._modules for name, tensor in module.tensors()}
        self._versions = [_version(tensor) for tensor in self._tensors.values()]
        self._aliases: dict[int, tuple[Tensor, Tensor]] = {}
        self._contents: dict[int, Tensor] = {}

    @property
    def kind(self) -> Hashable:
        """The flags of all modules, and the types of their other attributes: what a run writes may depend on them."""
        return tuple(module.flags for module in self._modules)

    def save(self, names: frozenset[str]) -> None:
        """Save the contents of these tensors."""
        for name in names & self._tensors.keys():
            self.save_contents(self._tensors[name])

    def save_contents(self, tensor: Tensor) -> None:
        """Save the contents of a tensor, unless that was done before."""
        if id(tensor) not in self._contents:
            self._hold(tensor)
            self._contents[id(tensor)] = tensor.data.clone()

    def held(self) -> dict[int, list[Tensor]]:
        """Hold on to the memory of all tensors, and return them by its address."""
        tensors: dict[int, list[Tensor]] = {}
        for tensor in self._tensors.values():
            self._hold(tensor)
            tensors.setdefault(_address(tensor), []).append(tensor)
        tensors.pop(0, None)  # without memory
        return tensors

    def _hold(self, tensor: Tensor) -> None:
        self._aliases.setdefault(id(tensor), (tensor, tensor.data))  # with its own count of versions

    def keepers(self, model: nn.Module, writes: _Writes) -> list[nn.Module]:
        """Return the mixers that keep tensors on themselves, or on a module within."""
        names = {module.name for module in self._modules if module.name in writes.modules or module.keeps_tensors}
        if not names:
            return []
        mixers = {mixer: name for name, mixer in find_mixers(model).items()}
        return [mixer for mixer, outer in mixers.items() if any(f"{name}.".startswith(f"{outer}.") for name in names)]

    def writes(self) -> _Writes:
        """Return all that is not as it was."""
        pairs = zip(self._tensors.items(), self._versions)
        tensors = frozenset(name for (name, tensor), version in pairs if _version(tensor) != version)
        return _Writes(tensors, frozenset(module.name for module in self._modules if module.changes()))

    def restore(self) -> None:
        """Bring all back that was saved, and the attributes of the modules."""
        for number, (tensor, alias) in self._aliases.items():
            if number in self._contents:
                alias.copy_(self._contents[number])
            if _address(tensor) != _address(alias):
                tensor.data = alias
        for module in self._modules:
            module.restore(with_flags=bool(self._contents))


class _ModuleState:
    """The attributes, parameters and buffers of one module, as they are now.

    Args:
        name: Dotted name of the module.
        module: The module.
    """

    def __init__(self, name: str, module: nn.Module) -> None:
        self.name = name
        self._module = module
        self._attributes = {key: value for key, value in vars(module).items() if key not in _OF_TORCH}
        self._tables: list[tuple[dict[str, Any], dict[str, Any]]] = [
            (cast(Any, table), dict(table)) for table in (module._parameters, module._buffers)
        ]
        self._lists = [(value, list(value)) for value in self._attributes.values() if type(value) is list]
        self._tables += [(value, dict(value)) for value in self._attributes.values() if type(value) is dict]

    @property
    def flags(self) -> Hashable:
        """The values of attributes that are flags or words, and the types of all others."""
        values = self._attributes.values()
        return tuple([v if type(v) is bool or type(v) is str else type(v) for v in values])

    @property
    def keeps_tensors(self) -> bool:
        """Whether an attribute beside parameters and buffers is a tensor, or holds some."""
        return any(_has_tensor(value) for value in self._attributes.values())

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        """Yield all tensors with their names."""
        named = [pair for _, table in self._tables for pair in table.items()]
        named += [(f"{number}", value) for _, entries in self._lists for number, value in enumerate(entries)]
        named += self._attributes.items()
        for key, tensor in named:
            if isinstance(tensor, Tensor):
                yield f"{self.name}.{key}", tensor
                yield from ((f"{self.name}.{key}.{k}", t) for k, t in vars(tensor).items() if isinstance(t, Tensor))

    def changes(self) -> bool:
        """Whether the module holds other tensors than before."""
        now = vars(self._module)
        return (
            any(_differs(now.get(key, _ABSENT), value) for key, value in self._attributes.items())
            or any(key not in _OF_TORCH and _differs(now[key], _ABSENT) for key in now.keys() - self._attributes.keys())
            or any(len(table) != len(entries) for table, entries in [*self._tables, *self._lists])
            or any(_differs(t, e) for values, entries in self._lists for t, e in zip(values, entries))
            or any(_differs(table.get(key), value) for table, entries in self._tables for key, value in entries.items())
        )

    def restore(self, *, with_flags: bool) -> None:
        """Bring back the tensors that the module held.

        Args:
            with_flags: Bring back the flags too, which tell whether something was written into a tensor.
        """
        now = vars(self._module)
        for key in list(dict.fromkeys([*now, *self._attributes])):
            old, new = self._attributes.get(key, _ABSENT), now.get(key, _ABSENT)
            if key in _OF_TORCH or old is new:
                continue
            if _differs(old, new) or (with_flags and _is_flag(old) and _is_flag(new)):
                if old is _ABSENT:
                    del now[key]
                else:
                    now[key] = old
        for table, entries in self._tables:
            if len(table) != len(entries) or any(table.get(key) is not value for key, value in entries.items()):
                table.clear()
                table.update(entries)
        for values, items in self._lists:
            if len(values) != len(items) or any(value is not item for value, item in zip(values, items)):
                values[:] = items


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
                    self._settle(turn)
        finally:
            with self._left:
                del self._inside[thread]
                self._left.notify_all()

    def _settle(self, turn: _Turn) -> None:
        """Bring the state back, and remember what was written."""
        writes = turn.state.writes()
        with turn.lock:
            if not turn.others_ran:
                turn.state.restore()
        if turn.others_ran:
            return
        known = turn.known or _Writes()
        if turn.known is None and turn.is_complete:
            if len(self._known) >= _KINDS:
                self._known.clear()
            self._known[turn.kind] = writes
        elif writes.tensors - known.tensors or writes.modules - known.modules:
            self._known.pop(turn.kind, None)  # watched the next time


_TURNS: WeakKeyDictionary[nn.Module, _Turns] = WeakKeyDictionary()
_TURNS_LOCK = Lock()


def _turns(model: nn.Module) -> _Turns:
    with _TURNS_LOCK:
        return _TURNS.setdefault(model, _Turns())


def _run_as_copy(mixer: nn.Module, stack: ExitStack) -> None:
    """Run a copy of a mixer instead, which shares parameters and hooks, in this thread until the stack is closed."""
    if "forward" in vars(mixer) and not is_substituted(vars(mixer)["forward"]):
        return  # patched into the object, it would run the original
    clone = _copy(mixer)
    substitute(mixer, "forward", lambda below: clone.forward, stack)


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


def _plain_modules(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return all modules that are made of Python objects, with their names."""
    return [(name, m) for name, m in model.named_modules() if not isinstance(m, torch.jit.ScriptModule)]


def _has_tensor(value: Any) -> bool:
    """Whether ``value`` is a tensor, or a list, tuple or dictionary that holds one."""
    if isinstance(value, dict):
        value = list(value.values())
    return isinstance(value, Tensor) or (
        isinstance(value, (list, tuple)) and any(isinstance(part, Tensor) for part in value)
    )


def _differs(old: Any, new: Any) -> bool:
    """Whether two values are not the same object, and a tensor is among them."""
    return old is not new and (_has_tensor(old) or _has_tensor(new))


def _is_flag(value: Any) -> bool:
    return value is None or value is _ABSENT or isinstance(value, (bool, int, float, str))


def _version(tensor: Tensor) -> Any:
    """Return a figure that is another one after each writing into the tensor."""
    return None if tensor.is_inference() else (tensor._version, _address(tensor))


def _address(tensor: Tensor) -> int:
    """Return the address of a tensor's memory; 0 if it has none."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (NotImplementedError, RuntimeError):  # such as a sparse tensor
        return 0
