"""Token i of a layer is token i of the inputs: measured, followed where tokens are rearranged, else refused by name."""

from collections.abc import Callable
from functools import partial
from itertools import product
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from captum_ssm import (
    ClassTokenAttention,
    ImplicitAttentionAttribution,
    ImplicitAttentionRollout,
    LayerImplicitAttention,
    RawImplicitAttention,
    UnsupportedModelError,
)
from captum_ssm.matrices.token_matrix import DenseMatrix, RearrangedMatrix
from captum_ssm.network.token_codes import NONE, SEVERAL, decoded, reaches_itself_alone, sources, token_codes
from tests import oracles
from tests.families import COMMON, VOCABULARY

CONFIG = MambaConfig(**COMMON, state_size=2, num_hidden_layers=2, time_step_rank=2)
Path = Callable[..., Tensor]


class Flip(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return x.flip(1)


class Model(nn.Module):
    """Ids or embeddings, a path with two mixers, and a head that is read at the last token, or at all."""

    def __init__(self, path: Path, at: int | slice = -1) -> None:
        super().__init__()
        self.embed, self.pairs, self.norm = nn.Embedding(VOCABULARY, 8), nn.Embedding(VOCABULARY, 8), nn.LayerNorm(8)
        self.mix = nn.ModuleList(MambaMixer(CONFIG, number) for number in range(2))
        self.conv, self.cell = nn.Conv1d(8, 8, 3, padding=1), nn.GRUCell(8, 8)
        self.turn = Flip()
        self.bag, self.head = nn.EmbeddingBag(VOCABULARY, 8), nn.Linear(8, 3)
        self.path, self.at = path, at
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)
        self.eval()

    def forward(self, inputs: Tensor, *args: Any) -> Tensor:
        x = inputs if inputs.is_floating_point() else self.embed(inputs)
        return self.head(self.path(self, x, inputs, *args)[:, self.at])


def two_layers(m: Any, x: Tensor, inputs: Tensor) -> Tensor:
    for mixer in m.mix:
        x = x + mixer(m.norm(x))
    return x


def turned_round(m: Any, x: Tensor, inputs: Tensor) -> Tensor:
    for mixer in m.mix:
        x = x + mixer(m.norm(x).flip(1)).flip(1)
    return x


def both_directions(m: Any, x: Tensor, inputs: Tensor) -> Tensor:
    """The most common bidirectional block: one layer forward, one on the sequence turned round."""
    n = m.norm(x)
    return x + m.mix[0](n) + m.mix[1](n.flip(1)).flip(1)


def one_after_the_other(m: Any, x: Tensor, inputs: Tensor) -> Tensor:
    x = x + m.mix[0](m.norm(x))
    return x + m.mix[1](m.norm(x.flip(1))).flip(1)


ORDER = [3, 0, 5, 1, 6, 4, 2]


def by_columns(m: Any, x: Tensor, inputs: Tensor) -> Tensor:
    """The second layer scans in another order, which is no reversal and not its own inverse."""
    x = x + m.mix[0](m.norm(x))
    back = torch.tensor(ORDER).argsort()
    return x + m.mix[1](m.norm(x)[:, ORDER])[:, back]


def turned_by_modules(m: Any, x: Tensor, inputs: Tensor) -> Tensor:
    x = x + m.mix[0](m.norm(x))
    return x + m.turn(m.mix[1](m.turn(m.norm(x))))


KINDS = ["ids", "embeddings"]
every_kind = pytest.mark.parametrize("kind", KINDS)
METHODS: dict[str, Any] = {
    "rollout": ImplicitAttentionRollout,
    "raw": RawImplicitAttention,
    "channel": ImplicitAttentionAttribution,
    "signed": lambda model: ImplicitAttentionAttribution(model, rectify=None),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))


def given(model: Any, ids: Tensor, kind: str) -> Tensor:
    return ids if kind == "ids" else model.embed(ids).detach()


def by_token(scores: Tensor) -> Tensor:
    return scores if scores.dim() == 2 else scores.sum(-1)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    assert (actual.double() - expected.double()).abs().max() <= tolerance * expected.abs().max()


