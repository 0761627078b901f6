"""The run of one explanation by relevance: forward with a reference, backward, and the sum that must come out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import CheckpointError

from captum_ssm.errors import CompletenessError, InvalidInputError, ModelStateError, UnsupportedModelError, is_own
from captum_ssm.layers.call import LayerCall, at_least_float32
from captum_ssm.layers.fidelity import check_fidelity, decompose
from captum_ssm.network.forward import run_model
from captum_ssm.network.inputs import token_mask
from captum_ssm.network.lookups import Lookups, Table
from captum_ssm.network.reference import Reference
from captum_ssm.relevance.difference import VALUE_SHARE, Difference
from captum_ssm.relevance.follow import follow
from captum_ssm.relevance.frozen import Frozen, GateRule
from captum_ssm.relevance.rule import Rule
from captum_ssm.relevance.traced import Traced

COMPLETENESS = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 5e-2}
"""Allowed error of the sum by the model's type, relative to the sum of the absolute relevances.

With a reference it is the error to the model's own outputs, which have the rounding of the model's own code: in half
precision, where it may also exchange experts, and in the parts of a float64 model that transformers computes in
float32."""


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
        self._leaves: list[_Leaf] = []
        self._skips: list[Traced] = []
        self._tables: set[Table] = set()

    def explain(self, *, with_delta: bool = False) -> Explanation:
        """Run forward and backward, and compare the sum with the model's own output.

        The model itself is run on the reference, and, for the delta, on the inputs.

        Args:
            with_delta: Take F(x) from another run of the model; else from this run, whose layers were compared with
                their own code.

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
            leaves = [leaf.vectors for leaf in self._leaves]
            try:
                relevances = _relevances(score, [*leaves, *self._skips, *probed])
            except CheckpointError as error:
                raise UnsupportedModelError(
                    "The model runs a part again for the gradient (torch.utils.checkpoint), and the second run is not "
                    "the first. Explain it without checkpoints; for less memory see `checkpoints` of this method."
                ) from error
        embedded = _joined([leaf.by_token(r) for leaf, r in zip(self._leaves, relevances)])
        skips = relevances[len(leaves) : len(relevances) - len(probed)]
        examples = len(embedded)
        explanation = self._add_up(embedded, skips, value.reshape(examples), reference.reshape(examples), with_delta)
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
            inputs = self._start(inputs, None, None)
        else:
            decisions = self.rule.changed_decisions
            lookups = Lookups(inputs, self.reference.ids, self._start, decisions=decisions, found=self._tables)
            inputs = lookups.ids
        if self.probe is not None:
            self.probe.attach(stack)
        follow_gates = not self._is_frozen or options.gate_rule == "half"
        skips = self._skips if options.separate_skip else None
        on_factor = None if self.probe is None else self.probe.on_factor
        stack.enter_context(follow(self.model, self._check_layer, follow_gates, options.checkpoints, skips, on_factor))
        score = self._traced_score(inputs)
        followed = leaves and self.fidelity  # some vectors of the inputs, and a layer of this model
        if not followed or not isinstance(score, Traced) or not score.value.requires_grad:
            frozen = " With frozen gates a probability is constant: explain its logarithm, or pass `baselines`."
            raise InvalidInputError(
                "The explained score does not depend on the inputs through the model. Check that forward_func runs "
                "this model itself, in this thread, on the inputs as they are, not stacked with other texts in one "
                f"batch, and that the target is read from its output.{frozen if self._is_frozen else ''}"
            )
        if score.value.numel() != len(self.inputs):
            raise InvalidInputError(
                f"forward_func returns {score.value.numel()} score for {len(self.inputs)} examples, but relevance adds "
                "up to the score of each. Return one score for each example, or explain one example at a time."
            )
        return score

    def _traced_score(self, inputs: Tensor) -> Tensor:
        """Return the score of traced inputs; refuse code past torch's functions, also if it raised another error.

        Raises:
            UnsupportedModelError: For such code.
            ModelStateError: If the code of a model in half precision fails on the vectors in float32 that it is given.
            RuntimeError: From the model itself.
            ValueError: From the model itself.
        """
        try:
            score = self.score(run_model(self.forward_func, inputs, *self.args))
        except (RuntimeError, ValueError) as error:
            if self.rule.escape is not None:
                raise self.rule.escape from error
            dtype = next(self.model.parameters()).dtype
            if at_least_float32(torch.zeros((), dtype=dtype)).dtype == dtype or is_own(error):
                raise
            raise ModelStateError(
                f"A model in {dtype} is followed in float32, in which its code fails ({error}). Explain the model in "
                "float32: model.float()."
            ) from error
        if self.rule.escape is not None:
            raise self.rule.escape
        return score

    def _start(self, value: Tensor, looked_up: Tensor | None, tokens: Tensor | None) -> Traced:
        """Return embeddings and their reference as a traced tensor, which the model may change in place.

        Args:
            value: Embeddings (B, L, E) or pixels.
            looked_up: The reference's embeddings, if the reference is a text.
            tokens: The token (B, L) that each embedding belongs to; None if it is the one at the same place.
        """
        wide, reference = at_least_float32(value.detach()).requires_grad_(), self.reference.vectors(value, looked_up)
        self._leaves.append(_Leaf(Traced.of(wide, reference.to(wide), self.rule), tokens))
        return Traced.of(wide.clone(), reference.to(wide, copy=True), self.rule)

    def _add_up(
        self, embedded: Tensor, skips: Sequence[Tensor], value: Tensor, reference: Tensor, with_delta: bool
    ) -> Explanation:
        """Compare the sum of all relevance with the difference that the model itself makes.

        Args:
            embedded: Relevance of the embeddings, (B, L, E), or pixels.
            skips: Relevance of the direct paths past the recurrences.
            value: F(x) of this run, (B,).
            reference: F(x') of this run, where the reference follows the input's decisions, or with frozen gates the
                model's constant term, (B,).
            with_delta: Whether F(x) is that of another run of the model.

        Returns:
            The explanation.

        Raises:
            CompletenessError: If they differ by more than rounding.
        """
        tokens, changed = embedded.flatten(1), self.rule.changed_decisions
        terms = {"bias": reference} if self._is_frozen else {}
        if self.options.separate_skip:
            terms["skip"] = sum((r.flatten(1).sum(1) for r in skips), torch.zeros_like(value))
        if with_delta or (changed and not self._is_frozen):
            value = self._plain_score(self.inputs).to(value).reshape(value.shape)
        difference = value
        if not self._is_frozen:
            plain_reference = self._plain_reference().to(value).reshape(value.shape)
            difference = value - plain_reference
            if changed:
                terms["decisions"] = reference - plain_reference
        missing = tokens.sum(1) + sum(terms.values()) - difference
        scale = tokens.abs().sum(1) + value.abs() + reference.abs()
        error = float((missing.abs() / scale.clamp_min(torch.finfo(scale.dtype).tiny)).max())
        allowed = max(COMPLETENESS.get(next(self.model.parameters()).dtype, 1e-3), self.options.tolerance or 0)
        if not error <= allowed:
            raise CompletenessError(error, allowed, _lost_paths(self.model))
        return Explanation(embedded, terms, missing, error, changed, self.fidelity)

    def _plain_reference(self) -> Tensor:
        """Return the score that the model itself gives for the reference, (B,)."""
        if self.inputs.is_floating_point():
            return self._plain_score(self.reference.vectors(self.inputs).to(self.inputs))
        if self.reference.ids is not None:
            return self._plain_score(self.reference.ids)
        lookups = Lookups(self.inputs, None, lambda value, *_: self.reference.vectors(value).to(value), self._tables)
        return self._plain_score(lookups.ids)

    def _plain_score(self, inputs: Tensor) -> Tensor:
        """Return the score that the model itself gives, (B,)."""
        with torch.no_grad():
            return self.score(run_model(self.forward_func, inputs, *self.args))

    def _check_layer(self, call: LayerCall, y: Tensor | None) -> None:
        """Compare a layer's own output with that of its decomposition, ``y``; None if it ran on another input."""
        call, tolerance = call.detach(), self.options.tolerance
        mask = token_mask(self.forward_func, self.args, [call])
        error = decompose(call, tolerance, mask).error if y is None else check_fidelity(call, y, tolerance, mask)
        self.fidelity[call.name] = error


