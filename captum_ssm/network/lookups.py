"""Token ids that a model turns into vectors: every lookup that depends on them is found, and may give other vectors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from operator import attrgetter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_ssm.errors import UnsupportedModelError

Recipe = Callable[[Tensor], Tensor]
"""From other token ids of the same shape to the integers that the model would have made of them."""

Table = tuple[int, torch.Size]
"""Where the vectors of a table lie in memory, and its shape."""

Replacement = Callable[[Tensor, "Tensor | None", "Tensor | None"], Tensor]
"""The tensor that the model goes on with, given the vectors (n, E) that it looked up, those of the reference's ids or
None, and the number of the token (n,) that each of them belongs to, negative for none. None for the last: there is a
vector for each token at its place, (..., E) for ids of shape (...)."""


@dataclass
class Lookups:
    """The lookups of vectors that depend on the token ids of one run.

    The ids go into the model as :attr:`ids`, which look like integers to it. Integers that are made of them, such as
    hashes of neighbouring ids, are followed, and tried on other ids: a lookup whose integers change with the ids
    depends on them, and one whose integers stay, such as that of a learned position, does not, even if they equal the
    ids.

    Args:
        tokens: Token ids, (B, L) or any other shape.
        reference: The reference's ids in this shape, or None.
        replace: Called with the vectors of every lookup that depends on the ids.
        tables: The tables from which these vectors are looked up; None finds them.

    Attributes:
        found: The tables that were found.
        decisions: Names of the functions that made something of the ids, such as a mask or the position that is read,
            and would have made something else of the reference's; the run follows the input's ids.
    """

    tokens: Tensor
    reference: Tensor | None
    replace: Replacement
    tables: set[Table] | None = None
    decisions: set[str] = field(default_factory=set)
    found: set[Table] = field(default_factory=set)

    @property
    def ids(self) -> TokenIds:
        """The ids to run the model on."""
        reference = None if self.reference is None else self.reference.clone()
        return TokenIds.of(self.tokens.clone(), reference, self, _unchanged)

    def __call__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the result of a function some of whose arguments are made of the ids.

        Raises:
            UnsupportedModelError: If it cannot be followed which token each number comes from.
        """
        if isinstance(function, torch.ScriptMethod):
            raise UnsupportedModelError(
                "A traced or scripted module takes the token ids, so their vectors cannot be followed. Pass the model "
                "that it was made of."
            )
        if _is_in_place(function, kwargs):
            return self._in_place(function, args, kwargs)
        if function.__name__ == "embedding_bag" and (summed := _summed_bag(*args, **kwargs)) is not None:
            return summed
        value = function(*_values(args), **_values(kwargs))
        reference = self._of_reference(function, args, kwargs)
        of_ids = _recipe((args, kwargs))

        def recipe(ids: Tensor) -> Any:
            args, kwargs = of_ids(ids)
            return function(*args, **kwargs)

        if isinstance(value, (tuple, list)) and any(isinstance(part, Tensor) for part in value):
            others = reference if reference is not None else [None] * len(value)
            parts = (
                self._result(function, args, part, other, lambda ids, k=k: recipe(ids)[k])  # type: ignore[misc]
                for k, (part, other) in enumerate(zip(value, others))
            )
            return type(value)(parts) if type(value) in (tuple, list) else type(value)(tuple(parts))
        return self._result(function, args, value, reference, recipe)

    def _of_reference(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Return the function's result for the reference's ids; None if there are none, or it cannot be computed."""
        if self.reference is None:
            return None
        try:
            return function(*_references(args), **_references(kwargs))
        except (RuntimeError, IndexError, ValueError, TypeError):
            return None

    def _result(self, function: Callable[..., Any], args: Any, value: Any, reference: Any, recipe: Recipe) -> Any:
        """Return one result: integers that are followed, vectors that may be replaced, or a constant."""
        if not isinstance(value, Tensor):
            return self._decision(function, value, reference)
        if isinstance(reference, Tensor) and reference.shape != value.shape:
            reference = None
        made_of = [leaf for leaf in _leaves(args) if isinstance(leaf, TokenIds)]
        is_mask = value.dtype == torch.bool or all(integers.is_mask for integers in made_of)
        if not value.is_floating_point():
            return TokenIds.of(value, reference, self, recipe, is_mask)
        if any(isinstance(arg, Tensor) and arg.is_floating_point() for arg in args):
            return self._looked_up(function, args, value, reference)
        if self.reference is not None and not _same(value, reference):
            if not is_mask:
                raise _cannot_follow(function, value)
            self.decisions.add(function.__name__.strip("_"))
        return value

    def _looked_up(self, function: Callable[..., Any], args: Any, value: Tensor, reference: Tensor | None) -> Tensor:
        """Return the vectors of a lookup, replaced if they depend on the ids; refuse vectors of unknown tokens."""
        indices = next(leaf for leaf in _leaves(args) if isinstance(leaf, TokenIds))
        vectors = next(arg for arg in args if isinstance(arg, Tensor) and arg.is_floating_point())
        table = (vectors.data_ptr(), vectors.shape)
        if self.tables is not None and table not in self.tables:
            return value
        count, width = indices.value.numel(), value.shape[-1]
        sources = self._sources(indices) if value.numel() == count * width else None
        if sources is None:
            raise _cannot_follow(function, value)
        depends = sources != _NONE
        if not bool(depends.any()):
            return value
        self.found.add(table)
        own = torch.arange(self.tokens.numel(), device=sources.device)
        if torch.equal(sources, own):
            shape = (*self.tokens.shape, width)
            others = None if reference is None else reference.reshape(shape)
            return self.replace(value.reshape(shape), others, None).reshape(value.shape)
        others = None if reference is None else reference.reshape(count, width)
        return self.replace(value.reshape(count, width), others, sources).reshape(value.shape)

    def _sources(self, indices: TokenIds) -> Tensor | None:
        """Return the token that each of the integers depends on.

        Half of the tokens are exchanged at a time, those whose number has, or has not, a certain bit: an integer that
        changes with just those halves that have a token depends on this token.

        Args:
            indices: n integers that are made of the ids, in any shape.

        Returns:
            Numbers of tokens (n,), among all of a batch; an integer at the place of a token has this one, if it is
            among several; :data:`_NONE` if there is none. None if they are unknown.
        """
        n, count, device = indices.value.numel(), self.tokens.numel(), self.tokens.device
        token = torch.arange(count, device=device)
        if indices.recipe is _unchanged:
            return token
        source = torch.zeros(n, dtype=torch.long, device=device)
        depends = source.bool()
        own, one = torch.full_like(depends, n == count), ~depends
        for bit in range(max(1, (count - 1).bit_length())):
            has_bit = (token >> bit & 1).bool()
            without, with_bit = (self._changed(indices, half) for half in (~has_bit, has_bit))
            if n == count:
                own = own & torch.where(has_bit, with_bit, without)
            one = one & (with_bit ^ without)
            source = source | (with_bit.long() << bit)
            depends = depends | with_bit | without
        if not bool((own | one | ~depends).all()):
            return None
        source = torch.where(own, token, source) if n == count else source
        return source.masked_fill(~depends, _NONE)

    def _changed(self, indices: TokenIds, half: Tensor) -> Tensor:
        """Return which integers (n,) change if some of the tokens, those in ``half``, are exchanged for others.

        Several exchanges are tried, as two changes may cancel in a hash, and that for the reference's ids. Integers
        that cannot be made of the others, or are then of another number, depend on all tokens.
        """
        changed, half = torch.zeros_like(indices.value, dtype=torch.bool), half.reshape(self.tokens.shape)
        for others in [*_exchanged(self.tokens), *([] if self.reference is None else [self.reference])]:
            try:
                changed |= indices.recipe(torch.where(half, others, self.tokens)) != indices.value
            except (RuntimeError, IndexError, ValueError, TypeError):
                return torch.ones_like(changed).flatten()
        return changed.flatten()

    def _in_place(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Write into integers, which are followed from then on; refuse to write into anything else."""
        target = args[0]
        if "out" in kwargs or not isinstance(target, Tensor) or target.is_floating_point() or target._is_view():
            raise _cannot_follow(function, target)
        of_ids = _recipe((target if isinstance(target, TokenIds) else target.clone(), args[1:], kwargs))
        if not isinstance(target, TokenIds):
            before = target.clone()
            target.__class__ = TokenIds
            target.hold(before, before.clone(), self, _unchanged)  # type: ignore[attr-defined]
        function(*_values(args), **_values(kwargs))
        self._of_reference(function, args, kwargs)

        def recipe(ids: Tensor) -> Tensor:
            before, args, kwargs = of_ids(ids)
            written: Tensor = before.clone()
            function(written, *args, **kwargs)
            return written

        return target.hold(target.value, target.reference, self, recipe)  # type: ignore[attr-defined]

    def _decision(self, function: Callable[..., Any], value: Any, reference: Any) -> Any:
        """Return a result that is no tensor, noted if the reference's ids would give another; refuse another list."""
        if self.reference is not None and isinstance(value, (bool, int, float, list)) and value != reference:
            if isinstance(value, list):
                raise _cannot_follow(function, value)
            self.decisions.add(function.__name__.strip("_"))
        return value


_NONE = -1
"""The source of an integer that depends on no token."""


class TokenIds(Tensor):
    """Integers that are made of token ids, with those of the reference's ids beside them.

    Attributes:
        value: The integers.
        reference: Those that the reference's ids would give; None if there are none.
        lookups: Computes the result of every function.
        recipe: Computes the integers for other ids.
        is_mask: Whether they are truth values, or made of nothing but truth values.
    """

    value: Tensor
    reference: Tensor | None
    lookups: Lookups
    recipe: Recipe
    is_mask: bool

    @classmethod
    def of(
        cls, value: Tensor, reference: Tensor | None, lookups: Lookups, recipe: Recipe, is_mask: bool = False
    ) -> TokenIds:
        """Return the integers of an input and of its reference as one tensor."""
        return cls._make_subclass(cls, value).hold(value, reference, lookups, recipe, is_mask)

    def hold(
        self, value: Tensor, reference: Tensor | None, lookups: Lookups, recipe: Recipe, is_mask: bool = False
    ) -> TokenIds:
        """Become these integers, see the attributes, and return them."""
        vars(self).update(value=value, reference=reference, lookups=lookups, recipe=recipe, is_mask=is_mask)
        return self

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Let the lookups compute the result; beside a tensor of another class the ids are constants."""
        if any(kind not in (cls, Tensor, nn.Parameter) for kind in types):
            return NotImplemented
        ids = next(leaf for leaf in _leaves((args, kwargs)) if isinstance(leaf, TokenIds))
        return ids.lookups(func, args, kwargs or {})

    def constant(self) -> Tensor:
        """Return the integers as a constant of the input, noted if the reference's ids would give others."""
        if self.lookups.reference is not None and not _same(self.value, self.reference):
            self.lookups.decisions.add("token ids")
        return self.value


def _unchanged(ids: Tensor) -> Tensor:
    """Return the ids: the recipe of the ids themselves."""
    return ids


def _exchanged(ids: Tensor) -> list[Tensor]:
    """Return variants of ids: each text has other ids of its own, whichever texts are beside it."""
    texts = [_exchanged_text(text) for text in ids.reshape(len(ids), -1)]
    count = max(map(len, texts))
    return [torch.stack([variants[k % len(variants)] for variants in texts]).reshape(ids.shape) for k in range(count)]


def _exchanged_text(ids: Tensor) -> list[Tensor]:
    """Return variants of a text (L,), with another of its ids at every token, or a neighbour of a single id."""
    known = ids.unique()
    if len(known) == 1:
        return [torch.where(ids > 0, ids - 1, ids + 1)]
    rank = torch.searchsorted(known, ids.contiguous())
    return [known[(rank + shift) % len(known)] for shift in range(1, min(len(known), _EXCHANGES + 1))]


_EXCHANGES = 4
"""How many variants of the ids are tried."""


def _is_in_place(function: Callable[..., Any], kwargs: dict[str, Any]) -> bool:
    """Whether a function writes into one of its arguments."""
    name = function.__name__
    writes = (name.endswith("_") and not name.endswith("__")) or name == "__setitem__" or name in _IN_PLACE_OPERATORS
    return writes or kwargs.get("out") is not None


_IN_PLACE_OPERATORS = {
    f"__i{name}__" for name in ("add", "sub", "mul", "floordiv", "mod", "and", "or", "xor", "lshift", "rshift", "pow")
}


def _summed_bag(ids: Any, weight: Tensor, offsets: Any = None, *args: Any, **kwargs: Any) -> Tensor | None:
    """Return the bags (B, E) of ids (B, L) as a sum or mean of a lookup; None if they are not that simple."""
    names = ("max_norm", "norm_type", "scale_grad_by_freq", "mode", "sparse", "per_sample_weights")
    options = {"offsets": offsets, **dict(zip(names, args)), **kwargs}
    others = any(options.get(name) is not None for name in ("offsets", "max_norm", "per_sample_weights", "padding_idx"))
    mode = options.get("mode", "mean")
    if others or ids.dim() != 2 or mode not in ("sum", "mean"):
        return None
    vectors = F.embedding(ids, weight)
    return vectors.sum(1) if mode == "sum" else vectors.mean(1)


def _cannot_follow(function: Callable[..., Any], result: Any) -> UnsupportedModelError:
    """Return the error for a function that makes something of the token ids which cannot be followed."""
    made = f"a tensor of shape {tuple(result.shape)}" if isinstance(result, Tensor) else f"a {type(result).__name__}"
    return UnsupportedModelError(
        f"The function {function.__name__!r} makes {made} of the token ids, and it cannot be followed which token each "
        "number in it comes from, as if tokens were counted, or several texts stacked in one batch. Let forward_func "
        "take embeddings, and explain them instead of the ids, with embeddings as their baselines."
    )


def _same(value: Any, reference: Any) -> bool:
    return isinstance(value, Tensor) and isinstance(reference, Tensor) and torch.equal(value, reference)


def _substituted(nested: Any, side: Callable[[TokenIds], Any]) -> Any:
    """Return arguments, a nest of lists, tuples and dictionaries, with a substitute for each :class:`TokenIds`."""
    if isinstance(nested, TokenIds):
        return side(nested)
    if isinstance(nested, (tuple, list)) and not isinstance(nested, torch.Size):
        return type(nested)([_substituted(part, side) for part in nested])
    if isinstance(nested, dict):
        return {key: _substituted(part, side) for key, part in nested.items()}
    return nested


def _values(nested: Any) -> Any:
    return _substituted(nested, attrgetter("value"))


def _references(nested: Any) -> Any:
    return _substituted(nested, attrgetter("reference"))


def _recipe(nested: Any) -> Callable[[Tensor], Any]:
    """Return a function from other ids to the arguments, with the integers as they are now and not as written later."""
    held = _substituted(nested, lambda i: TokenIds.of(i.value, i.reference, i.lookups, i.recipe, i.is_mask))
    return lambda ids: _substituted(held, lambda integers: integers.recipe(ids))


def _leaves(nested: Any) -> Iterator[Any]:
    """Yield the members of a nest of lists, tuples and dictionaries."""
    if isinstance(nested, (tuple, list)):
        for part in nested:
            yield from _leaves(part)
    elif isinstance(nested, dict):
        yield from _leaves(list(nested.values()))
    else:
        yield nested