# --- Rearrangements are followed ----------------------------------------------------------------------------------


@every_method
@every_kind
def test_a_model_turned_round_explains_the_text_turned_round(method: Any, kind: str, ids: Tensor) -> None:
    plain, turned = Model(two_layers, slice(None)), Model(turned_round, slice(None))
    for _ in range(2):  # also from what is kept
        expected = method(plain).attribute(given(plain, ids, kind), (4, 1))
        actual = method(turned).attribute(given(turned, ids.flip(1), kind), (2, 1))
        assert_close(by_token(actual), by_token(expected).flip(1))


@every_kind
@pytest.mark.parametrize("path", [both_directions, one_after_the_other, by_columns, turned_by_modules])
@pytest.mark.parametrize("read", [0, 3, 6])
def test_a_rollout_follows_a_rearrangement(kind: str, path: Path, read: int, ids: Tensor) -> None:
    model = Model(path, slice(None))
    inputs = given(model, ids, kind)
    scores = by_token(ImplicitAttentionRollout(model, fusion="absolute").attribute(inputs, (read, 1)))
    matrices = [LayerImplicitAttention(model, number).attribute(inputs).double() for number in range(2)]
    place = torch.arange(7).flip(0) if path is not by_columns else torch.tensor(ORDER).argsort()
    matrices[1] = matrices[1][:, place][:, :, place]
    streams: Any = {"a": ("e", [(0, "e")]), "b": ("a", [(1, "a")])}
    if path is both_directions:
        streams = {"s": ("e", [(0, "e"), (1, "e")])}
    query = torch.zeros(2, 7, dtype=torch.float64)
    query[:, read] = 1
    assert_close(scores, oracles.wired_rollout(streams, matrices, query))


@every_method
@every_kind
def test_a_rearrangement_behind_the_last_layer_moves_the_position_that_is_read(
    method: Any, kind: str, ids: Tensor
) -> None:
    plain, rolled = Model(two_layers, -3), Model(lambda m, x, inputs: two_layers(m, x, inputs).roll(2, 1))
    expected = method(plain).attribute(given(plain, ids, kind), 1)
    assert_close(method(rolled).attribute(given(rolled, ids, kind), 1), expected)


def test_a_rearrangement_that_depends_on_the_text_is_measured_for_each(ids: Tensor) -> None:
    """Tokens sorted before a layer: the order of one text is not that of another."""

    def sorted_tokens(m: Any, x: Tensor, inputs: Tensor) -> Tensor:
        order = m.scores(inputs).argsort(1)
        take = lambda h, places: h.gather(1, places.unsqueeze(-1).expand(h.shape))  # noqa: E731
        x = x + m.mix[0](m.norm(x))
        return x + take(m.mix[1](take(m.norm(x), order)), order.argsort(1))

    model: Any = Model(sorted_tokens)
    model.scores = lambda inputs: torch.sin(torch.arange(7.0)).expand(2, -1)
    first = ImplicitAttentionRollout(model).attribute(ids, 1)
    model.scores = lambda inputs: torch.cos(torch.arange(7.0)).expand(2, -1)
    second = ImplicitAttentionRollout(model).attribute(ids, 1)
    fresh: Any = Model(sorted_tokens)
    fresh.scores = model.scores
    assert torch.equal(second, ImplicitAttentionRollout(fresh).attribute(ids, 1))
    assert (first - second).abs().max() > 1e-3


def test_the_published_recipes_refuse_another_order(ids: Tensor) -> None:
    with pytest.raises(UnsupportedModelError, match="another order"):
        ClassTokenAttention(Model(both_directions)).attribute(ids, 1)


def test_another_order_with_padding_is_refused(ids: Tensor) -> None:
    def with_mask(m: Any, x: Tensor, inputs: Tensor, mask: Tensor) -> Tensor:
        x = x + m.mix[0](m.norm(x), attention_mask=mask)
        return x + m.mix[1](m.norm(x).flip(1)).flip(1)

    mask = torch.ones(2, 7)
    model = Model(with_mask)
    assert ImplicitAttentionRollout(model).attribute(ids, 1, mask).isfinite().all()
    mask[0, :2] = 0
    with pytest.raises(UnsupportedModelError, match="without padding"):
        ImplicitAttentionRollout(model).attribute(ids, 1, mask)


