"""A generation explained in one call is each of its tokens explained by itself."""

import functools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import LayerIntegratedGradients, LLMAttributionResult, Saliency, TextTokenInput
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, MambaConfig, MambaModel, PreTrainedTokenizerFast

import captum_ssm._progress
import captum_ssm.attr.base
import captum_ssm.matrices.layer_stack
from captum_ssm import (
    ImplicitAttentionAttribution,
    ImplicitAttentionRollout,
    InvalidInputError,
    LayerImplicitAttention,
    LLMImplicitAttention,
    ModelStateError,
    RawImplicitAttention,
    models,
)
from captum_ssm.attr import LayerImplicitAttentionAttribution, generated_tokens
from captum_ssm.layers.fidelity import decompose
from captum_ssm.layers.mixers import find_mixers
from captum_ssm.operators import HeadOperator, SoftmaxAttention
from tests.conftest import borrowed, build
from tests.families import COMMON, S6, VOCABULARY, perturbed

FAMILIES = [
    "mamba", "falcon_mamba", "zamba", "mamba2", "falcon_h1", "nemotron_h", "recurrent_gemma", "rwkv", "xlstm",
    "qwen3_5", "kimi_linear", "minimax", "lfm2",
]  # fmt: skip
METHODS: dict[str, Callable[..., Any]] = {
    "channel": ImplicitAttentionAttribution,
    "token": functools.partial(ImplicitAttentionAttribution, rectify="token"),
    "signed": functools.partial(ImplicitAttentionAttribution, rectify=None),
    "rollout": ImplicitAttentionRollout,
    "raw": RawImplicitAttention,
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
signed = METHODS["signed"]
PROMPT, ANSWER = "w5 w7 w3", "w9 w4 w11 w6"


@pytest.fixture(scope="module")
def words() -> PreTrainedTokenizerFast:
    """One token for each of the vocabulary's words, and one that begins every text."""
    vocabulary = {"[PAD]": 0, "[BOS]": 1, "[EOS]": 2, **{f"w{k}": k for k in range(3, VOCABULARY)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[PAD]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(single="[BOS] $A", special_tokens=[("[BOS]", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="[PAD]", pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]"
    )


@pytest.fixture
def eight() -> Tensor:
    """Token ids of one text, prompt and answer."""
    return torch.randint(3, VOCABULARY, (1, 8), generator=torch.Generator().manual_seed(1))


@functools.cache  # one function for one model, which is then examined once
def last_of(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """From ids to the log-probabilities of the next token."""
    return lambda ids: model(input_ids=ids, use_cache=False).logits[:, -1].log_softmax(-1)


def one_by_one(method: Any, model: nn.Module, ids: Tensor, start: int) -> Tensor:
    """Explain the log-probability of every token from ``start`` on by a call of its own on what is before it."""
    made, length = method(last_of(model), model=model), ids.shape[1]
    rows = torch.zeros(length - start, length - 1, dtype=next(model.parameters()).dtype)
    for row, position in enumerate(range(start, length)):
        rows[row, :position] = made.attribute(ids[:, :position], target=int(ids[0, position]))[0]
    return rows


def assert_rows_close(actual: Tensor, expected: Tensor, tolerance: float) -> None:
    """Each row by itself: one that is small is not to hide behind another."""
    assert actual.shape == expected.shape
    size = expected.double().abs().amax(1)
    assert (size > 0).all()
    difference = (actual.double() - expected.double()).abs().amax(1)
    assert (difference <= tolerance * size).all(), difference / size


def explain(method: Any, model: nn.Module, ids: Tensor, start: int) -> Tensor:
    return LLMImplicitAttention(method(model), None).explain(ids, start)


# --- Each row is a call of its own --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "name"),
    [
        pytest.param(method, family, id=f"{name}-{family}")
        for name, method in METHODS.items()
        for family in FAMILIES
        if name in ("channel", "rollout") or family in ("mamba", "zamba", "rwkv", "qwen3_5")
    ],
)
def test_each_row_is_the_methods_own_explanation_of_that_token(method: Any, name: str, eight: Tensor) -> None:
    model = borrowed(name)
    rows = explain(method, model, eight, 4)
    assert rows.shape == (4, 7) and rows.is_contiguous() and not rows.requires_grad
    assert_rows_close(rows, one_by_one(method, model, eight, 4), 1e-4)
    for row in range(4):
        assert rows[row, 4 + row :].eq(0).all()  # what comes after a token has no part in it


@every_method
def test_in_double_precision_they_are_equal(method: Any, eight: Tensor) -> None:
    model = build("mamba").double()
    rows = explain(method, model, eight, 3)
    assert rows.dtype == torch.float64
    assert_rows_close(rows, one_by_one(method, model, eight, 3), 1e-6)  # transformers scans in float32
    assert_rows_close(explain(method, borrowed("mamba"), eight, 3), rows, 1e-4)


@every_method
def test_a_model_in_half_precision_is_explained(method: Any, eight: Tensor) -> None:
    model = build("mamba").bfloat16()
    rows = explain(method, model, eight, 4)
    assert rows.dtype == torch.float32 and rows.isfinite().all()
    assert_rows_close(rows, one_by_one(method, model.float(), eight, 4), 0.1)


@every_method
@pytest.mark.parametrize("start", [1, 7])
def test_an_answer_may_begin_anywhere_after_the_first_token(method: Any, start: int, eight: Tensor) -> None:
    model = borrowed("mamba")
    rows = explain(method, model, eight, start)
    assert rows.shape == (8 - start, 7)
    assert_rows_close(rows, one_by_one(method, model, eight, start), 1e-4)
    assert_rows_close(rows, explain(method, model, eight, 1)[start - 1 :], 1e-5)


@every_method
def test_what_is_generated_later_changes_no_row(method: Any, eight: Tensor) -> None:
    model = borrowed("mamba")
    rows = explain(method, model, eight, 4)
    assert_rows_close(explain(method, model, eight[:, :6], 4), rows[:2, :5], 1e-5)
    changed = eight.clone()
    changed[0, 6:] = (eight[0, 6:] + 1) % VOCABULARY
    assert_rows_close(explain(method, model, changed, 4)[:2], rows[:2], 1e-5)


@pytest.mark.parametrize(
    ("name", "size"), [*(("mamba", size) for size in (1, 2, 3, 4)), ("nemotron_h", 2), ("rwkv", 3)]
)
@pytest.mark.parametrize("of_a_pass", [1, 2])
def test_the_size_of_a_part_changes_nothing(
    name: str, size: int, of_a_pass: int, eight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, parts = borrowed(name), []
    expected = {key: explain(method, model, eight, 3) for key, method in METHODS.items()}
    width, layers = model.get_input_embeddings().weight.shape[1], len(find_mixers(model))
    monkeypatch.setattr(generated_tokens, "_PASS", of_a_pass * 7 * width * 32)
    monkeypatch.setattr(generated_tokens, "_HELD", size * 7 * (width * layers + 7))
    own = captum_ssm.attr.base.ImplicitAttentionMethod.scores_of_calls
    monkeypatch.setattr(
        captum_ssm.attr.base.ImplicitAttentionMethod,
        "scores_of_calls",
        lambda self, *args, **options: (parts.append(len(args[-1])), own(self, *args, **options))[1],  # type: ignore[func-returns-value]
    )
    for key, method in METHODS.items():
        parts.clear()
        assert_rows_close(explain(method, model, eight, 3), expected[key], 1e-5)
        if key != "rollout":  # it needs no gradients, and takes all at once
            assert max(parts) == (5 if key == "raw" else size)
            assert sum(parts) == 5 and len(parts) == (1 if key == "raw" else math.ceil(5 / size))


@every_method
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_the_grad_mode_around_the_call_changes_nothing(
    method: Any, mode: Any, eight: Tensor, words: PreTrainedTokenizerFast
) -> None:
    model = borrowed("mamba")
    whole = LLMImplicitAttention(method(model), words)
    expected = whole.explain(eight, 4)
    with mode():
        assert torch.equal(whole.explain(eight.clone(), 4), expected)
        assert whole.attribute(PROMPT, gen_args={"max_new_tokens": 2, "min_new_tokens": 2}).token_attr.shape == (2, 5)


def test_parameters_need_no_gradients(eight: Tensor) -> None:
    model = borrowed("mamba")
    expected = explain(signed, model, eight, 4)
    assert_rows_close(explain(signed, model.requires_grad_(False), eight, 4), expected, 1e-5)


@every_method
def test_the_methods_own_options_hold(method: Any, eight: Tensor) -> None:
    model = borrowed("mamba")
    for options in ({"attention": "scan"}, {"without": "gate"}):
        chosen = functools.partial(method, **options)
        rows = explain(chosen, model, eight, 4)
        assert_rows_close(rows, one_by_one(chosen, model, eight, 4), 1e-4)
        assert (rows - explain(method, model, eight, 4)).abs().max() > 1e-3 * rows.abs().max()


@every_method
def test_the_model_runs_once(method: Any, eight: Tensor) -> None:
    model = borrowed("mamba")
    runs: list[tuple[int, ...]] = []
    with_count = model.register_forward_pre_hook(
        lambda module, args, kwargs: runs.append(tuple(kwargs["input_ids"].shape)), with_kwargs=True
    )
    whole = LLMImplicitAttention(method(model), None)
    whole.explain(eight, 4)  # a model is examined once
    runs.clear()
    whole.explain(eight, 4)
    whole.explain(eight, 2)
    with_count.remove()
    assert len(runs) == 2  # one for each call
    assert set(runs) == {(1, 7)}


def test_each_layer_is_decomposed_once(eight: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []
    own = decompose
    monkeypatch.setattr(generated_tokens, "_HELD", 1)
    monkeypatch.setattr(
        captum_ssm.matrices.layer_stack,
        "decompose",
        lambda call, *args: (done.append(call.name), own(call, *args))[1],  # type: ignore[func-returns-value]
    )
    explain(signed, borrowed("mamba"), eight, 4)
    assert sorted(done) == ["backbone.layers.0.mixer", "backbone.layers.1.mixer"]


@pytest.mark.parametrize("method", [METHODS["channel"], METHODS["token"], METHODS["rollout"]])
@pytest.mark.parametrize("name", ["mamba2", "qwen3_5", "lfm2"])
def test_a_heads_matrix_is_computed_once_a_layer(
    method: Any, name: str, eight: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    computed: list[int] = []
    for operator in (HeadOperator, SoftmaxAttention):
        own = operator.matrices
        monkeypatch.setattr(
            operator,
            "matrices",
            lambda self, like, own=own: (computed.append(self.heads), own(self, like))[1],  # type: ignore[func-returns-value]
        )
    model = borrowed(name)
    explain(method, model, eight, 3)
    of_five_tokens = sum(computed)
    computed.clear()
    explain(method, model, eight[:, :4], 3)
    assert of_five_tokens == sum(computed) > 0


@every_method
def test_the_error_of_every_layer_is_there_to_see(method: Any, eight: Tensor) -> None:
    model = borrowed("mamba")
    made = method(model)
    LLMImplicitAttention(made, None).explain(eight, 4)
    assert set(made.fidelity) <= {"backbone.layers.0.mixer", "backbone.layers.1.mixer"} and made.fidelity
    assert all(0 <= error < 1e-4 for error in made.fidelity.values())


# --- Texts --------------------------------------------------------------------------------------------------------


def test_texts_and_ids_and_captums_text_input_are_the_same(words: PreTrainedTokenizerFast) -> None:
    whole = LLMImplicitAttention(signed(borrowed("mamba")), words)
    expected = whole.attribute(PROMPT, target=ANSWER)
    assert expected.input_tokens == ["[BOS]", "w5", "w7", "w3", "w9", "w4", "w11"]
    assert expected.output_tokens == ["w9", "w4", "w11", "w6"]  # nothing begins anew between them
    prompt, answer = torch.tensor([1, 5, 7, 3]), torch.tensor([9, 4, 11, 6])
    for given in (prompt, prompt[None], prompt.int(), TextTokenInput(PROMPT, words)):
        for wanted in (ANSWER, answer, answer[None], answer.int()):
            result = whole.attribute(given, target=wanted)
            assert torch.equal(result.token_attr, expected.token_attr)
            assert result.input_tokens == expected.input_tokens and result.output_tokens == expected.output_tokens
    assert torch.equal(whole.explain(torch.cat([prompt, answer])[None], 4), expected.token_attr)


def test_the_result_is_captums_own_and_plots(words: PreTrainedTokenizerFast) -> None:
    pyplot = pytest.importorskip("matplotlib.pyplot")
    pyplot.switch_backend("Agg")
    result = LLMImplicitAttention(signed(borrowed("mamba")), words).attribute(PROMPT, target=ANSWER)
    assert isinstance(result, LLMAttributionResult)
    assert torch.equal(result.seq_attr, result.token_attr.sum(0))
    assert result.token_attr.shape == (len(result.output_tokens), len(result.input_tokens)) == (4, 7)
    _, axes = result.plot_token_attr(show=False)
    assert {text.get_text() for text in axes.get_xticklabels()} >= {"w5", "w7", "w3"}
    _, axes = result.plot_seq_attr(show=False)
    assert len(axes.patches) >= 7
    pyplot.close("all")


@every_method
def test_without_an_answer_the_model_gives_one(method: Any, words: PreTrainedTokenizerFast) -> None:
    model = borrowed("mamba")
    whole = LLMImplicitAttention(method(model), words)
    prompt = torch.tensor([[1, 5, 7, 3]])
    for gen_args, length in (({"max_new_tokens": 3, "do_sample": False}, 3), (None, 25)):
        options = {"max_new_tokens": 25, "do_sample": False} if gen_args is None else gen_args
        expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), **options)[:, 4:]
        result = whole.attribute(PROMPT, gen_args=gen_args)
        assert result.output_tokens == words.convert_ids_to_tokens(expected[0].tolist())
        assert 1 <= len(result.output_tokens) <= length
        assert torch.equal(result.token_attr, whole.attribute(PROMPT, target=expected).token_attr)


def test_the_shipped_model_is_explained() -> None:
    model = AutoModelForCausalLM.from_pretrained(models.REVIEWS).eval()
    tokenizer = AutoTokenizer.from_pretrained(models.REVIEWS)
    result = LLMImplicitAttention(signed(model), tokenizer).attribute(
        "a gorgeous, witty film", gen_args={"max_new_tokens": 2, "do_sample": False}
    )
    assert result.output_tokens[0] == "positive"
    ids = tokenizer("a gorgeous, witty film", return_tensors="pt").input_ids
    assert result.input_tokens[:-1] == tokenizer.convert_ids_to_tokens(ids[0].tolist())
    whole = torch.cat([ids, torch.tensor([tokenizer.convert_tokens_to_ids(result.output_tokens)])], 1)
    assert_rows_close(result.token_attr, one_by_one(signed, model, whole, ids.shape[1]), 1e-4)


def test_a_progress_bar_counts_tokens(eight: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[dict[str, Any]] = []

    class Bar:
        def __init__(self, **options: Any) -> None:
            seen.append({**options, "count": 0})

        def __enter__(self) -> "Bar":
            return self

        def __exit__(self, *error: Any) -> None:
            return None

        def update(self, count: int = 1) -> None:
            seen[-1]["count"] += count

    model = borrowed("mamba")
    monkeypatch.setattr(captum_ssm._progress, "tqdm", Bar)
    monkeypatch.setattr(generated_tokens, "_HELD", 2 * 7 * (8 * 2 + 7))
    whole = LLMImplicitAttention(signed(model), None)
    shown, hidden = whole.explain(eight, 3, show_progress=True), whole.explain(eight, 3)
    assert torch.equal(shown, hidden)
    assert [bar["disable"] for bar in seen] == [False, True]
    assert all(bar["total"] == bar["count"] == 5 and bar["unit"] == "token" for bar in seen)


# --- What it leaves behind, and what it refuses -------------------------------------------------------------------


def configuration(model: Any) -> Any:
    return model.config.to_dict(), model.generation_config.to_dict()


@every_method
@pytest.mark.parametrize("name", ["mamba", "rwkv", "recurrent_gemma"])
def test_model_and_configuration_stay_as_they_are(
    method: Any, name: str, words: PreTrainedTokenizerFast, unchanged: Any
) -> None:
    model = borrowed(name)
    prompt, answer = torch.tensor([1, 5, 7, 3]), torch.tensor([9, 4])
    model(prompt[None])  # RWKV rescales its weights when it first runs
    whole, before = LLMImplicitAttention(method(model), words), configuration(model)
    with unchanged(model, prompt, answer):
        whole.attribute(prompt, target=answer)
        if name != "recurrent_gemma":  # its blocks keep the state of the last generation in themselves
            whole.attribute(prompt, gen_args={"max_new_tokens": 2})
    assert configuration(model) == before


class BrokenError(RuntimeError):
    pass


@every_method
@pytest.mark.parametrize("where", ["lm_head", "backbone.layers.1.mixer", "backbone.layers.1"])
def test_a_model_that_fails_stays_as_it_is(method: Any, where: str, eight: Tensor, unchanged: Any) -> None:
    model = borrowed("mamba")

    def fail(*_: Any) -> None:
        raise BrokenError

    hook = model.get_submodule(where).register_forward_hook(fail)
    before = configuration(model)
    with unchanged(model, eight), pytest.raises(BrokenError):
        explain(method, model, eight, 4)
    assert configuration(model) == before
    hook.remove()
    assert_rows_close(explain(method, model, eight, 4), one_by_one(method, model, eight, 4), 1e-4)


EMPTY = torch.zeros(0, dtype=torch.long)
REFUSED: dict[str, tuple[Any, Any, str]] = {
    "empty prompt": (EMPTY, "w3", "no token"),
    "empty answer": (PROMPT, "", "no token"),
    "empty ids of an answer": (PROMPT, EMPTY[None], "no token"),
    "nothing to generate from": (EMPTY, None, "empty"),
    "batch of prompts": (torch.ones(2, 3, dtype=torch.long), "w3", "batch of 2"),
    "batch of answers": (PROMPT, torch.ones(2, 3, dtype=torch.long), "batch of 2"),
    "prompt out of range": (torch.tensor([5, VOCABULARY]), "w3", "0 to 22"),
    "prompt out of range to generate from": (torch.tensor([5, VOCABULARY]), None, "0 to 22"),
    "answer out of range": (PROMPT, torch.tensor([VOCABULARY]), "0 to 22"),
    "negative id": (PROMPT, torch.tensor([-1]), "-1"),
    "embeddings": (torch.ones(1, 3), "w3", "token ids"),
    "embeddings of a text": (torch.ones(1, 3, 8), "w3", "token ids"),
    "three dimensions": (torch.ones(1, 3, 8, dtype=torch.long), "w3", "token ids"),
    "list": ([1, 5, 7], "w3", "not list"),
    "number as answer": (PROMPT, 3, "not int"),
}


@pytest.mark.parametrize(("prompt", "answer", "message"), REFUSED.values(), ids=REFUSED)
def test_what_is_no_text_is_refused(
    prompt: Any, answer: Any, message: str, words: PreTrainedTokenizerFast, unchanged: Any
) -> None:
    model = borrowed("mamba")
    before = configuration(model)
    with unchanged(model), pytest.raises(InvalidInputError, match=message):
        LLMImplicitAttention(signed(model), words).attribute(prompt, target=answer)
    assert configuration(model) == before


@pytest.mark.parametrize("start", [-1, 0, 8, 9])
def test_a_token_with_none_before_it_or_none_there_is_refused(start: int, eight: Tensor) -> None:
    with pytest.raises(InvalidInputError, match="must be 1 to 7"):
        explain(signed, borrowed("mamba"), eight, start)


@pytest.mark.parametrize("answer", [ANSWER, None], ids=["given", "generated"])
def test_a_model_in_training_mode_is_refused(answer: Any, words: PreTrainedTokenizerFast, unchanged: Any) -> None:
    model = build("mamba").train()
    runs: list[int] = []
    model.lm_head.register_forward_hook(lambda *_: runs.append(1))
    with unchanged(model), pytest.raises(ModelStateError, match="eval"):
        LLMImplicitAttention(signed(model), words).attribute(PROMPT, target=answer)
    assert not runs


@every_method
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_probability_that_is_no_number_is_refused(method: Any, value: float, eight: Tensor, unchanged: Any) -> None:
    model = borrowed("mamba")
    with torch.no_grad():
        model.lm_head.weight[int(eight[0, 5])] = value
    with unchanged(model, eight), pytest.raises(ModelStateError, match="NaN or infinite"):
        explain(method, model, eight, 4)


@pytest.mark.parametrize("layer", [0, 1])
def test_the_first_layer_whose_output_is_not_finite_is_named(layer: int, eight: Tensor, unchanged: Any) -> None:
    model = borrowed("mamba")
    with torch.no_grad():
        model.backbone.layers[layer].mixer.out_proj.weight[0, 0] = float("nan")
    named = rf"The output of layer 'backbone\.layers\.{layer}\.mixer' has NaN"
    with unchanged(model, eight), pytest.raises(ModelStateError, match=named):
        explain(signed, model, eight, 4)


def test_a_method_that_explains_no_language_model_is_refused(words: PreTrainedTokenizerFast) -> None:
    model = borrowed("mamba")
    headless = perturbed(MambaModel(MambaConfig(**{**COMMON, **S6})))
    of_callable = signed(lambda ids: model(input_ids=ids).logits[:, -1], model=model)
    for method in (of_callable, signed(headless)):
        with pytest.raises(InvalidInputError, match="language model as it is"):
            LLMImplicitAttention(method, words)
    embeddings = model.get_input_embeddings()
    others: tuple[Any, ...] = (
        Saliency(model),
        LayerIntegratedGradients(model, embeddings),
        LayerImplicitAttention(model, 0),
        LayerImplicitAttentionAttribution(model, embeddings),
    )
    for method in others:
        with pytest.raises(InvalidInputError, match=f"not by {type(method).__name__}"):
            LLMImplicitAttention(method, words)
