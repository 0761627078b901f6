"""Captum's own tools, run on the methods: what works, and what Captum or the methods refuse."""

import functools
import re
import warnings
from collections.abc import Callable
from typing import Any

import captum.metrics
import pytest
import torch
from captum._utils.gradient import construct_neuron_grad_fn
from captum.attr import (
    DataLoaderAttribution,
    FeatureAblation,
    LLMAttributionResult,
    LLMGradientAttribution,
    NoiseTunnel,
    TextTokenInput,
    configure_interpretable_embedding_layer,
    remove_interpretable_embedding_layer,
    visualization,
)
from captum.attr._utils.stat import Max, Mean, StdDev
from captum.attr._utils.summarizer import Summarizer
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer

from captum_ssm import (
    ImplicitAttentionAttribution,
    ImplicitAttentionRollout,
    LayerImplicitAttention,
    LLMImplicitAttention,
    models,
)
from tests.conftest import borrowed, build, snapshot
from tests.families import VOCABULARY
from tests.test_captum_contract import METHODS, assert_close, assert_differ, at_embeddings, embed, every_method
from tests.test_captum_contract import of_embeddings as last_of_embeddings
from tests.test_generation import assert_rows_close, one_by_one, words

__all__ = ["words"]  # a fixture
TEXT = "a gorgeous, witty film with a terrible ending"


@functools.cache
def shipped() -> tuple[nn.Module, Any]:
    return AutoModelForCausalLM.from_pretrained(models.REVIEWS).eval(), AutoTokenizer.from_pretrained(models.REVIEWS)


@pytest.fixture(params=["shipped", "mamba", "rwkv"])
def reader(request: pytest.FixtureRequest, ids: Tensor) -> tuple[nn.Module, Tensor, int]:
    """A model, what it reads, and what is explained."""
    if request.param != "shipped":
        return borrowed(request.param), ids, 3
    model, tokenizer = shipped()
    return model, tokenizer(TEXT, return_tensors="pt").input_ids, tokenizer.convert_tokens_to_ids("positive")


def ranks(scores: Tensor) -> Tensor:
    return scores.argsort(-1).argsort(-1).double()


# --- Noise, metrics, comparisons, summaries -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["smoothgrad", "smoothgrad_sq", "vargrad"])
@pytest.mark.parametrize("method", [METHODS["signed"], METHODS["rollout"]], ids=["signed", "rollout"])
def test_every_noise_tunnel_is_the_moment_of_the_methods_own_scores(
    method: Any, kind: str, reader: tuple[nn.Module, Tensor, int]
) -> None:
    model, ids, target = reader
    made, x = method(model), embed(model, ids)
    torch.manual_seed(0)
    scores = NoiseTunnel(made).attribute(x, nt_type=kind, nt_samples=4, stdevs=0.1, target=target)
    torch.manual_seed(0)
    # Captum draws the samples of each example next to each other
    noisy = torch.normal(x.repeat_interleave(4, 0), 0.1)
    each = made.attribute(noisy, target=target).view(len(x), 4, *x.shape[1:])
    mean, square = each.mean(1), each.square().mean(1)
    expected = {"smoothgrad": mean, "smoothgrad_sq": square, "vargrad": square - mean.square()}[kind]
    assert scores.shape == x.shape
    assert_close(scores, expected, 1e-4)
    still = NoiseTunnel(made).attribute(x, nt_type=kind, nt_samples=2, stdevs=0.0, target=target)
    plain = made.attribute(x, target=target)
    want = {"smoothgrad": plain, "smoothgrad_sq": plain.square(), "vargrad": torch.zeros_like(plain)}[kind]
    assert (still - want).abs().max() <= 1e-5 * plain.square().max().maximum(plain.abs().max())


def test_a_noise_tunnel_passes_the_arguments_of_a_method_on(mamba: nn.Module, ids: Tensor) -> None:
    x, made = embed(mamba, ids), METHODS["signed"](mamba)
    options: dict[str, Any] = {"contrast": 5, "query": 6, "internal_batch_size": 2}
    scores = NoiseTunnel(made).attribute(x, nt_samples=3, stdevs=0.0, target=3, **options)
    assert_close(scores, made.attribute(x, target=3, contrast=5, query=6))


