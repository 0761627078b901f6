"""Decompose a recorded call, and compare the decomposition with the output that the layer itself gave."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from captum_ssm.errors import (
    FidelityError,
    InvalidInputError,
    ModelStateError,
    UnsupportedModelError,
)
from captum_ssm.layers.call import LayerCall
from captum_ssm.layers.isolated import run_isolated
from captum_ssm.layers.mixers import find_adapter
from captum_ssm.layers.placement import in_place
from captum_ssm.layers.precision import in_full_precision, under
from captum_ssm.layers.release import NEWEST, transformers_release
from captum_ssm.layers.stand_ins import as_called, refusal
from captum_ssm.operators import Chain

_CAUSES = (
    "a patched or hooked layer, a cache that holds a state, a mask that the adapter does not see, "
    "an adapter that leaves out a factor or a bias"
)

_OUT_OF_RANGE = "numbers of the decomposition that float32 cannot hold, but float64 can: explain model.double()"

TOLERANCE = {torch.float64: 1e-5, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Allowed relative error by the model's type. transformers computes parts of its layers in float32.

A layer may differ by more, if the difference is the rounding of its own code: in a model of half precision, or where a
model of float64 has layers that compute in float32."""


@dataclass(frozen=True)
class Decomposition:
    """A mixer's call as a chain of linear operators.

    Args:
        name: Dotted name of the mixer in the model.
        chain: The layer, given its gates.
        x: Input (B, L, E), in the chain's type.
        error: Largest absolute difference between ``chain.apply(x, bias=True)`` and the layer's own output, relative
            to the largest absolute output.
    """

    name: str
    chain: Chain
    x: Tensor
    error: float


def check_tolerance(tolerance: float | None) -> None:
    """Raise if an allowed error is no number.

    Raises:
        InvalidInputError: If it is neither None nor a number of at least 0.
    """
    if tolerance is not None and not (isinstance(tolerance, (int, float)) and tolerance >= 0):
        raise InvalidInputError(f"tolerance must be a number of at least 0, or None, not {tolerance!r}.")


@in_full_precision
def decompose(call: LayerCall, tolerance: float | None = None, mask: Tensor | None = None) -> Decomposition:
    """Decompose one recorded call, and check that the decomposition reproduces the layer's output.

    Args:
        call: A call recorded by :func:`~captum_ssm.network.recording.record_mixers`.
        tolerance: Allowed relative error; None takes :data:`TOLERANCE` of the layer's type.
        mask: 1 at real tokens and 0 at padding, (B, L): outputs at padding are not compared. None if there is no
            padding.

    Returns:
        The chain with its error.

    Raises:
        FidelityError: If the decomposition misses the layer's own output by more than the tolerance.
        ModelStateError: If the layer's input or output is not finite.
        UnsupportedModelError: If the layer is not built like the one of its name that the adapter knows.
        InvalidInputError: If padding before a sequence, or a masked token within it, changes the layer's output.

    Cost: one pass of the chain, O(L·D·(E + N)), and one more for each length of padding before a sequence.
    """
    x = call.wide_input
    with torch.no_grad():
        chain = unchecked_chain(call, x)
        error = check_fidelity(call, chain.apply(x, bias=True), tolerance, mask, chain)
    return Decomposition(call.name, chain, x, error)


def check_finite(call: LayerCall) -> None:
    """Raise if a layer's input or output is not finite.

    Args:
        call: The recorded call.

    Raises:
        ModelStateError: With the name of the layer.
    """
    for name, tensor in (("input", call.x), ("output", call.y)):
        if not bool(tensor.isfinite().all()):
            raise ModelStateError(
                f"The {name} of layer '{call.name}' has NaN or infinite entries. Check the model's weights and the "
                "inputs for NaN or infinity, or run the model in a wider floating-point type."
            )


