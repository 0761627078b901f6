"""How mixers are wired is measured on the model's graph, and a rollout follows exactly that."""

import random
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor, nn

from captum_ssm import ImplicitAttentionRollout, LayerImplicitAttention, Wire, register, register_wire, unregister
from captum_ssm.layers import wires as wires_module
from captum_ssm.layers.call import LayerCall
from captum_ssm.layers.mixers import find_mixers
from captum_ssm.layers.registry import Registry
from captum_ssm.layers.wires import block_name, find_wire
from captum_ssm.matrices.rollout import RolloutLayer, rollout
from captum_ssm.matrices.token_matrix import DenseMatrix
from captum_ssm.network.examination import examine
from captum_ssm.network.graph import EMBEDDINGS, Junction, ResidualGraph
from captum_ssm.network.recording import record_mixers
from captum_ssm.operators import CausalConv, Chain, Projection
from tests import oracles
from tests.families import VOCABULARY

E = EMBEDDINGS


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1e-3)


def stream(*numbers: int) -> frozenset[int]:
    return frozenset(numbers)


class Mix(nn.Module):
    """``y = out(conv(into(x)))`` with four taps: its attention is the same for each input."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(width, 6), nn.Linear(6, 8)
        self.taps = nn.Parameter(torch.randn(6, 4))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(oracles.conv(self.into(x), self.taps))


@pytest.fixture(autouse=True)
def registered() -> Iterator[None]:
    def mix(mixer: Any, x: Tensor, kwargs: Any) -> Chain:
        into, out = (Projection(layer.weight, layer.bias) for layer in (mixer.into, mixer.out))
        return Chain({"out": out, "conv": CausalConv(mixer.taps), "in": into})

    register("Mix")(mix)
    yield
    unregister("Mix")


# --- Models of every wiring ---------------------------------------------------------------------------------------


def sequential(m: Any, x: Tensor) -> Tensor:
    for number in range(3):
        x = x + m.mix[number](m.norm(x))
    return x


def with_mlp(m: Any, x: Tensor) -> Tensor:
    for number in range(3):
        x = x + m.mix[number](m.norm(x))
        x = x + m.mlp(m.norm(x)).tanh()
    return m.norm(x)


def with_positions(m: Any, x: Tensor) -> Tensor:
    """Both as a parameter and by another embedding."""
    return sequential(m, x + m.shift + m.position(torch.arange(x.shape[1])).unsqueeze(0))


def side_by_side(m: Any, x: Tensor) -> Tensor:
    n = m.norm(x)
    x = x + m.mix[0](n) + m.mix[1](n)
    return x + m.mix[2](m.norm(x))


def all_at_once(m: Any, x: Tensor) -> Tensor:
    return x + m.mix[0](x) + m.mix[1](x) + m.mix[2](x)


def on_a_branch(m: Any, x: Tensor) -> Tensor:
    """As Zamba's shared transformer, which the next mixer reads and nothing else."""
    t = m.mlp(m.mix[0](m.norm(x)))
    x = x + m.mix[1](m.norm(x + t))
    return x + m.mix[2](m.norm(x))


def on_two_branches(m: Any, x: Tensor) -> Tensor:
    """The same module both times, before it is called a third time on the stream itself."""
    for number in (1, 2):
        t = m.mix[0](m.norm(x))
        x = x + m.mix[number](m.norm(x + t))
    return x + m.mix[0](m.norm(x))


def without_residual(m: Any, x: Tensor) -> Tensor:
    for number in range(3):
        x = m.mix[number](m.norm(x)).tanh()
    return x


def residual_at_first(m: Any, x: Tensor) -> Tensor:
    x = x + m.mix[0](m.norm(x))
    return m.mix[2](m.mix[1](m.norm(x)))


def residual_at_last(m: Any, x: Tensor) -> Tensor:
    x = m.mix[0](m.norm(x))
    x = x + m.mix[1](m.norm(x))
    return x + m.mix[2](m.norm(x))


def two_streams(m: Any, x: Tensor) -> Tensor:
    """The embeddings are in both, and count once."""
    a, b = x + m.mix[0](x), m.mix[1](x)
    return m.norm(a + m.mix[2](m.norm(a)) + b)


