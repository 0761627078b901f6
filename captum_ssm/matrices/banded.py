"""The fused matrices of a core that reads a few tokens back, such as a convolution between gates.

Its matrices are banded: their entries (t, t - lag) are not 0 for a few lags alone, so that each lag is one diagonal.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from captum_ssm.matrices.entrywise import Entrywise
from captum_ssm.matrices.lengths import OutputLengths
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
        leaves = core.leaves() if isinstance(core, Chain) else [core]
        if not are_banded(leaves):
            return None
        return cls(product(leaves, v))

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
        lengths, of_output = self.lags[0].new_zeros(B, L, L), OutputLengths.of(output, B * L * len(self.lags))
        for lag, entries in self.lags.items():
            if lag < L:
                lengths.diagonal(-lag, -2, -1).copy_(of_output.from_token(0, entries)[:, lag:])
        return lengths


def parts(core: Operator) -> tuple[list[Operator], Operator | None, list[Operator]]:
    """Return the factors after the last one that mixes tokens, that factor, or None, and the factors before it."""
    leaves = core.leaves() if isinstance(core, Chain) else [core]
    at = next((number for number, leaf in enumerate(leaves) if leaf.mixes_tokens), None)
    return (leaves, None, []) if at is None else (leaves[:at], leaves[at], leaves[at + 1 :])


def are_banded(operators: Sequence[Operator]) -> bool:
    """Whether the product of operators reads a few tokens back: all are convolutions or mix no tokens."""
    return all(isinstance(operator, CausalConv) or not operator.mixes_tokens for operator in operators)


def product(operators: Sequence[Operator], v: Tensor) -> dict[int, Tensor]:
    """Return the contributions of single tokens to the output of a product of banded operators.

    Args:
        operators: The operators, the first applied last.
        v: Values (B, L, input channels).

    Returns:
        By lag from 0 on, (B, L, D): what token t - lag contributes to token t.
    """
    lags = {0: v}
    for operator in reversed(operators):
        if isinstance(operator, CausalConv):
            lags = _convolved(operator, lags)
        else:
            lags = {lag: operator.apply(weight) for lag, weight in lags.items()}
    return lags


def _convolved(conv: CausalConv, lags: Mapping[int, Tensor]) -> dict[int, Tensor]:
    """Return the product of a convolution and a banded matrix, (B, L, D) by lag."""
    convolved: dict[int, Tensor] = {}
    for lag, weight in lags.items():
        for tap, part in enumerate(conv.band(weight)):
            convolved[lag + tap] = convolved[lag + tap] + part if lag + tap in convolved else part
    return convolved
