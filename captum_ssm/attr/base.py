"""What all attribution methods share: the constructor, the call, and the walk from model to scores."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm import tqdm

from captum_ssm._captum import (
    GradientAttribution,
    compute_gradients,
    format_additional_forward_args,
    format_output,
    is_tuple,
    log_usage,
    select_targets,
)
from captum_ssm.aggregate import RolledLayer, rollout
from captum_ssm.attention import TokenMatrix
from captum_ssm.attr.form import Form
from captum_ssm.attr.inputs import (
    Target,
    as_weights,
    free_of_inference_mode,
    real_tokens,
    refuse_bad_inputs,
    refuse_bad_state,
    refuse_padding,
    refuse_wrong_counts,
    select_examples,
    single_tensor,
)
from captum_ssm.attr.view import Attention, LayerView, check_attention, known_terms, refuse_unknown_terms, view
from captum_ssm.capture import MixerCall, record_mixers
from captum_ssm.errors import InvalidInputError, ModelStateError
from captum_ssm.fidelity import Decomposition, decompose
from captum_ssm.readout import attention_mask, is_language_model, scores
from captum_ssm.registry import find_mixers
from captum_ssm.structure import examine
from captum_ssm.wiring import Wiring, find_wire


class ModelMethod(GradientAttribution):
    """What every method that explains a model's score has: the model, the score, and the state it must be in.

    Args:
        forward_func: A transformers model as it is, any other ``torch.nn.Module``, or any callable that
            returns what Captum expects: one score for each example, or a tensor that ``target`` selects from.
        model: The model whose layers are explained; needed if ``forward_func`` is not a module.
        tolerance: Allowed relative error of the decomposition; None chooses by the model's type
            (:data:`captum_ssm.fidelity.TOLERANCE`).

    Attributes:
        fidelity: After a call, the relative error of every layer's decomposition by layer name.

    Raises:
        InvalidInputError: If ``forward_func`` is not a module and no ``model`` is given.
        UnsupportedModelError: If the model has no supported layer.
    """

    one_score = True
    """Whether the target has to select one score for each example."""

    def __init__(
        self, forward_func: Callable[..., Any], model: nn.Module | None = None, *, tolerance: float | None = None
    ) -> None:
        super().__init__(forward_func)
        self._model = model
        self.tolerance = tolerance
        self.fidelity: dict[str, float] = {}
        find_mixers(self.model)

    @property
    def model(self) -> nn.Module:
        """The model whose layers are explained, read when it is needed."""
        if self._model is not None:
            return self._model
        if isinstance(self.forward_func, nn.Module):
            return self.forward_func
        raise InvalidInputError(
            "forward_func is a plain callable, so the model that it runs is not known. Pass it too: "
            f"{type(self).__name__}(forward_func, model=model)."
        )

    def attribute_future(self, *args: Any, **kwargs: Any) -> Any:
        """Not offered: forward functions that return futures have no gradient.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(f"attribute_future is not offered by {type(self).__name__}; call attribute.")

    def _batches(
        self,
        tokens: Tensor,
        args: tuple[Any, ...] | None,
        targets: tuple[Target, ...],
        query: int | Tensor | None,
        size: int | None,
    ) -> Iterator[tuple[Tensor, Callable[[Any], Any]]]:
        """Cut the inputs into batches of ``size`` examples, all at once if it is None; each is checked when it is due.

        Yields:
            The inputs of a batch, and what takes its part of a target or argument.
        """
        count = len(tokens) if tokens.dim() else 0
        step = max(count, 1) if size is None else size
        if step < 1:
            raise InvalidInputError(f"internal_batch_size must be at least 1, not {size}.")
        if step < count:
            refuse_wrong_counts(count, targets, query)
            if is_language_model(self.forward_func) and args and isinstance(args[0], Tensor):
                attention_mask(tokens, args[0])
        for start in range(0, max(count, 1), step):
            batch = tokens if step >= count else tokens[start : start + step]
            refuse_bad_inputs(self.model, batch)
            yield batch, partial(select_examples, count=count, rows=slice(start, start + step))

    def _refuse_replaced_gradient(self) -> None:
        if self.gradient_func is not compute_gradients:
            raise InvalidInputError(
                "gradient_func was replaced, but the methods of this package do not call it. To explain a neuron, pass "
                "a callable that returns it as forward_func, with model=."
            )

    def _score(self, output: Tensor, target: Target, contrast: Target) -> Tensor:
        """Return the explained score of each example, less the contrast's if there is one."""
        score = self._select(output, target)
        if contrast is not None:
            assert target is not None or score.dim() < 2, "Target not provided when necessary: a contrast needs one."
            score = score - self._select(output, contrast)
        return score

    def _select(self, output: Tensor, target: Target) -> Tensor:
        """Return the explained score of each example, (B,), as Captum selects it."""
        assert isinstance(output, Tensor), (
            f"forward_func must return a tensor, not {type(output).__name__}; return its logits, for example."
        )
        try:
            score = select_targets(output, target)
        except (IndexError, RuntimeError) as error:
            raise AssertionError(f"Target {target!r} does not fit an output of shape {tuple(output.shape)}.") from error
        one_each = score.dim() == 0 or score[0].numel() == 1
        assert one_each or (target is None and not self.one_score), (
            f"Target not provided when necessary: the output has shape {tuple(output.shape)}, so a target must "
            "select one score for each example."
        )
        if not bool(score.isfinite().all()):
            raise ModelStateError(
                "The explained score is NaN or infinite. Check the model's weights and the inputs for NaN or "
                "infinity, or run the model in a wider floating-point type."
            )
        return score


