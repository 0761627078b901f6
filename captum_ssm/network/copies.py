"""Copies of layers that run in their stead, and keep what they write on themselves."""

from __future__ import annotations

import copy
from contextlib import ExitStack

from torch import nn

from captum_ssm.layers.placement import has_values
from captum_ssm.layers.shallow_copy import shallow_copy
from captum_ssm.layers.stand_ins import is_packed_part
from captum_ssm.network.state import OF_TORCH, has_tensor
from captum_ssm.network.threads import is_substituted, substitute


def run_as_copy(mixer: nn.Module, stack: ExitStack) -> nn.Module | None:
    """Run a copy of a mixer instead, which shares parameters and hooks, in this thread until the stack is closed.

    Parts with quantised weights, which have substitutes of their own, are shared too.

    Returns:
        The copy; None if a function is patched into the mixer, which would run the original, or if its tensors are
        fetched for each run, which are the original's.
    """
    patched = "forward" in vars(mixer) and not is_substituted(vars(mixer)["forward"])
    if patched or not has_values(mixer):
        return None
    clone = _copy(mixer)
    substitute(mixer, "forward", lambda below: clone.forward, stack)
    return clone


def keeps_tensors(layer: nn.Module) -> bool:
    """Whether a layer, or a module within, has tensors that are neither its parameters nor its buffers."""
    attributes = [(key, value) for module in layer.modules() for key, value in vars(module).items()]
    return any(key not in OF_TORCH and has_tensor(value) for key, value in attributes)


def _copy(module: nn.Module) -> nn.Module:
    """Return a copy of a module and of those within that keeps its own attributes."""
    clone = shallow_copy(module)
    state = vars(clone)
    if is_substituted(state.get("forward")):
        del state["forward"]
    state.update({key: copy.copy(v) for key, v in state.items() if key not in OF_TORCH and type(v) in (list, dict)})
    state.update({table: dict(state[table]) for table in ("_parameters", "_buffers")})
    state["_modules"] = {
        name: child and (child if is_packed_part(child) else _copy(child)) for name, child in module._modules.items()
    }
    return clone