def skipping(m: Any, x: Tensor) -> Tensor:
    """The last layer reads what was there before the second one, the output all of it."""
    first = x + m.mix[0](m.norm(x))
    second = first + m.mix[1](m.norm(first))
    return second + m.mix[2](m.norm(first))


def of_a_constant(m: Any, x: Tensor) -> Tensor:
    """The first layer reads parameters alone."""
    x = x + m.mix[0](m.shift.expand(len(x), x.shape[1], -1))
    x = x + m.mix[1](m.norm(x))
    return x + m.mix[2](m.norm(x))


class Case(NamedTuple):
    """A model, its wiring, its junctions from the last to the first, and its streams as the oracle wants them."""

    path: Callable[[Any, Tensor], Tensor]
    reads: list[frozenset[int]]
    output: frozenset[int]
    junctions: list[Junction]
    streams: dict[str, tuple[str | None, list[tuple[int, str]]]]
    mixers: tuple[int, ...] = (0, 1, 2)


SEQUENTIAL: Any = (
    [stream(E), stream(E, 0), stream(E, 0, 1)],
    stream(E, 0, 1, 2),
    [
        Junction(stream(E, 0, 1, 2), stream(E, 0, 1), (2,)),
        Junction(stream(E, 0, 1), stream(E, 0), (1,)),
        Junction(stream(E, 0), stream(E), (0,)),
    ],
    {"s0": ("e", [(0, "e")]), "s1": ("s0", [(1, "s0")]), "s2": ("s1", [(2, "s1")])},
)
CASES = [
    Case(sequential, *SEQUENTIAL),
    Case(with_mlp, *SEQUENTIAL),
    Case(with_positions, *SEQUENTIAL),
    Case(
        side_by_side, [stream(E), stream(E), stream(E, 0, 1)], stream(E, 0, 1, 2),
        [Junction(stream(E, 0, 1, 2), stream(E, 0, 1), (2,)), Junction(stream(E, 0, 1), stream(E), (0, 1))],
        {"s1": ("e", [(0, "e"), (1, "e")]), "s2": ("s1", [(2, "s1")])},
    ),
    Case(
        all_at_once, [stream(E)] * 3, stream(E, 0, 1, 2), [Junction(stream(E, 0, 1, 2), stream(E), (0, 1, 2))],
        {"s": ("e", [(0, "e"), (1, "e"), (2, "e")])},
    ),
    Case(
        on_a_branch, [stream(E), stream(E, 0), stream(E, 1)], stream(E, 1, 2),
        [
            Junction(stream(E, 1, 2), stream(E, 1), (2,)), Junction(stream(E, 1), stream(E), (1,)),
            Junction(stream(E, 0), stream(E), (0,)),
        ],
        {"t": ("e", [(0, "e")]), "s1": ("e", [(1, "t")]), "s2": ("s1", [(2, "s1")])},
    ),
    Case(
        on_two_branches, [stream(E), stream(E, 0), stream(E, 1), stream(E, 1, 2), stream(E, 1, 3)], stream(E, 1, 3, 4),
        [
            Junction(stream(E, 1, 3, 4), stream(E, 1, 3), (4,)), Junction(stream(E, 1, 3), stream(E, 1), (3,)),
            Junction(stream(E, 1, 2), stream(E, 1), (2,)), Junction(stream(E, 1), stream(E), (1,)),
            Junction(stream(E, 0), stream(E), (0,)),
        ],
        {
            "t": ("e", [(0, "e")]), "s": ("e", [(1, "t")]), "t2": ("s", [(2, "s")]), "s2": ("s", [(3, "t2")]),
            "s3": ("s2", [(4, "s2")]),
        },
        (0, 1, 0, 2, 0),
    ),
    Case(
        without_residual, [stream(E), stream(0), stream(1)], stream(2),
        [Junction(stream(2), None, (2,)), Junction(stream(1), None, (1,)), Junction(stream(0), None, (0,))],
        {"a": (None, [(0, "e")]), "b": (None, [(1, "a")]), "c": (None, [(2, "b")])},
    ),
    Case(
        residual_at_first, [stream(E), stream(E, 0), stream(1)], stream(2),
        [
            Junction(stream(2), None, (2,)), Junction(stream(1), None, (1,)),
            Junction(stream(E, 0), stream(E), (0,)),
        ],
        {"a": ("e", [(0, "e")]), "b": (None, [(1, "a")]), "c": (None, [(2, "b")])},
    ),
    Case(
        residual_at_last, [stream(E), stream(0), stream(0, 1)], stream(0, 1, 2),
        [
            Junction(stream(0, 1, 2), stream(0, 1), (2,)), Junction(stream(0, 1), stream(0), (1,)),
            Junction(stream(0), None, (0,)),
        ],
        {"a": (None, [(0, "e")]), "b": ("a", [(1, "a")]), "c": ("b", [(2, "b")])},
    ),
    Case(
        two_streams, [stream(E), stream(E), stream(E, 0)], stream(E, 0, 1, 2),
        [Junction(stream(E, 0, 1, 2), stream(E, 0), (1, 2)), Junction(stream(E, 0), stream(E), (0,))],
        {"a": ("e", [(0, "e")]), "out": ("a", [(1, "e"), (2, "a")])},
    ),
    Case(
        skipping, [stream(E), stream(E, 0), stream(E, 0)], stream(E, 0, 1, 2),
        [Junction(stream(E, 0, 1, 2), stream(E, 0), (1, 2)), Junction(stream(E, 0), stream(E), (0,))],
        {"a": ("e", [(0, "e")]), "out": ("a", [(1, "a"), (2, "a")])},
    ),
    Case(
        of_a_constant, [stream(), stream(E, 0), stream(E, 0, 1)], stream(E, 0, 1, 2), SEQUENTIAL[2],
        {"s0": ("e", [(0, "nothing")]), "s1": ("s0", [(1, "s0")]), "s2": ("s1", [(2, "s1")])},
    ),
]  # fmt: skip
every_case = pytest.mark.parametrize("case", CASES, ids=lambda case: case.path.__name__)


