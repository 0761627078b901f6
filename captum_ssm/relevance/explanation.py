"""The relevance of some examples, with all that belongs to its sum."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class Explanation:
    """The relevance of some examples, and everything that belongs to its sum.

    Args:
        relevance: Relevance of each input, in its shape, (..., E) for ids (...); or of each probed tensor.
        terms: Relevance that belongs to no input by name, each (S,): S is B, or 1 if the batch has one score.
        delta: The sum of all relevance and terms less the difference that they explain, (S,).
        completeness: The largest error of that sum, relative to the sum of the absolute relevances.
        decisions: Names of the functions whose decision the reference would have made otherwise.
        fidelity: Relative error of every layer's decomposition by layer name.
        followed: By name of each known layer how it was followed, see :func:`~captum_ssm.relevance.follow.follow`.
        value: F(x), (S,): that of this run, or with ``with_delta`` that of another run of the model.
        reference_value: F(x') as the model itself gives it, (S,); NaN with frozen gates.
    """

    relevance: tuple[Tensor, ...]
    terms: dict[str, Tensor]
    delta: Tensor
    completeness: float
    decisions: set[str]
    fidelity: dict[str, float]
    followed: dict[str, str]
    value: Tensor
    reference_value: Tensor

    @staticmethod
    def mean(explanations: Sequence[Explanation]) -> Explanation:
        """Return the mean over several references of the same examples."""
        return Explanation._merged(explanations, lambda tensors: torch.stack(list(tensors)).mean(0))

    def parts(self, count: int) -> list[Explanation]:
        """Return the explanations of so many equal parts of the examples, one after the other."""
        names, terms = list(self.terms), zip(*(term.chunk(count) for term in self.terms.values()))
        relevance = zip(*(r.chunk(count) for r in self.relevance))
        totals = zip(*(total.chunk(count) for total in (self.delta, self.value, self.reference_value)))
        each = zip(relevance, totals, list(terms) or [()] * count)
        return [
            replace(self, relevance=r, delta=delta, value=value, reference_value=other, terms=dict(zip(names, values)))
            for r, (delta, value, other), values in each
        ]

    @staticmethod
    def joined(explanations: Sequence[Explanation]) -> Explanation:
        """Return one explanation of the examples of several batches."""
        return Explanation._merged(explanations, lambda tensors: torch.cat(list(tensors)))

    @staticmethod
    def _merged(parts: Sequence[Explanation], merge: Callable[[Sequence[Tensor]], Tensor]) -> Explanation:
        names = dict.fromkeys(name for part in parts for name in part.terms)
        layers = dict.fromkeys(name for part in parts for name in part.fidelity)
        return Explanation(
            tuple(map(merge, zip(*(part.relevance for part in parts)))),
            {name: merge([part.terms.get(name, torch.zeros_like(part.delta)) for part in parts]) for name in names},
            merge([part.delta for part in parts]),
            max(part.completeness for part in parts),
            set[str]().union(*(part.decisions for part in parts)),
            {name: max(part.fidelity.get(name, 0.0) for part in parts) for name in layers},
            {name: way for part in parts for name, way in part.followed.items()},
            merge([part.value for part in parts]),
            merge([part.reference_value for part in parts]),
        )
