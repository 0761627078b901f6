"""The command line explains a text with the shipped model, and says what to do when it cannot."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    JambaForSequenceClassification,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedTokenizerFast,
)

import captum_ssm.cli.loading
from captum_ssm import ImplicitAttentionAttribution, ImplicitAttentionRelevance, cli, register_rule, unregister_rule
from captum_ssm.cli.methods import METHODS
from captum_ssm.models import REVIEWS
from tests.families import FAMILIES, S6, perturbed

GOOD, BAD = "A gorgeous, witty, seductive movie.", "A complete waste of time."


class Shown:
    """What one call of the command line printed, with the lines' breaks undone."""

    def __init__(self, status: int, out: str, err: str) -> None:
        self.status, self.out, self.err = status, out, err
        self.flat = " ".join(out.split())

    def fact(self, name: str) -> str:
        """The value printed beside a name."""
        found = re.search(rf"^{name} +(.*\S) *$", self.out, re.MULTILINE)
        assert found, f"{name} not in: {self.out}"
        return found.group(1)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("COLUMNS", "200")

    def call(*arguments: str) -> Shown:
        capsys.readouterr()
        try:
            status = cli.main(["explain", *map(str, arguments)])
        except SystemExit as stop:  # argparse's own errors
            status = int(stop.code or 0)
        done = capsys.readouterr()
        return Shown(status, done.out, done.err)

    return call


class Text(HTMLParser):
    """The text of the page's coloured paragraph, and the names of all tags."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.text, self.tags, self.inside = "", set[str](), False
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.tags.add(tag)
        self.inside = self.inside or (tag == "p" and ("class", "text") in attrs)

    def handle_endtag(self, tag: str) -> None:
        self.inside = self.inside and tag != "p"

    def handle_data(self, data: str) -> None:
        self.text += data if self.inside else ""


# --- Contrast and generation --------------------------------------------------------------------------------------


def test_a_contrast_explains_one_word_against_another(run: Any) -> None:
    shown = run(GOOD, "--contrast", "negative", "--method", "attribution")
    assert shown.status == 0 and "Why 'positive' and not 'negative'?" in shown.out
    assert shown.fact("explained") == "log-probability of 'positive' less that of 'negative'"
    model, tokenizer = AutoModelForCausalLM.from_pretrained(REVIEWS), AutoTokenizer.from_pretrained(REVIEWS)
    ids = tokenizer(GOOD, return_tensors="pt").input_ids
    target, contrast = tokenizer.convert_tokens_to_ids(["positive", "negative"])
    direction = torch.zeros(model.config.vocab_size)
    direction[target], direction[contrast] = 1, -1
    difference = ImplicitAttentionAttribution(lambda ids: model(ids).logits[:, -1] @ direction, model, rectify=None)
    expected = float(difference.attribute(ids)[0, -1])
    assert shown.fact("not shown").endswith(f"<sentiment> {expected:+.2g}")
    assert shown.fact("not shown") != run(GOOD, "--method", "attribution").fact("not shown")


def test_a_contrast_that_is_no_other_word_is_refused(run: Any) -> None:
    assert_refused(run(GOOD, "--contrast", "positive"), "the contrast is the target itself, 'positive'")
    assert_refused(run(GOOD, "--contrast", "not-a-word"), "'not-a-word' is not one token")


@pytest.mark.parametrize("method", ["attribution", "rollout", "raw"])
def test_a_generation_is_explained_token_by_token(run: Any, tmp_path: Path, method: str) -> None:
    page, picture = tmp_path / "page.html", tmp_path / "picture.png"
    shown = run("A gorgeous movie. It is", "--generate", 4, "--method", method, "--html", page, "--png", picture)
    assert shown.status == 0 and not shown.err
    rows = re.findall(r"^  (\S+) +(\S+ [+-][\d.e-]+(?:, \S+ [+-][\d.e-]+)*)$", shown.out, re.MULTILINE)
    assert len(rows) == 4
    written = re.search(r"^written +(.+)$", shown.out, re.MULTILINE)
    assert written and f"Where {written.group(1).strip()!r} comes from" in shown.out
    assert [row[0] for row in rows] == re.findall(r"\w+|[^\w\s]", written.group(1))
    assert "log-probability of each of 4 tokens" in shown.flat and "largest relative error over" in shown.flat
    whole = Text(page.read_text(encoding="utf-8")).text
    assert whole.startswith("A gorgeous movie. It is ") and whole.endswith(written.group(1).strip().split()[-1])
    assert picture.read_bytes().startswith(b"\x89PNG")


def test_a_generation_is_explained_by_an_attribution_if_no_method_is_asked_for(run: Any) -> None:
    shown = run(GOOD, "--generate", 2, "--rectify", "token")
    assert shown.status == 0 and "ImplicitAttentionAttribution: rectify token, unified attention" in shown.flat


@pytest.mark.parametrize("reference", ["unk", "none"])
def test_a_generation_is_explained_by_relevance(run: Any, reference: str) -> None:
    """Each written token's strongest scores are those of its own relevance, which sum to its log-probability."""
    text = "A gorgeous movie. It is"
    shown = run(text, "--generate", 3, "--method", "relevance", "--reference", reference)
    assert shown.status == 0 and not shown.err
    model, tokenizer = AutoModelForCausalLM.from_pretrained(REVIEWS).eval(), AutoTokenizer.from_pretrained(REVIEWS)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids
    written = model.generate(ids, max_new_tokens=3, do_sample=False)
    assert shown.fact("written") == tokenizer.decode(written[0, ids.shape[1] :]).strip()
    rows = re.findall(r"^  \S+ +(\S+) ([+-][\d.e-]+), ", shown.out, re.MULTILINE)
    for k, (name, value) in enumerate(rows):
        before, target = written[:, : ids.shape[1] + k], int(written[0, ids.shape[1] + k])
        method = ImplicitAttentionRelevance(lambda ids: model(ids).logits[:, -1].log_softmax(-1), model)
        scores = method.attribute(before, target, baselines=None if reference == "none" else tokenizer.unk_token_id)[0]
        best = int(scores.abs().argmax())
        assert (name, value) == (tokenizer.decode([int(before[0, best])]).strip(), f"{float(scores[best]):+.2g}")
    assert len(rows) == 3
    sums = shown.fact("completeness")
    assert ("less that after the reference" in sums) == (reference == "unk") == ("a term of bias" not in sums)


