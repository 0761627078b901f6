"""Operators without a recurrence: diagonals, convolutions, projections and centring."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from operator import add

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from captum_ssm.operators.base import Index, Operator, flip_tokens, take_channels, tokens_from


@dataclass(frozen=True)
class Diagonal(Operator):
    """Scale every token and channel: ``y = s * x + bias``. A gate, an activation, a norm, a mask.

    Args:
        s: Broadcastable to (B, L, D).
        bias: Constant term, broadcastable to (B, L, D), or None.
    """

    s: Tensor
    bias: Tensor | None = None

    causal = anticausal = True
    optional = ("bias",)

    def apply(self, x: Tensor, bias: bool = False) -> Tensor:
        """Return ``s * x``. Cost: O(L·D)."""
        y = self.s * x
        return y + self.bias if bias and self.bias is not None else y

    def adjoint(self, u: Tensor) -> Tensor:
        """Return ``s * u``: a diagonal is its own transpose. Cost: O(L·D)."""
        return self.s * u

    def diagonal(self, like: Tensor) -> Tensor:
        """Return ``s``, broadcastable to (B, L, D)."""
        return self.s

    def channels(self, index: Index) -> Diagonal:
        """Return the diagonal on a selection of channels; a scale shared by all channels stays shared."""
        return self._map(lambda t: take_channels(t, index))

    def flipped(self) -> Diagonal:
        """Return the diagonal of the flipped sequence."""
        return self._map(flip_tokens)

    def after(self, start: int) -> Diagonal:
        """Return the diagonal on the tokens from ``start`` on."""
        return self._map(lambda t: tokens_from(t, start))

    def _map(self, function: Callable[[Tensor], Tensor]) -> Diagonal:
        """Return the diagonal with a function of its scale and of its constant term."""
        return Diagonal(function(self.s), None if self.bias is None else function(self.bias))

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
        """Return the convolution of ``x`` (..., B, L, D). Cost: O(L·D·K)."""
        y = causal_convolution(x, self.w)
        return y + self.bias if bias and self.bias is not None else y

    def adjoint(self, u: Tensor) -> Tensor:
        """Return the correlation of ``u`` (..., B, L, D) with the taps: it reads the future. Cost: O(L·D·K)."""
        x = self.w[:, -1] * u  # (..., B, L, D)
        for lag in range(1, min(self.w.shape[1], u.shape[-2])):
            x[..., :-lag, :] += self.w[:, -1 - lag] * u[..., lag:, :]
        return x

    def band(self, x: Tensor) -> Tensor:
        """Return each tap's part of the output, (K, B, L, D): entry ``[k, :, t]`` comes from token t - k."""
        K, L = self.w.shape[1], x.shape[-2]
        delayed = [F.pad(x, (0, 0, k, 0))[..., :L, :] for k in range(K)]  # by k tokens, each (B, L, D)
        return torch.stack([self.w[:, K - 1 - k] * x_k for k, x_k in enumerate(delayed)])

    def diagonal(self, like: Tensor) -> Tensor:
        """Return the taps that weigh the current token, (D,)."""
        return self.w[:, -1]

    def channels(self, index: Index) -> CausalConv:
        """Return the convolution of a selection of channels."""
        return CausalConv(self.w[index], None if self.bias is None else self.bias[index])

    def after(self, start: int) -> CausalConv:
        """Return the convolution itself: its taps are the same for every token."""
        return self

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """Output and input channels."""
        return self.w.shape[0], self.w.shape[0]


