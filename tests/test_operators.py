"""The laws of the linear operators, on random shapes, in float32 and float64."""

import dataclasses
import random
from collections.abc import Callable
from dataclasses import fields
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.matrices.core_matrix import channel_matrices
from captum_ssm.operators import (
    Attention,
    CausalConv,
    Centre,
    Chain,
    Conv,
    DeltaScan,
    Diagonal,
    HeadOperator,
    Operator,
    Product,
    Projection,
    Rearranged,
    Recurrence,
    Reordered,
    Scan,
    SoftmaxAttention,
    Sum,
    recurrence,
)
from captum_ssm.operators import chunk as chunks
from captum_ssm.operators.decays import chunk_decays, decayed_products
from captum_ssm.operators.device_sizes import DeviceSize
from captum_ssm.operators.prefix import prefix, states_from, suffix
from tests import oracles
from tests.cases import on_all

SEEDS = range(20)
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
DTYPES = [torch.float64, torch.float32]


def assert_close(actual: Tensor, expected: Tensor) -> None:
    """Largest difference at most the type's tolerance, relative to the largest value (at least 1)."""
    assert actual.shape == expected.shape
    assert actual.dtype == expected.dtype
    if expected.numel():
        error = (actual - expected).abs().max() / expected.abs().max().clamp(min=1)
        assert error <= TOLERANCE[expected.dtype], f"relative error {error:.1e}"


def coefficient(draw: random.Random, shape: tuple[int, ...], fixed: tuple[int, ...], dtype: torch.dtype) -> Tensor:
    """Normal numbers of ``shape``, each axis not in ``fixed`` shared (size 1) once in four times."""
    sizes = [1 if axis not in fixed and draw.random() < 0.25 else size for axis, size in enumerate(shape)]
    return torch.randn(sizes, dtype=dtype)


def random_decay(draw: random.Random, shape: tuple[int, ...], dtype: torch.dtype) -> tuple[Tensor | Product, Tensor]:
    """A decay in a random form, and its values."""
    full = coefficient(draw, shape, (), dtype)
    kind = draw.choice(["positive", "signed", "some zero", "product", "exponential", "strong exponential"])
    if kind == "positive":
        return full.sigmoid(), full.sigmoid()
    if kind == "signed":
        return full.tanh(), full.tanh()
    if kind == "some zero":
        full = full.tanh() * (torch.rand_like(full) > 0.3)
        return full, full
    other = coefficient(draw, shape, (), dtype).sigmoid()
    if kind == "product":
        return Product((full.tanh(), other)), full.tanh() * other
    step = -full.abs() * (100 if kind == "strong exponential" else 1)
    return Product((step, other), exponential=True), (step * other).exp()


def random_scan(
    seed: int, dtype: torch.dtype, B: int | None = None, L: int | None = None, **options: Any
) -> tuple[Scan, dict[str, Any], tuple[int, int, int]]:
    """A scan of random shape and kind; its values for the oracles; (B, L, D)."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    B = B or draw.choice([1, 2, 3])
    L = L or draw.choice([1, 2, 3, 5, 8, 13])
    H, P, N = draw.choice([1, 2, 3]), draw.choice([1, 1, 2, 3]), draw.choice([1, 2, 4])
    P = options.pop("P", P)
    a, decay = random_decay(draw, (B, L, H, N), dtype)
    # b and c keep their states: weights shared by all states have a test of their own
    b = coefficient(draw, (B, L, H, N), (2, 3), dtype)
    c = coefficient(draw, (B, L, H, N), (3,), dtype)
    weight: Tensor | Product = b
    if draw.random() < 0.5:
        scale = coefficient(draw, (B, L, H, 1), (), dtype)
        weight, b = Product((scale, b)), scale * b
    D = H * P
    skip = draw.choice([None, torch.randn(D, dtype=dtype), torch.randn(B, L, D, dtype=dtype)])
    bonus = draw.choice([None, torch.randn(1, dtype=dtype), torch.randn(L, D, dtype=dtype)])
    rest = {"lag": draw.choice([0, 1]), "skip": skip, "bonus": bonus, "head_size": P}
    scan = Scan(a, weight, c, **rest, chunk=options.pop("chunk", draw.choice([None, 1, 3, 4, 16])))
    return scan, {"a": decay.expand(B, L, H, N), "b": b, "c": c, **rest}, (B, L, D)


def random_delta(
    seed: int, dtype: torch.dtype, L: int | None = None, **options: Any
) -> tuple[DeltaScan, dict[str, Any], tuple[int, int, int]]:
    """A delta scan of random shape and kind; its values for the oracles; (B, L, D)."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    B, L = draw.choice([1, 2, 3]), L or draw.choice([1, 2, 3, 5, 8, 13])
    H, P, N = draw.choice([1, 2, 3]), draw.choice([1, 1, 2, 3]), draw.choice([1, 2, 4])
    a, decay = random_decay(draw, (B, L, H, N), dtype)
    # b and erase keep their states and heads: what all states share has a test of its own
    b = coefficient(draw, (B, L, H, N), (2, 3), dtype)
    c = coefficient(draw, (B, L, H, N), (3,), dtype)
    recall, erase = (0.7 * coefficient(draw, (B, L, H, N), (3,), dtype) for _ in range(2))
    values = {"a": decay.expand(B, L, H, N), "b": b, "c": c, "recall": recall, "erase": erase}
    given: dict[str, Any] = {**values, "a": a}
    if draw.random() < 0.5:
        beta = coefficient(draw, (B, L, H, 1), (), dtype).sigmoid()
        given["erase"], values["erase"] = Product((beta, erase)), beta * erase
    skip = draw.choice([None, torch.randn(H * P, dtype=dtype), torch.randn(B, L, H * P, dtype=dtype)])
    bonus = draw.choice([None, torch.randn(1, dtype=dtype), torch.randn(L, H * P, dtype=dtype)])
    rest: dict[str, Any] = {"skip": skip, "bonus": bonus, "head_size": P}
    scan = DeltaScan(**given, **rest, chunk=options.pop("chunk", draw.choice([None, 1, 3, 4, 16])))
    return scan, {**values, **rest}, (B, L, H * P)


