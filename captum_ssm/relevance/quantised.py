"""The rule of parts with quantised weights, whose code torch's functions do not show.

The part itself gives value and reference, ``y = f(x)`` and ``y' = f(x')``. Its multipliers are its matrix W, as far as
it is affine; where it rounds its input too, they are the matrix next to W that has the right difference::

    M = W + e (x - x')^T / |x - x'|²     with  e = (y - y') - W (x - x')

for each token: Broyden's update, the least change of W by which ``M (x - x') = y - y'``.

Source:
    Broyden 1965, "A class of methods for solving nonlinear simultaneous equations", equation 4.1.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from captum_ssm.errors import FidelityError
from captum_ssm.network.quantised import matrix_of, projects, quantised_parts
from captum_ssm.network.threads import substitute
from captum_ssm.relevance.plain import PlainArguments
from captum_ssm.relevance.traced import Traced

LARGEST = 0.3
"""The largest e, relative to the largest difference of the outputs, that is taken for rounding."""


def substitute_secants(model: nn.Module, plain: PlainArguments, stack: ExitStack) -> None:
    """Run the rule of quantised parts instead of their code, until the stack is closed.

    Args:
        model: The model.
        plain: Turns arguments into those of the code itself.
        stack: Restores the code.
    """
    for name, module in quantised_parts(model):
        substitute(module, "forward", partial(_Secant, name, module, plain), stack)


@dataclass(frozen=True)
class _Secant:
    """Stands in for the code of a part with quantised weights.

    Args:
        name: Dotted name of the part.
        module: The part.
        plain: Turns arguments into those of the code itself.
        code: Its code.
    """

    name: str
    module: nn.Module
    plain: PlainArguments
    code: Callable[..., Any]

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        x = args[0] if len(args) == 1 and not kwargs else None
        if not isinstance(x, Traced):
            return self.code(*args, **kwargs)
        with torch.no_grad():
            y, z = (self.code(self.plain(t)) for t in (x.value.detach(), x.reference))
        if not projects(x, y):
            return self.code(x)
        y, z = y.to(x.value.dtype), z.to(x.value.dtype)
        matrix = partial(matrix_of, self.name, self.module)
        value = _Multiplied.apply(x.value, x.reference, y, z, matrix, self.name)  # type: ignore[no-untyped-call]
        return Traced.of(value, z, x.rule)


class _Multiplied(torch.autograd.Function):
    """The output y of a part for x, with the multipliers M."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, r: Tensor, y: Tensor, z: Tensor, matrix: Callable[[Tensor, Tensor], Tensor], name: str
    ) -> Tensor:
        ctx.save_for_backward(x - r, y - z)
        ctx.matrix, ctx.name = matrix, name
        return y.clone()

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        d, change = ctx.saved_tensors
        W = ctx.matrix(d, change)
        e = change - torch.nn.functional.linear(d, W)
        largest = change.abs().max()
        if not bool(e.abs().max() <= LARGEST * largest):
            cause = (
                f"'{ctx.name}' is no projection of each token, its input is quantised too coarsely, or its kernel is "
                "wrong on this device (load the model in other bits, or run it on another device)"
            )
            raise FidelityError(ctx.name, float(e.abs().max() / largest), LARGEST, cause)
        length = d.square().sum(-1, keepdim=True)
        along = (g * e).sum(-1, keepdim=True) / length.masked_fill(length == 0, 1)
        return torch.addcmul(g @ W, along, d), None, None, None, None, None
