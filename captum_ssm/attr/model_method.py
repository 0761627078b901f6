"""A method that explains a model's score: the model, the score, the batches, and the required state of the model."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, ClassVar

from torch import Tensor, nn

from captum_ssm._captum import GradientAttribution, compute_gradients, select_targets
from captum_ssm.errors import InvalidInputError, ModelStateError
from captum_ssm.layers.fidelity import check_tolerance
from captum_ssm.layers.mixers import find_mixers
from captum_ssm.network.eager import compiled_from
from captum_ssm.network.forward import checked_mask
from captum_ssm.network.hosts import called
from captum_ssm.network.inputs import Target, refuse_bad_inputs, refuse_wrong_counts, select_examples
from captum_ssm.network.interface import is_language_model


class ModelMethod(GradientAttribution):
    """A method that explains a model's score: the model, the score, and the state that the model must be in.

    Args:
        forward_func: A transformers model, any other ``torch.nn.Module``, or any callable that returns an output that
            Captum accepts: one score for each example, or a tensor that ``target`` selects from.
        model: The model whose layers are explained; needed if ``forward_func`` is neither a module nor
            a module's method.
        tolerance: Allowed relative error of the decomposition; None chooses by the model's type
            (:data:`captum_ssm.layers.fidelity.TOLERANCE`).

    Attributes:
        fidelity: After a call, the relative error of every layer's decomposition by layer name.

    Raises:
        InvalidInputError: If ``forward_func`` is not a module and no ``model`` is given, or the tolerance is no number.
        UnsupportedModelError: If the model has no supported layer.
    """

    one_score: ClassVar[bool] = True
    """Whether the target has to select one score for each example."""

    def __init__(
        self, forward_func: Callable[..., Any], model: nn.Module | None = None, *, tolerance: float | None = None
    ) -> None:
        super().__init__(forward_func)
        check_tolerance(tolerance)
        self._model = model
        self.tolerance = tolerance
        self.fidelity: dict[str, float] = {}
        self.refuse_model()

    @property
    def model(self) -> nn.Module:
        """The model whose layers are explained, read when it is needed; not a host in whose place it is called."""
        if self._model is not None:
            return called(self._model)
        forward_func = called(self.forward_func)
        if isinstance(forward_func, nn.Module):
            return forward_func
        owner = getattr(compiled_from(self.forward_func), "__self__", None)  # of a method
        if isinstance(owner, nn.Module):
            return owner
        raise InvalidInputError(
            "forward_func is a plain callable, so the model that it runs is not known. Pass it too: "
            f"{type(self).__name__}(forward_func, model=model)."
        )

    def refuse_model(self) -> None:
        """Raise if the model has no layer that this method can decompose.

        Raises:
            UnsupportedModelError: With the supported layers.
        """
        find_mixers(self.model)

    def attribute_future(self, *args: Any, **kwargs: Any) -> Any:
        """Not offered: forward functions that return futures have no gradient.

        Raises:
            NotImplementedError: Always.
        """
        raise NotImplementedError(f"attribute_future is not offered by {type(self).__name__}; call attribute.")

    def batches(
        self,
        inputs: tuple[Tensor, ...],
        args: tuple[Any, ...] | None,
        targets: tuple[Target, ...],
        query: int | Tensor | None,
        size: int | None,
    ) -> Iterator[tuple[tuple[Tensor, ...], Callable[[Any], Any]]]:
        """Cut the inputs into batches; each is checked when its turn comes.

        Args:
            inputs: The inputs of all examples.
            args: The additional forward arguments.
            targets: The target, and the contrast.
            query: The explained positions, if the caller names them.
            size: How many examples a batch has; None takes all at once.

        Yields:
            The inputs of a batch and a function that selects the batch's part of a target or argument.

        Raises:
            AssertionError: If there are several targets, and not as many as examples.
            InvalidInputError: If the size is not positive, or a count or an input does not fit.
        """
        count = len(inputs[0]) if inputs[0].dim() else 0
        if size is not None and (not isinstance(size, int) or size < 1):
            raise InvalidInputError(f"internal_batch_size must be an int of at least 1, not {size!r}.")
        step = max(count, 1) if size is None else size
        if step < count:
            refuse_wrong_counts(count, targets, query)
            if is_language_model(self.forward_func) and args and isinstance(args[0], Tensor):
                checked_mask(inputs[0], args[0])
        for start in range(0, max(count, 1), step):
            batch = tuple(x if step >= count else x[start : start + step] for x in inputs)
            for x in batch:
                self.refuse_inputs(x)
            yield batch, partial(select_examples, count=count, rows=slice(start, start + step))

    def refuse_inputs(self, inputs: Tensor) -> None:
        """Raise if one of the inputs cannot be explained.

        Raises:
            InvalidInputError: If it is empty, of the wrong type or shape, or has bad values.
        """
        refuse_bad_inputs(self.model, inputs)

    def refuse_replaced_gradient(self) -> None:
        """Raise if ``gradient_func`` was replaced, as Captum's tools for neurons do.

        Raises:
            InvalidInputError: With the way to explain a neuron.
        """
        if self.gradient_func is not compute_gradients:
            raise InvalidInputError(
                "gradient_func was replaced, but the methods of this package do not call it. To explain a neuron, pass "
                "a callable that returns it as forward_func, with model=."
            )

    def explained_score(self, output: Tensor, target: Target, contrast: Target) -> Tensor:
        """Return the explained score of each example, (B,): the target's, less the contrast's if there is one."""
        score = self._select(output, target)
        if contrast is not None:
            assert target is not None or score.dim() < 2, "Target not provided when necessary: a contrast needs one."
            score = score - self._select(output, contrast)
        return score

    def _select(self, output: Tensor, target: Target) -> Tensor:
        """Return the score of each example, (B,), by Captum's rules for targets."""
        assert isinstance(output, Tensor), (
            f"forward_func must return a tensor, not {type(output).__name__}; return its logits, for example."
        )
        score = select_targets(output, target)
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