def random_attention(
    seed: int, dtype: torch.dtype, causal: bool | None = None
) -> tuple[Attention | SoftmaxAttention, Tensor, tuple[int, int, int]]:
    """Attention of random shape and kind, with rows of padding; its matrices (B, D, L, L); (B, L, D)."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    B, L, H, P = draw.choice([1, 2]), draw.choice([1, 2, 5, 8]), draw.choice([1, 2, 3]), draw.choice([1, 2, 3])
    causal = draw.random() < 0.7 if causal is None else causal
    queries, keys = torch.randn(2, B, H, L, 3, dtype=dtype)
    mask = torch.randn(draw.choice([1, B]), draw.choice([1, H]), L, L, dtype=dtype)
    attends = (torch.rand(B, 1, L, 1) > 0.2).to(dtype)
    if causal:
        mask = mask.masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1), -torch.inf)
    kind = draw.choice(["weights", "mask", "no mask"])
    if kind == "no mask":
        mask = torch.zeros(L, L, dtype=dtype).masked_fill(mask[0, 0] == -torch.inf, -torch.inf)
    weights = (0.7 * torch.einsum("bhin,bhjn->bhij", queries, keys) + mask).softmax(-1) * attends
    skip = draw.choice([None, torch.randn(H * P, dtype=dtype), torch.randn(B, L, H * P, dtype=dtype)])
    matrices = weights.repeat_interleave(P, dim=1)
    if skip is not None:
        matrices = matrices + oracles.diagonal_matrix(skip.expand(B, L, H * P))
    options: Any = {"head_size": P, "skip": skip}
    made: Attention | SoftmaxAttention = Attention(weights, **options)
    if kind != "weights":
        options["attends"] = attends if (attends == 0).any() else None
        how: Any = {"mask": mask} if kind == "mask" else {"sees_earlier": causal}
        made = SoftmaxAttention(queries, keys, 0.7, **how, **options)
    return made, matrices, (B, L, H * P)


def diagonal(seed: int, dtype: torch.dtype) -> tuple[Operator, tuple[int, int, int]]:
    draw = random.Random(seed)
    B, L, D = draw.choice([1, 2]), draw.choice([1, 4, 6]), draw.choice([1, 5])
    bias = coefficient(draw, (B, L, D), (), dtype) if draw.random() < 0.5 else None
    return Diagonal(coefficient(draw, (B, L, D), (), dtype), bias), (B, L, D)


def convolution(seed: int, dtype: torch.dtype) -> tuple[Operator, tuple[int, int, int]]:
    draw = random.Random(seed)
    B, L, D, K = draw.choice([1, 2]), draw.choice([1, 2, 6]), draw.choice([1, 5]), draw.choice([1, 2, 4])
    bias = torch.randn(D, dtype=dtype) if draw.random() < 0.5 else None
    return CausalConv(torch.randn(D, K, dtype=dtype), bias), (B, L, D)


def scan(seed: int, dtype: torch.dtype) -> tuple[Operator, tuple[int, int, int]]:
    made, _, shape = random_scan(seed, dtype)
    return made, shape


def delta(seed: int, dtype: torch.dtype) -> tuple[Operator, tuple[int, int, int]]:
    made, _, shape = random_delta(seed, dtype)
    return made, shape


def attention(seed: int, dtype: torch.dtype) -> tuple[Operator, tuple[int, int, int]]:
    made, _, shape = random_attention(seed, dtype)
    return made, shape


def core(seed: int, dtype: torch.dtype) -> tuple[Operator, tuple[int, int, int]]:
    made, _, (B, L, D) = random_scan(seed, dtype)
    act, gate = torch.randn(B, L, D, dtype=dtype), torch.randn(B, L, D, dtype=dtype)
    conv = CausalConv(torch.randn(D, 3, dtype=dtype), torch.randn(D, dtype=dtype))
    return Chain({"gate": Diagonal(gate), "scan": made, "act": Diagonal(act), "conv": conv}), (B, L, D)


def projection(seed: int, dtype: torch.dtype) -> tuple[Operator, tuple[int, int, int]]:
    draw = random.Random(seed)
    out, into = draw.choice([1, 3, 5]), draw.choice([1, 4])
    return Projection(torch.randn(out, into, dtype=dtype), torch.randn(out, dtype=dtype)), (2, 3, into)


def centre(seed: int, dtype: torch.dtype) -> tuple[Operator, tuple[int, int, int]]:
    draw = random.Random(seed)
    size, groups = draw.choice([1, 2, 5]), draw.choice([1, 3])
    return Centre(size), (draw.choice([1, 2]), draw.choice([1, 4]), size * groups)


def tangled(seed: int, dtype: torch.dtype) -> tuple[Operator, tuple[int, int, int]]:
    """A layer as RWKV's: channels are mixed between the factors that mix tokens, here three of them."""
    made, (B, L, D) = random.Random(seed).choice([scan, delta, attention])(seed, dtype)
    E = 4
    gate, act = torch.randn(B, L, D, dtype=dtype), torch.randn(B, L, E, dtype=dtype)
    shift = CausalConv(torch.randn(E, 2, dtype=dtype), torch.randn(E, dtype=dtype))
    value = Projection(torch.randn(D, E, dtype=dtype), torch.randn(D, dtype=dtype))
    return Chain({
        "out": Projection(torch.randn(3, D, dtype=dtype)), "centre": Centre(D), "gate": Diagonal(gate), "scan": made,
        "norm": Centre(D), "value": value, "act": Diagonal(act), "shift": shift,
        "turn": Projection(torch.randn(E, E, dtype=dtype)), "again": shift,
        "in": Projection(torch.randn(E, 5, dtype=dtype), torch.randn(E, dtype=dtype)),
    }), (B, L, 5)  # fmt: skip


def layer(seed: int, dtype: torch.dtype) -> tuple[Operator, tuple[int, int, int]]:
    inner, (B, L, D) = core(seed, dtype)
    assert isinstance(inner, Chain)
    out, into = torch.randn(6, D, dtype=dtype), torch.randn(D, 4, dtype=dtype)
    bias = torch.randn(D, dtype=dtype)
    mask = Diagonal((torch.rand(B, L, 1) > 0.3).to(dtype))
    return Chain({"out": Projection(out), **inner.factors, "in": Projection(into, bias), "mask": mask}), (B, L, 4)


def flipped(seed: int, dtype: torch.dtype) -> tuple[Operator, tuple[int, int, int]]:
    made, shape = random.Random(seed).choice([diagonal, convolution, scan, delta, attention, core])(seed, dtype)
    return made.flipped(), shape


def two_sided(seed: int, dtype: torch.dtype) -> tuple[Operator, tuple[int, int, int]]:
    """A convolution that reads some tokens ahead, between gates."""
    draw = random.Random(seed)
    torch.manual_seed(seed)
    B, L, D, K = draw.choice([1, 2]), draw.choice([1, 2, 5, 8]), draw.choice([1, 3]), draw.choice([2, 3, 4])
    bias = draw.choice([None, torch.randn(D, dtype=dtype)])
    return Conv(torch.randn(D, K, dtype=dtype), draw.randrange(1, K), bias), (B, L, D)


def reordered(seed: int, dtype: torch.dtype) -> tuple[Operator, tuple[int, int, int]]:
    made, shape = random.Random(seed).choice([diagonal, convolution, scan, delta, attention, core])(seed, dtype)
    return Reordered(made, torch.randperm(shape[1])), shape


def other_core(shape: tuple[int, int, int], dtype: torch.dtype) -> Chain:
    """Another core for tokens of this shape."""
    B, L, D = shape
    a, b, c = torch.randn(3, B, L, D, 2, dtype=dtype)
    conv = CausalConv(torch.randn(D, 2, dtype=dtype), torch.randn(D, dtype=dtype))
    scan = Scan(a.sigmoid(), b, c, skip=torch.randn(D, dtype=dtype), chunk=3)
    return Chain({"scan": scan, "act": Diagonal(torch.randn(shape, dtype=dtype)), "conv": conv})


def bidirectional(seed: int, dtype: torch.dtype) -> tuple[Operator, tuple[int, int, int]]:
    """A core as Vision Mamba's: two directions under one gate."""
    one, shape = core(seed, dtype)
    both = Sum({"forward": one, "backward": other_core(shape, dtype).flipped()})
    return Chain({"last": Diagonal(torch.randn(shape, dtype=dtype)), "directions": both}), shape


def parallel(seed: int, dtype: torch.dtype) -> tuple[Operator, tuple[int, int, int]]:
    """A sum that reads the past alone."""
    one, shape = random.Random(seed).choice([scan, delta, core])(seed, dtype)
    bias = torch.randn(shape[-1], dtype=dtype)
    direct = Diagonal(torch.randn(shape, dtype=dtype), bias)
    return Sum({"one": one, "two": other_core(shape, dtype), "direct": direct}), shape


def both_ways(seed: int, dtype: torch.dtype) -> tuple[Operator, tuple[int, int, int]]:
    """Two layers, each with projections of its own, that read the sequence from either end."""
    one, (B, L, E) = layer(seed, dtype)
    out, into = torch.randn(6, 3, dtype=dtype), torch.randn(3, E, dtype=dtype)
    other = {"out": Projection(out, out[:, 0]), **other_core((B, L, 3), dtype).factors, "in": Projection(into)}
    return Sum({"forward": one, "backward": Chain(other).flipped()}), (B, L, E)


Build = Callable[[int, torch.dtype], tuple[Operator, tuple[int, int, int]]]
CHANNELWISE: list[Build] = [
    diagonal,
    convolution,
    scan,
    delta,
    attention,
    core,
    flipped,
    bidirectional,
    parallel,
    two_sided,
    reordered,
]
ALL: list[Build] = [*CHANNELWISE, projection, centre, layer, tangled, both_ways]
READ_THE_FUTURE: list[Build] = [attention, tangled, flipped, bidirectional, both_ways, two_sided, reordered]
NOTHING_AFTER_A_START: list[Build] = [flipped, bidirectional, both_ways, two_sided, reordered]
"""Where they are not causal, outputs before a start exist."""

every_operator = pytest.mark.parametrize("build", ALL, ids=lambda build: build.__name__)
every_channelwise = pytest.mark.parametrize("build", CHANNELWISE, ids=lambda build: build.__name__)
every_seed = on_all("seed", SEEDS)
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=["float64", "float32"])


# --- Laws of every operator ---------------------------------------------------------------------------------------