# --- All else is refused ------------------------------------------------------------------------------------------


def around(change: Callable[[Tensor], Tensor], back: Callable[[Tensor], Tensor]) -> Path:
    return lambda m, x, inputs: x + back(m.mix[0](m.norm(change(x))))


def folded(m: Any, x: Tensor, inputs: Tensor) -> Tensor:
    """A sequence cut into rows that are a batch."""
    B, _, E = x.shape
    return x + m.mix[0](m.norm(x)[:, :6].reshape(3 * B, 2, E)).reshape(B, 6, E).mean(1, keepdim=True)


later: Callable[[Tensor], Tensor] = lambda x: F.pad(x, (0, 0, 1, 0))[:, :-1]  # noqa: E731
MOVED: dict[str, tuple[Path, str]] = {
    "shifted": (around(later, lambda y: y), "shifted by 1"),
    "rolled": (around(lambda x: x.roll(1, 1), lambda y: y), "another path|reads several"),
    "cut": (around(lambda x: x[:, 1:], lambda y: F.pad(y, (0, 0, 1, 0))), "6 tokens for inputs of 7"),
    "put in front": (around(lambda x: torch.cat([x[:, :1], x], 1), lambda y: y[:, 1:]), "8 tokens for inputs of 7"),
    "two to one": (around(lambda x: x[:, :6].unflatten(1, (3, 2)).mean(2), lambda y: y[:, -1:]), "3 tokens"),
    "repeated": (around(lambda x: x[:, [0, 0, 2, 3, 4, 5, 6]], lambda y: y), "reads several|cut or repeated"),
    "differences": (around(lambda x: x - later(x), lambda y: y), "reads several"),
    "far away": (around(lambda x: x + F.pad(x[:, :1], (0, 0, 6, 0)), lambda y: y), "reads several"),
    "folded into the batch": (folded, "6 sequences of 2 tokens for inputs of 2"),
}


@every_kind
@pytest.mark.parametrize(("path", "reason"), MOVED.values(), ids=MOVED)
def test_tokens_that_are_no_longer_those_of_the_inputs_are_refused(
    kind: str, path: Path, reason: str, ids: Tensor, unchanged: Any
) -> None:
    model = Model(path)
    inputs = given(model, ids, kind)
    for method in METHODS.values():
        with unchanged(model, inputs), pytest.raises(UnsupportedModelError, match=reason):
            method(model).attribute(inputs, 1)


@every_kind
def test_an_output_turned_round_and_read_by_several_tokens_is_refused(kind: str, ids: Tensor) -> None:
    """The score reads the last three tokens of the inputs, and the first three of the layer, whatever the codes."""

    def path(m: Any, x: Tensor, inputs: Tensor) -> Tensor:
        return F.conv1d((x + m.mix[0](m.norm(x)).flip(1)).mT, m.conv.weight, m.conv.bias, padding=1).mT

    model = Model(path, at=-2)
    model.mix = model.mix[:1].eval()
    for method in METHODS.values():
        with pytest.raises(UnsupportedModelError, match="another path"):
            method(model).attribute(given(model, ids, kind), 1)


def test_ids_moved_before_the_embedding_are_refused(ids: Tensor) -> None:
    for move, reason in ((later_ids, "shifted by 1"), (hashed, "reads several")):
        model = Model(lambda m, x, inputs, move=move: two_layers(m, x * 0 + m.pairs(move(inputs)), inputs))
        with pytest.raises(UnsupportedModelError, match=reason):
            ImplicitAttentionRollout(model).attribute(ids, 1)


def later_ids(ids: Tensor) -> Tensor:
    return F.pad(ids, (1, 0))[:, :-1]


def hashed(ids: Tensor) -> Tensor:
    """The number of a pair of neighbours."""
    return (7 * ids + 3 * later_ids(ids)) % VOCABULARY


def test_a_second_embedding_of_the_same_token_is_none(ids: Tensor) -> None:
    model = Model(lambda m, x, inputs: two_layers(m, x + m.pairs(inputs * 5 % VOCABULARY), inputs))
    assert ImplicitAttentionRollout(model).attribute(ids, 1).isfinite().all()


