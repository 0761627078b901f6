"""A call of a torch function, some of whose arguments are traced, and the sides of these arguments."""

from __future__ import annotations

from collections.abc import Callable
from functools import reduce
from operator import attrgetter
from typing import Any, NamedTuple

import torch
from torch import Tensor

from captum_ssm.network.lookups import TokenIds
from captum_ssm.relevance.blockwise import blockwise
from captum_ssm.relevance.difference_quotient import difference_quotient
from captum_ssm.relevance.functions import Function
from captum_ssm.relevance.traced import Traced

value_of: Callable[[Traced], Tensor] = attrgetter("value")
reference_of: Callable[[Traced], Tensor] = attrgetter("reference")


def constant_of(pair: Traced) -> Tensor:
    """Return the value without its graph."""
    return pair.value.detach()


class Call(NamedTuple):
    """One call: the function, its arguments, and which of them are traced."""

    function: Callable[..., Any]
    row: Function
    """The function's row in the table."""
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    traced: list[Traced]
    """The traced tensors among the arguments, in their order."""
    dtype: torch.dtype | None
    """The narrowest floating-point type of constants; None leaves their types."""

    @classmethod
    def of(
        cls,
        function: Callable[..., Any],
        row: Function,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        traced: list[Traced],
    ) -> Call:
        """Return the call; the constants of a linear function or a product get at least the type of the traced."""
        dtype = None
        if traced and row.kind in ("linear", "product"):
            dtype = traced[0].value.dtype if len(traced) == 1 else _widest_type(traced)
        return cls(function, row, args, kwargs, traced, dtype)

    def on(self, side: Callable[[Traced], Any]) -> Any:
        """Return the function's result on one side of all pairs.

        Args:
            side: From a traced tensor to the tensor that the function gets, such as
                :func:`value_of`.
        """
        args = [substitute(arg, side, self.dtype) for arg in self.args]
        if not self.kwargs:
            return self.function(*args)
        return self.function(*args, **substitute(self.kwargs, side, self.dtype))

    def at(self, *tensors: Tensor) -> Any:
        """Return the function's result with these tensors instead of the traced ones, in their order."""
        remaining = iter(tensors)
        return self.on(lambda _: next(remaining))

    def slope(self, x: Tensor, r: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """Return the difference quotient of an elementwise function of one traced tensor; 0 where there is no slope.

        Args:
            x: The value.
            r: The reference.
            y: The result for the value.
            z: The result for the reference.
        """
        closed_form = self.row.slope
        if closed_form is not None and self.args and isinstance(self.args[0], Traced):
            further, options = self.args[1:], self.kwargs
            slope = blockwise(lambda *tensors: _finite(closed_form(*tensors, *further, **options)), x, r, y, z)
            if slope is not None:
                return slope
        arguments = [*self.args, *self.kwargs.values()]
        others = any(isinstance(t, Tensor) and t.dim() and not isinstance(t, Traced) for t in arguments)
        return difference_quotient(self.at, x, r, y, z, of_one_tensor=not others)

    def without(self, keyword: str) -> Call:
        """Return the call without a keyword argument."""
        if keyword not in self.kwargs:
            return self
        return self._replace(kwargs={key: value for key, value in self.kwargs.items() if key != keyword})

    def with_constants(self, position: int) -> Call:
        """Return the call with the positional arguments from here on as constants."""
        traced = [arg for arg in self.args[:position] if isinstance(arg, Traced)]
        args = self.args[:position] + substitute(self.args[position:], constant_of)
        return Call.of(self.function, self.row, args, self.kwargs, traced)


def _finite(slope: Tensor | None) -> Tensor | None:
    """Return slopes with 0 where there is none; None if they have no closed form."""
    return None if slope is None else torch.nan_to_num(slope, nan=0.0, posinf=0.0, neginf=0.0)


def _widest_type(traced: list[Traced]) -> torch.dtype:
    """Return the type that holds all of these."""
    return reduce(torch.promote_types, [pair.value.dtype for pair in traced])


def substitute(nested: Any, side: Callable[[Traced], Any], dtype: torch.dtype | None = None) -> Any:
    """Return arguments with a substitute for each traced tensor, and constants without their graph.

    Args:
        nested: A nest of lists, tuples and dictionaries.
        side: From a traced tensor to its substitute, such as :func:`value_of`.
        dtype: The narrowest floating-point type of the constants, all other tensors; None leaves their types.
    """
    if isinstance(nested, Traced):
        return side(nested)
    if isinstance(nested, Tensor):
        return _constant(nested, dtype)
    if isinstance(nested, tuple):
        return tuple([substitute(part, side, dtype) for part in nested])
    if isinstance(nested, list):
        return [substitute(part, side, dtype) for part in nested]
    if isinstance(nested, dict):
        return {key: substitute(part, side, dtype) for key, part in nested.items()}
    return nested


def values(nested: Any) -> Any:
    """Return arguments with the value of each traced tensor, see :func:`substitute`."""
    return substitute(nested, value_of)


def references(nested: Any) -> Any:
    """Return arguments with the reference of each traced tensor, see :func:`substitute`."""
    return substitute(nested, reference_of)


def constants(nested: Any) -> Any:
    """Return arguments with the value of each traced tensor, without its graph, see :func:`substitute`."""
    return substitute(nested, constant_of)


def _constant(leaf: Tensor, dtype: torch.dtype | None) -> Tensor:
    if isinstance(leaf, TokenIds):
        return leaf.constant()
    leaf = leaf.detach() if leaf.requires_grad else leaf
    if dtype is None or leaf.dtype is dtype or not leaf.is_floating_point():
        return leaf
    return leaf.to(torch.promote_types(leaf.dtype, dtype.to_real()))
