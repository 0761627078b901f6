"""Run a model as its Python code says, and once.

Code that ``torch.compile`` made sees no hook that is set later. Code that ``torch.utils.checkpoint`` runs again for the
gradient has other tensors then.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from threading import Lock
from typing import Any

import torch
import torch.utils.checkpoint

from captum_ssm.network.threads import substitute


class _Stance:
    """Sets compilation aside as long as anyone asks for it: torch has one stance for all threads."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._asking = 0
        self._before = ExitStack()

    @contextmanager
    def eager(self) -> Iterator[None]:
        """Run compiled modules and functions by their Python code while the context is open.

        Yields:
            None.
        """
        with self._lock:
            if self._asking == 0:
                self._before.enter_context(torch.compiler.set_stance("force_eager"))
            self._asking += 1
        try:
            yield
        finally:
            with self._lock:
                self._asking -= 1
                if self._asking == 0:
                    self._before.close()


_STANCE = _Stance()


class OwnCheckpoint:
    """A function that is run again for the gradient although the checkpoints of the model are not.

    Args:
        function: The function.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Return the result of the function."""
        return self._function(*args, **kwargs)


def run_eagerly(stack: ExitStack) -> None:
    """Run the Python code of compiled modules and functions, and checkpointed code once, until the stack is closed.

    Other threads run their compiled code by its Python code too meanwhile, and their checkpoints as always.

    Args:
        stack: Lets compiled code and checkpoints run again.
    """
    if "torch._dynamo" in sys.modules:  # nothing is compiled without it
        stack.enter_context(_STANCE.eager())
    substitute(torch.utils.checkpoint, "_checkpoint_without_reentrant_generator", _once, stack)
    substitute(torch.utils.checkpoint.CheckpointFunction, "apply", _applied_once, stack)


def _once(checkpoint: Callable[..., Any]) -> Callable[..., Any]:
    """Return a stand-in for torch's generator around a function that is to be run again: it does nothing."""

    def around(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Iterator[None]:
        if isinstance(function, OwnCheckpoint):
            yield from checkpoint(function, *args, **kwargs)
        else:
            yield

    return around


def _applied_once(_: Callable[..., Any]) -> Callable[..., Any]:
    """Return a stand-in for torch's reentrant checkpoint."""
    return lambda function, preserve_rng_state, *args: function(*args)


def compiled_from(function: Any) -> Any:
    """Return the function that ``torch.compile`` wrapped; any other value unchanged."""
    return getattr(function, "_torchdynamo_orig_callable", function)