@every_kind
def test_a_second_sequence_is_refused(kind: str, ids: Tensor) -> None:
    model = Model(lambda m, x, inputs, other: x + m.mix[0](m.norm(other)))
    with pytest.raises(UnsupportedModelError, match="second sequence"):
        ImplicitAttentionRollout(model).attribute(given(model, ids, kind), 1, torch.randn(2, 7, 8))


def cell(m: Any, x: Tensor) -> Tensor:
    """The last state of a recurrence that no module runs over the tokens."""
    state = x.new_zeros(len(x), 8)
    for token in x.unbind(1):
        state = m.cell(token, state)
    return state.unsqueeze(1)


def pooled(m: Any, x: Tensor) -> Tensor:
    """Attention pooling."""
    return (x.sum(-1, keepdim=True).softmax(1) * x).sum(1, keepdim=True)


def behind_the_first(other: Path) -> Path:
    """A path from the first layer to the score that passes the second one by."""

    def path(m: Any, x: Tensor, inputs: Tensor) -> Tensor:
        first = m.mix[0](m.norm(x))
        return x + first + m.mix[1](m.norm(x + first)) + other(m, x, first)

    return path


BESIDE: dict[str, Path] = {
    "recurrence": lambda m, x, inputs: two_layers(m, x, inputs) + cell(m, x),
    "attention pooling": lambda m, x, inputs: two_layers(m, x, inputs) + pooled(m, x),
    "mean": lambda m, x, inputs: two_layers(m, x, inputs) + x.mean(1, keepdim=True),
    "behind the first layer": behind_the_first(lambda m, x, first: cell(m, x + first)),
    "of the first layer alone": behind_the_first(lambda m, x, first: first.mean(1, keepdim=True)),
    "convolution": lambda m, x, inputs: two_layers(m, x, inputs) + F.conv1d(x.mT, m.conv.weight, padding=1).mT,
}


@every_kind
@pytest.mark.parametrize("path", BESIDE.values(), ids=BESIDE)
@pytest.mark.parametrize("at", [-1, 2, slice(None)], ids=str)
def test_a_path_beside_the_layers_is_refused_whichever_position_is_read(
    kind: str, path: Path, at: Any, ids: Tensor
) -> None:
    model = Model(path, at)
    target = 1 if isinstance(at, int) else (3, 1)
    with pytest.raises(UnsupportedModelError, match=r"another path|reads several|mixes tokens"):
        ImplicitAttentionRollout(model).attribute(given(model, ids, kind), target)


def test_a_bag_of_words_beside_the_layers_is_refused(ids: Tensor) -> None:
    model = Model(lambda m, x, inputs: two_layers(m, x, inputs) + m.bag(inputs).unsqueeze(1))
    with pytest.raises(UnsupportedModelError, match=r"another path|reads several"):
        ImplicitAttentionRollout(model).attribute(ids, 1)


@pytest.mark.parametrize("change", [lambda x: x + x.roll(1, 1), lambda x: x.cumsum(1)], ids=["roll", "sum"])
def test_code_behind_the_last_layer_that_mixes_tokens_is_refused(change: Any, ids: Tensor) -> None:
    model = Model(lambda m, x, inputs: change(two_layers(m, x, inputs)), slice(None))
    with pytest.raises(UnsupportedModelError, match="mixes tokens"):
        ImplicitAttentionRollout(model).attribute(ids, (5, 1))


@every_kind
@pytest.mark.parametrize("read", [lambda x: x[:, [-1]], lambda x: x.mean(1, True), lambda x: x.amax(1, True)])
def test_the_score_may_be_read_at_any_tokens(kind: str, read: Any, ids: Tensor) -> None:
    model = Model(lambda m, x, inputs: read(two_layers(m, x, inputs)), 0)
    assert ImplicitAttentionRollout(model).attribute(given(model, ids, kind), 1).isfinite().all()


