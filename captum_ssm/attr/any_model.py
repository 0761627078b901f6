"""A method that explains any model, with known layers or none, and inputs of any shape."""

from __future__ import annotations

from torch import Tensor, nn

from captum_ssm.attr.model_method import ModelMethod
from captum_ssm.errors import InvalidInputError
from captum_ssm.layers.mixers import known_mixers, refuse_scripted
from captum_ssm.network.inputs import refuse_bad_inputs, refuse_bad_values
from captum_ssm.network.interface import is_language_model

_UNKNOWN = nn.Module().eval()
"""Stands for the model behind a plain callable: it has no layer."""


class AnyModelMethod(ModelMethod):
    """A method that explains any model, see :class:`~captum_ssm.attr.model_method.ModelMethod` for the arguments."""

    @property
    def model(self) -> nn.Module:
        """The model whose known layers run by their decomposition; an empty module if it is not known."""
        try:
            return super().model
        except InvalidInputError:
            return _UNKNOWN

    def refuse_model(self) -> None:
        """Raise if the model is code of torch.jit; all others can be followed.

        Raises:
            UnsupportedModelError: With the remedy.
        """
        if not known_mixers(self.model):
            refuse_scripted(self.model)

    def refuse_inputs(self, inputs: Tensor) -> None:
        """Raise if one of the inputs is empty, NaN or infinite, or has bad ids; a language model takes tokens alone.

        Raises:
            InvalidInputError: In each of these cases.
        """
        if is_language_model(self.forward_func):
            refuse_bad_inputs(self.model, inputs)
        else:
            refuse_bad_values(self.model, inputs)