@dataclass(frozen=True)
class Conv(Operator):
    """Depthwise convolution that also reads tokens ahead: ``y_t = sum_k w_k x_{t + ahead - (K-1) + k} + bias``.

    Args:
        w: (D, K), taps in torch's order: ``w[:, K-1-ahead]`` weighs the current token.
        ahead: Number of later tokens that are read, 0 to K - 1.
        bias: (D,) or None.
    """

    w: Tensor
    ahead: int
    bias: Tensor | None = None

    mixes_tokens = True
    optional = ("bias",)

    def apply(self, x: Tensor, bias: bool = False) -> Tensor:
        """Return the convolution of ``x`` (..., B, L, D). Cost: O(L·D·K)."""
        later = F.pad(x, (0, 0, 0, self.ahead))  # (..., B, L + ahead, D)
        y = causal_convolution(later, self.w)[..., self.ahead :, :]
        return y + self.bias if bias and self.bias is not None else y

    def adjoint(self, u: Tensor) -> Tensor:
        """Return the convolution of ``u`` (..., B, L, D) with the taps in reverse order. Cost: O(L·D·K)."""
        return self._reversed().apply(u)

    def flipped(self) -> Conv:
        """Return the convolution with the taps in reverse order."""
        return self._reversed()

    def diagonal(self, like: Tensor) -> Tensor:
        """Return the taps that weigh the current token, (D,)."""
        return self.w[:, -1 - self.ahead]

    def channels(self, index: Index) -> Conv:
        """Return the convolution of a selection of channels."""
        return Conv(self.w[index], self.ahead, None if self.bias is None else self.bias[index])

    def _reversed(self) -> Conv:
        """Return the convolution that reads as many tokens ahead as this one reads before."""
        return Conv(self.w.flip(1), self.w.shape[1] - 1 - self.ahead, self.bias)

    @property
    def sizes(self) -> tuple[int | None, int | None]:
        """Output and input channels."""
        return self.w.shape[0], self.w.shape[0]


def causal_convolution(x: Tensor, w: Tensor) -> Tensor:
    """Convolve ``x`` with the taps: a separate function, so that a rule of relevance can replace it.

    Args:
        x: (..., L, D).
        w: (D, K); ``w[:, K-1]`` weighs the current token.

    Returns:
        (..., L, D). Cost: O(L·D·K).
    """
    if has_torch_function((x, w)):
        return handle_torch_function(causal_convolution, (x, w), x, w)
    (_, K), L = w.shape, x.shape[-2]
    padded = F.pad(x, (0, 0, K - 1, 0))  # (..., L + K - 1, D)
    return reduce(add, (w[:, k] * padded[..., k : k + L, :] for k in reversed(range(K))))


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
    causal = anticausal = True
    optional = ("bias",)

    def apply(self, x: Tensor, bias: bool = False) -> Tensor:
        """Return ``W x`` for every token. Cost: O(L·D·E)."""
        return F.linear(x, self.W, self.bias if bias else None)

    def adjoint(self, u: Tensor) -> Tensor:
        """Return ``W^T u`` for every token. Cost: O(L·D·E)."""
        return u @ self.W

    def flipped(self) -> Projection:
        """Return the projection itself: it is the same for every token."""
        return self

    def after(self, start: int) -> Projection:
        """Return the projection itself: it is the same for every token."""
        return self

    @property
    def sizes(self) -> tuple[int, int]:
        """Output and input channels."""
        return self.W.shape[0], self.W.shape[1]


@dataclass(frozen=True)
class Centre(Operator):
    """Subtract the mean over the channels of each group: the part of a layer norm that is not a diagonal.

    Args:
        size: Channels of a group.
    """

    size: int

    mixes_channels = True
    causal = anticausal = True

    def apply(self, x: Tensor, bias: bool = False) -> Tensor:
        """Return ``x`` minus its mean over each group. Cost: O(L·D)."""
        groups = x.unflatten(-1, (-1, self.size))  # (..., B, L, groups, size)
        return (groups - groups.mean(-1, keepdim=True)).flatten(-2)

    def adjoint(self, u: Tensor) -> Tensor:
        """Return ``u`` minus its mean over each group: the map is its own transpose. Cost: O(L·D)."""
        return self.apply(u)

    def flipped(self) -> Centre:
        """Return the operator itself: it is the same for every token."""
        return self

    def after(self, start: int) -> Centre:
        """Return the operator itself: it is the same for every token."""
        return self