def unchecked_chain(call: LayerCall, x: Tensor) -> Chain:
    """Return the chain that the adapter gives for a call, not compared with the layer's output.

    Args:
        call: The recorded call.
        x: The call's input, in at least float32.

    Returns:
        The chain, whose gates depend on ``x`` by autograd.

    Raises:
        ModelStateError: If the layer's input or output is not finite.
        UnsupportedModelError: If no adapter knows the layer, or it is another library's layer of the same name.
    """
    check_finite(call)
    adapter, class_name = find_adapter(call.mixer), type(call.mixer).__name__
    if adapter is None:
        raise UnsupportedModelError(f"No adapter is registered for layer '{call.name}' ({class_name}).")
    try:
        with as_called(call.called):
            return adapter(call.mixer_in_place, x, _in_place(call.kwargs, x.device))
    except (AttributeError, KeyError) as error:
        if reason := refusal(call.name, call.mixer):
            raise UnsupportedModelError(f"The adapter of a layer cannot read {reason}.") from error
        missing = f"it has no {error}" if isinstance(error, KeyError) else str(error)
        release = transformers_release(type(call.mixer).__module__)
        release = f"It is that of {release}. " if release else ""
        raise UnsupportedModelError(
            f"Layer '{call.name}' has the name {class_name}, but is not built like the layer that the adapter of this "
            f"name knows: {missing}. {release}Register an adapter of its own: captum_ssm.unregister("
            f"{class_name!r}) where the name itself is taken, then captum_ssm.register({class_name!r})."
        ) from error


def _in_place(kwargs: Mapping[str, Any], device: torch.device) -> Mapping[str, Any]:
    """Return the arguments of a call, among which may be another layer, with the tensors of that."""
    return {n: in_place(value, device) if isinstance(value, nn.Module) else value for n, value in kwargs.items()}


@in_full_precision
@torch.no_grad()
def check_fidelity(
    call: LayerCall, y: Tensor, tolerance: float | None = None, mask: Tensor | None = None, chain: Chain | None = None
) -> float:
    """Compare the output of a call's decomposition with the layer's own output.

    Args:
        call: The recorded call.
        y: Output (B, L, E) of the decomposition for the call's input.
        tolerance: Allowed relative error; None takes :data:`TOLERANCE` of the layer's type.
        mask: 1 at real tokens and 0 at padding, (B, L), or None.
        chain: The decomposition; if it is None and there is padding, the call is decomposed once more.

    Returns:
        The relative error.

    Raises:
        FidelityError: If the error exceeds the tolerance.
        InvalidInputError: If padding before a sequence, or a masked token within it, changes the layer's output.
    """
    mask = y.new_ones(y.shape[:2]) if mask is None else mask.to(y)
    y, y_layer = (mask.unsqueeze(-1) * output for output in (y, call.y.to(y)))
    error = relative_error(y, y_layer)
    tolerance = TOLERANCE.get(call.narrowest_type, 1e-4) if tolerance is None else tolerance
    if not (error <= tolerance or _is_rounding(call, y, mask)):
        raise FidelityError(call.name, error, tolerance, _likely_cause(call, y, error))
    if not bool(mask.all()):
        x = call.wide_input
        if chain is None:
            chain = unchecked_chain(call, x)
            # compared with itself: parts with quantised weights give the caller's output another rounding
            y = mask.unsqueeze(-1) * chain.apply(x, bias=True)
        if chain.causal:
            _refuse_leaking_padding(call, chain, x, y, mask)
        _refuse_masked_tokens_that_matter(call, chain, x, y, mask)
    return error