class Model(nn.Module):
    """Three mixers on a path; (B, 3) scores of the last token of ids or of embeddings."""

    def __init__(self, path: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__()
        self.embed, self.position, self.head = nn.Embedding(VOCABULARY, 8), nn.Embedding(9, 8), nn.Linear(8, 3)
        self.norm, self.mlp, self.shift = nn.LayerNorm(8), nn.Linear(8, 8), nn.Parameter(torch.empty(1, 1, 8))
        self.mix = nn.ModuleList(Mix() for _ in range(3))
        self.path = path
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)
        self.eval()

    def forward(self, inputs: Tensor) -> Tensor:
        x = inputs if inputs.is_floating_point() else self.embed(inputs)
        return self.head(self.path(self, x)[:, -1])


def record(model: nn.Module, inputs: Tensor) -> list[LayerCall]:
    with torch.no_grad(), record_mixers(model) as calls:
        model(inputs)
    return calls


def measure(model: nn.Module, inputs: Tensor) -> ResidualGraph:
    return examine(model, record(model, inputs), inputs, torch.ones(inputs.shape[:2]), model, model)


# --- Junctions ----------------------------------------------------------------------------------------------------


@every_case
def test_the_junctions_lead_from_the_output_back_to_the_embeddings(case: Case) -> None:
    found = list(ResidualGraph(case.reads, case.output).junctions())
    assert sorted(found, key=str) == sorted(case.junctions, key=str)
    for number, junction in enumerate(found):  # all that a junction reads comes after it
        read = {junction.base, *(case.reads[mixer] for mixer in junction.mixers)}
        assert not read & {earlier.stream for earlier in found[: number + 1]}
        assert junction.stream == (junction.base or stream()) | stream(*junction.mixers)


def test_embeddings_alone_have_no_junction() -> None:
    assert list(ResidualGraph([], stream(E)).junctions()) == []
    assert list(ResidualGraph([stream(E)], stream(E)).junctions()) == []


def test_a_stream_without_embeddings_is_no_base_of_its_own_sum_with_them() -> None:
    """``e + m0 + m1`` where another mixer reads ``m0 + m1`` alone: the residual path is that of the embeddings."""
    found = list(ResidualGraph([stream(E), stream(E), stream(0, 1)], stream(E, 0, 1, 2)).junctions())
    assert found[0] == Junction(stream(E, 0, 1, 2), stream(E), (0, 1, 2))
    assert Junction(stream(0, 1), None, (0, 1)) in found


