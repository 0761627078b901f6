"""Where the tensors of a layer are when it runs, which may be elsewhere between its runs.

A library that spreads a model (accelerate) keeps weights on the CPU or on disk, puts empty ones in their place, and
hooks each module to fetch its own for each run; one that shards it keeps a part of each tensor in each process. Both
are known by how they are built: a hook with a map of weights, a tensor with ``full_tensor``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from captum_ssm.errors import UnsupportedModelError
from captum_ssm.layers.shallow_copy import shallow_copy
from captum_ssm.layers.stand_ins import is_packed_part, is_spread

Layer = TypeVar("Layer", bound=nn.Module)

_Fetch = Callable[[str], Tensor | None]
"""From the name of a tensor in a module to the tensor, or None if it is not kept for that module."""


Around = tuple[tuple[nn.Module, str], ...]
"""Modules around a layer whose hooks fetch the tensors of all modules within, and the layer's dotted name in each."""


def around(model: nn.Module, name: str) -> Around:
    """Return the modules around a layer that fetch its tensors, the innermost one first.

    Args:
        model: The model.
        name: Dotted name of the layer in the model.
    """
    parts = name.split(".")
    outer = [(model.get_submodule(".".join(parts[:n])), ".".join(parts[n:])) for n in reversed(range(len(parts)))]
    return tuple((module, path) for module, path in outer if any(_maps(module, alone=False)))


def nothing_around() -> Around:
    """Return no modules."""
    return ()


def in_place(layer: Layer, device: torch.device, around: Callable[[], Around] = nothing_around) -> Layer:
    """Return a layer with all of its tensors, as its code has them when it runs.

    Args:
        layer: The layer.
        device: Where it runs.
        around: Returns the modules around it whose hooks fetch its tensors.

    Returns:
        The layer itself if all of its tensors are there; else a copy, which holds the tensors as long as it lives.

    Raises:
        UnsupportedModelError: If the weights of a part are nowhere to be found.

    Cost: one look at each tensor; for a layer whose tensors are elsewhere, as much as its own run fetches.
    """
    if not any(_is_away(tensor, device) for tensor in _all_tensors(layer)):
        return layer
    outer = [_inside(_from_map(weights), path) for module, path in around() for weights in _maps(module, alone=False)]
    copied: Layer = _Fetched(device)(layer, "", outer)
    return copied


def has_values(layer: nn.Module) -> bool:
    """Whether all tensors of a layer are complete between its runs: neither empty nor spread over processes."""
    return not any(tensor.is_meta or is_spread(tensor) for tensor in _all_tensors(layer))


def _all_tensors(layer: nn.Module) -> list[Tensor]:
    """Return the parameters and buffers of a layer, and of the modules within."""
    tensors: list[Tensor | None] = []
    for module in layer.modules():
        tensors.extend(module._parameters.values())
        tensors.extend(module._buffers.values())
    return [tensor for tensor in tensors if tensor is not None]


def _is_away(tensor: Tensor, device: torch.device) -> bool:
    """Whether a tensor is on another device, has no values, or is a part of one."""
    return tensor.device != device or is_spread(tensor)


class _Fetched:
    """Copies modules together with the tensors that are fetched for their runs.

    Args:
        device: Where the modules run.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def __call__(self, module: Any, name: str, outer: list[_Fetch]) -> Any:
        """Return a copy of a module.

        Args:
            module: The module.
            name: Its dotted name in the layer.
            outer: Fetch tensors of this module for the modules around it.
        """
        own = [*map(_from_map, _maps(module, alone=False)), *outer]
        inner = [_from_map(weights) for weights in _maps(module, alone=True)]
        clone = shallow_copy(module)
        state = vars(clone)
        if hasattr(module, "_hf_hook") and not _has_substitute(module):
            _unhook(module, state)
        for table in ("_parameters", "_buffers"):
            state[table] = {
                key: tensor if tensor is None else self._fetched(f"{name}.{key}".strip("."), key, tensor, own + inner)
                for key, tensor in state[table].items()
            }
        state["_modules"] = {
            key: child and self(child, f"{name}.{key}".strip("."), [_inside(fetch, key) for fetch in own])
            for key, child in module._modules.items()
        }
        return clone

    def _fetched(self, name: str, key: str, tensor: Tensor, fetches: list[_Fetch]) -> Tensor:
        """Return a tensor where the layer runs.

        Raises:
            UnsupportedModelError: If it has no values and nothing keeps them.
        """
        found: Any = tensor
        if tensor.is_meta:
            kept = (fetch(key) for fetch in fetches)
            found = next((value for value in kept if value is not None), None)
            if found is None:
                raise UnsupportedModelError(
                    f"'{name}' has no values outside of the model's run, and no hook that keeps them is known. Let "
                    "accelerate offload the model (dispatch_model, cpu_offload, or from_pretrained with device_map), "
                    "with preload_module_classes=[the class of this layer] if a hook is to load all of it at once."
                )
            found = found.to(tensor.dtype)
        if is_spread(found):
            found = found.full_tensor()
        if found is not tensor or found.device != self._device:
            found = found.detach().to(self._device)
        return nn.Parameter(found, requires_grad=False) if type(tensor) is nn.Parameter else found


def _maps(module: nn.Module, *, alone: bool) -> Iterator[Any]:
    """Yield the maps from which a module's hooks fetch weights: for it alone, or also for the modules within."""
    hook = vars(module).get("_hf_hook")
    for part in getattr(hook, "hooks", (hook,)):
        weights = getattr(part, "weights_map", None)
        if weights is not None and getattr(part, "place_submodules", False) != alone:
            yield weights


def _from_map(weights: Any) -> _Fetch:
    """Return the way from a name to a tensor in a map of weights, which may list fewer names than it has."""

    def fetch(name: str) -> Tensor | None:
        try:
            value: Tensor = weights[name]
        except KeyError:
            return None
        return value

    return fetch


def _inside(fetch: _Fetch, name: str) -> _Fetch:
    """Return the way to the tensors of a module within."""
    return lambda key: fetch(f"{name}.{key}")


def _has_substitute(module: nn.Module) -> bool:
    """Whether a part with quantised weights runs by a substitute of its code, which runs the part with its hook."""
    return is_packed_part(module) and hasattr(vars(module).get("forward"), "substitutes")


def _unhook(module: nn.Module, state: dict[str, Any]) -> None:
    """Let a copy of a module run its own code, without the hook that fetches and removes the module's tensors."""
    for name in ("forward", "_hf_hook"):
        state.pop(name, None)
    before = state.pop("_old_forward", None)
    if before is not None and getattr(before, "__func__", None) is not type(module).forward:
        state["forward"] = before
