"""Run a copy of a layer without touching the layer: in another floating-point type, or with another configuration."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from captum_ssm.layers.call import first_output
from captum_ssm.layers.shallow_copy import shallow_copy
from captum_ssm.layers.stand_ins import is_packed_part, noted_sizes, stands_in


def run_isolated(mixer: nn.Module, x: Tensor, kwargs: Mapping[str, Any], *, wide: bool = False) -> Tensor:
    """Return the output (B, L, E) of the layer's own code for ``x``, computed in the type of ``x``.

    Args:
        mixer: The layer.
        x: Input (B, L, E).
        kwargs: The call's other arguments. A cache of keys among them is not used: it holds those of the call itself.
        wide: Whether also those parts are computed in the type of ``x`` that the code asks a narrower type for, as many
            kernels of transformers do for float32.
    """
    with _AtLeast(x.dtype) if wide else nullcontext():
        return first_output(type(mixer).forward(isolated_copy(mixer, x), x, **cast_like(without_cache(kwargs), x)))


def without_cache(kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a call without its cache of keys and values, to which a further run would add."""
    return {name: value for name, value in kwargs.items() if name not in ("past_key_values", "use_cache")}


def isolated_copy(module: Any, x: Tensor | None, configure: Callable[[Any], Any] = lambda config: config) -> Any:
    """Return a copy of a module with its parameters in another type, and without hooks on the module itself.

    On the modules within stay the hooks that make their weights or change their outputs. The original stays unchanged
    throughout, which rules out ``torch.func.functional_call``.

    Args:
        module: Any module; call its class's ``forward`` on the copy.
        x: A tensor of the wanted type and device; None leaves the parameters unchanged.
        configure: From the ``config`` of the module, and of each module within, to the copy's.
    """
    return _unhooked(_copy(module, x, configure, ""))


def isolated_part(module: nn.Module, x: Tensor) -> nn.Module:
    """Return a copy of a part of a layer, with its hooks, in the type and on the device of ``x``."""
    return _copy(module, x, lambda config: config, "")


class InOwnType(nn.Module):
    """A part with quantised weights, run in its own floating-point type for an input of any.

    Args:
        part: The part.
    """

    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part = part

    def forward(self, x: Tensor) -> Tensor:
        """Return the part's output in the type of ``x``."""
        tensors = [*self.part.parameters(), *self.part.buffers()]
        own = next((t.dtype for t in tensors if t.is_floating_point() and t.dtype.itemsize > 1), x.dtype)
        y: Tensor = self.part(x.to(own))
        return y.to(x.dtype)


def _copy(module: Any, x: Tensor | None, configure: Callable[[Any], Any], prefix: str) -> Any:
    clone = shallow_copy(module)
    state = vars(clone)
    state["_modules"] = {
        name: child and _copy_within(child, x, configure, prefix + name) for name, child in module._modules.items()
    }
    if x is not None:
        state.update({tensors: cast_like(state[tensors], x) for tensors in ("_parameters", "_buffers")})
    if "config" in state:
        state["config"] = configure(module.config)
    return clone


def _copy_within(child: Any, x: Tensor | None, configure: Callable[[Any], Any], name: str) -> Any:
    """Return a copy of a module within another, of this dotted name; one with quantised weights itself."""
    if is_packed_part(child):
        return InOwnType(child)
    clone = _copy(child, x, configure, f"{name}.")
    return clone if stands_in(child) or noted_sizes(name) is not None else _unhooked(clone)


def _unhooked(clone: Any) -> Any:
    """Return a copy of a module after taking its hooks away."""
    state = vars(clone)
    state.pop("forward", None)  # patched into the object, it would run the original
    state.update({f"_{when}_hooks": {} for when in ("forward", "forward_pre", "backward", "backward_pre")})
    return clone


def cast_like(value: Any, x: Tensor) -> Any:
    """Return a nested value with its floating-point tensors in the type and on the device of ``x``."""
    if isinstance(value, Tensor):
        return value.to(x) if value.is_floating_point() else value
    if isinstance(value, Mapping):
        return {name: cast_like(part, x) for name, part in value.items()}
    return tuple(cast_like(part, x) for part in value) if isinstance(value, tuple) else value


class _AtLeast(TorchFunctionMode):
    """Gives code the type ``dtype`` wherever it asks for a narrower floating-point type.

    Args:
        dtype: The narrowest type.
    """

    def __init__(self, dtype: torch.dtype) -> None:
        super().__init__()
        self.dtype = dtype

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the function with every narrower type among its arguments replaced."""
        if func in _NARROWING:
            return args[0].to(torch.promote_types(self.dtype, _NARROWING[func]))
        return func(*map(self._wide, args), **{name: self._wide(value) for name, value in (kwargs or {}).items()})

    def _wide(self, argument: Any) -> Any:
        """Replace a narrower floating-point type."""
        if isinstance(argument, torch.dtype) and argument.is_floating_point:
            return torch.promote_types(argument, self.dtype)
        return argument


_NARROWING: dict[Any, torch.dtype] = {
    Tensor.float: torch.float32,
    Tensor.half: torch.float16,
    Tensor.bfloat16: torch.bfloat16,
}
"""Methods that ask for a type by their name."""
