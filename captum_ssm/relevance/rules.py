"""The two rules of relevance: what every function does to a value and what it is compared with.

Each rule gives every function a linear form whose coefficients are constants of this input, so that for every tensor
of the model ``value - reference = sum of multiplier * (input - input's reference)``. The multipliers are the gradient
that autograd then finds; that the sum is right holds for each function, and so for the model.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache, reduce
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from captum_ssm.errors import UnsupportedModelError
from captum_ssm.operators import Recurrence
from captum_ssm.relevance.functions import ALIASES, CASTS, KINDS, LIKE
from captum_ssm.relevance.quotient import quotient
from captum_ssm.relevance.recurrence import difference_of_scans, linear_scan
from captum_ssm.relevance.slopes import SLOPES
from captum_ssm.relevance.traced import Traced, constants, put, references, values

GateRule = Literal["half", "value"]
"""Who gets the relevance of a product with a gate: both factors half of it, or the value all."""

VALUE_SHARE = 0.75
"""Of what a value and the gate that reads it change together, the part that is the value's: what
``benchmarks/RESULTS.md`` recommends."""

_INVERSES = {"rsqrt", "reciprocal"}


class Rule(ABC):
    """What every function does to what is traced.

    Attributes:
        held: Names of the functions that decide something, such as which experts a token is sent to, and would have
            decided otherwise for the reference; the reference follows the input's decision.
    """

    def __init__(self) -> None:
        self.held: set[str] = set()
        self._made: dict[Any, Any] | None = None
        self._last: tuple[Any, Tensor, Tensor] | None = None

    @contextmanager
    def sharing(self, shared: bool = True) -> Iterator[None]:
        """Run once, while the context is open, what of a layer's operators runs twice on the same.

        An adapter runs some of them for its gates, and its chain all of them. Not if what enters one is asked for, or
        passes it apart: then ``shared`` is False.
        """
        self._made = {} if shared else None
        try:
            yield
        finally:
            self._made = self._last = None

    @abstractmethod
    def elementwise(self, function: _OfOne, x: Traced, kind: str) -> Tensor:
        """Return a function of each entry, ``kind`` as in :class:`Traced`."""

    @abstractmethod
    def product(self, function: Callable[[Tensor, Tensor], Tensor], x: Traced, y: Traced) -> Tensor:
        """Return a function that is linear in each of two traced arguments."""

    @abstractmethod
    def recur(self, scan: Recurrence, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        """Return the output of a recurrence for ``x`` (B, L, H, P), either of which, or both, may be traced."""

    def upper_bound(self, x: Traced) -> Tensor:
        """Return a constant at or above the value and the reference."""
        return torch.maximum(x.value.detach(), x.reference)

    def secant(self, name: str, u: Traced) -> Tensor:
        """Return the gate that an activation puts on its own input."""
        function: Callable[..., Tensor] = KINDS["secant"]  # type: ignore[assignment]
        return function(name, u)

    def __call__(
        self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], live: list[Traced]
    ) -> Any:
        """Return what ``func`` gives for these arguments, of which ``live`` are traced."""
        own, name, is_property, in_place = _called(func)
        if is_property:
            return self._linear(func, args, kwargs, live) if KINDS.get(name) else func(*values(args))
        if own in _MARKS:
            return args[0]
        if own in _OUTSIDE:
            raise _unknown(func, "what leaves torch cannot be followed")
        if name == "recur":
            return self._once(*args)
        if name in ("secant", "upper_bound"):
            return getattr(self, name)(*args)
        if self._made is not None and name in _OPERATORS and not in_place and not kwargs:
            if (func, args) not in self._made:
                self._made[func, args] = self._apply(func, name, args, kwargs, live)
            return self._made[func, args]
        if in_place:
            self._forget()
            return self._in_place(func, name, args, kwargs, live)
        if name in LIKE and len(args) > 1:
            args = (args[0], *constants(args[1:]))
            if not isinstance(args[0], Traced):
                return func(*args, **kwargs)
            live = [args[0]]
        if name in CASTS:
            return self._cast(func, args, kwargs)
        return self._apply(func, name, args, kwargs, live)

    def _forget(self) -> None:
        """Share nothing that was made before: it is about to be written into, or what it was made of."""
        if self._made is not None:
            self._made, self._last = {}, None

    def _once(self, scan: Recurrence, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        """Run a recurrence, unless it was the last that ran, and on the same: norms make adapters run it before."""
        if self._made is not None and self._last is not None:
            last, its_x, y = self._last
            same = len(last) == len(factors) and all(f is g for f, g in zip(last, factors))
            if same and its_x.shape == x.shape and torch.equal(values(its_x), values(x)):
                return y
        y = self.recur(scan, x, factors)
        self._last = (factors, x, y)
        return y

    def _apply(
        self,
        func: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        live: list[Traced],
    ) -> Any:
        kind = KINDS.get(name)
        if callable(kind):
            try:
                return kind(*args, **kwargs)
            except (NotImplementedError, TypeError) as error:
                raise _unknown(func, str(error)) from error
        if kind == "linear" or (kind == "product" and len(live) == 1):
            return self._linear(func, args, kwargs, live)
        if name == "linear":  # by a weight that depends on the input
            return _linear_with_bias(*args, **kwargs)
        if kind == "product" and len(live) == 2 and not name.startswith("conv"):
            return self.product(_OfTwo(func, args, kwargs, _type(live)), *live)
        if kind == "elementwise" and len(live) == 1:
            made = "inverse" if name in _INVERSES else "activated"
            others = {key: value for key, value in kwargs.items() if key != "inplace"}
            found = self.elementwise(_OfOne(func, name, args, others), live[0], made)
            if kwargs.get("inplace"):
                self._forget()
                vars(live[0]).update(value=values(found), reference=references(found))
            return found
        if kind == "constant":
            return func(*constants(args), **constants(kwargs))
        return self._decide(func, name, args, kwargs)

    def _linear(self, func: Callable[..., Any], args: Any, kwargs: Any, live: list[Traced]) -> Any:
        value, reference = _of_both(func, args, kwargs, _type(live))
        kept = len(live) == 1 and func.__name__ not in _CONTRACTIONS
        return self.pair(value, reference, live[0].kind if kept else None)

    def pair(self, value: Any, reference: Any, kind: str | None = None) -> Any:
        """Return tensors, or sequences of them, as traced ones."""
        if isinstance(value, Tensor):
            return Traced.of(value, reference, self, kind) if value.is_floating_point() else value
        if isinstance(value, (list, tuple)):
            return tuple(self.pair(v, r, kind) for v, r in zip(value, reference))
        return value

    def _in_place(
        self,
        func: Callable[..., Any],
        name: str,
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        live: list[Traced],
    ) -> Any:
        target = args[0]
        if not isinstance(target, Traced):
            target = Traced.adopt(target, self, live[0].value.dtype)
            live = [target, *live]
        if KINDS.get(name) == "linear":
            _of_both(func, args, kwargs, target.value.dtype)
            return target
        changed = self._apply(getattr(torch.Tensor, name), name, args, kwargs, live)
        target.value.copy_(values(changed))
        target.reference.copy_(references(changed))
        return target

    def _cast(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Change the type, but to none that is narrower: the explanation is of the function, not of its rounding."""
        x = args[0]
        value = func(*values(args), **values(kwargs))
        if not isinstance(value, Tensor):
            return value
        if not value.is_floating_point():
            return self._decide(func, "cast", args, kwargs)
        if torch.promote_types(value.dtype, x.value.dtype) != value.dtype:
            return x
        return self.pair(value, func(*references(args), **references(kwargs)), x.kind)

    def _decide(self, func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return what a function decides for the input; note it if it would decide otherwise for the reference."""
        chosen = func(*constants(args), **constants(kwargs))
        if isinstance(chosen, tuple) and len(chosen) == 2 and not _is_float(chosen[1]) and name in _SELECTIONS:
            return self._select(func, name, chosen, args, kwargs)
        if _is_float(chosen) or (isinstance(chosen, (list, tuple)) and any(map(_is_float, chosen))):
            raise _unknown(func, "")
        self._note(name, chosen, func(*references(args), **references(kwargs)))
        return chosen

    def _select(self, func: Callable[..., Any], name: str, chosen: Any, args: Any, kwargs: Any) -> Any:
        """Return the entries that ``topk``, ``sort`` or ``max`` choose, and their numbers, chosen by the input."""
        x, numbers = args[0], chosen[1]
        dim = kwargs.get("dim", args[_SELECTIONS[name]] if len(args) > _SELECTIONS[name] else -1)
        whole = numbers.dim() == x.dim()
        index = numbers if whole else numbers.unsqueeze(dim)
        entries = x.gather(dim, index)
        self._note(name, numbers, func(*references(args), **references(kwargs))[1])
        return type(chosen)((entries if whole else entries.squeeze(dim), numbers))

    def _note(self, name: str, chosen: Any, other: Any) -> None:
        same = torch.equal(chosen, other) if isinstance(chosen, Tensor) else chosen == other
        if not same:
            self.held.add(name)


class _Called(NamedTuple):
    """What a function is called."""

    own: str
    """Its own name, or its property's."""
    name: str
    """The name that its kind is known by."""
    is_property: bool
    in_place: bool


@lru_cache
def _called(func: Callable[..., Any]) -> _Called:
    """Read what a function is called off its name."""
    own = func.__name__
    if own == "__get__":  # of a property, such as the transpose
        name = func.__self__.__name__  # type: ignore[attr-defined]
        return _Called(name, name, is_property=True, in_place=False)
    core = own.strip("_")
    in_place = core in _ASSIGNMENTS or (own.endswith("_") and not own.endswith("__"))
    return _Called(own, ALIASES.get(core, core), is_property=False, in_place=in_place)


_ASSIGNMENTS = {"iadd", "isub", "imul", "idiv", "itruediv", "ipow", "setitem"}
"""Operators of Python that write into their first argument."""

_MARKS = {"requires_grad_", "retain_grad"}
"""Functions that say something about the graph, which is the rule's affair."""

_OUTSIDE = {"data_ptr", "numpy", "__array__", "__dlpack__", "__set__", "backward", "register_hook"}
"""Functions that take a tensor out of what a rule sees, such as a kernel that reads its memory."""

_CONTRACTIONS = {"linear", "matmul", "__matmul__", "einsum", "conv1d", "sum", "mean", "bmm", "mm", "_grouped_mm"}
"""Functions whose result is no longer what their argument was."""

_OPERATORS = {"linear", "causal_convolution", "add", "mul"}
"""Functions that the operators of a chain are made of, besides recurrences."""

_SELECTIONS = {"topk": 2, "sort": 1, "max": 1, "min": 1, "median": 1, "kthvalue": 2}
"""Functions that give entries and their numbers, with the position of the argument that is the axis."""


class Difference(Rule):
    """Compare with a reference: at a product each factor's change times a mean of the other.

    ``ab - a'b' = (p b + q b') (a - a') + (q a + p a') (b - b')`` with ``p + q = 1``: of what the two change together,
    ``(a - a') (b - b')``, p goes to a and q to b. A half each is the Shapley value of two factors. At a function of
    each entry the multiplier is the difference quotient ``(f(x) - f(x')) / (x - x')``, DeepLIFT's rescale rule.

    Args:
        value_share: p of a value in a product with what reads it: with a gate that came out of an activation, with one
            over something, and of a recurrence's state with the coefficient ``c``. All other products share by halves.
    """

    def __init__(self, value_share: float = VALUE_SHARE) -> None:
        super().__init__()
        self.value_share = value_share

    def elementwise(self, function: _OfOne, x: Traced, kind: str) -> Tensor:
        """Return the function with the difference quotient as its multiplier."""
        value, reference = x.value.detach(), x.reference
        y, z = function(value), function(reference)
        return self.pair(_linear_form(x.value, y, function.slope(value, reference, y, z)), z, kind)

    def product(self, function: Callable[[Tensor, Tensor], Tensor], x: Traced, y: Traced) -> Tensor:
        """Return the product with a mean of the other factor as each factor's multiplier.

        Of a number and one over something positive, a quotient, the shares are weighed by the denominators,
        ``a/b - a'/b' = ((a - a') - (q a/b + p a'/b') (b - b')) / (p b + q b')``: all is bounded where a denominator is
        small.
        """
        a, b, r, s = x.value.detach(), y.value.detach(), x.reference, y.reference
        value, reference = function(a, b), function(r, s)
        p: Any = 0.5
        if (x.kind is None) != (y.kind is None):  # one of them is a gate
            p = self.value_share if x.kind is None else 1 - self.value_share
        if y.kind == "inverse":
            p = _of_quotient(p, b, s)
        elif x.kind == "inverse":
            p = 1 - _of_quotient(1 - p, a, r)
        linear = function(x.value, torch.lerp(s, b, p)) + function(torch.lerp(a, r, p), y.value)
        return self.pair(_with_value(linear, value), reference)

    def recur(self, scan: Recurrence, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        """Return the recurrence with the same rule at every product of every step."""
        inputs = put((x, factors), lambda traced: traced)  # the constants are those of both
        value, reference = difference_of_scans(scan, values(inputs), references(inputs), self.value_share)
        return self.pair(value, reference)


class Frozen(Rule):
    """Hold the gates: the model is then affine in its embeddings, and the reference is what it gives for 0.

    A function of each entry that is 0 at 0, as an activation is, becomes a gate ``f(x)/x`` on its own input; any other,
    as a sigmoid, an exponential or an inverse root, is a constant. The coefficients of recurrences and the weights of
    attentions are constants.

    Args:
        gates: What a product with a gate does: ``"half"`` gives each factor half of it (MambaLRP), ``"value"`` holds
            the factor that came out of an activation. Of two others each gets half.
    """

    def __init__(self, gates: GateRule = "half") -> None:
        super().__init__()
        self.gates = gates

    def elementwise(self, function: _OfOne, x: Traced, kind: str) -> Tensor:
        """Return the function as a gate on its own input, or as a constant."""
        value = x.value.detach()
        y, zero = function(value), torch.zeros_like(value)
        if bool((function(zero) != 0).any()):
            return y
        slope = function.slope(value, zero, y, zero)
        return self.pair(_linear_form(x.value, y, slope), slope * x.reference, kind)

    def product(self, function: Callable[[Tensor, Tensor], Tensor], x: Traced, y: Traced) -> Tensor:
        """Return the product with each factor's share."""
        a, b = x.value.detach(), y.value.detach()
        share = 0.5
        if self.gates == "value" and x.kind != y.kind:
            share = float(y.kind is not None)
        to_x, to_y = share * b, (1 - share) * a
        linear = function(x.value, to_x) + function(to_y, y.value)
        reference = function(x.reference, to_x) + function(to_y, y.reference)
        return self.pair(linear, reference)

    def recur(self, scan: Recurrence, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        """Return the recurrence with its coefficients held."""
        held = scan.with_factors(constants(factors))
        if not isinstance(x, Traced):
            return held.mix(x)
        return self.pair(*linear_scan(held, x.value, x.reference))

    def secant(self, name: str, u: Traced) -> Tensor:
        """Return the gate that an activation puts on its own input, held."""
        return super().secant(name, u.value.detach())  # type: ignore[arg-type]

    def upper_bound(self, x: Traced) -> Tensor:
        """Return the value."""
        return x.value.detach()


class _Value(torch.autograd.Function):
    """A value with the gradient of a linear form that differs from it by a constant."""

    @staticmethod
    def forward(ctx: Any, linear: Tensor, value: Tensor) -> Tensor:
        return value.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient, None


class _Slope(torch.autograd.Function):
    """A value ``y`` with a given slope in ``x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, y: Tensor, slope: Tensor) -> Tensor:
        ctx.save_for_backward(slope)
        return y.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (slope,) = ctx.saved_tensors
        return (gradient * slope).masked_fill(slope == 0, 0), None, None


def _of_quotient(p: float, b: Tensor, s: Tensor) -> Tensor:
    """Return the share of a number times one over something, b and its reference s, that makes it a quotient's.

    It is the share itself if the signs of b and s differ.
    """
    alike = b * s > 0
    return torch.where(alike, p * s / torch.where(alike, p * s + (1 - p) * b, 1), p)


def _with_value(linear: Tensor, value: Tensor) -> Tensor:
    return _Value.apply(linear, value)  # type: ignore[no-untyped-call]


def _linear_form(x: Tensor, y: Tensor, slope: Tensor) -> Tensor:
    return _Slope.apply(x, y, slope)  # type: ignore[no-untyped-call]


@dataclass(frozen=True)
class _OfOne:
    """A function of its one traced argument; the others are constants."""

    func: Callable[..., Any]
    name: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any]

    def __call__(self, t: Tensor) -> Tensor:
        args, kwargs = put((self.args, self.kwargs), lambda _: t)
        result: Tensor = self.func(*args, **kwargs)
        return result

    def slope(self, x: Tensor, r: Tensor, y: Tensor, z: Tensor) -> Tensor:
        """Return the difference quotient of the values ``y`` at ``x`` and ``z`` at ``r``; 0 where there is no slope."""
        if self.name in SLOPES and self.args and isinstance(self.args[0], Traced):
            slope = SLOPES[self.name](x, r, y, z, *self.args[1:], **self.kwargs)
            if slope is not None:
                return torch.nan_to_num(slope, nan=0.0, posinf=0.0, neginf=0.0)
        others = [*self.args, *self.kwargs.values()]
        alone = not any(isinstance(t, Tensor) and t.dim() and not isinstance(t, Traced) for t in others)
        return quotient(self, x, r, y, z, alone)


@dataclass(frozen=True)
class _OfTwo:
    """A function of its two traced arguments; the others are constants, and of at least this type."""

    func: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    dtype: torch.dtype

    def __call__(self, x: Tensor, y: Tensor) -> Tensor:
        both = iter((x, y))
        args, kwargs = put((self.args, self.kwargs), lambda _: next(both), self.dtype)
        result: Tensor = self.func(*args, **kwargs)
        return result


def _of_both(func: Callable[..., Any], args: Any, kwargs: Any, dtype: torch.dtype) -> tuple[Any, Any]:
    """Return the function of the values, and of the references."""
    value = func(*values(args, dtype), **values(kwargs, dtype))
    return value, func(*references(args, dtype), **references(kwargs, dtype))


def _type(live: list[Traced]) -> torch.dtype:
    """Return the type that holds all of these."""
    return reduce(torch.promote_types, [x.dtype for x in live])


def _linear_with_bias(input: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    y = input @ weight.mT
    return y if bias is None else y + bias


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _unknown(func: Callable[..., Any], why: str) -> UnsupportedModelError:
    """Return the error for a function that no rule is known for, with the module that called it."""
    frame, module = sys._getframe(1), None
    while frame is not None and module is None:
        owner = frame.f_locals.get("self")
        module = owner if isinstance(owner, nn.Module) else None
        frame = frame.f_back  # type: ignore[assignment]
    where = f" in {type(module).__name__}" if module is not None else ""
    return UnsupportedModelError(
        f"No rule of relevance is known for the function {func.__name__!r}{where}{': ' + why if why else ''}. Register "
        f"one: captum_ssm.register_rule, for this function or for the whole module."
    )
