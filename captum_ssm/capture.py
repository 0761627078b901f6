"""Record what enters and leaves the token mixers of a model: the only hooks of the package.

Nothing inside a mixer is hooked: transformers and the native packages call functions with the parameters of
their submodules, whose hooks then never fire. An adapter recomputes the gates from the mixer's input.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_ssm.errors import ModelStateError
from captum_ssm.registry import find_mixers


@dataclass(frozen=True)
class MixerCall:
    """One call of a token mixer.

    Args:
        name: Dotted name of the mixer in the model.
        mixer: The module.
        x: Its input (B, L, E).
        y: Its output (B, L, E), part of the graph that leads to the model's output.
        kwargs: The call's other arguments by parameter name.
    """

    name: str
    mixer: nn.Module
    x: Tensor
    y: Tensor
    kwargs: Mapping[str, Any]


@contextmanager
def record_mixers(
    model: nn.Module, *, hold: bool = False, seen: Callable[[], object] = lambda: None
) -> Iterator[list[MixerCall]]:
    """Record every call of every supported token mixer while the context is open.

    Every recorded output requires a gradient, also in a model whose parameters do not. The first mixer runs without
    a graph of its own: no gradient that is asked for passes through it.

    Args:
        model: The model to watch. Its hooks are removed when the context is left, whatever happens.
        hold: Run all mixers without a graph: what follows a mixer sees its output as a constant.
        seen: Called after each call, for a progress bar.

    Yields:
        The list of calls in the order in which they happen.

    Raises:
        UnsupportedModelError: If the model has no supported mixer.
        ModelStateError: If a mixer is called with a cache that already holds a state.
    """
    calls: list[MixerCall] = []
    modes: list[bool] = []

    def enter(name: str, mixer: nn.Module, args: Any, kwargs: Any) -> None:
        _, arguments = _arguments(mixer, args, kwargs)
        if any(_holds_state(value, mixer) for value in arguments.values()):
            raise ModelStateError(
                f"Layer '{name}' was called with a cache that already holds a state, so its output depends on "
                "tokens that are not among the inputs. Pass the whole sequence, without a cache."
            )
        modes.append(torch.is_grad_enabled())
        torch.set_grad_enabled(modes[-1] and not hold and len(calls) > 0)

    def leave(name: str, mixer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        torch.set_grad_enabled(modes.pop())
        x, rest = _arguments(mixer, args, kwargs)
        y = output if isinstance(output, Tensor) else output[0]
        y = y if y.requires_grad else y.detach().requires_grad_()
        calls.append(MixerCall(name, mixer, x.detach(), y, rest))
        seen()
        return y if isinstance(output, Tensor) else (y, *output[1:])

    with ExitStack() as hooks, torch.set_grad_enabled(torch.is_grad_enabled()):  # restored also if a mixer raises
        for name, mixer in find_mixers(model).items():
            before = mixer.register_forward_pre_hook(
                lambda m, args, kwargs, name=name: enter(name, m, args, kwargs), with_kwargs=True
            )
            hooks.callback(before.remove)
            after = mixer.register_forward_hook(
                lambda m, args, kwargs, out, name=name: leave(name, m, args, kwargs, out), with_kwargs=True
            )
            hooks.callback(after.remove)
        yield calls


def _arguments(mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Split a mixer's call into its input and its other arguments by parameter name."""
    bound = inspect.signature(type(mixer).forward).bind(mixer, *args, **kwargs)
    arguments = dict(list(bound.arguments.items())[1:])
    for parameter in bound.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name, {}))
    x = arguments.pop(next(iter(arguments)))
    return x, arguments


def _holds_state(value: Any, mixer: nn.Module) -> bool:
    """Whether ``value`` is a cache, as transformers has them, with a state for this layer."""
    asks = getattr(value, "has_previous_state", None)
    return bool(callable(asks) and asks(getattr(mixer, "layer_idx", None)))
