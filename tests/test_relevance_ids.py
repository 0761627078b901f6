"""With a reference, relevance is compared with the model's own run on it: for ids, on the text with other ids."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaBlock

from captum_ssm import FidelityError, ImplicitAttentionRelevance, UnsupportedModelError, register_rule, unregister_rule

IDS = torch.tensor([[4, 1, 2, 9, 4, 6], [3, 3, 8, 1, 0, 22]])
SIZE, V = MambaConfig(hidden_size=8, state_size=3, time_step_rank=2), 23
More = Callable[[Any, Tensor], Tensor]


class Text(nn.Module):
    """Ids, a vector for each, vectors that are made of them otherwise, a block, and a head at the last token."""

    def __init__(self, more: More, after: Callable[[Tensor], Tensor] = lambda h: h) -> None:
        super().__init__()
        self.tok, self.other, self.types = nn.Embedding(V, 8), nn.Embedding(V * V, 8), nn.Embedding(2, 8)
        self.bag, self.low, self.up = nn.EmbeddingBag(V, 8), nn.Parameter(torch.zeros(3, V)), nn.Linear(3, 8)
        self.block, self.head = MambaBlock(SIZE, 0), nn.Linear(8, 2)
        self.more, self.after = more, after

    def forward(self, ids: Tensor) -> Tensor:
        h = self.block(self.tok(ids) + self.more(self, ids))
        return self.head(self.after(h[0] if isinstance(h, tuple) else h)[:, -1])


def filled(model: nn.Module) -> nn.Module:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


def text(more: More = lambda m, ids: torch.zeros(()), **options: Any) -> nn.Module:
    return filled(Text(more, **options))


def previous(ids: Tensor) -> Tensor:
    shifted = torch.zeros_like(ids)
    shifted[:, 1:] = ids[:, :-1]
    return shifted


DEPENDENT: dict[str, More] = {
    "hashed pairs": lambda m, ids: m.other((7 * ids + 3 * ids.roll(1, 1)) % V),
    "pairs written in place": lambda m, ids: m.other(V * previous(ids) + ids),
    "the one before, written in place": lambda m, ids: m.other(previous(ids)),
    "a second embedding": lambda m, ids: m.other(ids),
    "weight[ids]": lambda m, ids: m.other.weight[ids],
    "index_select": lambda m, ids: m.other.weight.index_select(0, ids.flatten()).reshape(*ids.shape, 8),
    "a bag of the text": lambda m, ids: m.bag(ids)[:, None],
    "low rank": lambda m, ids: m.up(F.embedding(ids, m.low.T)),
    "types": lambda m, ids: m.types((ids > 3).long()),
    "the complementary strand": lambda m, ids: m.tok((V - 1 - ids).flip(1)),
    "bags of pairs": lambda m, ids: m.bag(torch.stack([ids, ids.roll(1, 1)], -1).reshape(-1, 2)).reshape(-1, 6, 8),
    "a token in front": lambda m, ids: m.tok(F.pad(ids, (1, 0), value=3))[:, :-1],
    "both strands at once": lambda m, ids: m.tok(torch.cat([ids, ids.flip(1)])).view(2, -1, 6, 8).sum(0),
}
FIXED: dict[str, More] = {
    "positions": lambda m, ids: m.other(torch.arange(6)),
    "positions of the shape of the ids": lambda m, ids: m.other(torch.arange(6)[None].expand_as(ids)),
    "one type": lambda m, ids: m.types(torch.zeros_like(ids)),
}


def difference(model: nn.Module, ids: Tensor, reference: Tensor) -> Tensor:
    with torch.no_grad():
        return (model(ids) - model(reference.expand_as(ids)))[:, 1]


@pytest.mark.parametrize("baselines", [7, 0, torch.tensor([5, 4, 3, 2, 1, 0]), IDS.flip(0)], ids=str)
@pytest.mark.parametrize("name", [*DEPENDENT, *FIXED])
def test_all_that_depends_on_the_ids_changes_with_them_and_nothing_else(name: str, baselines: Any) -> None:
    """Also where the text is 0, 1, 2, ..., as its positions are."""
    model = text({**DEPENDENT, **FIXED}[name])
    method = ImplicitAttentionRelevance(model)
    for ids in (IDS, torch.arange(6).expand(2, 6)):
        relevance, delta = method.attribute(ids, 1, baselines=baselines, return_convergence_delta=True)
        expected = difference(model, ids, torch.as_tensor(baselines))
        assert torch.allclose(relevance.sum(1), expected, atol=1e-4) and method.terms == {}
        assert delta.abs().max() <= 1e-4 and method.completeness <= 1e-5


@pytest.mark.parametrize("position", range(6))
@pytest.mark.parametrize("name", [name for name in DEPENDENT if "hashed" not in name and "written" not in name])
def test_a_vector_belongs_to_the_token_that_it_is_made_of(name: str, position: int) -> None:
    """The relevance of a text that differs from its reference in one token is that token's."""
    model, reference = text(DEPENDENT[name]), IDS.clone()
    reference[:, position] = (IDS[:, position] + 5) % V
    relevance = ImplicitAttentionRelevance(model).attribute(IDS, 1, baselines=reference)
    others = torch.arange(6) != position
    assert relevance[:, others].eq(0).all()
    assert torch.allclose(relevance[:, position], difference(model, IDS, reference), atol=1e-4)


