"""Relevance: scores that add up to what they explain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

from captum_ssm._captum import format_additional_forward_args, format_output, is_tuple, log_usage
from captum_ssm.attr.base import ModelMethod, progress_bar
from captum_ssm.attr.form import Form
from captum_ssm.attr.inputs import (
    Target,
    free_of_inference_mode,
    real_tokens,
    refuse_bad_inputs,
    refuse_bad_state,
    single_tensor,
)
from captum_ssm.capture import MixerCall
from captum_ssm.errors import FidelityError, InvalidInputError
from captum_ssm.fidelity import check, decompose
from captum_ssm.readout import is_language_model, scores
from captum_ssm.relevance.rules import VALUE_SHARE, Difference, Frozen, GateRule, Rule
from captum_ssm.relevance.traced import Traced
from captum_ssm.relevance.walk import embedded, follow

Baseline = int | float | Tensor
Sign = Literal["positive", "negative"] | None
"""Which part of the relevance: what speaks for the score, what speaks against it, or their sum."""

COMPLETENESS = {torch.float64: 1e-6, torch.float32: 1e-3, torch.bfloat16: 1e-3, torch.float16: 1e-3}
"""Allowed error of the sum by the model's type, relative to the sum of all relevance without its sign."""


class ImplicitAttentionRelevance(ModelMethod):
    """Relevance that adds up: a score for each token whose sum is what they explain.

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
    (or of three where a recurrence is fed with delta, B and x), but for a value and what reads it, which
    ``value_share`` divides. It is exact for each function, though not the Shapley value of the model. The first is
    layer-wise relevance propagation. Layers run by their decomposition, in linear time, whichever kernel the model
    itself uses; all between them is followed function by function as the model's own code calls it. A function without
    a rule is refused by name (:func:`captum_ssm.register_rule`).

    Decisions are the input's: which experts a token is sent to, which keys a sparse attention selects. If the
    reference would have decided otherwise, ``terms["decisions"]`` has what that alone changes, and ``held`` names the
    functions that decided.

    Args:
        forward_func: As in :class:`~captum_ssm.attr.base.ModelMethod`, with ``model``.
        model: Likewise.
        gate_rule: For frozen gates, what a product with a gate does: ``"half"``: the gate, through its own linear form,
            and the value get half each (MambaLRP); ``"value"``: the value gets all.
        value_share: With a reference, which part of what a value and the gate that reads it change together is the
            value's, 0 to 1: of a product with an activated gate or with a norm's scale, and of a recurrence's state
            with what reads it (C, a query, a receptance). 1/2 is the Shapley value. More than that tells rather where
            information comes from than what made the model look there.
        apart: Terms to keep apart from the tokens' relevance: ``("skip",)`` keeps what passes a recurrence by its
            direct path.
        checkpoints: Keep only what enters each block and run the blocks again for the gradient: less memory, about
            one more run.
        tolerance: Likewise.

    Attributes:
        terms: After a call, what belongs to no token, by name, each (B,): ``"bias"`` (frozen gates), ``"decisions"``
            (with a reference, if there were any), and those kept ``apart``. With the tokens' relevance they sum to the
            score, or to the difference.
        completeness: After a call, the largest error of that sum over the examples, relative to the sum of all
            relevance without its sign.
        held: After a call, names of the functions whose decision the reference would have made otherwise.
        fidelity: After a call, the relative error of every layer's decomposition by layer name.

    Cost: frozen gates: one run of the model, one of its decomposition for the score and one for the bias, and one
    backwards. Difference: one run of the model, two of its decomposition, one backwards. All O(L·D·N).

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
        if not 0 <= value_share <= 1:
            raise InvalidInputError(f"value_share is a part of a whole, from 0 to 1, not {value_share}.")
        self.apart = (apart,) if isinstance(apart, str) else tuple(apart)
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
        self.held: set[str] = set()

    @property
    def multiplies_by_inputs(self) -> bool:
        """Whether the scores are parts of the explained score rather than slopes: yes."""
        return True

    def has_convergence_delta(self) -> bool:
        """Whether :meth:`attribute` can return how far its scores are from adding up: yes."""
        return True

    def _shaped(self, relevance: Tensor, form: Form) -> Tensor:
        """Return the relevance of the embeddings (B, L, E), or pixels (B, C, H, W), in the form of the inputs."""
        return form.of_components(relevance)

    def _ask(self, asked: list[Tensor], stack: ExitStack) -> Callable[[str, str, Tensor], None] | None:
        """Arrange for ``asked`` to get the tensors whose relevance is wanted; here the embeddings are all."""
        return None

    def _asked(self, found: Sequence[Tensor], asked: Sequence[Tensor]) -> Tensor:
        """Return the one relevance of the tensors that were asked for."""
        raise NotImplementedError

    @log_usage
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        baselines: Baseline | tuple[Baseline, ...] | list[Any] | None = None,
        contrast: Target = None,
        sign: Sign = None,
        patches: bool = False,
        internal_batch_size: int | None = None,
        return_convergence_delta: bool = False,
        show_progress: bool = False,
    ) -> Any:
        """Return the relevance of each token.

        Args:
            inputs: Token ids (B, L), embeddings (B, L, E), or images (B, C, H, W), or a tuple of one such tensor.
            target: What to explain, as in :class:`~captum_ssm.ImplicitAttentionAttribution`.
            additional_forward_args: Likewise.
            baselines: The reference x'. For ids: an id that stands in the place of every token, such as the mask, pad
                or unk token; ids, or embeddings, that broadcast to all inputs; a float for all components. For
                embeddings and images: a number, or what broadcasts to all inputs. A list of several is averaged over.
                None freezes the gates.
            contrast: Explain why the target and not this one, likewise.
            sign: ``"positive"`` or ``"negative"``: only the components of the embeddings that speak for the score, or
                against it. None: their sum.
            patches: Return the sums over an image's patches rather than its pixels; a pixel that several patches read
                is shared by them.
            internal_batch_size: Explain so many examples at a time; all at once by default.
            return_convergence_delta: Return also how far the relevance is from adding up.
            show_progress: Show a progress bar if the call takes more than two seconds.

        Returns:
            Relevance (B, L) for token ids, 0 at padding; for embeddings that of each component (B, L, E); for images
            that of each pixel (B, C, H, W), or with ``patches`` of each patch (B, rows, columns). A tuple if
            ``inputs`` is one. With ``return_convergence_delta`` also the tensor (B,) of the sum of all relevance and
            :attr:`terms`, less ``F(x)`` or ``F(x) - F(x')`` as the model itself gives it. In the units of the score.

        Raises:
            AssertionError: If ``target`` does not fit the output.
            InvalidInputError: If the inputs or baselines are empty, out of range or of the wrong kind.
            ModelStateError: If the model is training, has a warm cache, or gives NaN or infinity.
            UnsupportedModelError: If the model has no supported layer, or calls a function that has no rule.
            FidelityError: If a layer's decomposition misses the layer's real output, or the relevance does not add up.
        """
        with torch.inference_mode(False):
            tokens = single_tensor(inputs)
            args = format_additional_forward_args(additional_forward_args)
            if sign not in (None, "positive", "negative"):
                raise InvalidInputError(f"sign must be 'positive', 'negative' or None, not {sign!r}.")
            references = baselines if isinstance(baselines, list) else [baselines]
            if not references:
                raise InvalidInputError("baselines is an empty list; pass at least one, or None to freeze the gates.")
            form = Form(self.model, self.forward_func, tokens, args, patches)
            parts: list[_Part] = []
            batches = list(self._batches(tokens, args, (target, contrast), None, internal_batch_size))
            with progress_bar(type(self).__name__, len(batches) * len(references), show_progress, "run") as seen:
                for batch, some in batches:
                    several = []
                    for reference in references:
                        explained = _Explained(
                            self,
                            batch,
                            some(target),
                            some(contrast),
                            some(args) or (),
                            some(_single(reference, tokens)),
                        )
                        several.append(explained.part(return_convergence_delta))
                        seen()
                    parts.append(_Part.mean(several))
            whole = _Part.joined(parts)
        self.terms, self.completeness = whole.terms, whole.completeness
        self.held, self.fidelity = whole.held, whole.fidelity
        relevance = {"positive": whole.relevance.clamp_min(0), "negative": whole.relevance.clamp_max(0)}.get(
            str(sign), whole.relevance
        )
        relevance = self._shaped(relevance, form)
        result = format_output(is_tuple(inputs), (relevance.contiguous(),))
        return (result, whole.delta) if return_convergence_delta else result


@dataclass(frozen=True)
class _Part:
    """What was found for some examples: relevance (B, L, E), the rest as in the method's attributes."""

    relevance: Tensor
    terms: dict[str, Tensor]
    delta: Tensor
    completeness: float
    held: set[str]
    fidelity: dict[str, float]

    @staticmethod
    def mean(parts: Sequence[_Part]) -> _Part:
        """Return the mean over several references."""
        return _Part._merged(parts, lambda tensors: torch.stack(tensors).mean(0))

    @staticmethod
    def joined(parts: Sequence[_Part]) -> _Part:
        """Return all examples."""
        return _Part._merged(parts, torch.cat)

    @staticmethod
    def _merged(parts: Sequence[_Part], merge: Callable[[list[Tensor]], Tensor]) -> _Part:
        names = dict.fromkeys(name for part in parts for name in part.terms)
        return _Part(
            merge([part.relevance for part in parts]),
            {name: merge([part.terms.get(name, torch.zeros_like(part.delta)) for part in parts]) for name in names},
            merge([part.delta for part in parts]),
            max(part.completeness for part in parts),
            set[str]().union(*(part.held for part in parts)),
            {name: max(part.fidelity[name] for part in parts) for name in parts[0].fidelity},
        )


class _Explained:
    """One run on some examples.

    Args:
        method: Whose options hold.
        inputs: Token ids (B, L) or embeddings (B, L, E).
        target: What is explained.
        contrast: And against what.
        args: Additional forward arguments.
        baseline: The reference, or None.
    """

    def __init__(
        self,
        method: ImplicitAttentionRelevance,
        inputs: Tensor,
        target: Target,
        contrast: Target,
        args: tuple[Any, ...],
        baseline: Baseline | None,
    ) -> None:
        method._refuse_replaced_gradient()
        refuse_bad_state(method.model)
        self.method, self.inputs, self.baseline = method, inputs, baseline
        self.target, self.contrast = free_of_inference_mode(target), free_of_inference_mode(contrast)
        self.args = tuple(map(free_of_inference_mode, args))
        self.rule: Rule = Frozen(method.gate_rule) if baseline is None else Difference(method.value_share)
        self.fidelity: dict[str, float] = {}
        self.apart: list[Traced] = []
        if baseline is not None:
            self._check(baseline)

    def part(self, exactly: bool) -> _Part:
        """Return what was found; ``exactly``: with the delta to what the model itself gives."""
        method, model = self.method, self.method.model
        leaves: list[Traced] = []
        whole = isinstance(self.rule, Difference) or method.gate_rule == "half"
        with torch.enable_grad(), ExitStack() as stack:
            inputs: Tensor = self.inputs
            if inputs.is_floating_point():
                inputs = self._pair(inputs, self._reference(inputs), leaves)
            else:
                stack.enter_context(embedded(model, inputs, partial(self._embed, leaves)))
            asked: list[Tensor] = []
            entering = method._ask(asked, stack)
            apart = self.apart if method.apart else None
            stack.enter_context(follow(model, self._checked, whole, method.checkpoints, apart, entering))
            output = scores(method.forward_func, inputs, *self.args)
            score = method._score(output, self.target, self.contrast)
            if not leaves or not isinstance(score, Traced) or not score.value.requires_grad:
                raise InvalidInputError(
                    "The explained score does not depend on the inputs through the model. Check that forward_func runs "
                    "this model on the inputs as they are, and that the target is read from its output."
                )
            inner = [tensor for tensor in asked if isinstance(tensor, Traced)]
            places = [*leaves, *self.apart, *inner]
            gradients = torch.autograd.grad(score.value.sum(), [place.value for place in places], allow_unused=True)
        found = [
            torch.zeros_like(place.reference) if g is None else (place.value.detach() - place.reference) * g
            for place, g in zip(places, gradients)
        ]
        relevance = torch.stack(found[: len(leaves)]).sum(0)
        direct = found[len(leaves) : len(leaves) + len(self.apart)]
        value, reference = (s.reshape(len(relevance)) for s in (score.value.detach(), score.reference))
        skipped = sum((f.flatten(1).sum(1) for f in direct), relevance.new_zeros(len(relevance)))
        terms = {"skip": skipped} if method.apart else {}
        if self.baseline is None:
            terms = {"bias": reference, **terms}
        tokens = relevance.flatten(1)
        missing = tokens.sum(1) + sum(terms.values()) - (value - (0 if self.baseline is None else reference))
        scale = tokens.abs().sum(1) + value.abs() + reference.abs()
        error = float((missing.abs() / scale.clamp_min(torch.finfo(scale.dtype).tiny)).max())
        self._refuse_incomplete(error, next(model.parameters()).dtype)
        delta = missing
        if exactly or self.rule.held:
            delta, terms = self._against_the_model(tokens, terms, reference)
        if asked:
            relevance = method._asked(found[len(places) - len(inner) :], asked)
        return _Part(relevance, terms, delta, error, self.rule.held, self.fidelity)

    def _against_the_model(
        self, tokens: Tensor, terms: dict[str, Any], reference: Tensor
    ) -> tuple[Tensor, dict[str, Any]]:
        """Return the delta to what the model gives by itself, and with the term of decisions."""
        value = self._run(None).to(tokens).reshape(len(tokens))
        if self.baseline is not None:
            other = self._run(self._reference).to(tokens).reshape(len(tokens))
            if self.rule.held:
                terms = {**terms, "decisions": reference - other}
            value = value - other
        return tokens.sum(1) + sum(terms.values()) - value, terms

    def _run(self, become: Callable[[Tensor], Tensor] | None) -> Tensor:
        """Return the score that the model itself gives for the inputs, or for what becomes of their embeddings."""
        method, inputs = self.method, self.inputs
        with torch.no_grad(), ExitStack() as stack:
            if become is not None and inputs.is_floating_point():
                inputs = become(inputs).to(inputs)
            elif become is not None:
                stack.enter_context(
                    embedded(method.model, inputs, lambda module, output: self._reference(output, module).to(output))
                )
            return method._score(scores(method.forward_func, inputs, *self.args), self.target, self.contrast)

    def _embed(self, leaves: list[Traced], module: nn.Module, output: Tensor) -> Tensor:
        return self._pair(output, self._reference(output, module), leaves)

    def _pair(self, value: Tensor, reference: Tensor, leaves: list[Traced]) -> Traced:
        """Return the embeddings and their reference as the start of the relevance."""
        wide = value.detach().to(torch.promote_types(value.dtype, torch.float32)).requires_grad_()
        leaves.append(Traced.of(wide, reference.to(wide), self.rule))
        return Traced.of(wide.clone(), reference.to(wide, copy=True), self.rule)  # which the model may change in place

    def _reference(self, value: Tensor, embedding: nn.Module | None = None) -> Tensor:
        """Return the reference of embeddings (B, L, E): 0 for frozen gates; padding is its own."""
        if self.baseline is None:
            return torch.zeros_like(value)
        reference = torch.as_tensor(self.baseline, device=value.device)
        if embedding is not None and not reference.is_floating_point():
            with torch.no_grad():
                ids = reference.expand(self.inputs.shape) if reference.dim() < 3 else reference
                reference = type(embedding).forward(embedding, ids)
        if reference.dim() > 0 and reference.shape[-1] not in (1, value.shape[-1]):
            raise InvalidInputError(
                f"The baseline's embeddings have {reference.shape[-1]} components, the model's {value.shape[-1]}."
            )
        reference = reference.to(value).expand_as(value)
        if is_language_model(self.method.forward_func) and self.args and isinstance(self.args[0], Tensor):
            reference = torch.where(self.args[0].bool().unsqueeze(-1), reference, value.detach())
        return reference

    def _checked(self, call: MixerCall, y: Tensor | None) -> None:
        """Check a layer's decomposition by what it gave; by itself where it ran on another input."""
        call, tolerance = call.detach(), self.method.tolerance
        real = real_tokens(self.method.forward_func, self.args, [call])
        error = decompose(call, tolerance, real).error if y is None else check(call, y, tolerance, real)
        self.fidelity[call.name] = error

    def _check(self, baseline: Baseline) -> None:
        """Raise if a baseline does not fit the inputs."""
        if not isinstance(baseline, (int, float, Tensor)):
            raise InvalidInputError(
                f"A baseline is a token id, ids, a number or embeddings, not {type(baseline).__name__}. For a word "
                "take its id: tokenizer.convert_tokens_to_ids(word)."
            )
        reference, shape = torch.as_tensor(baseline), self.inputs.shape
        ids = not self.inputs.is_floating_point() and not reference.is_floating_point()
        vectors = not self.inputs.is_floating_point() and reference.is_floating_point() and reference.dim() > 0
        try:
            fits = torch.broadcast_shapes(reference.shape[:-1] if vectors else reference.shape, shape) == shape
        except RuntimeError:
            fits = False
        if not fits:
            raise InvalidInputError(
                f"The baseline of shape {tuple(reference.shape)} does not fit inputs of shape "
                f"{tuple(self.inputs.shape)}. Pass a number, or what broadcasts to the inputs, such as a token id, ids "
                "or embeddings for all positions; or a list of several such baselines."
            )
        if ids:
            refuse_bad_inputs(self.method.model, reference.expand(self.inputs.shape))
        elif not bool(reference.isfinite().all()):
            raise InvalidInputError("The baseline has NaN or infinite entries.")

    def _refuse_incomplete(self, error: float, dtype: torch.dtype) -> None:
        allowed = COMPLETENESS.get(dtype, 1e-3)
        if not error <= allowed:
            raise FidelityError(
                "the whole model",
                error,
                allowed,
                "code that a rule cannot follow, such as a kernel that is called past torch's functions",
            )


def _single(baseline: Any, inputs: Tensor) -> Any:
    """Return the baseline of the one input, of all examples; Captum's methods also take a tuple of one."""
    baseline = baseline[0] if isinstance(baseline, tuple) and len(baseline) == 1 else baseline
    if not isinstance(baseline, Tensor) or baseline.dim() == 0:
        return baseline
    vectors = baseline.is_floating_point() and not inputs.is_floating_point()
    shape = (*inputs.shape, *baseline.shape[-1:]) if vectors else inputs.shape
    try:
        return baseline.expand(shape)
    except RuntimeError:  # which is refused in a moment, with the shapes
        return baseline
