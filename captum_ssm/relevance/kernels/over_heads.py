"""A recurrence applied to values whose heads are an axis of their own."""

from __future__ import annotations

from torch import Tensor

from captum_ssm.operators import Operator


def over_heads(operator: Operator, v: Tensor) -> Tensor:
    """Apply an operator to the channels of all heads.

    Args:
        operator: The operator of H·P channels.
        v: Values (B, L, H, P).

    Returns:
        (B, L, H, P).
    """
    return operator.apply(v.flatten(2)).unflatten(2, v.shape[2:])
