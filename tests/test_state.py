"""A model is as it was after an explanation, bit by bit: its parameters, its buffers, and the states that it keeps."""

import copy
import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import MambaConfig, RwkvConfig, RwkvForCausalLM
from transformers.models.mamba.modeling_mamba import MambaBlock

import captum_ssm as cs
from captum_ssm import metrics
from captum_ssm.network.turns import unchanged
from tests.conftest import build

METHODS: dict[str, Callable[[Any, Tensor], Any]] = {
    "rollout": lambda model, ids: cs.ImplicitAttentionRollout(model).attribute(ids, 1),
    "signed": lambda model, ids: cs.ImplicitAttentionAttribution(model, rectify=None).attribute(ids, 1),
    "raw": lambda model, ids: cs.RawImplicitAttention(model).attribute(ids, 1),
    "layer": lambda model, ids: cs.LayerImplicitAttention(model, 0).attribute(ids),
    "relevance": lambda model, ids: cs.ImplicitAttentionRelevance(model).attribute(ids, 1, baselines=2),
    "frozen": lambda model, ids: cs.ImplicitAttentionRelevance(model).attribute(ids, 1, return_convergence_delta=True),
    "checkpoints": lambda model, ids: cs.ImplicitAttentionRelevance(model, checkpoints=True).attribute(ids, 1),
}
every_method = pytest.mark.parametrize("method", METHODS)


def bits(model: nn.Module) -> dict[Any, Any]:
    """All tensors on a model and its modules, as bytes, and all flags."""
    state: dict[Any, Any] = {}
    for name, module in model.named_modules():
        for key, value in [*vars(module).items(), *module._parameters.items(), *module._buffers.items()]:
            if isinstance(value, Tensor):
                state[name, key] = id(value), value.detach().contiguous().view(torch.uint8).numpy().tobytes()
            elif key == "states":
                state[name, key] = (
                    [id(part) for part in value],
                    [None if part is None else part.tolist() for part in value],
                )
            elif isinstance(value, (bool, int, float, str, type(None))):
                state[name, key] = value
    return state


def deep_rwkv() -> RwkvForCausalLM:
    """An RWKV-4 of eight layers, whose later weights are divided when it first runs; one of them holds odd numbers."""
    torch.manual_seed(0)
    config = RwkvConfig(vocab_size=23, hidden_size=16, num_hidden_layers=8, context_length=64, intermediate_size=20)
    model = RwkvForCausalLM(config).eval()
    with torch.no_grad():
        model.rwkv.blocks[7].attention.output.weight[0, :2] = torch.tensor([1e-45, 3e-45])  # half of it is 0
    return model


@every_method
def test_weights_that_a_model_rescales_are_restored(method: str, ids: Tensor) -> None:
    model = deep_rwkv()
    before, runs_first = bits(model), copy.deepcopy(model)
    runs_first(ids, use_cache=False)
    right = METHODS[method](runs_first, ids)
    for _ in range(3):  # the first is watched
        found = METHODS[method](model, ids)
        assert bits(model) == before
        torch.testing.assert_close(found, right)


def test_a_model_that_runs_first_is_not_rescaled_back(ids: Tensor) -> None:
    """After a run of the user the model is rescaled, and stays so; so it does when it goes to training and back."""
    model = deep_rwkv()
    METHODS["signed"](model, ids)
    model(ids, use_cache=False)
    after_run = bits(model)
    METHODS["signed"](model, ids)
    METHODS["signed"](model, ids)
    assert bits(model) == after_run
    model.train()
    model(ids, use_cache=False)
    model.eval()
    before = bits(model)
    for _ in range(2):
        METHODS["signed"](model, ids)
        assert bits(model) == before


@every_method
def test_decoding_goes_on_as_if_nothing_was_explained(method: str, ids: Tensor) -> None:
    """RecurrentGemma keeps its states on its modules: an explanation between two steps changes no later logit."""
    model = build("recurrent_gemma")

    def decode(between: Callable[[], object]) -> list[Tensor]:
        logits = []
        with torch.no_grad():
            output = model(ids, use_cache=True)
            for step in range(4):
                between()
                token = torch.full((len(ids), 1), step + 3)
                place = torch.full((1, 1), ids.shape[1] + step)
                output = model(token, position_ids=place, use_cache=True, past_key_values=build_cache(model))
                logits.append(output.logits)
        return logits

    alone = decode(lambda: None)
    explained = decode(lambda: METHODS[method](model, ids[:1]))
    assert all(torch.equal(a, b) for a, b in zip(alone, explained))


