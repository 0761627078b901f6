"""The product of named operators."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import reduce
from operator import mul
from types import MappingProxyType

from torch import Tensor

from captum_ssm.operators.base import Index, Operator, one_hot
from captum_ssm.operators.sum import Sum


@dataclass(frozen=True)
class Chain(Operator):
    """The product of named factors, in the order of the equation: the first named is applied last.

    Args:
        factors: Name to operator, such as ``{"out": ..., "gate": ..., "scan": ..., "in": ...}``. May be
            empty: the identity.

    Raises:
        ValueError: If two neighbours disagree on the number of channels between them.
    """

    factors: Mapping[str, Operator]

    def __post_init__(self) -> None:
        object.__setattr__(self, "factors", MappingProxyType(dict(self.factors)))
        name, size = "", None
        for left, operator in self.factors.items():
            out, into = operator.sizes
            if None not in (size, out) and size != out:
                raise ValueError(f"Factor '{name}' takes {size} channels, but '{left}' to its right gives {out}.")
            name, size = (left, into) if into is not None else (name, size)

    @property
    def mixes_tokens(self) -> bool:  # type: ignore[override]
        """Whether any factor mixes tokens."""
        return any(operator.mixes_tokens for operator in self.factors.values())

    @property
    def mixes_channels(self) -> bool:  # type: ignore[override]
        """Whether any factor mixes channels."""
        return any(operator.mixes_channels for operator in self.factors.values())

    @property
    def mixers(self) -> tuple[str, ...]:
        """Names of the factors that mix tokens; the first is the recurrence or attention, and is applied last.

        Raises:
            ValueError: If no factor mixes tokens.
        """
        names = tuple(name for name, operator in self.factors.items() if operator.mixes_tokens)
        if not names:
            raise ValueError(f"No factor of {list(self.factors)} mixes tokens, so there is no attention to speak of.")
        return names

    @property
    def causal(self) -> bool:  # type: ignore[override]
        """Whether all factors are causal."""
        return all(operator.causal for operator in self.factors.values())

    @property
    def anticausal(self) -> bool:  # type: ignore[override]
        """Whether all factors are anticausal."""
        return all(operator.anticausal for operator in self.factors.values())

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """Output channels of the first factor and input channels of the last that have a number."""
        outs = [operator.sizes[0] for operator in self.factors.values() if operator.sizes[0] is not None]
        ins = [operator.sizes[1] for operator in self.factors.values() if operator.sizes[1] is not None]
        return (outs[0] if outs else None), (ins[-1] if ins else None)

    @property
    def terms(self) -> tuple[str, ...]:
        """Names that :meth:`without` accepts: channelwise factors, and optional terms of any factor."""
        names = [name for name, operator in self.factors.items() if not operator.mixes_channels]
        inner = [term for operator in self.factors.values() for term in operator.terms]
        return tuple(dict.fromkeys([*names, *inner]))

    def apply(self, x: Tensor, bias: bool = False) -> Tensor:
        """Return the product's output.

        Args:
            x: (..., B, L, input channels).
            bias: Whether to add the factors' constant terms, each carried through the factors after it.

        Returns:
            (..., B, L, output channels).
        """
        for operator in reversed(list(self.factors.values())):
            x = operator.apply(x, bias)
        return x

    def adjoint(self, u: Tensor) -> Tensor:
        """Return the transposed product's output for ``u``: the transposed factors are applied from left to right."""
        for operator in self.factors.values():
            u = operator.adjoint(u)
        return u

    def without(self, *terms: str) -> Chain:
        """Return the chain without some channelwise factors, or without some terms of any factor.

        ``chain.without("conv", "skip", "bias")`` drops the convolution, the scan's skip and every bias.

        Args:
            *terms: Names out of :attr:`terms`.

        Returns:
            The product of the remaining factors.

        Raises:
            ValueError: If no factor and no term has one of the names, or it names a factor that mixes channels.
        """
        for term in terms:
            if term not in self.terms:
                raise ValueError(f"Nothing named {term!r} can be left out here; choose from {list(self.terms)}.")
        return Chain(
            {
                name: operator.without(*(term for term in terms if term in operator.terms))
                for name, operator in self.factors.items()
                if name not in terms
            }
        )

    def flipped(self) -> Chain:
        """Return the chain of the flipped factors."""
        return Chain({name: operator.flipped() for name, operator in self.factors.items()})

    def summands(self) -> dict[str, Chain]:
        """Multiply out every :class:`Sum` among the factors, and return the resulting chains by name.

        A chain without a :class:`Sum` is its only summand, named ``""``. Where a summand has a factor of the same name
        as one outside the sum, the summand's name is put in front. Each summand has all biases of the factors outside
        the sum, so the summands' constant terms do not add up to the chain's.

        Returns:
            Name of the summand to chain. Without their constant terms, the chains sum to this one.
        """
        for name, operator in self.factors.items():
            if isinstance(operator, Sum):
                return {
                    ".".join(filter(None, (outer, inner))): chain
                    for outer, summand in operator.summands.items()
                    for inner, chain in self._with(name, outer, summand).summands().items()
                }
        return {"": self}

    def leaves(self) -> list[Operator]:
        """Return the factors in the order of the equation, with nested chains replaced by their factors."""
        nested = (o.leaves() if isinstance(o, Chain) else [o] for o in self.factors.values())
        return [operator for operators in nested for operator in operators]

    def diagonal(self, like: Tensor) -> Tensor:
        """Return the product of the factors' diagonals, which is the diagonal of a product of triangular matrices.

        Args:
            like: Any tensor (B, L, D) of the shape, type and device of the input.

        Returns:
            Broadcastable to (B, L, D).

        Raises:
            ValueError: If a factor mixes channels, or the factors read both earlier and later tokens.
        """
        if not (self.causal or self.anticausal):
            raise ValueError("The factors read both earlier and later tokens, so their diagonals tell nothing.")
        return reduce(mul, (operator.diagonal(like) for operator in self.factors.values()), like.new_ones(1))

    def _with(self, name: str, new: str, operator: Operator) -> Chain:
        """Return the chain with one factor replaced by an operator of another name, or by the factors of a chain."""
        inner = operator.factors if isinstance(operator, Chain) else {new: operator}
        named = {n if n == name or n not in self.factors else f"{new}.{n}": factor for n, factor in inner.items()}
        factors = self.factors.items()
        return Chain(dict(item for n, factor in factors for item in (named.items() if n == name else [(n, factor)])))

    def columns(self, v: Tensor, tokens: slice) -> Tensor:
        """Return the contributions of single tokens, see :meth:`Operator.columns`.

        Until the first factor that mixes tokens, a token's contribution stays within the token. So the values are
        carried up to that factor, and its columns through the factors after it.

        Args:
            v: Values (B, L, input channels).
            tokens: The columns j, a slice with a start and a stop.

        Returns:
            (J, B, L, output channels).
        """
        remaining = list(self.factors.values())
        while remaining and not remaining[-1].mixes_tokens:
            v = remaining.pop().apply(v)  # (B, L, channels)
        columns = remaining.pop().columns(v, tokens) if remaining else one_hot(v, tokens)  # (J, B, L, channels)
        for operator in reversed(remaining):
            columns = operator.apply(columns)
        return columns

    def channels(self, index: Index) -> Chain:
        """Return the chain on a selection of channels."""
        return Chain({name: operator.channels(index) for name, operator in self.factors.items()})

    def after(self, start: int) -> Chain:
        """Return the chain on the tokens from ``start`` on, for inputs that are 0 before."""
        return Chain({name: operator.after(start) for name, operator in self.factors.items()})

    def channelwise(self) -> list[Chain]:
        """Return the stretches of neighbouring channelwise factors that mix tokens, in the order of the equation."""
        stretches: list[dict[str, Operator]] = [{}]
        for name, operator in self.factors.items():
            if operator.mixes_channels:
                stretches.append({})
            else:
                stretches[-1][name] = operator
        return [Chain(factors) for factors in stretches if any(operator.mixes_tokens for operator in factors.values())]

    def split(self, core: str | None = None) -> tuple[Chain, Chain, Chain]:
        """Cut the chain into output side, core and input side; their product is the chain.

        Args:
            core: Name of the one factor to take as the core. None takes the factors that mix tokens, all factors
                between them, and the channelwise factors around them: the unified implicit attention. It mixes
                channels too if a projection stands between two factors that mix tokens, such as between RWKV's token
                shift and recurrence.

        Returns:
            Output side, core and input side.

        Raises:
            ValueError: If no factor mixes tokens, or none has the given name.
        """
        names, operators = list(self.factors), list(self.factors.values())
        if core is not None:
            if core not in self.factors:
                raise ValueError(f"The chain has no factor {core!r}; it has {names}.")
            start = stop = names.index(core)
        else:
            start, stop = names.index(self.mixers[0]), names.index(self.mixers[-1])
            while start > 0 and not operators[start - 1].mixes_channels:
                start -= 1
            while stop + 1 < len(operators) and not operators[stop + 1].mixes_channels:
                stop += 1
        cuts = (names[:start], names[start : stop + 1], names[stop + 1 :])
        output, inner, into = (Chain({name: self.factors[name] for name in cut}) for cut in cuts)
        return output, inner, into
