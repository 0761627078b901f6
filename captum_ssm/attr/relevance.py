"""Relevance: scores that add up to the explained score, or to its difference to a reference."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_ssm._captum import format_additional_forward_args, format_output, is_tuple, log_usage
from captum_ssm._progress import progress_bar
from captum_ssm.attr.any_model import AnyModelMethod
from captum_ssm.attr.score_shape import ScoreShape
from captum_ssm.errors import InvalidInputError
from captum_ssm.network.inputs import (
    Target,
    input_tensors,
    names,
    outside_inference_mode,
    refuse_bad_state,
    select_examples,
)
from captum_ssm.network.interface import is_language_model
from captum_ssm.network.reference import Baseline, Reference, expanded_baseline, stacked_baselines
from captum_ssm.network.turns import unchanged
from captum_ssm.relevance.difference import VALUE_SHARE
from captum_ssm.relevance.explanation import Explanation
from captum_ssm.relevance.frozen import GateRule
from captum_ssm.relevance.own_outputs import OwnOutputs
from captum_ssm.relevance.run import Options, Probe, Run

_TOKENS = 512
"""Tokens of the examples that are explained in one run with several references: more are not faster together."""

Sign = Literal["positive", "negative"] | None
"""Which part of the relevance: the part for the score, the part against it, or their sum."""


class ImplicitAttentionRelevance(AnyModelMethod):
    """Relevance that adds up: a score for each token, whose sum is the explained score or difference.

    Without ``baselines``, *frozen gates*: given its gates a gated-linear network is affine in its embeddings, so the
    relevance of the tokens and one bias term sum to the score F(x). Gates are constants, so a token that acts through
    them alone gets nothing; an activation is a gate on its own input. These are the rules of MambaLRP, here for every
    family.

    With ``baselines``, *difference to a reference*: the relevance of the tokens sums to ``F(x) - F(x')``. At every
    product each factor's change counts times a mean of the other factor,
    ``ab - a'b' = (p b + q b') (a - a') + (q a + p a') (b - b')``, and every function of single entries becomes its
    difference quotient. So both gates and values are credited. Both sides of each such equation are equal, hence by
    the chain rule so are those of the whole model: no error is left but rounding.

    The second is DeepLIFT's rescale rule, extended to products: by the Shapley value of their factors, ``p = q = 1/2``
    (or of three where a recurrence is fed with delta, B and x), but for a value and its reader, which
    ``value_share`` divides. It is exact for each function, though not the Shapley value of the model. The first is
    layer-wise relevance propagation.

    Any model can be explained, with known layers or none. Those that an adapter knows run by their decomposition, in
    linear time, whichever kernel the model itself uses; all else is followed function by function as the model's own
    code calls it, a loop over tokens step by step. :attr:`followed` says which layer went which way. A function without
    a rule is refused by name (:func:`captum_ssm.register_rule`).

    With a reference, each call runs the model itself on it, and refuses relevance that does not sum to the difference
    of the model's own outputs. For ids, x' is the text with other ids: all vectors that the model makes of ids change
    with it, those of a second embedding or of hashed pairs too, and belong to the token that they are made of; learned
    positions stay. Padding keeps its ids.

    Decisions are the input's: which experts a token is sent to, which keys a sparse attention selects, which token a
    classifier reads because the ids after it are padding. If the reference would have decided otherwise,
    ``terms["decisions"]`` has the change due to that alone, and ``held`` names the functions that decided.

    Args:
        forward_func: A transformers model, any other module, or any callable whose output Captum accepts.
        model: The model whose layers are explained; needed if ``forward_func`` is not a module.
        gate_rule: For frozen gates, the rule of a product with a gate: ``"half"``: the gate, by its own linear form,
            and the value get half each (MambaLRP); ``"value"``: the value gets all.
        value_share: With a reference, the part of the joint change of a value and the gate that reads it that is the
            value's, 0 to 1: of a product with an activated gate or with a norm's scale, and of a recurrence's state
            with its reader (C, a query, a receptance). 1/2 is the Shapley value. More than that tells rather where
            information comes from than why the model looked there.
        apart: Terms to keep apart from the tokens' relevance: ``("skip",)`` keeps the relevance that passes a
            recurrence by its direct path.
        checkpoints: Keep only the input of each block and run the blocks again for the gradient: less memory, about
            one more run.
        tolerance: Allowed relative error of the decomposition; None chooses by the model's type.

    Attributes:
        terms: After a call, the relevance that belongs to no token, by name, each (B,): ``"bias"`` (frozen gates),
            ``"decisions"`` (with a reference, if there were any), and those kept ``apart``. With the tokens' relevance
            they sum to the score, or to the difference.
        completeness: After a call, the largest error of that sum over the examples, relative to the sum of all
            relevance without its sign. With a reference, the difference is to the model's own run on it.
        value: After a call, F(x) of each example, (B,), or (1,) if the model gives one score for the batch.
        reference_value: After a call, F(x') of each as the model itself gives it; the mean over several references; NaN
            with frozen gates.
        held: After a call, names of the functions whose decision the reference would have made otherwise.
        fidelity: After a call, the relative error of every layer's decomposition by layer name.
        followed: After a call, by name of each layer that an adapter knows: ``"decomposition"``, or why it was followed
            function by function instead, as all other layers are.

    Cost: frozen gates: one run of the model, one of its decomposition for the score and one for the bias, and one
    backwards. Difference: two runs of the model, two of its decomposition, one backwards. All O(L·D·N).

    Source:
        Products: Shapley 1953; Shrikumar et al. 2017 (arXiv 1704.02685), section 3.5.1, for the difference quotient;
        Jafari et al. 2024, MambaLRP (arXiv 2406.07592), section 4, for frozen gates.

    Example:
        >>> import torch
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> from captum_ssm import ImplicitAttentionRelevance, models
        >>> model = AutoModelForCausalLM.from_pretrained(models.REVIEWS)
        >>> tokenizer = AutoTokenizer.from_pretrained(models.REVIEWS)
        >>> ids = tokenizer("a gorgeous, witty film", return_tensors="pt").input_ids
        >>> positive, negative = tokenizer.convert_tokens_to_ids(["positive", "negative"])
        >>> method = ImplicitAttentionRelevance(model)
        >>> scores, delta = method.attribute(
        ...     ids, positive, contrast=negative, baselines=tokenizer.unk_token_id, return_convergence_delta=True
        ... )
        >>> bool(delta.abs().max() < 1e-4)
        True
    """

    def __init__(
        self,
        forward_func: Callable[..., Any],
        model: nn.Module | None = None,
        *,
        gate_rule: GateRule = "half",
        value_share: float = VALUE_SHARE,
        apart: Sequence[str] = (),
        checkpoints: bool = False,
        tolerance: float | None = None,
    ) -> None:
        super().__init__(forward_func, model, tolerance=tolerance)
        if gate_rule not in ("half", "value"):
            raise InvalidInputError(f"gate_rule must be 'half' or 'value', not {gate_rule!r}.")
        if not isinstance(value_share, (int, float)) or not 0 <= value_share <= 1:
            raise InvalidInputError(f"value_share is a part of a whole, from 0 to 1, not {value_share!r}.")
        self.apart = names(apart, "apart")
        if set(self.apart) - {"skip"}:
            raise InvalidInputError(f"Only 'skip' can be kept apart, not {sorted(set(self.apart) - {'skip'})}.")
        if self.apart and checkpoints:
            raise InvalidInputError(
                "checkpoints run the blocks twice, so nothing can be kept apart; leave out one of them."
            )
        self.gate_rule: GateRule = gate_rule
        self.value_share = value_share
        self.checkpoints = checkpoints
        self.terms: dict[str, Tensor] = {}
        self.completeness = 0.0
        self.value = self.reference_value = torch.zeros(0)
        self.held: set[str] = set()
        self.followed: dict[str, str] = {}

    @property
    def multiplies_by_inputs(self) -> bool:
        """Whether the scores are parts of the explained score rather than slopes: yes."""
        return True

    def has_convergence_delta(self) -> bool:
        """Whether :meth:`attribute` can return how far its scores are from adding up: yes."""
        return True

    def probe(self) -> Probe | None:
        """Return the probe of a run, for the relevance of tensors inside the model; here the embeddings' is wanted."""
        return None

    def _result(self, relevance: tuple[Tensor, ...], shapes: Sequence[ScoreShape], is_tuple: bool) -> Any:
        """Return the result of :meth:`attribute`: the relevance of each input in its shape, or in that of its patches.

        Args:
            relevance: That of the components.
            shapes: The shape of each input.
            is_tuple: Whether the inputs are in a tuple, so that the result is one too.
        """
        return format_output(is_tuple, tuple(s.from_components(r).contiguous() for r, s in zip(relevance, shapes)))

    @log_usage
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        baselines: Baseline | tuple[Baseline | None, ...] | list[Any] | None = None,
        contrast: Target = None,
        sign: Sign = None,
        patches: bool = False,
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
        show_progress: bool = False,
    ) -> Any:
        """Return the relevance of each token.

        Args:
            inputs: Token ids (B, L), embeddings (B, L, E), images (B, C, H, W), or whatever a model of one's own takes:
                a tensor of any shape, or a tuple of several, each of which begins with the batch. Integers are ids that
                are looked up.
            target: The class or token to explain, in any form that Captum takes. For a transformers model an int is a
                vocabulary entry, read at the last real token, or a class of a classifier.
            additional_forward_args: Passed on after the inputs, as constants. For a transformers model: its attention
                mask (B, L), 0 at padding.
            baselines: The reference x'. For ids: an id that replaces every token, such as the mask, pad or unk token
                (the pad token moves the position that a transformers classifier reads, which is a decision); ids, or
                embeddings, that broadcast to all inputs; a float for all components. For all others a number, or a
                tensor that broadcasts to the inputs. For several inputs a tuple of one for each. A list of several
                references is averaged over. None freezes the gates.
            contrast: Explain why the target and not this one, in any form of a target.
            sign: ``"positive"`` or ``"negative"``: only the components of the embeddings that speak for the score, or
                against it. None: their sum.
            patches: Return the sums over an image's patches rather than its pixels; a pixel that several patches read
                is shared by them.
            internal_batch_size: Explain so many examples at a time; all at once by default. A model with one score for
                a batch is explained batch by batch.
            return_convergence_delta: Return also how far the relevance is from adding up.
            show_progress: Show a progress bar if the call takes more than two seconds.

        Returns:
            Relevance in the shape of the inputs: of each token, 0 at padding, or of each component or pixel; with
            ``patches`` of each patch of an image, (B, rows, columns). A tuple if ``inputs`` is one. With
            ``return_convergence_delta`` also the tensor (B,) of the sum of all relevance and :attr:`terms`, less
            ``F(x)`` or ``F(x) - F(x')`` as the model itself gives it; (1,) if the model gives one score for the batch.
            In the units of the score.

        Raises:
            AssertionError: If ``target`` does not fit the output.
            InvalidInputError: If the inputs or baselines are empty, out of range or of the wrong type.
            ModelStateError: If the model is training, has a warm cache, or gives NaN or infinity.
            UnsupportedModelError: If the model calls a function that has no rule, or code that torch does not show.
            FidelityError: If a layer's decomposition misses the layer's own output, or the relevance does not add up.
        """
        with torch.inference_mode(False), unchanged(self.model, self.forward_func, inputs):
            tensors = input_tensors(inputs)
            args = format_additional_forward_args(additional_forward_args)
            if sign not in (None, "positive", "negative"):
                raise InvalidInputError(f"sign must be 'positive', 'negative' or None, not {sign!r}.")
            references = baselines if isinstance(baselines, list) else [baselines]
            if not references:
                raise InvalidInputError("baselines is an empty list; pass at least one, or None to freeze the gates.")
            if len(tensors) > 1 and is_language_model(self.forward_func):
                raise InvalidInputError(
                    f"This model takes one tensor of tokens, not {len(tensors)}: pass its mask as "
                    "additional_forward_args."
                )
            shapes = [ScoreShape(self.model, self.forward_func, x, args, patches) for x in tensors]
            explanations: list[Explanation] = []
            batches = list(self.batches(tensors, args, (target, contrast), None, internal_batch_size))
            with progress_bar(type(self).__name__, len(batches) * len(references), show_progress, "run") as advance:
                for batch, select in batches:
                    of_batch = [
                        [select(expanded_baseline(b, x)) for b, x in zip(_one_each(baseline, tensors), tensors)]
                        for baseline in references
                    ]
                    arguments = select(target), select(contrast), select(args) or ()
                    explanations.append(self.explained(batch, *arguments, of_batch, return_convergence_delta))
                    advance(len(references))
            explanation = Explanation.joined(explanations)
        self.keep(explanation)
        relevance = tuple(_of_sign(r, sign) for r in explanation.relevance)
        result = self._result(relevance, shapes, is_tuple(inputs))
        return (result, explanation.delta) if return_convergence_delta else result

    def keep(self, explanation: Explanation) -> None:
        """Keep all that belongs to the sum of an explanation as the attributes of the method."""
        self.terms, self.completeness = explanation.terms, explanation.completeness
        self.held, self.fidelity = explanation.decisions, explanation.fidelity
        self.followed = explanation.followed
        self.value, self.reference_value = explanation.value, explanation.reference_value

    def explained(
        self,
        inputs: tuple[Tensor, ...],
        target: Target,
        contrast: Target,
        args: tuple[Any, ...],
        references: Sequence[Sequence[Baseline | None]],
        with_delta: bool,
    ) -> Explanation:
        """Return the explanation of one batch, the mean over several references, its arguments checked.

        A language model treats every example of a batch alone, so one run has the examples with several references, as
        long as these are short.

        Args:
            inputs: The inputs, each of which begins with the batch.
            target: The target.
            contrast: Its contrast, or None.
            args: The additional forward arguments.
            references: For each reference the baseline of each input; None freezes the gates.
            with_delta: Take F(x) from another run of the model, see :meth:`Run.explain`.
        """
        x, together = inputs[0], 1
        if is_language_model(self.forward_func) and self.probe() is None:
            together = max(1, _TOKENS // x.shape[:2].numel())
        own_outputs = OwnOutputs() if len(references) > 1 and not self.checkpoints else None
        explanations: list[Explanation] = []
        for start in range(0, len(references), together):
            some = references[start : start + together]
            stacked = stacked_baselines([each[0] for each in some], x) if len(some) > 1 else None
            if stacked is None:
                runs = (self._run(inputs, target, contrast, args, baselines, own_outputs) for baselines in some)
                explanations.extend(run.explain(with_delta=with_delta) for run in runs)
                continue
            again = partial(select_examples, count=len(x), rows=torch.arange(len(x)).repeat(len(some)))
            run = self._run((again(x),), again(target), again(contrast), again(args), [stacked])
            explanations.extend(run.explain(with_delta=with_delta).parts(len(some)))
        return Explanation.mean(explanations)

    def _run(
        self,
        inputs: tuple[Tensor, ...],
        target: Target,
        contrast: Target,
        args: tuple[Any, ...],
        baselines: Sequence[Baseline | None],
        own_outputs: OwnOutputs | None = None,
    ) -> Run:
        """Return the run of one batch, its arguments checked.

        Args:
            inputs: The inputs of the batch, as in :meth:`attribute`.
            target: The target of each example, or one for all.
            contrast: The target to explain it against, or None.
            args: The additional forward arguments.
            baselines: The reference of each input; None freezes the gates.
            own_outputs: What the mixers' own code gives for these inputs, shared by several runs.

        Raises:
            InvalidInputError: If a baseline does not fit, or ``gradient_func`` was replaced.
            ModelStateError: If the model is training.
        """
        self.refuse_replaced_gradient()
        refuse_bad_state(self.model)
        target, contrast = outside_inference_mode(target), outside_inference_mode(contrast)
        args = tuple(map(outside_inference_mode, args))
        references = tuple(Reference.of(b, x, self.forward_func, args) for b, x in zip(baselines, inputs))
        for reference in references:
            reference.check(self.model)
        score = partial(self.explained_score, target=target, contrast=contrast)
        options = Options(self.gate_rule, self.value_share, bool(self.apart), self.checkpoints, self.tolerance)
        return Run(self.model, self.forward_func, score, inputs, args, references, options, self.probe(), own_outputs)


def _one_each(baseline: Any, inputs: tuple[Tensor, ...]) -> tuple[Baseline | None, ...]:
    """Return a baseline for each input: those of a tuple, or one for all.

    Raises:
        InvalidInputError: If there are not as many as inputs, or some are missing.
    """
    if isinstance(baseline, Tensor) and len(inputs) > 1:
        baseline = (baseline,)
    each = baseline if isinstance(baseline, tuple) else (baseline,) * len(inputs)
    if len(each) != len(inputs):
        raise InvalidInputError(
            f"There are {len(each)} baselines for {len(inputs)} inputs. Pass a tuple of one for each, or one number."
        )
    if len({b is None for b in each}) > 1:
        raise InvalidInputError("Some inputs have a baseline and others none. Pass one for each, or none at all.")
    return each


def _of_sign(relevance: Tensor, sign: Sign) -> Tensor:
    """Return the components of the relevance that have this sign, or all."""
    if sign is None:
        return relevance
    return relevance.clamp_min(0) if sign == "positive" else relevance.clamp_max(0)
