"""Several threads at one model: hooks and substitutes that act in the thread that set them and in no other.

While one thread explains a model, others may run it or explain it too: they see neither its hooks nor its substitutes.
A thread of autograd that runs a block once more works for the thread whose block it is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import RLock, get_ident
from typing import Any

from torch.utils.hooks import RemovableHandle

_LOCK = RLock()
"""Held while a hook or a substitute is set or withdrawn: torch numbers its hooks without one."""

_WORKS_FOR: dict[int, int] = {}
"""By number of a thread: the thread that it works for now, if that is another one."""


def current_thread() -> int:
    """Return the number of the thread that this code runs for."""
    number = get_ident()
    return _WORKS_FOR.get(number, number)


@contextmanager
def working_for(thread: int) -> Iterator[None]:
    """Let the running thread see the hooks and substitutes of another one while the context is open.

    Args:
        thread: The number of the other thread, as :func:`current_thread` gave it there.

    Yields:
        None.
    """
    number, before = get_ident(), current_thread()
    _WORKS_FOR[number] = thread
    try:
        yield
    finally:
        if before == number:
            del _WORKS_FOR[number]
        else:
            _WORKS_FOR[number] = before


class _Hook:
    """A hook that acts in one thread, or in all others. A copy of it, on a copy of the module, does nothing.

    Args:
        function: The hook; None does nothing.
        thread: The thread.
        for_others: Whether it acts in all other threads instead.
    """

    is_passing = True
    """Known to :mod:`captum_ssm.layers.stand_ins` too: no part of the module."""

    def __init__(self, function: Callable[..., Any] | None = None, thread: int = 0, for_others: bool = False) -> None:
        self._function = function
        self._thread = thread
        self._for_others = for_others

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if self._function is None or (self._thread == current_thread()) == self._for_others:
            return None
        return self._function(*args, **kwargs)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Hook, ()


def is_passing(function: Any) -> bool:
    """Whether a module's hook was set by :func:`hook` or :func:`hook_for_others`, and is no part of the module."""
    return isinstance(function, _Hook)


def hook(
    register: Callable[..., RemovableHandle], function: Callable[..., Any], stack: ExitStack, **options: Any
) -> None:
    """Set a hook that acts in this thread alone until the stack is closed.

    Args:
        register: A module's method that registers the hook, such as ``module.register_forward_hook``.
        function: The hook.
        stack: Removes it.
        **options: Other arguments of ``register``.
    """
    with _LOCK:
        handle = register(_Hook(function, current_thread()), **options)
    stack.callback(handle.remove)


def hook_for_others(register: Callable[..., RemovableHandle], function: Callable[..., Any], stack: ExitStack) -> None:
    """Set a hook that acts in all threads but this one until the stack is closed.

    Args:
        register: A module's method that registers the hook.
        function: The hook, which must return None.
        stack: Removes it.
    """
    with _LOCK:
        handle = register(_Hook(function, current_thread(), for_others=True))
    stack.callback(handle.remove)


class Substituted:
    """A function that is another one in some threads.

    Args:
        original: The function in all other threads.
        is_own: Whether the object that has the function holds it itself, and not by its class.
    """

    is_passing = True
    """Known to :mod:`captum_ssm.layers.stand_ins` too: no part of the object."""

    def __init__(self, original: Callable[..., Any], is_own: bool) -> None:
        self.original = self.__wrapped__ = original  # its signature is the original's
        self.is_own = is_own
        self.substitutes: dict[int, list[Callable[..., Any]]] = {}

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the result of the function that this thread sees."""
        return self.seen_by(current_thread())(*args, **kwargs)

    def seen_by(self, thread: int) -> Callable[..., Any]:
        """Return the function that a thread calls: its latest substitute, or the original."""
        own = self.substitutes.get(thread)
        return own[-1] if own else self.original

    def __reduce__(self) -> tuple[Any, ...]:
        return _same, (self.original,)


def _same(function: Callable[..., Any]) -> Callable[..., Any]:
    return function


def substitute(
    home: Any, name: str, make: Callable[[Callable[..., Any]], Callable[..., Any]], stack: ExitStack
) -> None:
    """Let a function of an object be another one in this thread until the stack is closed.

    Args:
        home: The object that has the function: a module of Python, or a layer.
        name: The function's name.
        make: From the function that this thread has called so far to its substitute.
        stack: Withdraws the substitute.
    """
    thread = current_thread()
    with _LOCK:
        shared = vars(home).get(name)
        if not isinstance(shared, Substituted):
            shared = Substituted(getattr(home, name), is_own=name in vars(home))
        shared.substitutes.setdefault(thread, []).append(make(shared.seen_by(thread)))
        setattr(home, name, shared)
    stack.callback(_withdraw, home, name, shared, thread)


def _withdraw(home: Any, name: str, shared: Substituted, thread: int) -> None:
    """Withdraw the latest substitute of a thread; the last one leaves the object as it was."""
    with _LOCK:
        own = shared.substitutes[thread]
        own.pop()
        if not own:
            del shared.substitutes[thread]
        if shared.substitutes or vars(home).get(name) is not shared:
            return
        if shared.is_own:
            setattr(home, name, shared.original)
        else:
            delattr(home, name)


def is_substituted(function: Any) -> bool:
    """Whether some threads see a substitute of a function."""
    return isinstance(function, Substituted)


def hides_a_class(function: Any) -> bool:
    """Whether an object has a function for no other reason than a substitute of its class's function."""
    return isinstance(function, Substituted) and not function.is_own


def original(function: Any) -> Any:
    """Return the function of which some threads see a substitute; any other value unchanged."""
    return function.original if isinstance(function, Substituted) else function
