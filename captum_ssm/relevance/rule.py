"""The dispatch that all rules of relevance share: from a call of a function to the method for its kind.

A rule gives every function a linear form whose coefficients are constants of this input, so that for every tensor of
the model ``value - reference = sum of multiplier * (input - input's reference)``. The multipliers are the gradient that
autograd then finds; the sum is right for each function, and so for the model.
"""

from __future__ import annotations

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_ssm.errors import UnsupportedModelError
from captum_ssm.layers.activations import secant_of
from captum_ssm.layers.precision import autocast_here, full_precision
from captum_ssm.operators import Operator, Recurrence
from captum_ssm.relevance.call import Call, constant_of, reference_of, references, value_of, values
from captum_ssm.relevance.functions import FUNCTIONS, Origin
from captum_ssm.relevance.multipliers import with_factors, with_value
from captum_ssm.relevance.own_projections import OwnProjections
from captum_ssm.relevance.shared_results import SharedResults
from captum_ssm.relevance.traced import Traced


class Rule(ABC):
    """A rule: the value, reference and multipliers of every function of traced tensors.

    Attributes:
        changed_decisions: Names of the functions that decide something, such as which experts a token is sent to, and
            would have decided otherwise for the reference; the reference follows the input's decision.
        autocast_types: The types that autocast would have computed in, on the way.
        escape: The error of code that met a traced tensor past torch's functions, also if the code hid it; or None.
    """

    def __init__(self) -> None:
        self.changed_decisions: set[str] = set()
        self.autocast_types: set[torch.dtype] = set()
        self.escape: UnsupportedModelError | None = None
        self._shared: SharedResults | None = None

    @contextmanager
    def sharing(self, shared: bool = True, projections: OwnProjections | None = None) -> Iterator[None]:
        """Compute the results of a layer's operators once while the context is open, see :class:`SharedResults`.

        Args:
            shared: False if the tensors between the operators are observed or replaced, so that each call counts.
            projections: Those of the layer's own code, or None.
        """
        self._shared = SharedResults(projections) if shared else None
        try:
            yield
        finally:
            self._shared = None

    # --- The rule of each kind ------------------------------------------------------------------------------------

    @abstractmethod
    def elementwise(self, call: Call) -> Tensor:
        """Return a function of each entry of one traced tensor."""

    @abstractmethod
    def product(self, call: Call) -> Tensor:
        """Return a function that is linear in each of two traced tensors."""

    @abstractmethod
    def quotient(self, call: Call, denominator: int) -> Tensor:
        """Return a product one factor of which is one over something.

        Args:
            call: The call, of two traced tensors.
            denominator: The position of that factor among the two, 0 or 1.
        """

    @abstractmethod
    def recurrence(self, scan: Recurrence, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        """Return the output of a recurrence for ``x`` (B, L, H, P); x, factors, or both may be traced."""

    @abstractmethod
    def normalized_exponentials(self, x: Traced, axis: int) -> Tensor:
        """Return the softmax along an axis."""

    @abstractmethod
    def log_of_sum(self, x: Traced, axis: int | tuple[int, ...]) -> Tensor:
        """Return the logarithm of the sum of exponentials, with size 1 along the axis."""

    @abstractmethod
    def weighted_sums(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sees_earlier: bool, scale: float
    ) -> Tensor:
        """Return softmax attention, see :func:`captum_ssm.operators.attention.weighted_sums`."""

    @abstractmethod
    def averages(self, k: Traced, w: Tensor, bonus: Tensor) -> Operator:
        """Return the operator of averages with exponential weights, see :mod:`captum_ssm.layers.averages`."""

    def reference_of_linear(self, call: Call, value: Any) -> Any:
        """Return the reference of a linear function, or of a product with one traced factor, that has this value."""
        return call.on(reference_of)

    def upper_bound(self, x: Traced) -> Tensor:
        """Return a constant at or above the value and the reference."""
        return torch.maximum(x.value.detach(), x.reference)

    def with_means(self, call: Call, for_x: Tensor, for_y: Tensor) -> Tensor:
        """Return the value of a product of two traced tensors with these as the multipliers of the first and second."""
        x, y = call.traced
        adjoint = call.row.adjoint
        plain = all(t.value.is_floating_point() and t.value.dim() >= 2 for t in call.traced)
        if adjoint is not None and plain and not call.kwargs:
            return with_factors(x.value, y.value, for_x, for_y, call.at, adjoint)
        linear = call.at(x.value, for_x) + call.at(for_y, y.value)
        return with_value(linear, call.at(x.value.detach(), y.value.detach()))

    def secant(self, name: str, u: Traced) -> Tensor:
        """Return the gate that an activation puts on its own input."""
        return secant_of(name)(u)

    def recur(self, scan: Recurrence, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        """Return the output of a recurrence, shared between an adapter and its chain."""
        if self._shared is None:
            return self.recurrence(scan, x, factors)
        return self._shared.of_recurrence(scan, x, factors, self.recurrence)

    def pair(self, value: Any, reference: Any, origin: Origin | None = None) -> Any:
        """Return a value and a reference, tensors or sequences of tensors, as traced ones."""
        if isinstance(value, Tensor):
            return Traced.of(value, reference, self, origin) if _is_float(value) else value
        if isinstance(value, (list, tuple)):
            return tuple(self.pair(v, r, origin) for v, r in zip(value, reference))
        return value

    # --- Dispatch -------------------------------------------------------------------------------------------------

    def __call__(
        self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], traced: list[Traced]
    ) -> Any:
        """Return the result of a function for these arguments, given also the list of those that are traced.

        Autocast is set aside: the explanation is of the function, not of its rounding.
        """
        if torch._C._is_any_autocast_enabled():
            self.autocast_types.update(dict(autocast_here()).values())
            with full_precision():
                return self(function, args, kwargs, traced)
        callee = FUNCTIONS.callee(function)
        call = Call.of(callee.function, callee.row, args, kwargs, traced)
        if callee.in_place:
            return self._in_place(call)
        if self._shared is not None and callee.row.shared and not kwargs:
            return self._shared.of_call(call, self._apply)
        return self._apply(call)

    def _apply(self, call: Call) -> Any:
        row = call.row
        if row.constants_from is not None and len(call.args) > row.constants_from:
            call = call.with_constants(row.constants_from)
            if not call.traced:
                return call.function(*call.args, **call.kwargs)
        return _BY_KIND[row.kind](self, call)

    def _linear(self, call: Call) -> Any:
        """Apply a linear function to value and reference."""
        position = call.row.linear_in
        if position is not None and [id(t) for t in call.traced] != [id(t) for t in call.args[position : position + 1]]:
            raise unsupported_function(call.function, f"it is linear in its argument {position} alone")
        keeps_origin = len(call.traced) == 1 and not call.row.contraction
        value = self._value_of_linear(call)
        return self.pair(value, self.reference_of_linear(call, value), call.traced[0].origin if keeps_origin else None)

    def _value_of_linear(self, call: Call) -> Any:
        """Return the value of a linear function; a projection's may be known from the layer's own code."""
        if self._shared is not None and call.function is F.linear and not call.kwargs:
            x, *constants = call.args
            value = self._shared.projections.value(values(x), *constants)
            if value is not None:
                return value
        return call.on(value_of)

    def _product(self, call: Call) -> Any:
        """Take a product of one traced factor as linear, of two as a quotient, entry by entry, or a product."""
        if len(call.traced) == 1:
            return self._linear(call)
        if len(call.traced) > call.row.factors:
            return self._composed(call)
        inverse = [factor.origin == "inverse" and not call.row.contraction for factor in call.traced]
        return self.quotient(call, denominator=int(inverse[1])) if any(inverse) else self.product(call)

    def _elementwise(self, call: Call) -> Any:
        if len(call.traced) > 1:
            return self._composed(call)
        if call.traced[0].value.is_complex():
            return self._of_complex(call)
        result = self.elementwise(call.without("inplace"))
        if call.kwargs.get("inplace"):
            self._forget()
            vars(call.traced[0]).update(value=values(result), reference=references(result))
        return result

    def _of_complex(self, call: Call) -> Any:
        """Run the composition of a function of complex numbers."""
        if call.row.of_complex is None:
            raise unsupported_function(call.function, "of complex numbers")
        return self._composed(call._replace(row=replace(call.row, composition=call.row.of_complex)))

    def _composed(self, call: Call) -> Any:
        """Run the composition, whose functions come back to the rule one by one."""
        composition = call.row.composition
        if composition is None:
            raise unsupported_function(call.function)
        try:
            return composition(*call.args, **call.kwargs)
        except (NotImplementedError, TypeError) as error:
            raise unsupported_function(call.function, str(error)) from error

    def _cast(self, call: Call) -> Any:
        """Change the type, but to none that is narrower: the explanation is of the function, not of its rounding."""
        x, value = call.args[0], call.on(value_of)
        if not isinstance(value, Tensor):  # a number of Python, or the name of a type
            return self._decision(call)
        if not _is_float(value):
            return self._decision(call, "cast")
        if x.is_complex() and not value.is_complex():
            return x.real.to(value.dtype)
        if torch.promote_types(value.dtype, x.dtype) == value.dtype:
            return self.pair(value, call.on(reference_of), x.origin)
        return x.to(x.dtype.to_complex()) if value.is_complex() and not x.is_complex() else x

    def _in_place(self, call: Call) -> Any:
        """Write into the value and the reference of the first argument, which becomes traced if it is not."""
        self._forget()
        target, traced = call.args[0], call.traced
        if not isinstance(target, Traced):
            target = Traced.adopt(target, self, traced[0].value.dtype)
            traced = [target, *traced]
        if call.row.kind == "linear":
            call = call._replace(dtype=target.value.dtype)
            call.on(value_of), call.on(reference_of)
            return target
        plain_form = FUNCTIONS.callee(getattr(Tensor, call.row.name))
        result = self._apply(Call.of(plain_form.function, plain_form.row, call.args, call.kwargs, traced))
        target.value.copy_(values(result))
        target.reference.copy_(references(result))
        return target

    def _forget(self) -> None:
        if self._shared is not None:
            self._shared.clear()

    # --- Decisions ------------------------------------------------------------------------------------------------

    def _decision(self, call: Call, name: str = "") -> Any:
        """Return a decision of the input, noted if the reference's would differ; refuse floating-point results."""
        decision = call.on(constant_of)
        if any(map(_is_float, decision)) if isinstance(decision, (list, tuple)) else _is_float(decision):
            raise unsupported_function(call.function)
        self._note(name or call.row.name, decision, call.on(reference_of))
        return decision

    def _selection(self, call: Call) -> Any:
        """Return entries that ``topk``, ``sort`` or ``max`` choose, and their positions, chosen by the input."""
        chosen, row = call.on(constant_of), call.row
        if not _has_positions(chosen):
            return self._composed(call) if row.composition is not None else self._decision(call)
        x, numbers = call.args[0], chosen[1]
        self._note(row.name, numbers, call.on(reference_of)[1])
        if row.axis is None:
            entries = x.flatten(-row.window).gather(-1, numbers.flatten(-row.window)).view_as(numbers)
            return type(chosen)((entries, numbers))
        axis = call.kwargs.get("dim", call.args[row.axis] if len(call.args) > row.axis else -1)
        keeps_axis = numbers.dim() == x.dim()
        entries = x.gather(axis, numbers if keeps_axis else numbers.unsqueeze(axis))
        return type(chosen)((entries if keeps_axis else entries.squeeze(axis), numbers))

    def _step(self, call: Call) -> Tensor:
        """Return rounded entries as a constant, noted if the reference's would differ."""
        rounded = call.on(constant_of)
        self._note(call.row.name, rounded, call.on(reference_of))
        return rounded

    def _note(self, name: str, decision: Any, other: Any) -> None:
        if not _equal(decision, other):
            self.changed_decisions.add(name)

    # --- Functions that need no rule ------------------------------------------------------------------------------

    def _constant(self, call: Call) -> Any:
        return call.on(constant_of)

    def _form(self, call: Call) -> Any:
        return call.on(value_of)

    def _method(self, call: Call) -> Any:
        return getattr(self, call.row.name)(*call.args)

    def _mark(self, call: Call) -> Any:
        return call.args[0]

    def _outside(self, call: Call) -> Any:
        raise unsupported_function(call.function, "what leaves torch cannot be followed")

    def _refused(self, call: Call) -> Any:
        raise unsupported_function(call.function, call.row.reason)


_BY_KIND: dict[str, Callable[[Rule, Call], Any]] = {
    "linear": Rule._linear,
    "product": Rule._product,
    "elementwise": Rule._elementwise,
    "constant": Rule._constant,
    "composed": Rule._composed,
    "cast": Rule._cast,
    "selection": Rule._selection,
    "step": Rule._step,
    "decision": Rule._decision,
    "form": Rule._form,
    "method": Rule._method,
    "mark": Rule._mark,
    "outside": Rule._outside,
    "refused": Rule._refused,
}


def unsupported_function(function: Callable[..., Any], reason: str = "") -> UnsupportedModelError:
    """Return the error for a function without a rule, with the module that called the function."""
    frame, module = sys._getframe(1), None
    while frame is not None and module is None:
        owner = frame.f_locals.get("self")
        module = owner if isinstance(owner, nn.Module) else None
        frame = frame.f_back  # type: ignore[assignment]
    where = f" in {type(module).__name__}" if module is not None else ""
    why = f": {reason}" if reason else ""
    if isinstance(function, torch._ops.OpOverload):
        return UnsupportedModelError(
            f"The operator {function.name()!r} is called{where} past torch's functions, as code of torch.export calls "
            "it, and cannot be followed. Let forward_func run the model that was exported."
        )
    return UnsupportedModelError(
        f"No rule of relevance is known for the function {function.__name__!r}{where}{why}. "
        "Register one: captum_ssm.register_rule, for this function or for the whole module."
    )


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and (value.is_floating_point() or value.is_complex())


def _equal(decision: Any, other: Any) -> bool:
    if isinstance(decision, Tensor):
        return torch.equal(decision, other)
    if isinstance(decision, (list, tuple)):
        return len(decision) == len(other) and all(map(_equal, decision, other))
    return bool(decision == other)


def _has_positions(result: Any) -> bool:
    """Whether a result is a pair of entries and their positions, rather than entries alone."""
    return isinstance(result, tuple) and len(result) == 2 and not _is_float(result[1])
