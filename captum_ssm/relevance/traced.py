"""A tensor that carries a reference along, and asks a rule what every function does to the pair."""

from __future__ import annotations

from collections.abc import Callable
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor

Rule = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any], "list[Traced]"], Any]
"""What a function gives for arguments some of which are traced: those come last, once more, as a list."""


class Traced(Tensor):
    """A value of a running model, with the value that it is compared with.

    To the model it looks like its value, which answers what is asked of its form alone. Every torch function of it
    goes to its rule.

    Attributes:
        value: Part of the graph of the explanation: its gradient is the multiplier of its difference to the reference.
        reference: What it is compared with, of the same shape and without a graph.
        rule: What every function does to it.
        kind: What its function was, if a product with it asks: ``"activated"``, out of an activation, or ``"inverse"``,
            one over something, as the scale of a norm is.
    """

    value: Tensor
    reference: Tensor
    rule: Rule
    kind: str | None

    @classmethod
    def of(cls, value: Tensor, reference: Tensor, rule: Rule, kind: str | None = None) -> Traced:
        """Return the pair."""
        return cls._make_subclass(cls, value)._hold(value, reference, rule, kind)

    @classmethod
    def adopt(cls, plain: Tensor, rule: Rule, dtype: torch.dtype) -> Traced:
        """Turn a plain tensor, into which something traced is about to be written, into a pair in its place.

        If it is a part of another one, that is turned too.
        """
        base = plain._base
        if base is not None:
            whole = base if isinstance(base, Traced) else cls.adopt(base, rule, dtype)
            value, reference = (
                t.as_strided(plain.shape, plain.stride(), plain.storage_offset() - first + t.storage_offset())
                for first in [_offset(base)] for t in (whole.value, whole.reference)
            )  # fmt: skip
        else:
            value = plain.detach().to(dtype)
            reference = value.clone()
        plain.__class__ = cls
        return plain._hold(value, reference, rule, None)  # type: ignore

    def _hold(self, value: Tensor, reference: Tensor, rule: Rule, kind: str | None) -> Traced:
        reference = reference.detach() if reference.requires_grad else reference
        vars(self).update(value=value, reference=reference, rule=rule, kind=kind)
        return self

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Let the rule of the first traced argument answer."""
        live = traced((args, kwargs))
        with torch.enable_grad():
            return live[0].rule(func, args, kwargs or {}, live)


for _name in ("shape", "dtype", "device", "ndim", "dim", "size", "numel", "is_floating_point"):
    setattr(Traced, _name, property(attrgetter(f"value.{_name}")))  # of the form alone: no rule is asked


def traced(nested: Any) -> list[Traced]:
    """Return the traced tensors in a nest of lists, tuples and dictionaries."""
    if isinstance(nested, Traced):
        return [nested]
    if isinstance(nested, dict):
        nested = nested.values()
    elif not isinstance(nested, (list, tuple)):
        return []
    return [leaf for part in nested for leaf in traced(part)]


def put(nested: Any, become: Callable[[Traced], Any], dtype: torch.dtype | None = None) -> Any:
    """Return the arguments with something else in the place of what is traced.

    Args:
        nested: A nest of lists, tuples and dictionaries.
        become: What stands for a traced tensor.
        dtype: All other tensors are constants, and of at least this type.
    """
    if isinstance(nested, Traced):
        return become(nested)
    if isinstance(nested, Tensor):
        return _constant(nested, dtype)
    if isinstance(nested, tuple):
        return tuple([put(part, become, dtype) for part in nested])
    if isinstance(nested, list):
        return [put(part, become, dtype) for part in nested]
    if isinstance(nested, dict):
        return {key: put(part, become, dtype) for key, part in nested.items()}
    return nested


def values(nested: Any, dtype: torch.dtype | None = None) -> Any:
    """Return the arguments with the values of what is traced, see :func:`put`."""
    return put(nested, attrgetter("value"), dtype)


def references(nested: Any, dtype: torch.dtype | None = None) -> Any:
    """Return the arguments with the references of what is traced, see :func:`put`."""
    return put(nested, attrgetter("reference"), dtype)


def constants(nested: Any, dtype: torch.dtype | None = None) -> Any:
    """Return the arguments with the values of what is traced, free of the graph, see :func:`put`."""
    return put(nested, lambda leaf: leaf.value.detach(), dtype)


def _constant(leaf: Tensor, dtype: torch.dtype | None) -> Tensor:
    leaf = leaf.detach() if leaf.requires_grad else leaf
    if dtype is None or leaf.dtype is dtype or not leaf.is_floating_point():
        return leaf
    return leaf.to(torch.promote_types(leaf.dtype, dtype))


def _offset(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunctionSubclass():
        return int(tensor.storage_offset())
