"""Leave a model as it was, whatever it writes on itself when it runs, and whichever threads run it at the same time.

The first run of a model is watched. Later ones are not, since it takes time: the tensors that the first run wrote into
are saved beforehand, and a mixer that keeps tensors on itself runs as a copy that shares its parameters. The first time
all mixers do so, since another thread may run the originals.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from threading import Condition, Lock
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

from torch import Tensor, nn

from captum_ssm.layers.mixers import known_mixers
from captum_ssm.network.copies import keeps_tensors, run_as_copy
from captum_ssm.network.eager import run_eagerly
from captum_ssm.network.gathered import gather
from captum_ssm.network.state import Place, State, Watch
from captum_ssm.network.threads import current_thread, hook_for_others

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
        run_eagerly(stack)
        gather(turn.state.modules, stack)
        if turn.known is None:
            stack.enter_context(Watch(turn.state))
        else:
            turn.state.save(turn.known.tensors)
        turn.copies = {mixer: copy for mixer in turn.mixers(model) if (copy := run_as_copy(mixer, stack)) is not None}
        turn.state.leave_out(turn.copies)
        yield
        turn.is_complete = True


@dataclass(frozen=True)
class _Writes:
    """What a run writes: where tensors are that it writes into, and mixers on which it leaves other tensors."""

    tensors: frozenset[Place] = frozenset()
    keepers: tuple[ReferenceType[nn.Module], ...] = ()


@dataclass
class _Turn:
    """One explanation of a model: the state before it, and what runs of its kind write, if that is known."""

    state: State
    kind: Hashable
    known: _Writes | None
    is_complete: bool = False
    others_ran: bool = False
    copies: dict[nn.Module, nn.Module] = field(default_factory=dict)
    lock: Lock = field(default_factory=Lock)

    @property
    def is_exclusive(self) -> bool:
        """Whether no other explanation of the model may run at the same time."""
        return self.known is None or bool(self.known.tensors)

    def mixers(self, model: nn.Module) -> list[nn.Module]:
        """Return the mixers that keep tensors on themselves; all, if that is not known yet."""
        if self.known is None:
            return list(dict.fromkeys(known_mixers(model).values()))
        mixers = [mixer() for mixer in self.known.keepers]
        return [mixer for mixer in mixers if mixer is not None]

    @property
    def keepers(self) -> tuple[ReferenceType[nn.Module], ...]:
        """The mixers whose copy has tensors on itself that are neither parameters nor buffers."""
        return tuple(ref(mixer) for mixer, copy in self.copies.items() if keeps_tensors(copy))

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
            state = State(model)
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
        state, first = turn.state, turn.known is None
        if not first and not turn.is_exclusive and state.is_same:
            return
        writes = _Writes(state.written(), turn.keepers) if first else None
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