class ImplicitAttentionMethod(ModelMethod):
    """Explain a score by the implicit attention of a model's gated-linear layers.

    Every method takes the same constructor and the same :meth:`attribute`; they differ in how a layer becomes
    one matrix between tokens, and how the matrices become scores.

    Args:
        forward_func: A transformers model as it is, any other ``torch.nn.Module``, or any callable that
            returns what Captum expects: one score for each example, or a tensor that ``target`` selects from.
        model: The model whose layers are explained; needed if ``forward_func`` is not a module.
        attention: ``"unified"``: the whole layer between its projections (Zimerman et al. 2025). ``"scan"``:
            the recurrence alone, without its skip (Ali et al. 2024).
        without: Factors or terms to leave out of the attention, such as ``("conv", "gate", "skip")``. A family
            that lacks one is left as it is; a name that no layer has is refused.
        tolerance: Allowed relative error of the decomposition; None chooses by the model's type
            (:data:`captum_ssm.fidelity.TOLERANCE`).

    Attributes:
        fidelity: After a call, the relative error of every layer's decomposition by layer name.

    Raises:
        InvalidInputError: If ``forward_func`` is not a module and no ``model`` is given, or an option is unknown.
        UnsupportedModelError: If the model has no supported layer.

    Example:
        >>> import torch
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> from captum_ssm import ImplicitAttentionAttribution, models
        >>> model = AutoModelForCausalLM.from_pretrained(models.REVIEWS)
        >>> tokenizer = AutoTokenizer.from_pretrained(models.REVIEWS)
        >>> ids = tokenizer("a gorgeous, witty film", return_tensors="pt").input_ids
        >>> target = tokenizer.convert_tokens_to_ids("positive")
        >>> scores = ImplicitAttentionAttribution(model).attribute(ids, target=target)
        >>> scores.shape == ids.shape
        True
    """

    gradient_at: Literal["every layer", "last layer"] = "every layer"
    """Where the gradient of the score is needed; at the last layer it tells which positions are explained."""

    def __init__(
        self,
        forward_func: Callable[..., Any],
        model: nn.Module | None = None,
        *,
        attention: Attention = "unified",
        without: Sequence[str] = (),
        tolerance: float | None = None,
    ) -> None:
        super().__init__(forward_func, model, tolerance=tolerance)
        check_attention(attention)
        self.attention: Attention = attention
        self.without = (without,) if isinstance(without, str) else tuple(without)

    @log_usage
    def attribute(
        self,
        inputs: Tensor | tuple[Tensor, ...],
        target: Target = None,
        additional_forward_args: Any = None,
        *,
        query: int | tuple[int, int] | Tensor | None = None,
        contrast: Target = None,
        patches: bool = False,
        internal_batch_size: int | None = None,
        show_progress: bool = False,
    ) -> Any:
        """Return one score for each token.

        Args:
            inputs: Token ids (B, L), embeddings (B, L, E), or images (B, C, H, W), or a tuple of one such tensor.
            target: What to explain, in any form that Captum takes. For a transformers model an int is a
                vocabulary entry, read at the last real token, or a class of a classifier.
            additional_forward_args: Passed on after the inputs. For a transformers model: its attention mask
                (B, L), 0 at padding.
            query: The explained positions: a position, a position for each example (B,), weights (B, L), or a patch
                of images, (row, column). None reads them off the target: where the score depends on the last layer's
                output.
            contrast: Explain why the target and not this one, in any form of a target: the score is the target's less
                the contrast's.
            patches: Return the grid of an image's patches rather than its pixels.
            internal_batch_size: Explain so many examples at a time; all at once by default.
            show_progress: Show a progress bar if the call takes more than two seconds.

        Returns:
            Scores (B, L) for token ids, 0 at padding. For embeddings (B, L, E): the method knows tokens, not
            their components, so each component carries an equal share and the sum over E is the token's
            score. For images likewise (B, C, H, W), where all that a patch reads carries an equal share, or with
            ``patches`` the patches' scores (B, rows, columns); the score of a token that reads no pixel, such as a
            class token, is in neither. A tuple if ``inputs`` is one. In the units of the method, see the class.

        Raises:
            AssertionError: If ``target`` does not fit the output.
            InvalidInputError: If the inputs are empty, out of range or of the wrong kind.
            ModelStateError: If the model is training, has a warm cache, or gives NaN or infinity.
            UnsupportedModelError: If the model has no supported layer, or another that mixes tokens.
            FidelityError: If a layer's decomposition misses the layer's real output.
        """
        with torch.inference_mode(False):
            tokens = single_tensor(inputs)
            args = format_additional_forward_args(additional_forward_args)
            form = Form(self.model, self.forward_func, tokens, args, patches)
            query = form.position(query)
            parts, worst = [], dict[str, float]()
            for batch, some in self._batches(tokens, args, (target, contrast), query, internal_batch_size):
                parts.append(
                    self._attribute(batch, some(target), some(contrast), some(args), some(query), show_progress)
                )
                worst = {name: max(error, worst.get(name, 0.0)) for name, error in self.fidelity.items()}
            self.fidelity = worst
            result = form.of_tokens(torch.cat(parts))
        return format_output(is_tuple(inputs), (result.detach().contiguous(),))

    @abstractmethod
    def _aggregate(self, layer: Callable[[int], LayerView], wiring: Wiring, query: Tensor) -> Tensor:
        """Return scores (B, L) from the layers by number, what they read, and the explained positions."""

    def _rollout(
        self,
        matrix: Callable[[LayerView], TokenMatrix],
        layer: Callable[[int], LayerView],
        wiring: Wiring,
        query: Tensor,
    ) -> Tensor:
        """Roll out what ``matrix`` makes of the layers."""

        def rolled(number: int) -> RolledLayer:
            seen = layer(number)
            return RolledLayer(matrix(seen), seen.wire.keep * torch.ones_like(query), seen.embedded)

        return rollout(rolled, wiring, query)

    def _attribute(
        self,
        inputs: Tensor,
        target: Target,
        contrast: Target,
        additional_forward_args: tuple[Any, ...] | None,
        query: int | Tensor | None,
        progress: bool,
    ) -> Tensor:
        model = self.model
        self._refuse_replaced_gradient()
        refuse_bad_state(model)
        target, contrast = free_of_inference_mode(target), free_of_inference_mode(contrast)
        args = tuple(map(free_of_inference_mode, additional_forward_args or ()))
        with progress_bar(type(self).__name__, 2 * len(find_mixers(model)), progress) as advance:
            calls, gradients = self._run(inputs, target, contrast, args, advance)
            run = partial(scores, self.forward_func, inputs, *args)
            wiring = examine(model, run, calls, self.forward_func)
            real = real_tokens(self.forward_func, args, calls)
            with torch.no_grad():
                positions = as_weights(query, calls[-1].y) if query is not None else _positions(gradients[-1])
                refuse_padding(positions, real)

                def layer(number: int) -> Decomposition:
                    advance()
                    return decompose(calls[number], self.tolerance, real)

                return self._explain(calls, layer, gradients, wiring, real, positions)

    def _explain(
        self,
        calls: list[MixerCall],
        decomposition: Callable[[int], Decomposition],
        gradients: Sequence[Tensor | None],
        wiring: Wiring,
        real: Tensor,
        positions: Tensor,
    ) -> Tensor:
        """Return the scores.

        Args:
            calls: The mixers' calls.
            decomposition: Of a call, by its number.
            gradients: Of the explained score at each call's output, (..., B, L, E), or None.
            wiring: What the calls read.
            real: 1 at real tokens and 0 at padding, (B, L).
            positions: Weights of the explained positions (..., B, L).

        Returns:
            (..., B, L): dimensions in front of B are those of the gradients and positions.
        """
        self.fidelity = {}
        terms: set[str] = set()

        def layer(number: int) -> LayerView:
            call = calls[number]
            decomposed = decomposition(number)
            self.fidelity[call.name] = decomposed.error
            terms.update(known_terms(decomposed, self.attention))
            wire = find_wire(self.model, call.name, call.mixer, call.state)
            return view(decomposed, self.attention, self.without, real, gradients[number], wire)

        positions = positions.to(torch.promote_types(calls[-1].y.dtype, torch.float32))
        result = self._aggregate(layer, wiring, positions)
        refuse_unknown_terms(terms, self.attention, self.without)
        return result

    def _run(
        self, inputs: Tensor, target: Target, contrast: Target, args: tuple[Any, ...], advance: Callable[[], object]
    ) -> tuple[list[MixerCall], list[Tensor | None]]:
        """Run the model forward and back; return the mixers' calls, free of the graph, and their gradients."""
        hold = self.gradient_at == "last layer"
        with torch.enable_grad(), record_mixers(self.model, hold=hold, seen=advance) as calls:
            output = scores(self.forward_func, inputs, *args)
            score = self._score(output, target, contrast)
            gradients = self._gradients(score, calls)
        return [call.detach() for call in calls], gradients

    def _gradients(self, score: Tensor, calls: list[MixerCall]) -> list[Tensor | None]:
        """Return the gradient of the score at each mixer's output, or None where it is not needed."""
        outputs = [call.y for call in calls]
        if self.gradient_at == "last layer":
            outputs = outputs[-1:]
        if not outputs or not score.requires_grad:
            raise InvalidInputError(
                "The explained score does not depend on any supported layer of the model. Check that forward_func "
                "runs this model, with gradients enabled, and that the target is read from its output."
            )
        gradients = torch.autograd.grad(score.sum(), outputs, allow_unused=True)
        found = [torch.zeros_like(y) if g is None else g for y, g in zip(outputs, gradients)]
        found = [g.to(torch.promote_types(g.dtype, torch.float32)) for g in found]
        return [*[None] * (len(calls) - len(found)), *found]


def _positions(gradient: Tensor | None) -> Tensor:
    """Return the explained positions (B, L): the length of the gradient at each token, summing to 1."""
    if gradient is None:
        raise ValueError("The last layer was recorded without a gradient.")
    length = gradient.norm(dim=-1)
    total = length.sum(-1, keepdim=True)
    if not bool((total > 0).all() & total.isfinite().all()):
        raise ModelStateError(
            "The gradient of the explained score at the last layer is zero, NaN or infinite, so no position can be "
            "explained. Explain another target, pass `query`, or check the weights for NaN or infinity."
        )
    return length / total


@contextmanager
def progress_bar(name: str, total: int, show: bool, unit: str = "layer") -> Iterator[Callable[..., object]]:
    """Yield a function that advances a bar by a number of steps, or one; it appears only after two seconds."""
    with tqdm(total=total, desc=name, unit=unit, delay=2, leave=False, disable=not show) as bar:
        yield bar.update
