"""What a part of a layer does to its input, measured by running it: its value, its bias, its matrix.

A part that stands in for a plain weight, see :mod:`captum_ssm.layers.stand_ins`, is a projection like any other, but no
parameter holds its matrix. It runs in its own type; a part without quantised weights runs in the type of its input.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor, nn

from captum_ssm.errors import UnsupportedModelError
from captum_ssm.layers.isolated import InOwnType, isolated_part
from captum_ssm.layers.stand_ins import is_packed, noted_sizes
from captum_ssm.operators import Projection

Rows = Callable[[Tensor], Tensor]
"""From the rows of a weight or a bias to those that a factor takes: a slice, an order, a repetition."""

_LINEAR = 1e-3
"""Largest difference, relative to the largest output, that counts as rounding of a linear map."""


class MeasuredPart:
    """A part of a layer as an affine map of each token, ``x -> W x + bias``.

    Args:
        name: Its dotted name in the layer.
        module: The part.
        like: A tensor of the type and on the device of W and the bias.
        sizes: Output and input channels; None for those of its call.
    """

    def __init__(self, name: str, module: nn.Module, like: Tensor, sizes: tuple[int, int] | None = None) -> None:
        self.name, self.module, self._sizes = name, module, sizes
        self.is_packed = is_packed(module)
        self._like = torch.empty(0, dtype=like.dtype, device=like.device)
        self._last: list[tuple[Tensor, Tensor]] = []
        self._is_checked = self.is_packed  # a quantised part stands for its W, and the layer's error tells the rest

    def __call__(self, x: Tensor) -> Tensor:
        """Return the part's output (..., L, D) for ``x`` (..., L, E), plain or followed; the last ones are kept."""
        for other, y in self._last:
            if other is x:
                return y
        if type(x) is not Tensor:  # each function of it is followed
            y = self.module(x)
        elif self.is_packed:
            y = torch.nn.functional.linear(x, self.matrix, self.bias)
        else:
            y = self._wide(x)
            self._check(x, y)
        self._last = [*self._last[-1:], (x, y)]
        return y

    @cached_property
    def sizes(self) -> tuple[int, int]:
        """Output and input channels: those of its call; of a part whose call was not noted, as it or one within tells.

        Raises:
            KeyError: If nothing tells them.
        """
        noted = self._sizes or noted_sizes(self.name)
        if noted is not None:
            return noted
        for module in self.module.modules():
            told = getattr(module, "out_features", None), getattr(module, "in_features", None)
            if isinstance(told[0], int) and isinstance(told[1], int):
                return told[0], told[1]
        raise KeyError(f"{self.name}.weight")

    def like(self, tensor: Tensor) -> Tensor:
        """Return a tensor in the type and on the device of W."""
        return tensor.to(self._like.device, self._like.dtype)

    @cached_property
    def bias(self) -> Tensor | None:
        """The output for 0, (D,); None if that is 0. Cost: one token."""
        constant: Tensor = self._wide(self._like.new_zeros(1, 1, self.sizes[1]))[0, 0]
        return constant if bool((constant != 0).any()) else None

    @cached_property
    def matrix(self) -> Tensor:
        """W (D, E): the outputs for the unit vectors, less the bias. Cost: E tokens."""
        unit = torch.eye(self.sizes[1], dtype=self._like.dtype, device=self._like.device)
        columns: Tensor = self._wide(unit.unsqueeze(0))[0]  # (E, D)
        return (columns if self.bias is None else columns - self.bias).T

    def taps(self) -> tuple[Tensor, Tensor | None]:
        """Return the taps (D, 1, K) and the bias (D,) of a part that convolves each channel: its outputs for impulses.

        Raises:
            KeyError: If no convolution is within the part.
        """
        own = next((m for m in self.module.modules() if isinstance(m, nn.Conv1d)), None)
        if own is None or type(own).forward is not nn.Conv1d.forward:  # a package's own may order its axes otherwise
            raise KeyError(f"{self.name}.weight")
        K, D = own.kernel_size[0], own.in_channels
        padding = (K - 1) // 2 if isinstance(own.padding, str) else own.padding[0]
        impulse = self._like.new_zeros(1, D, 2 * K - 1)
        constant: Tensor = self._wide(impulse)
        impulse[..., K - 1] = 1
        answer = self._wide(impulse) - constant  # the last tap comes first
        bias = constant[0, :, 0]
        return answer[0, :, padding : padding + K].flip(1).unsqueeze(1), bias if bool((bias != 0).any()) else None

    @cached_property
    def _wide(self) -> Callable[[Tensor], Tensor]:
        """The part for plain tensors: a quantised one in its own type, any other in the type of W."""
        if self.is_packed:
            return InOwnType(self.module)
        types = {p.dtype for p in self.module.parameters() if p.is_floating_point()}
        return self.module if types <= {self._like.dtype} else isolated_part(self.module, self._like)

    def _check(self, x: Tensor, y: Tensor) -> None:
        """Raise once if the part is not affine in each token: ``f(z - 2x) = f(z) - 2 f(x) + 2 f(0)``, z the flip of x.

        Raises:
            UnsupportedModelError: With the remedy.
        """
        if self._is_checked or x.dim() < 2:
            return
        self._is_checked = True
        with torch.no_grad():
            mixed = self._wide(x.flip(-2) - 2 * x)
            expected = y.flip(-2) - 2 * y + (0 if self.bias is None else 2 * self.bias)
            error = (mixed - expected).abs().max()
            if not bool(error <= _LINEAR * expected.abs().max()):
                raise UnsupportedModelError(
                    f"The part '{self.name}' ({type(self.module).__name__}) of a layer is no linear map of each token, "
                    "as a projection is: it has a hook, a parametrization or an adapter that is not. So the layer has "
                    "no matrices. Remove what makes it so, or use ImplicitAttentionRelevance, which follows functions."
                )


