"""Results that a layer's adapter, its chain and its own code would each compute."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_ssm.operators import Recurrence
from captum_ssm.relevance.call import Call, values
from captum_ssm.relevance.own_projections import OwnProjections


class SharedResults:
    """The results of a layer's operators, each computed once.

    An adapter applies some operators to find its gates, and the chain that it returns applies all of them: twice to the
    same tensors, if the results were not shared.

    Args:
        projections: Those of the layer's own code; None without one.
    """

    def __init__(self, projections: OwnProjections | None = None) -> None:
        self.projections = projections or OwnProjections()
        self._results: dict[Any, Any] = {}
        self._recurrence: tuple[tuple[Tensor, ...], Tensor, Tensor] | None = None

    def clear(self) -> None:
        """Forget all results: one of them, or an argument, is about to be written into."""
        self._results, self._recurrence = {}, None

    def of_call(self, call: Call, compute: Callable[[Call], Any]) -> Any:
        """Return the result of a call, computed if the function was not called with the same tensors before."""
        key = (call.function, call.args)
        if key not in self._results:
            self._results[key] = compute(call)
        return self._results[key]

    def of_recurrence(
        self,
        scan: Recurrence,
        x: Tensor,
        factors: tuple[Tensor, ...],
        compute: Callable[[Recurrence, Tensor, tuple[Tensor, ...]], Tensor],
    ) -> Tensor:
        """Return the output of a recurrence, computed unless the last one had the same factors and an equal input.

        The input is compared by value, since an adapter computes it anew, to find the scale of a norm behind it.

        Args:
            scan: The recurrence.
            x: Its input (B, L, H, P).
            factors: Factors of its coefficients.
            compute: Computes the output.
        """
        if self._recurrence is not None:
            last_factors, last_x, y = self._recurrence
            same = len(last_factors) == len(factors) and all(f is g for f, g in zip(last_factors, factors))
            if same and last_x.shape == x.shape and torch.equal(values(last_x), values(x)):
                return y
        y = compute(scan, x, factors)
        self._recurrence = (factors, x, y)
        return y
