"""What cannot be explained is refused with its cause and remedy, and nothing is left changed."""

import re
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import DynamicCache, GPT2Config, GPT2LMHeadModel
from transformers import MambaConfig as MambaConfiguration
from transformers.models.mamba.modeling_mamba import MambaBlock

from captum_ssm import (
    ImplicitAttentionAttribution,
    ImplicitAttentionRelevance,
    ImplicitAttentionRollout,
    InvalidInputError,
    LayerImplicitAttention,
    ModelStateError,
    RawImplicitAttention,
    UnsupportedModelError,
)
from tests.conftest import build
from tests.families import COMMON, FAMILIES, VOCABULARY, perturbed

METHODS: dict[str, Any] = {
    "attribution": ImplicitAttentionAttribution,
    "rollout": ImplicitAttentionRollout,
    "raw": RawImplicitAttention,
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
NAN, INF = float("nan"), float("inf")


@pytest.fixture
def refused(unchanged: Any) -> Callable[..., str]:
    """Run a call that must raise: check the type, the words of the message, and that all is as before."""

    def check(
        error: type[Exception], parts: list[str], model: nn.Module, call: Callable[[], Any], *tensors: Any
    ) -> str:
        with unchanged(model, *tensors), pytest.raises(error) as caught:
            call()
        message = str(caught.value)
        missing = [part for part in parts if not re.search(part, message)]
        assert not missing, f"{missing} not in: {message}"
        return message

    return check


# --- Models -------------------------------------------------------------------------------------------------------


def gpt2() -> nn.Module:
    return perturbed(GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, n_embd=8, n_layer=2, n_head=2, n_positions=16)))


class Tagger(nn.Module):
    """Mamba blocks and another layer between them; returns (B, 3) scores read at the last token."""

    def __init__(self, between: nn.Module) -> None:
        super().__init__()
        config = MambaConfiguration(**COMMON, state_size=2, num_hidden_layers=2, time_step_rank=2)
        self.embed = nn.Embedding(VOCABULARY, 8)
        self.first, self.between, self.last = MambaBlock(config, 0), between, MambaBlock(config, 1)
        self.head = nn.Linear(8, 3)
        random = torch.Generator().manual_seed(0)
        for parameter in self.parameters():  # transformers leaves a block on its own uninitialised
            nn.init.normal_(parameter, std=0.5, generator=random)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) if not ids.is_floating_point() else ids
        x = self.between(self.first(x))
        x = x[0] if isinstance(x, tuple) else x
        return self.head(self.last(x)[:, -1])


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.attention(x, x, x, need_weights=False)[0]


class MovingAverage(nn.Module):
    """Mixes tokens with no parameters and no telling name."""

    def forward(self, x: Tensor) -> Tensor:
        return x + 0.1 * x.cumsum(1)


class Shift(nn.Module):
    """Every token sees its predecessor alone, so neither the first nor the last is seen by many."""

    def forward(self, x: Tensor) -> Tensor:
        return x + x.roll(1, 1)


@every_method
def test_a_model_without_any_supported_layer_is_refused(method: Any, refused: Any) -> None:
    model = gpt2()
    parts = ["GPT2LMHeadModel", "no layer that captum_ssm can decompose", "GPT2Attention", ", mamba,", "register"]
    refused(UnsupportedModelError, parts, model, lambda: method(model))
    refused(UnsupportedModelError, parts, model, lambda: method(lambda ids: model(ids).logits, model=model))


def test_a_model_without_any_supported_layer_has_no_layer_to_show(refused: Any) -> None:
    model = gpt2()
    refused(UnsupportedModelError, ["GPT2Attention", "register"], model, lambda: LayerImplicitAttention(model, 0))


def test_a_model_without_anything_like_a_mixer_is_refused(refused: Any) -> None:
    model = nn.Linear(2, 2)
    refused(UnsupportedModelError, ["Linear", "none"], model, lambda: ImplicitAttentionAttribution(model))


@every_method
@pytest.mark.parametrize(
    ("between", "culprit"),
    [
        (lambda: nn.LSTM(8, 8, batch_first=True), "LSTM"),
        (lambda: nn.GRU(8, 8, batch_first=True, bidirectional=False), "GRU"),
        (SelfAttention, "MultiheadAttention|SelfAttention"),
        (MovingAverage, "MovingAverage"),
        (Shift, "Shift"),
    ],
    ids=["LSTM", "GRU", "attention", "average", "shift"],
)
def test_a_model_with_another_layer_that_mixes_tokens_is_refused(
    method: Any, between: Any, culprit: str, ids: Tensor, refused: Any
) -> None:
    model = Tagger(between()).eval()
    parts = ["'between", f"\\(({culprit})\\) mixes tokens", "silently leave it out", ", mamba,", "ssm.register"]
    for _ in range(2):  # a refusal is not remembered as a pass
        refused(UnsupportedModelError, parts, model, lambda: method(model).attribute(ids, target=1), ids)
    refused(UnsupportedModelError, parts, model, lambda: method(lambda i: model(i), model).attribute(ids, 1), ids)


@every_method
def test_a_model_whose_other_layers_act_on_each_token_alone_is_explained(
    method: Any, ids: Tensor, unchanged: Any
) -> None:
    between = nn.Sequential(nn.LayerNorm(8), nn.Linear(8, 8), nn.GELU(), nn.Linear(8, 8))
    model = Tagger(between).eval()
    with unchanged(model, ids):
        assert method(model).attribute(ids, target=1).shape == ids.shape


def test_a_layer_swapped_after_the_check_is_checked_again(ids: Tensor) -> None:
    model = Tagger(nn.Linear(8, 8)).eval()
    ImplicitAttentionAttribution(model).attribute(ids, target=1)
    model.between = MovingAverage().eval()
    with pytest.raises(UnsupportedModelError, match="MovingAverage"):
        ImplicitAttentionAttribution(model).attribute(ids, target=1)