class MeasuredProjection(Projection):
    """The projection that a part of a layer makes, or some rows of it: ``y = W x + bias``.

    Args:
        part: The part.
        rows: From the rows of W and bias to those of the projection; None for all.
        has_bias: Whether the bias counts.
    """

    _part: MeasuredPart
    _rows: Rows | None
    _has_bias: bool

    def __init__(self, part: MeasuredPart, rows: Rows | None = None, has_bias: bool = True) -> None:
        vars(self).update(_part=part, _rows=rows, _has_bias=has_bias)  # frozen, as all operators are

    @cached_property
    def W(self) -> Tensor:  # noqa: N802
        """(output channels, input channels). Cost: the part runs for each unit vector, once."""
        return self._select(self._part.matrix)

    @cached_property
    def bias(self) -> Tensor | None:
        """(output channels,) or None. Cost: the part runs for one token, once."""
        return None if not self._has_bias or self._part.bias is None else self._select(self._part.bias)

    def apply(self, x: Tensor, bias: bool = False) -> Tensor:
        """Return ``W x`` for every token, by running the part. Cost: one run of it, shared between its projections."""
        y = self._part(x)
        if self._rows is not None:
            y = self._rows(y.movedim(-1, 0)).movedim(0, -1)
        if bias and self._has_bias:
            return y
        constant = self._part.bias
        return y if constant is None else y - self._select(constant)

    def without(self, *terms: str) -> MeasuredProjection:
        """Return the projection without its bias, if that is named."""
        super().without(*[term for term in terms if term not in self.terms])
        return MeasuredProjection(self._part, self._rows, has_bias=False) if terms else self

    @cached_property
    def sizes(self) -> tuple[int, int]:
        """Output and input channels."""
        D, E = self._part.sizes
        return len(self._select(torch.empty(D, device="meta"))), E

    def _select(self, t: Tensor) -> Tensor:
        return t if self._rows is None else self._rows(t)
