"""A generation explained by relevance adds up row by row; models of other interfaces and caches are explained too."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_ssm import (
    ImplicitAttentionAttribution,
    ImplicitAttentionRelevance,
    InvalidInputError,
    LayerImplicitAttentionRelevance,
    LLMImplicitAttention,
    UnsupportedModelError,
)
from captum_ssm.network.continuation import continued, greedy
from tests.conftest import build
from tests.families import VOCABULARY
from tests.test_bad_input import IdsAlone
from tests.test_hosts import SAME, Prompted

START = 4
FAMILIES = ["mamba", "nemotron_h", "qwen3_5", "rwkv"]
every_family = pytest.mark.parametrize("name", FAMILIES)


@pytest.fixture
def eight() -> Tensor:
    """Token ids of one text, prompt and answer."""
    return torch.randint(3, VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(1))


def log_probabilities(model: Any, ids: Tensor, text: Tensor) -> Tensor:
    """Of each written token of a text, after the tokens of ``ids`` before it, from runs of the model."""
    with torch.no_grad():
        rows = [model(ids[:, :k]).logits[0, -1].log_softmax(-1)[text[0, k]] for k in range(START, text.shape[1])]
    return torch.stack(rows)


@every_family
@pytest.mark.parametrize("baseline", [None, 2, 0.0])
def test_each_row_sums_to_the_log_probability_of_its_token(
    name: str, baseline: Any, eight: Tensor, unchanged: Any
) -> None:
    model = build(name)
    method = ImplicitAttentionRelevance(model)
    with unchanged(model, eight):
        rows = LLMImplicitAttention(method, None).explain(eight, START, baselines=baseline)
    assert rows.shape == (4, 7)
    for row in range(4):
        assert rows[row, START + row :].eq(0).all() and rows[row, : START + row].ne(0).any()
    expected = log_probabilities(model, eight, eight)
    if baseline == 2:
        expected = expected - log_probabilities(model, torch.full_like(eight, 2), eight)
    elif baseline is not None:
        nothing = torch.zeros(1, 8, model.config.hidden_size)
        with torch.no_grad():
            logits = [model(inputs_embeds=nothing[:, :k]).logits[0, -1].log_softmax(-1) for k in range(START, 8)]
        expected = expected - torch.stack([row[eight[0, START + k]] for k, row in enumerate(logits)])
    total = rows.sum(1) + sum(method.terms.values(), torch.zeros(4))
    torch.testing.assert_close(total, expected, rtol=0, atol=1e-4)
    assert ("bias" in method.terms) == (baseline is None) and 0 < method.completeness < 1e-4 and method.fidelity


def test_each_row_is_the_relevance_of_that_token_alone(eight: Tensor) -> None:
    """Also with ids in the place of each token, several references, and the options of the method."""
    model = build("mamba")
    references: list[Any] = [1, torch.randint(3, VOCABULARY, (1, 7), generator=torch.Generator().manual_seed(2))]
    method = ImplicitAttentionRelevance(model, value_share=0.7)
    rows = LLMImplicitAttention(method, None).explain(eight, START, baselines=references)
    for row, k in enumerate(range(START, 8)):
        alone = ImplicitAttentionRelevance(lambda ids: model(ids).logits[:, -1].log_softmax(-1), model, value_share=0.7)
        before = [b[:, :k] if isinstance(b, Tensor) else b for b in references]
        expected = alone.attribute(eight[:, :k], int(eight[0, k]), baselines=before)
        torch.testing.assert_close(rows[row, :k], expected[0])
    assert method.forward_func is model  # the method itself explains what it did before


def test_a_reference_is_of_relevance_and_of_whole_models(eight: Tensor) -> None:
    model = build("mamba")
    with pytest.raises(InvalidInputError, match="leave out baselines, or explain the generation by Impl"):
        LLMImplicitAttention(ImplicitAttentionAttribution(model), None).explain(eight, START, baselines=1)
    layer = LayerImplicitAttentionRelevance(model, model.backbone.layers[0])
    with pytest.raises(InvalidInputError, match="not by LayerImplicitAttentionRelevance"):
        LLMImplicitAttention(layer, None)


@pytest.mark.parametrize("wrap", SAME.values(), ids=SAME)
def test_a_host_is_explained_as_the_model_inside(wrap: Any, eight: Tensor) -> None:
    model = build("mamba")
    methods: list[tuple[Any, Any]] = [(ImplicitAttentionRelevance, 2), (ImplicitAttentionAttribution, None)]
    for method, baselines in methods:
        expected = LLMImplicitAttention(method(model), None).explain(eight, START, baselines=baselines)
        rows = LLMImplicitAttention(method(wrap(model)), None).explain(eight, START, baselines=baselines)
        torch.testing.assert_close(rows, expected, rtol=0, atol=0)


def test_virtual_tokens_get_no_row_and_no_column(eight: Tensor) -> None:
    host: Any = Prompted(build("mamba")).eval()
    rows = LLMImplicitAttention(ImplicitAttentionRelevance(host), None).explain(eight, START, baselines=2)
    expected = log_probabilities(host, eight, eight) - log_probabilities(host, torch.full_like(eight, 2), eight)
    torch.testing.assert_close(rows.sum(1), expected, rtol=0, atol=1e-4)
    with pytest.raises(UnsupportedModelError, match="put in front"):
        LLMImplicitAttention(ImplicitAttentionAttribution(host), None).explain(eight, START)


# --- Models of mamba_ssm, and caches that fail --------------------------------------------------------------------


class Words:
    eos_token_id = None

    def convert_ids_to_tokens(self, ids: list[int]) -> list[str]:
        return [f"w{k}" for k in ids]


@pytest.mark.parametrize("method", [ImplicitAttentionRelevance, ImplicitAttentionAttribution])
def test_a_model_that_takes_ids_alone_writes_and_is_explained(method: Any, eight: Tensor, unchanged: Any) -> None:
    model = IdsAlone(build("mamba")).eval()
    with unchanged(model, eight):
        result = LLMImplicitAttention(method(model), Words()).attribute(eight[:, :START], None, {"max_new_tokens": 3})
    expected = greedy(build("mamba"), eight[:, :START], 3, None)
    assert result.output_tokens == Words().convert_ids_to_tokens(expected[0, START:].tolist())
    rows = LLMImplicitAttention(method(build("mamba")), None).explain(expected, START)
    torch.testing.assert_close(result.token_attr, rows)


def test_a_text_ends_at_the_token_that_ends_it(eight: Tensor) -> None:
    model: Any = IdsAlone(build("mamba")).eval()
    longest = continued(model, eight, {"max_new_tokens": 4}, None)
    end = int(longest[0, 9])
    first = longest[0, 8:].tolist().index(end)
    assert torch.equal(continued(model, eight, {"max_new_tokens": 4}, end), longest[:, : 9 + first])


def without_attention(name: str) -> Any:
    """A hybrid whose layers are all linear: transformers' own cache cannot count its tokens."""
    model = build(name)
    linear = ["conv" if name == "lfm2" else "linear_attention"] * 2
    options = {**model.config.to_dict(), "layer_types": linear, "num_hidden_layers": 2, "mlp_only_layers": []}
    torch.manual_seed(0)
    return type(model)(type(model.config)(**options)).eval()


