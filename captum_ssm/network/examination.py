"""Examine a model: nothing but its mixers may mix tokens, which calls read which, and which token is which.

A rollout multiplies the attention of the layers. It is wrong, without any sign of it, if a layer that it does not know
moves information between tokens, or if the layers feed each other in another order than it assumes. So the mixers'
outputs are held fixed. Every other module must then act on each token separately: the gradient of its output at one
token with respect to its input at any other must be zero. The graph from one mixer's input back to the outputs of the
others tells which of them it reads, and gradients tell at which tokens (:mod:`captum_ssm.network.token_identity`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_ssm.errors import InvalidInputError, UnsupportedModelError
from captum_ssm.layers.call import LayerCall
from captum_ssm.layers.mixers import not_gated_linear, supported_families
from captum_ssm.network.graph import EMBEDDINGS, OTHERS, ResidualGraph
from captum_ssm.network.held_run import ModuleRun, gradients, hold, is_inside, tokens_first, weighed
from captum_ssm.network.measurements import Measurements
from captum_ssm.network.token_codes import SEVERAL, decoded, sources, token_codes
from captum_ssm.network.token_identity import follow_tokens, refuse_other_tokens


@dataclass(frozen=True)
class _Examination:
    """The residual graph of one model, and the inputs that it was measured on."""

    shape: torch.Size
    graph: ResidualGraph

    def holds(self, inputs: Tensor, mask: Tensor) -> bool:
        """Whether it holds for other inputs of the same length: always, or if tokens change their order for as many.

        Args:
            inputs: The inputs.
            mask: 1 at real tokens and 0 at padding, (B, L).

        Returns:
            Whether it does.
        """
        return self.graph.is_in_order or (inputs.shape == self.shape and bool(mask.bool().all()))

    @property
    def may_be_kept(self) -> bool:
        """Whether other inputs of the same shape give the same: tokens are in order or turned round, not sorted."""
        return all(_is_turned_round(order) for order in self.graph.orders if order is not None)


_EXAMINATIONS: Measurements[_Examination] = Measurements()


def examine(
    model: nn.Module,
    calls: Sequence[LayerCall],
    inputs: Tensor,
    mask: Tensor,
    run: Callable[[Tensor], Tensor],
    reader: Callable[..., Any],
    args: tuple[Any, ...] = (),
) -> ResidualGraph:
    """Raise if any module besides the supported mixers mixes tokens; return the residual graph.

    Args:
        model: The model that holds the mixers.
        calls: The mixers' calls on the inputs.
        inputs: Token ids (B, L), embeddings (B, L, E) or images (B, C, H, W).
        mask: 1 at real tokens and 0 at padding, (B, L).
        run: From inputs to the explained output. Not called if the model was examined before and is unchanged, with
            the same calls, reader and arguments, on inputs of the same kind and length: code that cuts, folds or turns
            sequences may do it for some lengths alone.
        reader: The function that ``run`` calls, which stays the same from call to call.
        args: The additional arguments that ``run`` passes to it.

    Returns:
        The streams that the calls and the output read, and the order of their tokens.

    Raises:
        UnsupportedModelError: If tokens are mixed elsewhere, the message names the innermost module that does; or if
            a layer's tokens are not the inputs' tokens.
        InvalidInputError: If the model runs more than once.

    Cost: log2(L) forward and 3 log2(L) backward passes of all but the mixers, and for token ids log2(L) forward passes
    more; when nothing changed, one pass over the weights.
    """
    length = calls[-1].x.shape[1]
    known = _EXAMINATIONS.of(model, reader, args)
    key = tuple(call.name for call in calls), inputs.is_floating_point(), inputs.shape[1:]
    earlier = known.get(key)
    if earlier is not None and earlier.holds(inputs, mask):
        return earlier.graph
    with ExitStack() as marks:
        held = hold(model, run, inputs, length, marks)
        _refuse_several_runs(held.calls, held.graph)
        refuse_other_tokens(held)
        _refuse_mixing([module for module in held.modules if module.name], length)
        graph = follow_tokens(model, run, held, mask)
        _refuse_mixing([module for module in held.modules if not module.name], length)
    found = _Examination(inputs.shape, graph)
    if found.may_be_kept:
        known[key] = found
    return graph


def _is_turned_round(order: Tensor) -> bool:
    """Whether the tokens are in the opposite order, (B, L)."""
    return bool(order.flip(1).eq(torch.arange(order.shape[1], device=order.device)).all())


def _refuse_several_runs(calls: list[LayerCall], graph: ResidualGraph) -> None:
    """Raise if a mixer that ran before starts from the embeddings once more, and not on the same sequence backwards."""
    for number, call in enumerate(calls):
        before = [earlier.x for earlier in calls[:number] if call.mixer is earlier.mixer]
        repeated = any(x.shape != call.x.shape or not torch.equal(x.flip(1), call.x) for x in before)
        if repeated and graph.reads[number] <= {EMBEDDINGS, OTHERS}:
            raise InvalidInputError(
                "forward_func runs the model more than once, so its output comes from several attentions. Explain one "
                "run: for a difference of two of its outputs pass `contrast`."
            )


def _refuse_mixing(runs: list[ModuleRun], length: int) -> None:
    """Raise if a module mixes tokens, and name the innermost one that does; it may rearrange them."""
    for run in runs:
        if any(is_inside(run.name, outer.name) for outer in runs) or _keeps_tokens_apart(run, length):
            continue
        inner = [r for r in runs if is_inside(r.name, run.name) and _mixes_tokens(r, length)]
        culprit = max([run, *inner], key=lambda r: r.name.count(".") + bool(r.name))
        name = type(culprit.module).__name__
        if not culprit.name:
            raise UnsupportedModelError(
                f"The code of the model itself ({name}), between its layers, mixes tokens, so an explanation would "
                "silently leave it out. Put it into a layer and register an adapter for that with captum_ssm.register, "
                "or use ImplicitAttentionRelevance, which follows every function."
            )
        around = [culprit, *(outer for outer in runs if is_inside(culprit.name, outer.name))]
        reason = next(filter(None, (not_gated_linear(outer.module) for outer in around)), "")
        raise UnsupportedModelError(
            f"Layer '{culprit.name}' ({name}) mixes tokens, and no adapter knows it, so an explanation would silently "
            f"leave it out. {reason}Supported: {supported_families()}. Register an adapter for {name} with "
            "captum_ssm.register, or use ImplicitAttentionRelevance, which follows every function."
        )


def _mixes_tokens(run: ModuleRun, length: int) -> bool:
    """Whether the output at any token depends on the input at any other; ``length`` is L."""
    codes = token_codes(length).to(run.y.device)
    return any(bool(read[:, ~marked].any()) for marked, read in zip(codes.T, _rounds(run, length)))


def _keeps_tokens_apart(run: ModuleRun, length: int) -> bool:
    """Whether the output at each token depends on the input at one token alone, and no two on the same.

    Args:
        run: The run of a module, or of the model.
        length: L, how many tokens there are.

    Returns:
        Whether it does.
    """
    if length == 1:
        return True
    readers = decoded(torch.stack([*_rounds(run, length)], -1), length)
    here = torch.arange(length, device=readers.device).expand(readers.shape)
    return not bool(sources(readers, here, length).eq(SEVERAL).any())


def _rounds(run: ModuleRun, length: int) -> Iterator[Tensor]:
    """Return for each round of the codes the tokens that the marked tokens of the output depend on.

    Args:
        run: The run of a module, or of the model.
        length: L, how many tokens there are.

    Yields:
        (B, L), True where the input has a gradient.
    """
    with torch.enable_grad():
        y = weighed(tokens_first(run.y, length))
    for marked in token_codes(length).to(y.device).T:
        with torch.enable_grad():
            score = y[:, marked].sum()
        (gradient,) = gradients(score, [run.x])
        yield tokens_first(gradient, length).ne(0).any(-1)
