"""Record what enters and leaves the token mixers of a model: the hooks that an explanation needs.

Nothing inside a mixer is hooked: transformers and the native packages call functions with the parameters of
their submodules, whose hooks then never fire. An adapter recomputes the gates from the mixer's input.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from captum_ssm.errors import ModelStateError
from captum_ssm.registry import find_adapter, find_mixers
from captum_ssm.wiring import block_name, find_source


@dataclass(frozen=True)
class MixerCall:
    """One call of a token mixer.

    Args:
        name: Dotted name of the mixer in the model. The calls of a module that several layers share have the names
            that it has in these layers.
        mixer: The module.
        x: Its input (B, L, E), part of the graph that leads to it.
        y: Its output (B, L, E), part of the graph that leads to the model's output.
        kwargs: The call's other arguments by parameter name.
        state: Input of the block around the mixer, for a block that a wire is registered for
            (:func:`captum_ssm.wiring.register_wire`).
        own: What the mixer itself got, where ``x`` holds an earlier call's input too
            (:func:`captum_ssm.wiring.register_source`).
    """

    name: str
    mixer: nn.Module
    x: Tensor
    y: Tensor
    kwargs: Mapping[str, Any]
    state: Tensor | None = None
    own: Tensor | None = None

    def detach(self) -> MixerCall:
        """Return the call free of the graph."""
        state, own = (None if t is None else t.detach() for t in (self.state, self.own))
        return replace(self, x=self.x.detach(), y=self.y.detach(), state=state, own=own)


Rewrite = Callable[[MixerCall], Tensor]
"""What a mixer's call hands on in the place of its output."""


@contextmanager
def record_mixers(
    model: nn.Module,
    *,
    hold: bool = False,
    rewrite: Rewrite | None = None,
    plain: Callable[[Any], Any] | None = None,
    seen: Callable[[], object] = lambda: None,
) -> Iterator[list[MixerCall]]:
    """Record every call of every supported token mixer while the context is open.

    Every recorded output requires a gradient, also in a model whose parameters do not. The first mixer runs without
    a graph of its own: no gradient that is asked for passes through it.

    Args:
        model: The model to watch. Its hooks are removed when the context is left, whatever happens.
        hold: Run all mixers without a graph: what follows a mixer sees its output as a constant.
        rewrite: Run all mixers without a graph, and hand on what this makes of their calls, such as
            :func:`decomposed`.
        plain: What becomes of the arguments that a mixer's own code runs on; the recorded call has the originals.
        seen: Called after each call, for a progress bar.

    Yields:
        The list of calls in the order in which they happen.

    Raises:
        UnsupportedModelError: If the model has no supported mixer.
        ModelStateError: If a mixer is called with a cache that already holds a state.
    """
    calls: list[MixerCall] = []
    entered: list[tuple[bool, Any, Any]] = []
    states: dict[str, Tensor] = {}
    met: list[Any] = []
    names: dict[nn.Module, list[str]] = {}
    for path, mixer in find_mixers(model).items():
        names.setdefault(mixer, []).append(path)

    def name_of(mixer: nn.Module) -> str:
        earlier = sum(call.mixer is mixer for call in calls)
        paths = names[mixer]
        return paths[earlier] if earlier < len(paths) else f"{paths[-1]}#{earlier + 2 - len(paths)}"

    def enter(mixer: nn.Module, args: Any, kwargs: Any) -> Any:
        _, arguments = _arguments(mixer, args, kwargs)
        name = name_of(mixer)
        new = [value for value in arguments.values() if not any(value is old for old in met)]
        met.extend(value for value in new if _is_cache(value))  # the run itself fills a cache, layer by layer
        if any(_holds_state(value, mixer) for value in new):
            raise ModelStateError(
                f"Layer '{name}' was called with a cache that already holds a state, so its output depends on "
                "tokens that are not among the inputs. Pass the whole sequence, without a cache."
            )
        entered.append((torch.is_grad_enabled(), args, kwargs))
        torch.set_grad_enabled(entered[-1][0] and not (hold or rewrite) and len(calls) > 0)
        return (args, kwargs) if plain is None else plain((args, kwargs))

    def leave(mixer: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        mode, args, kwargs = entered.pop()
        torch.set_grad_enabled(mode)
        x, rest = _arguments(mixer, args, kwargs)
        y = output if isinstance(output, Tensor) else output[0]
        name = name_of(mixer)
        own, source = None, find_source(mixer, calls)
        if source is not None:
            own, x, rest = x, torch.cat([x, source.x], dim=-1), {**rest, "source": source.mixer}
        call = MixerCall(name, mixer, x, y, rest, states.get(block_name(model, name)), own)
        y = y if rewrite is None else rewrite(call)
        y = y if y.requires_grad else y.detach().requires_grad_()
        calls.append(replace(call, y=y))
        seen()
        return y if isinstance(output, Tensor) else (y, *output[1:])

    with ExitStack() as hooks, torch.set_grad_enabled(torch.is_grad_enabled()):  # restored also if a mixer raises
        for mixer in names:
            hooks.callback(mixer.register_forward_pre_hook(enter, with_kwargs=True).remove)
            hooks.callback(mixer.register_forward_hook(leave, with_kwargs=True).remove)
        for name in {block_name(model, path) for paths in names.values() for path in paths} - {""}:

            def note(block: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                states[name] = _arguments(block, args, kwargs)[0]

            hooks.callback(model.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True).remove)
        yield calls


@contextmanager
def record_head(model: nn.Module) -> Iterator[list[Tensor]]:
    """Record what the output embeddings of a language model get, while the context is open."""
    recorded: list[Tensor] = []
    head = model.get_output_embeddings()  # type: ignore[operator]
    hook = head.register_forward_pre_hook(lambda module, args: recorded.append(args[0]))
    try:
        yield recorded
    finally:
        hook.remove()


def decomposed(call: MixerCall) -> Tensor:
    """Return a mixer's output with the graph of its decomposition.

    The gradients are those of the layer's own code, where that may take far longer.
    """
    adapter = find_adapter(call.mixer)
    assert adapter is not None
    wide = call.x.to(torch.promote_types(call.x.dtype, torch.float32))
    chained = adapter(call.mixer, wide, call.kwargs).apply(wide, bias=True).to(call.y.dtype)
    return call.y + (chained - chained.detach())


signature = lru_cache(inspect.signature)
"""The signature of a function, read once."""


def _arguments(mixer: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
    """Split a mixer's call into its input and its other arguments by parameter name."""
    bound = signature(type(mixer).forward).bind(mixer, *args, **kwargs)
    arguments = dict(list(bound.arguments.items())[1:])
    for parameter in bound.signature.parameters.values():
        if parameter.kind is parameter.VAR_KEYWORD:
            arguments.update(arguments.pop(parameter.name, {}))
    x = arguments.pop(next(iter(arguments)))
    return x, arguments


def _is_cache(value: Any) -> bool:
    """Whether ``value`` is a cache, as transformers or mamba_ssm have them."""
    return callable(getattr(value, "has_previous_state", None)) or hasattr(value, "key_value_memory_dict")


def _holds_state(value: Any, mixer: nn.Module) -> bool:
    """Whether ``value`` is a cache that holds a state, or keys and values, for this layer."""
    if not _is_cache(value):
        return False
    if hasattr(value, "key_value_memory_dict"):
        return bool(value.seqlen_offset)  # how many tokens came before
    index = getattr(mixer, "layer_idx", None)
    try:
        return bool(value.has_previous_state(index))
    except ValueError:  # how a cache answers for a layer of softmax attention
        return bool(value.get_seq_length(index))
