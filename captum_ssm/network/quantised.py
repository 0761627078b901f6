"""The gradient of parts with quantised weights: that of the weights that they stand for, whatever their code has."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from captum_ssm.layers.measured import MeasuredPart
from captum_ssm.layers.stand_ins import is_packed, is_packed_part
from captum_ssm.network.threads import substitute


def quantised_parts(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Go through the modules of a model that hold a quantised weight themselves.

    Args:
        model: The model.

    Yields:
        Dotted name and module.
    """
    if not is_packed(model):
        return
    for name, module in model.named_modules():
        if is_packed_part(module):
            yield name, module


def give_gradients(model: nn.Module, stack: ExitStack) -> None:
    """Let the gradient through parts with quantised weights be that of their weights, until the stack is closed.

    The code of some has no gradient, or, as it rounds its input, one that is 0.

    Args:
        model: The model.
        stack: Restores the parts.
    """
    for name, module in quantised_parts(model):
        substitute(module, "forward", partial(_WithGradient, name, module), stack)


def matrix_of(name: str, module: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    """Return the matrix (D, E) of a part with quantised weights, in the type of its input.

    Args:
        name: Dotted name of the part.
        module: The part.
        x: Its input (..., E).
        y: Its output (..., D).

    Returns:
        The matrix. Cost: the part runs on E tokens.
    """
    return MeasuredPart(name, module, x, (y.shape[-1], x.shape[-1])).matrix


def projects(x: Any, y: Any) -> bool:
    """Whether a part made y of x token by token, as far as their shapes tell."""
    tensors = isinstance(x, Tensor) and isinstance(y, Tensor)
    return tensors and x.is_floating_point() and y.is_floating_point() and x.shape[:-1] == y.shape[:-1]


@dataclass(frozen=True)
class _WithGradient:
    """Stands in for the code of a part with quantised weights.

    Args:
        name: Dotted name of the part.
        module: The part.
        code: Its code.
    """

    name: str
    module: nn.Module
    code: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        if type(x) is not Tensor or not (x.requires_grad and torch.is_grad_enabled()):
            return self.code(*args, **kwargs)
        with torch.no_grad():
            y = self.code(x.detach())
        if not projects(x, y):
            return self.code(x)
        return _Weighed.apply(x, y, partial(matrix_of, self.name, self.module))  # type: ignore[no-untyped-call]


class _Weighed(torch.autograd.Function):
    """The output y of a part for x, with the gradient of its matrix."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, matrix: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        ctx.matrix, ctx.like = matrix, x.new_empty(0, x.shape[-1])
        return y.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        return (gradient @ ctx.matrix(ctx.like, gradient).to(gradient)).to(ctx.like.dtype), None, None