def test_one_token_is_no_proof_that_nothing_mixes_tokens(ids: Tensor) -> None:
    model = Tagger(MovingAverage()).eval()
    ImplicitAttentionAttribution(model).attribute(ids[:, :1], target=1)
    with pytest.raises(UnsupportedModelError, match="MovingAverage"):
        ImplicitAttentionAttribution(model).attribute(ids, target=1)


@every_method
def test_a_hybrid_with_an_attention_that_no_adapter_knows_is_refused(method: Any, ids: Tensor, refused: Any) -> None:
    model = Tagger(gpt2().get_submodule("transformer.h.0.attn")).eval()
    parts = [r"Layer 'between' \(GPT2Attention\) mixes tokens", "Supported: .*jamba.*mamba", "register"]
    refused(UnsupportedModelError, parts, model, lambda: method(model).attribute(ids, target=1), ids)


@every_method
def test_a_callable_without_its_model_is_refused(method: Any, mamba: nn.Module, refused: Any) -> None:
    parts = ["plain callable", re.escape(f"{method.__name__}(forward_func, model=model)")]
    refused(InvalidInputError, parts, mamba, lambda: method(lambda ids: mamba(ids).logits))


def test_a_callable_without_its_model_has_no_layer_to_show(mamba: nn.Module, refused: Any) -> None:
    parts = ["plain callable", "model=model"]
    refused(InvalidInputError, parts, mamba, lambda: LayerImplicitAttention(lambda ids: mamba(ids).logits, 0))


@pytest.mark.parametrize("layer", [2, -3, "backbone.layers.0", "nowhere", nn.Linear(1, 1)])
def test_a_layer_that_is_no_mixer_is_refused_with_those_that_are(layer: Any, mamba: nn.Module, refused: Any) -> None:
    what = "Linear" if isinstance(layer, nn.Module) else re.escape(repr(layer))
    parts = [what, "2 mixers", r"backbone\.layers\.1\.mixer"]
    refused(InvalidInputError, parts, mamba, lambda: LayerImplicitAttention(mamba, layer))


@every_method
def test_a_forward_that_does_not_run_the_model_is_refused(
    method: Any, mamba: nn.Module, ids: Tensor, refused: Any
) -> None:
    other = build("mamba")
    make = method(lambda ids: other(ids, use_cache=False).logits[:, -1], model=mamba)
    parts = ["does not depend on any supported layer", "forward_func"]
    refused(InvalidInputError, parts, mamba, lambda: make.attribute(ids, target=1), ids)
    layer = LayerImplicitAttention(make.forward_func, 0, mamba)
    refused(InvalidInputError, ["did not run layer", r"layers\.0"], mamba, lambda: layer.attribute(ids), ids)


@every_method
def test_a_forward_without_gradients_is_refused(method: Any, mamba: nn.Module, ids: Tensor, refused: Any) -> None:
    @torch.no_grad()
    def forward(ids: Tensor) -> Tensor:
        return mamba(ids, use_cache=False).logits[:, -1]

    call = method(forward, model=mamba)
    parts = ["does not depend on any supported layer", "gradients enabled"]
    refused(InvalidInputError, parts, mamba, lambda: call.attribute(ids, target=1), ids)


# --- The model's state --------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("name", ["", "backbone", "backbone.layers.1.mixer", "backbone.layers.0.norm", "lm_head"])
def test_a_training_module_is_refused_by_name(
    method: Any, name: str, mamba: nn.Module, ids: Tensor, refused: Any
) -> None:
    module = mamba.get_submodule(name)
    if name:
        module.training = True  # this one alone
    else:
        module.train()
    parts = ["training mode", f"layer '{name or 'backbone'}'", r"model\.eval\(\)"]
    refused(ModelStateError, parts, mamba, lambda: method(mamba).attribute(ids, target=1), ids)
    refused(ModelStateError, parts, mamba, lambda: LayerImplicitAttention(mamba, 0).attribute(ids), ids)


@every_method
@pytest.mark.parametrize("value", [NAN, INF], ids=["nan", "inf"])
@pytest.mark.parametrize(
    "name",
    [
        "backbone.embeddings.weight", "backbone.layers.0.norm.weight", "backbone.layers.0.mixer.in_proj.weight",
        "backbone.layers.1.mixer.D", "lm_head.weight",
    ],
)  # fmt: skip
def test_weights_that_are_not_finite_are_refused(
    method: Any, name: str, value: float, mamba: nn.Module, ids: Tensor, refused: Any
) -> None:
    with torch.no_grad():
        mamba.get_parameter(name).fill_(value)

    def call() -> None:
        try:
            method(mamba).attribute(ids, target=1)
        except UnsupportedModelError as error:
            raise AssertionError("a wrong cause") from error

    refused(ModelStateError, ["NaN or infinit", "weights"], mamba, call, ids)


@pytest.mark.parametrize("value", [NAN, INF], ids=["nan", "inf"])
def test_weights_that_are_not_finite_are_refused_in_a_model_that_passed_before(
    value: float, mamba: nn.Module, ids: Tensor, refused: Any
) -> None:
    for method in METHODS.values():
        method(mamba).attribute(ids, target=1)
        for name in ("backbone.embeddings.weight", "backbone.layers.1.mixer.D", "lm_head.weight"):
            parameter = mamba.get_parameter(name)
            before = parameter.detach().clone()
            parameter.data.fill_(value)
            call = lambda: method(mamba).attribute(ids, target=1)  # noqa: B023, E731
            refused(ModelStateError, ["NaN or infinit", "weights"], mamba, call, ids)
            if not name.startswith("lm_head"):
                layer = LayerImplicitAttention(mamba, 1)
                parts = ["NaN or infinite", r"layers\.1", "weights"]
                refused(ModelStateError, parts, mamba, lambda: layer.attribute(ids))  # noqa: B023
            parameter.data.copy_(before)


