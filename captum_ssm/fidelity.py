"""Decompose a recorded call and check the result against what the model really gave."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from captum_ssm.capture import MixerCall
from captum_ssm.errors import FidelityError, ModelStateError, UnsupportedModelError
from captum_ssm.operators import Chain
from captum_ssm.registry import find_adapter

_CAUSES = "a patched or hooked layer, a cache that holds a state, a mask that the adapter does not see"

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Allowed relative error by the model's type. transformers computes parts of its layers in float32."""


@dataclass(frozen=True)
class Decomposition:
    """A mixer's call as a chain of linear operators.

    Args:
        name: Dotted name of the mixer in the model.
        chain: The layer, given its gates.
        x: Input (B, L, E), in the chain's type.
        error: Largest absolute difference between ``chain.apply(x, bias=True)`` and the real output, relative
            to the largest absolute output.
    """

    name: str
    chain: Chain
    x: Tensor
    error: float


def decompose(call: MixerCall, tolerance: float | None = None) -> Decomposition:
    """Decompose one recorded call, and check that the decomposition reproduces the layer's output.

    Args:
        call: What :func:`~captum_ssm.capture.record_mixers` recorded.
        tolerance: Allowed relative error; None takes :data:`TOLERANCE` of the layer's type.

    Raises:
        FidelityError: If the decomposition misses the real output by more than the tolerance.
        ModelStateError: If the layer's input or output is not finite.

    Cost: one pass of the chain, O(L·D·(E + N)).
    """
    for what, tensor in (("input", call.x), ("output", call.y)):
        if not bool(tensor.isfinite().all()):
            raise ModelStateError(
                f"The {what} of layer '{call.name}' has NaN or infinite entries. Check the model's weights and the "
                "inputs for NaN or infinity, or run the model in a wider floating-point type."
            )
    adapter = find_adapter(call.mixer)
    if adapter is None:
        raise UnsupportedModelError(f"No adapter is registered for layer '{call.name}' ({type(call.mixer).__name__}).")
    x = call.x.to(torch.promote_types(call.x.dtype, torch.float32))
    with torch.no_grad():
        chain = adapter(call.mixer, x, call.kwargs)
        error = relative_error(chain.apply(x, bias=True), call.y)
    tolerance = TOLERANCE.get(call.y.dtype, 1e-4) if tolerance is None else tolerance
    if not error <= tolerance:
        raise FidelityError(call.name, error, tolerance, _CAUSES)
    return Decomposition(call.name, chain, x, error)


def relative_error(approximate: Tensor, exact: Tensor) -> float:
    """Return the largest absolute difference over the largest absolute value of ``exact``."""
    exact = exact.to(approximate)
    difference, scale = (approximate - exact).abs().max().item(), exact.abs().max().item()
    return difference if scale == 0 else difference / scale
