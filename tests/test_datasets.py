"""Rows explained from columns to columns: each as by itself, its error its own, in any library's loop."""

import json
import pickle
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import AutoModelForCausalLM, AutoTokenizer, JambaForSequenceClassification

from captum_ssm import (
    ImplicitAttentionAttribution,
    ImplicitAttentionRelevance,
    ImplicitAttentionRollout,
    InvalidInputError,
    LayerImplicitAttentionRelevance,
    ModelStateError,
    RawImplicitAttention,
    UnsupportedModelError,
    cli,
)
from captum_ssm.datasets import Explain, Source
from captum_ssm.datasets.batches import batches
from captum_ssm.datasets.forward import LastToken
from captum_ssm.datasets.loading import described, loaded, weights_digest
from captum_ssm.datasets.padding import measured_padding, padded
from captum_ssm.datasets.report import cause
from captum_ssm.datasets.tally import Tally
from captum_ssm.datasets.words import words_of
from captum_ssm.models import REVIEWS
from captum_ssm.network.forward import run_model
from tests.conftest import SEVERAL, build
from tests.families import FAMILIES, perturbed

TEXTS = [
    "A gorgeous, witty film.",
    "a complete waste of time",
    "fun",
    "the plot is thin, yet the cast is superb and sly",
]
ANSWERS = ("negative", "positive")


@pytest.fixture(scope="module")
def shipped() -> tuple[Any, Any]:
    return AutoModelForCausalLM.from_pretrained(REVIEWS).eval(), AutoTokenizer.from_pretrained(REVIEWS)


def log_probabilities(model: Any) -> Any:
    return lambda ids: model(ids).logits[:, -1].log_softmax(-1)


# --- Each row as by itself ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["relevance", "attribution", "rollout", "raw"])
def test_rows_of_a_batch_are_explained_as_by_themselves(shipped: tuple[Any, Any], method: str) -> None:
    model, tokenizer = shipped
    rows = Explain(model, tokenizer, method)({"text": TEXTS})
    forward = log_probabilities(model)
    for k, text in enumerate(TEXTS):
        ids = tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            answers = forward(ids)[0]
        target = int(answers.argmax())
        options: dict[str, Any] = {}
        make: dict[str, Any] = {
            "relevance": ImplicitAttentionRelevance,
            "attribution": partial(ImplicitAttentionAttribution, rectify=None),
            "rollout": ImplicitAttentionRollout,
            "raw": RawImplicitAttention,
        }
        if method == "relevance":
            baseline = torch.full_like(ids, tokenizer.unk_token_id)
            baseline[0, -1] = ids[0, -1]  # the token that the tokenizer added stays
            options = {"baselines": baseline}
            with torch.no_grad():
                reference = float(forward(baseline)[0, target])
            assert rows["reference_value"][k] == pytest.approx(reference, abs=1e-5)
            assert rows["completeness"][k] < 1e-4
            assert sum(rows["scores"][k]) == pytest.approx(float(answers[target]) - reference, abs=1e-4)
        expected = make[method](forward, model).attribute(ids, target, **options)[0]
        np.testing.assert_allclose(rows["scores"][k], expected.numpy(), atol=1e-5, rtol=1e-3)
        assert rows["ids"][k].tolist() == ids[0].tolist() and rows["error"][k] == ""
        assert rows["tokens"][k] == tokenizer.convert_ids_to_tokens(ids[0].tolist())
        assert rows["target"][k] == rows["prediction"][k] == target
        assert rows["target_name"][k] == tokenizer.decode([target]).strip()
        assert rows["value"][k] == pytest.approx(float(answers[target]), abs=1e-5)
        assert rows["probability"][k] == pytest.approx(float(answers.exp().max()), abs=1e-5)
        assert 0 <= rows["fidelity"][k] < 1e-5
        words = [text[start:end] for start, end in zip(rows["starts"][k], rows["ends"][k]) if start < end]
        assert "".join(words) == text.replace(" ", "")