@pytest.mark.parametrize("baselines", [2, 5])
def test_a_reference_with_ids_of_another_kind_than_all_of_the_text_is_followed(baselines: int) -> None:
    """As where two types of ids have a vector each, and the text has one type alone."""
    model, ids = text(DEPENDENT["types"]), torch.tensor([[4, 9, 6, 22, 5, 8]])
    for texts in (ids, torch.cat([ids, IDS])):
        relevance = ImplicitAttentionRelevance(model).attribute(texts, 1, baselines=baselines)
        assert torch.allclose(relevance.sum(1), difference(model, texts, torch.tensor(baselines)), atol=1e-4)


@pytest.mark.parametrize("name", DEPENDENT)
def test_the_texts_beside_it_do_not_matter(name: str) -> None:
    method, of_one_type = ImplicitAttentionRelevance(text(DEPENDENT[name])), torch.tensor([[4, 9, 6, 22, 5, 8]])
    texts = torch.cat([IDS, of_one_type])
    for baselines in (7, 0.25, None):
        alone = torch.cat([method.attribute(ids, 1, baselines=baselines) for ids in texts.split(1)])
        assert torch.allclose(method.attribute(texts, 1, baselines=baselines), alone, atol=1e-4)


@pytest.mark.parametrize("baselines", [None, 0.25, torch.full((8,), 0.1)], ids=str)
def test_without_other_ids_the_vectors_of_positions_are_no_part_of_the_text_either(baselines: Any) -> None:
    ids = torch.arange(6).expand(2, 6)
    looked_up, constant = text(FIXED["positions of the shape of the ids"]), text(lambda m, ids: m.other.weight[:6])
    expected = ImplicitAttentionRelevance(constant).attribute(ids, 1, baselines=baselines)
    assert torch.equal(ImplicitAttentionRelevance(looked_up).attribute(ids, 1, baselines=baselines), expected)


def test_a_hook_on_the_embedding_is_followed() -> None:
    model = text()
    tok = model.get_submodule("tok")
    tok.register_forward_hook(lambda m, args, y: 2 * y + m.weight[(5 * args[0] + 2) % V])
    relevance = ImplicitAttentionRelevance(model).attribute(IDS, 1, baselines=7)
    assert torch.allclose(relevance.sum(1), difference(model, IDS, torch.tensor(7)), atol=1e-4)


