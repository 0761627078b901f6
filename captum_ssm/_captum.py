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
    """Return the entries of the output that the target selects, by Captum's rules.

    Args:
        output: Output of a model, (B, ...).
        target: The target, in any form that Captum takes.

    Raises:
        AssertionError: If the target does not fit the output.
    """
    assert not (isinstance(target, Tensor) and target.is_meta), "Target is on device meta, which keeps no values."
    try:
        return cast(Tensor, _select_targets(output, target))
    except (IndexError, RuntimeError, TypeError, ValueError) as error:
        raise AssertionError(f"Target {target!r} does not fit an output of shape {tuple(output.shape)}.") from error


def log_usage(method: Method) -> Method:
    """Wrap an ``attribute`` method as Captum's do, so that ``attribute.__wrapped__`` exists."""
    return _log_usage()(method)