@pytest.mark.parametrize("family", [*SEVERAL, "xlstm", "lfm2"])
def test_families_are_padded_where_it_changes_nothing(family: str) -> None:
    """Rows of ids of several lengths, in one batch and alone."""
    model = build(family)
    assert measured_padding(model, 0) != "alone"
    rows = [[3, 1, 4, 1, 5, 9, 2], [2, 7, 1], [8, 2, 8, 1, 8]]
    found = Explain(model, reference=1, score="logit", target=3)({"text": rows})
    for k, ids in enumerate(rows):
        method = ImplicitAttentionRelevance(model)
        expected = method.attribute(torch.tensor([ids]), 3, baselines=1)[0].numpy()
        np.testing.assert_allclose(found["scores"][k], expected, atol=2e-4 * np.abs(expected).max(), rtol=1e-3)
        assert found["error"][k] == ""


class Mean(nn.Module):
    """A model with the interface of transformers that reads the mean of all tokens, padding included, or not."""

    def __init__(self, heeds_mask: bool) -> None:
        super().__init__()
        self.embedding, self.head, self.heeds_mask = nn.Embedding(11, 4), nn.Linear(4, 5), heeds_mask

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, input_ids: Any = None, inputs_embeds: Any = None, attention_mask: Any = None, **_: Any) -> Any:
        x = self.embedding(input_ids) if inputs_embeds is None else inputs_embeds
        weights = torch.ones(x.shape[:2]) if attention_mask is None or not self.heeds_mask else attention_mask
        return (self.head((x * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)),)


@pytest.mark.parametrize("heeds_mask", [True, False])
def test_a_model_that_reads_padding_gets_none(heeds_mask: bool) -> None:
    model = Mean(heeds_mask).eval()
    assert measured_padding(model, 0) == ("right" if heeds_mask else "none")
    rows = [[3, 1, 4], [2, 7], [8, 2, 8]]
    found = Explain(model, reference=1, score="logit", target=3)({"text": rows})
    for k, ids in enumerate(rows):
        expected = ImplicitAttentionRelevance(model).attribute(torch.tensor([ids]), 3, baselines=1)[0].numpy()
        np.testing.assert_allclose(found["scores"][k], expected, atol=1e-6)


