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
from captum_ssm.layers.call import LayerCall
from captum_ssm.layers.fidelity import TOLERANCE, check_fidelity, decompose
from captum_ssm.layers.precision import computing_type, narrowest
from captum_ssm.layers.stand_ins import is_packed
from captum_ssm.network.forward import run_model
from captum_ssm.network.inputs import token_mask
from captum_ssm.network.reference import Reference
from captum_ssm.relevance.difference import VALUE_SHARE, Difference
from captum_ssm.relevance.explained_input import ExplainedInput
from captum_ssm.relevance.explanation import Explanation
from captum_ssm.relevance.follow import follow
from captum_ssm.relevance.frozen import Frozen, GateRule
from captum_ssm.relevance.own_outputs import OwnOutputs
from captum_ssm.relevance.rule import Rule
from captum_ssm.relevance.traced import Traced, refused_access

COMPLETENESS = {torch.float64: 1e-5, torch.float32: 1e-3, torch.bfloat16: 0.2, torch.float16: 5e-2}
"""Allowed error of the sum by the model's type, relative to the sum of the absolute relevances.

With a reference it is the error to the model's own outputs, which have the rounding of the model's own code: in half
precision, where it may also exchange experts, and in the parts of a float64 model that transformers computes in
float32."""


_OF_QUANTISED = torch.bfloat16
"""The type whose tolerance quantised parts have: some round their input to 8 bits too, as its last digit decides."""


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


