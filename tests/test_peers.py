"""What users compare with: the restated rules, how errors are measured, and the page. See also ``tests/hosts``."""

import json
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

pytest.importorskip("pandas")  # of the extra train, which the benchmark's sentences need
ROOT = Path(__file__).resolve().parents[1]
from benchmarks.methods import METHODS, NotApplicableError, Question  # noqa: E402  pandas is asked for first
from benchmarks.peers import page  # noqa: E402
from benchmarks.peers.families import Outside, asked, convolutions, gap, own, tried  # noqa: E402
from benchmarks.peers.latim import contributions, latim  # noqa: E402
from benchmarks.peers.ours import ours  # noqa: E402
from benchmarks.peers.peer import Explained, Peer, alone, one_by_one  # noqa: E402
from captum_ssm import ImplicitAttentionRelevance, ImplicitAttentionRollout  # noqa: E402
from tests.conftest import build  # noqa: E402
from tests.oracles_relevance import mamba_lrp  # noqa: E402

IDS = torch.tensor([[4, 9, 7, 5, 8], [6, 5, 21, 4, 9]])


@pytest.fixture
def question() -> Question:
    return asked(build("mamba"), IDS.clone(), torch.full_like(IDS, 3), 5)


# --- Restated rules -----------------------------------------------------------------------------------------------


def test_what_latim_says_of_all_tokens_is_the_layers_output(mamba: Any) -> None:
    mixer = mamba.double().backbone.layers[0].mixer
    x = torch.randn(2, 6, 8, dtype=torch.float64)
    with torch.no_grad():
        parts, bias = contributions(mixer, x)
        torch.testing.assert_close(parts.sum(2) + bias, mixer(x), rtol=1e-6, atol=1e-6)  # which computes in float32
    assert bool((parts * torch.ones(6, 6).triu(1)[None, :, :, None] == 0).all()), "no later token contributes"
    assert bool((parts[:, -1, 0] != 0).any())


def test_latim_is_that_of_the_benchmark(question: Question) -> None:
    """Which finds the lengths from matrices; both say how large a token's part is, relative to the others'."""
    found, stored = latim(question), METHODS["LaTIM ℓ2, last layer"].explain(question)
    shares, others = (scores / scores.sum(1, keepdim=True) for scores in (found.scores, stored))
    torch.testing.assert_close(shares, others, rtol=1e-4, atol=1e-6)
    assert found.layer is not None and found.layer < 1e-5


def test_mamba_lrp_conserves_the_logit_of_a_model_without_biases(mamba: Any) -> None:
    mamba = mamba.double()

    def missing() -> float:
        with torch.no_grad():
            logit = mamba(IDS, use_cache=False).logits[:, -1, 5]
        return float((mamba_lrp(mamba, IDS, 5).sum(1) - logit).abs().max())

    assert missing() > 0.01, "the bias has a share"
    with torch.no_grad():
        for layer in mamba.backbone.layers:
            layer.mixer.conv1d.bias.zero_()
    assert missing() < 1e-5  # the model's own code computes in float32 inside


@pytest.mark.parametrize("explain", [latim, METHODS["MambaLRP"].explain])
def test_rules_for_mamba_are_not_applied_to_others(explain: Any) -> None:
    with pytest.raises(NotApplicableError):
        explain(asked(build("falcon_mamba"), IDS, IDS, 5))


# --- How errors are measured --------------------------------------------------------------------------------------


def shares(question: Question, of: float = 1.0) -> Tensor:
    """Equal shares of a part of the difference."""
    with torch.no_grad():
        whole = question.score(question.inputs, question.rows) - question.score(question.reference, question.rows)
    return of * whole[:, None].expand(-1, IDS.shape[1]) / IDS.shape[1]


def test_the_error_is_what_is_missing_of_the_sum(question: Question) -> None:
    exact, half = (Explained(shares(question, of)) for of in (1.0, 0.5))
    peer = Peer(None, alone(shares), "difference")
    assert gap(question, peer, exact) < 1e-6
    assert gap(question, peer, half) == pytest.approx(1.0)  # what is missing is as large as what is there
    rest = {"term": half.scores.sum(1)}
    assert gap(question, peer, replace(half, terms=rest)) < 1e-6
    assert gap(question, replace(peer, sum="output"), exact) > 0.01
    assert tried(peer, question)["sum"] < 1e-6 and "layer" not in tried(peer, question)