@every_operator
@every_seed
def test_the_adjoint_is_the_transpose_in_float32(build: Build, seed: int) -> None:
    operator, shape = build(seed, torch.float32)
    x = torch.randn(shape)
    y = operator.apply(x)
    u = torch.randn_like(y)
    assert operator.adjoint(u).shape == x.shape and operator.adjoint(u).dtype == torch.float32
    scale = max(1.0, float((u.abs() * y.abs()).sum()))
    assert abs((u * y).sum() - (operator.adjoint(u) * x).sum()) <= TOLERANCE[torch.float32] * scale


@every_operator
@every_seed
def test_the_adjoint_is_the_transpose_entry_by_entry(build: Build, seed: int) -> None:
    operator, (B, L, C) = build(seed, torch.float64)
    inputs = torch.eye(L * C, dtype=torch.float64).view(L * C, 1, L, C).expand(-1, B, -1, -1)
    columns = operator.apply(inputs)  # (L·C, B, L, outputs)
    outputs = columns.shape[-1]
    units = torch.eye(L * outputs, dtype=torch.float64).view(L * outputs, 1, L, outputs).expand(-1, B, -1, -1)
    rows = operator.adjoint(units)  # (L·outputs, B, L, C)
    assert_close(rows.permute(1, 2, 3, 0).flatten(1, 2), columns.permute(1, 0, 2, 3).flatten(2))


@every_channelwise
@every_seed
@every_dtype
def test_dense_times_vector_is_apply(build: Build, seed: int, dtype: torch.dtype) -> None:
    operator, shape = build(seed, dtype)
    x = torch.randn(shape, dtype=dtype)
    matrices = channel_matrices(operator, x)
    assert_close(oracles.times(matrices, x), operator.apply(x))
    assert_close(oracles.times(matrices.transpose(-1, -2), x), operator.adjoint(x))


@every_operator
@every_seed
def test_the_operator_is_linear_and_its_bias_a_constant(build: Build, seed: int) -> None:
    operator, shape = build(seed, torch.float64)
    x, other = torch.randn(2, *shape, dtype=torch.float64)
    assert_close(operator.apply(2 * x - other), 2 * operator.apply(x) - operator.apply(other))
    constant = operator.apply(torch.zeros_like(x), bias=True)
    assert_close(operator.apply(x, bias=True), operator.apply(x) + constant)


@every_operator
@every_seed
def test_the_future_never_matters(build: Build, seed: int) -> None:
    """Outputs up to token t do not change, not by one bit, with anything after t; the adjoint reads only the future."""
    operator, shape = build(seed, torch.float64)
    if not operator.causal:
        assert build in READ_THE_FUTURE
        return
    x = torch.randn(shape, dtype=torch.float64)
    y = operator.apply(x, bias=True)
    u = torch.randn_like(y)
    for t in range(shape[1]):
        changed = x.clone()
        changed[:, t + 1 :] = torch.randn_like(x[:, t + 1 :])
        assert torch.equal(operator.apply(changed, bias=True)[:, : t + 1], y[:, : t + 1])
        changed = u.clone()
        changed[:, :t] = torch.randn_like(u[:, :t])
        assert torch.equal(operator.adjoint(changed)[:, t:], operator.adjoint(u)[:, t:])


@every_operator
@every_seed
def test_the_past_never_matters_to_what_reads_the_future_alone(build: Build, seed: int) -> None:
    operator, shape = build(seed, torch.float64)
    turned = operator.flipped()
    assert turned.anticausal == operator.causal and turned.causal == operator.anticausal
    if not turned.anticausal:
        return
    x = torch.randn(shape, dtype=torch.float64)
    y = turned.apply(x, bias=True)
    for t in range(shape[1]):
        changed = x.clone()
        changed[:, :t] = torch.randn_like(x[:, :t])
        assert torch.equal(turned.apply(changed, bias=True)[:, t:], y[:, t:])


