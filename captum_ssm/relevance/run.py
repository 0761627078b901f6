"""The run of one explanation by relevance: forward with a reference, backward, and the sum that must come out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_ssm.errors import FidelityError, InvalidInputError
from captum_ssm.layers.call import LayerCall, at_least_float32
from captum_ssm.layers.fidelity import check_fidelity, decompose
from captum_ssm.network.forward import run_model
from captum_ssm.network.inputs import token_mask
from captum_ssm.network.reference import Reference, replaced_embeddings
from captum_ssm.relevance.difference import VALUE_SHARE, Difference
from captum_ssm.relevance.follow import follow
from captum_ssm.relevance.frozen import Frozen, GateRule
from captum_ssm.relevance.rule import Rule
from captum_ssm.relevance.traced import Traced

COMPLETENESS = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 1e-3, torch.float16: 1e-3}
"""Allowed error of the sum by the model's type, relative to the sum of the absolute relevances."""


@dataclass(frozen=True)
class Options:
    """The options of a relevance method.

    Args:
        gate_rule: Without a reference, the rule of a product with a gate.
        value_share: With a reference, the part of a joint change of value and gate that is the value's.
        separate_skip: Whether the direct paths past the recurrences get a term instead of flowing to the tokens.
        checkpoints: Whether each block is run once more for the gradient instead of being kept.
        tolerance: Allowed relative error of the decomposition; None chooses by the model's type.
    """

    gate_rule: GateRule = "half"
    value_share: float = VALUE_SHARE
    separate_skip: bool = False
    checkpoints: bool = False
    tolerance: float | None = None


@dataclass(frozen=True)
class Explanation:
    """The relevance of some examples, and everything that belongs to its sum.

    Args:
        relevance: Relevance of the embeddings (B, L, E) or pixels (B, C, H, W), or of a probed tensor.
        terms: Relevance that belongs to no token by name, each (B,).
        delta: The sum of all relevance and terms less the difference that they explain, (B,).
        completeness: The largest error of that sum, relative to the sum of the absolute relevances.
        decisions: Names of the functions whose decision the reference would have made otherwise.
        fidelity: Relative error of every layer's decomposition by layer name.
    """

    relevance: Tensor
    terms: dict[str, Tensor]
    delta: Tensor
    completeness: float
    decisions: set[str]
    fidelity: dict[str, float]

    @staticmethod
    def mean(explanations: Sequence[Explanation]) -> Explanation:
        """Return the mean over several references of the same examples."""
        return Explanation._merged(explanations, lambda tensors: torch.stack(tensors).mean(0))

    @staticmethod
    def joined(explanations: Sequence[Explanation]) -> Explanation:
        """Return one explanation of the examples of several batches."""
        return Explanation._merged(explanations, torch.cat)

    @staticmethod
    def _merged(parts: Sequence[Explanation], merge: Callable[[list[Tensor]], Tensor]) -> Explanation:
        names = dict.fromkeys(name for part in parts for name in part.terms)
        return Explanation(
            merge([part.relevance for part in parts]),
            {name: merge([part.terms.get(name, torch.zeros_like(part.delta)) for part in parts]) for name in names},
            merge([part.delta for part in parts]),
            max(part.completeness for part in parts),
            set[str]().union(*(part.decisions for part in parts)),
            {name: max(part.fidelity[name] for part in parts) for name in parts[0].fidelity},
        )


class Probe:
    """Collects the tensors inside a model whose relevance is wanted instead of that of the embeddings.

    Attributes:
        tensors: The tensors of one run, in the order in which the model had them.
    """

    def __init__(self) -> None:
        self.tensors: list[Tensor] = []

    def attach(self, hooks: ExitStack) -> None:
        """Watch the model until ``hooks`` are closed."""

    def on_factor(self, layer: str, factor: str, x: Tensor) -> None:
        """Note the input ``x`` (B, L, channels) of a factor of a mixer's chain.

        Args:
            layer: Dotted name of the mixer.
            factor: Name of the factor.
            x: Its input.
        """

    def select(self, relevances: Sequence[Tensor]) -> Tensor:
        """Return the one relevance of those of the traced tensors."""
        return relevances[0]


