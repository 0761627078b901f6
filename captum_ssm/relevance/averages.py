"""The rule of relevance for averages with exponential weights, for a value and a reference of any two levels.

Row i of an average is ``y = num / tot``, ``num = sum_j E_j v_j`` and ``tot = sum_j E_j`` with ``E_j = exp(e_j - c)``,
see :func:`captum_ssm.layers.averages.averages`. With one constant c for value and reference, ``S = p tot + q tot'``
(``p + q = 1``, p the share of a value in a product with its reader) and ``z = q y + p y'``, the rules of the quotient,
of the product and of ``exp`` give each ``dF/dy = g`` to the values and keys as::

    v_j: g/S (E_j + E'_j) / 2            k_j: g/S slope_j ((v_j + v'_j) / 2 - z)        of earlier tokens, j < i
    v_j: g/S (p E_j + q E'_j)            k_j: g/S slope_j (q v_j + p v'_j - z)          of the current token, j = i

with ``slope_j = (E_j - E'_j) / (k_j - k'_j)``. The constant cancels in ``E_j / S = exp(e_j - log S)``, which is at most
1/p, and ``E'_j / S`` at most 1/q. So neither side is computed relative to the level of the other, which would leave the
lower one no digits. The sums over i run backwards through a recurrence of the same form as the averages themselves,
with ``-log S_i`` as the keys.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_ssm.layers.averages import before_each
from captum_ssm.layers.log_domain import relative_gates, running_max
from captum_ssm.operators import Operator
from captum_ssm.operators.prefix import prefix
from captum_ssm.relevance.call import references, values
from captum_ssm.relevance.slopes import slope_of_exp
from captum_ssm.relevance.traced import Traced


@dataclass(frozen=True)
class TracedAverages(Operator):
    """The averages of traced values with traced keys.

    Args:
        k: Keys (B, L, D), traced.
        w: Rate of decay (D,), positive.
        bonus: Added to the key of the current token (D,).
        value_share: p, the share of a value in a product with its reader.
    """

    k: Traced
    w: Tensor
    bonus: Tensor
    value_share: float

    mixes_tokens = True
    causal = True

    def apply(self, x: Tensor, bias: bool = False) -> Tensor:
        """Average ``x`` (B, L, D). Cost: O(L·D)."""
        k, r = self.k.value, self.k.reference
        w, bonus = self.w.detach(), self.bonus.detach()
        y, reference = _Difference.apply(  # type: ignore[no-untyped-call]
            k, values(x), r, references(x), w, bonus, self.value_share
        )
        return Traced.of(y, reference, self.k.rule)

    def adjoint(self, u: Tensor) -> Tensor:
        """Refuse: the multipliers are autograd's to find.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError("The averages of traced tensors have multipliers instead of an adjoint.")


class _Difference(torch.autograd.Function):
    """The averages of value and reference, stacked along the batch axis; backwards the multipliers."""

    @staticmethod
    def forward(
        ctx: Any, k: Tensor, v: Tensor, other_k: Tensor, other_v: Tensor, w: Tensor, bonus: Tensor, p: float
    ) -> tuple[Tensor, Tensor]:
        keys, x = torch.cat([k, other_k]), torch.cat([v, other_v])  # (2B, L, D)
        y, log_total = _averages(keys, x, w, bonus)
        ctx.save_for_backward(keys, x, y, log_total, w, bonus)
        ctx.p = p
        value, reference = y.chunk(2)
        ctx.mark_non_differentiable(reference)
        return value.clone(), reference

    @staticmethod
    def backward(ctx: Any, g: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
        keys, x, y, log_total, w, bonus = ctx.saved_tensors
        p, q = ctx.p, 1 - ctx.p
        (k, r), (v, u), (y, z), (value, other) = (t.chunk(2) for t in (keys, x, y, log_total))
        mean = torch.lerp(z, y, q)  # (B, L, D), the z of the equations
        log_S = torch.logaddexp(value + _log(p), other + _log(q))
        later, since = _later_sums(-log_S, torch.stack([g, g * mean], dim=-1), w)
        for_values, for_total = later.unbind(-1)

        e, f = torch.exp(k + since), torch.exp(r + since)  # of later rows
        dv = (e + f) / 2 * for_values
        dk = slope_of_exp(k, r, e, f) * ((v + u) / 2 * for_values - for_total)
        e, f = torch.exp(k + bonus - log_S), torch.exp(r + bonus - log_S)  # of the current row
        dv += torch.lerp(f, e, p) * g
        dk += slope_of_exp(k, r, e, f) * (torch.lerp(u, v, q) - mean) * g
        return dk, dv, None, None, None, None, None


def _averages(k: Tensor, v: Tensor, w: Tensor, bonus: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the averages of values and the logarithms of the sums of their weights.

    Args:
        k: Keys (B, L, D).
        v: Values (B, L, D).
        w: Rate of decay (D,).
        bonus: Added to the key of the current token (D,).

    Returns:
        Both (B, L, D).
    """
    earlier, before = _earlier_sums(k, torch.stack([v, torch.ones_like(v)], dim=-1), w)  # (B, L, D, 2), (B, L, D)
    largest = torch.maximum(before, k + bonus)
    c, now = torch.exp(before - largest), torch.exp(k + bonus - largest)
    number, total = earlier.unbind(-1)
    total = torch.addcmul(now, c, total)
    return (c * number + now * v) / total, largest + total.log()


def _earlier_sums(k: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ``sum_{j < i} exp(k_j - (i - 1 - j) w - m_i) x_j`` for each token i.

    Args:
        k: Keys (B, L, D).
        x: Tensors to be summed (B, L, D, J).
        w: Rate of decay (D,).

    Returns:
        The sums (B, L, D, J), and m (B, L, D), the largest of the exponents.
    """
    m = running_max(-w.expand_as(k), k)
    before = before_each(m, first=-torch.inf)
    a, b = relative_gates(-w, k, m, before)
    return before_each(prefix(a.unsqueeze(-1), b.unsqueeze(-1) * x), first=0.0), before


def _later_sums(k: Tensor, x: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """Compute ``sum_{i > j} exp(k_i - (i - 1 - j) w - m_j) x_i`` for each token j, see :func:`_earlier_sums`."""
    sums, largest = _earlier_sums(k.flip(1), x.flip(1), w)
    return sums.flip(1), largest.flip(1)


def _log(share: float) -> float:
    """Compute the logarithm, -infinity of 0."""
    return math.log(share) if share else -math.inf
