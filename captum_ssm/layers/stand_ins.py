"""Parts of a layer that stand in for plain weights: fine-tuning adapters, quantised and reparametrised weights, hooks.

A *part* is a submodule of a mixer. Most hold their weight as a parameter, and are what their class does with it. Those
that do not are known here by how they are built; no library that makes them is imported. A hook may observe or change:
of a part with hooks it is noted, while the layer runs, whether they change its output. What a stand-in does is measured
by running it, see :mod:`captum_ssm.layers.measured`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar

import torch
from torch import Tensor, nn

_PACKED = frozenset(("qweight", "W_q", "weight_packed", "_packed_params"))
"""Names of the quantised weights of GPTQ and AWQ, of HQQ, of compressed-tensors, and of torch itself."""

_WITHIN = frozenset(("base_layer", "original_module", "parametrizations", "lora_A"))
"""Names of what peft, loralib and torch put into a module that is more than its weight."""

_PLAIN = (nn.Parameter, Tensor)

_WIDE = frozenset((
    torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.complex128, torch.complex64, torch.complex32,
))  # fmt: skip
"""Types of numbers that are not quantised."""


def stands_in(module: nn.Module) -> bool:
    """Whether a module stands in for a plain weight: what it does is not told by its parameters."""
    own = vars(module)
    modules, tensors = own["_modules"], own["_parameters"]
    if modules and not _WITHIN.isdisjoint(modules):
        return True
    if not (tensors or own["_buffers"]):
        return False
    return isinstance(own.get("weight"), Tensor) or "lora_A" in tensors or _is_packed(module)


def is_hooked(module: nn.Module) -> bool:
    """Whether a module with parameters has hooks, or a forward run of its own, which an explanation has not set."""
    own = vars(module)
    if not (own["_forward_hooks"] or own["_forward_pre_hooks"] or "forward" in own) or not own["_parameters"]:
        return False
    if any(tensor is not None and is_spread(tensor) for tensor in own["_parameters"].values()):
        return False  # hooks hand inputs and outputs from process to process, and change no number
    functions = [*own["_forward_hooks"].values(), *own["_forward_pre_hooks"].values()]
    if "forward" in own and not hasattr(module, "_hf_hook"):  # accelerate's moves weights and changes no number
        functions.append(own["forward"])
    return not all(getattr(function, "is_passing", False) for function in functions)


Called = Mapping[str, tuple[int, int]]
"""The parts of a layer that its code called, by dotted name, out of those that stand in for plain weights, and out of
those with hooks that change their output; with the sizes of the last axis of output and input."""

_CALLED: ContextVar[Called | None] = ContextVar("called", default=None)


@contextmanager
def as_called(called: Called | None) -> Iterator[None]:
    """Read the parts of a layer as its own code does while the context is open.

    A part that the code calls is what it does; of any other the code itself reads the ``weight``.

    Args:
        called: The parts that the code called; None for all stand-ins, and none with hooks.

    Yields:
        None.
    """
    token = _CALLED.set(called)
    try:
        yield
    finally:
        _CALLED.reset(token)


def noted_sizes(name: str) -> tuple[int, int] | None:
    """Return the sizes of the last axis of output and input of the part of this name, if its call was noted."""
    return (_CALLED.get() or {}).get(name)


def is_called(name: str) -> bool:
    """Whether the stand-in of this name is called by its layer's code, as far as that was noted."""
    called = _CALLED.get()
    return called is None or name in called


def is_spread(tensor: Tensor) -> bool:
    """Whether a tensor is a part of one that several processes hold together."""
    return hasattr(type(tensor), "full_tensor")


def is_packed(module: nn.Module) -> bool:
    """Whether a module, or one within it, holds its weight in fewer bits than floating-point numbers have."""
    pending = [module]
    while pending:
        module = pending.pop()
        if _is_packed(module):
            return True
        pending.extend([child for child in module._modules.values() if child is not None])
    return False


def is_packed_part(module: nn.Module) -> bool:
    """Whether a module itself holds the one weight of a projection so; another module with such weights may route."""
    if not _is_packed(module):
        return False
    return not module._modules or "weight" in module._parameters or _has_packed_name(module)


def is_fine_tuned(module: nn.Module) -> bool:
    """Whether a module adds the matrices of a fine-tuning to a weight, as the modules of peft and loralib do."""
    return isinstance(getattr(module, "base_layer", None), nn.Module) or hasattr(module, "lora_A")


def stand_ins(layer: nn.Module) -> dict[str, nn.Module]:
    """Return the parts of a layer that stand in for plain weights by dotted name, outermost only."""
    return {name: module for name, module, is_stand_in in parts_of(layer) if is_stand_in}


def parts_of(layer: nn.Module, prefix: str = "") -> Iterator[tuple[str, nn.Module, bool]]:
    """Go through the modules of a layer, and into none that stands in for a plain weight.

    Args:
        layer: The layer.
        prefix: Its name and a dot, if it is itself within one.

    Yields:
        Dotted name in the layer, module, and whether it stands in. The first is the layer itself, which never does.
    """
    yield prefix[:-1], layer, False
    for name, module in layer._modules.items():
        if module is None:
            continue
        if stands_in(module) or noted_sizes(prefix + name) is not None:
            yield prefix + name, module, True
        else:
            yield from parts_of(module, f"{prefix}{name}.")


def observed_parts(layer: nn.Module) -> dict[str, nn.Module]:
    """Return the parts of a layer that stand in for plain weights, or have hooks, by dotted name."""
    return {name: part for name, part, is_stand_in in parts_of(layer) if is_stand_in or (name and is_hooked(part))}


def refusal(name: str, layer: nn.Module) -> str:
    """Return in words why a layer's matrices are not exact, or cannot be had, if a stand-in is the cause.

    Args:
        name: Dotted name of the layer in the model.
        layer: The layer.

    Returns:
        The reason and its remedy; empty if the layer has no such part.
    """
    found = stand_ins(layer)
    packed = {part: module for part, module in found.items() if is_packed(module)}
    part, module = next(iter((packed or found).items()), ("", layer))
    if not part:
        return ""
    shown = f"'{part}' ({type(module).__name__}) of layer '{name}' ({type(layer).__name__}), "
    if packed:
        return shown + (
            "whose weight is quantised: it is not linear in its input, for it rounds that too, or its code rounds more "
            "coarsely than the model's type. The matrices are those of its weight. Pass a `tolerance` above this error "
            "to accept the approximation, load the model without quantization, or use ImplicitAttentionRelevance, "
            "which runs the part itself"
        )
    return shown + (
        "which stands in for a plain weight (a fine-tuning, a parametrization or a hook) and does more than to project "
        "each token: merge the fine-tuning (model.merge_and_unload()), remove the hook, or use "
        "ImplicitAttentionRelevance, which follows its functions"
    )


def _is_packed(module: nn.Module) -> bool:
    for tensor in module._parameters.values():
        if tensor is None or (type(tensor) in _PLAIN and tensor.dtype in _WIDE):
            continue
        if not is_spread(tensor):  # a tensor in shards is as wide as its shards
            return True
    return _has_packed_name(module)


def _has_packed_name(module: nn.Module) -> bool:
    """Whether an attribute, a parameter or a buffer of a module has the name of a quantised weight."""
    own = vars(module)
    tensors, buffers = own["_parameters"], own["_buffers"]
    if own.keys().isdisjoint(_PACKED) and not (buffers and not buffers.keys().isdisjoint(_PACKED)):
        return bool(tensors) and not tensors.keys().isdisjoint(_PACKED)
    return True