@dataclass
class Run:
    """One forward and one backward pass over some examples, with a reference or with frozen gates.

    Args:
        model: The model that holds the mixers.
        forward_func: The model, or a callable that runs it.
        score: From the model's output to the explained score of each example, (B,).
        inputs: Token ids (B, L), embeddings (B, L, E) or images (B, C, H, W).
        args: The additional forward arguments.
        reference: The reference of the inputs; without a baseline the gates are frozen.
        options: The method's options.
        probe: Collects tensors inside the model whose relevance is wanted; None for that of the embeddings.
    """

    model: nn.Module
    forward_func: Callable[..., Any]
    score: Callable[[Tensor], Tensor]
    inputs: Tensor
    args: tuple[Any, ...]
    reference: Reference
    options: Options
    probe: Probe | None = None
    fidelity: dict[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        options = self.options
        self.rule: Rule = Frozen(options.gate_rule) if self._is_frozen else Difference(options.value_share)
        self._leaves: list[Traced] = []
        self._skips: list[Traced] = []

    def explain(self, *, with_delta: bool = False) -> Explanation:
        """Run forward and backward, and add up.

        Args:
            with_delta: Compare the sum with the output that the model itself gives, at the cost of one or two runs of
                the model; else with that of the run.

        Returns:
            The explanation of these examples.

        Raises:
            InvalidInputError: If the score does not depend on the inputs through the model.
            FidelityError: If a layer's decomposition misses the layer's own output, or the relevance does not add up.
            UnsupportedModelError: If the model calls a function that has no rule.
        """
        with torch.enable_grad(), ExitStack() as stack:
            score = self._forward(stack)
            value, reference = score.value.detach(), score.reference
            probed = [t for t in self.probe.tensors if isinstance(t, Traced)] if self.probe is not None else []
            relevances = _relevances(score, [*self._leaves, *self._skips, *probed])
        embedded = _sum_of_widths(relevances[: len(self._leaves)])
        skips = relevances[len(self._leaves) : len(relevances) - len(probed)]
        explanation = self._add_up(embedded, skips, value.reshape(len(embedded)), reference.reshape(len(embedded)))
        if with_delta or self.rule.changed_decisions:
            explanation = self._compared_with_model(explanation, reference.reshape(len(embedded)))
        if self.probe is None or not self.probe.tensors:
            return explanation
        return replace(explanation, relevance=self.probe.select(relevances[len(relevances) - len(probed) :]))

    @property
    def _is_frozen(self) -> bool:
        """Whether there is no reference, so that the gates are frozen."""
        return self.reference.baseline is None

    def _forward(self, stack: ExitStack) -> Traced:
        """Run the model on inputs and reference; ``stack`` holds the hooks until the gradient is there."""
        options, inputs, leaves = self.options, self.inputs, self._leaves
        if inputs.is_floating_point():
            inputs = self._start(inputs, self.reference.embeddings(inputs))
        else:
            stack.enter_context(replaced_embeddings(self.model, inputs, self._start_from_embedding))
        if self.probe is not None:
            self.probe.attach(stack)
        follow_gates = not self._is_frozen or options.gate_rule == "half"
        skips = self._skips if options.separate_skip else None
        on_factor = None if self.probe is None else self.probe.on_factor
        stack.enter_context(follow(self.model, self._check_layer, follow_gates, options.checkpoints, skips, on_factor))
        score = self.score(run_model(self.forward_func, inputs, *self.args))
        if not leaves or not isinstance(score, Traced) or not score.value.requires_grad:
            raise InvalidInputError(
                "The explained score does not depend on the inputs through the model. Check that forward_func runs "
                "this model itself, in this thread, on the inputs as they are, not stacked with other texts in one "
                "batch, and that the target is read from its output."
            )
        if score.value.numel() != len(self.inputs):
            raise InvalidInputError(
                f"forward_func returns {score.value.numel()} score for {len(self.inputs)} examples, but relevance adds "
                "up to the score of each. Return one score for each example, or explain one example at a time."
            )
        return score

    def _start_from_embedding(self, embedding: nn.Module, output: Tensor) -> Traced:
        return self._start(output, self.reference.embeddings(output, embedding))

    def _start(self, value: Tensor, reference: Tensor) -> Traced:
        """Return embeddings and their reference as a traced tensor, which the model may change in place."""
        wide = at_least_float32(value.detach()).requires_grad_()
        self._leaves.append(Traced.of(wide, reference.to(wide), self.rule))
        return Traced.of(wide.clone(), reference.to(wide, copy=True), self.rule)

    def _add_up(self, embedded: Tensor, skips: Sequence[Tensor], value: Tensor, reference: Tensor) -> Explanation:
        """Compare the sum of all relevance with the difference that it explains.

        Args:
            embedded: Relevance of the embeddings, (B, L, E), or pixels.
            skips: Relevance of the direct paths past the recurrences.
            value: F(x), (B,).
            reference: F(x'), or with frozen gates the model's constant term, (B,).

        Returns:
            The explanation, its delta that of the run itself.

        Raises:
            FidelityError: If they differ by more than rounding.
        """
        terms = {"bias": reference} if self._is_frozen else {}
        if self.options.separate_skip:
            terms["skip"] = sum((r.flatten(1).sum(1) for r in skips), torch.zeros_like(value))
        difference = value if self._is_frozen else value - reference
        tokens = embedded.flatten(1)
        missing = tokens.sum(1) + sum(terms.values()) - difference
        scale = tokens.abs().sum(1) + value.abs() + reference.abs()
        error = float((missing.abs() / scale.clamp_min(torch.finfo(scale.dtype).tiny)).max())
        allowed = COMPLETENESS.get(next(self.model.parameters()).dtype, 1e-3)
        if not error <= allowed:
            cause = "code that a rule cannot follow, such as a kernel that is called past torch's functions"
            raise FidelityError("the whole model", error, allowed, cause)
        return Explanation(embedded, terms, missing, error, self.rule.changed_decisions, self.fidelity)

    def _compared_with_model(self, explanation: Explanation, reference: Tensor) -> Explanation:
        """Return the explanation with the delta to the model's own output, and the term of decisions if there are any.

        Args:
            explanation: The explanation.
            reference: F(x') of the run, where the reference follows the input's decisions, (B,).

        Returns:
            The explanation, its delta that to the model.
        """
        tokens, terms = explanation.relevance.flatten(1), explanation.terms
        difference = self._plain_score(self.inputs, None).to(tokens).reshape(len(tokens))
        if not self._is_frozen:
            plain_reference = self._reference_score().to(tokens).reshape(len(tokens))
            if self.rule.changed_decisions:
                terms = {**terms, "decisions": reference - plain_reference}
            difference = difference - plain_reference
        return replace(explanation, terms=terms, delta=tokens.sum(1) + sum(terms.values()) - difference)

    def _reference_score(self) -> Tensor:
        """Return the score that the model itself gives for the reference, (B,)."""
        if self.inputs.is_floating_point():
            return self._plain_score(self.reference.embeddings(self.inputs).to(self.inputs), None)
        return self._plain_score(self.inputs, lambda module, y: self.reference.embeddings(y, module).to(y))

    def _plain_score(self, inputs: Tensor, embedding: Callable[[nn.Module, Tensor], Tensor] | None) -> Tensor:
        """Return the score that the model itself gives, (B,), with other embeddings if they are given."""
        with torch.no_grad(), ExitStack() as stack:
            if embedding is not None:
                stack.enter_context(replaced_embeddings(self.model, inputs, embedding))
            return self.score(run_model(self.forward_func, inputs, *self.args))

    def _check_layer(self, call: LayerCall, y: Tensor | None) -> None:
        """Compare a layer's own output with that of its decomposition, ``y``; None if it ran on another input."""
        call, tolerance = call.detach(), self.options.tolerance
        mask = token_mask(self.forward_func, self.args, [call])
        error = decompose(call, tolerance, mask).error if y is None else check_fidelity(call, y, tolerance, mask)
        self.fidelity[call.name] = error


def _sum_of_widths(relevances: Sequence[Tensor]) -> Tensor:
    """Return the sum of the relevances of several embeddings (B, L, their width), the narrower ones filled with 0."""
    widest = max(relevance.shape[-1] for relevance in relevances)
    return torch.stack([F.pad(relevance, (0, widest - relevance.shape[-1])) for relevance in relevances]).sum(0)


def _relevances(score: Traced, tensors: Sequence[Traced]) -> list[Tensor]:
    """Return the relevance of each tensor: its multiplier times its difference to its reference."""
    multipliers = torch.autograd.grad(score.value.sum(), [t.value for t in tensors], allow_unused=True)
    return [
        torch.zeros_like(t.reference) if multiplier is None else (t.value.detach() - t.reference) * multiplier
        for t, multiplier in zip(tensors, multipliers)
    ]