def test_the_position_that_is_read_may_depend_on_the_ids() -> None:
    """As the last token before the end mark, which other ids move."""
    model = Model(two_layers, slice(None))

    def read(ids: Tensor) -> Tensor:
        return model(ids)[torch.arange(len(ids)), ids.ne(3).sum(1) - 1]

    ids = torch.tensor([[5, 6, 7, 8, 3, 3, 3], [5, 6, 7, 8, 9, 4, 3]])
    scores = ImplicitAttentionRollout(read, model).attribute(ids, 1)
    assert scores[0, 4:].eq(0).all() and scores[:, :4].gt(0).all()


# --- Nothing is stale ---------------------------------------------------------------------------------------------


def mixed_later(m: Any, x: Tensor, inputs: Tensor) -> Tensor:
    return two_layers(m, x, inputs) + F.conv1d(x.mT, m.conv.weight, padding=1).mT


def by_data(model: Any) -> None:
    model.conv.weight.data.normal_()


def in_place(model: Any) -> None:
    with torch.no_grad():
        model.conv.weight.add_(1.0)


def anew(model: Any) -> None:
    model.conv.weight = nn.Parameter(torch.randn(8, 8, 3))


def by_hook(model: Any) -> None:
    model.norm.register_forward_hook(lambda module, args, output: output + output.roll(1, 1))


def by_function(model: Any) -> None:
    model.path = lambda m, x, inputs: two_layers(m, x, inputs) + x.roll(1, 1)


@every_kind
@pytest.mark.parametrize("change", [by_data, in_place, anew, by_hook, by_function])
def test_a_changed_model_is_examined_again(kind: str, change: Callable[[Any], None], ids: Tensor) -> None:
    model = Model(mixed_later)
    nn.init.zeros_(model.conv.weight)
    inputs = given(model, ids, kind)
    ImplicitAttentionRollout(model).attribute(inputs, 1)
    change(model)
    with pytest.raises(UnsupportedModelError):
        ImplicitAttentionRollout(model).attribute(inputs, 1)


class Switched(nn.Module):
    """Mixes tokens by a buffer, or by a flag."""

    def __init__(self) -> None:
        super().__init__()
        self.factor: Tensor
        self.register_buffer("factor", torch.zeros(1))
        self.on = False

    def forward(self, x: Tensor) -> Tensor:
        return x + self.factor * x.roll(1, 1) + (x.roll(2, 1) if self.on else 0)


@pytest.mark.parametrize("what", ["buffer", "flag"])
def test_buffers_and_flags_are_part_of_a_model(what: str, ids: Tensor) -> None:
    model = Model(lambda m, x, inputs: two_layers(m, m.switch(x), inputs))
    switch = model.switch = Switched().eval()
    ImplicitAttentionRollout(model).attribute(ids, 1)
    if what == "buffer":
        switch.factor.data.fill_(1.0)
    else:
        switch.on = True
    with pytest.raises(UnsupportedModelError, match="Switched"):
        ImplicitAttentionRollout(model).attribute(ids, 1)


def test_a_partial_is_its_function_with_these_arguments(ids: Tensor) -> None:
    """It may be made anew for each call; other arguments are examined anew."""
    model, runs = Model(two_layers), []

    def read(how: Any, ids: Tensor, scale: float) -> Tensor:
        runs.append(how)
        x = scale * model(ids)
        return x if how is None else x + model.head(model.embed(ids)).mean(1)

    def runs_of(how: Any, scale: float) -> int:
        before = len(runs)
        ImplicitAttentionRollout(partial(partial(read, how), scale=scale), model).attribute(ids, 1)
        return len(runs) - before

    assert runs_of(None, 1.0) > 1 and runs_of(None, 1.0) == 1
    assert runs_of(None, 2.0) > 1 and runs_of(None, 1.0) == 1
    with pytest.raises(UnsupportedModelError):
        runs_of(torch.ones(1), 1.0)


@pytest.mark.parametrize("argument", [1, True, 1.0, "a", torch.ones(()), [1], (1, torch.ones(2))], ids=repr)
def test_other_arguments_are_examined_anew(argument: Any, ids: Tensor) -> None:
    def path(m: Any, x: Tensor, inputs: Tensor, how: Any) -> Tensor:
        x = two_layers(m, x, inputs)
        return x if how is None else x + pooled(m, x)[:, :1] * 0 + m.embed(inputs).mean(1, keepdim=True)

    model = Model(path)
    method = ImplicitAttentionRollout(model)
    method.attribute(ids, 1, (None,))
    with pytest.raises(UnsupportedModelError):
        method.attribute(ids, 1, (argument,))
    method.attribute(ids, 1, (None,))