class Pooled(Text):
    """Reads the last token that is not padding, as a classifier of transformers does, by the ids."""

    def forward(self, ids: Tensor) -> Tensor:
        h = self.block(self.tok(ids))
        h = h[0] if isinstance(h, tuple) else h
        last = ((ids != 0).int() * torch.arange(ids.shape[1])).argmax(-1)
        return self.head(h)[torch.arange(len(ids)), last]


def test_a_reference_of_padding_moves_the_token_that_is_read_which_is_a_decision() -> None:
    model = filled(Pooled(lambda m, ids: ids))
    method = ImplicitAttentionRelevance(model)
    relevance = method.attribute(IDS, 1, baselines=0)
    assert method.held == {"token ids"}
    total = relevance.sum(1) + method.terms["decisions"]
    assert torch.allclose(total, difference(model, IDS, torch.tensor(0)), atol=1e-4)


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return torch.tanh(x) * 2.0


def past_functions(x: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return torch.tanh(x) * 2.0


def by_address(x: Tensor) -> Tensor:
    with torch._C.DisableTorchFunctionSubclass():
        return torch.tensor(x.untyped_storage().data_ptr() % 7.0)


ESCAPES: dict[str, Callable[[Tensor], Tensor]] = {
    "by address": by_address,
    "scripted": scripted,
    "traced": torch.jit.trace(lambda x: torch.tanh(x) * 2.0, torch.randn(2, 6, 8)),
    "vmap": torch.vmap(lambda x: torch.tanh(x) * 2.0),
    "past functions": past_functions,
    "numpy": lambda x: torch.from_numpy(x.detach().numpy() * 2),
}


@pytest.mark.parametrize("baselines", [7, None], ids=["difference", "frozen"])
@pytest.mark.parametrize("name", ESCAPES)
def test_code_that_cannot_be_followed_is_refused(name: str, baselines: Any) -> None:
    model = text(after=lambda h: h + ESCAPES[name](h))
    with pytest.raises(UnsupportedModelError, match=r"past torch's functions|leaves torch"):
        ImplicitAttentionRelevance(model).attribute(IDS, 1, baselines=baselines)


def test_an_escape_is_refused_also_if_the_model_hides_its_error() -> None:
    def hidden(h: Tensor) -> Tensor:
        try:
            return h + past_functions(h)
        except UnsupportedModelError:
            return h

    with pytest.raises(UnsupportedModelError, match="past torch's functions"):
        ImplicitAttentionRelevance(text(after=hidden)).attribute(IDS, 1)


def test_a_rule_whose_reference_is_not_the_models_own_is_refused() -> None:
    """Whatever the run itself says: its sum is right, as the same wrong function is applied to both sides."""
    register_rule(torch.special.bessel_j0)(lambda x: 2.0 * x)
    try:
        model = text(after=lambda h: h + torch.special.bessel_j0(h))
        with pytest.raises(FidelityError, match="whole model"):
            ImplicitAttentionRelevance(model).attribute(IDS, 1, baselines=7)
    finally:
        unregister_rule(torch.special.bessel_j0)


def test_an_elementwise_function_without_a_derivative_is_refused() -> None:
    register_rule(torch.special.bessel_j0, "elementwise")
    try:
        model = text(after=lambda h: h + torch.special.bessel_j0(h))
        with pytest.raises(UnsupportedModelError, match="no derivative in torch"):
            ImplicitAttentionRelevance(model).attribute(IDS, 1, baselines=IDS)
    finally:
        unregister_rule(torch.special.bessel_j0)


LOST: dict[str, More] = {
    "lists": lambda m, ids: m.other(torch.tensor([[(7 * t + 1) % V for t in row] for row in ids.tolist()])),
    "one hot": lambda m, ids: F.one_hot(ids, V).float() @ m.tok.weight,
}


@pytest.mark.parametrize("name", LOST)
def test_ids_that_cannot_be_followed_are_refused_by_the_name_of_the_function(name: str) -> None:
    with pytest.raises(UnsupportedModelError, match="token ids"):
        ImplicitAttentionRelevance(text(LOST[name])).attribute(IDS, 1, baselines=7)
