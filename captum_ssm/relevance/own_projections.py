"""The projections that a mixer's own code makes, which its decomposition would make again for the value.

With a reference each projection would else take four matrix products: the own code's, the value's, the reference's, and
that of the multipliers.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from captum_ssm.layers.stand_ins import observed_parts
from captum_ssm.network.threads import hook


class _Projection(NamedTuple):
    """One call of a linear layer."""

    x: Tensor
    """(..., E)."""
    weight: Tensor
    """(D, E)."""
    bias: Tensor | None
    """(D,), or None."""
    y: Tensor
    """(..., D)."""
    versions: list[int]
    """How often each of these was written into, until the call."""

    @classmethod
    def of(cls, x: Tensor, weight: Tensor, bias: Tensor | None, y: Tensor) -> _Projection:
        """Return the call that has just given ``y``."""
        return cls(x, weight, bias, y, _versions(x, weight, bias, y))

    def rows(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> slice | None:
        """Return where the output for some rows of the weight is in ``y``; None if it is not known.

        Args:
            x: Input.
            weight: (R, E).
            bias: (R,), or None.

        Returns:
            R channels.
        """
        before = int(weight.storage_offset()) - int(self.weight.storage_offset())
        first, rest = divmod(before, max(self.weight.stride(0), 1))
        rows = slice(first, first + len(weight))
        known = _versions(*self[:4]) == self.versions and _is_same(x, self.x)
        known = known and rest == 0 <= first and rows.stop <= len(self.weight)
        known = known and _is_same(weight, self.weight[rows]) and (bias is None) == (self.bias is None)
        return rows if known and (bias is None or _is_same(bias, self.bias[rows])) else None  # type: ignore[index]


_LARGE = 2**18
"""Entries of a weight from which on a projection takes longer than to look for it."""


class OwnProjections:
    """The large projections of the mixer that ran last, by the memory of their weights."""

    def __init__(self) -> None:
        self._known: dict[int, _Projection] = {}
        self._hooks = ExitStack()

    def watch(self, mixer: nn.Module) -> None:
        """Note the projections of a mixer's own code, until :meth:`forget`.

        Not those of a mixer with parts that are more than their weights.
        """
        large = [part for part in mixer.modules() if type(part) is nn.Linear and part.weight.numel() >= _LARGE]
        if large and not observed_parts(mixer):
            for part in large:
                hook(part.register_forward_hook, self._note, self._hooks)

    def forget(self) -> None:
        """Forget all projections, and watch no mixer."""
        self._hooks.close()
        self._known.clear()

    def value(self, x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """Return ``F.linear(x, weight, bias)``, with its gradient in ``x``; None if no own code has computed it.

        Args:
            x: (..., E).
            weight: (R, E), rows of a layer's weight.
            bias: (R,), or None.

        Returns:
            (..., R).
        """
        known = self._known.get(_memory(weight)) if self._known else None
        rows = None if known is None else known.rows(x, weight, bias)
        return None if known is None or rows is None else _Rows.apply(x, weight, known.y, rows)  # type: ignore

    def _note(self, part: nn.Linear, args: tuple[Any, ...], y: Tensor) -> None:
        if type(y) is not Tensor or len(args) != 1 or y.dtype != args[0].dtype:  # a narrower type: under autocast
            return
        if not (part.weight.is_meta or part.weight.is_inference() or args[0].is_inference()):
            self._known[_memory(part.weight)] = _Projection.of(args[0].detach(), part.weight, part.bias, y.detach())


class _Rows(torch.autograd.Function):
    """Some channels ``rows`` of the output y of a projection, with the gradient of ``F.linear(x, weight)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, y: Tensor, rows: slice) -> Tensor:
        ctx.save_for_backward(weight)
        return y[..., rows].clone(memory_format=torch.contiguous_format)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (weight,) = ctx.saved_tensors
        return gradient @ weight, None, None, None


def _memory(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _versions(*tensors: Tensor | None) -> list[int]:
    return [tensor._version for tensor in tensors if tensor is not None]


def _is_same(one: Tensor, other: Tensor) -> bool:
    """Whether two tensors are the same entries in memory."""
    places = [(t.data_ptr(), t.shape, t.stride(), t.dtype) for t in (one, other)]
    return places[0] == places[1]
