"""The rule of frozen gates."""

from __future__ import annotations

from typing import Any, Literal

import torch
from torch import Tensor

from captum_ssm.layers.averages import averages
from captum_ssm.operators import Operator, Recurrence
from captum_ssm.operators.attention import weighted_sums
from captum_ssm.relevance.call import Call, constants, values
from captum_ssm.relevance.multipliers import with_multiplier
from captum_ssm.relevance.recurrence import linear_scan
from captum_ssm.relevance.rule import Rule
from captum_ssm.relevance.traced import Traced

GateRule = Literal["half", "value"]
"""Who gets the relevance of a product with a gate: each factor half of it, or the value all."""


class Frozen(Rule):
    """Hold the gates: the model is then affine in its embeddings, and the reference is its result for 0.

    Up to the first bias that result is 0, in many models throughout, and products with 0 are not computed.

    An elementwise function that is 0 at 0, as an activation is, becomes a gate ``f(x)/x`` on its own input; any other,
    as a sigmoid, an exponential or an inverse root, is a constant. The coefficients of recurrences and the weights of
    attentions are constants.

    Args:
        gates: The rule of a product with a gate: ``"half"`` gives each factor half of it (MambaLRP), ``"value"`` holds
            the factor that came out of an activation. Of two others each gets half.
    """

    def __init__(self, gates: GateRule = "half") -> None:
        super().__init__()
        self.gates = gates

    def elementwise(self, call: Call) -> Tensor:
        """Return the function as a gate on its own input, or as a constant."""
        (x,) = call.traced
        value = x.value.detach()
        y, zero = call.at(value), torch.zeros_like(value)
        if bool((call.at(zero) != 0).any()):
            return y
        gate = call.slope(value, zero, y, zero)
        return self.pair(with_multiplier(x.value, y, gate), gate * x.reference, call.row.origin)

    def product(self, call: Call) -> Tensor:
        """Return the product with each factor's share."""
        x, y = call.traced
        a, b = x.value.detach(), y.value.detach()
        share = 0.5
        if self.gates == "value" and x.origin != y.origin:
            share = float(y.origin is not None)
        for_x, for_y = share * b, (1 - share) * a
        reference = call.at(x.reference, for_x) + call.at(for_y, y.reference)
        return self.pair(self.with_means(call, for_x, for_y), reference)

    def reference_of_linear(self, call: Call, value: Any) -> Any:
        """Return a linear function of the reference, 0 if it is the product of a reference of 0 and a constant."""
        tensors = [t for t in (*call.args, *call.kwargs.values()) if isinstance(t, Tensor)]
        is_product = call.row.kind == "product" and call.row.contraction and len(tensors) == 2
        if is_product and not bool(call.traced[0].reference.any()):
            return torch.zeros_like(value)
        return super().reference_of_linear(call, value)

    def quotient(self, call: Call, denominator: int) -> Tensor:
        """Return the product with each factor's share: one over something is a factor like any other."""
        return self.product(call)

    def recurrence(self, scan: Recurrence, x: Tensor, factors: tuple[Tensor, ...]) -> Tensor:
        """Return the recurrence with constant coefficients."""
        frozen = scan.with_factors(constants(factors))
        if not isinstance(x, Traced):
            return frozen.mix(x)
        return self.pair(*linear_scan(frozen, x.value, x.reference))

    def secant(self, name: str, u: Traced) -> Tensor:
        """Return the gate that an activation puts on its own input, as a constant."""
        return super().secant(name, u.value.detach())  # type: ignore[arg-type]

    def upper_bound(self, x: Traced) -> Tensor:
        """Return the value as a constant."""
        return x.value.detach()

    def normalized_exponentials(self, x: Traced, axis: int) -> Tensor:
        """Return the softmax of the value as a constant."""
        return x.value.detach().softmax(axis)

    def log_of_sum(self, x: Traced, axis: int | tuple[int, ...]) -> Tensor:
        """Return the logarithm of the sum of exponentials of the value as a constant."""
        return x.value.detach().logsumexp(axis, keepdim=True)

    def weighted_sums(
        self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, sees_earlier: bool, scale: float
    ) -> Tensor:
        """Return softmax attention with the weights of the value as constants."""
        q, k = constants((q, k))
        value = weighted_sums(q, k, values(v), mask, sees_earlier, scale)
        if not isinstance(v, Traced):
            return value
        if not bool(v.reference.any()):
            return self.pair(value, torch.zeros_like(value))
        return self.pair(value, weighted_sums(q, k, v.reference, mask, sees_earlier, scale))

    def averages(self, k: Traced, w: Tensor, bonus: Tensor) -> Operator:
        """Return the averages whose weights are those of the value, as constants."""
        return averages(k.value.detach(), w, bonus)