@pytest.mark.parametrize("seed", range(5))
def test_nested_streams_of_the_same_last_mixer_come_the_larger_first(seed: int) -> None:
    nested = [stream(E, *range(start, 4)) for start in range(4)]
    draw = random.Random(seed)
    wired = ResidualGraph([stream(E)] * 4 + draw.sample(nested, 4), stream(E, *range(8)))
    found = [junction.stream for junction in wired.junctions()]
    assert found == [wired.output, *nested]


@pytest.mark.parametrize("seed", range(40))
def test_of_any_wiring_each_junction_comes_before_all_that_it_reads(seed: int) -> None:
    draw = random.Random(seed)
    reads = [frozenset(draw.sample(range(-1, k), draw.randint(1, k + 1))) for k in range(draw.choice([2, 4, 6]))]
    output = stream(*draw.sample(range(-1, len(reads)), draw.randint(1, len(reads))))
    streams = {output, *reads, stream(E)}
    passed: set[Any] = set()
    for junction in ResidualGraph(reads, output).junctions():
        assert junction.stream in streams - passed - {stream(E)}
        passed.add(junction.stream)
        read = {junction.base, *(reads[mixer] for mixer in junction.mixers)}
        assert not read & passed
        bases = [s for s in streams if s < junction.stream and (E in s) >= (E in junction.stream)]
        assert len(junction.base or stream()) == max(map(len, bases), default=0)
        assert junction.base in [*bases, None]
        assert junction.mixers == tuple(sorted(junction.stream - (junction.base or stream())))
    assert passed == streams - {stream(E)}


# --- Measured on a model ------------------------------------------------------------------------------------------


@every_case
@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
@pytest.mark.parametrize("embeddings", [False, True], ids=["ids", "embeddings"])
def test_what_each_mixer_reads_is_measured(
    case: Case, frozen: bool, embeddings: bool, ids: Tensor, unchanged: Any
) -> None:
    model = Model(case.path).requires_grad_(not frozen)
    inputs = model.embed(ids).detach() if embeddings else ids
    with unchanged(model, inputs):
        found = measure(model, inputs)
    assert list(found.reads) == case.reads
    assert found.output == case.output
    assert measure(model, inputs) is found  # remembered


@every_case
def test_it_is_measured_whatever_the_grad_mode(case: Case, ids: Tensor) -> None:
    for mode in (torch.no_grad, torch.enable_grad):
        model = Model(case.path)
        with mode():
            found = measure(model, ids)
        assert (list(found.reads), found.output) == (case.reads, case.output)


class Functional(Model):
    """Looks its embeddings up in a parameter of its own, without a module for it."""

    def __init__(self, path: Callable[[Any, Tensor], Tensor]) -> None:
        super().__init__(path)
        self.table = nn.Parameter(self.embed.weight.detach().clone())
        del self.embed

    def forward(self, inputs: Tensor) -> Tensor:
        return self.head(self.path(self, self.table[inputs])[:, -1])


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_embeddings_without_a_module_are_embeddings(frozen: bool, ids: Tensor) -> None:
    found = measure(Functional(sequential).requires_grad_(not frozen), ids)
    assert (list(found.reads), found.output) == SEQUENTIAL[:2]


def test_a_forward_function_may_embed_by_itself(ids: Tensor) -> None:
    """As where a user hooks a model's blocks up by hand: a residual path outside of all modules."""
    model, table = Model(sequential), torch.randn(VOCABULARY, 8)

    def forward(ids: Tensor) -> Tensor:
        return model(table[ids])

    with torch.no_grad(), record_mixers(model) as calls:
        forward(ids)
    found = examine(model, calls, ids, torch.ones(ids.shape), forward, model)
    assert (list(found.reads), found.output) == SEQUENTIAL[:2]