def test_a_generation_continues_the_text(run: Any) -> None:
    """The shipped tokenizer asks for the sentiment behind a text; what a model writes is not the answer to that."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(REVIEWS).eval(), AutoTokenizer.from_pretrained(REVIEWS)
    ids = tokenizer(GOOD, return_tensors="pt", add_special_tokens=False).input_ids
    written = model.generate(ids, max_new_tokens=4, do_sample=False)[:, ids.shape[1] :]
    shown = run(GOOD, "--generate", 4)
    assert shown.fact("written") == tokenizer.decode(written[0]).strip() != "positive"
    assert "<sentiment>" not in shown.out


def test_a_token_in_front_of_a_text_belongs_to_the_prompt(run: Any, tmp_path: Path) -> None:
    folder = save(tmp_path / "both", pad_token="[PAD]", cls_token="[red]", sep_token="<b>")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="[red] $A <b>", special_tokens=[("[red]", 6), ("<b>", 7)]
    )
    tokenizer.save_pretrained(folder)
    shown = run("a good film", "--model", folder, "--generate", 2, "--method", "relevance")
    assert "[red] kept" in shown.fact("reference") and "<b>" not in shown.fact("not shown")
    model = MambaForCausalLM.from_pretrained(folder).eval()
    written = model.generate(torch.tensor([[6, 2, 3, 5]]), max_new_tokens=2, do_sample=False)[0, 4:]
    assert shown.fact("written") == tokenizer.decode(written).strip()


@pytest.mark.parametrize(("options", "part"), [
    (["--reference", "pad"], "--reference is no option of the method attribution.*add --method relevance, or leave"),
    (["--fusion", "mean"], "--fusion is no option of the method attribution.*add --method rollout or raw"),
])  # fmt: skip
def test_an_option_of_a_method_that_does_not_explain_the_generation_is_refused(
    run: Any, options: list[str], part: str
) -> None:
    assert_refused(run(GOOD, "--generate", 3, *options), part)


@pytest.mark.parametrize(("options", "part"), [
    (["--target", "positive"], "leave --target and --contrast out"),
    (["--contrast", "positive"], "leave --target and --contrast out"),
    (["--score", "logit"], "leave --score out"),
])  # fmt: skip
def test_what_a_generation_cannot_take_is_refused(run: Any, options: list[str], part: str) -> None:
    assert_refused(run(GOOD, "--generate", 3, *options), part)


@pytest.mark.parametrize("count", [0, -2])
def test_a_generation_of_no_token_is_refused(run: Any, count: int) -> None:
    assert_refused(run(GOOD, "--generate", count), f"at least 1, not {count}")


# --- The shipped model --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "word"), [(GOOD, "positive"), (BAD, "negative")])
def test_a_text_is_explained_by_what_the_model_predicts(run: Any, text: str, word: str) -> None:
    shown = run(text)
    assert shown.status == 0 and not shown.err
    assert text in shown.out and f"Why '{word}'?" in shown.out
    assert shown.fact("prediction").startswith(f"'{word}' ")
    assert f"'{word}'" in shown.fact("explained")
    assert shown.fact("method") == "ImplicitAttentionRelevance: difference to a reference"
    assert "MambaForCausalLM" in shown.fact("model")


def test_the_exactness_is_printed_and_is_that_of_every_layer(run: Any) -> None:
    found = re.fullmatch(
        r"largest relative error over 3 layers (\d\.\de-\d\d) \(backbone\.layers\.\d\.mixer\)",
        run(GOOD).fact("exactness"),
    )
    assert found and float(found.group(1)) <= 1e-5


def test_the_predictions_are_the_most_probable_words_in_order(run: Any) -> None:
    shares = [float(share) for share in re.findall(r"([\d.]+)%", run(GOOD).fact("prediction"))]
    assert shares == sorted(shares, reverse=True) and 50 < shares[0] <= sum(shares) <= 100.1


@pytest.mark.parametrize(("method", "name"), [
    ("relevance", "ImplicitAttentionRelevance"), ("attribution", "ImplicitAttentionAttribution"),
    ("rollout", "ImplicitAttentionRollout"), ("raw", "RawImplicitAttention"),
])  # fmt: skip
def test_every_method_is_at_hand(run: Any, method: str, name: str) -> None:
    shown = run(GOOD, "--method", method)
    assert shown.status == 0 and shown.fact("method").startswith(f"{name}: ")
    assert (shown.out == run(GOOD).out) == (method == "relevance")


OPTIONS = [
    *[
        (["--method", "attribution", *options], words)
        for options, words in (
            (["--rectify", "channel"], "rectify channel, unified attention"),
            (["--rectify", "token"], "rectify token, unified attention"),
            (["--rectify", "none"], "rectify none, unified attention"),
            (["--attention", "scan"], "rectify none, scan attention"),
            (["--without", "conv", "skip", "bias"], "rectify none, unified attention, without conv, skip, bias"),
        )
    ],
    *[
        (["--method", method, "--fusion", fusion], f"{fusion} fusion, unified attention")
        for method in ("rollout", "raw")
        for fusion in ("absolute", "mean", "positive", "norm", "root")
    ],
    (["--method", "raw", "--attention", "scan", "--fusion", "mean"], "mean fusion, scan attention"),
]  # fmt: skip


@pytest.mark.parametrize(("options", "words"), OPTIONS, ids=lambda value: value if isinstance(value, str) else None)
def test_every_option_is_taken_and_told(
    run: Any, options: list[str], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    used: list[Any] = []
    for name, make in list(METHODS.items()):
        monkeypatch.setitem(METHODS, name, lambda *args, make=make: (used.append(make(*args)), used[-1])[1])  # type: ignore[func-returns-value]
    shown = run(GOOD, *options)
    assert shown.status == 0 and words in shown.flat
    (method,) = used
    said = f"{method.attention} attention" + (f", without {', '.join(method.without)}" if method.without else "")
    choice = f"{method.fusion} fusion" if hasattr(method, "fusion") else f"rectify {method.rectify or 'none'}"
    assert f"{choice}, {said}" == words


def test_only_a_signed_method_shows_words_against_the_target(run: Any) -> None:
    """The legend has a negative end if, and only if, some score is negative."""
    negative = re.compile(r"^ *-[\d.e-]+ +0 +\+[\d.e-]+ *$", re.MULTILINE)
    positive = re.compile(r"^ *0 +\+[\d.e-]+ *$", re.MULTILINE)
    assert negative.search(run(f"{GOOD} {BAD}").out)
    rectified = [["--method", "attribution", "--rectify", rectify] for rectify in ("channel", "token")]
    for options in (*rectified, ["--method", "rollout"], ["--method", "raw"]):
        assert positive.search(run(f"{GOOD} {BAD}", *options).out)


def test_a_probability_or_a_logit_may_be_explained(run: Any, tmp_path: Path) -> None:
    """They differ for methods with gradients; a rollout depends on the position alone."""
    pages = {}
    for score in ("log-probability", "logit"):
        for method in ("relevance", "attribution", "rollout"):
            page = tmp_path / f"{score} {method}.html"
            shown = run(GOOD, "--score", score, "--method", method, "--html", page)
            assert shown.status == 0 and shown.fact("explained") == f"{score} of 'positive'"
            pages[score, method] = re.findall(r'class="text"[^>]*>.*', page.read_text(encoding="utf-8"))
    for method in ("relevance", "attribution"):
        assert pages["logit", method] != pages["log-probability", method]
    assert pages["logit", "rollout"] == pages["log-probability", "rollout"]


@pytest.mark.parametrize(("dtype", "gap"), [("float64", 1e-6), ("bfloat16", 3e-2), ("float16", 1e-2)])
def test_the_model_may_run_in_another_type(run: Any, dtype: str, gap: float) -> None:
    shown = run(GOOD, "--dtype", dtype)
    assert shown.status == 0 and shown.fact("prediction").startswith("'positive' ")
    found = re.search(r"gap (\S+?)(, rounding of the model's own (.*))?$", shown.fact("completeness"))
    assert found and abs(float(found.group(1))) <= gap
    assert found.group(3) == (None if dtype == "float64" else dtype)


# --- Relevance ----------------------------------------------------------------------------------------------------

NUMBER = r"[+-]?\d+\.\d{4}"


def colours(page: Path) -> torch.Tensor:
    """The scores that a page shows when the pointer is over a word."""
    (text,) = re.findall(r'class="text"[^>]*>(.*)</p>', page.read_text(encoding="utf-8"))
    return torch.tensor([float(score.replace("\N{MINUS SIGN}", "-")) for score in re.findall(r'title="([^"]+)"', text)])


def explained(logits: torch.Tensor, score: str, target: int, contrast: int | None) -> float:
    """The score that the command line explains, from the model's logits (1, V)."""
    scored = logits[0].log_softmax(-1) if score == "log-probability" else logits[0]
    return float(scored[target] - (0 if contrast is None else scored[contrast]))


