"""Recurrent networks and their cells, step by step.

The parameters of the functions are those of ``torch._VF``, which the modules of ``torch.nn`` call: a tensor of packed
sequences takes other ones, and is refused.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.relevance.functions.table import composed

Cell = Callable[[Tensor, tuple[Tensor, ...], Callable[[Tensor], Tensor]], tuple[Tensor, ...]]
"""From what a cell reads of its input (B, gates H), its states (B, H), and what it reads of the first state, to its new
states, the first of which is its output."""


def _lstm_step(read: Tensor, states: tuple[Tensor, ...], recall: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    h, c = states
    enter, keep, value, leave = (read + recall(h)).chunk(4, -1)
    c = keep.sigmoid() * c + enter.sigmoid() * value.tanh()
    return leave.sigmoid() * c.tanh(), c


def _gru_step(read: Tensor, states: tuple[Tensor, ...], recall: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
    (h,) = states
    (r, z, n), (hr, hz, hn) = read.chunk(3, -1), recall(h).chunk(3, -1)
    value = (n + (r + hr).sigmoid() * hn).tanh()
    return (value + (z + hz).sigmoid() * (h - value),)


def _simple_step(activation: Callable[[Tensor], Tensor]) -> Cell:
    def step(read: Tensor, states: tuple[Tensor, ...], recall: Callable[[Tensor], Tensor]) -> tuple[Tensor, ...]:
        return (activation(read + recall(states[0])),)

    return step


def _direction(cell: Cell, x: Tensor, states: tuple[Tensor, ...], weights: Sequence[Any]) -> Any:
    """Run a cell along a sequence.

    Args:
        cell: The cell.
        x: The sequence (L, B, inputs).
        states: The first states, each (B, H).
        weights: Of the input, of the state, their biases or None, and of the output or None.

    Returns:
        The outputs (L, B, H) and the last states.
    """
    of_input, of_state, bias, state_bias, of_output = weights
    outputs = []
    for read in F.linear(x, of_input, bias).unbind(0):
        h, *rest = cell(read, states, lambda h: F.linear(h, of_state, state_bias))
        states = (h if of_output is None else F.linear(h, of_output), *rest)
        outputs.append(states[0])
    return torch.stack(outputs), states


def _network(
    cell: Cell, x: Tensor, states: tuple[Tensor, ...], weights: Any, biased: bool, layers: int, dropout: float,
    training: bool, bidirectional: bool, batch_first: bool = False,
) -> Any:  # fmt: skip
    """Run layers of a cell, in both directions if the network is bidirectional.

    Args:
        cell: The cell.
        x: The sequences (L, B, inputs), or (B, L, inputs) if ``batch_first``.
        states: The first states, each (layers times directions, B, H).
        weights: Tensors of each layer and direction, one after the other.
        biased: Whether there are biases.
        layers: The number of layers.
        dropout: The share of the outputs between layers that is dropped in training mode.
        training: Whether the network is in training mode.
        bidirectional: Whether there are two directions.
        batch_first: Whether the first axis of the sequences is that of the batch.

    Returns:
        The outputs, and the last states, each (layers times directions, B, H).

    Raises:
        NotImplementedError: For packed sequences, and for dropout in training mode.
    """
    if isinstance(weights, Tensor):
        raise NotImplementedError("packed sequences")
    if dropout and training and layers > 1:
        raise NotImplementedError("dropout in training mode")
    runs = layers * (1 + bidirectional)
    each, x = len(weights) // runs, x.transpose(0, 1) if batch_first else x
    last, outputs = [], []
    for k in range(runs):
        backward = bidirectional and k % 2 == 1
        of_state, of_output = weights[k * each : k * each + 2], weights[k * each + 2 : (k + 1) * each]
        biases, projection = (of_output[:2], of_output[2:]) if biased else ((None, None), of_output)
        own = (*of_state, *biases, projection[0] if projection else None)
        y, ends = _direction(cell, x.flip(0) if backward else x, tuple(state[k] for state in states), own)
        last.append(ends)
        outputs.append(y.flip(0) if backward else y)
        if backward or not bidirectional:
            x, outputs = torch.cat(outputs, -1), []
    return x.transpose(0, 1) if batch_first else x, *(torch.stack(ends) for ends in zip(*last))


@composed("lstm")
def _lstm(x: Tensor, states: Any, weights: Any, *options: Any) -> Any:
    return _network(_lstm_step, x, _listed(states), weights, *options)


def _cell_of(cell: Cell) -> tuple[Callable[..., Any], Callable[..., Any]]:
    """Return the network and the cell of one state."""

    def network(x: Tensor, state: Tensor, weights: Any, *options: Any) -> Any:
        return _network(cell, x, (state,), weights, *options)

    def one(x: Tensor, state: Tensor, of_input: Tensor, of_state: Tensor, b: Any = None, c: Any = None) -> Tensor:
        return cell(F.linear(x, of_input, b), (state,), lambda h: F.linear(h, of_state, c))[0]

    return network, one


for _name, _step in (
    ("gru", _gru_step), ("rnn_tanh", _simple_step(torch.tanh)), ("rnn_relu", _simple_step(torch.relu)),
):  # fmt: skip
    _all_steps, _one_step = _cell_of(_step)
    composed(_name)(_all_steps)
    composed(f"{_name}_cell")(_one_step)


@composed("lstm_cell")
def _lstm_cell(x: Tensor, states: Any, of_input: Tensor, of_state: Tensor, b: Any = None, c: Any = None) -> Any:
    return _lstm_step(F.linear(x, of_input, b), tuple(states), lambda h: F.linear(h, of_state, c))


def _listed(states: Any) -> tuple[Tensor, ...]:
    """Return the states of a network.

    Raises:
        NotImplementedError: If they are the sizes of packed sequences.
    """
    if isinstance(states, Tensor):
        raise NotImplementedError("packed sequences")
    return tuple(states)
