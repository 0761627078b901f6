"""Models and arguments as people have them: each works, with the right figures, or is refused with cause and remedy."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import TextTemplateInput
from torch import Tensor, nn

import captum_ssm as cs
from tests.conftest import build

EVERY: dict[str, Callable[..., Any]] = {
    "rollout": lambda f, m=None: cs.ImplicitAttentionRollout(f, m),
    "signed": lambda f, m=None: cs.ImplicitAttentionAttribution(f, m, rectify=None),
    "relevance": lambda f, m=None: cs.ImplicitAttentionRelevance(f, m),
}
every_method = pytest.mark.parametrize("method", EVERY)


class LoraLinear(nn.Module):
    """Built like the layer of peft that stands in for a projection."""

    def __init__(self, base: Any) -> None:
        super().__init__()
        self.base_layer, self.in_features = base, base.in_features
        self.lora_A = nn.ModuleDict({"default": nn.Linear(base.in_features, 2, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(2, base.weight.shape[0], bias=False)})

    @property
    def weight(self) -> Tensor:
        return self.base_layer.weight

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B["default"](self.lora_A["default"](x))


class MergedInPlace(nn.Linear):
    """Built like the layer of loralib, whose own weight lacks the matrices."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__(base.in_features, base.out_features, bias=base.bias is not None)
        self.load_state_dict(base.state_dict())
        self.lora_A, self.lora_B = (
            nn.Parameter(torch.randn(2, base.in_features)),
            nn.Parameter(torch.randn(base.out_features, 2)),
        )

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + x @ self.lora_A.T @ self.lora_B.T


