"""Run a model on an input and its reference at once, and follow the relevance back."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial, reduce
from operator import add
from typing import Any, cast
from unittest.mock import patch

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten
from torch.utils.checkpoint import checkpoint

from captum_ssm.errors import FidelityError, UnsupportedModelError
from captum_ssm.layers.call import LayerCall
from captum_ssm.layers.fidelity import TOLERANCE, relative_error, unchecked_chain
from captum_ssm.layers.mixers import find_mixers
from captum_ssm.network.recording import record_mixers
from captum_ssm.operators import Chain, Flip, Operator, Sum
from captum_ssm.relevance.functions import OPAQUE
from captum_ssm.relevance.rules import Rule
from captum_ssm.relevance.traced import Traced, constants, traced


@contextmanager
def follow(
    model: nn.Module,
    checked: Callable[[LayerCall, Tensor | None], None],
    whole: bool = True,
    checkpoints: bool = False,
    apart: list[Traced] | None = None,
    entering: Callable[[str, str, Tensor], None] | None = None,
) -> Iterator[None]:
    """Let what is traced flow through a model while the context is open: its mixers by their decomposition.

    Args:
        model: The model. All is as before when the context is left.
        checked: Called with each mixer's real call, on the input alone, and with what its decomposition gives for that;
            None if the decomposition has run on an input of a wider type.
        whole: Whether the gates of the mixers are traced too.
        checkpoints: Keep no more than what enters each block, and run the block again for the gradient. The context
            must then be open until the gradient is there.
        apart: Gets what passes a recurrence by its direct path, cut off from the input; None leaves it in the flow.
        entering: Called with a mixer's name, the name of each factor of its chain, and what enters the factor.
    """
    again: list[bool] = []
    plain = _plainly(model)

    def rewrite(call: LayerCall) -> Tensor:
        if not traced((call.x, call.kwargs)):
            return call.y
        if not isinstance(call.x, Traced) or traced(call.kwargs):
            raise UnsupportedModelError(
                f"Layer '{call.name}' ({type(call.mixer).__name__}) has other arguments than its input that "
                "depend on the tokens, and its adapter takes them as constants."
            )
        found = LayerCall(call.name, call.mixer, plain(call.x), call.y, call.kwargs)
        rounded = call.y.dtype != call.x.dtype  # the layer itself then ran on another input
        if rounded and not again:
            checked(found, None)
        x: Tensor = call.x
        with cast(Rule, call.x.rule).sharing(entering is None and apart is None):
            chain = unchecked_chain(found, x if whole else call.x.value.detach())
            for name, operator in reversed(list(chain.factors.items())):
                if entering is not None and not again:
                    entering(call.name, name, x)
                x = operator.apply(x, bias=True) if apart is None else _cut_skip(operator, x, apart)
        if not rounded and not again:
            checked(found, constants(x))
        return x

    with ExitStack() as stack:
        for name, module in model.named_modules():
            rule = next((OPAQUE[c.__name__] for c in type(module).__mro__ if c.__name__ in OPAQUE), None)
            if rule is not None:
                made = _ruled(name, type(module).__name__, module.forward, partial(rule, module), plain)
                stack.enter_context(patch.object(module, "forward", made))
        for path in {c.__module__ for module in model.modules() for c in type(module).__mro__} & sys.modules.keys():
            home = sys.modules[path]
            for called, rule in OPAQUE.items():
                where, _, name = called.rpartition(".")
                code = vars(home).get(name)
                if where in ("", path) and callable(code) and not isinstance(code, type):
                    made = _ruled(f"{path}.{name}", called, code, rule, plain)
                    stack.enter_context(patch.object(home, name, made))
        if checkpoints:
            for block in blocks(model):
                stack.enter_context(patch.object(block, "forward", _checkpointed(block.forward, again)))
        stack.enter_context(record_mixers(model, replacement=rewrite, prepare=plain))
        yield


def blocks(model: nn.Module) -> list[nn.Module]:
    """Return the blocks of a model: the members of its lists of modules that have a mixer inside.

    Raises:
        UnsupportedModelError: If there are none.
    """
    mixers = set(find_mixers(model).values())
    lists = [module for module in model.modules() if isinstance(module, nn.ModuleList)]
    found = [block for each in lists for block in each if mixers & set(block.modules()) and block not in mixers]
    found = [b for b in found if not any(b is not other and b in set(other.modules()) for other in found)]
    if not found:
        raise UnsupportedModelError(
            f"{type(model).__name__} has no list of blocks, so there is nothing to checkpoint; leave checkpoints out."
        )
    return list(dict.fromkeys(found))


def _plainly(model: nn.Module) -> Callable[[Any], Any]:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)

    def plain(nested: Any) -> Any:
        leaves, spec = tree_flatten(nested)
        return tree_unflatten([_narrowed(leaf, dtype) for leaf in leaves], spec)

    return plain


def _cut_skip(operator: Operator, x: Tensor, apart: list[Traced]) -> Tensor:
    """Apply an operator, its direct path from a leaf of its own."""
    if isinstance(operator, Chain):
        return reduce(lambda x, factor: _cut_skip(factor, x, apart), reversed(list(operator.factors.values())), x)
    if isinstance(operator, Sum):
        return reduce(add, (_cut_skip(summand, x, apart) for summand in operator.summands.values()))
    if isinstance(operator, Flip):
        return _cut_skip(operator.operator, x.flip(-2), apart).flip(-2)
    skip = getattr(operator, "skip", None)
    if skip is None:
        return operator.apply(x, bias=True)
    direct = skip * x
    leaf = Traced.of(direct.value.detach().requires_grad_(), direct.reference, direct.rule)
    apart.append(leaf)
    return operator.without("skip").apply(x, bias=True) + leaf


def _narrowed(leaf: Any, dtype: torch.dtype) -> Any:
    """Return a value as a constant of the model's type, also where the explanation's wider type has spread."""
    if isinstance(leaf, Traced):
        return leaf.value.detach().to(dtype)
    spread = isinstance(leaf, Tensor) and leaf.dtype == torch.float32 and dtype in (torch.bfloat16, torch.float16)
    return leaf.to(dtype) if spread else leaf


@contextmanager
def _noted(stack: list[bool]) -> Iterator[None]:
    stack.append(True)
    try:
        yield
    finally:
        stack.pop()


def _ruled(
    name: str, kind: str, own: Callable[..., Any], rule: Callable[..., Any], plain: Callable[[Any], Any]
) -> Callable[..., Any]:
    """Return what stands in for code that has a rule: the rule's result, which that of the code itself checks.

    Args:
        name: What an error calls the code.
        kind: The name that the rule is registered for.
        own: The code.
        rule: What it is made of.
        plain: What becomes of the arguments that the code itself runs on.
    """

    def forward(*args: Any, **kwargs: Any) -> Any:
        if not traced((args, kwargs)):
            return own(*args, **kwargs)
        made = rule(*args, **kwargs)
        plain_args, plain_kwargs = plain((args, kwargs))
        with torch.no_grad():
            exact = own(*plain_args, **plain_kwargs)
        for part, expected in zip(tree_leaves(made), tree_leaves(exact)):
            error, allowed = relative_error(constants(part), expected), TOLERANCE.get(expected.dtype, 1e-4)
            if not error <= allowed:
                raise FidelityError(name, error, allowed, f"a wrong rule for {kind} (captum_ssm.register_rule)")
        return made

    return forward


_HERE = object()
"""Stands for what is traced among what a block returns."""


def _checkpointed(own: Callable[..., Any], again: list[bool]) -> Callable[..., Any]:
    """Return a block's forward that keeps its arguments alone, as plain tensors, which a checkpoint understands."""

    def forward(*args: Any, **kwargs: Any) -> Any:
        live = traced((args, kwargs))
        if not live:
            return own(*args, **kwargs)
        leaves, spec = tree_flatten((args, kwargs))
        rule, places = live[0].rule, [k for k, leaf in enumerate(leaves) if isinstance(leaf, Traced)]
        shape: list[Any] = []

        def run(*tensors: Tensor) -> tuple[Tensor, ...]:
            pairs = iter(zip(tensors[::2], tensors[1::2]))
            filled = [Traced.of(*next(pairs), rule) if k in places else leaf for k, leaf in enumerate(leaves)]
            inner_args, inner_kwargs = tree_unflatten(filled, spec)
            with _noted(again) if shape else nullcontext():  # the second time it runs for the gradient
                out, out_spec = tree_flatten(own(*inner_args, **inner_kwargs))
            shape[:] = [out_spec, [_HERE if isinstance(leaf, Traced) else leaf for leaf in out]]
            return tuple(t for leaf in out if isinstance(leaf, Traced) for t in (leaf.value, leaf.reference))

        flat = checkpoint(
            run, *[t for k in places for t in (leaves[k].value, leaves[k].reference)], use_reentrant=False
        )
        out_spec, rest = shape
        pairs = iter(zip(flat[::2], flat[1::2]))
        return tree_unflatten([Traced.of(*next(pairs), rule) if leaf is _HERE else leaf for leaf in rest], out_spec)

    return forward