@pytest.mark.parametrize(("reference", "token", "written"), [
    (None, 1, "<unk> (id 1)"), ("unk", 1, "<unk> (id 1)"), ("pad", 0, "<pad> (id 0)"), ("<pad>", 0, "<pad> (id 0)"),
    ("the", 1893, "the (id 1893)"), ("1893", 1893, "the (id 1893)"),
])  # fmt: skip
@pytest.mark.parametrize("score", ["log-probability", "logit"])
@pytest.mark.parametrize("contrast", [None, "positive"])
def test_the_scores_of_a_relevance_sum_to_the_difference_that_the_model_shows(
    run: Any, tmp_path: Path, reference: str | None, token: int, written: str, score: str, contrast: str | None
) -> None:
    page = tmp_path / "page.html"
    options = ["--reference", reference] if reference else []
    options += ["--contrast", contrast] if contrast else []
    shown = run(BAD, "--score", score, "--html", page, *options)
    assert shown.status == 0
    assert shown.fact("reference") == f"{written} in the place of every token of the text, <sentiment> kept"

    model, tokenizer = AutoModelForCausalLM.from_pretrained(REVIEWS), AutoTokenizer.from_pretrained(REVIEWS)
    ids = tokenizer(BAD, return_tensors="pt").input_ids
    other = ids.clone()
    other[:, :-1] = token  # all but <sentiment>
    target, against = tokenizer.convert_tokens_to_ids(["negative", "positive"])
    with torch.no_grad():
        values = [explained(model(x).logits[:, -1], score, target, against if contrast else None) for x in (ids, other)]
    found = re.fullmatch(
        rf"the scores sum to ({NUMBER}); F\(text\) - F\(reference\) = ({NUMBER}) - \(({NUMBER})\) = ({NUMBER}); "
        r"gap ([+-]\d\.\de[+-]\d\d)",
        shown.fact("completeness"),
    )
    assert found
    total, of_text, of_reference, difference, gap = map(float, found.groups())
    assert (of_text, of_reference) == pytest.approx(values, abs=2e-4)
    assert difference == pytest.approx(values[0] - values[1], abs=2e-4)
    assert total == pytest.approx(difference, abs=2e-4) and abs(gap) < 1e-3
    assert float(colours(page).sum()) == pytest.approx(difference, abs=1e-3 * float(colours(page).abs().sum()))
    assert shown.fact("not shown").endswith("<sentiment> +0")


