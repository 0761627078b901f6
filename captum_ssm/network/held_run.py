"""One run of a model whose mixers' outputs are held fixed: all that happens between the mixers, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from captum_ssm.errors import UnsupportedModelError
from captum_ssm.layers.call import LayerCall
from captum_ssm.layers.mixers import find_mixers
from captum_ssm.layers.precision import narrowest
from captum_ssm.network.graph import EMBEDDINGS, OTHERS, ResidualGraph, Stream
from captum_ssm.network.interface import output_embeddings
from captum_ssm.network.recording import record_mixers
from captum_ssm.network.threads import hook


@dataclass(frozen=True)
class ModuleRun:
    """Input and output of one module, both (B, L, channels) or (B, channels, L)."""

    name: str
    module: nn.Module
    x: Tensor
    y: Tensor


_LARGEST_NOISE = 0.1
"""Relative to the largest entry of a token: a change that no rounding exceeds, in any type."""


@dataclass(frozen=True)
class HeldRun:
    """A run with the mixers' outputs as constants.

    Args:
        inputs: The inputs; vectors and images are a leaf of the graph.
        calls: The mixers' calls, ``x`` with the graph behind it, ``y`` a leaf.
        output: The explained output, with the graph behind it.
        modules: The runs of all modules but the mixers.
        graph: The streams that the calls and the output read, by the graph alone.
    """

    inputs: Tensor
    calls: list[LayerCall]
    output: Tensor
    modules: list[ModuleRun]
    graph: ResidualGraph

    @property
    def takes_ids(self) -> bool:
        """Whether the inputs are token ids, which have no gradient."""
        return not self.inputs.is_floating_point()

    @property
    def takes_images(self) -> bool:
        """Whether the inputs are images, (B, C, H, W)."""
        return self.inputs.is_floating_point() and self.inputs.dim() == 4

    @property
    def length(self) -> int:
        """L, the number of tokens of the inputs, or for images of the first mixer."""
        return self.calls[0].x.shape[1] if self.takes_images else self.inputs.shape[1]

    @cached_property
    def computing_type(self) -> torch.dtype:
        """The narrowest type that a mixer ran in, from which the rounding of all that follows comes."""
        return narrowest(call.narrowest_type for call in self.calls)

    def changed(self, values: Tensor, original: Tensor) -> Tensor:
        """Return where values differ by more than rounding from the original ones, in the shape of both."""
        noise = 0.0
        if original.is_floating_point():
            dtype = narrowest([original.dtype, self.computing_type])
            noise = min(64 * torch.finfo(dtype).eps, _LARGEST_NOISE)
        return (values - original).abs() > noise * original.detach().abs().max()

    def has_tokens(self, output: Tensor) -> bool:
        """Whether an output has a vector for each token, (B, L, channels) or (B, channels, L)."""
        return output.dim() == 3 and len(output) == len(self.inputs) and self.length in output.shape[1:]


def hold(model: nn.Module, run: Callable[[Tensor], Tensor], inputs: Tensor, length: int, marks: ExitStack) -> HeldRun:
    """Run the model with its mixers' outputs held fixed; record all other modules, and the streams that mixers read.

    The code between the modules is recorded as a run of the model itself: from the first sequence of vectors, such as
    the embeddings, to the last.

    Args:
        model: The model that holds the mixers.
        run: From inputs to the explained output.
        inputs: Token ids (B, L), embeddings (B, L, E) or images (B, C, H, W).
        length: L, the number of tokens that the mixers have.
        marks: Undoes the marks that are set on the caller's tensors.

    Returns:
        The run.
    """
    mixers, head = find_mixers(model), output_embeddings(model)
    modules: list[ModuleRun] = []
    entered: list[Tensor | None] = []
    sequences: list[Tensor] = []
    takes_ids = not inputs.is_floating_point()
    if not takes_ids:
        inputs = inputs.detach().requires_grad_()

    def has_tokens(module: nn.Module, value: Any) -> bool:
        """Whether a value is a sequence; the head may get a few of the tokens, with as many channels as there are."""
        return is_sequence(value, length) and (module is not head or value.shape[1] == length)

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = next((a for a in (*args, *kwargs.values()) if has_tokens(module, a)), None)
        if x is not None and not x.requires_grad:  # in place: a path around the module is to be followed too
            marks.callback(x.requires_grad_, False)
            x.requires_grad_()
        entered.append(x)
        sequences.extend([] if x is None else [x])

    def leave(name: str, module: nn.Module, output: Any) -> Any:
        x, y = entered.pop(), output[0] if isinstance(output, tuple) and output else output
        if not has_tokens(module, y):
            return output
        if takes_ids and x is None and not sequences and y is output:  # the embedding of token ids
            y = output = y.detach().requires_grad_()
        if x is not None and y.requires_grad:
            modules.append(ModuleRun(name, module, x, y))
        sequences.append(y)
        return output

    with torch.enable_grad(), ExitStack() as hooks:
        calls = hooks.enter_context(record_mixers(model, hold=True))
        for name, module in model.named_modules():
            if any(name == mixer or is_inside(name, mixer) for mixer in mixers):
                continue
            hook(module.register_forward_pre_hook, enter, hooks, with_kwargs=True)
            hook(module.register_forward_hook, lambda m, args, output, name=name: leave(name, m, output), hooks)
        output = run(inputs)
        embeddings = sequences[0] if sequences and takes_ids else inputs
        graph = _trace(model, calls, embeddings, output)
    if sequences and sequences[-1].requires_grad and all(run.name for run in modules):
        modules.append(ModuleRun("", model, sequences[0], sequences[-1]))
    return HeldRun(inputs, calls, output, modules, graph)


def _trace(model: nn.Module, calls: list[LayerCall], embeddings: Tensor, output: Tensor) -> ResidualGraph:
    """Follow the graph back from every mixer's input, and from the output, to the mixers' outputs and embeddings."""
    numbers = {**{id(call.y): number for number, call in enumerate(calls)}, id(embeddings): EMBEDDINGS}
    parameters = {id(parameter) for parameter in model.parameters()}
    streams: dict[Any, Stream] = {}
    if embeddings.grad_fn is not None:  # looked up in a parameter
        streams[embeddings.grad_fn] = frozenset({EMBEDDINGS})

    def leaf(tensor: Tensor) -> Stream:
        return frozenset() if id(tensor) in parameters else frozenset({numbers.get(id(tensor), OTHERS)})

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


def gradients(score: Tensor, sources: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return the gradient of a score at each source, on the device of the score; zero where it does not depend on it.

    Raises:
        UnsupportedModelError: If the code of the model has no gradient here.
    """
    if not score.requires_grad:
        return tuple(torch.zeros_like(source, device=score.device) for source in sources)
    try:
        found = torch.autograd.grad(score, list(sources), retain_graph=True, materialize_grads=True)
        return tuple(gradient.to(score.device) for gradient in found)
    except RuntimeError as error:
        raise UnsupportedModelError(
            f"The gradient of the code between the layers fails ({error}), as where a model runs a part again for the "
            "gradient (torch.utils.checkpoint). Explain it without such checkpoints, or use "
            "ImplicitAttentionRelevance, which follows every function."
        ) from error