def test_a_classifier_without_a_padding_token_takes_each_text_alone() -> None:
    config = FAMILIES["jamba"].build().config
    config.num_labels, config.pad_token_id = 3, 0
    model = perturbed(JambaForSequenceClassification(config)).eval()
    texts = {"text": [[3, 1, 4], [2, 7], [5, 6]]}
    padded_rows = Explain(model, reference=1)(texts)
    assert measured_padding(model, 0) == "right" and padded_rows["target_name"][0].startswith("LABEL_")
    model.config.pad_token_id = None
    assert measured_padding(model, 0) == "alone"
    rows = Explain(model, reference=1)(texts)
    assert rows["error"] == padded_rows["error"] == [""] * 3
    for one, other in zip(rows["scores"], padded_rows["scores"]):
        np.testing.assert_allclose(one, other, atol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_has_a_side(side: Any) -> None:
    ids, mask = padded([[5, 6], [7]], 0, side, torch.device("cpu"))
    assert ids.tolist() == ([[5, 6], [0, 7]] if side == "left" else [[5, 6], [7, 0]])
    assert mask.tolist() == (ids != 0).long().tolist()
    model = build("mamba")
    both = [Explain(model, reference=1, padding=p)({"text": [[3, 1, 4], [2, 7]]})["scores"] for p in (side, "none")]
    for one, other in zip(*both):
        np.testing.assert_allclose(one, other, atol=1e-5)


def test_batches_are_all_rows_once_and_a_function_of_the_rows_alone() -> None:
    generator = torch.Generator().manual_seed(0)
    keys = [("ab"[int(k % 2)], int(k)) for k in torch.randint(1, 30, (200,), generator=generator)]
    found = batches(keys, tokens=60, rows=5)
    assert sorted(row for batch in found for row in batch) == list(range(200))
    for batch in found:
        assert len({keys[row][0] for row in batch}) == 1 and len(batch) <= 5
        assert len(batch) == 1 or len(batch) * max(keys[row][1] for row in batch) <= 60
    assert found == batches(list(keys), tokens=60, rows=5) and batches([]) == []


def test_the_output_layer_runs_on_the_last_token_alone(shipped: tuple[Any, Any]) -> None:
    model, _ = shipped
    last, seen = LastToken(model), []
    ids, mask = (
        torch.tensor([[5, 6, 7, 8], [5, 6, 7, 8], [9, 10, 0, 0]]),
        torch.tensor([[1] * 4, [1] * 4, [1, 1, 0, 0]]),
    )
    expected = run_model(model, ids, mask)
    handle = model.get_output_embeddings().register_forward_hook(lambda _, args, out: seen.append(tuple(out.shape)))
    with torch.no_grad():
        torch.testing.assert_close(last(ids, mask), expected, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(last(ids, mask), expected, atol=1e-5, rtol=1e-4)
    handle.remove()
    assert seen == [(2, 1, 10000), (3, 1, 10000)]  # without gradients equal texts run once
    assert last.agrees(ids[:1]) and not LastToken(Mean(True)).agrees(ids[:1])


# --- Questions ------------------------------------------------------------------------------------------------------


def test_the_outcome_is_named_for_all_rows_or_for_each(shipped: tuple[Any, Any]) -> None:
    model, tokenizer = shipped
    negative, positive = tokenizer.convert_tokens_to_ids(list(ANSWERS))
    columns = {"text": TEXTS, "wanted": ["positive", str(negative), None, ""]}
    rows = Explain(model, tokenizer, target_column="wanted", classes=ANSWERS)(columns)
    assert rows["target"][:2] == [positive, negative] and rows["target"][2:] == rows["prediction"][2:]
    assert set(rows["prediction"]) <= {negative, positive} and rows["contrast"] == [-1] * 4
    against = Explain(model, tokenizer, target="positive", contrast=negative)({"text": TEXTS})
    runner_up = Explain(model, tokenizer, target=positive, classes=ANSWERS, contrast="runner-up")({"text": TEXTS})
    for name in ("scores", "value", "target_name", "contrast_name"):
        for one, other in zip(against[name], runner_up[name]):
            assert np.array_equal(one, other)
    with torch.no_grad():
        logits = model(tokenizer(TEXTS[0], return_tensors="pt").input_ids).logits[0, -1]
    assert against["value"][0] == pytest.approx(float(logits[positive] - logits[negative]), abs=1e-4)
    assert runner_up["probability"][0] == pytest.approx(float(logits[[negative, positive]].softmax(0).max()), abs=1e-5)


def test_a_row_that_asks_for_no_outcome_of_the_model_has_an_error(shipped: tuple[Any, Any]) -> None:
    asked = ["positive", "not-a-word", "99999", "negative"]
    columns = {"text": TEXTS, "wanted": asked, "other": ["negative", None, None, "negative"]}
    rows = Explain(*shipped, target_column="wanted", contrast_column="other")(columns)
    assert rows["error"][0] == "" and len(rows["scores"][0]) == 7
    assert "'not-a-word' is not one token" in rows["error"][1] and "target 99999 is out of range" in rows["error"][2]
    assert "the contrast is the target itself, 'negative'" in rows["error"][3]
    alone = Explain(*shipped, target="positive", contrast="negative")({"text": TEXTS[:1]})
    np.testing.assert_allclose(rows["scores"][0], alone["scores"][0], atol=1e-6)


# --- Errors ---------------------------------------------------------------------------------------------------------


def test_a_row_that_cannot_be_explained_has_its_error_and_no_other_row_does(shipped: tuple[Any, Any]) -> None:
    bad: list[Any] = ["", " \n", None, 3, [], [1, 99999], [-1], [1, "x"], "word " * 600, "\ud800", {"a": 1}]
    rows = Explain(*shipped)({"text": [TEXTS[0], *bad, TEXTS[1], [5, 6, 7]]})
    alone = Explain(*shipped)({"text": [TEXTS[0], TEXTS[1], [5, 6, 7]]})
    good = [0, len(bad) + 1, len(bad) + 2]
    for k, same in zip(good, range(3)):
        assert rows["error"][k] == "" and np.array_equal(rows["scores"][k], alone["scores"][same])
    errors = rows["error"][1:-2]
    for error, words in zip(
        errors,
        ["is empty", "is empty", "no value", "a int", "ids is empty", "lie in 0 to 9999", "lie in", "a list",
         "601 tokens, more than the 512", "Unicode", "a dict"],
    ):  # fmt: skip
        assert words in error, error
    for name in ("value", "completeness", "fidelity", "probability"):
        assert all(np.isnan(rows[name][k]) for k in range(1, len(bad) + 1))
    assert rows["target"][1:-2] == [-1] * len(bad) and rows["target_name"][1] == ""
    assert len(rows["ids"][9]) == 0


def test_longer_texts_are_cut_if_asked_for(shipped: tuple[Any, Any]) -> None:
    rows = Explain(*shipped, max_tokens=4, truncate=True)({"text": TEXTS})
    assert [len(ids) for ids in rows["ids"]] == [4, 4, 2, 4] and rows["error"] == [""] * 4
    assert {tokens[-1] for tokens in rows["tokens"]} == {"<sentiment>"}  # where the answer is read


def test_a_batch_that_fails_is_explained_in_halves(shipped: tuple[Any, Any]) -> None:
    """The row whose token the model's own code chokes on gets the error; the model is as it was."""
    model, tokenizer = shipped

    def choke(module: nn.Module, args: Any) -> None:
        if isinstance(args[0], Tensor) and bool((args[0] == tokenizer.convert_tokens_to_ids("waste")).any()):
            raise RuntimeError("this token\nI do not like")

    handle = model.get_input_embeddings().register_forward_pre_hook(choke)
    try:
        rows = Explain(model, tokenizer)({"text": [*TEXTS, *TEXTS]})
    finally:
        handle.remove()
    assert rows["error"] == ["", "RuntimeError: this token I do not like", "", ""] * 2
    assert [len(scores) for scores in rows["scores"][:4]] == [7, 0, 2, 13]


def test_errors_of_all_rows_are_raised(shipped: tuple[Any, Any], mamba: Any) -> None:
    explain = Explain(*shipped, column="review")
    with pytest.raises(InvalidInputError, match="no column 'review'; the rows have 'text'"):
        explain({"text": TEXTS})
    with pytest.raises(InvalidInputError, match="different lengths"):
        explain({"text": TEXTS, "review": TEXTS[:2]})
    with pytest.raises(InvalidInputError, match="list of rows"):
        explain("text")
    with pytest.raises(ModelStateError, match="training mode"):
        Explain(mamba.train())({"text": [[1, 2]]})
    with pytest.raises(UnsupportedModelError):
        Explain(Mean(True).eval(), method="rollout")({"text": [[1, 2]]})
    with pytest.raises(InvalidInputError, match="takes no tokens; pass prepare="):
        Explain(nn.Linear(2, 2).eval())({"text": [[1, 2]]})


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"method": "magic"}, "no method 'magic'"),
        ({"score": "odds"}, "score must be"),
        ({"target": 1, "target_column": "a"}, "leave one of them out"),
        ({"batch_tokens": 0}, "batch_tokens must be a number"),
        ({"threads": True}, "threads must be a number"),
        ({"padding": "top"}, "padding must be"),
        ({"forward": max}, "pass prepare="),
    ],
)
def test_bad_settings_are_refused_at_once(options: dict[str, Any], words: str) -> None:
    with pytest.raises(InvalidInputError, match=words):
        Explain(REVIEWS, **options)


