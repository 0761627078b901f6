"""Channels of a gated MLP that some layers have beside their mixer, taken into the factors of the mixer."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.operators import CausalConv


class Bypass(NamedTuple):
    """M channels beside the heads of a mixer, as further heads whose weights are 0: their values pass by the skip.

    Each method returns its argument if there are no such channels.
    """

    M: int
    """Number of channels beside the mixer."""
    P: int
    """Channels of a head of the mixer."""
    first: bool
    """Whether they stand before the channels of the mixer, instead of after them."""

    @property
    def head_size(self) -> int:
        """Channels of a head, such that the mixer and the channels beside it are both made of whole heads."""
        return math.gcd(self.P, self.M)

    def heads(self, t: Tensor, dim: int = -1) -> Tensor:
        """Extend an axis of the mixer's heads to all heads, with 0 for those beside the mixer.

        Args:
            t: Tensor with H entries along ``dim``.
            dim: The axis, negative.

        Returns:
            The tensor with (D + M) / head_size entries along ``dim``.
        """
        if not self.M:
            return t
        t = t.repeat_interleave(self.P // self.head_size, dim)
        return F.pad(t, (0, 0) * (-1 - dim) + self._sides(self.M // self.head_size))

    def channels(self, t: Tensor, value: float) -> Tensor:
        """Extend the last axis from the D channels of the mixer to all channels.

        Args:
            t: (..., D).
            value: Entry of the channels beside the mixer.

        Returns:
            (..., D + M).
        """
        return F.pad(t, self._sides(self.M), value=value) if self.M else t

    def own(self, t: Tensor) -> Tensor:
        """Return the D channels of the mixer, (..., D), out of all channels (..., D + M)."""
        if not self.M:
            return t
        return t[..., self.M :] if self.first else t[..., : -self.M]

    def convolution(self, conv: CausalConv) -> CausalConv:
        """Extend a convolution of the mixer's channels by the identity of the channels beside it.

        Args:
            conv: Convolution of D channels.

        Returns:
            Convolution of D + M channels.
        """
        if not self.M:
            return conv
        identity = F.pad(conv.w.new_ones(self.M, 1), (conv.w.shape[1] - 1, 0))  # (M, K)
        taps = torch.cat([identity, conv.w] if self.first else [conv.w, identity])
        return CausalConv(taps, None if conv.bias is None else self.channels(conv.bias, 0.0))

    def _sides(self, size: int) -> tuple[int, int]:
        return (size, 0) if self.first else (0, size)