class Linear4bit(nn.Module):
    """Built like the layers of bitsandbytes: a packed weight with the state that unpacks it."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        weight = base.weight.detach()
        self.scale = float(weight.abs().max()) / 127
        self.weight = nn.Parameter((weight / self.scale).round().to(torch.int8), requires_grad=False)
        self.bias, self.in_features = base.bias, base.in_features

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight * self.scale, self.bias)


class QuantLinear(nn.Module):
    """Built like the layers of GPTQ and AWQ: packed weights among the buffers."""

    def __init__(self, base: nn.Linear) -> None:
        super().__init__()
        self.qweight, self.bias = nn.Buffer(base.weight.detach()[None]), base.bias

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.qweight[0], self.bias)


@every_method
def test_a_model_of_dynamic_int8_is_named(method: str, ids: Tensor) -> None:
    model = torch.ao.quantization.quantize_dynamic(build("mamba"), {nn.Linear}, dtype=torch.qint8)
    with pytest.raises(cs.UnsupportedModelError, match="quantised"):
        EVERY[method](model).attribute(ids, 1)
    with pytest.raises(cs.UnsupportedModelError, match="quantised"):
        EVERY[method](model.eval()).attribute(ids, 1)


@pytest.mark.parametrize(
    ("how", "method"),
    [
        *(("wrapped", method) for method in EVERY),
        ("in place", "rollout"),
        ("a block", "signed"),
        ("a part", "relevance"),
    ],
)
def test_a_compiled_model_is_explained_by_its_code(how: str, method: str, ids: Tensor) -> None:
    """Compiled code that ran before sees no hook: the scores are those of the model that was compiled."""
    model, ids = build("mamba"), ids[:, :3]  # torch compiles the loop over tokens one by one
    right = EVERY[method](model).attribute(ids, 1)
    layers = model.backbone.layers
    if how == "wrapped":
        model = torch.compile(model, backend="eager")
    elif how == "in place":
        model.compile(backend="eager")
    elif how == "a block":
        layers[1].compile(backend="eager")
    else:
        layers[1] = torch.compile(layers[1], backend="eager")
    for mode in (torch.enable_grad, torch.no_grad):  # compiled for both
        with mode():
            logits = model(input_ids=ids, attention_mask=None, use_cache=False).logits
    compiled = [vars(module).get("forward") for module in model.modules()]
    torch.testing.assert_close(EVERY[method](model).attribute(ids, 1), right)
    assert [vars(module).get("forward") for module in model.modules()] == compiled
    with torch.no_grad():
        torch.testing.assert_close(model(ids, use_cache=False).logits, logits)


@every_method
def test_a_traced_model_is_named(method: str, ids: Tensor) -> None:
    model = build("mamba")

    class Logits(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = model

        def forward(self, ids: Tensor) -> Tensor:
            return self.model(ids, use_cache=False).logits[:, -1]

    traced = torch.jit.trace(Logits().eval(), ids)
    with pytest.raises(cs.UnsupportedModelError, match="traced or scripted"):
        EVERY[method](traced)
    errors = (cs.InvalidInputError, cs.UnsupportedModelError)
    with pytest.raises(errors, match=r"runs this model itself|traced or scripted"):
        EVERY[method](lambda ids: traced(ids), model).attribute(ids, 1)


@pytest.mark.parametrize("method", ["rollout", "signed"])
def test_texts_stacked_in_one_batch_are_named(method: str, ids: Tensor) -> None:
    model = build("mamba")

    def forward(ids: Tensor) -> Tensor:
        return model(torch.cat([ids, ids.flip(0)]), use_cache=False).logits[: len(ids), -1]

    with pytest.raises(cs.UnsupportedModelError, match="stack"):
        EVERY[method](forward, model).attribute(ids, 1)


def test_relevance_follows_texts_that_are_stacked_in_one_batch(ids: Tensor) -> None:
    """A score of the text and of itself turned round, in one run, is the sum of both in two runs."""
    model = build("mamba")

    def both(ids: Tensor) -> Tensor:
        return model(torch.cat([ids, ids.flip(1)]), use_cache=False).logits[:, -1].unflatten(0, (2, -1)).sum(0)

    found = EVERY["relevance"](both, model).attribute(ids, 1, baselines=2)
    one = EVERY["relevance"](model)
    expected = one.attribute(ids, 1, baselines=2) + one.attribute(ids.flip(1), 1, baselines=2).flip(1)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("baseline", [None, 2])
def test_relevance_passes_where_a_gradient_is_stopped(baseline: int | None, ids: Tensor) -> None:
    """To detach a tensor changes no output, so it changes no difference of outputs, nor the relevance."""
    model = build("mamba")

    def forward(stop: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
        def run(ids: Tensor) -> Tensor:
            h = model.backbone(ids, use_cache=False).last_hidden_state
            return model.lm_head(h + stop(h))[:, -1]

        return run

    right = EVERY["relevance"](forward(lambda h: h), model).attribute(ids, 1, baselines=baseline)
    for stop in (Tensor.detach, lambda h: h.data, lambda h: h.detach().detach()):
        found = EVERY["relevance"](forward(stop), model).attribute(ids, 1, baselines=baseline)
        torch.testing.assert_close(found, right)


@pytest.mark.parametrize("method", ["rollout", "signed"])
def test_a_stopped_gradient_is_named(method: str, ids: Tensor) -> None:
    model = build("mamba")

    def forward(ids: Tensor) -> Tensor:
        return model.lm_head(model.backbone(ids, use_cache=False).last_hidden_state.detach())[:, -1]

    with pytest.raises(cs.ModelStateError, match="detach"):
        EVERY[method](forward, model).attribute(ids, 1)


def test_one_score_for_a_batch_is_explained_and_another_number_is_named(ids: Tensor) -> None:
    model = build("mamba")
    method = EVERY["relevance"](lambda ids: model(ids, use_cache=False).logits[:, -1, 1].sum(), model)
    found, delta = method.attribute(ids, baselines=2, return_convergence_delta=True)
    torch.testing.assert_close(found, EVERY["relevance"](model).attribute(ids, 1, baselines=2))
    assert delta.shape == (1,) and delta.abs().max() <= 1e-4
    three = EVERY["relevance"](lambda ids: model(ids, use_cache=False).logits[:, :3, 1].sum(0), model)
    with pytest.raises(cs.InvalidInputError, match=f"3 scores for {len(ids)} examples"):
        three.attribute(ids, baselines=2)


@every_method
def test_multiple_choice_is_named(method: str, ids: Tensor) -> None:
    with pytest.raises(cs.InvalidInputError, match="multiple choice"):
        EVERY[method](build("mamba")).attribute(ids[:, None].repeat(1, 3, 1), 1)


@every_method
def test_embeddings_of_another_width_are_named(method: str, ids: Tensor) -> None:
    model = build("mamba")
    width = model.get_input_embeddings().weight.shape[1]
    with pytest.raises(cs.InvalidInputError, match=f"{width + 3} components.*{width}"):
        EVERY[method](model).attribute(torch.randn(2, 7, width + 3), 1)
    into = nn.Linear(width + 3, width)

    def forward(features: Tensor) -> Tensor:
        return model(inputs_embeds=into(features), use_cache=False).logits[:, -1]

    assert EVERY[method](forward, model).attribute(torch.randn(2, 7, width + 3), 1).shape == (2, 7, width + 3)


def test_a_model_may_have_embeddings_of_two_widths(ids: Tensor) -> None:
    """Their relevances add up to the difference of the outputs."""
    inner, narrow = build("mamba"), nn.Embedding(40, 3)
    wide = inner.get_input_embeddings()
    into = nn.Linear(wide.weight.shape[1] + 3, wide.weight.shape[1])

    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.narrow, self.into = inner, narrow, into

        def forward(self, ids: Tensor) -> Tensor:
            h = self.into(torch.cat([wide(ids), self.narrow(ids)], -1))
            return self.inner(inputs_embeds=h, use_cache=False).logits[:, -1]

    model = Two().eval()
    scores = cs.ImplicitAttentionRelevance(model).attribute(ids, 1, baselines=2)
    with torch.no_grad():
        right = (model(ids) - model(torch.full_like(ids, 2)))[:, 1]
    torch.testing.assert_close(scores.sum(1), right, rtol=1e-3, atol=1e-5)


def test_code_that_fails_in_the_float32_of_an_explanation_is_named(ids: Tensor) -> None:
    """A model in half precision is followed in float32, which code that asks for the type of its vectors notices."""

    class Second(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner, self.into = build("mamba"), nn.Linear(8, 8)

        def forward(self, ids: Tensor, other: Tensor) -> Tensor:
            h = self.inner.get_input_embeddings()(ids)
            return self.inner(inputs_embeds=h + self.into(other.to(h)), use_cache=False).logits[:, -1]

    model, other = Second().eval(), torch.randn(2, 7, 8)
    relevance = cs.ImplicitAttentionRelevance(model)
    for baselines in (None, 2):
        assert relevance.attribute(ids, 1, other, baselines=baselines).isfinite().all()
    model.bfloat16()
    for baselines in (None, 2):
        with pytest.raises(cs.ModelStateError, match=r"bfloat16 is followed in float32.*model\.float\(\)"):
            relevance.attribute(ids, 1, other, baselines=baselines)


def test_with_frozen_gates_a_probability_is_named_as_constant(ids: Tensor) -> None:
    model = build("mamba")
    method = EVERY["relevance"](lambda ids: model(ids, use_cache=False).logits[:, -1].softmax(-1), model)
    with pytest.raises(cs.InvalidInputError, match="probability is constant"):
        method.attribute(ids, 1)
    assert method.attribute(ids, 1, baselines=2).isfinite().all()


def test_a_wrong_mask_of_relevance_is_named(ids: Tensor) -> None:
    for mask in (torch.ones(2, 7, 1), torch.ones(2, 7, device="meta")):
        with pytest.raises(cs.InvalidInputError, match="attention mask must be a tensor"):
            cs.ImplicitAttentionRelevance(build("mamba")).attribute(ids, 1, mask, baselines=2)


@pytest.fixture
def generation() -> cs.LLMImplicitAttention:
    return cs.LLMImplicitAttention(cs.ImplicitAttentionRollout(build("mamba")), None)


def test_arguments_of_a_generation_work(generation: cs.LLMImplicitAttention, ids: Tensor) -> None:
    prompt = ids[:1]
    right = generation.generate(prompt, {"max_new_tokens": 3, "do_sample": False})
    more: list[dict[str, Any]] = [
        {"return_dict_in_generate": True},
        {"return_dict_in_generate": True, "output_scores": True},
        {"attention_mask": torch.ones_like(prompt)},
        {"num_return_sequences": 1},
    ]
    for options in more:
        found = generation.generate(prompt, {"max_new_tokens": 3, "do_sample": False, **options})
        assert torch.equal(found, right)


def test_several_answers_are_named(generation: cs.LLMImplicitAttention, ids: Tensor) -> None:
    with pytest.raises(cs.InvalidInputError, match="num_return_sequences=1"):
        generation.generate(ids[:1], {"max_new_tokens": 3, "num_beams": 2, "num_return_sequences": 2})


@pytest.mark.parametrize("mask", [torch.tensor([[0, 1, 1, 1, 1, 1, 1]]), torch.ones(1, 3), "all"])
def test_a_prompt_with_padding_is_named(mask: Any, generation: cs.LLMImplicitAttention, ids: Tensor) -> None:
    with pytest.raises(cs.InvalidInputError, match="without padding"):
        generation.generate(ids[:1], {"max_new_tokens": 3, "attention_mask": mask})


def test_captums_template_is_named(generation: cs.LLMImplicitAttention) -> None:
    with pytest.raises(cs.InvalidInputError, match="TextTemplateInput"):
        generation.attribute(TextTemplateInput("{} is {}", ["a", "b"]), torch.tensor([3]))