def _likely_cause(call: LayerCall, y: Tensor, error: float) -> str:
    """Say why a decomposition may miss the layer's own output.

    Args:
        call: The recorded call.
        y: Output (B, L, E) of the decomposition.
        error: The relative error.

    Returns:
        The causes, as a part of a sentence.
    """
    if not math.isfinite(error) and y.dtype == torch.float32:
        return _OUT_OF_RANGE
    if reason := refusal(call.name, call.mixer):
        return reason
    release = transformers_release(type(call.mixer).__module__)
    if release and _reads_the_future(call):
        return (
            f"the layer's own code in {release}, in which later tokens change what earlier ones give: a fault that "
            f"{NEWEST} does not have (pip install --upgrade transformers)"
        )
    return f"{_CAUSES}, the code of {release}; every supported layer of {NEWEST} is exact" if release else _CAUSES


def _reads_the_future(call: LayerCall) -> bool:
    """Whether the layer's own code gives its first tokens another output if the last token is another."""
    x = call.x if call.own_input is None else call.own_input
    other = torch.cat([x[:, :-1], 10 * x[:, -1:].roll(1, -1)], 1)
    before, after = (_output_of_own_code(call, each)[:, :-1] for each in (x, other))
    return x.shape[1] > 1 and relative_error(after, before) > TOLERANCE[torch.float32]


def _output_of_own_code(call: LayerCall, x: Tensor, *, wide: bool = False) -> Tensor:
    """Return the output (B, L, E) of a layer's own code for another input of its call, see :func:`run_isolated`."""
    with under(() if wide else call.autocast), as_called(call.called):
        return run_isolated(call.mixer_in_place, x, call.kwargs, wide=wide)


def _is_rounding(call: LayerCall, y: Tensor, mask: Tensor) -> bool:
    """Whether a layer's output differs from its decomposition by the rounding of its own code alone.

    Code in half precision rounds, and so does code that computes a part in float32 in a model of float64. The layer's
    own code must give the recorded output if it is run again in its type, and the output ``y`` of the decomposition if
    all of it is run in the type of ``y``.

    Returns:
        Whether both hold.
    """
    if call.narrowest_type == y.dtype != torch.float64:
        return False
    x = call.x if call.own_input is None else call.own_input
    for like, expected, wide in ((call.y.to(call.own_type), call.y, False), (y, y, True)):
        output = _output_of_own_code(call, x.to(like), wide=wide).to(y) * mask.unsqueeze(-1)
        if not relative_error(output, expected.to(y) * mask.unsqueeze(-1)) <= TOLERANCE[like.dtype]:
            return False
    return True


def _refuse_leaking_padding(call: LayerCall, chain: Chain, x: Tensor, y: Tensor, mask: Tensor) -> None:
    """Raise if a layer that starts at a sequence's first real token gives another output than with the padding."""
    padding = mask.argmax(1)  # tokens before the first real one, (B,)
    for start in padding.unique().tolist():
        if start == 0:
            continue
        rows = padding == start
        shortened = mask[rows, start:].unsqueeze(-1) * chain.after(start).apply(x[:, start:], bias=True)[rows]
        error = relative_error(shortened, y[rows, start:])
        if not error <= TOLERANCE[x.dtype]:
            raise InvalidInputError(
                f"Padding on the left changes what layer '{call.name}' ({type(call.mixer).__name__}) gives for the "
                f"real tokens, by {error:.1e} (relative): the model itself ignores the mask there, or adds a bias to "
                "the padding. Pad on the right, or explain sequences of other lengths one by one."
            )


def _refuse_masked_tokens_that_matter(call: LayerCall, chain: Chain, x: Tensor, y: Tensor, mask: Tensor) -> None:
    """Raise if the output at real tokens reads masked tokens between them, or any masked token if not causal."""
    masked = mask == 0  # (B, L)
    if chain.causal:
        masked &= (mask.cumsum(1) > 0) & (mask.flip(1).cumsum(1).flip(1) > 0)
    if not bool(masked.any()):
        return
    output, core, into = chain.split()
    v = into.apply(x, bias=True) * (~masked).unsqueeze(-1)
    without = mask.unsqueeze(-1) * output.apply(core.apply(v, bias=True), bias=True)
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
