"""Linear operators on token sequences, and their product.

Given its gates, a gated-linear layer is an affine map of its input. This module holds the factors of that
map. Each is a small frozen value with a product (:meth:`Operator.apply`) and a transposed product
(:meth:`Operator.adjoint`); everything else in the package is derived from these two.

Sizes:
    ``B`` batch, ``L`` tokens, ``D`` channels, ``E`` model width, ``N`` state size, ``K`` taps,
    ``H`` heads, ``P`` channels of one head (``D = H * P``), ``T`` tokens of a chunk, ``J`` columns.

Tensors and indices:
    ``x`` input, ``y`` output, ``u`` output side, ``h`` state; ``t`` time, ``i`` query (row), ``j`` key
    (column), ``d`` channel, ``n`` state. Of a scan: ``a`` decay (A-bar), ``b`` input (B-bar), ``c``
    read-out (C), ``skip`` (D), ``bonus`` (RWKV's u).

All operators take ``x`` of shape (..., B, L, channels): dimensions in front of B are further right-hand
sides that share the coefficients.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import reduce
from operator import mul
from types import MappingProxyType
from typing import ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor

Index = slice | Tensor
"""Which channels: a slice, or a 1-D tensor of channel numbers."""

Self = TypeVar("Self", bound="Operator")


class Operator(ABC):
    """An affine map of token sequences, ``x -> A x + bias``.

    Subclasses say which axes they mix. A factor that mixes neither, or tokens only, is *channelwise*: it
    is one (L, L) matrix for each channel. A factor that mixes channels only is *tokenwise*.
    """

    mixes_tokens: ClassVar[bool] = False
    mixes_channels: ClassVar[bool] = False
    causal: ClassVar[bool] = False
    """Whether no output depends on a later input, and :meth:`after` is there to make use of it."""
    optional: ClassVar[tuple[str, ...]] = ()
    """Names of the fields that may be None: the terms that :meth:`without` can leave out."""

    @abstractmethod
    def apply(self, x: Tensor, bias: bool = False) -> Tensor:
        """Return ``A x``, or ``A x + bias``.

        Args:
            x: (..., B, L, input channels).
            bias: Whether to add the constant term.

        Returns:
            (..., B, L, output channels).
        """

    @abstractmethod
    def adjoint(self, u: Tensor) -> Tensor:
        """Return ``A^T u`` for ``u`` (..., B, L, output channels), shape (..., B, L, input channels)."""

    @property
    def terms(self) -> tuple[str, ...]:
        """Names of the optional terms that this operator has."""
        return tuple(name for name in self.optional if getattr(self, name) is not None)

    def without(self: Self, *terms: str) -> Self:
        """Return the operator with these optional terms left out.

        Raises:
            ValueError: If the operator has no such term.
        """
        for term in terms:
            if term not in self.terms:
                raise ValueError(f"{type(self).__name__} has no term {term!r}; it has {list(self.terms)}.")
        return replace(self, **dict.fromkeys(terms)) if terms else self  # type: ignore[type-var]

    def channels(self: Self, index: Index) -> Self:
        """Return the operator on these channels alone; taking channels before or after is the same.

        Raises:
            ValueError: If the operator mixes channels.
        """
        raise ValueError(f"{type(self).__name__} mixes channels, so none can be taken alone.")

    def after(self: Self, start: int) -> Self:
        """Return the operator on the tokens from ``start`` on, for inputs that are 0 before.

        Raises:
            NotImplementedError: If the operator reads the future, so that outputs before ``start`` exist.
        """
        raise NotImplementedError(f"{type(self).__name__} is not known to be causal.")

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """Output and input channels; None where any number fits."""
        return None, None


def _since(tensor: Tensor, start: int) -> Tensor:
    """Cut the token axis, the last but one, unless it is shared (size 1 or absent)."""
    return tensor if tensor.dim() < 2 or tensor.shape[-2] == 1 else tensor[..., start:, :]


def _take(tensor: Tensor, index: Index) -> Tensor:
    """Index the last axis, unless it is shared (size 1)."""
    return tensor if tensor.dim() == 0 or tensor.shape[-1] == 1 else tensor[..., index]


@dataclass(frozen=True)
class Diagonal(Operator):
    """Scale every token and channel: ``y = s * x``. A gate, an activation, the scale of a norm, a mask.

    Args:
        s: Broadcastable to (B, L, D).
    """

    s: Tensor

    causal = True

    def apply(self, x: Tensor, bias: bool = False) -> Tensor:
        """Return ``s * x``. Cost: O(L·D)."""
        return self.s * x

    def adjoint(self, u: Tensor) -> Tensor:
        """Return ``s * u``: a diagonal is its own transpose. Cost: O(L·D)."""
        return self.s * u

    def channels(self, index: Index) -> Diagonal:
        """Return the diagonal of these channels; a scale shared by all channels stays shared."""
        return Diagonal(_take(self.s, index))

    def after(self, start: int) -> Diagonal:
        """Return the diagonal on the tokens from ``start`` on."""
        return Diagonal(_since(self.s, start))

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """Output and input channels, or None for a scale shared by all channels."""
        size = self.s.shape[-1] if self.s.dim() and self.s.shape[-1] > 1 else None
        return size, size


@dataclass(frozen=True)
class CausalConv(Operator):
    """Depthwise causal convolution: ``y_t = sum_k w_k x_{t - (K-1) + k} + bias``.

    Args:
        w: (D, K), taps in torch's order: ``w[:, K-1]`` weighs the current token.
        bias: (D,) or None.
    """

    w: Tensor
    bias: Tensor | None = None

    mixes_tokens = True
    causal = True
    optional = ("bias",)

    def apply(self, x: Tensor, bias: bool = False) -> Tensor:
        """Return the convolution of ``x``. Cost: O(L·D·K)."""
        y = self.w[:, -1] * x
        for lag in range(1, min(self.w.shape[1], x.shape[-2])):
            y[..., lag:, :] += self.w[:, -1 - lag] * x[..., :-lag, :]
        return y + self.bias if bias and self.bias is not None else y

    def adjoint(self, u: Tensor) -> Tensor:
        """Return the correlation of ``u`` with the taps, which reads the future. Cost: O(L·D·K)."""
        x = self.w[:, -1] * u
        for lag in range(1, min(self.w.shape[1], u.shape[-2])):
            x[..., :-lag, :] += self.w[:, -1 - lag] * u[..., lag:, :]
        return x

    def channels(self, index: Index) -> CausalConv:
        """Return the convolution of these channels."""
        return CausalConv(self.w[index], None if self.bias is None else self.bias[index])

    def after(self, start: int) -> CausalConv:
        """Return the convolution itself: its taps are the same everywhere."""
        return self

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """Output and input channels."""
        return self.w.shape[0], self.w.shape[0]


@dataclass(frozen=True)
class Projection(Operator):
    """Mix the channels of every token: ``y = W x + bias``.

    Args:
        W: (output channels, input channels).
        bias: (output channels,) or None.
    """

    W: Tensor
    bias: Tensor | None = None

    mixes_channels = True
    causal = True
    optional = ("bias",)

    def apply(self, x: Tensor, bias: bool = False) -> Tensor:
        """Return ``W x`` for every token. Cost: O(L·D·E)."""
        return F.linear(x, self.W, self.bias if bias else None)

    def adjoint(self, u: Tensor) -> Tensor:
        """Return ``W^T u`` for every token. Cost: O(L·D·E)."""
        return u @ self.W

    def after(self, start: int) -> Projection:
        """Return the projection itself: it is the same for every token."""
        return self

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """Output and input channels."""
        return self.W.shape[0], self.W.shape[1]


@dataclass(frozen=True)
class Product:
    """A coefficient as the product of broadcastable factors, evaluated a few tokens at a time.

    Mamba's decay ``exp(delta * A)`` and input ``delta * B`` have L·D·N entries but only L·D + D·N and
    L·(D + N) numbers; kept as factors they never exist as a whole.

    Args:
        factors: Each (B or 1, L or 1, H or 1, N or 1).
        exponential: Whether the coefficient is the exponential of the product.
    """

    factors: tuple[Tensor, ...]
    exponential: bool = False

    def __post_init__(self) -> None:
        for factor in self.factors:
            if factor.dim() != 4:
                raise ValueError(
                    f"A scan coefficient has shape (B, L, H, N) with 1 where it is shared, not {tuple(factor.shape)}."
                )

    @property
    def shape(self) -> torch.Size:
        """(B, L, H, N) with 1 where the coefficient is shared."""
        return torch.broadcast_shapes(*(factor.shape for factor in self.factors))

    def map(self, function: Callable[[Tensor], Tensor], axis: int) -> Product:
        """Apply ``function`` to every factor that is not shared along ``axis``."""
        return replace(self, factors=tuple(function(f) if f.shape[axis] > 1 else f for f in self.factors))

    def tokens(self, start: int, stop: int) -> Tensor:
        """Evaluate at tokens ``start`` to ``stop``, shape (B or 1, stop - start, H or 1, N or 1)."""
        value = reduce(mul, self.map(lambda f: f[:, start:stop], axis=1).factors)
        value = value.exp() if self.exponential else value
        return value.expand(-1, stop - start, -1, -1)


@dataclass(frozen=True)
class Scan(Operator):
    """Diagonal linear recurrence, the common form of S6, SSD, RG-LRU, WKV, mLSTM and lightning.

    Head ``h`` with its P channels keeps a state of (N, P)::

        h_t = a_t h_{t-1} + b_t x_t
        y_t = <c_t, h_{t-lag}> + (bonus_t + skip_t) x_t

    so channel d of head h has the attention, for i >= j + lag,
    ``alpha[i, j] = sum_n c_in (prod_{j < k <= i - lag} a_kn) b_jn``, plus ``bonus + skip`` for i = j.

    The sequence is walked in chunks that hand on the state. All decays are products within one chunk:
    nothing is divided and no logarithms are subtracted, so decays may be zero or negative.

    Args:
        a: Decay, a tensor (B, L, H, N) with 1 where it is shared, or a :class:`Product` of such.
        b: Weight of the input, likewise.
        c: Weight of the state in the output, likewise.
        skip: Direct path that is not part of the recurrence (Mamba's D), broadcastable to (B, L, D).
        bonus: Weight of the current token in the recurrence (RWKV's u), broadcastable to (B, L, D).
        head_size: P, the number of channels that share one head's coefficients.
        lag: 1 if the state is read before the current token is written (RWKV), else 0.
        chunk: T, tokens of a chunk; None chooses by size. It changes speed and memory, never the result.

    Source:
        Gu & Dao 2023 (arXiv 2312.00752), equations 2a and 2b; the attention form is equation 13 of Ali,
        Zimerman & Wolf 2024 (arXiv 2403.01590).
    """

    a: Tensor | Product
    b: Tensor | Product
    c: Tensor | Product
    skip: Tensor | None = None
    bonus: Tensor | None = None
    head_size: int = 1
    lag: int = 0
    chunk: int | None = None

    mixes_tokens = True
    causal = True
    optional = ("skip", "bonus")

    def __post_init__(self) -> None:
        if self.lag not in (0, 1):
            raise ValueError(f"lag must be 0 or 1, not {self.lag}.")
        if self.chunk is not None and self.chunk < 1:
            raise ValueError(f"chunk must be at least 1 token, not {self.chunk}.")
        torch.broadcast_shapes(*(p.shape for p in self._coefficients))

    @property
    def _coefficients(self) -> tuple[Product, Product, Product]:
        a, b, c = (p if isinstance(p, Product) else Product((p,)) for p in (self.a, self.b, self.c))
        return a, b, c

    @property
    def heads(self) -> int:
        """H, the number of heads."""
        return max(p.shape[2] for p in self._coefficients)

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """Output and input channels."""
        return self.heads * self.head_size, self.heads * self.head_size

    def channels(self, index: Index) -> Scan:
        """Return the scan of these channels; whole heads stay shared, parts of heads become their own."""
        skip, bonus = (None if s is None else _take(s, index) for s in (self.skip, self.bonus))
        P = self.head_size
        channel = torch.arange(self.heads * P)[index.cpu() if isinstance(index, Tensor) else index]
        if self.heads == 1:
            return replace(self, skip=skip, bonus=bonus, head_size=len(channel))
        first = channel[::P]
        whole = torch.equal(channel, (first.unsqueeze(1) // P * P + torch.arange(P)).flatten())
        head = (first if whole else channel) // P
        a, b, c = (p.map(lambda f: f[:, :, head.to(f.device)], axis=2) for p in self._coefficients)
        return replace(self, a=a, b=b, c=c, skip=skip, bonus=bonus, head_size=P if whole else 1)

    def after(self, start: int) -> Scan:
        """Return the scan from token ``start`` on, with no state before it."""
        a, b, c = (p.map(lambda f: f[:, start:], axis=1) for p in self._coefficients)
        skip, bonus = (None if s is None else _since(s, start) for s in (self.skip, self.bonus))
        return replace(self, a=a, b=b, c=c, skip=skip, bonus=bonus)

    def apply(self, x: Tensor, bias: bool = False) -> Tensor:
        """Return the recurrence's output for ``x`` (..., B, L, D).

        Cost: O(L·D·N) time for one right-hand side; memory for the states of one chunk.
        """
        B, L, D = x.shape[-3:]
        H, P = self.heads, self.head_size
        if D != H * P:
            raise ValueError(f"The scan has {H} heads of {P} channels, but the input has {D} channels.")
        columns = x.reshape(-1, B, L, H, P).permute(1, 2, 3, 4, 0)  # (B, L, H, P, J)
        y = self._recur(columns.flatten(3)).view(columns.shape).permute(4, 0, 1, 2, 3).reshape(x.shape)
        for direct in (self.bonus, self.skip):
            if direct is not None:
                y = y + direct * x
        return y

    def adjoint(self, u: Tensor) -> Tensor:
        """Return the transposed recurrence's output: the same scan from the last token to the first."""
        return self._reversed().apply(u.flip(-2)).flip(-2)

    def _reversed(self) -> Scan:
        """Return the scan whose attention is this one's, transposed and read backwards in time."""
        a, b, c = (p.map(lambda f: f.flip(1), axis=1) for p in self._coefficients)
        if self.lag == 0:  # the decay between two neighbours belongs to the later one, which is now the earlier
            a = a.map(lambda f: f.roll(1, 1), axis=1)
        skip, bonus = (s if s is None or s.dim() < 2 else s.flip(-2) for s in (self.skip, self.bonus))
        return replace(self, a=a, b=c, c=b, skip=skip, bonus=bonus)

    def _recur(self, x: Tensor) -> Tensor:
        """Run the recurrence on ``x`` (B, L, H, P): a loop over chunks that hands on the state."""
        B, L, H, P = x.shape
        a, b, c = self._coefficients
        N = max(p.shape[3] for p in (a, b, c))
        step, T = (_by_states, _STATES // (B * H * N)) if P == 1 else (_by_matrix, 64 if a.shape[3] == 1 else 16)
        T = self.chunk or min(max(T, 16), L)
        h = x.new_zeros(B, H, N, P)
        outputs = []
        for start in range(0, L, T):
            stop = min(start + T, L)
            at, bt, ct = (p.tokens(start, stop) for p in (a, b, c))
            y, h = step(at, bt, ct, x[:, start:stop], h, self.lag)
            outputs.append(y)
        return torch.cat(outputs, dim=1)


_STATES = 2**18
"""Number of states of a chunk that fit a processor's cache."""


def _by_states(a: Tensor, b: Tensor, c: Tensor, x: Tensor, h: Tensor, lag: int) -> tuple[Tensor, Tensor]:
    """Run one chunk through all its states: best where few channels share a state's decay.

    Args:
        a: Decays (B or 1, T, H or 1, N or 1).
        b: Weights of the input, likewise.
        c: Weights of the state, likewise.
        x: (B, T, H, P).
        h: (B, H, N, P), the state before the chunk.
        lag: As in :class:`Scan`.

    Returns:
        Output (B, T, H, P) and the state after the chunk (B, H, N, P). Cost: O(T·H·N·P).
    """
    a, writes = a.unsqueeze(-1), (b.unsqueeze(-1) * x.unsqueeze(-2)).expand(-1, -1, *h.shape[1:])
    first = writes[:, :1] + a[:, :1] * h.unsqueeze(1)
    states = prefix(a, torch.cat([first, writes[:, 1:]], dim=1))
    read = torch.cat([h.unsqueeze(1), states[:, :-1]], dim=1) if lag else states
    return (c.unsqueeze(-1) * read).sum(-2), states[:, -1]


def prefix(a: Tensor, v: Tensor) -> Tensor:
    """Return all states of ``h_t = a_t h_{t-1} + v_t``, ``h_{-1} = 0``, along axis 1.

    Neighbours are merged into pairs, the sequence of pairs, half as long, is solved likewise, and the
    states between the pairs follow in one step. Cost: O(T) work in O(log T) steps.

    Args:
        a: Decays, broadcastable to ``v``, of full length T along axis 1; the first one is not used.
        v: What each token writes, (B, T, ...).

    Returns:
        The states, shaped as ``v``.
    """
    T = v.shape[1]
    if T == 1:
        return v
    odd = prefix(a[:, 1::2] * a[:, : T - 1 : 2], v[:, 1::2] + a[:, 1::2] * v[:, : T - 1 : 2])
    h = torch.empty_like(v)
    h[:, 0] = v[:, 0]
    h[:, 1::2] = odd
    h[:, 2::2] = v[:, 2::2] + a[:, 2::2] * odd[:, : (T - 1) // 2]
    return h


def _by_matrix(a: Tensor, b: Tensor, c: Tensor, x: Tensor, h: Tensor, lag: int) -> tuple[Tensor, Tensor]:
    """Run one chunk through its (T, T) attention: best where many channels or columns share it.

    Arguments and results are those of :func:`_by_states`. Cost: O(T²·H·(N + P) + T·H·N·P).
    """
    T = x.shape[1]
    later = torch.ones(T, T, dtype=torch.bool, device=x.device).tril(-1)[..., None, None]
    same = torch.eye(T, dtype=torch.bool, device=x.device)[..., None, None]
    # between[t, s] is the decay until t of what s wrote, since[t] that of the state before the chunk
    between = torch.where(later, a.unsqueeze(2), 1).cumprod(1) * (later | same)
    since = a.cumprod(1)
    carried = since[:, -1].unsqueeze(-1) * h + torch.einsum("bshn,bshp->bhnp", between[:, -1] * b, x)
    if lag:  # the state is read one token earlier
        between = torch.cat([torch.zeros_like(between[:, :1]), between[:, :-1]], dim=1)
        since = torch.cat([torch.ones_like(since[:, :1]), since[:, :-1]], dim=1)
    if a.shape[3] == 1:
        alpha = torch.einsum("bthn,bshn->btsh", c, b) * between.squeeze(-1)
    else:
        alpha = (c.unsqueeze(2) * between * b.unsqueeze(1)).sum(-1)
    y = torch.einsum("btsh,bshp->bthp", alpha, x) + torch.einsum("bthn,bhnp->bthp", c * since, h)
    return y, carried


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
        """Whether any factor does."""
        return any(operator.mixes_tokens for operator in self.factors.values())

    @property
    def mixes_channels(self) -> bool:  # type: ignore[override]
        """Whether any factor does."""
        return any(operator.mixes_channels for operator in self.factors.values())

    @property
    def causal(self) -> bool:  # type: ignore[override]
        """Whether all factors are."""
        return all(operator.causal for operator in self.factors.values())

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """Output channels of the first factor and input channels of the last that have a number."""
        outs = [operator.sizes[0] for operator in self.factors.values() if operator.sizes[0] is not None]
        ins = [operator.sizes[1] for operator in self.factors.values() if operator.sizes[1] is not None]
        return (outs[0] if outs else None), (ins[-1] if ins else None)

    @property
    def terms(self) -> tuple[str, ...]:
        """Everything that :meth:`without` can leave out: channelwise factors and terms of any factor."""
        names = [name for name, operator in self.factors.items() if not operator.mixes_channels]
        parts = [term for operator in self.factors.values() for term in operator.terms]
        return tuple(dict.fromkeys([*names, *parts]))

    def apply(self, x: Tensor, bias: bool = False) -> Tensor:
        """Return the product's output for ``x``; with ``bias`` all constant terms are carried through."""
        for operator in reversed(list(self.factors.values())):
            x = operator.apply(x, bias)
        return x

    def adjoint(self, u: Tensor) -> Tensor:
        """Return the transposed product's output: the transposed factors from left to right."""
        for operator in self.factors.values():
            u = operator.adjoint(u)
        return u

    def without(self, *terms: str) -> Chain:
        """Return the chain with these factors, or these terms of any factor, left out.

        ``chain.without("conv", "skip", "bias")`` drops the convolution, the scan's skip and every bias.

        Raises:
            ValueError: If nothing in the chain has that name, or it is a projection.
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

    def channels(self, index: Index) -> Chain:
        """Return the chain on these channels alone."""
        return Chain({name: operator.channels(index) for name, operator in self.factors.items()})

    def after(self, start: int) -> Chain:
        """Return the chain on the tokens from ``start`` on, for inputs that are 0 before."""
        return Chain({name: operator.after(start) for name, operator in self.factors.items()})

    def split(self, core: str | None = None) -> tuple[Chain, Chain, Chain]:
        """Cut the chain into output side, core and input side; their product is the chain.

        Args:
            core: Name of the one factor to take as the core. None takes all that is channelwise around the
                factors that mix tokens: the unified implicit attention.

        Raises:
            ValueError: If no factor mixes tokens, or channels are mixed between two that do.
        """
        names, operators = list(self.factors), list(self.factors.values())
        if core is not None:
            if core not in self.factors:
                raise ValueError(f"The chain has no factor {core!r}; it has {names}.")
            start = stop = names.index(core)
        else:
            mixing = [k for k, operator in enumerate(operators) if operator.mixes_tokens]
            if not mixing:
                raise ValueError(f"No factor of {names} mixes tokens, so there is no attention to speak of.")
            start, stop = mixing[0], mixing[-1]
            while start > 0 and not operators[start - 1].mixes_channels:
                start -= 1
            while stop + 1 < len(operators) and not operators[stop + 1].mixes_channels:
                stop += 1
        if any(operator.mixes_channels for operator in operators[start : stop + 1]):
            raise ValueError(f"Channels are mixed between the token mixers of {names}: no attention per channel.")
        cuts = (names[:start], names[start : stop + 1], names[stop + 1 :])
        output, inner, into = (Chain({name: self.factors[name] for name in cut}) for cut in cuts)
        return output, inner, into