def test_a_model_that_cannot_be_loaded_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInputError, match="cannot load a model from"):
        Explain(tmp_path / "nowhere")({"text": ["a"]})
    with pytest.raises(InvalidInputError, match="model must be a module, a folder"):
        Explain(3)({"text": ["a"]})  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="layers= takes the shares of a relevance"):
        Explain(REVIEWS, method="rollout", layers=True)({"text": ["a"]})


# --- Any library's loop ---------------------------------------------------------------------------------------------

LOADS: list[str] = []


def load(name: str) -> Any:
    LOADS.append(name)
    return AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)


def test_it_is_pickled_without_the_model_which_is_loaded_once(shipped: tuple[Any, Any]) -> None:
    LOADS.clear()
    explain = Explain(partial(load, str(REVIEWS)))
    data = pickle.dumps(explain)
    assert not LOADS and len(data) < 10_000
    rows = [pickle.loads(data)({"text": TEXTS}) for _ in range(2)]
    rows += [pickle.loads(pickle.dumps(explain))({"text": TEXTS}), Explain(REVIEWS)({"text": TEXTS})]
    assert [str(REVIEWS)] == LOADS
    carried = pickle.loads(pickle.dumps(Explain(*shipped)))({"text": TEXTS})
    for other in [*rows[1:], carried]:
        assert all(np.array_equal(a, b) for a, b in zip(rows[0]["scores"], other["scores"]))
    assert loaded(str(REVIEWS), None, None)[0] is loaded(REVIEWS, None, None)[0]


