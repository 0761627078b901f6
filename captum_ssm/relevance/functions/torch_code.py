"""Functions of torch that torch itself writes in other functions, in Python."""

from __future__ import annotations

from collections.abc import Callable
from types import FunctionType
from typing import Any


def as_torch_writes_it(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of torch that runs its own code on traced tensors, whose calls then come to the rule.

    Torch's code first asks whether any argument wants to take over the call. The returned function does not ask.

    Args:
        function: A function that is written in Python, such as ``torch.nn.functional.local_response_norm``.
    """
    assert isinstance(function, FunctionType)
    names = [name for name in function.__globals__ if name.startswith("has_torch_function")]
    unasked = {**function.__globals__, **dict.fromkeys(names, lambda *_: False)}
    copy = FunctionType(function.__code__, unasked, function.__name__, function.__defaults__, function.__closure__)
    copy.__kwdefaults__ = function.__kwdefaults__
    return copy
