"""Record the input and output of every token mixer of a model: the only hooks that an explanation needs.

Nothing inside a mixer is observed: transformers and the native packages call functions with the parameters of
their submodules, whose hooks then never fire. An adapter recomputes the gates from the mixer's input. Only of a part
that stands in for a plain weight is it noted whether it was called.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import count
from typing import Any, cast

import torch
from torch import Tensor, nn

from captum_ssm.errors import ModelStateError
from captum_ssm.layers.call import LayerCall, call_arguments, first_output
from captum_ssm.layers.fidelity import check_finite, unchecked_chain
from captum_ssm.layers.mixers import find_mixers
from captum_ssm.layers.placement import around
from captum_ssm.layers.precision import autocast_here, in_full_precision
from captum_ssm.layers.sources import find_source
from captum_ssm.layers.stand_ins import observed_parts, stands_in
from captum_ssm.layers.wires import block_name
from captum_ssm.network.interface import output_embeddings
from captum_ssm.network.left_state import LeftState, is_cache
from captum_ssm.network.quantised import give_gradients
from captum_ssm.network.threads import hook, is_passing

Replacement = Callable[[LayerCall], Tensor]
"""From a mixer's call to the tensor (B, L, E) that the model goes on with instead of the mixer's output."""


@contextmanager
def record_mixers(
    model: nn.Module,
    *,
    hold: bool = False,
    replacement: Replacement | None = None,
    prepare: Callable[[nn.Module, Any], Any] = lambda mixer, arguments: arguments,
    on_call: Callable[[], object] = lambda: None,
    is_rerun: Callable[[], bool] = lambda: False,
) -> Iterator[list[LayerCall]]:
    """Record every call of every supported token mixer while the context is open.

    Every recorded output requires a gradient, also in a model whose parameters do not. The first mixer runs without
    a graph: no gradient that is asked for passes through it.

    Args:
        model: The model to watch. Its hooks are removed when the context is left, even after an error.
        hold: Run all mixers without a graph: the layers after a mixer see its output as a constant.
        replacement: Run all mixers without a graph, and go on with this function of their calls instead of their
            outputs, such as :func:`outputs_through_chains`.
        prepare: From a mixer and the arguments ``(args, kwargs)`` of its call to those that its own code runs on; the
            recorded call has the original ones.
        on_call: Called after each call, for a progress bar.
        is_rerun: Whether a block is being run again for the gradient, on arguments that it has had before.

    Yields:
        The list of calls in the order in which they happen.

    Raises:
        UnsupportedModelError: If the model has no supported mixer.
        ModelStateError: If a mixer is called with a cache that already holds a state, or with a state of its earlier
            call.
    """
    recorder = _Recorder(model, hold, replacement, prepare, on_call, is_rerun)
    with ExitStack() as hooks, torch.set_grad_enabled(torch.is_grad_enabled()):  # restored also if a mixer raises
        give_gradients(model, hooks)
        for mixer in recorder.names:
            hook(mixer.register_forward_pre_hook, recorder.enter, hooks, with_kwargs=True)
            hook(mixer.register_forward_hook, recorder.leave, hooks, with_kwargs=True)
        for mixer, parts in recorder.parts.items():
            for part_name, part in parts.items():
                watch = _PartWatch(part_name, recorder.called[mixer])
                hook(part.register_forward_pre_hook, watch.enter, hooks, with_kwargs=True, prepend=True)
                hook(part.register_forward_hook, watch.leave, hooks)
        for name in recorder.blocks:

            def note(block: nn.Module, args: Any, kwargs: Any, name: str = name) -> None:
                recorder.states[name], _ = call_arguments(block, args, kwargs)

            hook(model.get_submodule(name).register_forward_pre_hook, note, hooks, with_kwargs=True)
        yield recorder.calls


@dataclass
class _Recorder:
    """The hooks of :func:`record_mixers`, and all that they note; see there for the arguments."""

    model: nn.Module
    hold: bool
    replacement: Replacement | None
    prepare: Callable[[nn.Module, Any], Any]
    on_call: Callable[[], object]
    is_rerun: Callable[[], bool]
    calls: list[LayerCall] = field(default_factory=list)
    states: dict[str, Tensor] = field(default_factory=dict)
    """By name of a block with a wire: its input."""

    def __post_init__(self) -> None:
        self.names: dict[nn.Module, list[str]] = {}
        for path, mixer in find_mixers(self.model).items():
            self.names.setdefault(mixer, []).append(path)
        self.parts = {mixer: observed_parts(mixer) for mixer in self.names}
        self.called: dict[nn.Module, dict[str, tuple[int, int]]] = {mixer: {} for mixer in self.names}
        self._entered: list[tuple[bool, Any, Any]] = []  # grad mode and arguments of the calls that are running
        self._caches: list[Any] = []
        self._left: dict[nn.Module, list[LeftState]] = {}

    @property
    def blocks(self) -> set[str]:
        """Names of the blocks with a wire around the mixers."""
        return {block_name(self.model, path) for paths in self.names.values() for path in paths} - {""}

    def enter(self, mixer: nn.Module, args: Any, kwargs: Any) -> Any:
        """Refuse a warm cache, and run the mixer with or without a graph."""
        _, arguments = call_arguments(mixer, args, kwargs)
        new = [value for value in arguments.values() if not any(value is old for old in self._caches)]
        self._caches.extend(value for value in new if is_cache(value))  # the run itself fills a cache, layer by layer
        if any(_holds_state(value, mixer) for value in new):
            raise ModelStateError(
                f"Layer '{self._name(mixer)}' was called with a cache that already holds a state, so its output "
                "depends on tokens that are not among the inputs. Pass the whole sequence, without a cache."
            )
        if not self.is_rerun():
            self._refuse_handed_on(mixer, arguments)
        grad = torch.is_grad_enabled()
        self._entered.append((grad, args, kwargs))
        torch.set_grad_enabled(grad and not (self.hold or self.replacement) and len(self.calls) > 0)
        return self.prepare(mixer, (args, kwargs))

    def leave(self, mixer: nn.Module, _args: Any, _kwargs: Any, output: Any) -> Any:
        """Record the call, with the arguments that entered, and go on with an output that requires a gradient."""
        grad, args, kwargs = self._entered.pop()
        torch.set_grad_enabled(grad)
        x, others = call_arguments(mixer, args, kwargs)
        name, own_input, source = self._name(mixer), None, find_source(mixer, self.calls)
        if source is not None:
            own_input, x, others = x, torch.cat([x, source.x], dim=-1), {**others, "source": source.mixer}
        self._left.setdefault(mixer, []).append(LeftState.of(others, output))
        state = self.states.get(block_name(self.model, name))
        called = self.called[mixer] if self.parts[mixer] else None
        y, fetched_by = first_output(output), partial(around, self.model, name.partition("#")[0])
        call = LayerCall(name, mixer, x, y, others, state, own_input, autocast_here(), fetched_by, called)
        if x.device != call.y.device:  # moved by a hook of the layer
            call = call.on(call.y.device)
        y = call.y if self.replacement is None else self.replacement(call)
        y = y if y.requires_grad else y.detach().requires_grad_()
        self.calls.append(replace(call, y=y))
        self.on_call()
        return y if isinstance(output, Tensor) else (y, *output[1:])

    def _refuse_handed_on(self, mixer: nn.Module, arguments: Mapping[str, Any]) -> None:
        """Refuse a call that goes on from the state that an earlier call left: a constant for the explanation.

        Raises:
            ModelStateError: With the remedy.
        """
        if any(left.is_among(arguments) for left in self._left.get(mixer, [])):
            raise ModelStateError(
                f"Layer '{self._name(mixer)}' goes on from the state that its earlier run in this call left, as where "
                "a text is read in parts: by several calls with one cache, or by the model itself (xLSTM, beyond "
                "config.max_inference_chunksize tokens). The state would count as a constant. Read the whole text in "
                "one part."
            )

    def _name(self, mixer: nn.Module) -> str:
        """Return the name of a mixer's next call: that of the layer whose turn it is, if several share the module."""
        earlier = sum(call.mixer is mixer for call in self.calls)
        paths = self.names[mixer]
        return paths[earlier] if earlier < len(paths) else f"{paths[-1]}#{earlier + 2 - len(paths)}"