def test_columns_come_as_lists_arrays_tensors_or_rows(shipped: tuple[Any, Any]) -> None:
    explain = Explain(*shipped)
    expected = explain({"text": TEXTS, "label": [0, 1, 0, 1]})
    rows = [{"text": text, "label": k % 2} for k, text in enumerate(TEXTS)]
    loader: Any = DataLoader(rows, batch_size=4)  # type: ignore[arg-type]
    as_rows: Any = DataLoader(rows, batch_size=4, collate_fn=list)  # type: ignore[arg-type]
    for columns in (
        {"text": np.array(TEXTS, dtype=object), "label": torch.tensor([0, 1, 0, 1])},
        rows,
        *loader,
        *as_rows,
    ):
        found = explain(columns)
        assert all(np.array_equal(a, b) for a, b in zip(expected["scores"], found["scores"]))
        assert list(found["label"]) == [0, 1, 0, 1] and list(found["text"]) == TEXTS


def test_an_input_column_keeps_its_values_under_another_name(shipped: tuple[Any, Any]) -> None:
    rows = Explain(*shipped, target_column="target")({"text": TEXTS, "target": ["positive"] * 4, "error": [1, 2, 3, 4]})
    assert rows["input_target"] == ["positive"] * 4 and rows["target_name"] == ["positive"] * 4
    assert rows["input_error"] == [1, 2, 3, 4] and rows["error"] == [""] * 4
    with pytest.raises(InvalidInputError, match="would be kept as 'input_error'"):
        Explain(*shipped)({"text": TEXTS, "error": [1] * 4, "input_error": [1] * 4})


def test_the_model_the_threads_and_the_modes_are_as_before(shipped: tuple[Any, Any], unchanged: Any) -> None:
    model, tokenizer = shipped
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with unchanged(model), torch.inference_mode():
            Explain(model, tokenizer, layers=True)({"text": [*TEXTS, ""]})
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
    counts: list[int] = []
    Explain(model, tokenizer)({"text": [*TEXTS, ""]}, on_rows=counts.append)
    assert sum(counts) == 5


