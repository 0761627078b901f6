"""Run a layer once more by itself, in another floating-point type, and leave the layer as it is."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn


def rerun(mixer: nn.Module, x: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Return what the layer's own code gives for ``x``, computed in the type of ``x``.

    Args:
        mixer: The layer.
        x: Input (B, L, E).
        kwargs: The call's other arguments.
    """
    output = type(mixer).forward(alone(mixer, x), x, **cast(dict(kwargs), x))
    return output if isinstance(output, Tensor) else output[0]


def alone(module: Any, x: Tensor | None, configure: Callable[[Any], Any] = lambda config: config) -> Any:
    """Return a copy of a module to run by itself: its parameters as ``x`` in type and device, and no hooks.

    Nothing of the original is changed, also not for a moment, which rules out ``torch.func.functional_call``.

    Args:
        module: Any module; call its class's ``forward`` on the copy.
        x: A tensor of the wanted type and device; None keeps the parameters as they are.
        configure: What becomes of the ``config`` of the module and of each module within.
    """
    clone = copy.copy(module)
    state = vars(clone)
    state.pop("forward", None)  # patched into the object, it would run the original
    state["_modules"] = {name: child and alone(child, x, configure) for name, child in module._modules.items()}
    if x is not None:
        state.update({tensors: cast(state[tensors], x) for tensors in ("_parameters", "_buffers")})
    state.update({f"_{which}_hooks": {} for which in ("forward", "forward_pre", "backward", "backward_pre")})
    if "config" in state:
        state["config"] = configure(module.config)
    return clone


def cast(value: Any, x: Tensor) -> Any:
    """Return the floating-point tensors in a nested value as ``x`` in type and device, all else as it is."""
    if isinstance(value, Tensor):
        return value.to(x) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {name: cast(part, x) for name, part in value.items()}
    return tuple(cast(part, x) for part in value) if isinstance(value, tuple) else value
