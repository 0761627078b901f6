"""A tensor that carries a reference along, and asks a rule what every function does to the pair."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves, tree_map

Rule = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]
"""What a function gives for arguments some of which are traced."""


class Traced(Tensor):
    """A value of a running model, with the value that it is compared with.

    To the model it looks like its value. Every torch function of it goes to its rule.

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
        return cls._make_subclass(cls, value.detach())._hold(value, reference, rule, kind)

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
        vars(self).update(value=value, reference=reference.detach(), rule=rule, kind=kind)
        return self

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Let the rule of the first traced argument answer."""
        first = traced((args, kwargs))
        if not first:  # while it is being made
            return super().__torch_function__(func, types, args, kwargs or {})  # type: ignore[no-untyped-call]
        with torch.enable_grad():
            return first[0].rule(func, args, kwargs or {})


def traced(nested: Any) -> list[Traced]:
    """Return the traced tensors in a nest of lists, tuples and dictionaries; None holds none."""
    found = tree_leaves(nested)
    return [leaf for leaf in found if isinstance(leaf, Traced) and "rule" in vars(leaf)]


def values(nested: Any, dtype: torch.dtype | None = None) -> Any:
    """Return the arguments with the values of what is traced; all else is constant, and at least of type ``dtype``."""
    return tree_map(lambda leaf: leaf.value if isinstance(leaf, Traced) else _constant(leaf, dtype), nested)


def references(nested: Any, dtype: torch.dtype | None = None) -> Any:
    """Return the arguments with the references of what is traced, else as :func:`values`."""
    return tree_map(lambda leaf: leaf.reference if isinstance(leaf, Traced) else _constant(leaf, dtype), nested)


def constants(nested: Any, dtype: torch.dtype | None = None) -> Any:
    """Return the arguments with the values of what is traced, free of the graph, else as :func:`values`."""
    return tree_map(lambda leaf: _constant(leaf.value if isinstance(leaf, Traced) else leaf, dtype), nested)


def _constant(leaf: Any, dtype: torch.dtype | None) -> Any:
    if not isinstance(leaf, Tensor):
        return leaf
    leaf = leaf.detach() if leaf.requires_grad else leaf
    return leaf.to(torch.promote_types(leaf.dtype, dtype)) if dtype is not None and leaf.is_floating_point() else leaf


def _offset(tensor: Tensor) -> int:
    with torch._C.DisableTorchFunctionSubclass():
        return int(tensor.storage_offset())