def test_a_contrast_is_explained_too(question: Question) -> None:
    question = replace(question, contrast=torch.tensor([4, 7]))
    assert gap(question, Peer(None, alone(shares), "difference"), Explained(shares(question))) < 1e-6


def test_what_a_user_gets_is_stored() -> None:
    def fails(question: Question) -> Explained:
        raise KeyError("no\n such  layer")

    def absent(question: Question) -> Explained:
        raise NotApplicableError

    question = asked(None, IDS, IDS, 5)
    assert tried(Peer(None, fails, None), question) == {"refused": "KeyError: 'no\\n such layer'"}
    assert tried(Peer(None, absent, None), question) == {"refused": ""}


def test_a_peer_cannot_change_the_inputs_of_the_next(question: Question) -> None:
    changed = own(question)
    changed.inputs.zero_()
    changed.reference.zero_()
    assert torch.equal(question.inputs, IDS) and bool((question.reference == 3).all())


def test_one_by_one_is_all_at_once(question: Question) -> None:
    def explain(question: Question) -> Tensor:
        return METHODS["relevance, reference"].explain(question)

    question = replace(question, contrast=torch.tensor([4, 7]))
    torch.testing.assert_close(one_by_one(explain)(question), explain(question), rtol=1e-4, atol=1e-6)


def test_ours_are_exact_where_they_do_not_refuse(question: Question) -> None:
    relevance, rollout = ours(ImplicitAttentionRelevance, 1), ours(ImplicitAttentionRollout)
    found = tried(Peer("captum-ssm", relevance, "difference"), question)
    assert max(found.values()) < 1e-5 and found.keys() == {"sum", "layer"}
    assert tried(Peer("captum-ssm", ours(ImplicitAttentionRelevance), "output"), question)["sum"] < 1e-5, (
        "with its bias"
    )
    images = torch.rand(2, 1, 16, 16)
    plain, outside = (
        asked(model, images, torch.zeros_like(images), 1, patch=4)
        for model in (convolutions(), Outside(convolutions()).eval())
    )
    assert torch.equal(plain.outputs(images), outside.outputs(images))
    assert tried(Peer("captum-ssm", relevance, "difference"), plain)["sum"] < 1e-5
    assert "decompose" in tried(Peer("captum-ssm", rollout, None), plain)["refused"]
    assert "what leaves torch" in tried(Peer("captum-ssm", relevance, "difference"), outside)["refused"]


# --- The page -----------------------------------------------------------------------------------------------------


def test_the_page_shows_what_is_stored() -> None:
    assert page.PAGE.read_text(encoding="utf-8") == page.document(page.read())


@pytest.mark.parametrize(
    ("value", "text"), [(None, "–"), (0.0, "0"), (1.3e-7, "1e-7"), (0.0142, "0.014"), (9.9, "9.9"), (14000.0, "14,000")]
)
def test_figures_are_shown_with_two_digits(value: float | None, text: str) -> None:
    assert page.shown(value) == text


def test_the_figures_are_of_the_pinned_versions() -> None:
    pins = {}
    for name in ("constraints.txt", "constraints-hosts.txt", "constraints-peers.txt"):
        pins[name] = set(re.findall(r"^[\w.-]+==[\w.]+", (ROOT / name).read_text(encoding="utf-8"), re.MULTILINE))
    assert pins["constraints-peers.txt"] <= pins["constraints-hosts.txt"], "what the tests of hosts run with"
    found = {f"{name}=={version}" for name, version in page.read()["versions"].items()}
    assert found <= pins["constraints.txt"] | pins["constraints-peers.txt"]


def test_all_that_is_stored_is_of_all_peers() -> None:
    stored = page.read()
    for part in ("families", "trained"):
        assert all(found.keys() == stored["peers"].keys() for found in stored[part].values())
    assert len(page.small(stored)) == 25 and stored["times"]
    new = {peer for peer, about in stored["peers"].items() if about["stored"] is None}
    assert all(record["methods"].keys() == new for record in stored["tasks"]) and len(stored["tasks"]) == 18
    assert {about["stored"] for about in stored["peers"].values()} - {None} <= METHODS.keys()
    assert json.loads(json.dumps(stored)) == stored
