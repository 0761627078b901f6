"""While one thread explains a model, others may run it and explain it: each gets its own result, and nothing stays."""

import copy
import pickle
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache

from captum_ssm import (
    ClassTokenAttention,
    ImplicitAttentionAttribution,
    ImplicitAttentionRelevance,
    ImplicitAttentionRollout,
    LayerImplicitAttention,
    LayerImplicitAttentionAttribution,
    LayerImplicitAttentionRelevance,
    LLMImplicitAttention,
    NeuronImplicitAttentionRelevance,
    RawImplicitAttention,
    reference_kernels,
)
from captum_ssm.network.threads import current_thread, hook, substitute, working_for
from tests.conftest import build, snapshot

SECONDS = 1.5
MIXED = ["mamba", "qwen3_5", "rwkv", "recurrent_gemma", "zamba", "falcon_h1"]


@pytest.fixture(autouse=True)
def _short_turns() -> Iterator[None]:
    """Let threads take turns after 10 microseconds, so that they meet everywhere."""
    import sys

    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(before)


def in_turn(*jobs: Callable[[], Tensor], seconds: float = SECONDS) -> None:
    """Run each job alone, then all in a thread each for a time: every result must be that of the job alone."""
    alone = [job() for job in jobs]
    end, problems, counts = time.monotonic() + seconds, list[Any](), [0] * len(jobs)

    def work(number: int) -> None:
        try:
            while (time.monotonic() < end or counts[number] < 2) and not problems:
                torch.testing.assert_close(jobs[number](), alone[number], rtol=1e-4, atol=1e-5)
                counts[number] += 1
        except BaseException as error:
            problems.append(error)

    threads = [threading.Thread(target=work, args=(number,)) for number in range(len(jobs))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if problems:
        raise problems[0]


def jobs(model: Any, ids: Tensor) -> dict[str, Callable[[], Tensor]]:
    """Everything that a thread may do with a model, each on other tokens."""

    def served() -> Tensor:
        with torch.no_grad():
            return model(ids.flip(1), use_cache=False).logits

    return {
        "served": served,
        "signed": lambda: ImplicitAttentionAttribution(model, rectify=None).attribute(ids, 3),
        "relevance": lambda: ImplicitAttentionRelevance(model).attribute(ids.roll(1, 1), 2, baselines=1),
        "checkpoints": lambda: ImplicitAttentionRelevance(model, checkpoints=True).attribute(ids[:, :5], 4),
        "rollout": lambda: ImplicitAttentionRollout(model).attribute(ids[1:], 1),
    }


@pytest.mark.parametrize("name", MIXED)
def test_a_model_is_served_while_it_is_explained(name: str, ids: Tensor) -> None:
    model = build(name)
    every = jobs(model, ids)
    for job in every.values():  # RWKV divides its weights when it first runs
        job()
    before = snapshot(model, ())
    in_turn(*every.values())
    assert snapshot(model, ()) == before


def test_a_model_is_explained_by_two_threads_at_once(mamba: Any, ids: Tensor) -> None:
    every = jobs(mamba, ids)
    in_turn(every["signed"], every["signed"], every["relevance"], every["relevance"])


def test_states_on_modules_are_those_of_the_thread_that_decodes(ids: Tensor) -> None:
    """RecurrentGemma keeps them there: one thread decodes step by step while another explains other tokens."""
    model = build("recurrent_gemma")

    def decode() -> Tensor:
        cache, logits = DynamicCache(config=model.config), []
        with torch.no_grad():
            model(ids, use_cache=True, past_key_values=cache)
            for token in range(3, 9):
                logits.append(model(torch.full((2, 1), token), use_cache=True, past_key_values=cache).logits)
        return torch.cat(logits, 1)

    every = jobs(model, ids)
    in_turn(decode, every["signed"], every["relevance"])
    assert all(layer.temporal_block.rg_lru.recurrent_states is not None for layer in model.model.layers[:1])


@pytest.mark.parametrize("kind", ["forward", "pre"])
def test_a_hook_acts_in_its_thread_alone(kind: str) -> None:
    layer, seen = nn.Linear(2, 2), []
    register = layer.register_forward_hook if kind == "forward" else layer.register_forward_pre_hook
    with ExitStack() as stack:
        hook(register, lambda *_: seen.append(current_thread()), stack)
        other = threading.Thread(target=layer, args=(torch.ones(2),))
        other.start()
        other.join()
        assert not seen
        left_behind = copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))
        layer(torch.ones(2))
        for layer_copy in left_behind:
            layer_copy(torch.ones(2))
        assert seen == [current_thread()]
    layer(torch.ones(2))
    assert len(seen) == 1 and not layer._forward_hooks and not layer._forward_pre_hooks


