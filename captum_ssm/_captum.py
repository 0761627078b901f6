"""The only imports of Captum's private helpers, and the types they lack.

``_run_forward`` and its neighbours have kept their place and meaning in Captum 0.7 to 0.9.
"""

from collections.abc import Callable
from typing import Any, TypeVar, cast

from captum._utils.common import (
    _format_additional_forward_args as format_additional_forward_args,
)
from captum._utils.common import _format_output as format_output
from captum._utils.common import _is_tuple as is_tuple
from captum._utils.common import _select_targets
from captum._utils.gradient import compute_gradients
from captum.attr import (
    GradientAttribution,
    LayerAttribution,
    LayerGradientXActivation,
    LLMAttributionResult,
    NeuronAttribution,
)
from captum.log import log_usage as _log_usage
from torch import Tensor

__all__ = [
    "GradientAttribution",
    "LLMAttributionResult",
    "LayerAttribution",
    "LayerGradientXActivation",
    "NeuronAttribution",
    "compute_gradients",
    "format_additional_forward_args",
    "format_output",
    "is_tuple",
    "log_usage",
    "select_targets",
]

Method = TypeVar("Method", bound=Callable[..., Any])


def select_targets(output: Tensor, target: Any) -> Tensor:
    """Return what ``target`` selects from the output, by Captum's rules."""
    return cast(Tensor, _select_targets(output, target))


def log_usage(method: Method) -> Method:
    """Wrap an ``attribute`` method as Captum's do, so that ``attribute.__wrapped__`` exists."""
    return _log_usage()(method)
