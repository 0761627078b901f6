"""Run a copy of a layer without touching the layer: in another floating-point type, or with another configuration."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from captum_ssm.layers.call import first_output


def run_isolated(mixer: nn.Module, x: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Return the output (B, L, E) of the layer's own code for ``x``, computed in the type of ``x``.

    Args:
        mixer: The layer.
        x: Input (B, L, E).
        kwargs: The call's other arguments.
    """
    return first_output(type(mixer).forward(isolated_copy(mixer, x), x, **cast_like(dict(kwargs), x)))


def isolated_copy(module: Any, x: Tensor | None, configure: Callable[[Any], Any] = lambda config: config) -> Any:
    """Return a copy of a module with its parameters in another type, and without hooks.

    The original stays unchanged throughout, which rules out ``torch.func.functional_call``.

    Args:
        module: Any module; call its class's ``forward`` on the copy.
        x: A tensor of the wanted type and device; None leaves the parameters unchanged.
        configure: From the ``config`` of the module, and of each module within, to the copy's.
    """
    clone = copy.copy(module)
    state = vars(clone)
    state.pop("forward", None)  # patched into the object, it would run the original
    state["_modules"] = {name: child and isolated_copy(child, x, configure) for name, child in module._modules.items()}
    if x is not None:
        state.update({tensors: cast_like(state[tensors], x) for tensors in ("_parameters", "_buffers")})
    state.update({f"_{when}_hooks": {} for when in ("forward", "forward_pre", "backward", "backward_pre")})
    if "config" in state:
        state["config"] = configure(module.config)
    return clone


def cast_like(value: Any, x: Tensor) -> Any:
    """Return a nested value with its floating-point tensors in the type and on the device of ``x``."""
    if isinstance(value, Tensor):
        return value.to(x) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {name: cast_like(part, x) for name, part in value.items()}
    return tuple(cast_like(part, x) for part in value) if isinstance(value, tuple) else value