class Probe:
    """Collects the tensors inside a model whose relevance is wanted instead of that of the embeddings.

    Attributes:
        tensors: The tensors of one run, in the order in which the model had them.
        watches_factors: Whether the factors of the mixers' chains are wanted, which only a decomposition has.
    """

    watches_factors = False

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

    def select(self, relevances: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Return the wanted ones of the relevances of the traced tensors."""
        return tuple(relevances)


@dataclass
class Run:
    """One forward and one backward pass over some examples, with a reference or with frozen gates.

    Args:
        model: The model, whose known layers run by their decomposition.
        forward_func: The model, or a callable that runs it.
        score: From the model's output to the explained score of each example, (B,), or of the batch.
        inputs: The inputs that are explained, each of which begins with the batch.
        args: The additional forward arguments.
        references: The reference of each input; without baselines the gates are frozen.
        options: The method's options.
        probe: Collects tensors inside the model whose relevance is wanted; None for that of the inputs.
        own_outputs: What the mixers' own code gives for these inputs, shared by several runs; None runs it.
    """

    model: nn.Module
    forward_func: Callable[..., Any]
    score: Callable[[Tensor], Tensor]
    inputs: tuple[Tensor, ...]
    args: tuple[Any, ...]
    references: tuple[Reference, ...]
    options: Options
    probe: Probe | None = None
    own_outputs: OwnOutputs | None = None
    fidelity: dict[str, float] = field(default_factory=dict)
    followed: dict[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        options = self.options
        self.rule: Rule = Frozen(options.gate_rule) if self._is_frozen else Difference(options.value_share)
        self._inputs = [ExplainedInput(x, reference, self.rule) for x, reference in zip(self.inputs, self.references)]
        self._skips: list[Traced] = []

    def explain(self, *, with_delta: bool = False) -> Explanation:
        """Run forward and backward, and compare the sum with the model's own output.

        The model itself is run on the reference, and, for the delta, on the inputs.

        Args:
            with_delta: Take F(x) from another run of the model; else from this run, whose layers were compared with
                their own code.

        Returns:
            The explanation of these examples.

        Raises:
            InvalidInputError: If the score does not depend on the inputs, or is neither one for each example nor one.
            FidelityError: If a layer's decomposition misses the layer's own output, or the relevance does not add up.
            UnsupportedModelError: If the model calls a function that has no rule.
        """
        with torch.enable_grad(), ExitStack() as stack:
            score = self._forward(stack)
            value, reference = score.value.detach().flatten(), score.reference.flatten()
            probed = [t for t in self.probe.tensors if isinstance(t, Traced)] if self.probe is not None else []
            leaves = [leaf for explained in self._inputs for leaf in explained.leaves]
            relevances = iter(_relevances(score, [*leaves, *self._skips, *probed]))
        of_inputs = tuple(explained.relevance(relevances) for explained in self._inputs)
        skips = [next(relevances) for _ in self._skips]
        explanation = self._add_up(of_inputs, skips, value, reference, with_delta)
        if self.probe is None or not self.probe.tensors:
            return explanation
        return replace(explanation, relevance=self.probe.select(list(relevances)))

    @property
    def _is_frozen(self) -> bool:
        """Whether there is no reference, so that the gates are frozen."""
        return self.references[0].baseline is None

    def _forward(self, stack: ExitStack) -> Traced:
        """Run the model on inputs and reference; ``stack`` holds the hooks until the gradient is there."""
        options = self.options
        inputs = [explained.enter() for explained in self._inputs]
        if self.probe is not None:
            self.probe.attach(stack)
        follow_gates = not self._is_frozen or options.gate_rule == "half"
        skips = self._skips if options.separate_skip else None
        on_factor = self.probe.on_factor if self.probe is not None and self.probe.watches_factors else None
        if self.own_outputs is not None:
            self.own_outputs.attach(self.model, stack)
        self.followed = stack.enter_context(
            follow(self.model, self._check_layer, follow_gates, options.checkpoints, skips, on_factor)
        )
        score = self._traced_score(inputs)
        if not isinstance(score, Traced) or not score.value.requires_grad:
            frozen = " With frozen gates a probability is constant: explain its logarithm, or pass `baselines`."
            raise InvalidInputError(
                "The explained score does not depend on the inputs through the model, as far as functions of torch "
                "tell. Check that forward_func runs this model itself, in this thread, on the inputs as they are, and "
                f"that the target is read from its output.{frozen if self._is_frozen else ''}"
            )
        if score.value.numel() not in (1, len(self.inputs[0])):
            raise InvalidInputError(
                f"forward_func returns {score.value.numel()} scores for {len(self.inputs[0])} examples. Return one "
                "score for each example, or one for the batch."
            )
        return score

    def _traced_score(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return the score of traced inputs; refuse code past torch's functions, also if it raised another error.

        Raises:
            UnsupportedModelError: For such code.
            ModelStateError: If the code of a model in half precision fails on the vectors in float32 that it is given.
            RuntimeError: From the model itself.
            ValueError: From the model itself.
        """
        try:
            inside_is_read = self.probe is not None
            score = self.score(run_model(self.forward_func, *inputs, *self.args, all_logits=inside_is_read))
        except (RuntimeError, ValueError) as error:
            escape = self.rule.escape or refused_access(error)
            if escape is not None:
                raise escape from error
            dtype = computing_type(self.model)
            if torch.promote_types(dtype, torch.float32) == dtype or is_own(error):
                raise
            raise ModelStateError(
                f"A model in {dtype} is followed in float32, in which its code fails ({error}). Explain the model in "
                "float32: model.float()."
            ) from error
        if self.rule.escape is not None:
            raise self.rule.escape
        return score

    def _add_up(
        self, relevance: tuple[Tensor, ...], skips: Sequence[Tensor], value: Tensor, reference: Tensor, with_delta: bool
    ) -> Explanation:
        """Compare the sum of all relevance with the difference that the model itself makes.

        Args:
            relevance: Relevance of the inputs.
            skips: Relevance of the direct paths past the recurrences.
            value: F(x) of this run, (S,): for each example, or one for the batch.
            reference: F(x') of this run, where the reference follows the input's decisions, or with frozen gates the
                model's constant term, (S,).
            with_delta: Whether F(x) is that of another run of the model.

        Returns:
            The explanation.

        Raises:
            CompletenessError: If they differ by more than rounding.
        """

        def sums(parts: Sequence[Tensor]) -> Tensor:
            """Return the sum of all parts that belong to each score, (S,)."""
            total = torch.zeros_like(value)
            return sum((p.reshape(len(value), -1).sum(1).to(total) for p in parts), total)

        changed = self.rule.changed_decisions
        terms = {"bias": reference} if self._is_frozen else {}
        if self.options.separate_skip:
            terms["skip"] = sums(skips)
        if with_delta or (changed and not self._is_frozen):
            value = self._plain_score(self.inputs).to(value).reshape(value.shape)
        difference, plain_reference = value, torch.full_like(value, torch.nan)
        if not self._is_frozen:
            plain_inputs = [explained.plain_reference() for explained in self._inputs]
            plain_reference = self._plain_score(plain_inputs).to(value).reshape(value.shape)
            difference = value - plain_reference
            if changed:
                terms["decisions"] = reference - plain_reference
        missing = sums(relevance) + sum(terms.values()) - difference
        scale = sums([r.abs() for r in relevance]) + value.abs() + reference.abs()
        error = float((missing.abs() / scale.clamp_min(torch.finfo(scale.dtype).tiny)).max())
        dtype = narrowest([computing_type(self.model), *self.rule.autocast_types])
        allowed = max(COMPLETENESS.get(dtype, 1e-3), self.options.tolerance or 0)
        if not error <= allowed and is_packed(self.model):
            allowed = max(allowed, COMPLETENESS[_OF_QUANTISED])
        if not error <= allowed:
            raise CompletenessError(error, allowed, _lost_paths(self.model))
        found = self.fidelity, self.followed
        return Explanation(relevance, terms, missing, error, changed, *found, value, plain_reference)

    def _plain_score(self, inputs: Sequence[Tensor]) -> Tensor:
        """Return the score that the model itself gives, (S,)."""
        with torch.no_grad():
            return self.score(run_model(self.forward_func, *inputs, *self.args))

    def _check_layer(self, call: LayerCall, y: Tensor | None) -> None:
        """Compare a layer's own output with that of its decomposition, ``y``; None if it ran on another input."""
        call, tolerance = call.detach(), self.options.tolerance
        if tolerance is None and is_packed(call.mixer):
            tolerance = TOLERANCE[_OF_QUANTISED]
        mask = token_mask(self.forward_func, self.args, [call])
        error = decompose(call, tolerance, mask).error if y is None else check_fidelity(call, y, tolerance, mask)
        self.fidelity[call.name] = error


def _relevances(score: Traced, tensors: Sequence[Traced]) -> list[Tensor]:
    """Return the relevance of each tensor: its multiplier times its difference to its reference.

    Raises:
        UnsupportedModelError: If the model has checkpoints of its own, and runs otherwise for the gradient.
    """
    try:
        multipliers = torch.autograd.grad(score.value.sum(), [t.value for t in tensors], allow_unused=True)
    except CheckpointError as error:
        raise UnsupportedModelError(
            "The model runs a part again for the gradient (torch.utils.checkpoint), and the second run is not the "
            "first. Explain it without checkpoints; for less memory see `checkpoints` of this method."
        ) from error
    return [
        torch.zeros_like(t.reference) if multiplier is None else (t.value.detach() - t.reference) * multiplier
        for t, multiplier in zip(tensors, multipliers)
    ]


def _lost_paths(model: nn.Module) -> str:
    """Return in words the modules of a model that cannot be followed; the empty string if there are none."""
    names = [name for name, module in model.named_modules() if isinstance(module, torch.jit.ScriptModule)]
    return f"the scripted module '{names[0]}', " if names else ""