@every_method
def test_a_score_without_gradient_at_the_last_layer_is_refused(method: Any, ids: Tensor, refused: Any) -> None:
    model = Tagger(nn.Identity()).eval()
    nn.init.zeros_(model.head.weight)
    parts = ["gradient", "is zero", "another target", "query"]
    refused(ModelStateError, parts, model, lambda: method(model).attribute(ids, target=1), ids)


def warm(model: nn.Module) -> DynamicCache:
    cache = DynamicCache(config=model.config)
    with torch.no_grad():
        model(input_ids=torch.tensor([[3, 4], [5, 6]]), cache_params=cache, use_cache=True)
    return cache


@every_method
def test_a_warm_cache_is_refused(method: Any, family: nn.Module, ids: Tensor, refused: Any) -> None:
    cache = warm(family)

    def forward(ids: Tensor) -> Tensor:
        return family(input_ids=ids, cache_params=cache, use_cache=True).logits[:, -1]

    parts = [r"Layer 'backbone\.layers\.0\.mixer'", "cache that already holds a state", "without a cache"]
    call = method(forward, model=family)
    refused(ModelStateError, parts, family, lambda: call.attribute(ids, target=1), ids)
    layer = LayerImplicitAttention(forward, 0, family)
    refused(ModelStateError, parts, family, lambda: layer.attribute(ids), ids)