# --- Layers ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", ["relevance", partial(ImplicitAttentionRelevance, gate_rule="value")])
def test_the_parts_of_the_layers_are_the_relevance_at_their_inputs(shipped: tuple[Any, Any], method: Any) -> None:
    model, tokenizer = shipped
    reference = None if method == "relevance" else "none"
    rows = Explain(model, tokenizer, method, target="positive", reference=reference, layers=True)({"text": TEXTS})
    options = {} if method == "relevance" else {"gate_rule": "value"}
    ids = tokenizer(TEXTS[0], return_tensors="pt").input_ids
    baseline = torch.full_like(ids, tokenizer.unk_token_id)
    baseline[0, -1] = ids[0, -1]
    for layer in range(3):
        name = f"backbone.layers.{layer}.mixer"
        inner = LayerImplicitAttentionRelevance(log_probabilities(model), name, model, **options)
        target = tokenizer.convert_tokens_to_ids("positive")
        part = inner.attribute(ids, target, baselines=None if reference else baseline).sum()
        assert rows["layers"][0][layer] == pytest.approx(float(part), abs=1e-4)


# --- Images, series, several inputs ---------------------------------------------------------------------------------


class Series(nn.Module):
    """A forecast, and a class, from a series (B, L, 3)."""

    def __init__(self) -> None:
        super().__init__()
        self.lstm, self.head = nn.LSTM(3, 5, batch_first=True), nn.Linear(5, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.lstm(x)[0][:, -1])


def series_of(row: Mapping[str, Any]) -> Tensor:
    return torch.tensor(row["values"], dtype=torch.float32).view(-1, 3)


def first_two(row: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
    x = series_of(row)
    return x, x[0]


def with_features(model: nn.Module, x: Tensor, features: Tensor) -> Tensor:
    return model(x)[:, 0] * features.sum(1)


def test_series_of_several_lengths_are_explained_without_padding() -> None:
    model = Series().eval()
    values = [torch.randn(k, 3).flatten().tolist() for k in (4, 6, 4, 6)]
    columns = {"values": [values[0], values[1], [1.0], values[2], values[3], [float("nan")] * 3, None]}
    rows = Explain(model, prepare=series_of, reference=0.0, contrast="runner-up")(columns)
    assert [bool(error) for error in rows["error"]] == [False, False, True, False, False, True, True]
    assert "RuntimeError: shape" in rows["error"][2] and "NaN" in rows["error"][5]
    for k, value in zip((0, 1, 3, 4), values):
        x = torch.tensor(value).view(1, -1, 3)
        best, second = model(x)[0].topk(2).indices.tolist()
        assert (rows["target"][k], rows["contrast"][k]) == (best, second) and rows["target_name"][k] == str(best)
        expected = ImplicitAttentionRelevance(model).attribute(x, best, baselines=0.0, contrast=second)[0]
        np.testing.assert_allclose(rows["scores"][k].reshape(-1, 3), expected.numpy(), atol=1e-6)
        assert rows["shapes"][k] == f"{len(value) // 3}×3"
        output = model(x)[0]
        assert rows["value"][k] == pytest.approx(float(output[best] - output[second]), abs=1e-6)
        assert rows["completeness"][k] < 1e-5


def test_several_inputs_and_one_number_for_each_row() -> None:
    model = Series().eval()
    rows = Explain(model, prepare=first_two, forward=with_features, reference=(0.0, 0.0))({"values": [list(range(6))]})
    x = torch.arange(6.0).view(1, 2, 3)
    method = ImplicitAttentionRelevance(lambda x, y: with_features(model, x, y))
    first, second = method.attribute((x, x[:, 0]), baselines=(0.0, 0.0))
    np.testing.assert_allclose(rows["scores"][0], torch.cat([first.flatten(), second.flatten()]).numpy(), atol=1e-6)
    assert rows["shapes"] == ["2×3 3"] and rows["target"] == [-1] and np.isnan(rows["probability"][0])
    assert rows["value"][0] == pytest.approx(float(with_features(model, x, x[:, 0])), abs=1e-6)
    refused = Explain(model, prepare=first_two, forward=with_features, reference=0.0, target=1)({"values": [[0.0] * 3]})
    assert "there is no target to choose" in refused["error"][0]


def image_of(row: Mapping[str, Any]) -> Tensor:
    return torch.tensor(np.asarray(row["image"]), dtype=torch.float32)


def test_images_are_explained_by_pixel() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU(), nn.Flatten(), nn.Linear(2 * 4 * 4, 3)).eval()
    images = torch.rand(3, 1, 6, 6)
    rows = Explain(model, prepare=image_of, reference=0.0)({"image": images})
    expected = ImplicitAttentionRelevance(model).attribute(images, model(images).argmax(1), baselines=0.0)
    for k in range(3):
        np.testing.assert_allclose(rows["scores"][k].reshape(1, 6, 6), expected[k].numpy(), atol=1e-6)
    assert rows["shapes"] == ["1×6×6"] * 3