def build_cache(model: Any) -> Any:
    """A cache that is there, so that the model does not begin anew; the softmax layers start from nothing in both."""
    from transformers import DynamicCache

    return DynamicCache(config=model.config)


class Keeping(nn.Module):
    """A classifier that writes on itself in every way: attributes, lists, buffers, views of parameters, new tensors."""

    def __init__(self) -> None:
        super().__init__()
        config = MambaConfig(hidden_size=8, state_size=3, time_step_rank=2)
        self.tok, self.head = nn.Embedding(23, 8, max_norm=0.5), nn.Linear(8, 2)
        self.blocks = nn.ModuleList([MambaBlock(config, 0)])
        self.runs = nn.Buffer(torch.zeros(1))
        self.scale = nn.Parameter(torch.ones(2, 8))
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.3)
        self.begun = False
        self.last, self.states, self.table = None, [torch.zeros(1), None], {"mean": None}

    def forward(self, ids: Tensor) -> Tensor:
        h = self.tok(ids)
        with torch.no_grad():
            self.runs.add_(1)
            if not self.begun:
                self.scale[1].mul_(2)
                self.tok.weight.data[0] = 1.0
                self.head.bias.data = self.head.bias.data + 1
                self.begun = True
        self.last, self.states[1], self.table["mean"] = h, h, h.mean()
        self.another = h
        self.blocks.register_buffer("seen", ids.clone())
        h = self.blocks[0](h * self.scale[1])
        h = h[0] if isinstance(h, tuple) else h
        return self.head(h[:, -1])


@every_method
@pytest.mark.parametrize("fails", [False, True])
def test_whatever_a_model_writes_on_itself_is_undone(method: str, fails: bool, ids: Tensor) -> None:
    model = Keeping().eval()
    before, twin = bits(model), copy.deepcopy(model)
    twin(ids)
    right = METHODS[method](twin, ids)
    for _ in range(3):
        if fails:
            with pytest.raises(ZeroDivisionError), unchanged(model, model, ids):
                model(ids)
                raise ZeroDivisionError
        else:
            torch.testing.assert_close(METHODS[method](model, ids), right)
        assert bits(model) == before
        assert model.states[1] is None and model.table == {"mean": None} and not hasattr(model, "another")
        assert not model.blocks._buffers


def test_a_metric_leaves_the_model_as_it_was(ids: Tensor) -> None:
    model = deep_rwkv()
    before = bits(model)
    metrics.lerf_minus_morf(model, ids, torch.rand(ids.shape), target=1, baselines=2)
    assert bits(model) == before


def test_a_generation_leaves_the_model_as_it_was() -> None:
    model = deep_rwkv()
    before = bits(model)
    method = cs.ImplicitAttentionAttribution(model, rectify=None)
    generation = cs.LLMImplicitAttention(method, None)
    ids = torch.tensor([[3, 4, 5]])
    generation.explain(torch.cat([ids, generation.generate(ids, {"max_new_tokens": 3})], dim=1), 3)
    assert bits(model) == before


def test_a_run_of_another_thread_is_not_undone(ids: Tensor) -> None:
    """Weights that are divided while another thread runs the model stay divided: it may be in the middle of them."""
    model = deep_rwkv()
    twin = copy.deepcopy(model)
    twin(ids, use_cache=False)
    with unchanged(model, model, ids):
        model(ids, use_cache=False)
        other = threading.Thread(target=lambda: model(ids, use_cache=False))
        other.start()
        other.join()
    assert model.rwkv.layers_are_rescaled
    assert torch.equal(model.rwkv.blocks[7].attention.output.weight, twin.rwkv.blocks[7].attention.output.weight)


def test_a_model_that_writes_nothing_is_explained_by_threads_at_once(mamba: Any, ids: Tensor) -> None:
    """Two explanations wait for one another within the context: in turns, they would wait for ever."""
    with unchanged(mamba, mamba, ids):
        mamba(ids, use_cache=False)
    meeting = threading.Barrier(2, timeout=20)

    def explain() -> None:
        with unchanged(mamba, mamba, ids):
            meeting.wait()

    threads = [threading.Thread(target=explain) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not meeting.broken