def test_the_values_of_a_tensor_argument_are_compared(ids: Tensor) -> None:
    model = Model(lambda m, x, inputs, order: x + m.mix[0](m.norm(x)[:, order[0]])[:, order[0].argsort()])
    method = ImplicitAttentionRollout(model)
    order = torch.arange(7).expand(2, -1).contiguous()
    one = method.attribute(ids, 1, order)
    order.copy_(order.flip(1))  # the same tensor
    assert one[:, :-1].gt(0).all() and method.attribute(ids, 1, order)[:, :-1].eq(0).all()


def test_a_function_with_other_enclosed_values_is_examined_anew(ids: Tensor) -> None:
    model, mean = Model(two_layers, slice(None)), False

    def read(ids: Tensor) -> Tensor:
        return model(ids)[:, -1] + (model.head(model.embed(ids)).mean(1) if mean else 0)

    method = ImplicitAttentionRollout(read, model)
    method.attribute(ids, 1)
    mean = True
    with pytest.raises(UnsupportedModelError, match="another path"):
        method.attribute(ids, 1)


# --- Codes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("length", [1, 2, 3, 6, 7, 20, 21, 100])
def test_no_code_contains_another(length: int) -> None:
    codes = token_codes(length)
    contains = (codes.unsqueeze(0) & ~codes.unsqueeze(1)).any(-1)  # [i, j]: whether j has a round without i
    assert codes.shape[0] == length and torch.equal(contains, ~torch.eye(length, dtype=torch.bool))


@pytest.mark.parametrize("seed", range(10))
def test_the_token_that_is_read_is_decoded(seed: int) -> None:
    """Against all pairs, one by one: source j of reader i."""
    torch.manual_seed(seed)
    L = int(torch.randint(2, 9, ()))
    reads = torch.rand(3, L, L) < 1 / L  # reader i, source j
    reads[0], reads[1] = torch.eye(L, dtype=torch.bool)[torch.randperm(L)], reads[1] & torch.eye(L, dtype=torch.bool)
    observed = torch.zeros(3, L, token_codes(L).shape[1], dtype=torch.bool)
    for b, i, j in product(range(3), range(L), range(L)):
        if reads[b, i, j]:
            observed[b, j] |= token_codes(L)[i]
    readers = decoded(observed, L)
    for b, j in product(range(3), range(L)):
        found = reads[b, :, j].nonzero().flatten().tolist()
        assert int(readers[b, j]) == (found[0] if len(found) == 1 else SEVERAL if found else NONE)
    here = torch.arange(L).expand(1, -1)
    for b in range(3):
        source = sources(readers[b : b + 1], here, L)[0]
        several = bool((reads[b].sum(0) > 1).any())
        for i in range(L):
            found = reads[b, i].nonzero().flatten().tolist()
            expected = SEVERAL if several or len(found) > 1 else found[0] if found else NONE
            assert int(source[i]) == expected
        own = torch.eye(L, dtype=torch.bool)
        assert reaches_itself_alone(observed[b : b + 1]) == (not bool((reads[b] & ~own).any()))


def test_a_rearranged_matrix_is_its_entries_in_another_order() -> None:
    order = torch.stack([torch.randperm(5) for _ in range(2)])
    matrix, s = torch.randn(2, 5, 5), torch.randn(3, 2, 5)
    expected = torch.zeros(2, 5, 5)
    for b, i, j in product(range(2), range(5), range(5)):
        expected[b, order[b, i], order[b, j]] = matrix[b, i, j]
    rearranged = RearrangedMatrix(DenseMatrix(matrix), order)
    assert torch.equal(rearranged.dense(), expected)
    assert_close(rearranged.apply(s), DenseMatrix(expected).apply(s))
    assert_close(rearranged.adjoint(s), DenseMatrix(expected).adjoint(s))