@pytest.mark.parametrize("frozen", [False, True], ids=["trainable", "frozen"])
def test_a_residual_path_outside_of_all_modules_is_seen(frozen: bool, ids: Tensor) -> None:
    model = Model(sequential).requires_grad_(not frozen)
    x = model.embed(ids).detach()

    def forward(x: Tensor) -> Tensor:
        return model.head(sequential(model, x)[:, -1])

    with torch.no_grad(), record_mixers(model) as calls:
        forward(x)
    found = examine(model, calls, x, torch.ones(ids.shape), forward, model)
    assert (list(found.reads), found.output) == SEQUENTIAL[:2]


def test_another_forward_function_of_the_same_model_is_measured_again(ids: Tensor) -> None:
    """It reads the stream before the last mixer, as one of a hidden state."""

    def early(m: Any, x: Tensor) -> Tensor:
        before = x + m.mix[0](m.norm(x))
        m.mix[1](m.norm(before))
        return before

    def late(m: Any, x: Tensor) -> Tensor:
        before = x + m.mix[0](m.norm(x))
        return before + m.mix[1](m.norm(before))

    def scores(model: Any, path: Callable[[Any, Tensor], Tensor]) -> Tensor:
        read = lambda ids: model.head(path(model, model.embed(ids))[:, -1])  # noqa: E731
        return ImplicitAttentionRollout(read, model, fusion="absolute").attribute(ids, target=1, query=-1)

    one, two = Model(late), Model(early)
    one.mix[2], two.mix[2] = nn.Identity().eval(), nn.Identity().eval()
    expected = scores(two, early)
    assert float((scores(one, late) - expected).abs().max()) > 1e-2
    assert_close(scores(one, early), expected, 1e-6)


# --- Rollouts -----------------------------------------------------------------------------------------------------


def matrices_of(count: int, signed: bool, L: int = 5) -> list[Tensor]:
    made = torch.randn(count, 2, L, L, dtype=torch.float64).tril()
    return list(made if signed else made.abs())


class Layers:
    """Layers by number, and the numbers that were asked for."""

    def __init__(self, layer: Callable[[int], RolloutLayer]) -> None:
        self.layer = layer
        self.asked: list[int] = []

    def __getitem__(self, number: int) -> RolloutLayer:
        self.asked.append(number)
        return self.layer(number)


def run(case: Case, matrices: list[Tensor], keep: Any, embedded: Any, query: Tensor) -> Tensor:
    layers = Layers(lambda number: RolloutLayer(DenseMatrix(matrices[number]), keep[number], embedded[number]))
    scores = rollout(layers, ResidualGraph(case.reads, case.output), query)
    assert sorted(layers.asked) == [*range(len(case.reads))]
    assert layers.asked[0] in case.junctions[0].mixers  # the last ones first
    return scores


@every_case
@pytest.mark.parametrize("signed", [False, True])
@pytest.mark.parametrize("seed", range(3))
def test_a_rollout_is_the_product_of_the_streams_matrices(case: Case, signed: bool, seed: int) -> None:
    torch.manual_seed(seed)
    count = len(case.reads)
    matrices, query = matrices_of(count, signed), torch.rand(2, 5, dtype=torch.float64)
    one, none = [torch.ones_like(query)] * count, [torch.zeros_like(query)] * count
    scores = run(case, matrices, one, none, query)
    assert_close(scores, oracles.wired_rollout(case.streams, matrices, query))
    if not signed and case.path is not of_a_constant:
        assert_close(scores.sum(1), query.sum(1))  # shares: relevance is handed on undiminished
    keep = dict(enumerate(torch.rand(count, 2, 5, dtype=torch.float64) + 0.1))
    for junction in case.junctions:  # layers side by side share the residual path
        keep.update(dict.fromkeys(junction.mixers, keep[junction.mixers[0]]))
    embedded = dict(enumerate(torch.rand(count, 2, 5, dtype=torch.float64)))
    scores = run(case, matrices, keep, embedded, query)
    assert_close(scores, oracles.wired_rollout(case.streams, matrices, query, keep, embedded))


def test_a_row_without_residual_path_nor_attention_hands_nothing_on() -> None:
    matrices, query = matrices_of(1, False), torch.ones(2, 5, dtype=torch.float64)
    matrices[0][:, 2] = 0
    case = Case(without_residual, [stream(E)], stream(0), [Junction(stream(0), None, (0,))], {"a": (None, [(0, "e")])})
    scores = run(case, matrices, [query], [0 * query], query)
    assert scores.isfinite().all()
    assert_close(scores.sum(1), torch.full((2,), 4.0, dtype=torch.float64))
    assert_close(scores, oracles.wired_rollout(case.streams, matrices, query))