def in_parts(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the logits of the last token of a text that is read in two parts."""
    first = model(input_ids=ids[:, :3], use_cache=True)
    name = next(name for name in ("past_key_values", "cache_params", "state") if first.get(name) is not None)
    return model(input_ids=ids[:, 3:], use_cache=True, **{name: first[name]}).logits[:, -1]


def cached_xlstm() -> Any:
    """Return an xLSTM whose keys and values have 64 channels: transformers rounds those of its cache up to that."""
    return FAMILIES["xlstm"].build_here(hidden_size=64, qk_dim_factor=1.0, v_dim_factor=1.0)


READ_IN_PARTS: dict[str, Any] = {
    **METHODS,
    "relevance": ImplicitAttentionRelevance,
    "checkpoints": lambda forward, model: ImplicitAttentionRelevance(forward, model, checkpoints=True),
}


@pytest.mark.parametrize("method", READ_IN_PARTS.values(), ids=READ_IN_PARTS)
@pytest.mark.parametrize("name", ["mamba", "mamba2", "rwkv", "xlstm", "qwen3_5", "lfm2", "minimax"])
def test_a_text_read_in_parts_is_refused(method: Any, name: str, ids: Tensor, refused: Any) -> None:
    """The state that the first part leaves would be a constant, so that its tokens would have no score."""
    model = cached_xlstm() if name == "xlstm" else build(name)
    call = method(lambda ids: in_parts(model, ids), model=model)
    refused(ModelStateError, ["goes on from the state", "in one part"], model, lambda: call.attribute(ids, 1), ids)


@pytest.mark.parametrize("known", [True, False], ids=["known layers", "a hook behind them"])
def test_a_model_that_reads_long_texts_in_parts_is_refused(known: bool, ids: Tensor, refused: Any) -> None:
    model = cached_xlstm()
    model.config.max_inference_chunksize = 4
    for _, module in [] if known else model.named_modules():
        if type(module).__name__ == "xLSTMLayer":
            module.register_forward_hook(lambda module, args, output: (2 * output[0], output[1]))
    method = ImplicitAttentionRelevance(model)
    for baseline in (None, 3):
        parts = ["goes on from the state", "max_inference_chunksize"]
        refused(ModelStateError, parts, model, lambda b=baseline: method.attribute(ids, 1, baselines=b), ids)
    assert method.attribute(ids[:, :4], 1).isfinite().all()


class InHalves(nn.Module):
    """A layer that reads the second half of a text with the state that it returned for the first."""

    def __init__(self) -> None:
        super().__init__()
        model = cached_xlstm()
        self.embed, self.mixer = model.get_input_embeddings(), model.backbone.blocks[0].mlstm_layer
        self.head = nn.Linear(64, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        _, state = self.mixer(x[:, :4], None)
        y, _ = self.mixer(x[:, 4:], state)
        return self.head(y[:, -1])


def test_a_state_that_is_returned_and_passed_on_is_refused(ids: Tensor, refused: Any) -> None:
    model = InHalves().eval()
    method = ImplicitAttentionRelevance(model)
    refused(ModelStateError, ["'mixer#2' goes on from the state"], model, lambda: method.attribute(ids, 1), ids)


def test_blocks_that_share_a_layer_have_places_of_their_own_in_a_cache(ids: Tensor, refused: Any) -> None:
    """A shared layer is told whose turn it is, so no block goes on from the state of another one."""
    model = build("zamba")
    first, second = (block for block in model.model.layers if hasattr(block, "shared_transf"))
    second.shared_transf = first.shared_transf
    cached = ImplicitAttentionRelevance(lambda ids: model(ids, use_cache=True).logits[:, -1], model)
    assert torch.allclose(cached.attribute(ids, 1), ImplicitAttentionRelevance(model).attribute(ids, 1), atol=1e-6)
    call = ImplicitAttentionRelevance(lambda ids: in_parts(model, ids), model)
    refused(ModelStateError, ["goes on from the state", "in one part"], model, lambda: call.attribute(ids, 1), ids)


def test_each_example_may_have_a_cache_of_its_own(ids: Tensor) -> None:
    model = build("mamba2")
    for checkpoints in (False, True):

        def one_by_one(ids: Tensor) -> Tensor:
            return torch.cat([model(input_ids=each[None], use_cache=True).logits[:, -1] for each in ids])

        apart = ImplicitAttentionRelevance(one_by_one, model, checkpoints=checkpoints).attribute(ids, 1)
        assert (apart - ImplicitAttentionRelevance(model).attribute(ids, 1)).abs().max() <= 1e-6


@every_method
@pytest.mark.parametrize("cached", ["by default", "a new one"])
def test_a_fresh_cache_changes_nothing(method: Any, cached: str, family: Any, ids: Tensor, unchanged: Any) -> None:
    def forward(ids: Tensor) -> Tensor:
        if cached == "by default":
            return family(input_ids=ids).logits[:, -1]
        return family(input_ids=ids, cache_params=DynamicCache(config=family.config), use_cache=True).logits[:, -1]

    assert family.config.use_cache
    with unchanged(family, ids):
        scores = method(forward, model=family).attribute(ids, target=1)
    assert (scores - method(family).attribute(ids, target=1)).abs().max() <= 1e-6


@every_method
def test_a_language_model_is_called_without_a_cache(method: Any, family: nn.Module, ids: Tensor) -> None:
    """Some families write their cache in place, which a backward pass does not survive."""
    seen: list[Any] = []
    family.register_forward_pre_hook(lambda m, args, kwargs: seen.append(kwargs["use_cache"]), with_kwargs=True)
    method(family).attribute(ids, target=1)
    assert seen and not any(seen)


@every_method
@pytest.mark.parametrize("at", ["backbone.layers.1.mixer", "backbone.layers.1.norm", "lm_head", "backbone.norm_f"])
def test_a_module_that_raises_leaves_no_trace(
    method: Any, at: str, mamba: nn.Module, ids: Tensor, refused: Any
) -> None:
    class BrokenError(RuntimeError):
        pass

    def fail(*args: Any) -> None:
        raise BrokenError("on purpose")

    calls = [lambda: method(mamba).attribute(ids, target=1), lambda: LayerImplicitAttention(mamba, 0).attribute(ids)]
    for passed_before in (False, True):
        handle = mamba.get_submodule(at).register_forward_hook(fail)
        for call in calls:
            refused(BrokenError, ["on purpose"], mamba, call, ids)
        handle.remove()
        if not passed_before:
            method(mamba).attribute(ids, target=1)


@every_method
def test_a_backward_that_raises_leaves_no_trace(method: Any, mamba: nn.Module, ids: Tensor, refused: Any) -> None:
    class Fail(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradient: Any) -> Any:
            raise RuntimeError("on purpose")

    forward = lambda ids: Fail.apply(mamba(ids, use_cache=False).logits[:, -1])  # noqa: E731
    method(mamba).attribute(ids, target=1)
    refused(RuntimeError, ["on purpose"], mamba, lambda: method(forward, model=mamba).attribute(ids, target=1), ids)


# --- Targets ------------------------------------------------------------------------------------------------------

BAD_TARGETS: dict[str, Any] = {
    "too large": VOCABULARY,
    "too small": -VOCABULARY - 1,
    "too many indices": (1, 2),
    "list too short": [1],
    "list too long": [1, 2, 3],
    "list with one too large": [1, VOCABULARY],
    "tensor too long": torch.tensor([1, 2, 3]),
    "tensor too large": torch.tensor([1, VOCABULARY]),
    "tensor of two axes": torch.tensor([[1], [2]]),
    "a string": "positive",
    "a float": 1.0,
    "a list of strings": ["positive", "negative"],
    "a tensor without values": torch.tensor([1, 2], device="meta"),
}
every_bad_target = pytest.mark.parametrize("target", BAD_TARGETS.values(), ids=BAD_TARGETS)


@every_method
@every_bad_target
def test_a_wrong_target_is_refused_as_captum_refuses_it(
    method: Any, target: Any, mamba: nn.Module, ids: Tensor, refused: Any
) -> None:
    message = refused(AssertionError, [], mamba, lambda: method(mamba).attribute(ids, target=target), ids)
    assert "arget" in message


def test_a_missing_target_is_refused_where_a_score_is_needed(mamba: nn.Module, ids: Tensor, refused: Any) -> None:
    parts = ["Target not provided when necessary", r"\(2, 23\)", "one score for each example"]
    refused(AssertionError, parts, mamba, lambda: ImplicitAttentionAttribution(mamba).attribute(ids), ids)


@pytest.mark.parametrize("method", [ImplicitAttentionRollout, RawImplicitAttention])
def test_a_target_that_selects_no_single_score_is_refused(
    method: Any, mamba: nn.Module, ids: Tensor, refused: Any
) -> None:
    call = method(lambda ids: mamba(ids, use_cache=False).logits, model=mamba)
    refused(AssertionError, ["one score for each example"], mamba, lambda: call.attribute(ids, target=1), ids)


@every_method
def test_an_output_that_is_no_tensor_is_refused(method: Any, mamba: nn.Module, ids: Tensor, refused: Any) -> None:
    call = method(lambda ids: mamba(ids, use_cache=False), model=mamba)
    parts = ["must return a tensor", "MambaCausalLMOutput", "logits"]
    refused(AssertionError, parts, mamba, lambda: call.attribute(ids, target=1), ids)


# --- Inputs -------------------------------------------------------------------------------------------------------

BAD_INPUTS: dict[str, tuple[Callable[[], Any], list[str]]] = {
    "no tokens": (lambda: torch.zeros(2, 0, dtype=torch.long), ["empty", r"\(2, 0\)", "no token"]),
    "no examples": (lambda: torch.zeros(0, 3, dtype=torch.long), ["empty", r"\(0, 3\)"]),
    "no tokens of embeddings": (lambda: torch.zeros(1, 0, 8), ["empty", r"\(1, 0, 8\)"]),
    "one sequence without a batch": (lambda: torch.tensor([1, 2, 3]), [r"\(batch, tokens\)", r"not \(3,\)"]),
    "a number": (lambda: torch.tensor(3), [r"\(batch, tokens\)", r"not \(\)"]),
    "embeddings of one token": (lambda: torch.randn(8), [r"\(batch, tokens, width\)", r"not \(8,\)"]),
    "ids of three axes": (lambda: torch.ones(1, 2, 3, dtype=torch.long), [r"\(batch, tokens\)", r"\(1, 2, 3\)"]),
    "id too large": (lambda: torch.tensor([[1, VOCABULARY]]), ["0 to 22", f"1 to {VOCABULARY}", "tokenizer"]),
    "id negative": (lambda: torch.tensor([[1, -1]]), ["0 to 22", "-1 to 1", "tokenizer"]),
    "ids without values": (lambda: torch.ones(2, 3, dtype=torch.long, device="meta"), ["ordinary tensor", "meta"]),
    "complex embeddings": (lambda: torch.ones(1, 3, 8, dtype=torch.complex64), ["ordinary tensor", "complex64"]),
    "sparse ids": (lambda: torch.ones(2, 3, dtype=torch.long).to_sparse(), ["ordinary tensor", "sparse"]),
    "truth values": (lambda: torch.ones(2, 3).bool(), ["int64 or int32", "bool", r"ids\.long\(\)"]),
    "short ids": (lambda: torch.ones(2, 3).short(), ["int64 or int32", "int16", r"ids\.long\(\)"]),
    "embeddings with NaN": (lambda: torch.full((1, 3, 8), NAN), ["NaN or infinite", "replace"]),
    "embeddings with infinity": (lambda: torch.full((1, 3, 8), INF), ["NaN or infinite", "replace"]),
}  # fmt: skip


@every_method
@pytest.mark.parametrize(("make", "parts"), BAD_INPUTS.values(), ids=BAD_INPUTS)
def test_inputs_that_are_no_tokens_are_refused(
    method: Any, make: Callable[[], Tensor], parts: list[str], mamba: nn.Module, refused: Any
) -> None:
    inputs = make()
    refused(InvalidInputError, parts, mamba, lambda: method(mamba).attribute(inputs, target=1), inputs)
    refused(InvalidInputError, parts, mamba, lambda: method(mamba).attribute((inputs,), target=1), inputs)
    refused(InvalidInputError, parts, mamba, lambda: LayerImplicitAttention(mamba, 0).attribute(inputs), inputs)


@every_method
def test_embeddings_that_require_a_gradient_are_left_as_they_were(
    method: Any, mamba: nn.Module, refused: Any, unchanged: Any
) -> None:
    for requires_grad in (False, True):
        x = torch.randn(2, 5, 8, requires_grad=requires_grad)
        if requires_grad:
            x.sum().backward()
        with unchanged(mamba, x):
            method(mamba).attribute(x, target=1)
        refused(AssertionError, ["arget"], mamba, lambda: method(mamba).attribute(x, target=99), x)  # noqa: B023
        with torch.no_grad():
            refused(AssertionError, ["arget"], mamba, lambda: method(mamba).attribute(x, target=99), x)  # noqa: B023


def test_floats_without_a_width_are_refused(mamba: nn.Module, ids: Tensor, refused: Any) -> None:
    """As when noise is added to token ids; a callable that casts them back would get a (B, L, L) result."""
    call = ImplicitAttentionAttribution(lambda x: mamba(x.long(), use_cache=False).logits[:, -1], model=mamba)
    parts = [r"\(batch, tokens, width\)", r"not \(2, 7\)"]
    refused(InvalidInputError, parts, mamba, lambda: call.attribute(ids.float(), target=1), ids)


@every_method
def test_two_tensors_as_inputs_are_refused(method: Any, mamba: nn.Module, ids: Tensor, refused: Any) -> None:
    parts = ["one tensor", "not 2", "additional_forward_args"]
    refused(InvalidInputError, parts, mamba, lambda: method(mamba).attribute((ids, ids), target=1), ids)


def test_two_tensors_as_inputs_of_a_layer_are_refused(mamba: nn.Module, ids: Tensor, refused: Any) -> None:
    call = LayerImplicitAttention(mamba, 0)

    def attribute() -> None:
        try:
            call.attribute((ids, ids))
        except ValueError as error:
            raise error if isinstance(error, InvalidInputError) else AssertionError("a bare ValueError") from error

    refused(InvalidInputError, ["not 2", "additional_forward_args"], mamba, attribute, ids)


@every_method
@pytest.mark.parametrize("inputs", [[[1, 2, 3]], "text", 3, None])
def test_inputs_that_are_no_tensor_are_refused_as_captum_refuses_them(
    method: Any, inputs: Any, mamba: nn.Module, refused: Any
) -> None:
    refused(AssertionError, ["tensor"], mamba, lambda: method(mamba).attribute(inputs, target=1))


BAD_MASKS: dict[str, tuple[Any, list[str]]] = {
    "too short": (torch.ones(2, 6), [r"shape \(2, 7\)", r"not \(2, 6\)"]),
    "without values": (torch.ones(2, 7, device="meta"), [r"shape \(2, 7\)", "meta"]),
    "another batch": (torch.ones(1, 7), [r"shape \(2, 7\)", r"not \(1, 7\)"]),
    "three axes": (torch.ones(2, 7, 1), [r"shape \(2, 7\)", r"not \(2, 7, 1\)"]),
    "a list": ([[1] * 7] * 2, [r"shape \(2, 7\)", "not list"]),
    "an empty row": (torch.tensor([[1] * 7, [0] * 7]), ["without any real token", "drop"]),
    "two arguments": ((torch.ones(2, 7), 3), ["one additional forward argument", "got 2", "lambda"]),
}  # fmt: skip


@every_method
@pytest.mark.parametrize(("mask", "parts"), BAD_MASKS.values(), ids=BAD_MASKS)
def test_a_wrong_mask_is_refused(
    method: Any, mask: Any, parts: list[str], mamba: nn.Module, ids: Tensor, refused: Any
) -> None:
    tensors = [ids, mask] if isinstance(mask, Tensor) else [ids]
    call = method(mamba)
    refused(InvalidInputError, parts, mamba, lambda: call.attribute(ids, 1, additional_forward_args=mask), *tensors)
    layer = LayerImplicitAttention(mamba, 0)
    refused(InvalidInputError, parts, mamba, lambda: layer.attribute(ids, additional_forward_args=mask), *tensors)


@every_method
@pytest.mark.parametrize("wrapped", [False, True], ids=["mask as an argument", "mask of the callable's own"])
def test_a_score_that_is_read_at_padding_is_refused(
    method: Any, wrapped: bool, mamba: Any, ids: Tensor, refused: Any
) -> None:
    """As by a classifier of transformers that is given embeddings: it reads the last position, whatever the mask."""
    x = mamba.get_input_embeddings()(ids).detach()
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1] * 7])

    def last(inputs: Tensor, given: Tensor = mask) -> Tensor:
        name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
        return mamba(**{name: inputs}, attention_mask=given, use_cache=False).logits[:, -1]

    call, args = method(last, model=mamba), () if wrapped else (mask,)
    parts = ["explained score is read at padding", "embeddings", "pad on the left", "token ids", "one by one"]
    for inputs in (x, ids):
        refused(InvalidInputError, parts, mamba, lambda: call.attribute(inputs, 1, args), inputs, mask)  # noqa: B023
    assert call.attribute(x[1:], 1, (mask[1:],)).isfinite().all()
    assert call.attribute(x, 1, (mask.flip(1),))[0, :2].eq(0).all()  # padded on the left it is not


def test_a_part_of_a_score_that_is_read_at_padding_is_refused(mamba: nn.Module, ids: Tensor, refused: Any) -> None:
    """As by mean pooling that forgets the mask."""
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1] * 7])
    pooled = lambda ids, mask: mamba(ids, attention_mask=mask, use_cache=False).logits.mean(1)  # noqa: E731
    call = ImplicitAttentionRollout(pooled, model=mamba)
    parts = ["read at padding"]
    refused(InvalidInputError, parts, mamba, lambda: call.attribute(ids, 1, (mask,)), ids, mask)


@every_method
def test_a_query_at_padding_is_refused(method: Any, mamba: nn.Module, ids: Tensor, refused: Any) -> None:
    mask = torch.tensor([[1, 1, 1, 1, 1, 0, 0], [1] * 7])
    call = method(mamba)
    refused(InvalidInputError, ["padding"], mamba, lambda: call.attribute(ids, 1, mask, query=-1), ids, mask)
    assert call.attribute(ids, 1, mask, query=torch.tensor([4, 6])).isfinite().all()


# --- Options ------------------------------------------------------------------------------------------------------


@every_method
def test_an_unknown_attention_is_refused(method: Any, mamba: nn.Module, refused: Any) -> None:
    parts = ["attention must be 'unified' or 'scan'", "'softmax'"]
    refused(InvalidInputError, parts, mamba, lambda: method(mamba, attention="softmax"))


def test_an_unknown_attention_of_a_layer_is_refused(mamba: nn.Module, ids: Tensor, refused: Any) -> None:
    call = lambda: LayerImplicitAttention(mamba, 0, attention="softmax").attribute(ids)  # type: ignore[arg-type]  # noqa: E731
    refused(InvalidInputError, ["'unified' or 'scan'", "'softmax'"], mamba, call, ids)


@every_method
@pytest.mark.parametrize("without", ["norm", ("gate", "norm"), ["in"], ["mask"]])
def test_an_unknown_factor_to_leave_out_is_refused(
    method: Any, without: Any, mamba: nn.Module, ids: Tensor, refused: Any
) -> None:
    unknown = without[0] if isinstance(without, list) else "norm"
    parts = [f"of no layer has a factor named '{unknown}'", "act, bias, conv, gate, scan, skip"]
    refused(InvalidInputError, parts, mamba, lambda: method(mamba, without=without).attribute(ids, target=1), ids)
    layer = LayerImplicitAttention(mamba, 0, without=without)
    refused(InvalidInputError, parts, mamba, lambda: layer.attribute(ids), ids)


@pytest.mark.parametrize("method", [ImplicitAttentionRollout, RawImplicitAttention])
def test_an_unknown_fusion_is_refused(method: Any, mamba: nn.Module, ids: Tensor, refused: Any) -> None:
    parts = ["fusion must be one of absolute, mean, positive, norm, root", "'max'"]
    refused(InvalidInputError, parts, mamba, lambda: method(mamba, fusion="max").attribute(ids, target=1), ids)
    layer: Any = LayerImplicitAttention(mamba, 0)
    refused(InvalidInputError, parts, mamba, lambda: layer.attribute(ids, fusion="max"), ids)


def test_an_unknown_rectification_is_refused(mamba: nn.Module, refused: Any) -> None:
    parts = ["rectify must be 'channel', 'token' or None", "'relu'"]
    refused(InvalidInputError, parts, mamba, lambda: ImplicitAttentionAttribution(mamba, rectify="relu"))  # type: ignore[arg-type]


def test_an_unknown_normalization_and_one_of_signed_rows_are_refused(mamba: nn.Module, refused: Any) -> None:
    parts = ["normalize must be 'rows' or None", "'columns'"]
    refused(InvalidInputError, parts, mamba, lambda: ImplicitAttentionAttribution(mamba, normalize="columns"))  # type: ignore[arg-type]
    parts = ["normalize='rows' divides each row by its sum", "rectify='channel'"]
    signed = lambda: ImplicitAttentionAttribution(mamba, rectify=None, normalize="rows")  # noqa: E731
    refused(InvalidInputError, parts, mamba, signed)


@pytest.mark.parametrize("layers", [0, -1, "2", 1.5])
def test_no_layers_at_all_is_refused(layers: Any, mamba: nn.Module, refused: Any) -> None:
    parts = ["layers must be at least 1", f"not {layers!r}"]
    refused(InvalidInputError, parts, mamba, lambda: RawImplicitAttention(mamba, layers=layers))


@every_method
@pytest.mark.parametrize("size", [0, -1, 1.5, "2", torch.tensor(2)], ids=str)
def test_a_batch_size_that_is_no_positive_int_is_refused(
    method: Any, size: Any, mamba: nn.Module, ids: Tensor, refused: Any
) -> None:
    call = method(mamba)
    parts = ["internal_batch_size must be an int of at least 1"]
    refused(InvalidInputError, parts, mamba, lambda: call.attribute(ids, 1, internal_batch_size=size), ids)


@every_method
@pytest.mark.parametrize(
    ("option", "part"),
    [
        ({"tolerance": "1"}, "tolerance must be a number"), ({"tolerance": NAN}, "tolerance must be a number"),
        ({"without": 3}, "without must be a name"), ({"without": [None]}, "without must be a name"),
    ],
    ids=str,
)  # fmt: skip
def test_an_option_of_the_wrong_type_is_refused(
    method: Any, option: dict[str, Any], part: str, mamba: nn.Module, refused: Any
) -> None:
    refused(InvalidInputError, [part], mamba, lambda: method(mamba, **option))
    refused(InvalidInputError, [part], mamba, lambda: LayerImplicitAttention(mamba, 0, **option))


BAD_QUERIES: dict[str, tuple[Any, list[str]]] = {
    "too large": (7, ["7", "outside the 7 tokens"]),
    "too small": (-8, ["-8", "outside the 7 tokens"]),
    "one too large": (torch.tensor([0, 7]), [r"\[0, 7\]", "outside the 7 tokens"]),
    "three positions": (torch.tensor([0, 1, 2]), ["each of 2 examples", r"\(3,\)"]),
    "weights of another shape": (torch.ones(2, 6), [r"weights of shape \(2, 7\)", r"\(2, 6\)"]),
    "weights without a batch": (torch.ones(7), [r"weights of shape \(2, 7\)", r"\(7,\)"]),
    "a fraction": (0.5, ["a position", "float32"]),
    "integer weights": (torch.ones(2, 7, dtype=torch.long), ["weights of shape", "int64"]),
    "weights that are NaN": (torch.full((2, 7), NAN), ["weights of query are NaN"]),
    "complex weights": (torch.ones(2, 7, dtype=torch.complex64), ["weights of shape", "complex64"]),
    "a word": ("last", ["a position, or a tensor", "'last'"]),
}


@every_method
@pytest.mark.parametrize(("query", "parts"), BAD_QUERIES.values(), ids=BAD_QUERIES)
def test_a_query_outside_the_sequence_is_refused(
    method: Any, query: Any, parts: list[str], mamba: nn.Module, ids: Tensor, refused: Any
) -> None:
    tensors = [ids, query] if isinstance(query, Tensor) else [ids]
    call = method(mamba)
    refused(InvalidInputError, parts, mamba, lambda: call.attribute(ids, target=1, query=query), *tensors)


@every_method
def test_futures_are_refused(method: Any, mamba: nn.Module, ids: Tensor, refused: Any) -> None:
    parts = ["attribute_future", "call attribute"]
    refused(NotImplementedError, parts, mamba, lambda: method(mamba).attribute_future(ids))


# --- A call that works changes nothing either ---------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("mode", ["gradients", "no gradients", "inference"])
def test_a_call_leaves_everything_as_it_was(
    method: Any, mode: str, family: nn.Module, ids: Tensor, unchanged: Any
) -> None:
    """Also with frozen parameters, with gradients at hand, with hooks of the user's own, and in every grad mode."""
    parameters = list(family.parameters())
    parameters[0].requires_grad_(False)
    parameters[1].grad = torch.randn_like(parameters[1])
    seen: list[str] = []
    family.get_submodule("lm_head").register_forward_hook(lambda *_: seen.append("hook"))
    context = {"gradients": torch.enable_grad, "no gradients": torch.no_grad, "inference": torch.inference_mode}[mode]
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
    with context():
        inputs = ids.clone()
        with unchanged(family, inputs, mask):
            scores = method(family).attribute(inputs, target=1, additional_forward_args=mask)
    assert seen and not scores.requires_grad
    plain = method(build_like(family)).attribute(ids, target=1, additional_forward_args=mask)
    assert (scores - plain).abs().max() <= 1e-5


@every_method
def test_a_frozen_model_is_explained_alike(method: Any, family: nn.Module, ids: Tensor, unchanged: Any) -> None:
    plain = method(family).attribute(ids, target=1)
    family.requires_grad_(False)
    with unchanged(family, ids):
        frozen = method(family).attribute(ids, target=1)
    assert (frozen - plain).abs().max() <= 1e-5


def build_like(model: nn.Module) -> nn.Module:
    """A fresh model of the same family."""
    return next(fresh for fresh in map(build, FAMILIES) if type(fresh) is type(model))


def test_the_check_itself_sees_what_changes(mamba: nn.Module, ids: Tensor, unchanged: Any) -> None:
    """Each change that a careless method could make is seen, or every test above proves nothing."""
    mixer = mamba.get_submodule("backbone.layers.0.mixer")
    x = torch.randn(2, 3)

    def add_one_bit() -> None:
        mamba.get_parameter("lm_head.weight").data[0, 0] = (
            mamba.get_parameter("lm_head.weight").data[0, 0].nextafter(torch.tensor(INF))
        )

    changes: list[Callable[[], Any]] = [
        add_one_bit,
        lambda: mamba.get_parameter("lm_head.weight").requires_grad_(False),
        lambda: setattr(mamba.get_parameter("lm_head.weight"), "grad", torch.ones(VOCABULARY, 8)),
        lambda: setattr(mixer, "training", True),
        lambda: setattr(mixer, "forward", lambda *a: None),
        lambda: setattr(mixer, "note", 1),
        lambda: mixer.register_forward_hook(lambda *a: None),
        lambda: mixer.register_forward_pre_hook(lambda *a: None),
        lambda: mixer.register_full_backward_hook(lambda *a: None),
        lambda: mixer.register_full_backward_pre_hook(lambda *a: None),
        lambda: torch.set_grad_enabled(False),
        lambda: x.add_(1),
        lambda: x.requires_grad_(True),
        lambda: setattr(x, "grad", torch.ones(2, 3)),
    ]
    for change in changes:
        with pytest.raises(AssertionError, match="changed: "), unchanged(mamba, ids, x):
            change()
        torch.set_grad_enabled(True)


def test_a_factor_outside_the_scan_cannot_be_left_out_of_the_scan(mamba: nn.Module, ids: Tensor, refused: Any) -> None:
    call = ImplicitAttentionAttribution(mamba, attention="scan", without="conv")
    parts = ["scan attention of no layer has a factor named 'conv'"]
    refused(InvalidInputError, parts, mamba, lambda: call.attribute(ids, target=1), ids)


# --- Models that take token ids alone, as mamba_ssm's do ----------------------------------------------------------


class Body(nn.Module):
    def __init__(self, model: Any) -> None:
        super().__init__()
        self.embedding: nn.Embedding = model.embeddings
        self.layers: nn.ModuleList = model.layers
        self.norm_f: nn.Module = model.norm_f

    def forward(self, input_ids: Tensor, inference_params: Any = None) -> Tensor:
        x = self.embedding(input_ids)
        for layer in self.layers:
            x = layer(x) if inference_params is None else layer(x, cache_params=inference_params)
        return self.norm_f(x)


class IdsAlone(nn.Module):
    """A model with mamba_ssm's interface, around the blocks of transformers."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.backbone, self.lm_head = Body(model.backbone), model.lm_head

    def forward(self, input_ids: Tensor, position_ids: Any = None, inference_params: Any = None) -> Any:
        return SimpleNamespace(logits=self.lm_head(self.backbone(input_ids, inference_params)))


@pytest.fixture
def ids_alone() -> Any:
    return IdsAlone(build("mamba")).eval()


@every_method
def test_a_model_of_ids_alone_is_explained_as_one_that_takes_embeddings_too(
    method: Any, ids_alone: nn.Module, mamba: Any, ids: Tensor, unchanged: Any
) -> None:
    expected, vectors = method(mamba).attribute(ids, 5), mamba.get_input_embeddings()(ids).detach()
    with unchanged(ids_alone, ids, vectors):
        torch.testing.assert_close(method(ids_alone).attribute(ids, 5), expected)
        torch.testing.assert_close(method(ids_alone).attribute(vectors, 5).sum(-1), expected)


@every_method
def test_a_model_of_ids_alone_without_its_head_is_a_plain_callable(method: Any, ids_alone: Any, ids: Tensor) -> None:
    body = ids_alone.backbone
    expected = method(lambda ids: body(ids)[:, 4], model=body).attribute(ids, 5)
    torch.testing.assert_close(method(body).attribute(ids, (4, 5)), expected)
    torch.testing.assert_close(method(body).attribute(body.embedding(ids).detach(), (4, 5)).sum(-1), expected)


@every_method
@pytest.mark.parametrize("part", ["", "backbone"])
def test_a_mask_for_a_model_that_takes_none_is_refused(
    method: Any, part: str, ids_alone: nn.Module, ids: Tensor, refused: Any
) -> None:
    model = ids_alone.get_submodule(part)
    call = lambda: method(model).attribute(ids, (4, 5) if part else 5, torch.ones_like(ids))  # noqa: E731
    refused(InvalidInputError, [type(model).__name__, "takes no attention mask", "one by one"], model, call, ids)


def test_ids_that_a_model_of_ids_alone_does_not_have_are_refused(
    ids_alone: nn.Module, ids: Tensor, refused: Any
) -> None:
    wrong = torch.full_like(ids, VOCABULARY)
    call = lambda: ImplicitAttentionAttribution(ids_alone).attribute(wrong, 5)  # noqa: E731
    refused(InvalidInputError, [rf"0 to {VOCABULARY - 1}", "tokenizer"], ids_alone, call)


def test_a_model_of_ids_alone_that_fails_keeps_its_embedding(ids_alone: nn.Module, refused: Any) -> None:
    x = torch.randn(2, 7, 8)
    ids_alone.get_submodule("backbone").norm_f = nn.Linear(3, 3).eval()
    call = lambda: ImplicitAttentionAttribution(ids_alone).attribute(x, 5)  # noqa: E731
    refused(RuntimeError, [], ids_alone, call, x)


def test_a_cache_that_counts_the_tokens_before_is_refused(ids_alone: nn.Module, ids: Tensor, refused: Any) -> None:
    cache = SimpleNamespace(key_value_memory_dict={}, seqlen_offset=3)
    method = ImplicitAttentionAttribution(
        lambda ids: ids_alone(ids, inference_params=cache).logits[:, -1], model=ids_alone
    )
    refused(ModelStateError, ["layers.0.mixer", "without a cache"], ids_alone, lambda: method.attribute(ids, 5), ids)


@pytest.mark.parametrize("missing", ["activation", "in_proj.weight"])
def test_a_layer_of_a_known_name_that_is_built_otherwise_is_refused(
    missing: str, mamba: Any, ids: Tensor, refused: Any
) -> None:
    """Libraries give the same name to different layers."""
    mixer = mamba.backbone.layers[1].mixer
    if missing == "activation":
        mixer.act_name = mixer.__dict__.pop("activation")
        mixer.forward = lambda x, **_: mixer.in_proj(x)[..., : x.shape[-1]]
    else:
        mixer.into = mixer.__dict__["_modules"].pop("in_proj")
        mixer.forward = lambda x, **_: mixer.into(x)[..., : x.shape[-1]]
    parts = ["'backbone.layers.1.mixer' has the name MambaMixer", "not built like", missing, "captum_ssm.register"]
    call = lambda: ImplicitAttentionAttribution(mamba).attribute(ids, 5)  # noqa: E731
    refused(UnsupportedModelError, parts, mamba, call, ids)
