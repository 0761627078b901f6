"""The table of functions: one row for each function of torch."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any, Literal, NamedTuple

from torch import Tensor

from captum_ssm.relevance.multipliers import Adjoint

Kind = Literal["linear", "product", "elementwise", "constant"]
"""The kinds of functions that can be registered by their kind alone."""

OtherKind = Literal["composed", "cast", "selection", "step", "decision", "form", "method", "mark", "outside", "refused"]

Origin = Literal["activated", "inverse"]
"""The result of an activation, or one over something, as the scale of a norm is."""

Slope = Callable[..., Tensor | None]
"""``slope(x, r, f(x), f(r), *other_arguments)``: the difference quotient of f, or None if it has no closed form."""


@dataclass(frozen=True)
class Function:
    """One row of the table: everything that relevance knows about a function.

    Attributes:
        name: The function's ``__name__`` without leading and trailing underscores.
        kind: How a rule treats the function:

            * ``"linear"`` in its tensors together;
            * ``"product"``: linear in each of its tensors;
            * ``"elementwise"``: each entry of the result depends on one entry of the argument;
            * ``"constant"``: a new tensor that depends on shapes and types only;
            * ``"composed"``: written in other functions, by ``composition``;
            * ``"cast"``: changes the type or the device;
            * ``"selection"``: returns entries and their positions, and the input decides the positions;
            * ``"step"``: rounds each entry, which is a decision of the input;
            * ``"form"``: reads the shape or the type;
            * ``"method"``: belongs to this package; the rule's method of this name computes it;
            * ``"mark"``: tells autograd something, which has no effect on a value;
            * ``"outside"``: takes a tensor out of torch, where no rule can follow: refused;
            * ``"refused"``: has no rule, for a ``reason``;
            * ``"decision"``: any other function. A result without floating-point numbers, as of a comparison, is a
              decision of the input; a function with other results is refused.
        aliases: Further names of the function, such as Python's operators.
        in_place: Names under which the function writes into its first argument, besides names that end with ``_``.
        composition: The same function written in other functions. For a product: used if more than ``factors`` of its
            arguments are traced; for an elementwise function: if several are; for a selection: if the result has no
            positions.
        of_complex: For an elementwise function: the same function of complex numbers, written in other functions.
        slope: The closed form of an elementwise function's difference quotient; None: computed from the function.
        origin: For an elementwise function: the origin of its result, which a product with the result reads.
        contraction: Whether the result mixes entries, so that it no longer has the origin of its argument.
        factors: For a product: how many of its arguments may be traced at once, 1 or 2.
        adjoint: For a product: the gradient of each factor in closed form, of real factors with at least two axes;
            None: that of the function itself.
        linear_in: For a linear function that is linear in one argument alone: the position of this argument.
        constants_from: Position of the first argument of which only the shape or the type is read.
        axis: For a selection: position of its argument ``dim``.
        window: For a selection of windows: the number of last axes that its positions count together.
        reason: Of a refused function: why it has no rule.
        shared: Whether the operators of a chain call it, so that an adapter and its chain may share the result.
    """

    name: str
    kind: Kind | OtherKind
    aliases: tuple[str, ...] = ()
    in_place: tuple[str, ...] = ()
    composition: Callable[..., Any] | None = None
    of_complex: Callable[..., Any] | None = None
    slope: Slope | None = None
    origin: Origin = "activated"
    contraction: bool = False
    factors: int = 2
    adjoint: Adjoint | None = None
    linear_in: int | None = None
    constants_from: int | None = None
    axis: int | None = None
    window: int = 0
    reason: str = ""
    shared: bool = False

    @property
    def has_rule(self) -> bool:
        """Whether the row says how relevance passes the function, as a registration does."""
        return self.kind in ("linear", "product", "elementwise", "constant", "composed")


class Callee(NamedTuple):
    """A torch function or property as code calls it, with its row."""

    function: Callable[..., Any]
    row: Function
    in_place: bool
    """Whether the function writes into its first argument."""


class Table:
    """Rows by name.

    The rows of this package are declared once. A rule that a user registers or withdraws replaces a row's kind and
    composition; its other columns stay.
    """

    def __init__(self) -> None:
        self._declared: dict[str, Function] = {}
        self._rows: dict[str, Function] = {}
        self._names: dict[str, str] = {}
        self.callee = lru_cache(maxsize=1024)(self._callee)

    def declare(self, *rows: Function) -> None:
        """Add rows.

        Raises:
            ValueError: If a name or an alias is that of another row.
        """
        for row in rows:
            for name in dict.fromkeys((row.name, *row.aliases, *row.in_place)):
                if name in self._names:
                    raise ValueError(f"The function {name!r} has a row already, {self._names[name]!r}.")
                self._names[name] = row.name
            self._declared[row.name] = self._rows[row.name] = row
        self.callee.cache_clear()

    def find(self, name: str) -> Function:
        """Return the row of a function by its name or alias; of one that is not listed, the row of a decision."""
        name = self._names.get(name, name)
        return self._rows.get(name) or Function(name, "decision")

    def register(self, name: str, kind: Kind | None, composition: Callable[..., Any] | None = None) -> None:
        """Set the rule of a function: its kind, or its composition.

        Args:
            name: The function's name or alias.
            kind: The kind; None if there is a composition.
            composition: The same function written in other functions.
        """
        name = self._names.get(name, name)
        row = self._declared.get(name) or Function(name, "decision")
        if composition is not None:
            row = replace(row, kind="composed", composition=composition)
        elif kind is not None and kind != row.kind:
            row = replace(row, kind=kind, composition=None)
        self._rows[name] = row
        self.callee.cache_clear()

    def withdraw(self, name: str) -> None:
        """Take a function's rule away, whether it was registered or declared.

        Raises:
            KeyError: If the function has no rule.
        """
        if not self._rows[name].has_rule:
            raise KeyError(name)
        declared = self._declared.get(name)
        if declared is None:
            del self._rows[name]
        else:
            self._rows[name] = replace(declared, kind="decision") if declared.has_rule else declared
        self.callee.cache_clear()

    def _callee(self, function: Callable[..., Any]) -> Callee:
        """Find the row of a function, or of a property's getter, by its ``__name__``; :attr:`callee` is cached."""
        own_name = function.__name__
        if own_name == "__get__":
            row = self.find(function.__self__.__name__)  # type: ignore[attr-defined]
            return Callee(
                function, row if row.kind in ("linear", "composed") else Function(row.name, "form"), in_place=False
            )
        name = own_name.strip("_")
        row = self.find(name)
        writes = name in row.in_place or (own_name.endswith("_") and not own_name.endswith("__"))
        return Callee(function, row, in_place=writes and row.kind not in ("mark", "outside"))

    def __iter__(self) -> Iterator[Function]:
        """Iterate over the rows in the order of their declaration, then of their registration."""
        return iter(list(self._rows.values()))

    def __len__(self) -> int:
        return len(self._rows)

    def __contains__(self, name: object) -> bool:
        """Whether a row has this name."""
        return name in self._rows


FUNCTIONS = Table()
"""The table. Rows stand in :mod:`~captum_ssm.relevance.functions.primitives` and, with their definition, in the modules
beside it."""


def composed(name: str, **columns: Any) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Declare the row of a function by a definition in other functions.

    Args:
        name: The function's name.
        **columns: Other columns of the row.

    Returns:
        A decorator for the definition, with the parameters of torch's function.
    """

    def decorate(composition: Callable[..., Any]) -> Callable[..., Any]:
        FUNCTIONS.declare(Function(name, "composed", composition=composition, **columns))
        return composition

    return decorate