def test_a_rollout_of_no_layers_is_the_query() -> None:
    query = torch.rand(2, 5)
    assert torch.equal(rollout([], ResidualGraph([], stream(E)), query), query)


def test_what_does_not_reach_the_embeddings_has_no_score() -> None:
    query = torch.rand(2, 5)
    layer = RolloutLayer(DenseMatrix(torch.rand(2, 5, 5)), query, 0 * query)
    assert rollout([layer], ResidualGraph([stream()], stream(0)), query).eq(0).all()


def test_a_layer_beside_the_way_to_the_output_is_not_asked_for() -> None:
    query = torch.rand(2, 5)
    wired = ResidualGraph([stream(E), stream(E, 0), stream(E)], stream(E, 2))
    layers = Layers(lambda _: RolloutLayer(DenseMatrix(torch.rand(2, 5, 5)), torch.ones_like(query), 0 * query))
    rollout(layers, wired, query)
    assert layers.asked == [2]


@every_case
def test_a_models_rollout_follows_its_wiring(case: Case, ids: Tensor) -> None:
    model = Model(case.path)
    scores = ImplicitAttentionRollout(model, fusion="absolute").attribute(ids, target=1)
    fused = [LayerImplicitAttention(model, number).attribute(ids).double() for number in range(3)]
    query = torch.zeros(2, 7, dtype=torch.float64)
    query[:, -1] = 1
    expected = oracles.wired_rollout(case.streams, [fused[number] for number in case.mixers], query)
    assert_close(scores.double(), expected, 1e-5)
    x = model.embed(ids).detach()
    assert_close(
        ImplicitAttentionRollout(model, fusion="absolute").attribute(x, target=1).sum(-1).double(), expected, 1e-5
    )


# --- Names of shared modules and repeated calls ---------------------------------------------------------------------


def test_a_module_of_several_layers_has_a_name_in_each(ids: Tensor) -> None:
    model = Model(lambda m, x: x + m.mix[1](x + m.again[0](x)) + m.again[1](x + m.mix[0](x)))
    model.again = nn.ModuleList([model.mix[0], model.mix[1]])
    assert list(find_mixers(model)) == ["mix.0", "mix.1", "mix.2", "again.0", "again.1"]
    calls = record(model, ids)
    assert [call.name for call in calls] == ["mix.0", "mix.1", "again.0", "again.1"]
    assert [call.mixer for call in calls] == [model.mix[number] for number in (0, 1, 0, 1)]


def test_further_calls_of_a_module_are_numbered(ids: Tensor) -> None:
    model = Model(lambda m, x: m.mix[1](m.mix[0](m.mix[0](m.mix[1](m.mix[0](x))))))
    assert [call.name for call in record(model, ids)] == ["mix.0", "mix.1", "mix.0#2", "mix.0#3", "mix.1#2"]
    model.again = nn.ModuleList([model.mix[0]])
    assert [call.name for call in record(model, ids)] == ["mix.0", "mix.1", "again.0", "again.0#2", "mix.1#2"]


def test_every_call_of_a_shared_module_is_checked_and_explained(ids: Tensor) -> None:
    model = Model(on_two_branches)
    method = ImplicitAttentionRollout(model, fusion="absolute")
    method.attribute(ids, target=1)
    assert list(method.fidelity) == ["mix.0#3", "mix.2", "mix.0#2", "mix.1", "mix.0"]
    assert max(method.fidelity.values()) <= 1e-5


def test_a_layer_of_a_shared_module_is_the_call_of_its_name(ids: Tensor) -> None:
    """Lengths depend on the input, so the two calls of one module differ."""
    model: Any = Model(lambda m, x: m.norm(m.again[0](5 * m.norm(m.mix[0](x)))))
    model.again = nn.ModuleList([model.mix[0]]).eval()
    first, second = (LayerImplicitAttention(model, name).attribute(ids, fusion="norm") for name in ("mix.0", "again.0"))
    x = record(model, ids)[1].x
    conv = oracles.conv_matrix(model.mix[0].taps.detach(), 7).unsqueeze(0)
    v = model.mix[0].into(x).detach()
    assert_close(second, oracles.lengths(conv.expand(2, -1, -1, -1), v, model.mix[0].out.weight.detach()), 1e-5)
    assert (first - second).abs().max() > 0.1 * second.abs().max()
    assert torch.equal(LayerImplicitAttention(model, model.mix[0]).attribute(ids, fusion="norm"), first)


