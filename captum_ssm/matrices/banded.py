"""The fused matrices of a core that reads a few tokens back, such as a convolution between gates.

Its matrices are banded: their entries (t, t - lag) are not 0 for a few lags alone, so that each lag is one diagonal.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor

from captum_ssm.matrices.entrywise import Entrywise
from captum_ssm.operators import CausalConv, Chain, Operator


@dataclass(frozen=True)
class Banded:
    """The entries ``A^d_ij v_jd`` of a core, for the lags i - j at which they are not 0.

    Args:
        lags: By lag, (B, L, D): the entry of token i = t and token j = t - lag at t.
    """

    lags: Mapping[int, Tensor]

    @classmethod
    def of(cls, core: Operator, v: Tensor) -> Banded | None:
        """Return the entries of a core of convolutions and tokenwise factors, or None if it has others.

        Args:
            core: Channelwise, or with projections among its factors.
            v: Input-side weights (B, L, input channels).
        """
        lags: Mapping[int, Tensor] = {0: v}
        for leaf in reversed(core.leaves() if isinstance(core, Chain) else [core]):
            if leaf.mixes_tokens and not isinstance(leaf, CausalConv):
                return None
            lags = convolved(leaf, lags) if isinstance(leaf, CausalConv) else tokenwise(leaf, lags)
        return cls(lags)

    def fused(self, u: Tensor, entrywise: Entrywise) -> Tensor:
        """Return ``sum_d f(u_id A^d_ij v_jd)``.

        Args:
            u: Output-side weights (M, B, L, D).
            entrywise: f.

        Returns:
            (M, B, L, L). Cost: O(L·D) for each lag.
        """
        fused = u.new_zeros(*u.shape[:-1], u.shape[-2])
        for lag, entries in self.lags.items():
            if lag < u.shape[-2]:
                fused.diagonal(-lag, -2, -1).copy_(entrywise(u * entries)[..., lag:, :].sum(-1))
        return fused

    def lengths(self, output: Chain) -> Tensor:
        """Return the Euclidean length of each token's contribution to each other token, ``|output(A_ij v_j)|``.

        Args:
            output: The factors after the core, from channels to the model's width.

        Returns:
            (B, L, L). Cost: one pass of the output for each lag.
        """
        B, L, _ = self.lags[0].shape
        lengths = self.lags[0].new_zeros(B, L, L)
        for lag, entries in self.lags.items():
            if lag < L:
                lengths.diagonal(-lag, -2, -1).copy_(output.apply(entries).norm(dim=-1)[:, lag:])
        return lengths


def tokenwise(operator: Operator, lags: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Return the product of an operator that mixes no tokens and a banded matrix, (B, L, D) by lag."""
    return {lag: operator.apply(weight) for lag, weight in lags.items()}


def convolved(conv: CausalConv, lags: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Return the product of a convolution and a banded matrix, (B, L, D) by lag."""
    product: dict[int, Tensor] = {}
    for lag, weight in lags.items():
        for tap, part in enumerate(conv.band(weight)):
            product[lag + tap] = product[lag + tap] + part if lag + tap in product else part
    return product
