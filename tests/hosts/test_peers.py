"""The methods of other packages as ``benchmarks/peers`` calls them: equal to one another, or to a plain loop."""

from dataclasses import replace
from itertools import permutations

import pytest
import torch
from torch import Tensor

pytest.importorskip("pandas")  # of the extra train, which the benchmark needs
from benchmarks.methods import METHODS, Question
from benchmarks.peers.captum_methods import deep_lift, layer_integrated_gradients
from benchmarks.peers.effective_attention import effective_attention
from benchmarks.peers.families import asked, convolutions
from benchmarks.peers.inseq_methods import integrated_gradients
from benchmarks.peers.shap_methods import pairs, partition
from benchmarks.peers.table import PEERS
from benchmarks.peers.words import text, tokenizer
from tests.conftest import build

IDS = torch.tensor([[4, 9, 7, 5, 8], [6, 5, 21, 4, 9]])


def of(family: str, ids: Tensor = IDS) -> Question:
    return asked(build(family), ids, torch.full_like(ids, 3), 5)


@pytest.mark.parametrize("family", ["mamba", "rwkv", "qwen3_5"])
@pytest.mark.parametrize("contrast", [None, torch.tensor([4, 7])])
def test_three_ways_to_integrated_gradients_are_one(family: str, contrast: Tensor | None) -> None:
    question = replace(of(family), contrast=contrast)
    expected = METHODS["integrated gradients"].explain(question)
    for explain in (layer_integrated_gradients, integrated_gradients):
        torch.testing.assert_close(explain(question), expected, rtol=1e-4, atol=1e-5)


def test_inseq_leaves_the_model_as_it_was() -> None:
    question = of("rwkv")
    before = question.model.config.to_dict()
    integrated_gradients(question)
    assert question.model.config.to_dict() == before


def test_the_words_are_the_ids() -> None:
    words = tokenizer(build("mamba"), unknown=3, end=2)
    every = torch.arange(3, 23)
    assert words(text(every)).input_ids == every.tolist()


@pytest.mark.parametrize("count", [2, 3, 5, 8, 32])
def test_the_tree_of_pairs_has_every_leaf_once(count: int) -> None:
    leaves = {number: [number] for number in range(count)}
    for number, (left, right, _, size) in enumerate(pairs(count)):
        leaves[count + number] = leaves.pop(int(left)) + leaves.pop(int(right))
        assert len(leaves[count + number]) == size
    assert list(leaves.values()) == [list(range(count))]


def test_the_partition_explainer_gives_owen_values() -> None:
    """For four tokens in two pairs: the mean over the orders in which no token comes between the two of a pair."""
    question = of("mamba", IDS[:1, :4])

    def score(shown: set[int]) -> Tensor:
        kept = torch.tensor([[place in shown for place in range(4)]])
        with torch.no_grad():
            return question.score(torch.where(kept, question.inputs, question.reference), question.rows)[0]

    orders = [order for order in permutations(range(4)) if {*order[:2]} in ({0, 1}, {2, 3})]
    expected = torch.zeros(1, 4)
    for order in orders:
        for place, token in enumerate(order):
            before = set(order[:place])
            expected[0, token] += (score(before | {token}) - score(before)) / len(orders)
    assert len(orders) == 8
    torch.testing.assert_close(partition(question), expected, rtol=1e-4, atol=1e-6)


def test_deep_lift_is_exact_where_it_has_rules() -> None:
    images = torch.rand(2, 1, 16, 16)
    question = asked(convolutions(), images, torch.zeros_like(images), 1, patch=4)
    with torch.no_grad():
        difference = (question.outputs(images) - question.outputs(torch.zeros_like(images)))[:, 1]
    torch.testing.assert_close(deep_lift(question).sum(1), difference, rtol=1e-4, atol=1e-5)
    assert deep_lift(question).shape == partition(question).shape == (2, 16)


def test_deep_lift_of_a_mamba_is_a_gradient_times_a_difference() -> None:
    """So the page says, and so says ``findings/captum_deeplift_on_mamba.sh`` with embeddings of 0."""
    question = of("mamba")
    x, reference = question.vectors(IDS).requires_grad_(), question.vectors(question.reference)
    (gradient,) = torch.autograd.grad(question.score(x, question.rows).sum(), x)
    expected = (gradient * (x - reference)).sum(-1).detach()
    torch.testing.assert_close(deep_lift(question), expected, rtol=1e-4, atol=1e-6)


def test_the_effective_attention_of_mamba_is_the_recurrences() -> None:
    question = of("mamba")
    found = effective_attention(question)
    assert found.layer is not None and found.layer < 1e-5 and found.scores.shape == IDS.shape


def test_every_peer_answers_about_a_mamba() -> None:
    assert all(peer.explain(of("mamba")).scores.shape == IDS.shape for peer in PEERS.values())
