"""The sum of operators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import add
from types import MappingProxyType

from torch import Tensor

from captum_ssm.operators.base import Index, Operator


@dataclass(frozen=True)
class Sum(Operator):
    """The sum of named operators on the same input: the directions of a bidirectional layer.

    Args:
        summands: Name to operator, such as ``{"forward": ..., "backward": ...}``; at least one.

    Raises:
        ValueError: If there is no summand, or two disagree on their number of channels.
    """

    summands: Mapping[str, Operator]

    def __post_init__(self) -> None:
        object.__setattr__(self, "summands", MappingProxyType(dict(self.summands)))
        if not self.summands:
            raise ValueError("A sum needs at least one summand; all of them were left out.")
        for side, sizes in zip(("output", "input"), zip(*(s.sizes for s in self.summands.values()))):
            if len({size for size in sizes if size is not None}) > 1:
                raise ValueError(f"The summands {list(self.summands)} have {list(sizes)} {side} channels.")

    @property
    def mixes_tokens(self) -> bool:  # type: ignore[override]
        """Whether any summand mixes tokens."""
        return any(operator.mixes_tokens for operator in self.summands.values())

    @property
    def mixes_channels(self) -> bool:  # type: ignore[override]
        """Whether any summand mixes channels."""
        return any(operator.mixes_channels for operator in self.summands.values())

    @property
    def causal(self) -> bool:  # type: ignore[override]
        """Whether all summands are causal."""
        return all(operator.causal for operator in self.summands.values())

    @property
    def anticausal(self) -> bool:  # type: ignore[override]
        """Whether all summands are anticausal."""
        return all(operator.anticausal for operator in self.summands.values())

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the summands, if there are several, and of the optional terms of each summand."""
        names = list(self.summands) if len(self.summands) > 1 else []
        inner = [term for operator in self.summands.values() for term in operator.terms]
        return tuple(dict.fromkeys([*names, *inner]))

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """Output and input channels."""
        outs, ins = zip(*(operator.sizes for operator in self.summands.values()))
        return next((s for s in outs if s is not None), None), next((s for s in ins if s is not None), None)

    def apply(self, x: Tensor, bias: bool = False) -> Tensor:
        """Return the sum of the summands' outputs. Cost: one pass of each summand."""
        return reduce(add, (operator.apply(x, bias) for operator in self.summands.values()))

    def adjoint(self, u: Tensor) -> Tensor:
        """Return the sum of the summands' transposed outputs. Cost: one pass of each summand."""
        return reduce(add, (operator.adjoint(u) for operator in self.summands.values()))

    def diagonal(self, like: Tensor) -> Tensor:
        """Return the sum of the summands' diagonals."""
        return reduce(add, (operator.diagonal(like) for operator in self.summands.values()))

    def flipped(self) -> Sum:
        """Return the sum of the flipped summands."""
        return Sum({name: operator.flipped() for name, operator in self.summands.items()})

    def without(self, *terms: str) -> Sum:
        """Return the sum without some summands, or without some terms of any summand.

        Args:
            *terms: Names out of :attr:`terms`.

        Returns:
            The sum of the remaining summands.

        Raises:
            ValueError: If no summand and no term has one of the names, or no summand remains.
        """
        for term in terms:
            if term not in self.terms:
                raise ValueError(f"Nothing named {term!r} can be left out here; choose from {list(self.terms)}.")
        remaining = {name: operator for name, operator in self.summands.items() if name not in terms}
        return Sum({name: o.without(*(t for t in terms if t in o.terms)) for name, o in remaining.items()})

    def channels(self, index: Index) -> Sum:
        """Return the sum on a selection of channels."""
        return Sum({name: operator.channels(index) for name, operator in self.summands.items()})

    def after(self, start: int) -> Sum:
        """Return the sum on the tokens from ``start`` on, for inputs that are 0 before."""
        return Sum({name: operator.after(start) for name, operator in self.summands.items()})

    def columns(self, v: Tensor, tokens: slice) -> Tensor:
        """Return the contributions of single tokens, (J, B, L, output channels), see :meth:`Operator.columns`."""
        return reduce(add, (operator.columns(v, tokens) for operator in self.summands.values()))
