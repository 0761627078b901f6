"""Loops over tokens have the gradients that they have by themselves, in linear time."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from captum_ssm import ImplicitAttentionAttribution
from captum_ssm.network.token_loops import linear_time_loops
from tests.tensors_made import Entries

L = 40


def recurrence(t: Tensor) -> Tensor:
    h = t.new_zeros(len(t), t.shape[2])
    outputs = []
    for i in range(t.shape[1]):
        h = torch.sigmoid(t[:, i]) * h + t[:, i, :]
        outputs.append(h)
    return torch.stack(outputs, 1)


def backwards(t: Tensor) -> Tensor:
    return sum((t[:, -i] ** i for i in range(1, t.shape[1])), t[:, 0])


def other_axes(t: Tensor) -> Tensor:
    parts = [t[..., i, :2] * t[:, i, None, 1:3].squeeze(1) + t[0, i, :2] + t.mT[..., i][..., :2] for i in range(L)]
    return torch.stack(parts)


def whole_rows(t: Tensor) -> Tensor:
    t = t[0]
    return sum((t[i] * i for i in range(L)), t[0])


def written_between(t: Tensor) -> Tensor:
    t = t * 1
    for i in range(1, t.shape[1]):
        t[:, i] += t[:, i - 1].tanh()
    return t


def rows_written(t: Tensor) -> Tensor:
    t = t * 1
    for i in range(1, t.shape[1]):
        row = t[:, i]
        row.mul_(t[:, i - 1].sigmoid())
    return t


def written_after_many(t: Tensor) -> Tensor:
    t = t * 1
    before = sum((t[:, i] * i for i in range(L)), t[:, 0] * 2)
    t.mul_(3)
    return before + sum((t[:, i] ** 2 for i in range(L)), t[:, 0])


LOOPS = (recurrence, backwards, other_axes, whole_rows, written_between, rows_written, written_after_many)


@pytest.mark.parametrize("loop", LOOPS, ids=lambda loop: loop.__name__)
def test_values_and_gradients_are_those_of_the_loop(loop: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, L, 4, dtype=torch.float64, requires_grad=True)
    own, weights = loop(x), torch.randn_like(loop(x))
    with linear_time_loops(L):
        ours = loop(x)
    torch.testing.assert_close(ours, own, rtol=0, atol=0)
    gradients = [torch.autograd.grad(y, x, weights)[0] for y in (ours, own)]
    torch.testing.assert_close(*gradients, rtol=1e-12, atol=1e-12)


def test_indices_without_an_entry_are_left_to_torch() -> None:
    x = torch.randn(1, L, 3, requires_grad=True)
    with linear_time_loops(L):
        for _ in range(L):
            assert x[:, torch.tensor([1, 2])].shape == (1, 2, 3)
            assert x[:, True].shape == x[:, True, ...].shape
            assert x[0, 1].shape == (3,)
            with pytest.raises(IndexError):
                x[:, L]
            with pytest.raises(IndexError):
                x[0, :, :, 1]


def entries_of_gradient(length: int, tokens: int) -> int:
    x = torch.randn(1, length, 4, requires_grad=True)
    with linear_time_loops(tokens):
        y = recurrence(x)
    with Entries() as entries:
        torch.autograd.grad(y.sum(), x)
    return entries.count


def test_a_gradient_takes_linear_time() -> None:
    ours, own = ([entries_of_gradient(length, length * on) for length in (64, 128)] for on in (1, 0))
    assert ours[1] / ours[0] < 2.1 < 3 < own[1] / own[0]


def test_a_method_takes_linear_time_on_code_that_loops() -> None:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=20, hidden_size=8, state_size=4, num_hidden_layers=3)
    method = ImplicitAttentionAttribution(MambaForCausalLM(config).eval(), rectify=None)
    written = []
    for length in (64, 128):
        ids = torch.randint(20, (1, length))
        method.attribute(ids, target=3)  # the model is examined
        with Entries() as entries:
            method.attribute(ids, target=3)
        written.append(entries.count)
    assert written[1] / written[0] < 2.3


def test_the_context_ends_with_an_error() -> None:
    x = torch.randn(1, L, 3, requires_grad=True)
    with pytest.raises(RuntimeError, match="of the model"), linear_time_loops(L):
        raise RuntimeError("of the model")
    assert all(type(x[:, i].grad_fn).__name__ == "SelectBackward0" for i in range(L))