@every_channelwise
@every_seed
def test_the_diagonal_is_that_of_the_matrix(build: Build, seed: int, monkeypatch: pytest.MonkeyPatch) -> None:
    size = random.Random(seed).choice([1, 64, 2**17])
    monkeypatch.setattr(recurrence, "_ENTRIES", DeviceSize(size, size))
    operator, shape = build(seed, torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    expected = channel_matrices(operator, x).diagonal(dim1=-2, dim2=-1).transpose(1, 2)
    if build is bidirectional:
        with pytest.raises(ValueError, match="both earlier and later tokens"):
            operator.diagonal(x)
        return
    if isinstance(operator, Chain) and not (operator.causal or operator.anticausal):
        return
    assert_close(operator.diagonal(x).expand(shape), expected)


@every_operator
@every_seed
def test_what_comes_after_a_start_is_the_operator_on_inputs_that_are_zero_before(build: Build, seed: int) -> None:
    operator, shape = build(seed, torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    u = torch.randn_like(operator.apply(x))
    if not operator.causal and build in NOTHING_AFTER_A_START:
        with pytest.raises(NotImplementedError, match="not known to be causal"):
            operator.after(0)
        return
    for start in range(shape[1]):
        later = operator.after(start)
        zero, void = x.clone(), u.clone()
        zero[:, :start] = void[:, :start] = 0
        assert_close(later.apply(x[:, start:]), operator.apply(zero)[:, start:])
        assert_close(later.adjoint(u[:, start:]), operator.adjoint(void)[:, start:])
        assert later.causal or not operator.causal


@every_operator
@every_seed
def test_flipped_reads_the_sequence_from_its_end(build: Build, seed: int) -> None:
    operator, shape = build(seed, torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    u = torch.randn_like(operator.apply(x))
    turned = operator.flipped()
    assert (turned.sizes, set(turned.terms)) == (operator.sizes, set(operator.terms))
    assert (turned.mixes_tokens, turned.mixes_channels) == (operator.mixes_tokens, operator.mixes_channels)
    for bias in (False, True):
        assert_close(turned.apply(x, bias), operator.apply(x.flip(1), bias).flip(1))
        assert torch.equal(turned.flipped().apply(x, bias), operator.apply(x, bias))
    assert_close(turned.adjoint(u), operator.adjoint(u.flip(1)).flip(1))
    for term in operator.terms:
        assert_close(turned.without(term).apply(x, True), operator.without(term).apply(x.flip(1), True).flip(1))


@every_operator
@every_seed
@every_dtype
def test_columns_are_what_each_token_alone_gives(build: Build, seed: int, dtype: torch.dtype) -> None:
    operator, shape = build(seed, dtype)
    v = torch.randn(shape, dtype=dtype)
    y = operator.apply(v)
    alone = torch.zeros(shape[1], *shape, dtype=dtype)
    for token in range(shape[1]):
        alone[token, :, token] = v[:, token]
    expected = operator.apply(alone)
    for start in range(shape[1]):
        stop = 1 + (seed + 3 * start) % shape[1]
        tokens = slice(min(start, stop - 1), max(start + 1, stop))
        columns = operator.columns(v, tokens)
        assert columns.shape == (tokens.stop - tokens.start, *y.shape)
        assert_close(columns, expected[tokens])
    assert_close(operator.columns(v, slice(0, shape[1])).sum(0), y)


@every_operator
@every_seed
def test_leading_dimensions_share_the_coefficients(build: Build, seed: int) -> None:
    operator, shape = build(seed, torch.float64)
    x = torch.randn(2, 3, *shape, dtype=torch.float64)
    y = operator.apply(x, bias=True)
    u = torch.randn_like(y)
    for j in range(2):
        for k in range(3):
            assert_close(y[j, k], operator.apply(x[j, k], bias=True))
            assert_close(operator.adjoint(u)[j, k], operator.adjoint(u[j, k]))


@every_operator
@every_seed
def test_no_method_changes_its_input_or_the_coefficients(build: Build, seed: int) -> None:
    def tensors(value: Any) -> list[Tensor]:
        if isinstance(value, Tensor):
            return [value]
        if isinstance(value, (Chain, Sum)):
            parts = value.factors if isinstance(value, Chain) else value.summands
            return [t for part in parts.values() for t in tensors(part)]
        if isinstance(value, Product):
            return list(value.factors)
        return (
            [t for field in fields(value) for t in tensors(getattr(value, field.name))]  # type: ignore[arg-type]
            if value is not None and (isinstance(value, Operator))
            else []
        )

    operator, shape = build(seed, torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    u = torch.randn_like(operator.apply(x))
    watched = [x, u, *tensors(operator)]
    before = [t.clone() for t in watched]
    operator.apply(x, bias=True)
    operator.adjoint(u)
    if not operator.mixes_channels:
        operator.channels(slice(0, 1)).apply(x[..., :1])
        channel_matrices(operator, x)
    operator.columns(x, slice(0, 1))
    operator.flipped().apply(x, bias=True)
    if operator.causal:
        operator.after(shape[1] - 1).apply(x[:, -1:])
    assert len(watched) > 2 or isinstance(operator, Centre)
    assert all(torch.equal(now, then) for now, then in zip(watched, before, strict=True))


@every_operator
@every_seed
def test_sizes_are_those_of_the_output_and_the_input(build: Build, seed: int) -> None:
    operator, shape = build(seed, torch.float64)
    out, into = operator.sizes
    assert into in (None, shape[-1])
    assert out in (None, operator.apply(torch.zeros(shape, dtype=torch.float64)).shape[-1])


# --- Channels before or after -------------------------------------------------------------------------------------


def indices(D: int, P: int, draw: random.Random) -> list[slice | Tensor]:
    """Slices and index tensors: whole heads, parts of heads, single channels, permuted, repeated."""
    start = draw.randrange(D)
    heads = [slice(h * P, (h + 1) * P) for h in range(D // P)]
    found: list[slice | Tensor] = [
        slice(None), slice(start, start + 1), slice(0, start + 1), slice(start, None), slice(None, None, 2), *heads,
        torch.randperm(D), torch.randint(D, (4,)), torch.tensor([D - 1]), torch.arange(D).view(-1, P).flip(0).flatten(),
        torch.arange(D).view(-1, P).flip(1).flatten(), torch.tensor([-1, 0]),
    ]  # fmt: skip
    return found


@every_channelwise
@every_seed
def test_channels_may_be_taken_before_or_after(build: Build, seed: int) -> None:
    operator, shape = build(seed, torch.float64)
    x = torch.randn(shape, dtype=torch.float64)
    inner = operator.factors.get("scan") if isinstance(operator, Chain) else operator
    inner = inner.operator if isinstance(inner, Rearranged) else inner
    P = inner.head_size if isinstance(inner, HeadOperator) else 1
    for index in indices(shape[-1], P, random.Random(seed)):
        taken = operator.channels(index)
        assert_close(taken.apply(x[..., index], bias=True), operator.apply(x, bias=True)[..., index])
        assert_close(taken.adjoint(x[..., index]), operator.adjoint(x)[..., index])


@every_seed
def test_whole_heads_stay_shared(seed: int) -> None:
    """Taking whole heads copies no coefficient to channels; taking parts of heads does."""
    draw = random.Random(seed)
    B, L, H, P, N = 2, 3, 3, draw.choice([2, 3]), 2
    a, b, c = torch.rand(3, B, L, H, N, dtype=torch.float64)
    scan = Scan(a, b, c, head_size=P)
    first = draw.randrange(H)
    whole = scan.channels(slice(first * P, H * P))
    assert (whole.heads, whole.head_size) == (H - first, P)
    part = scan.channels(slice(1, 1 + P))
    assert (part.heads, part.head_size) == (P, 1)


def test_a_scan_with_one_head_shares_its_coefficients_with_any_channels() -> None:
    a, b, c = torch.rand(3, 1, 4, 1, 2)
    assert Scan(a, b, c, head_size=6).channels(torch.tensor([5, 1])).sizes == (2, 2)


@every_seed
def test_whole_heads_stay_shared_in_every_kind_of_head(seed: int) -> None:
    draw = random.Random(seed)
    B, L, H, P = 2, 3, 3, draw.choice([2, 3])
    first = draw.randrange(H)
    a, b, c, recall, erase = torch.rand(5, B, L, H, 2, dtype=torch.float64)
    for operator in (DeltaScan(a, b, c, recall, erase, head_size=P), Attention(torch.rand(B, H, L, L), head_size=P)):
        whole = operator.channels(slice(first * P, H * P))
        assert (whole.heads, whole.head_size) == (H - first, P)
        turned = operator.channels(torch.arange(H * P).view(H, P).flip(0).flatten())
        assert (turned.heads, turned.head_size) == (H, P)
        part = operator.channels(slice(1, 1 + P))
        assert (part.heads, part.head_size) == (P, 1)
        single = operator.channels(slice(0, P)).channels(torch.tensor([1, 0, 1]))
        assert (single.heads, single.head_size) == (1, 3)


def test_a_scale_shared_by_all_channels_stays_shared() -> None:
    assert Diagonal(torch.randn(2, 3, 1)).channels(slice(4, 9)).s.shape == (2, 3, 1)


def test_a_scalar_diagonal_has_channels() -> None:
    taken = Diagonal(torch.tensor(2.0)).channels(slice(0, 2))
    assert_close(taken.apply(torch.ones(1, 3, 2)), torch.full((1, 3, 2), 2.0))


def test_a_projection_has_no_channels_of_its_own() -> None:
    with pytest.raises(ValueError, match="Projection mixes channels"):
        Projection(torch.randn(3, 3)).channels(slice(0, 1))
    with pytest.raises(ValueError, match="mixes channels"):
        Chain({"out": Projection(torch.randn(3, 3))}).channels(slice(0, 1))
    with pytest.raises(ValueError, match="Centre mixes channels"):
        Centre(3).channels(slice(0, 1))


# --- What each operator is ----------------------------------------------------------------------------------------


@every_seed
@every_dtype
@pytest.mark.parametrize("P", [1, 2])
def test_the_scan_is_the_written_out_sum(seed: int, dtype: torch.dtype, P: int) -> None:
    """P = 1 runs through the states, P = 2 through chunks of the matrix; dense sends both through many columns."""
    scan, values, shape = random_scan(seed, dtype, P=P)
    x = torch.randn(shape, dtype=dtype)
    alpha = oracles.scan_alpha(**values)
    assert_close(scan.apply(x), oracles.times(alpha, x))
    assert_close(scan.apply(x), oracles.recurrence(x=x, **values))
    assert_close(scan.adjoint(x), oracles.times(alpha.transpose(-1, -2), x))
    assert_close(channel_matrices(scan, x), alpha)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("P", [1, 3])
@pytest.mark.parametrize("L", [1, 2, 7, 18, 67, 131])
def test_the_scan_is_the_recurrence_beyond_one_chunk(L: int, P: int, lag: int) -> None:
    """The default chunks have 32 tokens (one state decay a head), 8 (more) or as many as fit the cache."""
    for N in (1, 2):
        torch.manual_seed(L)
        a, b, c = torch.randn(3, 1, L, 2, N, dtype=torch.float64)
        x = torch.randn(1, L, 2 * P, dtype=torch.float64)
        expected = oracles.recurrence(a.tanh(), b, c, x, lag, head_size=P)
        assert_close(Scan(a.tanh(), b, c, head_size=P, lag=lag).apply(x), expected)


def test_a_long_sequence_of_many_states_is_cut_by_the_cache_bound(monkeypatch: pytest.MonkeyPatch) -> None:
    scan, values, shape = random_scan(3, torch.float64, L=50, P=1, chunk=None)
    x = torch.randn(shape, dtype=torch.float64)
    monkeypatch.setattr(chunks, "_STATES", DeviceSize(1, 1))
    assert_close(scan.apply(x), oracles.recurrence(x=x, **values))


@every_seed
def test_chunk_size_never_changes_the_result(seed: int) -> None:
    results = []
    for chunk in (None, 1, 2, 3, 5, 12, 13, 14, 100):
        scan, _, shape = random_scan(seed, torch.float64, L=13, chunk=chunk)
        assert scan.chunk == chunk
        x = torch.ones(shape, dtype=torch.float64)
        results.append((scan.apply(x), scan.adjoint(x)))
    for applied, adjoint in results[1:]:
        assert_close(applied, results[0][0])
        assert_close(adjoint, results[0][1])


@every_seed
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("P", [1, 2])
def test_both_ways_through_a_chunk_agree_also_in_the_state_they_hand_on(seed: int, lag: int, P: int) -> None:
    draw = random.Random(seed)
    torch.manual_seed(seed)
    B, T, H, N = 2, draw.choice([1, 2, 5, 8]), 2, draw.choice([1, 3])
    a = torch.randn(B, T, H, draw.choice([1, N]), dtype=torch.float64)
    b, c = torch.randn(2, B, T, H, N, dtype=torch.float64)
    x, h = torch.randn(B, T, H, P, dtype=torch.float64), torch.randn(B, H, N, P, dtype=torch.float64)
    states = chunks.chunk_by_states(a, b, c, x, h, lag)
    matrix = chunks.chunks_by_matrix(a, b, c, x, h, lag)
    for one, other in zip(states, matrix, strict=True):
        assert_close(one, other)
    for t in range(T):
        before = h
        h = a[:, t, :, :, None] * h + b[:, t, :, :, None] * x[:, t, :, None]
        assert_close(states[0][:, t], (c[:, t, :, :, None] * (before if lag else h)).sum(2))
    assert_close(states[2], h)


@pytest.mark.parametrize("N", [1, 3])
@pytest.mark.parametrize("T", [1, 2, 5])
def test_the_decays_of_a_chunk_are_products_from_token_to_token(T: int, N: int) -> None:
    torch.manual_seed(T)
    a = torch.randn(2, T, 3, N, dtype=torch.float64)
    decays = chunk_decays(a)
    before = decays.before_token()
    for t in range(T):
        assert_close(decays.since_start[:, :, t], a[:, : t + 1].prod(1))
        assert_close(before.since_start[:, :, t], a[:, :t].prod(1))
        for s in range(T):
            assert_close(decays.between[:, :, t, s], a[:, s + 1 : t + 1].prod(1) * (s <= t))
            assert_close(before.between[:, :, t, s], a[:, s + 1 : t].prod(1) * (s < t))
    assert_close(decays.until_end(), decays.between[:, :, T - 1])
    assert_close(decays.of_chunk().squeeze(-1), a.prod(1))


@pytest.mark.parametrize("decays", [1, 3])
def test_decayed_products_are_the_written_out_sum(decays: int) -> None:
    rows, columns = torch.randn(2, 4, 5, 3, dtype=torch.float64), torch.randn(2, 4, 6, 3, dtype=torch.float64)
    between = torch.randn(2, 4, 5, 6, decays, dtype=torch.float64)
    found = decayed_products(rows, between, columns)
    for t in range(5):
        for s in range(6):
            assert_close(found[..., t, s], (rows[:, :, t] * between[:, :, t, s] * columns[:, :, s]).sum(-1))


@on_all("T", [*range(1, 18), 32, 33, 34, 70, 131])
def test_the_prefix_is_the_recurrence(T: int) -> None:
    torch.manual_seed(T)
    a, v = torch.randn(2, 2, T, 3, dtype=torch.float64)
    h = torch.zeros(2, 3, dtype=torch.float64)
    for t, state in enumerate(prefix(a, v).unbind(1)):
        h = a[:, t] * h + v[:, t]
        assert_close(state, h)


@on_all("T", [1, 2, 5, 31, 32, 33, 70])
def test_the_suffix_is_the_recurrence_from_the_end(T: int) -> None:
    torch.manual_seed(T)
    a, v = torch.randn(2, 2, T, 3, dtype=torch.float64)
    g = torch.zeros(2, 3, dtype=torch.float64)
    states = suffix(a, v)
    for t in reversed(range(T)):
        g = (a[:, t + 1] * g if t + 1 < T else 0) + v[:, t]
        assert_close(states[:, t], g)


@on_all("T", [1, 2, 5, 31, 32, 33, 70])
def test_the_states_follow_the_one_that_they_start_from(T: int) -> None:
    torch.manual_seed(T)
    a, v = torch.randn(2, 2, T, 3, dtype=torch.float64)
    h = torch.randn(2, 3, dtype=torch.float64)
    first, *states = states_from(h, a, v).unbind(1)
    assert torch.equal(first, h)
    for t, state in enumerate(states):
        h = a[:, t] * h + v[:, t]
        assert_close(state, h)


@pytest.mark.parametrize("P", [1, 3])
@pytest.mark.parametrize("shared", ["b", "b and c", "a and b", "c"])
def test_weights_may_be_shared_by_all_states(P: int, shared: str) -> None:
    """Coefficients of (B, L, H, 1) beside others of N states, as the scan's shapes allow; the adjoint swaps b and c."""
    torch.manual_seed(0)
    sizes = [1 if name in shared.split(" and ") else 4 for name in "abc"]
    a, b, c = (torch.rand(1, 5, 2, N, dtype=torch.float64) for N in sizes)
    x = torch.randn(1, 5, 2 * P, dtype=torch.float64)
    alpha = oracles.scan_alpha(a, b, c, head_size=P)
    scan = Scan(a, b, c, head_size=P)
    assert_close(scan.apply(x), oracles.times(alpha, x))
    assert_close(scan.adjoint(x), oracles.times(alpha.transpose(-1, -2), x))
    assert_close(scan.diagonal(x), alpha.diagonal(0, -2, -1).mT)


@pytest.mark.parametrize("P", [1, 2])
@every_dtype
def test_very_strong_decays_give_neither_nan_nor_wrong_gradients(P: int, dtype: torch.dtype) -> None:
    """exp(-100) in float32 underflows within two tokens; exponents of masked pairs must not overflow either."""
    torch.manual_seed(0)
    step = torch.full((1, 20, 2, 1), 100.0, dtype=dtype, requires_grad=True)
    b, c = torch.randn(2, 1, 20, 2, 3, dtype=dtype)
    A = -torch.tensor([0.5, 1.0, 8.0], dtype=dtype).view(1, 1, 1, 3)
    x = torch.randn(1, 20, 2 * P, dtype=dtype, requires_grad=True)
    y = Scan(Product((step, A), exponential=True), b, c, head_size=P).apply(x)
    assert_close(y, oracles.recurrence((step * A).exp(), b, c, x, head_size=P))
    for gradient in torch.autograd.grad(y.sum(), (step, x)):
        assert gradient.isfinite().all()


def test_weak_decays_over_many_tokens_keep_their_digits() -> None:
    """A cumulative log-sum over 300 tokens would lose three digits."""
    torch.manual_seed(0)
    step = torch.rand(1, 300, 1, 1) * 3
    a, b, c = Product((-step,), exponential=True), torch.randn(1, 300, 1, 2), torch.randn(1, 300, 1, 2)
    x = torch.randn(1, 300, 4)
    exact = oracles.recurrence((-step.double()).exp(), b.double(), c.double(), x.double(), head_size=4)
    for scan in (Scan(a, b, c, head_size=4), Scan(a, b, c, head_size=4, chunk=300)):
        assert (scan.apply(x) - exact).abs().max() <= 1e-6 * exact.abs().max()


@every_seed
def test_a_product_is_the_coefficient_written_out(seed: int) -> None:
    torch.manual_seed(seed)
    one, two = torch.randn(2, 6, 1, 1, dtype=torch.float64), torch.randn(1, 1, 3, 4, dtype=torch.float64)
    for exponential in (False, True):
        product = Product((one, two), exponential)
        full = (one * two).exp() if exponential else one * two
        assert product.shape == full.shape == (2, 6, 3, 4)
        assert_close(product.tokens(2, 5), full[:, 2:5])
    assert Product((two,)).tokens(1, 4).shape == (1, 3, 3, 4)
    assert_close(product.map(lambda f: f.flip(1), axis=1).tokens(0, 6), full.flip(1))


def test_coefficients_go_by_name() -> None:
    """Also those of a recurrence with others than the two of this package have."""
    a, b, c, recall, erase = torch.rand(5, 1, 4, 2, 3).unbind()
    given = {"a": a, "b": b, "c": c, "recall": recall, "erase": erase}

    @dataclasses.dataclass(frozen=True)
    class Other(Scan):
        d: Tensor = dataclasses.field(default=a, kw_only=True)
        coefficients = (*Scan.coefficients, "d")

    for scan in (Scan(a, b, c), DeltaScan(a, b, c, recall, erase), Other(a, b, c, d=b)):
        assert scan.products._fields == scan.coefficients
        assert (scan.heads, scan.states) == (2, 3)
        for name in scan.coefficients:
            (factor,) = getattr(scan.products, name).factors
            assert factor is given.get(name, b)


def test_a_scan_refuses_what_is_not_one() -> None:
    a = torch.rand(1, 4, 2, 3)
    with pytest.raises(ValueError, match=r"\(B, L, H, N\) .* not \(4, 2\)"):
        Scan(a[0, :, :, 0], a, a)
    with pytest.raises(ValueError, match="lag must be 0 or 1, not 2"):
        Scan(a, a, a, lag=2)
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        Scan(a, a, a, chunk=0)
    with pytest.raises(ValueError, match="2 heads of 3 channels, but the input has 5"):
        Scan(a, a, a, head_size=3).apply(torch.randn(1, 4, 5))
    with pytest.raises(ValueError, match="shapes"):
        Scan(a, a[:, :, :, :2], a)


@every_seed
@every_dtype
def test_the_delta_scan_is_the_written_out_recurrence(seed: int, dtype: torch.dtype) -> None:
    scan, values, shape = random_delta(seed, dtype)
    x = torch.randn(shape, dtype=dtype)
    alpha = oracles.delta_alpha(**values)
    assert_close(scan.apply(x), oracles.delta_recurrence(x=x, **values))
    assert_close(scan.apply(x), oracles.times(alpha, x))
    assert_close(scan.adjoint(x), oracles.times(alpha.transpose(-1, -2), x))
    assert_close(channel_matrices(scan, x), alpha.expand(shape[0], -1, -1, -1))


def delta_rule(L: int, N: int, P: int, kind: str, seed: int = 0) -> tuple[dict[str, Any], Tensor]:
    """The coefficients of a delta rule of two heads, as the models have them, and an input."""
    torch.manual_seed(seed)
    k, c, b = F.normalize(torch.randn(3, 1, L, 2, N, dtype=torch.float64), dim=-1)
    beta, a = torch.rand(1, L, 2, 1, dtype=torch.float64), torch.rand(1, L, 2, N, dtype=torch.float64)
    a = {
        "one decay a head": a[..., :1], "decays by state": a, "decays 0": a * (a > 0.5), "all decays 0": a * 0,
        "negative decays": -a, "no decay": torch.ones_like(a), "no decay at all": torch.ones(1, 1, 1, 1).double(),
        "strong erase": torch.ones_like(a), "full erase": torch.ones_like(a),
    }[kind]  # fmt: skip
    beta = {"strong erase": 2 - 0.01 * beta, "full erase": torch.ones_like(beta)}.get(kind, beta)
    b = b if kind == "strong erase" else beta * k
    return {"a": a, "b": b, "c": c, "recall": a * k, "erase": beta * k}, torch.randn(1, L, 2 * P, dtype=torch.float64)


KINDS = ["one decay a head", "decays by state", "decays 0", "all decays 0", "negative decays", "no decay",
         "no decay at all", "strong erase", "full erase"]  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
@on_all("P", [1, 3])
@on_all("L", [1, 2, 15, 16, 17, 64, 65, 131])
def test_the_delta_rule_is_the_recurrence_beyond_one_chunk(L: int, P: int, kind: str) -> None:
    """The default chunks have 32 tokens (one decay a head) or 8 (more)."""
    for N in (1, 4):
        values, x = delta_rule(L, N, P, kind)
        expected = oracles.delta_recurrence(**values, x=x, head_size=P)
        assert_close(DeltaScan(**values, head_size=P).apply(x), expected)


def test_a_full_erase_forgets_what_a_key_held() -> None:
    """With ``beta = 1`` and one key the state holds the last value alone: ``alpha`` is the identity."""
    k = F.normalize(torch.randn(1, 1, 1, 4, dtype=torch.float64), dim=-1).expand(1, 9, 1, 4)
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    alpha = channel_matrices(DeltaScan(one, k, k, k, k, chunk=4), torch.empty(1, 9, 1, dtype=torch.float64))
    assert_close(alpha, torch.eye(9, dtype=torch.float64).expand(1, 1, 9, 9))


@every_seed
def test_the_chunk_size_of_a_delta_scan_never_changes_the_result(seed: int) -> None:
    results = []
    for chunk in (None, 1, 2, 3, 5, 12, 13, 14, 100):
        scan, _, shape = random_delta(seed, torch.float64, L=13, chunk=chunk)
        assert scan.chunk == chunk
        x = torch.ones(shape, dtype=torch.float64)
        results.append((scan.apply(x), scan.adjoint(x)))
    for applied, adjoint in results[1:]:
        assert_close(applied, results[0][0])
        assert_close(adjoint, results[0][1])


@every_seed
@pytest.mark.parametrize("nothing", ["recall", "erase"])
def test_a_delta_scan_that_erases_nothing_is_a_scan(seed: int, nothing: str) -> None:
    """Also where only one of what is looked up and what is erased is 0."""
    delta, values, shape = random_delta(seed, torch.float64)
    zero = torch.zeros(1, 1, 1, 1, dtype=torch.float64)
    without: dict[str, Any] = {nothing: zero}
    delta = dataclasses.replace(delta, **without)
    rest = {name: values[name] for name in ("skip", "bonus", "head_size")}
    a = values["a"].expand(-1, -1, delta.heads, -1)  # the heads of what is left out
    scan = Scan(a, values["b"], values["c"], **rest)
    x = torch.randn(shape, dtype=torch.float64)
    assert_close(delta.apply(x), scan.apply(x))
    assert_close(delta.adjoint(x), scan.adjoint(x))
    assert_close(channel_matrices(delta, x), channel_matrices(scan, x))


@every_seed
def test_what_a_delta_scan_erases_counts(seed: int) -> None:
    delta, _, shape = random_delta(seed, torch.float64, L=5)
    x = torch.randn(shape, dtype=torch.float64)
    kept = dataclasses.replace(delta, erase=torch.zeros(1, 1, 1, 1, dtype=torch.float64)).apply(x)
    assert (kept - delta.apply(x)).abs().max() > 1e-3 * kept.abs().max()


@pytest.mark.parametrize("P", [1, 3])
@pytest.mark.parametrize(
    "shared",
    [
        "b", "c", "recall", "erase", "a and b", "a and c", "b and c", "recall and b", "b and recall and erase",
        "a and recall and erase",
        "a and b and c",
        "a and c and erase",
        "a and recall and b",
    ],
)  # fmt: skip
def test_weights_of_a_delta_scan_may_be_shared_by_all_states(P: int, shared: str) -> None:
    torch.manual_seed(0)
    names = ("a", "b", "c", "recall", "erase")
    values: dict[str, Any] = {
        name: torch.rand(1, 5, 2, 1 if name in shared.split(" and ") else 4, dtype=torch.float64) / 2 for name in names
    }
    x = torch.randn(1, 5, 2 * P, dtype=torch.float64)
    alpha = oracles.delta_alpha(**values, head_size=P)
    scan = DeltaScan(**values, head_size=P)
    assert_close(scan.apply(x), oracles.times(alpha, x))
    assert_close(scan.adjoint(x), oracles.times(alpha.transpose(-1, -2), x))


@every_dtype
def test_strong_decays_of_a_delta_rule_give_neither_nan_nor_wrong_gradients(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    step = torch.full((1, 20, 2, 1), 100.0, dtype=dtype, requires_grad=True)
    A = -torch.tensor([0.5, 1.0, 8.0], dtype=dtype).view(1, 1, 1, 3)
    k, c = F.normalize(torch.randn(2, 1, 20, 2, 3, dtype=dtype), dim=-1)
    x = torch.randn(1, 20, 4, dtype=dtype, requires_grad=True)
    recall = Product((Product((step, A), exponential=True).tokens(0, 20), k))
    y = DeltaScan(Product((step, A), exponential=True), k, c, recall, k, head_size=2).apply(x)
    a = (step * A).exp()
    assert_close(y, oracles.delta_recurrence(a, k, c, a * k, k, x, head_size=2))
    for gradient in torch.autograd.grad(y.sum(), (step, x)):
        assert gradient.isfinite().all()


@every_seed
@every_dtype
@pytest.mark.parametrize("causal", [True, False])
def test_attention_is_its_weights(seed: int, dtype: torch.dtype, causal: bool) -> None:
    made, matrices, shape = random_attention(seed, dtype, causal)
    x = torch.randn(shape, dtype=dtype)
    assert_close(made.apply(x), oracles.times(matrices, x))
    assert_close(made.adjoint(x), oracles.times(matrices.transpose(-1, -2), x))
    assert_close(channel_matrices(made, x), matrices)
    assert made.causal == (matrices.triu(1).abs().max() == 0)
    assert causal <= made.causal
    (L,) = shape[1:2]
    reads = made.weights.clone()
    reads[..., 0, L - 1] = 1
    assert Attention(reads).causal == (L == 1)


@every_seed
def test_centring_subtracts_the_mean_of_each_group(seed: int) -> None:
    operator, shape = centre(seed, torch.float64)
    assert isinstance(operator, Centre)
    x = torch.randn(shape, dtype=torch.float64)
    groups = x.split(operator.size, dim=-1)
    assert_close(operator.apply(x), torch.cat([group - group.mean(-1, keepdim=True) for group in groups], dim=-1))
    assert_close(operator.apply(operator.apply(x)), operator.apply(x))
    assert operator.mixes_channels and not operator.mixes_tokens


def test_a_layer_norm_is_a_diagonal_after_centring() -> None:
    x = torch.randn(2, 3, 6, dtype=torch.float64)
    weight, bias = torch.randn(2, 6, dtype=torch.float64)
    for groups in (1, 2):
        size = 6 // groups
        scale = (x.unflatten(-1, (groups, size)).var(-1, correction=0, keepdim=True) + 1e-5).rsqrt()
        norm = Chain({
            "norm": Diagonal(weight * scale.expand(-1, -1, -1, size).flatten(-2)), "centre": Centre(size),
        })  # fmt: skip
        expected = F.group_norm(x.flatten(0, 1), groups, weight, bias, 1e-5).view(x.shape)
        assert_close(norm.apply(x) + bias, expected)


def test_what_does_not_know_itself_causal_has_nothing_after_a_start() -> None:
    class Unknown(Diagonal):
        after = Operator.after  # type: ignore[assignment]

    with pytest.raises(NotImplementedError, match="Unknown is not known to be causal"):
        Unknown(torch.ones(1)).after(1)


def test_every_option_of_a_token_mixer_is_named() -> None:
    """What stands behind the coefficients is easily confused: nothing of it may be given by position."""
    a = torch.rand(1, 4, 2, 3)
    for make in (lambda *more: Scan(a, a, a, *more), lambda *more: DeltaScan(a, a, a, a, a, *more)):
        assert make().sizes == (2, 2)
        with pytest.raises(TypeError, match="positional"):
            make(torch.ones(2))
    with pytest.raises(TypeError, match="positional"):
        Attention(torch.rand(1, 1, 2, 2), 2)  # type: ignore[call-arg]
    assert isinstance(Scan(a, a, a), Recurrence) and not isinstance(Attention(torch.rand(1, 1, 2, 2)), Recurrence)


def test_a_delta_scan_refuses_what_is_not_one() -> None:
    a = torch.rand(1, 4, 2, 3)
    with pytest.raises(ValueError, match=r"\(B, L, H, N\) .* not \(4, 2\)"):
        DeltaScan(a, a, a, a, a[0, :, :, 0])
    with pytest.raises(ValueError, match="chunk must be at least 1"):
        DeltaScan(a, a, a, a, a, chunk=0)
    with pytest.raises(ValueError, match="2 heads of 3 channels, but the input has 5"):
        DeltaScan(a, a, a, a, a, head_size=3).apply(torch.randn(1, 4, 5))
    with pytest.raises(ValueError, match="shapes"):
        DeltaScan(a, a, a, a, a[:, :, :, :2])


@every_seed
def test_the_convolution_is_the_written_out_sum(seed: int) -> None:
    operator, shape = convolution(seed, torch.float64)
    assert isinstance(operator, CausalConv)
    x = torch.randn(shape, dtype=torch.float64)
    assert_close(operator.apply(x), oracles.conv(x, operator.w))
    assert_close(operator.apply(x, bias=True), oracles.conv(x, operator.w, operator.bias))
    assert_close(channel_matrices(operator, x), oracles.conv_matrix(operator.w, shape[1]).expand(shape[0], -1, -1, -1))


@every_seed
def test_a_projection_mixes_the_channels_of_each_token(seed: int) -> None:
    operator, shape = projection(seed, torch.float64)
    assert isinstance(operator, Projection) and operator.bias is not None
    x = torch.randn(shape, dtype=torch.float64)
    assert_close(operator.apply(x), torch.einsum("oc,blc->blo", operator.W, x))
    assert_close(operator.apply(x, bias=True), torch.einsum("oc,blc->blo", operator.W, x) + operator.bias)


# --- Chains -------------------------------------------------------------------------------------------------------


@every_seed
def test_a_chain_is_the_product_in_order_with_every_bias_carried_through(seed: int) -> None:
    chain, shape = layer(seed, torch.float64)
    assert isinstance(chain, Chain)
    x = torch.randn(shape, dtype=torch.float64)
    out, gate, scan, act, conv, into, mask = chain.factors.values()
    y = into.apply(mask.apply(x), bias=True)
    y = out.apply(gate.apply(scan.apply(act.apply(conv.apply(y, bias=True)))))
    assert_close(chain.apply(x, bias=True), y)
    linear = out.apply(gate.apply(scan.apply(act.apply(conv.apply(into.apply(mask.apply(x)))))))
    assert_close(chain.apply(x), linear)
    assert list(chain.factors) == ["out", "gate", "scan", "act", "conv", "in", "mask"]
    assert chain.sizes == (6, 4)
    assert chain.mixes_tokens and chain.mixes_channels


@every_seed
def test_the_three_parts_of_a_split_multiply_back_to_the_chain(seed: int) -> None:
    chain, shape = layer(seed, torch.float64)
    assert isinstance(chain, Chain)
    x = torch.randn(shape, dtype=torch.float64)
    for name, expected in ((None, ["gate", "scan", "act", "conv"]), ("scan", ["scan"]), ("conv", ["conv"])):
        parts = output, inner, into = chain.split(name)
        assert list(inner.factors) == expected
        assert [n for part in parts for n in part.factors] == list(chain.factors)
        for bias in (False, True):
            assert_close(output.apply(inner.apply(into.apply(x, bias), bias), bias), chain.apply(x, bias))
        assert not inner.mixes_channels
        if name is None:
            assert not output.mixes_tokens and not into.mixes_tokens


@every_seed
def test_a_split_takes_everything_channelwise_around_the_token_mixers(seed: int) -> None:
    inner, _ = core(seed, torch.float64)
    assert isinstance(inner, Chain)
    output, whole, into = inner.split()
    assert (list(output.factors), list(whole.factors), list(into.factors)) == ([], list(inner.factors), [])
    assert_close(output.apply(torch.ones(1, 1, 2)), torch.ones(1, 1, 2))


def test_a_split_is_refused_where_there_is_no_attention() -> None:
    conv, mix = CausalConv(torch.randn(3, 2)), Projection(torch.randn(3, 3))
    for ask in (Chain({"in": mix}).split, lambda: Chain({"in": mix}).mixers):
        with pytest.raises(ValueError, match=r"No factor of \['in'\] mixes tokens"):
            ask()
    with pytest.raises(ValueError, match="no factor 'scan'"):
        Chain({"one": conv}).split("scan")


@every_seed
def test_a_split_keeps_what_mixes_channels_between_token_mixers_in_the_core(seed: int) -> None:
    chain, shape = tangled(seed, torch.float64)
    assert isinstance(chain, Chain)
    x = torch.randn(shape, dtype=torch.float64)
    output, inner, into = chain.split()
    inside = ["gate", "scan", "norm", "value", "act", "shift", "turn", "again"]
    assert (list(output.factors), list(inner.factors), list(into.factors)) == (["out", "centre"], inside, ["in"])
    assert inner.mixes_channels and not output.mixes_tokens and not into.mixes_tokens
    for bias in (False, True):
        assert_close(output.apply(inner.apply(into.apply(x, bias), bias), bias), chain.apply(x, bias))
    assert chain.mixers == ("scan", "shift", "again")
    _, alone, after = chain.split("scan")
    assert list(alone.factors) == ["scan"] and list(after.factors) == [*inside[2:], "in"]


@every_seed
def test_the_channelwise_runs_are_what_lies_between_what_mixes_channels(seed: int) -> None:
    chain, _ = tangled(seed, torch.float64)
    assert isinstance(chain, Chain)
    runs = chain.channelwise()
    assert [list(run.factors) for run in runs] == [["gate", "scan"], ["act", "shift"], ["again"]]
    assert not any(run.mixes_channels for run in runs)
    assert [run.factors["shift"] is chain.factors["shift"] for run in runs[1:2]] == [True]
    inner, _ = core(seed, torch.float64)
    assert isinstance(inner, Chain)
    assert [list(run.factors) for run in inner.channelwise()] == [list(inner.factors)]
    assert Chain({"in": Projection(torch.randn(2, 2)), "gate": Diagonal(torch.ones(1))}).channelwise() == []


@every_seed
def test_a_chain_is_causal_if_all_its_factors_are(seed: int) -> None:
    made, _, (B, L, D) = random_attention(seed, torch.float64)
    gate = Diagonal(torch.randn(B, L, D, dtype=torch.float64))
    assert Chain({"gate": gate, "attention": made}).causal == made.causal
    assert Chain({}).causal and Chain({"gate": gate}).causal


def test_neighbours_of_wrong_sizes_are_refused_by_name() -> None:
    with pytest.raises(ValueError, match="'out' takes 5 channels, but 'in' to its right gives 4"):
        Chain({"out": Projection(torch.randn(2, 5)), "in": Projection(torch.randn(4, 3))})
    shared = Diagonal(torch.randn(1, 1, 1))
    with pytest.raises(ValueError, match="'out' takes 5 channels, but 'conv' to its right gives 4"):
        Chain({"out": Projection(torch.randn(2, 5)), "shared": shared, "conv": CausalConv(torch.randn(4, 2))})
    with pytest.raises(ValueError, match="'gate' takes 3 channels, but 'scan' to its right gives 4"):
        a = torch.rand(1, 2, 2, 1)
        Chain({"gate": Diagonal(torch.randn(1, 2, 3)), "scan": Scan(a, a, a, head_size=2)})
    assert Chain({"shared": shared, "conv": CausalConv(torch.randn(4, 2)), "scale": shared}).sizes == (4, 4)


def test_the_empty_chain_is_the_identity() -> None:
    x = torch.randn(2, 3, 4)
    empty = Chain({})
    assert torch.equal(empty.apply(x, bias=True), x) and torch.equal(empty.adjoint(x), x)
    assert empty.sizes == (None, None) and not empty.mixes_tokens


def test_a_chain_keeps_its_own_factors() -> None:
    factors: dict[str, Operator] = {"scale": Diagonal(torch.ones(1))}
    chain = Chain(factors)
    factors["more"] = Diagonal(torch.zeros(1))
    assert list(chain.factors) == ["scale"]
    with pytest.raises(TypeError):
        chain.factors["scale"] = factors["more"]  # type: ignore[index]


@every_seed
def test_without_leaves_out_exactly_what_it_names(seed: int) -> None:
    chain, shape = layer(seed, torch.float64)
    assert isinstance(chain, Chain)
    x = torch.randn(shape, dtype=torch.float64)
    factors = dict(chain.factors)
    for name in ("gate", "conv", "act", "scan", "mask"):
        rest = Chain({key: value for key, value in factors.items() if key != name})
        assert_close(chain.without(name).apply(x, bias=True), rest.apply(x, bias=True))
    scan = factors["scan"]
    assert isinstance(scan, Scan)
    for term in ("skip", "bonus"):
        if getattr(scan, term) is None:
            continue
        nothing: dict[str, Any] = {term: None}
        kept = dataclasses.replace(scan, **nothing)
        assert_close(chain.without(term).apply(x, True), Chain({**factors, "scan": kept}).apply(x, True))
        assert term not in chain.without(term).terms
        assert_close(scan.without(term).apply(torch.ones(*shape[:2], scan.sizes[1] or 0, dtype=torch.float64)),
                     kept.apply(torch.ones(*shape[:2], scan.sizes[1] or 0, dtype=torch.float64)))  # fmt: skip
    assert_close(chain.without("bias").apply(x, bias=True), chain.apply(x))
    assert_close(chain.without("conv", "bias").apply(x, bias=True), chain.without("conv").apply(x))
    assert chain.without().terms == chain.terms
    assert {"gate", "scan", "act", "conv", "mask", "bias"} <= set(chain.terms)


def test_without_refuses_what_is_not_there() -> None:
    chain = Chain({"out": Projection(torch.randn(2, 2)), "gate": Diagonal(torch.randn(1, 1, 2))})
    with pytest.raises(ValueError, match=r"Nothing named 'conv' can be left out here; choose from .*gate"):
        chain.without("conv")
    with pytest.raises(ValueError, match="'out'"):
        chain.without("out")
    with pytest.raises(ValueError, match="CausalConv has no term 'bias'"):
        CausalConv(torch.randn(2, 2)).without("bias")


# --- Gradients ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("P", [1, 2], ids=["by states", "by matrix"])
@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize("states", [1, 2])
def test_gradients_flow_through_the_scan(P: int, lag: int, states: int) -> None:
    torch.manual_seed(0)
    step, b, c = torch.rand(3, 1, 4, 2, 2, dtype=torch.float64)
    A = -torch.rand(1, 1, 2, states, dtype=torch.float64)
    skip, bonus = torch.randn(2, 2 * P, dtype=torch.float64)
    x = torch.randn(1, 4, 2 * P, dtype=torch.float64)
    values = [t.clone().requires_grad_() for t in (step[..., :1], A, b, c, skip, bonus, x)]

    def run(step: Tensor, A: Tensor, b: Tensor, c: Tensor, skip: Tensor, bonus: Tensor, x: Tensor) -> Tensor:
        a = Product((step, A), exponential=True)
        scan = Scan(a, Product((step, b)), c, skip=skip, bonus=bonus, head_size=P, lag=lag, chunk=3)
        return torch.cat([scan.apply(x), scan.adjoint(x)])

    assert torch.autograd.gradcheck(run, values)


@pytest.mark.parametrize("P", [1, 2])
@pytest.mark.parametrize("states", [1, 2])
def test_gradients_flow_through_the_delta_scan(P: int, states: int) -> None:
    torch.manual_seed(0)
    a, b, c, recall, erase = torch.rand(5, 1, 4, 2, 2, dtype=torch.float64)
    skip, x = torch.randn(2 * P, dtype=torch.float64), torch.randn(1, 4, 2 * P, dtype=torch.float64)
    values = [t.clone().requires_grad_() for t in (a[..., :states], b, c, recall, erase, skip, x)]

    def run(a: Tensor, b: Tensor, c: Tensor, recall: Tensor, erase: Tensor, skip: Tensor, x: Tensor) -> Tensor:
        scan = DeltaScan(a, b, c, recall, erase, skip=skip, head_size=P, chunk=3)
        return torch.cat([scan.apply(x), scan.adjoint(x)])

    assert torch.autograd.gradcheck(run, values)


def test_gradients_flow_where_a_decay_is_zero() -> None:
    torch.manual_seed(0)
    for P in (1, 2):
        a = torch.tensor([0.5, 0.0, 0.7, 0.0], dtype=torch.float64).view(1, 4, 1, 1).requires_grad_()
        b, c = torch.randn(2, 1, 4, 1, 2, dtype=torch.float64)
        x = torch.randn(1, 4, P, dtype=torch.float64, requires_grad=True)
        assert torch.autograd.gradcheck(lambda a, x, b=b, c=c, P=P: Scan(a, b, c, head_size=P).apply(x), (a, x))


@pytest.mark.parametrize("build", [layer, tangled], ids=["layer", "tangled"])
def test_gradients_flow_through_a_whole_chain(build: Build) -> None:
    chain, shape = build(2, torch.float64)
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: chain.apply(x, bias=True), (x,))
    u = torch.randn_like(chain.apply(x))
    (gradient,) = torch.autograd.grad((chain.apply(x, bias=True) * u).sum(), x)
    assert_close(gradient, chain.adjoint(u))


@pytest.mark.parametrize("K", [2, 3, 4])
def test_a_convolution_that_reads_ahead_is_torchs_with_the_same_length(K: int) -> None:
    x, w, bias = torch.randn(2, 6, 3), torch.randn(3, K), torch.randn(3)
    expected = F.conv1d(x.mT, w.unsqueeze(1), bias, padding="same", groups=3).mT
    assert_close(Conv(w, K // 2, bias).apply(x, bias=True), expected)


def test_a_reordered_operator_reads_the_tokens_in_its_order() -> None:
    order = torch.tensor([2, 0, 3, 1])
    conv = CausalConv(torch.randn(1, 2))
    x = torch.randn(1, 4, 1)
    y = Reordered(conv, order).apply(x)[0, :, 0]
    read = [2, 0, 3, 1]
    for place, token in enumerate(read):
        before = x[0, read[place - 1], 0] if place else 0.0
        assert_close(y[token], conv.w[0, 1] * x[0, token, 0] + conv.w[0, 0] * before)