def test_a_noise_tunnel_on_token_ids_is_refused(mamba: nn.Module, ids: Tensor) -> None:
    with pytest.raises((ValueError, RuntimeError, AssertionError)):
        NoiseTunnel(ImplicitAttentionAttribution(mamba)).attribute(ids, target=3)


@every_method
def test_infidelity_of_tokens_and_of_embeddings(method: Any, reader: tuple[nn.Module, Tensor, int]) -> None:
    """Tokens are taken away with a mask of 0 and 1, embeddings by noise; both by Captum's definition."""
    model, ids, target = reader
    x, kept = embed(model, ids), torch.rand(ids.shape, generator=torch.Generator().manual_seed(0)) > 0.3

    def drop(inputs: Any, *_: Any) -> tuple[Tensor, Tensor]:
        inputs = inputs[0] if isinstance(inputs, tuple) else inputs
        mask = kept.repeat_interleave(len(inputs) // len(kept), 0)
        return (~mask).float(), torch.where(mask, inputs, 4)

    def shift(inputs: Any) -> tuple[Tensor, Tensor]:
        return 0.1 * torch.ones_like(inputs), inputs - 0.1

    def of_ids(ids: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False).logits[:, -1]

    for forward, inputs, perturb in [(of_ids, ids, drop), (last_of_embeddings(model), x, shift)]:
        scores = method(model).attribute(inputs, target=target)
        value = captum.metrics.infidelity(forward, perturb, inputs, scores, target=target, n_perturb_samples=2)
        with torch.no_grad():
            change, moved = perturb(inputs)
            fell = forward(inputs)[:, target] - forward(moved)[:, target]
        said = (change * scores).flatten(1).sum(1)
        assert_close(value, (said - fell).square(), 1e-4)


@every_method
def test_sensitivity_is_the_relative_change_of_the_scores(method: Any, reader: tuple[nn.Module, Tensor, int]) -> None:
    model, ids, target = reader
    x, made = embed(model, ids), method(model)

    def move(x: Tensor) -> Tensor:
        return x + 0.1 * x.roll(1, -1)

    value = captum.metrics.sensitivity_max(
        made.attribute, x, perturb_func=move, target=target, n_perturb_samples=2, internal_batch_size=1
    )
    plain, moved = (made.attribute(inputs, target=target).flatten(1) for inputs in (x, move(x)))
    expected = (moved - plain).norm(dim=1) / plain.norm(dim=1)
    assert value.shape == expected.shape and (value - expected).abs().max() <= 1e-3 * expected.max() + 1e-6


@every_method
def test_a_method_compares_with_feature_ablation(method: Any) -> None:
    model, tokenizer = shipped()
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    target = tokenizer.convert_tokens_to_ids("positive")
    other = tokenizer.convert_tokens_to_ids("negative")

    def difference(ids: Tensor) -> Tensor:
        logits = model(input_ids=ids, use_cache=False).logits[:, -1]
        return logits[:, target] - logits[:, other]

    with torch.no_grad():
        ablated = FeatureAblation(difference).attribute(ids, baselines=tokenizer.convert_tokens_to_ids("the"))
    scores = method(model).attribute(ids, target=target, contrast=other)
    assert ablated.shape == scores.shape
    correlation = torch.corrcoef(torch.cat([ranks(scores), ranks(ablated)]))[0, 1]
    assert -1 <= correlation <= 1
    if method is METHODS["signed"]:  # the only one whose scores have the sign of what they explain
        assert correlation > 0.3
        assert_close(method(difference, model=model).attribute(ids), scores)


@every_method
def test_a_summarizer_gathers_scores(method: Any, mamba: nn.Module, ids: Tensor) -> None:
    summarizer, all_scores = Summarizer([Mean(), StdDev(), Max()]), []
    for target in (3, 5, 7):
        all_scores.append(method(mamba).attribute(ids, target=target))
        summarizer.update(all_scores[-1])
    found, each = summarizer.summary, torch.stack(all_scores)
    assert_close(found["mean"], each.mean(0))
    assert_close(found["max"], each.amax(0))
    assert (found["std_dev"] - each.std(0, correction=0)).abs().max() <= 1e-4


# --- Neurons, embedding layers, the data loader -------------------------------------------------------------------


@every_method
def test_captums_gradient_of_a_neuron_is_refused(method: Any, mamba: Any, ids: Tensor) -> None:
    """The gradients needed are those of a score at the layers: Captum's would be of a neuron at the inputs."""
    made = method(mamba)
    made.gradient_func = construct_neuron_grad_fn(mamba.backbone.norm_f, (6, 2))
    with pytest.raises(Exception, match="gradient_func"):
        made.attribute(ids, target=3)


@every_method
def test_a_neuron_is_explained_as_a_score_of_a_callable(method: Any, mamba: Any, ids: Tensor) -> None:
    def neuron(ids: Tensor) -> Tensor:
        return mamba.backbone(input_ids=ids, use_cache=False).last_hidden_state[:, 4, 2]

    scores = method(neuron, model=mamba).attribute(ids)
    assert scores.shape == ids.shape and scores[:, :5].ne(0).any() and scores[:, 5:].eq(0).all()


def interpretable(model: nn.Module) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Captum says what it does
        return configure_interpretable_embedding_layer(model, "backbone.embeddings")


@every_method
def test_embeddings_may_come_through_the_token_ids(method: Any, ids: Tensor, unchanged: Any) -> None:
    """Captum replaces the embedding layer by one that passes embeddings through."""
    for model, tokens in ((build("mamba"), ids), (shipped()[0], ids)):
        forward = lambda x, model=model: model(input_ids=x, use_cache=False).logits[:, -1]  # noqa: E731
        expected = method(model).attribute(tokens, target=3)
        made = method(forward, model=model)
        with unchanged(model, tokens):
            layer = interpretable(model)
            try:
                x = layer.indices_to_embeddings(tokens)
                model.eval()  # a fresh module is in training mode
                assert_close(made.attribute(x, target=3).sum(-1), expected)
                assert_close(method(model).attribute(x, target=3).sum(-1), expected)
            finally:
                remove_interpretable_embedding_layer(model, layer)
        assert_close(made.attribute(tokens, target=3), expected)


def test_captums_embedding_layer_needs_no_eval(mamba: nn.Module, ids: Tensor) -> None:
    layer = interpretable(mamba)
    try:
        x = layer.indices_to_embeddings(ids)
        assert ImplicitAttentionAttribution(mamba).attribute(x, target=3).shape == x.shape
    finally:
        remove_interpretable_embedding_layer(mamba, layer)


@every_method
def test_captum_refuses_its_data_loader(method: Any, mamba: nn.Module) -> None:
    """It feeds a table of 0 and 1 in place of the inputs, which only a perturbation can take."""
    with pytest.raises(AssertionError, match="does not support"):
        DataLoaderAttribution(method(mamba))


@every_method
def test_captum_refuses_a_method_of_inputs_for_a_generation(method: Any, mamba: nn.Module, words: Any) -> None:
    for made in (method(mamba), LayerImplicitAttention(mamba, 0)):
        with pytest.raises(AssertionError, match="does not support"):
            LLMGradientAttribution(made, words)


# --- Generations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["mamba", "zamba", "falcon_h1", "rwkv", "qwen3_5"])
def test_captums_own_class_for_generations_takes_the_embedding_layers_method(name: str, words: Any) -> None:
    model = build(name)
    made = at_embeddings(model)
    whole = LLMGradientAttribution(made, words)
    model(torch.tensor([[1, 5]]), use_cache=False)  # RWKV rescales its weights when it first runs
    before = snapshot(model, ())
    result = whole.attribute(TextTokenInput("w5 w7 w3", words), target=torch.tensor([9, 4, 11]))
    assert snapshot(model, ()) == before and made.forward_func is model
    rows = one_by_one(METHODS["signed"], model, torch.tensor([[1, 5, 7, 3, 9, 4, 11]]), 4)
    assert_rows_close(result.token_attr, rows[:, :4], 1e-3 if name == "zamba" else 1e-4)
    assert_close(result.seq_attr, rows[:, :4].sum(0), 1e-3)
    assert result.input_tokens == ["[BOS]", "w5", "w7", "w3"] and result.output_tokens == ["w9", "w4", "w11"]


@pytest.mark.parametrize("rectify", ["channel", "token", None])
def test_captums_own_class_and_ours_agree(rectify: Any) -> None:
    model, tokenizer = shipped()
    made = at_embeddings(model, rectify=rectify)
    theirs = LLMGradientAttribution(made, tokenizer)
    ours = LLMImplicitAttention(ImplicitAttentionAttribution(model, rectify=rectify), tokenizer)
    text = "a gorgeous, witty film"
    answer = tokenizer("positive", return_tensors="pt", add_special_tokens=False).input_ids[0]
    for target in (torch.cat([answer, answer + 1]), answer):
        one = theirs.attribute(TextTokenInput(text, tokenizer), target=target)
        other = ours.attribute(TextTokenInput(text, tokenizer), target=target)
        assert_rows_close(one.token_attr, other.token_attr[:, : one.token_attr.shape[1]], 1e-4)
        assert one.output_tokens == other.output_tokens
    gen_args = {"max_new_tokens": 2, "do_sample": False}
    one = theirs.attribute(TextTokenInput(text, tokenizer), gen_args=gen_args)
    other = ours.attribute(text, gen_args=gen_args)
    assert one.output_tokens == other.output_tokens
    assert_rows_close(one.token_attr, other.token_attr[:, : one.token_attr.shape[1]], 1e-4)


def test_a_generation_explained_again_is_not_examined_again(mamba: nn.Module, words: Any) -> None:
    whole, inp = LLMGradientAttribution(at_embeddings(mamba), words), TextTokenInput("w5 w7 w3", words)
    runs: list[int] = []
    counted = mamba.register_forward_hook(lambda module, args, output: runs.append(1))

    def runs_of(*target: int) -> int:
        before = len(runs)
        whole.attribute(inp, target=torch.tensor(target))
        return len(runs) - before

    first, again, other = runs_of(9, 4, 11), runs_of(9, 4, 11), runs_of(9, 5, 11)
    counted.remove()
    assert again == 2 * 3 < first == other  # a token: one run for the ids that the layer sees, one for the scores


def test_a_target_may_be_text_for_captums_own_class(mamba: nn.Module, words: Any) -> None:
    whole = LLMGradientAttribution(at_embeddings(mamba), words)
    result = whole.attribute(TextTokenInput("w5 w7 w3", words), target="w9 w4")
    assert result.output_tokens == ["w9", "w4"]
    ids = torch.tensor([words.convert_tokens_to_ids(result.output_tokens)])
    rows = one_by_one(METHODS["signed"], mamba, torch.cat([torch.tensor([[1, 5, 7, 3]]), ids], 1), 4)
    assert_rows_close(result.token_attr, rows[:, :4], 1e-4)


def test_skipped_tokens_are_left_out_of_captums_result(mamba: nn.Module, words: Any) -> None:
    whole = LLMGradientAttribution(at_embeddings(mamba), words)
    target = torch.tensor([9, 4])
    full = whole.attribute(TextTokenInput("w5 w7 w3", words), target=target)
    part = whole.attribute(TextTokenInput("w5 w7 w3", words, skip_tokens=[1, 7]), target=target)
    assert_close(part.token_attr, full.token_attr[:, [1, 3]])


# --- Pictures -----------------------------------------------------------------------------------------------------


@every_method
def test_captums_text_picture_shows_scores(method: Any, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("IPython")
    model, tokenizer = shipped()
    ids = tokenizer(TEXT, return_tensors="pt").input_ids
    target = tokenizer.convert_tokens_to_ids("positive")
    scores = method(model).attribute(ids, target=target)[0]
    tokens = tokenizer.convert_ids_to_tokens(ids[0].tolist())
    record = visualization.VisualizationDataRecord(
        scores / scores.abs().max(), 0.9, "positive", "positive", "positive", scores.sum(), tokens, 0.0
    )
    page = visualization.visualize_text([record]).data
    capsys.readouterr()
    assert all(token in page for token in ("gorgeous", "witty", "ending"))
    assert len(re.findall("<mark", page)) == len(tokens)


def test_captums_plots_show_scores(mamba: nn.Module, words: Any) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    scores = ImplicitAttentionRollout(mamba).attribute(torch.tensor([[1, 5, 7, 3]]), target=9)
    built = LLMAttributionResult(
        seq_attr=scores[0], token_attr=scores, input_tokens=["[BOS]", "w5", "w7", "w3"], output_tokens=["w9"]
    )
    stock = LLMGradientAttribution(at_embeddings(mamba), words).attribute(
        TextTokenInput("w5 w7 w3", words), target=torch.tensor([9, 4])
    )
    for result in (built, stock):
        _, axes = result.plot_token_attr(show=False)
        assert len(axes.get_xticklabels()) == 4
        _, axes = result.plot_seq_attr(show=False)
        assert len(axes.get_xticklabels()) == 4
    pyplot.close("all")


# --- Captum's own tests of a method -------------------------------------------------------------------------------


class Last(nn.Module):
    """A model as Captum's tests have them: tensors in, one row of scores for each example out."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.inner = build(name)

    def forward(self, ids: Tensor) -> Tensor:
        return self.inner(input_ids=ids, use_cache=False).logits[:, -1]


def configurations() -> list[dict[str, Any]]:
    """In the form of ``captum.testing.attr.helpers.test_config``."""
    four = torch.randint(3, VOCABULARY, (4, 6), generator=torch.Generator().manual_seed(0))
    targets: dict[str, Any] = {
        "single": 3, "list": [3, 5, 7, 9], "tensor": torch.tensor([3, 5, 7, 9]), "one_element": torch.tensor([3]),
        "list_of_tuples": [(3,), (5,), (7,), (9,)],
    }  # fmt: skip
    found: list[dict[str, Any]] = []
    for name in ("mamba", "recurrent_gemma"):
        model = Last(name).eval()
        x = embed(model.inner, four)
        wrapped: Callable[..., Any] = model.inner
        for key, target in targets.items() if name == "mamba" else [("list", targets["list"])]:
            args = {"inputs": four, "target": target}
            found.append({"name": f"{name}_{key}", "algorithms": [*METHODS.values()], "model": model,
                          "attribute_args": args, "target_delta": 1e-5})  # fmt: skip
            found.append({"name": f"{name}_{key}_layer", "algorithms": [at_embeddings], "model": wrapped,
                          "attribute_args": args, "layer": True, "target_delta": 1e-5})  # fmt: skip
            noisy = {"inputs": x, "target": target, "stdevs": 0.0, "nt_samples": 2}
            found.append({"name": f"{name}_{key}_noise", "algorithms": [METHODS["signed"]], "model": wrapped,
                          "attribute_args": noisy, "noise_tunnel": True, "target_delta": 1e-5})  # fmt: skip
    return found


CONFIGURATIONS = configurations()


@pytest.mark.parametrize("configuration", CONFIGURATIONS, ids=lambda configuration: configuration["name"])
def test_captums_suites_of_targets_and_of_hooks(configuration: dict[str, Any]) -> None:
    """What its generated tests do: targets of a batch are those of its examples, and no hook remains."""
    helpers = pytest.importorskip("captum.testing.attr.helpers.gen_test_utils")
    basic = pytest.importorskip("captum.testing.helpers.basic")
    algorithms, model, args, _, noise_tunnel, _ = helpers.parse_test_config(configuration)
    target, delta = args["target"], configuration["target_delta"]
    for algorithm in algorithms:
        made = NoiseTunnel(algorithm(model)) if noise_tunnel else algorithm(model)
        before = snapshot(model, (args["inputs"],))
        together = made.attribute(**args)
        assert snapshot(model, (args["inputs"],)) == before
        for k in range(4):
            each = isinstance(target, list) or (isinstance(target, Tensor) and target.numel() > 1)
            one = {**args, "inputs": args["inputs"][k : k + 1], "target": target[k] if each else target}
            basic.assertTensorAlmostEqual(
                None, together[k : k + 1], made.attribute(**one), delta=delta * float(together[k].abs().max()),
                mode="max",
            )  # fmt: skip
        with pytest.raises(AssertionError):
            made.attribute(**{**args, "target": VOCABULARY})
        assert snapshot(model, (args["inputs"],)) == before


def test_two_explanations_of_one_model_do_not_meet(mamba: nn.Module, ids: Tensor) -> None:
    """As when a tool keeps several methods of one model and calls them in turn."""
    made = {name: method(mamba) for name, method in METHODS.items()}
    first = {name: method.attribute(ids, target=3) for name, method in made.items()}
    for name, method in reversed(made.items()):
        assert torch.equal(method.attribute(ids, target=3), first[name])
    assert_differ(first["channel"], first["rollout"])