@pytest.mark.parametrize("gates", [None, "half", "value"])
def test_the_scores_of_frozen_gates_and_the_bias_term_sum_to_the_score(run: Any, tmp_path: Path, gates: Any) -> None:
    page = tmp_path / "page.html"
    shown = run(GOOD, "--reference", "none", "--html", page, "--score", "logit", *(["--gates", gates] if gates else []))
    assert shown.fact("method") == f"ImplicitAttentionRelevance: frozen gates, rule {gates or 'half'}"
    assert shown.fact("reference").startswith("none: the gates are frozen")
    model, tokenizer = AutoModelForCausalLM.from_pretrained(REVIEWS), AutoTokenizer.from_pretrained(REVIEWS)
    ids = tokenizer(GOOD, return_tensors="pt").input_ids
    target = tokenizer.convert_tokens_to_ids("positive")
    found = re.fullmatch(
        rf"the scores sum to ({NUMBER}), the term of bias is ({NUMBER}), together ({NUMBER}); F\(text\) = ({NUMBER}); "
        r"gap ([+-]\d\.\de[+-]\d\d)",
        shown.fact("completeness"),
    )
    assert found
    total, bias, together, of_text, gap = map(float, found.groups())
    with torch.no_grad():
        assert of_text == pytest.approx(float(model(ids).logits[0, -1, target]), abs=2e-4)
    assert total + bias == pytest.approx(together, abs=2e-4) and together == pytest.approx(of_text, abs=2e-4)
    assert abs(gap) < 1e-3
    expected = ImplicitAttentionRelevance(model, gate_rule=gates or "half").attribute(ids, target)[0]
    torch.testing.assert_close(colours(page), expected[:-1], rtol=1e-3, atol=1e-4)
    assert shown.fact("not shown").endswith(f"<sentiment> {float(expected[-1]):+.2g}")