@pytest.mark.parametrize("name", ["lfm2", "qwen3_5"])
@pytest.mark.parametrize("method", [ImplicitAttentionRelevance, ImplicitAttentionAttribution])
def test_a_hybrid_without_attention_writes_without_a_cache(method: Any, name: str, eight: Tensor) -> None:
    model = without_attention(name)
    options = {"max_new_tokens": 3, "do_sample": False, "eos_token_id": None}
    result = LLMImplicitAttention(method(model), Words()).attribute(eight[:, :START], None, options)
    expected = greedy(model, eight[:, :START], 3, None)
    assert result.output_tokens == Words().convert_ids_to_tokens(expected[0, START:].tolist())
    assert result.token_attr.shape == (3, START + 2)


def test_a_cache_that_is_asked_for_is_not_left_out(eight: Tensor) -> None:
    options = {"max_new_tokens": 3, "do_sample": False, "use_cache": True}
    with pytest.raises(ValueError, match="get_seq_length"):
        LLMImplicitAttention(ImplicitAttentionRelevance(without_attention("lfm2")), Words()).generate(eight, options)


def test_an_error_without_a_cache_is_the_models_own(eight: Tensor) -> None:
    class Broken(nn.Module):
        def generate(self, *args: Any, **options: Any) -> Any:
            raise ValueError(f"use_cache={options.get('use_cache')}")

    with pytest.raises(ValueError, match="use_cache=False"):
        continued(Broken(), eight, {}, None)
