"""Run the Python code of a model that ``torch.compile`` has compiled: compiled code sees no hook that is set later."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from functools import partial
from typing import Any

from torch import nn

from captum_ssm.network.threads import substitute


def run_eagerly(modules: Iterable[nn.Module], stack: ExitStack) -> None:
    """Run the Python code of compiled modules, in this thread, until the stack is closed.

    Args:
        modules: All modules of a model; ``torch.compile`` may have wrapped some, and their ``compile`` works in place.
        stack: Lets the compiled code run again.
    """
    for module in modules:
        names = vars(module)
        if names.get("_compiled_call_impl") is not None:
            substitute(module, "_compiled_call_impl", partial(_instead, module._call_impl), stack)
        if "_orig_mod" in names["_modules"] and "forward" in names:
            substitute(module, "forward", partial(_instead, compiled_from(module)), stack)


def _instead(function: Callable[..., Any], _: Callable[..., Any]) -> Callable[..., Any]:
    """Return the first function, whatever the second one is."""
    return function


def compiled_from(model: Any) -> Any:
    """Return the module that ``torch.compile`` wrapped; any other value unchanged."""
    within = vars(model).get("_modules", {}) if isinstance(model, nn.Module) else {}
    return within.get("_orig_mod", model)