def test_a_token_that_is_the_reference_gets_nothing_and_is_counted(run: Any, tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    shown = run("The story of the film.", "--reference", "the", "--html", page)
    assert shown.fact("reference").endswith("; 2 of 6 already the, score 0")
    assert [k for k, score in enumerate(colours(page).tolist()) if score == 0] == [0, 3]


@pytest.mark.parametrize(("reference", "parts"), [
    ("mask", ["the model has no mask token; choose unk, pad, none, a word, or an id"]),
    ("incomprehensibilities", ["is not one token of this model, but", "choose one of them"]),
    ("文", ["is not one token"]),
    ("1000000", ["reference 1000000 is out of range", r"\(0 to 9999\)"]),
    ("-1", ["reference -1 is out of range"]),
    ("", ["is not one token"]),
])  # fmt: skip
def test_a_reference_that_is_none_is_refused(run: Any, reference: str, parts: list[str]) -> None:
    assert_refused(run(GOOD, "--reference", reference), *parts)


@pytest.mark.parametrize(("special", "words"), [
    ({"unk_token": "[UNK]", "pad_token": "[PAD]", "mask_token": "seen"}, r"\[UNK\] \(id 1\)"),
    ({"unk_token": None, "pad_token": "[PAD]", "mask_token": "seen"}, r"\[PAD\] \(id 0\)"),
    ({"unk_token": None, "mask_token": "seen"}, r"seen \(id 9\)"),
    ({"unk_token": None, "mask_token": "not of the model"}, "none: the gates are frozen"),
    ({"unk_token": None}, "none: the gates are frozen"),
])  # fmt: skip
def test_the_reference_is_the_first_special_token_that_there_is(
    run: Any, tmp_path: Path, special: dict[str, str | None], words: str
) -> None:
    folder = save(tmp_path / "checkpoint", **special)
    shown = run("a good film", "--model", folder)
    assert shown.status == 0 and re.match(words, shown.fact("reference"))
    assert shown.fact("method").endswith("frozen gates, rule half" if "none" in words else "difference to a reference")
    assert "kept" not in shown.fact("reference")  # this tokenizer adds nothing


def test_a_classifier_is_compared_with_padding(run: Any, tmp_path: Path) -> None:
    """It reads at the last token that is no padding, so of padding alone at another: which is a decision."""
    config = FAMILIES["jamba"].build().config
    config.vocab_size, config.num_labels, config.pad_token_id = len(WORDS), 3, 0
    torch.manual_seed(0)
    model = perturbed(JambaForSequenceClassification(config))
    folder = save(tmp_path / "checkpoint", model, pad_token="[PAD]")
    shown = run("a good film was seen", "--model", folder, "--reference", "pad", "--target", "LABEL_1")
    assert shown.status == 0 and "Why 'LABEL_1'?" in shown.out
    text, padding = torch.tensor([[2, 3, 5, 8, 9]]), torch.zeros(1, 5, dtype=torch.long)
    with torch.no_grad():
        values = [float(model(input_ids=ids).logits[0].log_softmax(-1)[1]) for ids in (text, padding)]
    assert "the term of decisions (token ids" in shown.fact("completeness")
    found = re.search(
        rf"F\(reference\) = ({NUMBER}) - \(({NUMBER})\) = ({NUMBER}); gap (\S+)$", shown.fact("completeness")
    )
    assert found and abs(float(found.group(4))) < 1e-3
    assert [float(found.group(k)) for k in (1, 2, 3)] == pytest.approx([*values, values[0] - values[1]], abs=2e-4)


def test_a_decision_of_its_own_is_a_term_of_its_own(run: Any, tmp_path: Path) -> None:
    """A router would send the reference to other experts: what that changes belongs to no token."""
    folder = save(tmp_path / "checkpoint", FAMILIES["qwen3_next"].build(vocab_size=len(WORDS)), pad_token="[PAD]")
    shown = run("a good film was seen", "--model", folder, "--reference", "pad")
    found = re.fullmatch(
        rf"the scores sum to ({NUMBER}), the term of decisions \(topk\) is ({NUMBER}), together ({NUMBER}); "
        rf"F\(text\) - F\(reference\) = {NUMBER} - \({NUMBER}\) = ({NUMBER}); gap (\S+)",
        shown.fact("completeness"),
    )
    assert found
    total, decisions, together, difference, gap = map(float, found.groups())
    assert decisions != 0 and total + decisions == pytest.approx(together, abs=2e-4)
    assert together == pytest.approx(difference, abs=2e-4) and abs(gap) < 1e-3


def test_a_function_without_a_rule_is_named_with_the_other_methods(run: Any) -> None:
    unregister_rule(torch.rsqrt)
    try:
        assert_refused(run(GOOD), "function 'rsqrt' in MambaRMSNorm", "register_rule", "--method attribution")
        assert run(GOOD, "--method", "attribution").status == 0
    finally:
        register_rule(torch.rsqrt, "elementwise")


# --- Targets ------------------------------------------------------------------------------------------------------


def test_a_target_is_a_word_or_its_number(run: Any) -> None:
    tokenizer = PreTrainedTokenizerFast.from_pretrained(REVIEWS)
    number = tokenizer.convert_tokens_to_ids("negative")
    word, same = run(GOOD, "--target", "negative"), run(GOOD, "--target", number)
    assert word.status == same.status == 0 and word.out == same.out
    assert "'negative'" in word.fact("explained") and "Why 'negative'?" in word.out
    assert word.fact("prediction").startswith("'positive' ")  # what is explained need not be what is predicted


BAD_TARGETS = {
    "several tokens": ("incomprehensibilities", ["is not one token of this model, but", "choose one of them"]),
    "several words": ("very positive", ["'very positive' is not one token", "'positive'", "choose one of them"]),
    "unknown": ("文", ["is not one token", "choose"]),
    "nothing": ("", ["is not one token"]),
    "too large": ("1000000", ["target 1000000 is out of range", r"\(0 to \d+\)"]),
    "negative": ("-1", ["target -1 is out of range", r"\(0 to \d+\)"]),
    "a fraction": ("1.5", ["is not one token"]),
}


def assert_refused(shown: Shown, *parts: str) -> None:
    assert shown.status == 2
    assert shown.err.startswith("captum-ssm: error: ") and "Traceback" not in shown.err
    for part in parts:
        assert re.search(part, shown.err), f"{part} not in: {shown.err}"
    assert not shown.out


@pytest.mark.parametrize(("target", "parts"), BAD_TARGETS.values(), ids=BAD_TARGETS)
def test_a_target_that_is_none_is_refused(run: Any, target: str, parts: list[str]) -> None:
    assert_refused(run(GOOD, "--target", target), *parts)


@pytest.mark.parametrize("target", ["²", "-³", "①"])
def test_a_target_that_only_looks_like_a_number_is_refused(run: Any, target: str) -> None:
    assert_refused(run(GOOD, f"--target={target}"), "is not one token")


# --- Wrong calls --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", " ", "\n\t "])
def test_a_text_without_words_is_refused(run: Any, text: str) -> None:
    assert_refused(run(text), "no token to explain", "pass at least one word")


def test_a_model_that_is_nowhere_is_refused(run: Any, tmp_path: Path) -> None:
    for path in (tmp_path / "nowhere", tmp_path, "no-such-user/no-such-model"):
        assert_refused(run(GOOD, "--model", path), f"cannot load a model from '{re.escape(str(path))}'")


@pytest.mark.parametrize(("options", "parts"), [
    (["--without", "norm"], ["no layer has a factor named 'norm'", "act, bias, conv, gate, scan, skip"]),
    (["--attention", "scan", "--without", "conv"], ["'conv'", "bias, scan, skip"]),
])  # fmt: skip
def test_a_factor_that_no_layer_has_is_refused(run: Any, options: list[str], parts: list[str]) -> None:
    assert_refused(run(GOOD, "--method", "attribution", *options), *parts)


@pytest.mark.parametrize(("options", "parts"), [
    (["--rectify", "none"], ["--rectify is no option of the method relevance, the def", "add --method attribution,"]),
    (["--method", "relevance", "--attention", "scan"], ["method relevance; add --method attribution, rollout or raw"]),
    (["--without", "conv"], ["--without is no option of the method relevance", "leave --without out"]),
    (["--method", "attribution", "--fusion", "mean"], ["of the method attribution; add --method rollout or raw"]),
    (["--method", "raw", "--rectify", "token"], ["--rectify is no option of the method raw"]),
    (["--method", "rollout", "--reference", "pad"], ["--reference is no option of .* rollout; add --method relevance"]),
    (["--method", "attribution", "--gates", "half"], ["--gates is no option of the method attribution"]),
    (["--gates", "value"], ["--gates is for frozen gates; add --reference none"]),
    (["--gates", "half", "--reference", "unk"], ["--gates is for frozen gates; add --reference none"]),
])  # fmt: skip
def test_an_option_of_another_method_is_refused(run: Any, options: list[str], parts: list[str]) -> None:
    assert_refused(run(GOOD, *options), *parts)


@pytest.mark.parametrize(
    "options",
    [["--method", "magic"], ["--rectify", "never"], ["--fusion", "max"], ["--gates", "all"], ["--nothing"]],
)
def test_an_option_that_is_none_is_refused_with_those_that_are(run: Any, options: list[str]) -> None:
    shown = run(GOOD, *options)
    assert shown.status == 2 and not shown.out and "Traceback" not in shown.err
    assert re.search(r"choose from|unrecognized arguments: --nothing", shown.err)


def test_a_device_that_is_none_is_refused(run: Any) -> None:
    assert_refused(run(GOOD, "--device", "nowhere"), "device")


@pytest.mark.parametrize(
    "options", [["--html", "{}"], ["--png", "{}"], ["--png", "{}/picture.nothing"], ["--html", "{}/file/page.html"]]
)
def test_a_file_that_cannot_be_written_is_named(run: Any, options: list[str], tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    shown = run(GOOD, *(option.format(tmp_path) for option in options))
    assert shown.status == 2 and str(tmp_path) in shown.err


def test_a_text_that_is_no_unicode_is_refused(run: Any) -> None:
    """As Python reads an argument of bytes that are not UTF-8."""
    assert_refused(run("caf\udce9"), "text")


def test_the_version_is_that_of_the_package(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        cli.main(["--version"])
    assert stop.value.code == 0 and capsys.readouterr().out.strip() == f"captum-ssm {captum_ssm.__version__}"


def test_a_command_is_needed(capsys: pytest.CaptureFixture[str]) -> None:
    for arguments in ([], ["explain"], ["describe", "text"]):
        with pytest.raises(SystemExit) as stop:
            cli.main(arguments)
        assert stop.value.code == 2 and "usage: captum-ssm" in capsys.readouterr().err


# --- Files --------------------------------------------------------------------------------------------------------


def test_a_page_and_a_picture_are_written_where_asked(run: Any, tmp_path: Path) -> None:
    html, png = tmp_path / "new" / "folder" / "page.html", tmp_path / "other" / "picture.png"
    shown = run(GOOD, "--html", html, "--png", png)
    assert shown.status == 0 and str(html) in shown.flat and str(png) in shown.flat
    assert shown.flat.count("written") == 2
    page = html.read_text(encoding="utf-8")
    assert Text(page).text == GOOD
    for part in (
        "Why &#x27;positive&#x27;?",
        "ImplicitAttentionRelevance",
        "the scores sum to",
        "largest relative error",
    ):
        assert part in page
    assert png.read_bytes().startswith(b"\x89PNG") and png.stat().st_size > 5000
    before = page
    assert run(GOOD, "--html", html).status == 0 and html.read_text(encoding="utf-8") == before  # written over


def test_no_file_is_written_unasked(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(GOOD).status == 0 and not list(tmp_path.iterdir())
    run("", "--html", tmp_path / "page.html")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", [
    "<script>alert('good')</script> film & <b>more</b>", "[bold]good[/bold] [/] [red]film", "good $x_1$ film {0} %s \\",
    "Ça été génial, 中文 😀 film",
])  # fmt: skip
def test_a_text_is_never_taken_for_markup(run: Any, text: str, tmp_path: Path) -> None:
    shown = run(text, "--html", tmp_path / "page.html")
    assert shown.status == 0 and text in shown.out
    page = (tmp_path / "page.html").read_text(encoding="utf-8")
    assert Text(page).text == text and not {"script", "b"} & Text(page).tags


# --- Models of one's own ------------------------------------------------------------------------------------------

WORDS = ["[PAD]", "[UNK]", "a", "good", "bad", "film", "[red]", "<b>", "was", "seen"]


def save(folder: Path, model: Any = None, **special: str | None) -> Path:
    """A tiny checkpoint with one word for each entry of its vocabulary."""
    words = Tokenizer(models.WordLevel({word: k for k, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"unk_token": "[UNK]", **special}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(folder)
    torch.manual_seed(0)
    made = model or perturbed(MambaForCausalLM(MambaConfig(**{**S6, "vocab_size": len(WORDS)})))
    made.save_pretrained(folder)
    return folder


@pytest.fixture
def checkpoint(tmp_path: Path) -> Path:
    return save(tmp_path / "checkpoint", pad_token="[PAD]")


def test_a_checkpoint_in_a_folder_is_explained(run: Any, checkpoint: Path) -> None:
    shown = run("a good film", "--model", checkpoint)
    assert shown.status == 0 and "a good film" in shown.out
    assert shown.fact("model") == f"{checkpoint}, MambaForCausalLM"
    assert "over 2 layers" in shown.fact("exactness")
    model = MambaForCausalLM.from_pretrained(checkpoint).eval()
    with torch.no_grad():
        logits = model(torch.tensor([[2, 3, 5]])).logits[0, -1]
    best = WORDS[int(logits.argmax())]
    assert f"Why '{best}'?" in shown.out
    assert shown.fact("prediction").startswith(f"'{best}' {logits.softmax(-1).max():.1%}")


def test_a_tokenizer_without_padding_is_explained_alike(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    plain = save(tmp_path / "plain")
    assert PreTrainedTokenizerFast.from_pretrained(plain).pad_token is None
    with_padding, without = (run("a good film", "--model", path) for path in (checkpoint, plain))
    assert without.status == 0
    assert without.flat.replace(str(plain), "") == with_padding.flat.replace(str(checkpoint), "")


def test_words_that_look_like_markup_are_named_as_they_are(run: Any, checkpoint: Path, tmp_path: Path) -> None:
    for word in ("[red]", "<b>"):
        shown = run(f"a {word} film", "--model", checkpoint, "--target", word, "--html", tmp_path / "page.html")
        assert shown.status == 0 and f"Why '{word}'?" in shown.out
        assert f"'{word}'" in shown.fact("explained")
        assert Text((tmp_path / "page.html").read_text(encoding="utf-8")).text == f"a {word} film"


def test_an_unknown_word_is_no_target_but_may_stand_in_the_text(run: Any, checkpoint: Path) -> None:
    assert run("a marvellous film", "--model", checkpoint).status == 0
    assert_refused(run("a film", "--model", checkpoint, "--target", "marvellous"), "is not one token")


def test_every_single_word_is_explained(run: Any, checkpoint: Path) -> None:
    for word in ("a", "marvellous"):
        assert run(word, "--model", checkpoint).status == 0


def test_a_model_without_supported_layers_is_explained_by_relevance_alone(
    run: Any, checkpoint: Path, tmp_path: Path
) -> None:
    from transformers import GPT2Config, GPT2LMHeadModel

    folder = tmp_path / "gpt2"
    PreTrainedTokenizerFast.from_pretrained(checkpoint).save_pretrained(folder)
    GPT2LMHeadModel(GPT2Config(vocab_size=10, n_embd=8, n_layer=1, n_head=2, n_positions=16)).save_pretrained(folder)
    shown = run("a film", "--model", folder)
    assert shown.status == 0 and "function by function" in shown.fact("exactness")
    shown = run("a film", "--model", folder, "--method", "rollout")
    assert shown.status == 2 and "Traceback" not in shown.err
    assert all(part in shown.err for part in ("GPT2Attention", "Supported: ", "mamba", "captum_ssm.register"))


def test_a_folder_without_a_tokenizer_is_refused(run: Any, checkpoint: Path) -> None:
    for path in checkpoint.glob("token*"):
        path.unlink()
    assert_refused(run("a film", "--model", checkpoint))  # transformers may make up one that knows no word


# --- Adapters, quantised models, several devices ------------------------------------------------------------------


@pytest.mark.parametrize(("options", "package", "extra"), [
    (["--load-in", "8bit"], "bitsandbytes", "quantized"),
    (["--load-in", "4bit"], "accelerate", "quantized"),
    (["--device-map", "auto"], "accelerate", "quantized"),
    (["--model"], "peft", "peft"),
])  # fmt: skip
def test_a_package_that_is_missing_is_named_with_its_extra(
    run: Any, options: list[str], package: str, extra: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = lambda name: None if name == package else object()  # noqa: E731
    monkeypatch.setattr(captum_ssm.cli.loading, "find_spec", found)
    if options == ["--model"]:
        (tmp_path / "adapter_config.json").write_text("{}")
        options = [*options, str(tmp_path)]
    assert_refused(run(GOOD, *options), rf"{package}: pip install 'captum-ssm\[{extra}\]'")


def test_an_adapter_without_a_model_is_refused(run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(captum_ssm.cli.loading, "find_spec", lambda name: object())
    for text, part in (("{}", "add base_model_name_or_path"), ("{", "cannot read .*adapter_config.json")):
        (tmp_path / "adapter_config.json").write_text(text)
        assert_refused(run(GOOD, "--model", tmp_path), part)


@pytest.mark.parametrize(("options", "part"), [
    (["--device", "cpu", "--device-map", "auto"], "--device is one device, --device-map are several"),
    (["--device-map", "{backbone"], "--device-map is no JSON"),
])  # fmt: skip
def test_a_place_that_is_none_is_refused(
    run: Any, options: list[str], part: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(captum_ssm.cli.loading, "find_spec", lambda name: object())
    assert_refused(run(GOOD, *options), part)


# --- As a program -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_module_is_a_program(run: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-m", "captum_ssm.cli", "explain", GOOD, "--html", str(tmp_path / "page.html")]
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[1])}  # this package, whichever is installed
    options: dict[str, Any] = {"env": environment, "cwd": tmp_path, "capture_output": True, "text": True}
    done = subprocess.run(command, timeout=120, check=False, **options)
    assert done.returncode == 0, done.stderr
    assert GOOD in done.stdout and "Why 'positive'?" in done.stdout and not done.stderr
    assert (tmp_path / "page.html").is_file()
    assert " ".join(done.stdout.split()).split(" model ")[0] == run(GOOD).flat.split(" model ")[0]


# --- Layers -------------------------------------------------------------------------------------------------------


def test_a_page_shows_the_relevance_before_each_layer(run: Any, tmp_path: Path) -> None:
    """Each block reads the residual stream alone, so the scores before each have one sum."""
    page = tmp_path / "page.html"
    shown = run(GOOD, "--layers", "--html", page)
    assert shown.status == 0 and shown.fact("not shown") and "not shown" not in page.read_text(encoding="utf-8")
    rows = re.findall(r'<tr><th scope="row"><bdi>(.*?)</bdi></th>(.*?)</tr>', page.read_text(encoding="utf-8"))
    assert [name for name, _ in rows] == ["embeddings", *(f"before layer {k}" for k in range(3))]
    found = [re.findall(r"<td[^>]*>(.*?)</td>", cells) for _, cells in rows]
    scores = torch.tensor([[float(cell.replace("\N{MINUS SIGN}", "-")) for cell in row] for row in found])
    torch.testing.assert_close(scores.sum(1), scores[:1].sum(1).expand(4), rtol=1e-2, atol=0)
    torch.testing.assert_close(scores[1], scores[0])
    assert float((scores[3] - scores[0]).abs().max()) > 1e-2


def test_layers_without_a_page_or_of_a_generation_are_refused(run: Any, tmp_path: Path) -> None:
    assert_refused(run(GOOD, "--layers"), "add --html FILE, or leave --layers out")
    page = tmp_path / "page.html"
    assert_refused(run(GOOD, "--layers", "--html", page, "--method", "rollout"), "--layers is no option of the method")
    options = ("--generate", 2, "--method", "relevance")
    assert_refused(run(GOOD, "--layers", "--html", page, *options), "leave it or --generate out")
    assert not page.exists()
