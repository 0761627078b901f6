"""The check that a model's supported mixers are all that mixes its tokens.

A rollout multiplies the attention of the layers. It is wrong, with nothing to show for it, if a layer that it
does not know moves information between tokens. So once for each model the mixers' outputs are held fixed, and
every other module must then act on each token by itself: the gradient of its output at one token with respect
to its input at any other must be zero.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from captum_ssm.capture import record_mixers
from captum_ssm.errors import UnsupportedModelError
from captum_ssm.registry import find_mixers, supported

_CHECKED: WeakKeyDictionary[nn.Module, tuple[int, ...]] = WeakKeyDictionary()
"""Models that passed, each with the identity of its modules at that time."""


@dataclass(frozen=True)
class _Flow:
    """What entered and left one module, both (B, L, channels)."""

    name: str
    module: nn.Module
    x: Tensor
    y: Tensor


def refuse_unknown_mixers(model: nn.Module, forward: Callable[[], object]) -> None:
    """Raise if any module besides the supported mixers mixes tokens.

    Args:
        model: The model that holds the mixers.
        forward: Runs the model once on the input at hand. Not called if the model passed before.

    Raises:
        UnsupportedModelError: If tokens are mixed elsewhere; the message names the innermost such module.

    Cost: one forward pass and the backward pass of what is not a mixer, once for each model.
    """
    identity = tuple(id(module) for module in model.modules())
    if _CHECKED.get(model) == identity:
        return
    flows = _record_flows(model, forward)
    outermost = [f for f in flows if not any(_is_inside(f.name, g.name) for g in flows)]
    for flow in outermost:
        if not _mixes_tokens(flow):
            continue
        inner = [f for f in flows if _is_inside(f.name, flow.name) and _mixes_tokens(f)]
        culprit = max([flow, *inner], key=lambda f: f.name.count(".") + bool(f.name))
        raise UnsupportedModelError(
            f"Layer '{culprit.name}' ({type(culprit.module).__name__}) mixes tokens, and no adapter knows it, so an "
            f"explanation would silently leave it out. Supported: {', '.join(supported())}. Register an adapter for "
            f"{type(culprit.module).__name__} with captum_ssm.register."
        )
    if any(flow.x.shape[1] > 1 for flow in flows):  # a single token proves nothing
        _CHECKED[model] = identity


def _record_flows(model: nn.Module, forward: Callable[[], object]) -> list[_Flow]:
    """Run the model with its mixers' outputs held fixed, and record all other modules."""
    mixers = find_mixers(model)
    flows: list[_Flow] = []
    entered: list[Tensor | None] = []

    def enter(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        x = next((a for a in (*args, *kwargs.values()) if _is_sequence(a)), None)
        watched = x if x is None or x.requires_grad else x.detach().requires_grad_()
        entered.append(watched)
        args = tuple(watched if a is x else a for a in args)
        return args, {key: watched if a is x else a for key, a in kwargs.items()}

    def leave(name: str, module: nn.Module, output: Any) -> None:
        x, y = entered.pop(), output[0] if isinstance(output, tuple) and output else output
        if x is not None and _is_sequence(y) and y.requires_grad and x.shape[:2] == y.shape[:2]:
            flows.append(_Flow(name, module, x, y))

    with torch.enable_grad(), ExitStack() as hooks:
        hooks.enter_context(record_mixers(model, hold=True))
        for name, module in model.named_modules():
            if any(name == mixer or _is_inside(name, mixer) for mixer in mixers):
                continue
            before = module.register_forward_pre_hook(enter, with_kwargs=True)
            hooks.callback(before.remove)
            after = module.register_forward_hook(lambda m, args, output, name=name: leave(name, m, output))
            hooks.callback(after.remove)
        forward()
    return flows


def _mixes_tokens(flow: _Flow) -> bool:
    """Whether the output at the first or the last token depends on the input at any other."""
    weights = torch.randn(flow.y.shape[-1], generator=torch.Generator().manual_seed(0)).to(flow.y)
    for token in (0, flow.y.shape[1] - 1):
        score = (flow.y[:, token] * weights).sum()
        (gradient,) = torch.autograd.grad(score, flow.x, retain_graph=True, allow_unused=True)
        if gradient is not None:
            others = gradient.ne(0).any(-1).any(0)
            others[token] = False
            if bool(others.any()):
                return True
    return False


def _is_sequence(value: Any) -> bool:
    """Whether ``value`` looks like (B, L, channels)."""
    return isinstance(value, Tensor) and value.is_floating_point() and value.dim() == 3


def _is_inside(name: str, outer: str) -> bool:
    """Whether the module ``name`` lies within the module ``outer``; all lie within the root, ``""``."""
    return name != outer and (not outer or name.startswith(f"{outer}."))
