"""A tensor that carries a reference, and lets a rule compute the result of every function of the pair."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

from captum_ssm.errors import UnsupportedModelError
from captum_ssm.relevance.functions import FUNCTIONS, Origin

Handler = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any], "list[Traced]"], Any]
"""The result of a function for its positional and keyword arguments, given also the list of those that are traced."""


class Traced(Tensor):
    """A value of a running model with the reference that it is compared with.

    To the model it looks like its value, which answers questions about shape and type. Every torch function of it goes
    to its rule. An operation that reaches it past torch's functions, as from a scripted function or vmap, is refused;
    and it has no data of its own, so that a kernel which reads its memory meets an error and not the value.

    Attributes:
        value: Part of the graph of the explanation: its gradient is the multiplier of its difference to the reference.
        reference: The reference, of the same shape and without a graph.
        rule: The rule, which computes the result of every function.
        origin: ``"activated"`` if the value came out of an activation, ``"inverse"`` if it is one over something, as
            the scale of a norm is; None otherwise. A product reads it.
    """

    value: Tensor
    reference: Tensor
    rule: Handler
    origin: Origin | None

    @classmethod
    def of(cls, value: Tensor, reference: Tensor, rule: Handler, origin: Origin | None = None) -> Traced:
        """Return the pair of a value and a reference."""
        outside = cls._make_wrapper_subclass(
            cls, value.shape, strides=value.stride(), dtype=value.dtype, device=value.device
        )
        return outside._hold(value, reference, rule, origin)

    @classmethod
    def adopt(cls, plain: Tensor, rule: Handler, dtype: torch.dtype) -> Traced:
        """Turn a plain tensor, into which something traced is about to be written, into a pair without copying it.

        If the tensor is a view, its base becomes a pair too.

        Args:
            plain: The tensor, which is changed.
            rule: The pair's rule.
            dtype: The type of the pair's value and reference; of a complex tensor, the complex type of its size.

        Returns:
            The same tensor, whose value and reference are its present entries.
        """
        base = plain._base
        if base is not None:
            pair = base if isinstance(base, Traced) else cls.adopt(base, rule, dtype)
            sides = [_numbers_like(plain, t) for t in (pair.value, pair.reference)]
            first = _offset(base) * pair.value.element_size() // sides[0].element_size()
            value, reference = (
                t.as_strided(plain.shape, plain.stride(), plain.storage_offset() - first + t.storage_offset())
                for t in sides
            )
        else:
            value = plain.detach().to(dtype.to_complex() if plain.is_complex() else dtype.to_real())
            reference = value.clone()
        plain.__class__ = cls
        return plain._hold(value, reference, rule, None)  # type: ignore

    def _hold(self, value: Tensor, reference: Tensor, rule: Handler, origin: Origin | None) -> Traced:
        reference = reference.detach() if reference.requires_grad else reference
        vars(self).update(value=value, reference=reference, rule=rule, origin=origin)
        return self

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Let the rule of the first traced argument compute the result."""
        pairs = traced((args, kwargs))
        with torch.enable_grad():
            return pairs[0].rule(func, args, kwargs or {}, pairs)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Refuse an operation that no function of torch announced.

        Raises:
            UnsupportedModelError: Always.
        """
        error = _escape(f"called {func} on the tokens")
        for pair in traced((args, kwargs)):
            vars(pair.rule).update(escape=error)
        raise error


for _row in FUNCTIONS:
    if _row.kind == "form":  # answered by the value, without the cost of a call of the rule
        setattr(Traced, _row.name, property(attrgetter(f"value.{_row.name}")))


def refused_access(error: Exception) -> UnsupportedModelError | None:
    """Return the error of code that reads the memory of a traced tensor, which has none; None for other errors."""
    return _escape("reads the memory of the tokens") if any(part in str(error) for part in _NO_DATA) else None


_NO_DATA = ("its data is not allocated yet", "an invalid python storage", "doesn't have storage")
"""Parts of torch's messages about a tensor without memory."""


def _escape(happened: str) -> UnsupportedModelError:
    return UnsupportedModelError(
        f"Code past torch's functions, such as a scripted or traced function, vmap or a kernel, {happened}, which "
        "cannot be followed there. Let the model run it as functions of torch."
    )


def traced(nested: Any) -> list[Traced]:
    """Return the traced tensors in a nest of lists, tuples and dictionaries."""
    if isinstance(nested, Traced):
        return [nested]
    if isinstance(nested, dict):
        nested = nested.values()
    elif not isinstance(nested, (list, tuple)):
        return []
    return [leaf for part in nested for leaf in traced(part)]


def _numbers_like(plain: Tensor, t: Tensor) -> Tensor:
    """Return a tensor, or its real and imaginary parts, or the numbers of which it has the parts, as ``plain`` has."""
    if t.is_complex() == plain.is_complex():
        return t
    return torch.view_as_real(t) if t.is_complex() else torch.view_as_complex(t.view(-1, 2))


def _offset(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunctionSubclass():
        return int(tensor.storage_offset())