# --- Wires --------------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def wires(monkeypatch: pytest.MonkeyPatch) -> Registry[Any]:
    """Forget after each test what it registered."""
    fresh = Registry[Any]("A wire", "captum_ssm.unregister_wire")
    monkeypatch.setattr(wires_module, "_WIRES", fresh)
    return fresh


class Block(nn.Module):
    """``keep(x) * x + write * mix(cat(norm(x), e))``."""

    def __init__(self, mix: Mix, write: float) -> None:
        super().__init__()
        self.inner = nn.ModuleDict({"mix": mix})
        self.write, self.norm, self.gate = write, nn.LayerNorm(8), nn.Linear(8, 1)

    def forward(self, state: Tensor, e: Tensor) -> Tensor:
        mixed = self.inner["mix"](torch.cat([self.norm(state), e], dim=-1))
        return self.gate(state).sigmoid() * state + self.write * mixed


class Other(nn.Module):
    """Another block around the first."""

    def __init__(self, block: Block) -> None:
        super().__init__()
        self.block = block

    def forward(self, state: Tensor, e: Tensor) -> Tensor:
        return self.block(state, e)


class Wired(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Embedding(VOCABULARY, 8), nn.Linear(8, 3)
        self.layers = nn.ModuleList([Block(Mix(16), 0.5), Other(Block(Mix(16), 2.0)), Block(Mix(16), 0.7)])
        generator = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5, generator=generator)
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        x = e = self.embed(ids)
        for number, layer in enumerate(self.layers):
            x = layer(state=x, e=e) if number == 1 else layer(x, e)
        return self.head(x[:, -1])


PATHS = ["layers.0.inner.mix", "layers.1.block.inner.mix", "layers.2.inner.mix"]


def test_a_name_has_one_wire(wires: Registry[Any]) -> None:
    rule = lambda block, mixer, state: Wire()  # noqa: E731
    assert register_wire("Block", "Second")(rule) is rule
    assert set(wires) == {"Block", "Second"}
    with pytest.raises(
        ValueError, match=f"wire for 'Block' is already registered by {__name__}.*once more by {__name__}"
    ):
        register_wire("Block")(rule)


def test_of_several_names_none_has_a_wire_if_one_is_taken(wires: Registry[Any]) -> None:
    rule = lambda block, mixer, state: Wire()  # noqa: E731
    register_wire("Block")(rule)
    with pytest.raises(ValueError, match="'Block'"):
        register_wire("Fresh", "Block")(rule)
    assert set(wires) == {"Block"}


def test_the_innermost_block_with_a_wire_counts() -> None:
    model, rule = Wired(), lambda block, mixer, state: Wire()
    assert [block_name(model, path) for path in PATHS] == ["", "", ""]
    register_wire("Mix", "Wired")(rule)  # neither the mixer itself is a block, nor the model
    assert [block_name(model, path) for path in PATHS] == ["", "", ""]
    register_wire("Other")(rule)
    assert [block_name(model, path) for path in PATHS] == ["", "layers.1", ""]
    register_wire("Block")(rule)
    assert [block_name(model, path) for path in PATHS] == ["layers.0", "layers.1.block", "layers.2"]
    assert block_name(model, f"{PATHS[1]}#2") == "layers.1.block"


