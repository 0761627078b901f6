"""Recurrences with exponential gates, kept relative to the size of their state so that no exponent is positive.

A recurrence ``h_t = exp(step_t) h_{t-1} + exp(gate_t) x_t`` overflows in this form. With ``m_t`` at or above the
logarithm of the state's size, ``h_t / exp(m_t)`` does not, and m cancels where the state is divided by a normaliser
that follows the same recurrence.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function_unary


def upper_bound(x: Tensor) -> Tensor:
    """Find a constant at or above ``x`` that exponents are kept relative to, where it cancels in the end.

    It is ``x``, and the larger of input and reference where a rule of relevance compares the two. The rule takes over
    this function through ``__torch_function__``.

    Args:
        x: Exponents, any shape.

    Returns:
        The constant, of the shape of ``x``.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(upper_bound, (x,), x)
    return x


def normalized_exponentials(x: Tensor, axis: int) -> Tensor:
    """Compute the softmax, as a function that a rule of relevance takes over through ``__torch_function__``.

    Args:
        x: Exponents, any shape.
        axis: The axis of the sum.

    Returns:
        The exponentials over their sum, of the shape of ``x``.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(normalized_exponentials, (x,), x, axis)
    return x.softmax(axis)


def log_of_sum(x: Tensor, axis: int | tuple[int, ...]) -> Tensor:
    """Compute the logarithm of a sum of exponentials, as a function that a rule of relevance takes over.

    Args:
        x: Exponents, any shape.
        axis: The axis of the sum, or several.

    Returns:
        The logarithm, with size 1 along the axis.
    """
    if has_torch_function_unary(x):
        return handle_torch_function(log_of_sum, (x,), x, axis)
    return x.logsumexp(axis, keepdim=True)


def running_max(step: Tensor, gate: Tensor) -> Tensor:
    """Compute ``m_t = max(m_{t-1} + step_t, gate_t)`` along axis 1, from ``m_0 = gate_0``.

    It is the logarithm of a state's size. The reach of the maximum is doubled until it spans the sequence, so steps are
    summed over the tokens that one maximum reaches, never over all tokens.

    Args:
        step: Logarithms of the decays (B, L, ...), not positive.
        gate: Logarithms of the weights of the input (B, L, ...).

    Returns:
        m (B, L, ...).

    Cost: O(L·log L) for each channel.
    """
    reach = 1
    while reach < gate.shape[1]:
        reached = torch.maximum(gate[:, reach:], gate[:, :-reach] + step[:, reach:])
        gate = torch.cat([gate[:, :reach], reached], dim=1)
        step = torch.cat([step[:, :reach], step[:, reach:] + step[:, :-reach]], dim=1)
        reach *= 2
    return gate


def relative_gates(step: Tensor, gate: Tensor, m: Tensor, before: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the coefficients of the recurrence of ``h_t / exp(m_t)``.

    Args:
        step: Logarithms of the decays, broadcastable to (B, L, ...).
        gate: Logarithms of the weights of the input (B, L, ...).
        m: Logarithms that the states are kept relative to (B, L, ...).
        before: The m of the token before each (B, L, ...); any number before the first, which has no state before it.

    Returns:
        The decays ``exp(m_{t-1} - m_t + step_t)`` and the weights of the input ``exp(gate_t - m_t)``, (B, L, ...).
    """
    return torch.exp(before - m + step), torch.exp(gate - m)
