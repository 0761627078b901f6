"""The errors of the package; each message names the cause and the remedy, and a note the page that says more."""

from __future__ import annotations

from typing import Any, ClassVar

PAGE = "https://captum-ssm.readthedocs.io/en/stable/errors.html"
"""The page about all errors, with one anchor for each class."""


class _WithPageError(Exception):
    """An error with a place in the documentation, which stands below it in a traceback.

    Attributes:
        docs: The address of that place.
    """

    docs: ClassVar[str] = PAGE

    def __init_subclass__(cls) -> None:
        if cls.__module__ == __name__:  # a subclass elsewhere has the place of its base
            cls.docs = f"{PAGE}#{cls.__name__.lower()}"

    def __init__(self, message: str = "") -> None:
        super().__init__(message)
        self.add_note(f"See {self.docs}")

    def __reduce__(self) -> tuple[Any, ...]:
        """Return how a copy is made, also in another process: the message is not written anew."""
        return _restored, (type(self), self.args, self.__dict__)


def _restored(kind: type[_WithPageError], args: tuple[Any, ...], state: dict[str, Any]) -> _WithPageError:
    """Return an error with these arguments and attributes, without a call of its constructor."""
    error = kind.__new__(kind, *args)
    error.__dict__.update(state)
    return error


class UnsupportedModelError(_WithPageError, ValueError):
    """No layer of the model has an adapter, one without an adapter mixes tokens, or a function has no rule."""


class InvalidInputError(_WithPageError, ValueError):
    """The inputs, the mask or an option are wrong or do not fit together."""


class ModelStateError(_WithPageError, RuntimeError):
    """The model is in a state in which no explanation would be right: training, a filled cache, NaN."""


class FidelityError(_WithPageError, RuntimeError):
    """A layer's decomposition does not reproduce the layer's own output.

    Attributes:
        layer: Dotted name of the layer in the model.
        error: Largest absolute difference, relative to the largest absolute output.
    """

    def __init__(self, layer: str, error: float, tolerance: float, cause: str):
        super().__init__(
            f"The decomposition of layer '{layer}' misses its real output by {error:.1e} (relative; "
            f"allowed {tolerance:.1e}), so its attention would not be the layer's. Likely causes: {cause}. "
            "Undo the change, register an adapter for the changed layer (captum_ssm.register), or, where "
            "reduced precision alone explains the figure, pass a larger `tolerance`."
        )
        self.layer = layer
        self.error = error


class CompletenessError(FidelityError):
    """The relevance does not add up to the difference, or the score, that the model itself gives.

    Attributes:
        layer: ``"the whole model"``.
        error: Largest error of the sum, relative to the sum of the absolute relevances.
    """

    def __init__(self, error: float, tolerance: float, lost: str = ""):
        _WithPageError.__init__(
            self,
            f"The relevance of the whole model misses the difference that the model itself makes by {error:.1e} "
            f"(relative; allowed {tolerance:.1e}), so a path from the inputs to the score was lost or followed "
            f"wrongly. Likely causes: {lost}code that torch's functions do not show (a kernel, a scripted or traced "
            "function), a wrong rule (captum_ssm.register_rule), token ids that are read past torch, a layer that a "
            "tolerance let pass, or a model whose output is not the same twice. Let the code run as functions of "
            "torch, register a rule for it, or, where reduced precision alone explains the figure, pass a larger "
            "`tolerance`.",
        )
        self.layer = "the whole model"
        self.error = error


def is_own(error: BaseException) -> bool:
    """Whether an error is one of this package's."""
    return isinstance(error, (UnsupportedModelError, InvalidInputError, ModelStateError, FidelityError))
