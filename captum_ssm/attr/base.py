"""The shared parts of the methods of implicit attention: the constructor, the call, the way from model to scores."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor, nn

from captum_ssm._captum import format_additional_forward_args, format_output, is_tuple, log_usage
from captum_ssm._progress import progress_bar
from captum_ssm.attr.model_method import ModelMethod
from captum_ssm.attr.score_shape import ScoreShape
from captum_ssm.errors import InvalidInputError, ModelStateError
from captum_ssm.layers.call import LayerCall, together
from captum_ssm.layers.fidelity import Decomposition
from captum_ssm.layers.mixers import find_mixers
from captum_ssm.layers.precision import in_full_precision
from captum_ssm.matrices.layer_stack import LayerStack
from captum_ssm.matrices.split_layer import AttentionScope, SplitLayer, check_scope
from captum_ssm.network.examination import examine
from captum_ssm.network.forward import run_model
from captum_ssm.network.graph import ResidualGraph
from captum_ssm.network.inputs import (
    Target,
    names,
    outside_inference_mode,
    query_weights,
    refuse_bad_state,
    refuse_padding,
    single_tensor,
    token_mask,
)
from captum_ssm.network.interface import is_language_model
from captum_ssm.network.recording import record_mixers
from captum_ssm.network.token_loops import linear_time_loops
from captum_ssm.network.turns import unchanged


class ImplicitAttentionMethod(ModelMethod):
    """Explain a score by the implicit attention of a model's gated-linear layers.

    Every method takes the same constructor and the same :meth:`attribute`; they differ in how a layer becomes
    one matrix between tokens, and how the matrices become scores.

    Args:
        forward_func: A transformers model, any other ``torch.nn.Module``, or any callable that returns an output that
            Captum accepts: one score for each example, or a tensor that ``target`` selects from.
        model: The model whose layers are explained; needed if ``forward_func`` is not a module.
        attention: ``"unified"``: the whole layer between its projections (Zimerman et al. 2025). ``"scan"``:
            the recurrence alone, without its skip (Ali et al. 2024).
        without: Factors or terms to leave out of the attention, such as ``("conv", "gate", "skip")``. A layer
            that lacks one stays unchanged; a name that no layer has is refused.
        tolerance: Allowed relative error of the decomposition; None chooses by the model's type
            (:data:`captum_ssm.layers.fidelity.TOLERANCE`).

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

    gradient_at: ClassVar[Literal["every layer", "last layer"]] = "every layer"
    """Where the gradient of the score is needed; at the last layer it tells which positions are explained."""

    def __init__(
        self,
        forward_func: Callable[..., Any],
        model: nn.Module | None = None,
        *,
        attention: AttentionScope = "unified",
        without: Sequence[str] = (),
        tolerance: float | None = None,
    ) -> None:
        super().__init__(forward_func, model, tolerance=tolerance)
        check_scope(attention)
        self.attention: AttentionScope = attention
        self.without = names(without, "without")

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
            target: The class or token to explain, in any form that Captum takes. For a transformers model an int is a
                vocabulary entry, read at the last real token, or a class of a classifier.
            additional_forward_args: Passed on after the inputs. For a transformers model: its attention mask
                (B, L), 0 at padding.
            query: The explained positions: a position, a position for each example (B,), weights (B, L), or a patch
                of images, (row, column). None takes the positions of the last layer's output that the score depends
                on, weighted by the length of the gradient.
            contrast: Explain why the target and not this one, in any form of a target: the score is the target's less
                the contrast's.
            patches: Return the grid of an image's patches rather than its pixels.
            internal_batch_size: Explain so many examples at a time; all at once by default.
            show_progress: Show a progress bar if the call takes more than two seconds.

        Returns:
            Scores (B, L) for token ids, 0 at padding. For embeddings (B, L, E): the method knows tokens, not
            their components, so each component carries an equal share and the sum over E is the token's
            score. For images (B, C, H, W), where all pixels that a patch reads carry equal shares, or with
            ``patches`` the patches' scores (B, rows, columns); the score of a token that reads no pixel, such as a
            class token, is in neither. A tuple if ``inputs`` is one. In the units of the method, see the class.

        Raises:
            AssertionError: If ``target`` does not fit the output.
            InvalidInputError: If the inputs are empty, out of range or of the wrong type.
            ModelStateError: If the model is training, has a warm cache, or gives NaN or infinity.
            UnsupportedModelError: If the model has no supported layer, or another that mixes tokens.
            FidelityError: If a layer's decomposition misses the layer's own output.
        """
        with torch.inference_mode(False), unchanged(self.model, self.forward_func, inputs):
            tokens = single_tensor(inputs)
            args = format_additional_forward_args(additional_forward_args)
            shape = ScoreShape(self.model, self.forward_func, tokens, args, patches)
            query = shape.position(query)
            scores, worst = [], dict[str, float]()
            for (batch,), select in self.batches((tokens,), args, (target, contrast), query, internal_batch_size):
                scores.append(
                    self.token_scores(
                        batch, select(target), select(contrast), select(args), select(query), progress=show_progress
                    )
                )
                worst = {name: max(error, worst.get(name, 0.0)) for name, error in dict(self.fidelity).items()}
            self.fidelity = worst
            result = shape.from_tokens(torch.cat(scores).to(tokens.device))
        return format_output(is_tuple(inputs), (result.detach().contiguous(),))

    def token_scores(
        self,
        inputs: Tensor,
        target: Target = None,
        contrast: Target = None,
        args: tuple[Any, ...] | None = None,
        query: int | Tensor | None = None,
        *,
        progress: bool = False,
    ) -> Tensor:
        """Return one score for each token of one batch: record, examine, and roll out the layers one by one.

        Args:
            inputs: Token ids (B, L), embeddings (B, L, E), or images (B, C, H, W).
            target: The class or token to explain, in any form that Captum takes.
            contrast: The target to explain it against, or None.
            args: The additional forward arguments.
            query: A position, one for each example (B,), or weights (B, L); None reads them off the gradient.
            progress: Show a progress bar if the call takes more than two seconds.

        Returns:
            Scores (B, L), 0 at padding.

        Raises:
            AssertionError, InvalidInputError, ModelStateError, UnsupportedModelError, FidelityError: As documented for
                :meth:`attribute`.
        """
        model = self.model
        self.refuse_replaced_gradient()
        refuse_bad_state(model)
        target, contrast = outside_inference_mode(target), outside_inference_mode(contrast)
        args = tuple(map(outside_inference_mode, args or ()))
        with progress_bar(type(self).__name__, 2 * len(find_mixers(model)), progress) as advance:
            calls, gradients = self._record(inputs, target, contrast, args, advance)
            mask = token_mask(self.forward_func, args, calls)
            run = partial(_run_on, self.forward_func, args)
            own = () if is_language_model(self.forward_func) else args  # besides the mask, which changes with the text
            graph = examine(model, calls, inputs, mask, run, self.forward_func, own)
            with torch.no_grad():
                weights = (
                    graph.in_order_of_inputs(-1, _gradient_weights(gradients[-1]))
                    if query is None
                    else query_weights(query, calls[-1].y)
                )
                refuse_padding(weights, mask)
                return self.scores_of_calls(calls, gradients, graph, mask, weights, on_layer=advance)

    @in_full_precision
    def scores_of_calls(
        self,
        calls: Sequence[LayerCall],
        gradients: Sequence[Tensor | None],
        graph: ResidualGraph,
        mask: Tensor,
        query: Tensor,
        *,
        on_layer: Callable[[], object] = lambda: None,
        decompositions: dict[int, Decomposition] | None = None,
    ) -> Tensor:
        """Return the scores of the tokens from the recorded calls of one run.

        Args:
            calls: The mixers' calls.
            gradients: Gradient of the explained score at each call's output, (..., B, L, E), or None.
            graph: Which calls read which.
            mask: 1 at real tokens and 0 at padding, (B, L).
            query: Weights of the explained positions (..., B, L).
            on_layer: Called before each decomposition, for a progress bar.
            decompositions: Decompositions by number, kept from one explanation of the same calls for the next.

        Returns:
            (..., B, L): dimensions in front of B are those of the gradients and the query.
        """
        layers = LayerStack(
            self.model, calls, mask, self.attention, self.without, self.tolerance, gradients, on_layer, decompositions
        )
        self.fidelity = layers.fidelity
        scores = self._aggregate(layers, graph, query.to(calls[-1].wide_input.dtype))
        layers.refuse_unknown_terms()
        return scores

    @abstractmethod
    def _aggregate(self, layers: Sequence[SplitLayer], graph: ResidualGraph, query: Tensor) -> Tensor:
        """Return scores (..., B, L) from the layers, the residual graph, and the explained positions (..., B, L)."""

    def _record(
        self, inputs: Tensor, target: Target, contrast: Target, args: tuple[Any, ...], on_call: Callable[[], object]
    ) -> tuple[list[LayerCall], list[Tensor | None]]:
        """Run the model forward and back; return the mixers' calls, free of the graph, and the gradients there."""
        hold = self.gradient_at == "last layer"
        with torch.enable_grad(), record_mixers(self.model, hold=hold, on_call=on_call) as calls:
            with linear_time_loops(0 if hold else max(inputs.shape, default=0)):
                output = run_model(self.forward_func, inputs, *args)
            score = self.explained_score(output, target, contrast)
            gradients = self._gradients(score, calls)
        return together(calls), gradients

    def _gradients(self, score: Tensor, calls: list[LayerCall]) -> list[Tensor | None]:
        """Return the gradient of the score at each mixer's output, (B, L, E), or None if it is not needed."""
        outputs = [call.y for call in calls]
        if self.gradient_at == "last layer":
            outputs = outputs[-1:]
        if not outputs or not score.requires_grad:
            raise InvalidInputError(
                "The explained score does not depend on any supported layer of the model, as far as gradients tell. "
                "Check that forward_func runs this model itself, not a traced or exported copy, in this thread, with "
                "gradients enabled and not stopped on the way (detach, no_grad), and that the target is read from its "
                "output."
            )
        gradients = torch.autograd.grad(score.sum(), outputs, allow_unused=True)
        like = together(calls)[-1].wide_input
        wide = [(torch.zeros_like(y) if g is None else g).to(like) for y, g in zip(outputs, gradients)]
        return [*[None] * (len(calls) - len(wide)), *wide]


def _run_on(forward_func: Callable[..., Any], args: tuple[Any, ...], inputs: Tensor) -> Tensor:
    """Return the output of the model on these inputs."""
    return run_model(forward_func, inputs, *args)


def _gradient_weights(gradient: Tensor | None) -> Tensor:
    """Return the explained positions (B, L): the length of the gradient at each token, summing to 1."""
    if gradient is None:
        raise ValueError("The last layer was recorded without a gradient.")
    length = gradient.norm(dim=-1)
    total = length.sum(-1, keepdim=True)
    if not bool(total.isfinite().all()):
        raise ModelStateError(
            "The gradient of the explained score at the last layer is NaN or infinite, so no position can be "
            "explained. Check the weights for NaN or infinity, or pass `query`."
        )
    if not bool((total > 0).all()):
        raise ModelStateError(
            "The gradient of the explained score at the last layer is zero, so no position can be explained: the score "
            "is constant there, or code behind the layers stops the gradient (detach, no_grad). Explain another "
            "target, remove such code, or pass `query`."
        )
    return length / total
