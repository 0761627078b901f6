"""One input of a model with its reference: how it enters the run, and the relevance that it gets."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from captum_ssm.layers.call import at_least_float32
from captum_ssm.network.lookups import Lookups, Table
from captum_ssm.network.reference import Reference
from captum_ssm.relevance.rule import Rule
from captum_ssm.relevance.traced import Traced


@dataclass
class ExplainedInput:
    """One input of a model, and the beginnings of its run: the input itself, or all vectors that its ids become.

    Args:
        value: Token ids (B, L) or of any other shape; embeddings (B, L, E), or any floating-point tensor.
        reference: Its reference.
        rule: The rule of the run.
    """

    value: Tensor
    reference: Reference
    rule: Rule
    _leaves: list[_Leaf] = field(default_factory=list, init=False)
    _tables: set[Table] = field(default_factory=set, init=False)

    def enter(self) -> Tensor:
        """Return the input that the model runs on: a traced tensor, or ids whose lookups give traced tensors."""
        if self.value.is_floating_point():
            return self._start(self.value, None, None)
        decisions = self.rule.changed_decisions
        return Lookups(self.value, self.reference.ids, self._start, decisions=decisions, found=self._tables).ids

    def plain_reference(self) -> Tensor:
        """Return the reference as the model itself can run on it; after :meth:`enter` and the run on that."""
        if self.value.is_floating_point():
            return self.reference.vectors(self.value).to(self.value)
        if self.reference.ids is not None:
            return self.reference.ids
        return Lookups(self.value, None, self._plain_vectors, self._tables).ids

    @property
    def leaves(self) -> list[Traced]:
        """The beginnings of the run."""
        return [leaf.vectors for leaf in self._leaves]

    def relevance(self, of_leaves: Iterator[Tensor]) -> Tensor:
        """Return the relevance of the input: in its shape, or (..., components) for ids of shape (...).

        Args:
            of_leaves: The relevance of all beginnings; as many are taken as this input has.
        """
        relevances = [leaf.by_token(next(of_leaves), self.value) for leaf in self._leaves]
        if not relevances:
            shape = self.value.shape if self.value.is_floating_point() else (*self.value.shape, 1)
            return torch.zeros(shape, device=self.value.device)
        return relevances[0] if self.value.is_floating_point() else _joined(relevances)

    def _start(self, value: Tensor, looked_up: Tensor | None, tokens: Tensor | None) -> Traced:
        """Return vectors and their reference as a traced tensor, which the model may change in place.

        Args:
            value: The input itself, or vectors of ids, see :data:`~captum_ssm.network.lookups.Replacement`.
            looked_up: The reference's vectors, if the reference is a text.
            tokens: The number of the token that each vector belongs to; None if they are in order.
        """
        reference = self.reference.vectors(value, looked_up, tokens)
        wide = at_least_float32(value.detach()).requires_grad_()
        self._leaves.append(_Leaf(Traced.of(wide, reference.to(wide), self.rule), tokens))
        return Traced.of(wide.clone(), reference.to(wide, copy=True), self.rule)

    def _plain_vectors(self, value: Tensor, looked_up: Tensor | None, tokens: Tensor | None) -> Tensor:
        return self.reference.vectors(value, looked_up, tokens).to(value)


@dataclass(frozen=True)
class _Leaf:
    """A beginning of a run.

    Args:
        vectors: The input itself, or vectors of ids, with their reference.
        tokens: The number of the token (n,) that each vector belongs to, negative for none; None if they are in order.
    """

    vectors: Traced
    tokens: Tensor | None

    def by_token(self, relevance: Tensor, ids: Tensor) -> Tensor:
        """Return the relevance of the vectors, at the place of their tokens: (..., E) for ids of shape (...)."""
        if self.tokens is None:
            return relevance
        known = self.tokens >= 0
        total = relevance.new_zeros(ids.numel(), relevance.shape[-1])
        return total.index_add(0, self.tokens[known], relevance[known]).reshape(*ids.shape, -1)


def _joined(relevances: Sequence[Tensor]) -> Tensor:
    """Return the relevance of all vectors (..., components): the sum of those of one width, beside all others."""
    widths = dict.fromkeys(r.shape[-1] for r in relevances)
    return torch.cat([torch.stack([r for r in relevances if r.shape[-1] == width]).sum(0) for width in widths], -1)