def weighed(tensor: Tensor) -> Tensor:
    """Return (B, ...) times random weights of the last axis, so that nothing cancels."""
    weights = torch.randn(tensor.shape[-1:], generator=torch.Generator().manual_seed(0), device="cpu")
    return tensor * weights.to(tensor)


def is_inside(name: str, outer: str) -> bool:
    """Whether the module ``name`` lies within the module ``outer``; all lie within the root, ``""``."""
    return name != outer and (not outer or name.startswith(f"{outer}."))


def is_sequence(value: Any, length: int) -> bool:
    """Whether ``value`` looks like (B, L, channels), or (B, channels, L) as convolutions take it."""
    vectors = isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3
    return bool(vectors and length in value.shape[1:])


def tokens_first(sequence: Tensor, length: int) -> Tensor:
    """Return a sequence as (B, L, channels)."""
    return sequence if sequence.shape[1] == length else sequence.transpose(1, 2)


def run_again(
    model: nn.Module,
    run: Callable[[Tensor], Tensor],
    held: HeldRun,
    inputs: Tensor,
    outputs: Sequence[Tensor] | None = None,
) -> tuple[list[LayerCall], Tensor]:
    """Run the model once more with its mixers' outputs held fixed.

    Args:
        model: The model that holds the mixers.
        run: From inputs to the explained output.
        held: The first such run.
        inputs: Other inputs of the same shape.
        outputs: The mixers' outputs, (B, L, E); None for those of the first run.

    Returns:
        The calls, and the output.
    """
    following = iter([call.y.detach() for call in held.calls] if outputs is None else outputs)
    with record_mixers(model, replacement=lambda call: next(following, call.y)) as calls:
        result = run(inputs)
    return calls, result


def by_example(changed: Tensor, count: int) -> Tensor:
    """Return whether the output of each example changed, (B,)."""
    if changed.dim() and len(changed) == count:
        return changed.reshape(count, -1).any(1)
    return changed.any().expand(count)


def tokens_read(calls: Sequence[LayerCall], output: Tensor) -> Tensor:
    """Return which tokens of the calls' outputs the model's output reads by its gradient, (B, L, calls)."""
    slopes = gradients(weighed(output).sum(), [call.y for call in calls])
    return torch.stack([slope.ne(0).any(-1) for slope in slopes], -1)