@dataclass
class _PartWatch:
    """Notes a part that is called: one that stands in for a plain weight, or whose hooks change its output.

    Args:
        name: Its dotted name in the mixer.
        called: Gets the name with the sizes of output and input.
    """

    name: str
    called: dict[str, tuple[int, int]]
    arguments: tuple[Any, Any] = ((), {})

    def enter(self, part: nn.Module, args: Any, kwargs: Any) -> None:
        """Keep the arguments that the layer's code gave, before any hook."""
        self.arguments = args, kwargs

    def leave(self, part: nn.Module, _args: Any, output: Any) -> None:
        """Compare the output behind all hooks with that of the part's class."""
        (args, kwargs), self.arguments = self.arguments, ((), {})
        if self.name in self.called or type(output) is not Tensor:
            return
        with torch.no_grad():
            if stands_in(part) or not torch.equal(type(part).forward(part, *args, **kwargs), output):
                self.called[self.name] = output.shape[-1], next(iter((*args, *kwargs.values()))).shape[-1]


def own_output(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Return the output of a module's own code, with the caller's hooks behind it, for arguments of a call.

    Hooks before it have changed the arguments already, and the hooks of an explanation are left out.
    """
    output = module.forward(*args, **kwargs)
    for number, behind in list(module._forward_hooks.items()):
        if not is_passing(behind):
            arguments = (args, kwargs) if number in module._forward_hooks_with_kwargs else (args,)
            changed: Any = behind(module, *arguments, output)
            output = output if changed is None else changed
    return output


@contextmanager
def record_head(model: nn.Module) -> Iterator[list[Tensor]]:
    """Record the input (B, L, E) of a language model's output embeddings while the context is open.

    Args:
        model: A language model.

    Yields:
        The list of inputs, one for each run of the model.
    """
    recorded: list[Tensor] = []
    head = cast(nn.Module, output_embeddings(model))
    with ExitStack() as hooks:
        hook(head.register_forward_pre_hook, lambda module, args: recorded.append(args[0]), hooks)
        yield recorded


@in_full_precision
def output_through_chain(call: LayerCall) -> Tensor:
    """Return a mixer's output (B, L, E) whose graph is that of its decomposition.

    The gradients are those of the layer's own code, which may take far longer to differentiate.
    """
    x = call.wide_input
    y = unchecked_chain(call, x).apply(x, bias=True).to(call.y.dtype)
    return call.y + (y - y.detach())


def outputs_through_chains() -> Replacement:
    """Return the outputs of one run's mixers, for :func:`record_mixers`: each but the first by its decomposition.

    No gradient that is asked for passes through the first mixer, so its output has no graph, which would be held as
    long as that of the gradients.
    """
    number = count()

    def replacement(call: LayerCall) -> Tensor:
        if next(number):
            return output_through_chain(call)
        check_finite(call)  # as the decomposition of every other mixer does: else the next one is named
        return call.y

    return replacement


def _holds_state(value: Any, mixer: nn.Module) -> bool:
    """Whether ``value`` is a cache that holds a state, or keys and values, for this layer."""
    if not is_cache(value):
        return False
    if hasattr(value, "key_value_memory_dict"):
        return bool(value.seqlen_offset)  # how many tokens came before
    index = getattr(mixer, "layer_idx", None)
    try:
        return bool(value.has_previous_state(index))
    except ValueError:  # how a cache answers for a layer of softmax attention
        return bool(value.get_seq_length(index))
