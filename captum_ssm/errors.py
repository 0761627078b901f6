"""Every error of the package; each message names the cause and the remedy."""


class UnsupportedModelError(ValueError):
    """The model has a token mixer that no adapter knows, or none that any adapter knows."""


class InvalidInputError(ValueError):
    """The inputs, the mask or an option cannot be explained as given."""


class ModelStateError(RuntimeError):
    """The model is not in a state in which an explanation would be right: training, a warm cache, NaN."""


class FidelityError(RuntimeError):
    """A layer's decomposition does not reproduce the output that the layer really gave.

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
