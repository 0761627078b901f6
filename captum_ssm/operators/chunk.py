"""Chunks of a scan, in two ways: one through all its states, or some at once through their (T, T) matrices."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from captum_ssm.operators.coefficient import Product
from captum_ssm.operators.decays import chunk_decays, decayed_products, heads_first
from captum_ssm.operators.device_sizes import DeviceSize
from captum_ssm.operators.prefix import states_from, suffix

_STATES = DeviceSize(cpu=2**17, others=2**24)
"""Number of states of a chunk: on a processor as many as fit its cache."""

_ENTRIES = DeviceSize(cpu=2**17, others=2**25)
"""Number of entries of a tensor of several chunks: on a processor as many as fit its cache, together with some more
tensors of this size."""

_ONE_DECAY, _DECAY_BY_STATE = DeviceSize(cpu=32, others=64), DeviceSize(cpu=8, others=16)
"""Tokens of a chunk that goes through its (T, T) matrices: few if each state has its own decay."""


def size_by_states(a: Product, states_of_a_token: int) -> int:
    """Return T, the tokens of a chunk that goes through all its states: as many as fit, at least 16."""
    return max(_STATES.of(a.factors[0]) // states_of_a_token, 16)


def size_by_matrix(a: Product) -> int:
    """Return T, the tokens of a chunk that goes through its (T, T) matrices."""
    return (_ONE_DECAY if a.shape[3] == 1 else _DECAY_BY_STATE).of(a.factors[0])


def together_by_matrix(a: Product, B: int, H: int, N: int, P: int) -> int:
    """Return how many chunks go through their matrices at once: as many as fit, at least 1."""
    T = size_by_matrix(a)
    return max(_ENTRIES.of(a.factors[0]) // (B * H * T * max(T * a.shape[3], N, P)), 1)


def chunk_by_states(a: Tensor, b: Tensor, c: Tensor, x: Tensor, h: Tensor, lag: int) -> tuple[Tensor, Tensor, Tensor]:
    """Run one chunk through all its states: best where few channels share a state's decay.

    Args:
        a: Decays (B or 1, T, H or 1, N or 1).
        b: Weights of the input (B or 1, T, H or 1, N or 1).
        c: Weights of the state in the output (B or 1, T, H or 1, N or 1).
        x: (B, T, H, P).
        h: (B, H, N, P), the state before the chunk.
        lag: 1 if the state is read before the current token is written, else 0.

    Returns:
        Output (B, T, H, P), and the state before and after the chunk (B, H, N, P). Cost: O(T·H·N·P) time and memory.
    """
    needs_gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (a, b, c, x, h))
    run: Callable[..., tuple[Tensor, Tensor]] = _ChunkByStates.apply if needs_gradient else _ChunkByStates.forward
    y, after = run(a, b, c, x, h, lag)
    return y, h, after


def chunks_by_matrix(a: Tensor, b: Tensor, c: Tensor, x: Tensor, h: Tensor, lag: int) -> tuple[Tensor, Tensor, Tensor]:
    """Run chunks through their (T, T) attention: best where many channels or right-hand sides share it.

    Args:
        a: Decays (B·C or 1, T, H or 1, N or 1) of C chunks that follow one another, those of an example side by side.
        b: Weights of the input (B·C or 1, T, H or 1, N or 1).
        c: Weights of the state in the output (B·C or 1, T, H or 1, N or 1).
        x: (B·C, T, H, P).
        h: (B, H, N, P), the state before the first chunk.
        lag: 1 if the state is read before the current token is written, else 0.

    Returns:
        Output (B·C, T, H, P), the state before each chunk (B·C, H, N, P), and the state after the last one
        (B, H, N, P). Cost: O(T²·H·(N + P) + T·H·N·P) a chunk.
    """
    N, P = h.shape[2:]
    decays = chunk_decays(a)  # between (B·C, H, T, T, N), since_start (B·C, H, T, N)
    b, c, x = (heads_first(t, size) for t, size in ((b, N), (c, N), (x, P)))  # (B·C, H, T, N) and (B·C, H, T, P)
    writes = (decays.until_end() * b).mT @ x  # (B·C, H, N, P)
    before, after = states_between(h, decays.of_chunk(), writes)
    if lag:
        decays = decays.before_token()
    y = decayed_products(c, decays.between, b) @ x + (c * decays.since_start) @ before  # (B·C, H, T, P)
    return y.transpose(1, 2), before, after


def states_between(h: Tensor, decay: Tensor, writes: Tensor) -> tuple[Tensor, Tensor]:
    """Hand a state on from chunk to chunk, ``h' = decay h + writes``.

    Args:
        h: (B, H, N, P), the state before the first chunk.
        decay: Decay of the state over each chunk, (B·C or 1, H or 1, N or 1, 1).
        writes: What each chunk adds, (B·C, H, N, P).

    Returns:
        The state before each chunk (B·C, H, N, P), and the state after the last one (B, H, N, P).
    """
    if len(writes) == len(h):
        return h, torch.addcmul(writes, decay, h)
    by_chunk = writes.unflatten(0, (len(h), -1))  # (B, C, H, N, P)
    C = by_chunk.shape[1]
    decay = decay.unflatten(0, (-1, C)) if len(decay) > 1 else decay.unsqueeze(1).expand(-1, C, -1, -1, -1)
    states = states_from(h, decay, by_chunk)  # (B, C + 1, H, N, P)
    return states[:, :-1].flatten(0, 1), states[:, -1]


class _ChunkByStates(torch.autograd.Function):
    """The chunk of :func:`chunk_by_states`, and its gradient: the same recurrence from the last token to the first.

    With ``g`` the gradient at the states, ``g_t = a_{t+1} g_{t+1} + c_t dF/dy_t``, the gradients of the coefficients
    are ``dF/da_t = g_t h_{t-1}``, ``dF/db_t = g_t x_t`` and ``dF/dc_t = dF/dy_t h_t``. The states are
    recomputed instead of stored, and each gradient takes one pass over them.
    """

    generate_vmap_rule = True

    @staticmethod
    def forward(a: Tensor, b: Tensor, c: Tensor, x: Tensor, h: Tensor, lag: int) -> tuple[Tensor, Tensor]:
        a, b, c, x, h = _channels_innermost(a, b, c, x, h)
        states = _states(a, b, x, h)  # (B, T + 1, N, H, P)
        return (c * (states[:, :-1] if lag else states[:, 1:])).sum(2), states[:, -1].transpose(1, 2).clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        *tensors, ctx.lag = inputs
        ctx.save_for_backward(*tensors)

    @staticmethod
    def backward(ctx: Any, dy: Tensor, dh: Tensor) -> tuple[Tensor | None, ...]:
        a, b, c, x, h = _channels_innermost(*ctx.saved_tensors)
        dy, last = dy.unsqueeze(2), dh.transpose(1, 2).unsqueeze(1)  # (B, T, 1, H, P) and (B, 1, N, H, P)
        states = _states(a, b, x, h)  # (B, T + 1, N, H, P)
        before, after = states[:, :-1], states[:, 1:]  # each token, (B, T, N, H, P)
        reads = (c * dy).expand_as(after)  # gradient at the state that token t reads
        if ctx.lag:  # token t reads the state before it
            writes = torch.cat([reads[:, 1:], last], dim=1)
        else:
            writes = torch.cat([reads[:, :-1], reads[:, -1:] + last], dim=1)
        g = suffix(a, writes)  # (B, T, N, H, P)
        first = a[:, 0] * g[:, 0] + (reads[:, 0] if ctx.lag else 0)  # (B, N, H, P)
        of_coefficients = (
            (g * before).sum(-1),  # of a
            (g * x).sum(-1),  # of b
            (dy * (before if ctx.lag else after)).sum(-1),  # of c
        )
        by_head = [d.transpose(2, 3) for d in of_coefficients]  # each (B, T, H, N)
        of_x = (b * g).sum(2)  # (B, T, H, P)
        sizes = (t.shape for t in ctx.saved_tensors)
        return *(d.sum_to_size(size) for d, size in zip((*by_head, of_x, first.transpose(1, 2)), sizes)), None


def _channels_innermost(a: Tensor, b: Tensor, c: Tensor, x: Tensor, h: Tensor) -> tuple[Tensor, ...]:
    """Return coefficients, input and state with the axes in the order (B, T, N, H, P), in which states are summed."""
    coefficients = (t.transpose(2, 3).unsqueeze(-1) for t in (a, b, c))  # each (B or 1, T, N or 1, H or 1, 1)
    return *coefficients, x.unsqueeze(2), h.transpose(1, 2)


def _states(a: Tensor, b: Tensor, x: Tensor, h: Tensor) -> Tensor:
    """Return the state before a chunk and the state after each of its tokens, (B, T + 1, N, H, P)."""
    writes = (b * x).expand(-1, -1, *h.shape[1:])  # (B, T, N, H, P)
    return states_from(h, a, writes)
