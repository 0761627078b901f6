"""Decompose a recorded call and check the result against what the model really gave."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from captum_ssm.capture import MixerCall
from captum_ssm.errors import FidelityError, InvalidInputError, ModelStateError, UnsupportedModelError
from captum_ssm.operators import Chain
from captum_ssm.registry import find_adapter
from captum_ssm.rerun import rerun

_CAUSES = (
    "a patched or hooked layer, a cache that holds a state, a mask that the adapter does not see, "
    "an adapter that leaves out a factor or a bias"
)

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Allowed relative error by the model's type. transformers computes parts of its layers in float32.

A model in half precision may differ by more, where that is the rounding of its own code."""


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


def decompose(call: MixerCall, tolerance: float | None = None, real: Tensor | None = None) -> Decomposition:
    """Decompose one recorded call, and check that the decomposition reproduces the layer's output.

    Args:
        call: What :func:`~captum_ssm.capture.record_mixers` recorded.
        tolerance: Allowed relative error; None takes :data:`TOLERANCE` of the layer's type.
        real: 1 at real tokens and 0 at padding, (B, L): what a layer gives at padding is not compared. None if all
            tokens are real.

    Raises:
        FidelityError: If the decomposition misses the real output by more than the tolerance.
        ModelStateError: If the layer's input or output is not finite.
        UnsupportedModelError: If the layer is not built like the one of its name that the adapter knows.
        InvalidInputError: If padding before a sequence, or what is masked within it, changes the layer's output.

    Cost: one pass of the chain, O(L·D·(E + N)), and one more for each length of padding before a sequence.
    """
    x = _widened(call)
    with torch.no_grad():
        chain = adapt(call, x)
        error = check(call, chain.apply(x, bias=True), tolerance, real, chain)
    return Decomposition(call.name, chain, x, error)


def adapt(call: MixerCall, x: Tensor) -> Chain:
    """Return what the adapter makes of a call, unchecked.

    Args:
        call: As for :func:`decompose`.
        x: The call's input, in at least float32.

    Raises:
        ModelStateError: If the layer's input or output is not finite.
        UnsupportedModelError: If no adapter knows the layer, or it is another library's layer of the same name.
    """
    for what, tensor in (("input", call.x), ("output", call.y)):
        if not bool(tensor.isfinite().all()):
            raise ModelStateError(
                f"The {what} of layer '{call.name}' has NaN or infinite entries. Check the model's weights and the "
                "inputs for NaN or infinity, or run the model in a wider floating-point type."
            )
    adapter, name = find_adapter(call.mixer), type(call.mixer).__name__
    if adapter is None:
        raise UnsupportedModelError(f"No adapter is registered for layer '{call.name}' ({name}).")
    try:
        return adapter(call.mixer, x, call.kwargs)
    except (AttributeError, KeyError) as error:
        what = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        raise UnsupportedModelError(
            f"Layer '{call.name}' has the name {name}, but is not built like the layer that the adapter of this name "
            f"knows: {what}. Register an adapter of its own: captum_ssm.unregister({name!r}) where the name itself is "
            f"taken, then captum_ssm.register({name!r})."
        ) from error


@torch.no_grad()
def check(
    call: MixerCall, y: Tensor, tolerance: float | None = None, real: Tensor | None = None, chain: Chain | None = None
) -> float:
    """Check what a call's decomposition gives, and return its relative error.

    Args:
        call: As for :func:`decompose`.
        y: What the decomposition gives for the call's input.
        tolerance: As for :func:`decompose`.
        real: Likewise.
        chain: The decomposition; None makes it where there is padding, which asks for more than ``y``.

    Raises:
        FidelityError: As :func:`decompose`.
        InvalidInputError: Likewise.
    """
    shown = y.new_ones(y.shape[:2]) if real is None else real.to(y)
    y, exact = (shown.unsqueeze(-1) * output for output in (y, call.y.to(y)))
    error = relative_error(y, exact)
    tolerance = TOLERANCE.get(call.y.dtype, 1e-4) if tolerance is None else tolerance
    if not (error <= tolerance or _is_rounding(call, y, shown)):
        raise FidelityError(call.name, error, tolerance, _CAUSES)
    if not bool(shown.all()):
        x = _widened(call)
        chain = adapt(call, x) if chain is None else chain
        if chain.causal:
            _refuse_leaking_padding(call, chain, x, y, shown)
        _refuse_read_gaps(call, chain, x, y, shown)
    return error


def _widened(call: MixerCall) -> Tensor:
    """Return a call's input in at least float32."""
    return call.x.to(torch.promote_types(call.x.dtype, torch.float32))


def _is_rounding(call: MixerCall, y: Tensor, real: Tensor) -> bool:
    """Whether a layer in a narrow type differs from its decomposition by its own rounding alone.

    Its own code must give the real output when it is run again in its type, and what the decomposition gives when it
    is run in the type of ``y``.
    """
    if call.y.dtype == y.dtype:
        return False
    own = call.x if call.own is None else call.own
    for like, expected in ((call.y, call.y), (y, y)):
        output = rerun(call.mixer, own.to(like), call.kwargs).to(y) * real.unsqueeze(-1)
        if not relative_error(output, expected.to(y) * real.unsqueeze(-1)) <= TOLERANCE[like.dtype]:
            return False
    return True


def _refuse_leaking_padding(call: MixerCall, chain: Chain, x: Tensor, y: Tensor, real: Tensor) -> None:
    """Raise if a layer that starts at a sequence's first real token gives another output than the layer gave."""
    padding = real.argmax(1)
    for start in padding.unique().tolist():
        if start == 0:
            continue
        rows = padding == start
        alone = real[rows, start:].unsqueeze(-1) * chain.after(start).apply(x[:, start:], bias=True)[rows]
        error = relative_error(alone, y[rows, start:])
        if not error <= TOLERANCE[x.dtype]:
            raise InvalidInputError(
                f"Padding on the left changes what layer '{call.name}' ({type(call.mixer).__name__}) gives for the "
                f"real tokens, by {error:.1e} (relative): the model itself ignores the mask there, or adds a bias to "
                "the padding. Pad on the right, or explain sequences of other lengths one by one."
            )


def _refuse_read_gaps(call: MixerCall, chain: Chain, x: Tensor, y: Tensor, real: Tensor) -> None:
    """Raise if what a layer gives for real tokens reads what is masked between them, or anywhere if not causal."""
    gaps = real == 0
    if chain.causal:
        gaps &= (real.cumsum(1) > 0) & (real.flip(1).cumsum(1).flip(1) > 0)
    if not bool(gaps.any()):
        return
    output, core, into = chain.split()
    v = into.apply(x, bias=True) * (~gaps).unsqueeze(-1)
    without = real.unsqueeze(-1) * output.apply(core.apply(v, bias=True), bias=True)
    error = relative_error(without, y)
    if not error <= TOLERANCE[x.dtype]:
        raise InvalidInputError(
            f"Layer '{call.name}' ({type(call.mixer).__name__}) reads tokens that the mask leaves out: without them "
            f"its output for the real ones differs by {error:.1e} (relative). Remove these tokens from the inputs."
        )


def relative_error(approximate: Tensor, exact: Tensor) -> float:
    """Return the largest absolute difference over the largest absolute value of ``exact``."""
    exact = exact.to(approximate)
    difference, scale = (approximate - exact).abs().max().item(), exact.abs().max().item()
    return difference if scale == 0 else difference / scale