# --- Files ----------------------------------------------------------------------------------------------------------


def read(source: Source) -> tuple[list[Any], list[str]]:
    found = list(source.blocks())
    assert [block.number for block in found] == list(range(len(found)))
    assert [block.start for block in found] == [sum(len(b.rows) for b in found[:k]) for k in range(len(found))]
    rows = [row for block in found for row in block.rows]
    return rows, [block.errors.get(k, "") for block in found for k in range(len(block.rows))]


def test_each_line_of_a_text_file_is_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone\r\ntwo \xff\n\nthr\xe2\x80\xa8ee")
    rows, errors = read(Source(str(path), block_rows=3))
    assert [row["text"] for row in rows] == ["one", "two \ufffd", "", "thr\u2028ee"]
    assert [bool(error) for error in errors] == [False, True, False, False] and "UTF-8" in errors[1]
    assert Source(str(path)).count() == 4


def test_each_line_of_json_is_a_row(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    lines = [{"text": "a", "n": 1}, {"text": None}, {"n": 2}, {"text": "b\n", "deep": {"x": [1]}}]
    path.write_text("\n".join(map(json.dumps, lines)) + '\n{"text": \n[1]\n\n' + "[" * 100_000 + "\n")
    rows, errors = read(Source(str(path), columns=("text",), block_rows=2))
    assert rows[:4] == lines and errors[:4] == [""] * 4
    assert "no JSON" in errors[4] and "a list, not an object" in errors[5] and "empty" in errors[6] and errors[7]
    with pytest.raises(InvalidInputError, match="no column 'words'; the rows have 'text', 'n'"):
        read(Source(str(path), columns=("words",)))


def test_a_csv_file_has_a_head(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_bytes('text,n\n"a, ""b""\nc",1\nd\n\ne,2,3\nü,4\n'.encode() + b"\xff,5\n")
    rows, errors = read(Source(str(path), columns=("text",), block_rows=4))
    assert rows[0] == {"text": 'a, "b"\nc', "n": "1"} and rows[4] == {"text": "ü", "n": "4"}
    assert [bool(error) for error in errors] == [False, True, True, True, False, True]
    assert "1 fields, and the head 2" in errors[1]


def test_blocks_are_the_same_in_each_reading_and_known_by_their_rows(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    path.write_text("\n".join(map(str, range(10))))
    first, second = ([block.digest() for block in Source(str(path), block_rows=4).blocks()] for _ in range(2))
    assert first == second and len(set(first)) == 3
    path.write_text("\n".join(map(str, [*range(9), 8])))
    third = [block.digest() for block in Source(str(path), block_rows=4).blocks()]
    assert third[:2] == first[:2] and third[2] != first[2]


@pytest.mark.parametrize(
    ("name", "content", "words"),
    [
        ("a.txt", None, "cannot read .*a.txt"),
        ("a.txt", "", "has no rows"),
        ("a.doc", "x", "form of .*a.doc' is not known"),
        ("a.jsonl", "x\ny\n", "no row of .* can be read as jsonl: InvalidInputError: the line is no JSON"),
        ("a.csv", "a,b\n1\n", "no row of .* can be read as csv"),
    ],
)
def test_a_file_that_cannot_be_read_is_refused(tmp_path: Path, name: str, content: str | None, words: str) -> None:
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(InvalidInputError, match=words):
        list(Source(str(tmp_path / name)).blocks())


# --- Words, numbers -------------------------------------------------------------------------------------------------


def test_pieces_of_one_word_are_joined() -> None:
    text = "Unfilmable, don't!"
    row = {
        "tokens": ["un", "##film", "##able", ",", "don't", "!", "<end>"],
        "starts": [0, 2, 6, 10, 12, 17, 0],
        "ends": [2, 6, 10, 11, 17, 18, 0],
        "scores": [1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0],
    }
    words = list(words_of(row, text))
    assert [(w.text, w.score) for w in words] == [("unfilmable", 7), (",", 8), ("don't", 16), ("!", 32)]
    assert words[0].position == 0 and words[-1].position == 5 / 6
    of_ids = list(words_of({**row, "starts": [], "ends": []}, None))
    assert [w.text for w in of_ids] == row["tokens"]


def test_a_tally_is_the_mean_and_its_error() -> None:
    numbers = torch.randn(50, dtype=torch.float64) + 1e6
    tally = Tally()
    for number in numbers.tolist():
        tally.add(number)
    assert tally.count == 50 and tally.mean == pytest.approx(float(numbers.mean()), rel=1e-14)
    assert tally.error == pytest.approx(float(numbers.std() / 50**0.5), rel=1e-6)
    assert np.isnan(Tally().error)


def test_models_and_settings_are_told_apart() -> None:
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    other.load_state_dict(one.state_dict())
    assert weights_digest(one) == weights_digest(other)
    with torch.no_grad():
        other.weight[1, 1] = torch.nextafter(other.weight[1, 1], torch.tensor(9.0))
    assert weights_digest(one) != weights_digest(other) != weights_digest(one.double())
    settings = [
        Explain(REVIEWS),
        Explain(REVIEWS, method="raw"),
        Explain(REVIEWS, method=partial(ImplicitAttentionRelevance, gate_rule="value")),
        Explain(REVIEWS, reference="pad"),
        Explain(REVIEWS, classes=("a",)),
    ]
    texts = [json.dumps(explain.settings()) for explain in settings]
    assert len(set(texts)) == 5 and texts[0] == json.dumps(pickle.loads(pickle.dumps(settings[0])).settings())
    assert described(torch.ones(2)) != described(torch.zeros(2))


def test_errors_of_one_cause_are_counted_together() -> None:
    one, other = (f"InvalidInputError: column 'a{k}' has {k}.5 of -{k} and 1e-{k}0" for k in (1, 2))
    assert one != other and cause(one) == cause(other)


# --- The command line -----------------------------------------------------------------------------------------------


def test_a_single_text_as_json(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", __import__("io").StringIO(TEXTS[0]))
    assert cli.main(["explain", "-", "--json", "--target", "positive"]) == 0
    row = json.loads(capsys.readouterr().out)
    expected = Explain(REVIEWS, target="positive")({"text": TEXTS[:1]})
    assert row["scores"] == pytest.approx(expected["scores"][0].tolist()) and row["text"] == TEXTS[0]
    assert row["tokens"] == expected["tokens"][0] and row["contrast"] == -1 and row["error"] == ""
    assert cli.main(["explain", TEXTS[0], "--json", "--method", "rollout"]) == 0
    assert json.loads(capsys.readouterr().out)["completeness"] is None
    for arguments, words in (
        (["", "--json"], "the text is empty"),
        (["a", "--json", "--generate", "2"], "leave --generate out"),
        (["a", "--json", "--target", "nope-nope"], "is not one token"),
    ):
        assert cli.main(["explain", *arguments]) == 2
        assert words in capsys.readouterr().err