def _relevances(score: Traced, tensors: Sequence[Traced]) -> list[Tensor]:
    """Return the relevance of each tensor: its multiplier times its difference to its reference."""
    multipliers = torch.autograd.grad(score.value.sum(), [t.value for t in tensors], allow_unused=True)
    return [
        torch.zeros_like(t.reference) if multiplier is None else (t.value.detach() - t.reference) * multiplier
        for t, multiplier in zip(tensors, multipliers)
    ]


@dataclass(frozen=True)
class _Leaf:
    """The beginning of a run: embeddings with their reference.

    Args:
        vectors: Embeddings (B, L, E), or pixels (B, C, H, W).
        tokens: The token (B, L) that each embedding belongs to; None if it is the one at the same place.
    """

    vectors: Traced
    tokens: Tensor | None

    def by_token(self, relevance: Tensor) -> Tensor:
        """Return the relevance of the embeddings, (B, L, E), at the place of their tokens."""
        if self.tokens is None:
            return relevance
        return torch.zeros_like(relevance).scatter_add(1, self.tokens[..., None].expand_as(relevance), relevance)


def _joined(relevances: Sequence[Tensor]) -> Tensor:
    """Return the relevance of all embeddings (B, L, components): the sum of those of one width, beside all others."""
    widths = dict.fromkeys(r.shape[-1] for r in relevances)
    return torch.cat([torch.stack([r for r in relevances if r.shape[-1] == width]).sum(0) for width in widths], -1)


def _lost_paths(model: nn.Module) -> str:
    """Return in words the modules of a model that cannot be followed; the empty string if there are none."""
    names = [name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    return f"the scripted module '{names[0]}', " if names else ""