def test_substitutes_of_threads_do_not_meet() -> None:
    """Withdrawn in another order than they were set, each is seen by its own thread alone, and nothing stays."""
    layer, others = nn.Linear(2, 2), ExitStack()
    x, plain = torch.ones(2), None
    plain = layer(x)

    def other(number: int) -> None:
        with working_for(-number):
            substitute(layer, "forward", lambda below: lambda x: number * below(x), others)

    with ExitStack() as stack:
        substitute(layer, "forward", lambda below: lambda x: 2 * below(x), stack)
        other(5)
        substitute(layer, "forward", lambda below: lambda x: below(x) + 1, stack)
        assert torch.equal(layer(x), 2 * plain + 1)
        with working_for(-5):
            assert torch.equal(layer(x), 5 * plain)
        assert torch.equal(copy.deepcopy(layer)(x), plain)
        assert torch.equal(pickle.loads(pickle.dumps(layer))(x), plain)
    assert torch.equal(layer(x), plain)
    with working_for(-5):
        assert torch.equal(layer(x), 5 * plain)
    others.close()
    assert "forward" not in vars(layer)


def test_a_thread_that_runs_a_block_again_works_for_another() -> None:
    owner = current_thread()
    with working_for(7):
        assert current_thread() == 7
        with working_for(8):
            assert current_thread() == 8
        assert current_thread() == 7
    assert current_thread() == owner


def test_reference_kernels_are_those_of_one_thread(mamba: Any) -> None:
    import transformers.models.mamba.modeling_mamba as home

    before = dict(vars(home))
    with reference_kernels(mamba), reference_kernels(mamba):
        pass
    assert dict(vars(home)) == before


def methods(model: Any) -> list[tuple[Any, Callable[[Any, Tensor], Tensor]]]:
    """Every method of the package, and a call of it."""
    target: Callable[[Any, Tensor], Tensor] = lambda method, ids: method.attribute(ids, 1)  # noqa: E731
    block = next(name for name, module in model.named_modules() if name.endswith("layers.1"))
    return [
        (RawImplicitAttention(model), target),
        (ImplicitAttentionRollout(model, attention="scan"), target),
        (ImplicitAttentionAttribution(model, rectify=None), target),
        (ClassTokenAttention(model), lambda method, ids: method.attribute(ids, 1, query=3)),
        (ImplicitAttentionRelevance(model), target),
        (LayerImplicitAttentionRelevance(model, block), target),
        (LayerImplicitAttentionRelevance(model, f"{block}.mixer", factor="scan"), target),
        (NeuronImplicitAttentionRelevance(model, block), lambda method, ids: method.attribute(ids, (3, 2))),
        (LayerImplicitAttention(model, 0), lambda method, ids: method.attribute(ids)),
        (LayerImplicitAttentionAttribution(model, model.get_input_embeddings()), target),
        (
            LLMImplicitAttention(ImplicitAttentionRollout(model), None),
            lambda method, ids: method.explain(ids[:1], 3),
        ),
    ]


@pytest.mark.parametrize("number", range(11))
@pytest.mark.parametrize("made", ["copy", "deepcopy", "pickle"])
def test_a_method_can_be_copied_and_pickled(number: int, made: str, mamba: Any, ids: Tensor) -> None:
    """Before and after a call, and while another thread hooks its model; but for a copy, the model is another."""
    copies: dict[str, Callable[[Any], Any]] = {
        "copy": copy.copy,
        "deepcopy": copy.deepcopy,
        "pickle": lambda method: pickle.loads(pickle.dumps(method)),
    }
    method, call = methods(mamba)[number]
    before = copies[made](method)
    right = call(method, ids)
    after = copies[made](method)
    with working_for(-1), ExitStack() as stack:
        hook(mamba.register_forward_hook, lambda *_: 1 / 0, stack)
        substitute(mamba, "forward", lambda below: lambda *_, **__: 1 / 0, stack)
        with working_for(-2):
            meanwhile = copies[made](method)
            assert torch.equal(call(meanwhile, ids), right)
    for parameter in mamba.parameters():
        parameter.data.mul_(1 if made == "copy" else 0)
    assert all(torch.equal(call(other, ids), right) for other in (before, after, meanwhile))
