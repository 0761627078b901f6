"""Implicit and explicit attention are the same matrices, however the work is cut, and however little is held."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_ssm import (
    ImplicitAttentionAttribution,
    ImplicitAttentionRollout,
    InvalidInputError,
    LayerImplicitAttention,
    RawImplicitAttention,
    register,
    unregister,
)
from captum_ssm.layers.wires import Wire
from captum_ssm.matrices import entries as entries_module
from captum_ssm.matrices import lengths as lengths_module
from captum_ssm.matrices import rollout as rollout_module
from captum_ssm.matrices import shared_heads as heads_module
from captum_ssm.matrices import single_channels as channels_module
from captum_ssm.matrices.core_matrix import CoreMatrix, channel_matrices
from captum_ssm.matrices.entrywise import ABSOLUTE, IDENTITY, POSITIVE, SQUARE, Entrywise
from captum_ssm.matrices.fusion import fuse
from captum_ssm.matrices.rollout import RolloutLayer
from captum_ssm.matrices.split_layer import Split, SplitLayer
from captum_ssm.matrices.token_matrix import DenseMatrix, MatrixProduct, ScaledMatrix, TokenMatrix
from captum_ssm.network.graph import ResidualGraph
from captum_ssm.operators import Attention, CausalConv, Centre, Chain, Diagonal, Product, Projection, Scan
from captum_ssm.operators.device_sizes import DeviceSize
from tests import oracles
from tests.families import FAMILIES
from tests.tensors_made import Largest

SEEDS = range(6)
every_seed = pytest.mark.parametrize("seed", SEEDS)
every_head_size = pytest.mark.parametrize("P", [1, 3])

BLOCKS = [(1, 1), (7, 2), (40, 1), (100, 3), (2**21, 32)]
"""(_BLOCK, _CHANNELS): one column and channel at a time, ragged blocks, everything at once."""


def make(seed: int, P: int, dtype: torch.dtype = torch.float64) -> tuple[Chain, Tensor, Tensor, Tensor]:
    """A core of gate, scan, act and conv; its matrices (B, D, L, L) by the oracles; weights u and v."""
    torch.manual_seed(seed)
    B, L, H, N = 2, 5 + seed % 3, 2, 2
    D = H * P
    a, b, c = torch.rand(3, B, L, H, N, dtype=dtype)
    b, c, lag = b - 0.5, c - 0.5, seed % 2
    act, gate, u, v = torch.randn(4, B, L, D, dtype=dtype)
    taps, skip, bonus = torch.randn(D, 3, dtype=dtype), torch.randn(D, dtype=dtype), torch.randn(B, L, D, dtype=dtype)
    scan = Scan(a, b, c, skip=skip, bonus=bonus, head_size=P, lag=lag, chunk=4)
    core = Chain({"gate": Diagonal(gate), "scan": scan, "act": Diagonal(act), "conv": CausalConv(taps, taps[:, 0])})
    alpha = oracles.scan_alpha(a, b, c, lag, skip, bonus, P)
    matrices = oracles.diagonal_matrix(gate) @ alpha @ oracles.diagonal_matrix(act) @ oracles.conv_matrix(taps, L)
    return core, matrices, u, v


def rollout(layers: list[Any], query: Tensor) -> Tensor:
    """Roll out layers one after the other, each on a plain residual path, the first layer first."""
    reads = [frozenset(range(-1, number)) for number in range(len(layers) + 1)]
    rolled = [RolloutLayer(matrix, torch.ones_like(query), torch.zeros_like(query)) for matrix in layers]
    return rollout_module.rollout(rolled, ResidualGraph(reads[:-1], reads[-1]), query)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= tolerance * expected.abs().max().clamp(min=1)


@every_head_size
@every_seed
def test_dense_is_the_product_of_the_written_out_factors(seed: int, P: int) -> None:
    core, matrices, u, _ = make(seed, P)
    assert_close(channel_matrices(core, u), matrices)
    assert matrices.triu(1).abs().max() == 0 and channel_matrices(core, u).triu(1).abs().max() == 0


@every_head_size
@every_seed
def test_implicit_products_are_those_of_the_explicit_matrix(seed: int, P: int) -> None:
    core, matrices, u, v = make(seed, P)
    explicit = oracles.weighted(matrices, u, v).sum(1)
    implicit = CoreMatrix(core, u, v)
    s, r = torch.randn(2, *u.shape[:2], dtype=torch.float64)
    assert_close(implicit.apply(s), torch.einsum("bij,bj->bi", explicit, s))
    assert_close(implicit.adjoint(r), torch.einsum("bij,bi->bj", explicit, r))
    assert_close(implicit.dense(), explicit)
    assert_close(DenseMatrix(explicit).apply(s), implicit.apply(s))
    assert_close(DenseMatrix(explicit).adjoint(r), implicit.adjoint(r))


@every_head_size
@every_seed
def test_the_bias_of_a_factor_is_no_part_of_the_matrix(seed: int, P: int) -> None:
    core, _, u, v = make(seed, P)
    s = torch.randn(u.shape[:2], dtype=torch.float64)
    assert core.terms.count("bias") == 1
    assert_close(CoreMatrix(core.without("bias"), u, v).apply(s), CoreMatrix(core, u, v).apply(s))


FUNCTIONS = [ABSOLUTE, POSITIVE, SQUARE, Entrywise(linear=-0.3, absolute=2.0), Entrywise(1.0, 0.5, 0.25)]


@pytest.mark.parametrize("function", FUNCTIONS)
@every_head_size
@every_seed
def test_a_function_of_the_entries_comes_before_the_sum_over_channels(seed: int, P: int, function: Entrywise) -> None:
    core, matrices, u, v = make(seed, P)
    expected = function(oracles.weighted(matrices, u, v)).sum(1)
    assert_close(CoreMatrix(core, u, v).dense(function), expected)
    assert not torch.allclose(expected, function(oracles.weighted(matrices, u, v).sum(1)))


@every_head_size
@every_seed
def test_lengths_are_those_of_what_each_token_contributes(seed: int, P: int) -> None:
    core, matrices, u, v = make(seed, P)
    W = torch.randn(5, u.shape[-1], dtype=torch.float64)
    output = Chain({"out": Projection(W, torch.randn(5, dtype=torch.float64))})
    assert_close(CoreMatrix(core, u, v).lengths(output), oracles.lengths(matrices, v, W))


@every_head_size
@every_seed
def test_the_root_adds_up_the_squares_of_what_each_channel_writes(seed: int, P: int) -> None:
    core, matrices, gate, v = make(seed, P)
    inner, W = (torch.randn(rows, columns, dtype=torch.float64) for rows, columns in ((3, gate.shape[-1]), (5, 3)))
    act, real = torch.randn(*gate.shape[:2], 3, dtype=torch.float64), torch.ones_like(gate[..., :1])
    scale = Diagonal(torch.randn(5, dtype=torch.float64))
    outputs = {
        "one": Chain({"out": Projection(inner)}),
        "two": Chain({"scale": scale, "out": Projection(W), "act": Diagonal(act), "in": Projection(inner)}),
    }
    entries = oracles.weighted(matrices, torch.ones_like(v), v)  # (B, D, L, L)
    written = {
        "one": inner.square().sum(0).expand_as(gate),
        "two": torch.einsum("e,ef,blf,fd->bld", scale.s.square(), W.square(), act.square(), inner.square()),
    }
    for name, output in outputs.items():
        cut = SplitLayer("", (Split(output, core, v, None),), real, Wire(), real[..., 0])
        expected = torch.einsum("bid,bdij->bij", written[name], entries.square()).sqrt()
        assert_close(fuse(cut, "root").dense(), expected)


@pytest.mark.parametrize(
    "shared",
    ["nothing", "decay over tokens", "decay over states", "all weights over channels", "all weights over states"],
)
@pytest.mark.parametrize("K", [1, 4])
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("L", [1, 3, 16, 37, 64])
def test_the_halves_of_a_scan_join_into_its_matrices(L: int, lag: int, K: int, shared: str) -> None:
    torch.manual_seed(L)
    B, D, N = 2, 3, 2
    a, b, c = torch.rand(3, B, L, D, N, dtype=torch.float64)
    steps, rates = -torch.rand(B, L, D, 1, dtype=torch.float64), torch.rand(1, 1, D, N, dtype=torch.float64)
    if shared == "decay over tokens":
        a = a[:, :1]
    elif shared == "decay over states":
        a = a[..., :1]
    elif shared == "all weights over channels":
        b, c = b[:, :, :1], c[:, :, :1]
    elif shared == "all weights over states":
        b, c = b[..., :1], c[..., :1]
    decay = Product((a, steps, rates), exponential=True) if shared == "nothing" else Product((a,))
    w, skip, u, v = (torch.randn(*shape, dtype=torch.float64) for shape in ((D, K), (D,), (B, L, D), (B, L, D)))
    core = Chain({"scan": Scan(decay, b, c, lag=lag, skip=skip), "conv": CausalConv(w)})
    before = [factor.clone() for factor in (a, b, c)]
    alpha = oracles.scan_alpha(decay.tokens(0, L), b, c, lag, skip) @ oracles.conv_matrix(w, L)
    expected = oracles.weighted(alpha, u, v).square().sum(1)
    assert_close(CoreMatrix(core, u, v).dense(SQUARE), expected)
    assert all(torch.equal(*pair) for pair in zip(before, (a, b, c), strict=True))


@pytest.mark.parametrize(("block", "channels"), BLOCKS)
@every_head_size
@every_seed
def test_how_the_work_is_cut_never_changes_the_result(
    seed: int, P: int, block: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    core, matrices, u, v = make(seed, P)
    output = Chain({"out": Projection(torch.randn(3, u.shape[-1], dtype=torch.float64))})
    weights = output.factors["out"]
    assert isinstance(weights, Projection)
    monkeypatch.setattr(entries_module, "_BLOCK", DeviceSize(block, block))
    monkeypatch.setattr(channels_module, "_STATES", DeviceSize(block, block))
    monkeypatch.setattr(channels_module, "_ENTRIES", DeviceSize(block, block))
    monkeypatch.setattr(entries_module, "_CHANNELS", channels)
    monkeypatch.setattr(channels_module, "_CHANNELS", channels)
    monkeypatch.setattr(heads_module, "_BLOCK", DeviceSize(block, block))
    monkeypatch.setattr(heads_module, "_MATRICES", DeviceSize(20 * block, 20 * block))
    implicit = CoreMatrix(core, u, v)
    assert_close(channel_matrices(core, u), matrices)
    assert_close(implicit.dense(ABSOLUTE), oracles.weighted(matrices, u, v).abs().sum(1))
    assert_close(implicit.lengths(output), oracles.lengths(matrices, v, weights.W))


@pytest.mark.parametrize(("block", "channels"), BLOCKS)
def test_the_blocks_cover_every_column_of_every_channel_once(
    block: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entries_module, "_BLOCK", DeviceSize(block, block))
    monkeypatch.setattr(channels_module, "_STATES", DeviceSize(block, block))
    monkeypatch.setattr(channels_module, "_ENTRIES", DeviceSize(block, block))
    monkeypatch.setattr(entries_module, "_CHANNELS", channels)
    monkeypatch.setattr(channels_module, "_CHANNELS", channels)
    monkeypatch.setattr(heads_module, "_BLOCK", DeviceSize(block, block))
    monkeypatch.setattr(heads_module, "_MATRICES", DeviceSize(20 * block, 20 * block))
    for B, L, D in ((1, 1, 1), (2, 5, 7), (1, 9, 4)):
        covered = torch.zeros(L, D)
        for tokens, part in entries_module.column_blocks(torch.empty(B, L, D)):
            covered[tokens, part] += 1
            entries = B * L * (tokens.stop - tokens.start) * (part.stop - part.start)
            one_column = B * L * min(channels, D)
            assert entries <= max(block, one_column)
        assert covered.eq(1).all()


# --- Products and scaled rows -------------------------------------------------------------------------------------


@pytest.mark.parametrize("taps", [0, 1, 3, 20])
@pytest.mark.parametrize("length", [1, 5, 16, 17, 40])
@pytest.mark.parametrize("lag", [0, 1])
def test_rows_are_the_written_out_matrix_over_several_steps(length: int, lag: int, taps: int) -> None:
    torch.manual_seed(length + taps)
    B, D, N = 2, 3, 2
    shapes = [(2, length, D, 1 if length == 17 else N), (2, length, 1, N), (1, length, D, N)]
    a, b, c = (torch.rand(shape, dtype=torch.float64) - 0.3 for shape in shapes)
    skip, bonus = torch.randn(D, dtype=torch.float64), torch.randn(B, length, D, dtype=torch.float64)
    act, gate, u, v = torch.randn(4, B, length, D, dtype=torch.float64)
    total = Chain({"total": Diagonal(gate), "weights": Scan(a, b, c, skip=skip, bonus=bonus, lag=lag)})
    core = Chain({"gate": Diagonal(act), "scan": total, "act": Diagonal(gate)})
    a_, b_, c_ = (t.expand(B, length, D, N) for t in (a, b, c))
    matrices = oracles.diagonal_matrix(act) @ oracles.diagonal_matrix(gate)
    matrices = matrices @ oracles.scan_alpha(a_, b_, c_, lag, skip, bonus, 1) @ oracles.diagonal_matrix(gate)
    if taps:
        conv = torch.randn(D, taps, dtype=torch.float64)
        core = Chain({**core.factors, "conv": CausalConv(conv)})
        matrices = matrices @ oracles.conv_matrix(conv, length)
    entries = torch.einsum("bid,bdij,bjd->bdij", u, matrices, v)
    for entrywise in (IDENTITY, ABSOLUTE, POSITIVE, SQUARE):
        fused = CoreMatrix(core, u, v).dense(entrywise)
        assert_close(fused, entrywise(entries).sum(1))


def check_matrix(matrix: TokenMatrix, explicit: Tensor) -> None:
    """Products and entries are those of the explicit matrix (B, L, L)."""
    s, r = torch.randn(2, *explicit.shape[:2], dtype=explicit.dtype)
    assert_close(matrix.apply(s), (explicit @ s.unsqueeze(-1)).squeeze(-1))
    assert_close(matrix.adjoint(r), (explicit.transpose(1, 2) @ r.unsqueeze(-1)).squeeze(-1))
    assert_close(matrix.dense(), explicit)


@every_seed
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_product_is_the_product_the_first_applied_last(seed: int, count: int) -> None:
    matrices = torch.randn(count, 2, 5, 5, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    expected = matrices[0]
    for matrix in matrices[1:]:
        expected = expected @ matrix
    check_matrix(MatrixProduct(tuple(map(DenseMatrix, matrices))), expected)


@every_seed
def test_a_product_takes_implicit_matrices_too(seed: int) -> None:
    (core, matrices, u, v), (other, others, r, s) = make(seed, 1), make(seed + 6, 1)
    one, two = oracles.weighted(matrices, u, v).sum(1), oracles.weighted(others, r, s).sum(1)
    check_matrix(MatrixProduct((CoreMatrix(core, u, v), CoreMatrix(other, r, s))), one @ two)


@every_seed
def test_a_factor_scales_the_rows(seed: int) -> None:
    core, matrices, u, v = make(seed, 1)
    explicit, implicit = oracles.weighted(matrices, u, v).sum(1), CoreMatrix(core, u, v)
    rows = torch.randn(u.shape[:2], dtype=torch.float64)
    for matrix in (implicit, DenseMatrix(explicit)):
        check_matrix(ScaledMatrix(matrix, rows), rows.unsqueeze(-1) * explicit)
        check_matrix(ScaledMatrix(matrix, 0.5), 0.5 * explicit)
        check_matrix(ScaledMatrix(matrix, torch.tensor(-2.0, dtype=torch.float64)), -2 * explicit)
        check_matrix(ScaledMatrix(ScaledMatrix(matrix, rows), 3.0), 3 * rows.unsqueeze(-1) * explicit)
    assert_close(ScaledMatrix(implicit, 1).dense(), explicit)


# --- Cores that mix channels, and such as read the future -----------------------------------------------------------


def tangled(seed: int) -> tuple[Chain, Tensor, Tensor, Tensor]:
    """A core as RWKV's; its entries ``[b, i, d, j, e]`` from input e of token j to output d of token i; u and v."""
    torch.manual_seed(seed)
    B, L, D, E = 2, 4 + seed % 3, 6, 4
    a, b, c = torch.rand(3, B, L, 2, 2, dtype=torch.float64) - 0.2
    value, gate = torch.randn(D, E, dtype=torch.float64), torch.randn(B, L, D, dtype=torch.float64)
    taps = torch.randn(E, 2, dtype=torch.float64)
    core = Chain({
        "gate": Diagonal(gate), "scan": Scan(a, b, c, head_size=3), "norm": Centre(D),
        "value": Projection(value, torch.randn(D, dtype=torch.float64)), "shift": CausalConv(taps, taps[:, 0]),
    })  # fmt: skip
    outer = oracles.diagonal_matrix(gate) @ oracles.scan_alpha(a, b, c, head_size=3)
    centred = value - value.mean(0, keepdim=True)
    entries = torch.einsum("bdik,de,ekj->bidje", outer, centred, oracles.conv_matrix(taps, L))
    u, v = torch.randn(B, L, D, dtype=torch.float64), torch.randn(B, L, E, dtype=torch.float64)
    return core, entries, u, v


