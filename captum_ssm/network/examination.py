"""Examine a model: nothing but its mixers may mix tokens, and which calls read which.

A rollout multiplies the attention of the layers. It is wrong, without any sign of it, if a layer that it does not know
moves information between tokens, or if the layers feed each other in another order than it assumes. So once for each
model the mixers' outputs are held fixed. Every other module must then act on each token separately: the gradient of its
output at one token with respect to its input at any other must be zero. And the graph from one mixer's input back to
the outputs of the others tells which of them it reads.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any
from weakref import ReferenceType, WeakKeyDictionary, ref

import torch
from torch import Tensor, nn

from captum_ssm.errors import InvalidInputError, UnsupportedModelError
from captum_ssm.layers.call import LayerCall
from captum_ssm.layers.mixers import find_mixers, supported_families
from captum_ssm.network.graph import EMBEDDINGS, ResidualGraph, Stream
from captum_ssm.network.recording import record_mixers


@dataclass(frozen=True)
class _Examination:
    """The results for one model, and the number of tokens, the modules and the calls that they hold for."""

    length: int
    modules: list[ReferenceType[nn.Module]]
    names: list[str]
    graphs: WeakKeyDictionary[Any, ResidualGraph] = field(default_factory=WeakKeyDictionary)
    """By the function that runs the model: it decides which streams the output reads."""

    def holds(self, length: int, modules: list[nn.Module], names: list[str]) -> bool:
        """Whether the results hold for an input of this length, with these modules and calls."""
        same = len(modules) == len(self.modules) and all(old() is new for old, new in zip(self.modules, modules))
        return same and names == self.names and length <= 2 * self.length


_EXAMINATIONS: WeakKeyDictionary[nn.Module, _Examination] = WeakKeyDictionary()


@dataclass(frozen=True)
class _ModuleRun:
    """Input and output of one module, both (B, L, channels) or (B, channels, L)."""

    name: str
    module: nn.Module
    x: Tensor
    y: Tensor


def examine(
    model: nn.Module, forward: Callable[[], Tensor], calls: list[LayerCall], reader: Callable[..., Any]
) -> ResidualGraph:
    """Raise if any module besides the supported mixers mixes tokens; return the residual graph.

    Args:
        model: The model that holds the mixers.
        forward: Runs the model once on the same input and returns the explained output. Not called if the model was
            examined before, with the same calls on at least half as many tokens.
        calls: The mixers' calls on that input.
        reader: The function that ``forward`` calls, which stays the same from call to call.

    Returns:
        The streams that the calls and the output read.

    Raises:
        UnsupportedModelError: If tokens are mixed elsewhere; the message names the innermost module that does.
        InvalidInputError: If the model runs more than once.

    Cost: one forward pass and 2 log2(L) backward passes of all but the mixers, once for each model, and again
    if its modules or calls changed or the input is more than twice as long; one forward pass for each function.
    """
    length = calls[-1].x.shape[1]
    modules, names = list(model.modules()), [call.name for call in calls]
    known = _EXAMINATIONS.get(model)
    if known is not None and not known.holds(length, modules, names):
        known = None
    if known is not None and reader in known.graphs:
        return known.graphs[reader]
    with ExitStack() as marks:
        runs, graph = _record(model, forward, length, marks)
        _refuse_several_runs(calls, graph)
        if known is None:
            _refuse_mixing(runs, length)
    if length > 1:  # a single token proves nothing
        known = _EXAMINATIONS[model] = known or _Examination(length, [ref(module) for module in modules], names)
        known.graphs[reader] = graph
    return graph


def _refuse_several_runs(calls: list[LayerCall], graph: ResidualGraph) -> None:
    """Raise if a mixer that ran before starts from the embeddings once more."""
    for number, call in enumerate(calls):
        repeated = any(call.mixer is earlier.mixer for earlier in calls[:number])
        if repeated and graph.reads[number] <= {EMBEDDINGS}:
            raise InvalidInputError(
                "forward_func runs the model more than once, so its output comes from several attentions. Explain one "
                "run: for a difference of two of its outputs pass `contrast`."
            )


def _refuse_mixing(runs: list[_ModuleRun], length: int) -> None:
    """Raise if a module mixes tokens, and name the innermost one that does."""
    for run in runs:
        if any(_is_inside(run.name, outer.name) for outer in runs) or not _mixes_tokens(run, length):
            continue
        inner = [r for r in runs if _is_inside(r.name, run.name) and _mixes_tokens(r, length)]
        culprit = max([run, *inner], key=lambda r: r.name.count(".") + bool(r.name))
        raise UnsupportedModelError(
            f"Layer '{culprit.name}' ({type(culprit.module).__name__}) mixes tokens, and no adapter knows it, so an "
            f"explanation would silently leave it out. Supported: {supported_families()}. Register an adapter for "
            f"{type(culprit.module).__name__} with captum_ssm.register."
        )


def _record(
    model: nn.Module, forward: Callable[[], Tensor], length: int, marks: ExitStack
) -> tuple[list[_ModuleRun], ResidualGraph]:
    """Run the model with its mixers' outputs held fixed; record all other modules, and the streams that mixers read.

    The code between the modules is recorded as a run of the model itself: from the first sequence of vectors, such as
    the embeddings, to the last.

    Args:
        model: The model that holds the mixers.
        forward: Runs it once and returns the explained output.
        length: L, how many tokens there are.
        marks: Undoes the marks that are set on the caller's tensors.

    Returns:
        The runs of all modules but the mixers, and the residual graph.
    """
    mixers = find_mixers(model)
    runs: list[_ModuleRun] = []
    entered: list[Tensor | None] = []
    sequences: list[Tensor] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((a for a in (*args, *kwargs.values()) if _is_sequence(a, length)), None)
        if x is not None and not x.requires_grad:  # in place: a path around the module is to be followed too
            marks.callback(x.requires_grad_, False)
            x.requires_grad_()
        entered.append(x)
        sequences.extend([] if x is None else [x])

    def leave(name: str, module: nn.Module, output: Any) -> Any:
        x, y = entered.pop(), output[0] if isinstance(output, tuple) and output else output
        if not _is_sequence(y, length):
            return output
        if x is None and not sequences and y is output:  # the embedding of token ids
            y = output = y.detach().requires_grad_()
        if x is not None and y.requires_grad:
            runs.append(_ModuleRun(name, module, x, y))
        sequences.append(y)
        return output

    with torch.enable_grad(), ExitStack() as hooks:
        calls = hooks.enter_context(record_mixers(model, hold=True))
        for name, module in model.named_modules():
            if any(name == mixer or _is_inside(name, mixer) for mixer in mixers):
                continue
            before = module.register_forward_pre_hook(enter, with_kwargs=True)
            hooks.callback(before.remove)
            after = module.register_forward_hook(lambda m, args, output, name=name: leave(name, m, output))
            hooks.callback(after.remove)
        output = forward()
        graph = _trace(model, calls, sequences[0] if sequences else None, output)
    if sequences and sequences[-1].requires_grad and all(run.name for run in runs):
        runs.append(_ModuleRun("", model, sequences[0], sequences[-1]))
    return runs, graph


def _trace(model: nn.Module, calls: list[LayerCall], embeddings: Tensor | None, output: Tensor) -> ResidualGraph:
    """Follow the graph back from every mixer's input, and from the output, to the mixers' outputs and embeddings."""
    numbers = {id(call.y): number for number, call in enumerate(calls)}
    parameters = {id(parameter) for parameter in model.parameters()}
    streams: dict[Any, Stream] = {}
    if embeddings is not None and embeddings.grad_fn is not None:  # looked up in a parameter
        streams[embeddings.grad_fn] = frozenset({EMBEDDINGS})

    def leaf(tensor: Tensor) -> Stream:
        return frozenset() if id(tensor) in parameters else frozenset({numbers.get(id(tensor), EMBEDDINGS)})

    def trace(tensor: Tensor) -> Stream:
        if tensor.grad_fn is None:
            return leaf(tensor) if tensor.requires_grad else frozenset()
        pending = [] if tensor.grad_fn in streams else [tensor.grad_fn]
        while pending:  # a walk in depth, each node after those that it depends on
            node = pending[-1]
            before = [n for n, _ in node.next_functions if n is not None]
            unknown = [n for n in before if n not in streams]
            if unknown:
                pending.extend(unknown)
                continue
            variable = getattr(node, "variable", None)
            streams[node] = leaf(variable) if variable is not None else frozenset().union(*(streams[n] for n in before))
            pending.pop()
        return streams[tensor.grad_fn]

    return ResidualGraph([trace(call.x) for call in calls], trace(output))


def _mixes_tokens(run: _ModuleRun, length: int) -> bool:
    """Whether the output at any token depends on the input at any other.

    Any two tokens differ in some bit of their numbers. So for each bit, the outputs of the tokens that have it must
    not depend on the inputs of those that have it not, and the other way round.

    Returns:
        Whether it does.
    """
    number = torch.arange(length, device=run.y.device)
    with torch.enable_grad():
        y = _tokens_first(run.y, length)
    weights = torch.randn(y.shape[-1], generator=torch.Generator().manual_seed(0)).to(y)
    for bit in range((length - 1).bit_length()):
        for side in (number >> bit & 1 == 1, number >> bit & 1 == 0):
            with torch.enable_grad():
                score = (y[:, side] * weights).sum()
            (gradient,) = torch.autograd.grad(score, run.x, retain_graph=True, allow_unused=True)
            if gradient is not None and bool(_tokens_first(gradient, length)[:, ~side].ne(0).any()):
                return True
    return False


def _is_sequence(value: Any, length: int) -> bool:
    """Whether ``value`` looks like (B, L, channels), or (B, channels, L) as convolutions take it."""
    vectors = isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3
    return bool(vectors and length in value.shape[1:])


def _tokens_first(sequence: Tensor, length: int) -> Tensor:
    """Return a sequence as (B, L, channels)."""
    return sequence if sequence.shape[1] == length else sequence.transpose(1, 2)


def _is_inside(name: str, outer: str) -> bool:
    """Whether the module ``name`` lies within the module ``outer``; all lie within the root, ``""``."""
    return name != outer and (not outer or name.startswith(f"{outer}."))