def test_a_wire_is_asked_with_the_block_the_mixer_and_what_enters_the_block(ids: Tensor) -> None:
    asked: list[tuple[Any, ...]] = []

    @register_wire("Block")
    def wire(block: Any, mixer: Any, state: Any) -> Wire:
        asked.append((block, mixer, state))
        return Wire(write=block.write)

    model: Any = Wired()
    entered: list[Tensor] = []
    blocks = [model.layers[0], model.layers[1].block, model.layers[2]]
    handles = [
        block.register_forward_pre_hook(
            lambda m, args, kwargs: entered.append(args[0] if args else kwargs["state"]), with_kwargs=True
        )
        for block in blocks
    ]
    calls = record(model, ids)
    for handle in handles:
        handle.remove()
    for call, block, x in zip(calls, blocks, entered, strict=True):
        assert call.state is not None and torch.equal(call.state, x)
        assert find_wire(model, call.name, call.mixer, call.state) == Wire(write=block.write)
        assert asked[-1][0] is block and asked[-1][1] is call.mixer and asked[-1][2] is call.state
    state = calls[1].detach().state
    assert state is not None and not state.requires_grad


def test_a_block_without_a_wire_is_a_plain_residual_one(ids: Tensor) -> None:
    model = Wired()
    for call in record(model, ids):
        assert call.state is None
        assert find_wire(model, call.name, call.mixer, call.state) == Wire(keep=1.0, write=1.0, embeddings=None)


STREAMS: Any = SEQUENTIAL[3]


@pytest.mark.parametrize("which", ["", "keep", "write", "embeddings", "keep write embeddings"])
def test_a_rollout_uses_what_a_wire_declares(which: str, ids: Tensor, unchanged: Any) -> None:
    @register_wire("Block")
    def wire(block: Any, mixer: Any, state: Tensor) -> Wire:
        declared = {
            "keep": block.gate(state).sigmoid().squeeze(-1),
            "write": block.write,
            "embeddings": slice(8, None),
        }
        return Wire(**{name: value for name, value in declared.items() if name in which.split()})

    model = Wired()
    with unchanged(model, ids):
        scores = ImplicitAttentionRollout(model, fusion="absolute").attribute(ids, target=1)
    matrices, keep, embedded = [], {}, {}
    for number, call in enumerate(record(model, ids)):
        block: Any = model.get_submodule(PATHS[number].removesuffix(".inner.mix"))
        matrix = LayerImplicitAttention(model, number).attribute(ids).double()
        matrices.append(matrix * block.write if "write" in which else matrix)
        keep[number] = embedded[number] = torch.zeros(2, 7, dtype=torch.float64)
        keep[number] = keep[number] + 1
        if "keep" in which:
            keep[number] = block.gate(call.state).sigmoid().squeeze(-1).detach().double()
        if "embeddings" in which:
            W, x = call.mixer.get_parameter("into.weight").detach().double(), call.x.double()
            own, shared = (x[..., :8] @ W[:, :8].T).norm(dim=-1), (x[..., 8:] @ W[:, 8:].T).norm(dim=-1)
            embedded[number] = shared / (own + shared)
    query = torch.zeros(2, 7, dtype=torch.float64)
    query[:, -1] = 1
    expected = oracles.wired_rollout(STREAMS, matrices, query, keep, embedded)
    assert_close(scores.double(), expected, 1e-5)


def test_a_factor_of_the_output_may_differ_by_token(ids: Tensor) -> None:
    @register_wire("Block")
    def wire(block: Any, mixer: Any, state: Tensor) -> Wire:
        return Wire(write=block.gate(state).sigmoid().squeeze(-1))

    model = Wired()
    scores = ImplicitAttentionRollout(model, fusion="absolute").attribute(ids, target=1)
    matrices = []
    for number, call in enumerate(record(model, ids)):
        block: Any = model.get_submodule(PATHS[number].removesuffix(".inner.mix"))
        write = block.gate(call.state).sigmoid().detach().double()
        matrices.append(write * LayerImplicitAttention(model, number).attribute(ids).double())
    query = torch.zeros(2, 7, dtype=torch.float64)
    query[:, -1] = 1
    assert_close(scores.double(), oracles.wired_rollout(STREAMS, matrices, query), 1e-5)


def test_hooks_on_blocks_are_gone_after_a_run_also_on_an_error(ids: Tensor, unchanged: Any) -> None:
    register_wire("Block")(lambda block, mixer, state: Wire())
    model = Wired()
    with unchanged(model, ids):
        record(model, ids)
    handle = model.head.register_forward_hook(lambda *_: 1 / 0)
    with unchanged(model, ids), pytest.raises(ZeroDivisionError):
        record(model, ids)
    handle.remove()