@every_seed
@pytest.mark.parametrize(("block", "channels"), BLOCKS)
def test_a_core_that_mixes_channels_has_the_matrix_of_what_its_tokens_add(
    seed: int, block: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``A^d_ij v_jd`` stands for channel d of what token j adds to token i."""
    monkeypatch.setattr(entries_module, "_BLOCK", DeviceSize(block, block))
    monkeypatch.setattr(channels_module, "_STATES", DeviceSize(block, block))
    monkeypatch.setattr(channels_module, "_ENTRIES", DeviceSize(block, block))
    monkeypatch.setattr(entries_module, "_CHANNELS", channels)
    monkeypatch.setattr(channels_module, "_CHANNELS", channels)
    monkeypatch.setattr(heads_module, "_BLOCK", DeviceSize(block, block))
    monkeypatch.setattr(heads_module, "_MATRICES", DeviceSize(20 * block, 20 * block))
    core, entries, u, v = tangled(seed)
    assert core.mixes_channels
    added = torch.einsum("bidje,bje->bdij", entries, v)
    assert_close(added.sum(-1).transpose(1, 2), core.apply(v))
    weighted = u.transpose(1, 2).unsqueeze(-1) * added
    implicit = CoreMatrix(core, u, v)
    check_matrix(implicit, weighted.sum(1))
    for function in FUNCTIONS:
        assert_close(implicit.dense(function), function(weighted).sum(1))
    W = torch.randn(5, u.shape[-1], dtype=torch.float64)
    output = Chain({"out": Projection(W, torch.randn(5, dtype=torch.float64))})
    lengths = torch.einsum("od,bdij->boij", W, added).norm(dim=1)
    assert_close(implicit.lengths(output), lengths)


@every_head_size
@every_seed
@pytest.mark.parametrize(("block", "channels"), BLOCKS)
def test_attention_of_the_future_is_neither_cut_nor_moved(
    seed: int, P: int, block: int, channels: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(entries_module, "_BLOCK", DeviceSize(block, block))
    monkeypatch.setattr(channels_module, "_STATES", DeviceSize(block, block))
    monkeypatch.setattr(channels_module, "_ENTRIES", DeviceSize(block, block))
    monkeypatch.setattr(entries_module, "_CHANNELS", channels)
    monkeypatch.setattr(channels_module, "_CHANNELS", channels)
    monkeypatch.setattr(heads_module, "_BLOCK", DeviceSize(block, block))
    monkeypatch.setattr(heads_module, "_MATRICES", DeviceSize(20 * block, 20 * block))
    torch.manual_seed(seed)
    B, L, H = 2, 6, 2
    weights = torch.rand(B, H, L, L, dtype=torch.float64).softmax(-1)
    gate, u, v = torch.randn(3, B, L, H * P, dtype=torch.float64)
    core = Chain({"gate": Diagonal(gate), "attention": Attention(weights, head_size=P)})
    assert not core.causal
    matrices = oracles.diagonal_matrix(gate) @ weights.repeat_interleave(P, dim=1)
    W = torch.randn(5, H * P, dtype=torch.float64)
    implicit = CoreMatrix(core, u, v)
    assert_close(channel_matrices(core, u), matrices)
    check_matrix(implicit, oracles.weighted(matrices, u, v).sum(1))
    assert_close(implicit.dense(ABSOLUTE), oracles.weighted(matrices, u, v).abs().sum(1))
    assert_close(implicit.lengths(Chain({"out": Projection(W)})), oracles.lengths(matrices, v, W))


class Tangled(nn.Module):
    """A layer with a token shift before its values, as RWKV's: ``out(gate(x) * cumsum(value(shift(x))))``."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.gate, self.out = nn.Linear(8, 6), nn.Linear(8, 6), nn.Linear(6, 8)
        self.taps = nn.Parameter(torch.randn(8, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.gate(x).sigmoid() * self.value(oracles.conv(x, self.taps)).cumsum(1))


def tangled_chain(mixer: Any, x: Tensor, kwargs: Any) -> Chain:
    one = torch.ones(1, 1, 1, 1).to(x)
    return Chain({
        "out": Projection(mixer.out.weight, mixer.out.bias), "gate": Diagonal(mixer.gate(x).sigmoid()),
        "scan": Scan(one, one, one, head_size=6), "value": Projection(mixer.value.weight, mixer.value.bias),
        "shift": CausalConv(mixer.taps),
    })  # fmt: skip


@pytest.fixture
def tangled_model() -> Iterator[nn.Module]:
    """An embedding and one tangled layer; the last token is read."""
    register("Tangled")(tangled_chain)
    yield nn.Sequential(nn.Embedding(23, 8), Tangled()).eval()
    unregister("Tangled")


def test_the_matrices_of_every_channel_are_refused_where_a_layer_mixes_them(
    tangled_model: nn.Module, ids: Tensor
) -> None:
    method = LayerImplicitAttention(tangled_model, 0)
    with pytest.raises(InvalidInputError, match=r"Layer '1' mixes .* between scan and shift.*Choose a fusion"):
        method.attribute(ids, fusion=None)
    scan = LayerImplicitAttention(tangled_model, 0, attention="scan").attribute(ids, fusion=None)
    assert_close(scan, torch.ones(7, 7).tril().expand(2, 6, 7, 7))


def test_where_a_layer_mixes_channels_its_factors_are_fused_and_multiplied(tangled_model: Any, ids: Tensor) -> None:
    layer = tangled_model[1]
    x = tangled_model[0](ids).detach()
    gate = layer.gate(x).sigmoid().detach()
    outer = oracles.diagonal_matrix(gate) @ torch.ones(7, 7).tril()
    shift = oracles.conv_matrix(layer.taps.detach(), 7).unsqueeze(0)
    method = LayerImplicitAttention(tangled_model, 0)
    for how in ("absolute", "positive", "mean"):
        expected = oracles.fused(outer, how) @ oracles.fused(shift, how)
        assert_close(method.attribute(ids, fusion=how), expected, 1e-6)
    W = layer.out.weight.detach()
    added = torch.einsum("bdik,de,ekj,bje->bdij", outer, layer.value.weight.detach(), shift[0], x)
    assert_close(method.attribute(ids, fusion="norm"), torch.einsum("od,bdij->boij", W, added).norm(dim=1), 1e-5)
    read = lambda ids: tangled_model(ids)[:, -1]  # noqa: E731
    raw = RawImplicitAttention(read, tangled_model, fusion="absolute").attribute(ids, target=1)
    assert_close(raw, method.attribute(ids)[:, -1], 1e-6)


@pytest.mark.parametrize("signed", [False, True])
@every_seed
def test_implicit_rollout_is_explicit_rollout(seed: int, signed: bool) -> None:
    layers: list[CoreMatrix | DenseMatrix] = []
    explicit = []
    for number in range(3):  # the first layer first
        core, matrices, u, v = make(seed + 6 * number, 1)  # the same length for each layer
        if signed:
            layers.append(CoreMatrix(core, u, v))
            explicit.append(oracles.weighted(matrices, u, v).sum(1))
        else:
            layers.append(DenseMatrix(CoreMatrix(core, u, v).dense(POSITIVE)))
            explicit.append(oracles.weighted(matrices, u, v).clamp(min=0).sum(1))
    query = torch.rand(explicit[0].shape[:2], dtype=torch.float64)
    scores = rollout(layers, query)
    assert_close(scores, oracles.rollout(explicit, query))
    if signed:
        assert any(C.sum(-1).lt(0).any() for C in explicit) and scores.lt(0).any()
    else:
        assert_close(scores.sum(1), query.sum(1))  # shares: relevance is handed on undiminished
        assert scores.ge(0).all()


@every_seed
def test_the_order_of_layers_matters_and_rollout_of_none_is_the_query(seed: int) -> None:
    made = [make(seed + 6 * number, 1) for number in range(2)]
    layers = [CoreMatrix(core, u, v) for core, _, u, v in made]
    query = torch.rand(made[0][2].shape[:2], dtype=torch.float64)
    assert torch.equal(rollout([], query), query)
    assert not torch.allclose(rollout(layers, query), rollout(layers[::-1], query))


@every_seed
def test_the_mean_row_is_the_query_row_of_the_mean_matrix(seed: int) -> None:
    made = [make(seed + 6 * number, 1) for number in range(3)]
    query = torch.rand(made[0][2].shape[:2], dtype=torch.float64)
    explicit = sum(oracles.weighted(matrices, u, v).sum(1) for _, matrices, u, v in made) / 3
    row = rollout_module.mean_row([CoreMatrix(core, u, v) for core, _, u, v in made], query)
    assert_close(row, torch.einsum("bi,bij->bj", query, explicit))


# --- Memory -------------------------------------------------------------------------------------------------------


@contextmanager
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    with monkeypatch.context() as patch:
        patch.setattr(entries_module, "_BLOCK", DeviceSize(2**9, 2**9))
        patch.setattr(channels_module, "_STATES", DeviceSize(2**9, 2**9))
        patch.setattr(channels_module, "_ENTRIES", DeviceSize(2**9, 2**9))
        patch.setattr(entries_module, "_CHANNELS", 1)
        patch.setattr(channels_module, "_CHANNELS", 1)
        patch.setattr(heads_module, "_BLOCK", DeviceSize(2**9, 2**9))
        patch.setattr(heads_module, "_MATRICES", DeviceSize(2**9, 2**9))
        patch.setattr(lengths_module, "_VECTORS_AT_ONCE", DeviceSize(2**5, 2**5))
        yield


@pytest.mark.parametrize("function", [IDENTITY, POSITIVE])
def test_fused_attention_never_holds_a_matrix_of_every_channel(
    function: Entrywise, monkeypatch: pytest.MonkeyPatch
) -> None:
    B, L, D, N = 2, 32, 24, 2
    torch.manual_seed(0)
    a, b, c = (torch.rand(B, L, D, N) for _ in range(3))
    u, v = torch.randn(2, B, L, D)
    implicit = CoreMatrix(Chain({"gate": Diagonal(u), "scan": Scan(a, b, c)}), u, v)
    with small_blocks(monkeypatch), Largest() as largest:
        implicit.dense(function)
    assert B * L * L <= largest.entries < B * D * L * L // 8
    with Largest() as largest:
        implicit.apply(u[..., 0])
        implicit.adjoint(u[..., 0])
        rollout([implicit, implicit], u[..., 0].abs())
    assert largest.entries <= 2 * B * L * D * N  # no (L, L) matrix of any channel


def test_a_scan_of_factors_holds_the_states_of_one_chunk_only() -> None:
    B, L, D, N = 1, 64, 8, 4
    torch.manual_seed(0)
    step, A, b, c = torch.rand(B, L, D, 1), -torch.rand(1, 1, D, N), torch.rand(B, L, 1, N), torch.rand(B, L, 1, N)
    scan = Scan(Product((step, A), exponential=True), Product((step, b)), c, chunk=8)
    with Largest() as largest:
        scan.apply(torch.rand(B, L, D))
        scan.adjoint(torch.rand(B, L, D))
    assert largest.entries <= B * L * D < B * L * D * N


METHODS: dict[str, Callable[[nn.Module], Any]] = {
    "channel": ImplicitAttentionAttribution,
    "token": lambda model: ImplicitAttentionAttribution(model, rectify="token"),
    "signed": lambda model: ImplicitAttentionAttribution(model, rectify=None),
    "rollout": lambda model: ImplicitAttentionRollout(model, fusion="absolute"),
    "raw norm": lambda model: RawImplicitAttention(model, fusion="norm"),
}


@pytest.mark.parametrize("method", METHODS)
def test_no_method_ever_holds_a_matrix_of_every_channel(
    method: str, mamba: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    B, L = 1, 64
    ids = torch.randint(1, 20, (B, L))
    with small_blocks(monkeypatch), Largest() as largest:
        scores = METHODS[method](mamba).attribute(ids, target=3)
    assert scores.shape == (B, L)
    assert largest.entries < B * L * L if method == "signed" else largest.entries == B * L * L


def test_a_layer_of_every_channel_is_the_matrix_of_every_channel(family: nn.Module, ids: Tensor) -> None:
    """The one call that asks for (B, D, L, L) gets what the others only fuse."""
    method = LayerImplicitAttention(family, 0)
    every = method.attribute(ids, fusion=None)
    assert every.shape[0] == 2 and every.shape[2:] == (7, 7)
    for how in ("absolute", "positive", "mean"):
        assert_close(method.attribute(ids, fusion=how), oracles.fused(every, how), 1e-6)


# --- From model to scores, by matrices ----------------------------------------------------------------------------


def by_hand(model: nn.Module, ids: Tensor, target: int, mask: Tensor | None) -> list[dict[str, Tensor]]:
    """Each layer's input ``x``, matrices ``A``, weights ``u`` and ``v``: plain hooks, autograd and the oracle."""
    mixers: list[Any] = [m for m in model.modules() if type(m).__name__ in ("MambaMixer", "FalconMambaMixer")]
    seen: list[tuple[Tensor, Tensor]] = []

    def keep(module: nn.Module, args: Any, kwargs: Any, output: Tensor) -> None:
        output.retain_grad()
        seen.append((args[0] if args else kwargs["hidden_states"], output))

    handles = [mixer.register_forward_hook(keep, with_kwargs=True) for mixer in mixers]
    logits = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    for handle in handles:
        handle.remove()
    last = [int(row.nonzero().max()) for row in (torch.ones_like(ids) if mask is None else mask)]
    logits[torch.arange(len(ids)), last, target].sum().backward()
    layers = []
    for mixer, (x, y) in zip(mixers, seen, strict=True):
        assert y.grad is not None
        x, real = x.detach(), torch.ones_like(x[..., :1]) if mask is None else mask.to(x).unsqueeze(-1)
        W = mixer.in_proj.weight.detach().chunk(2)[0]
        layers.append({
            "A": oracles.unified_s6(mixer, x, mask), "u": y.grad @ mixer.out_proj.weight.detach(),
            "v": (x * real) @ W.T, "real": real, "y": y.grad,
        })  # fmt: skip
    return layers


PADDING = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])


@pytest.mark.parametrize("mask", [None, PADDING, PADDING.flip(1)], ids=["whole", "left padding", "right padding"])
def test_scores_are_those_of_the_written_out_matrices(mask: Tensor | None, family: nn.Module, ids: Tensor) -> None:
    model = family.double()
    layers = by_hand(model, ids, 3, mask)
    weighted = [oracles.weighted(p["A"], p["u"], p["v"]) for p in layers]
    query = layers[-1]["y"].norm(dim=-1)
    query = query / query.sum(1, keepdim=True)
    explicit = {
        "channel": [oracles.fused(C, "positive") for C in weighted],
        "token": [C.sum(1).clamp(min=0) for C in weighted],
        "signed": [C.sum(1) for C in weighted],
        "rollout": [oracles.fused(p["A"], "absolute") * p["real"] * p["real"].transpose(1, 2) for p in layers],
    }
    for name, matrices in explicit.items():
        scores = METHODS[name](model).attribute(ids, target=3, additional_forward_args=mask)
        assert_close(scores.double(), oracles.rollout(matrices, query), 1e-6)
    raw = RawImplicitAttention(model, layers=2, fusion="absolute").attribute(ids, 3, additional_forward_args=mask)
    assert_close(raw.double(), torch.einsum("bi,bij->bj", query, sum(explicit["rollout"]) / 2), 1e-6)
    if mask is not None:
        assert raw[0][mask[0] == 0].eq(0).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_score(side: str, method: str, family: nn.Module, ids: Tensor) -> None:
    plain = METHODS[method](family).attribute(ids, target=3)
    pad, ones = torch.zeros(2, 3, dtype=ids.dtype), torch.ones_like(ids)
    parts = ([pad, ids], [pad, ones]) if side == "left" else ([ids, pad], [ones, pad])
    padded, mask = (torch.cat(part, dim=1) for part in parts)
    for kind in (torch.long, torch.bool, torch.float32):
        scores = METHODS[method](family).attribute(padded, target=3, additional_forward_args=mask.to(kind))
        assert_close(scores[mask.bool()].view(2, 7), plain, 1e-5)
        assert scores[~mask.bool()].eq(0).all()


@pytest.mark.parametrize("method", METHODS)
def test_padding_has_no_score_even_where_a_bias_writes_to_it(method: str, ids: Tensor) -> None:
    """A biased projection before the convolution writes at padding too."""
    model, mask = FAMILIES["mamba"].build(use_bias=True), PADDING.flip(1)
    scores = METHODS[method](model).attribute(ids, target=3, additional_forward_args=mask)
    assert scores[~mask.bool()].eq(0).all()
    assert scores[mask.bool()].ne(0).any()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mask", [PADDING, torch.tensor([[0, 1, 0, 1, 1, 1, 1], [1] * 7])], ids=["left", "holes"])
def test_a_bias_that_leaks_from_padding_on_the_left_is_refused(method: str, mask: Tensor, ids: Tensor) -> None:
    """The convolution carries what the projection's bias writes at padding on to the real tokens."""
    model = FAMILIES["mamba"].build(use_bias=True)
    with pytest.raises(InvalidInputError, match=r"Padding on the left changes what layer .*mixer' \(MambaMixer\)"):
        METHODS[method](model).attribute(ids, target=3, additional_forward_args=mask)
