"""The rule of differences to a reference."""

from __future__ import annotations

import torch
from torch import Tensor

from captum_ssm.operators import Operator, Recurrence
from captum_ssm.relevance.attention import Side, difference_of_attentions
from captum_ssm.relevance.averages import TracedAverages
from captum_ssm.relevance.call import Call, references, substitute, values
from captum_ssm.relevance.exponentials import difference_of_logsumexp, difference_of_softmax
from captum_ssm.relevance.functions import Origin
from captum_ssm.relevance.multipliers import with_multiplier
from captum_ssm.relevance.recurrence import difference_of_scans
from captum_ssm.relevance.rule import Rule
from captum_ssm.relevance.traced import Traced

VALUE_SHARE = 0.75
"""The part that a value has of the change that it makes together with the gate that reads it, as recommended in
``benchmarks/RESULTS.md``."""


class Difference(Rule):
    """Compare with a reference: at a product each factor's change times a mean of the other.

    ``ab - a'b' = (p b + q b') (a - a') + (q a + p a') (b - b')`` with ``p + q = 1``: of the change that the two make
    together, ``(a - a') (b - b')``, p goes to a and q to b. A half each is the Shapley value of two factors. At an
    elementwise function the multiplier is the difference quotient ``(f(x) - f(x')) / (x - x')``, DeepLIFT's rescale
    rule.

    Args:
        value_share: p of a value in a product with its reader: with a gate that came out of an activation, with one
            over something, and of a recurrence's state with the coefficient ``c``. All other products share by halves.
    """

    def __init__(self, value_share: float = VALUE_SHARE) -> None:
        super().__init__()
        self.value_share = value_share

    def elementwise(self, call: Call) -> Tensor:
        """Return the function with the difference quotient as its multiplier."""
        (x,) = call.traced
        value, reference = x.value.detach(), x.reference
        y, z = call.at(value), call.at(reference)
        multiplier = call.slope(value, reference, y, z)
        return self.pair(with_multiplier(x.value, y, multiplier), z, call.row.origin)

    def product(self, call: Call) -> Tensor:
        """Return the product with a mean of the other factor as each factor's multiplier."""
        x, y = call.traced
        p = self._share(x.origin, y.origin)
        a, b, r, s = x.value.detach(), y.value.detach(), x.reference, y.reference
        return self._with_means(call, torch.lerp(s, b, p), torch.lerp(a, r, p))

    def quotient(self, call: Call, denominator: int) -> Tensor:
        """Return a number times one over something with shares that are weighed by the denominators.

        ``a/b - a'/b' = ((a - a') - (q a/b + p a'/b') (b - b')) / (p b + q b')``: the multipliers are bounded where a
        denominator is small.
        """
        x, y = call.traced
        share = self._share(x.origin, y.origin)
        a, b, r, s = x.value.detach(), y.value.detach(), x.reference, y.reference
        if denominator == 1:
            p, q = _weighed_shares(share, 1 - share, b, s)
        else:
            q, p = _weighed_shares(1 - share, share, a, r)
        return self._with_means(call, torch.addcmul(q * s, p, b), torch.addcmul(p * r, q, a))

    def normalized_exponentials(self, x: Traced, axis: int) -> Tensor:
        """Return the softmax with the rules of its exponentials and of the quotient."""
        return self.pair(*difference_of_softmax(x.value, x.reference, axis))

    def log_of_sum(self, x: Traced, axis: int | tuple[int, ...]) -> Tensor:
        """Return the logarithm of the sum with the slopes of ``exp`` and ``log``."""
        return self.pair(*difference_of_logsumexp(x.value, x.reference, axis), "activated")

    def weighted_sums(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sees_earlier: bool, scale: float
    ) -> Tensor:
        """Return softmax attention with the rules of its products and of the softmax."""
        value, reference = (Side(*side((q, k, v))) for side in (values, references))
        of_q, of_k, of_v = (getattr(t, "origin", None) for t in (q, k, v))
        shares = self._share(of_q, of_k), self._share(None, of_v)
        return self.pair(*difference_of_attentions(value, reference, mask, sees_earlier, scale, *shares))

    def averages(self, k: Traced, w: Tensor, bonus: Tensor) -> Operator:
        """Return the averages with the rules of their products, exponentials and quotient."""
        return TracedAverages(k, w, bonus, self.value_share)

    def recurrence(self, scan: Recurrence, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        """Return the recurrence with the rule of products at every product of every step."""
        inputs = substitute((x, factors), lambda pair: pair)  # constants are the same tensors in value and reference
        value, reference = difference_of_scans(scan, values(inputs), references(inputs), self.value_share)
        return self.pair(value, reference)

    def _share(self, first: Origin | None, second: Origin | None) -> float:
        """Return the share of the first of two factors: of a value ``value_share``, of its gate the rest, else a half.

        Args:
            first: Origin of the first factor.
            second: Origin of the second one.
        """
        if (first is None) == (second is None):
            return 0.5
        return self.value_share if first is None else 1 - self.value_share

    def _with_means(self, call: Call, for_x: Tensor, for_y: Tensor) -> Tensor:
        """Return a product of two with these means of the other factor as the multipliers of the first and second."""
        x, y = call.traced
        return self.pair(self.with_means(call, for_x, for_y), call.at(x.reference, y.reference))


def _weighed_shares(p: float, q: float, b: Tensor, s: Tensor) -> tuple[Tensor, Tensor]:
    """Return the shares of a number and of one over something, b with its reference s, that make them a quotient's.

    They are ``p s / (p s + q b)`` and ``q b / (p s + q b)``. Neither is computed as 1 less the other, which would be 0
    or a rounding error where b and s are far apart. They are p and q if the signs of b and s differ.
    """
    alike = b * s > 0
    number, inverse = torch.where(alike, p * s, p), torch.where(alike, q * b, q)
    total = number + inverse
    return number / total, inverse / total
