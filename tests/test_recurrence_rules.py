"""The rules of relevance for recurrences: every product of every token, against plain loops."""

import operator
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from captum_ssm.layers.averages import averages
from captum_ssm.operators import DeltaScan, Product, Recurrence, Scan, chunk
from captum_ssm.operators.device_sizes import DeviceSize
from captum_ssm.relevance.difference import Difference
from captum_ssm.relevance.frozen import Frozen
from captum_ssm.relevance.recurrence import difference_of_scans, linear_scan
from captum_ssm.relevance.stacked import Stacked
from captum_ssm.relevance.traced import Traced
from tests.conftest import random
from tests.oracles_relevance import difference_of_recurrence, product, read, shapley

B, L = 2, 7


class Case(NamedTuple):
    """A recurrence: heads, states, channels of a head, and the sizes of its decay."""

    heads: int = 2
    states: int = 3
    channels: int = 1
    decays: int = 1
    lag: int = 0
    delta: bool = False
    exponential: bool = False
    parts: tuple[str, ...] = ()
    """Coefficients that are products of two factors: of a token's and a state's."""
    shared: tuple[str, ...] = ()
    """Coefficients that are the same for all tokens and examples."""


CASES: dict[str, Case] = {
    "one channel": Case(heads=4, decays=3),
    "one channel, lag": Case(heads=4, decays=3, lag=1),
    "one channel, decay by head": Case(heads=4, decays=1),
    "few channels": Case(channels=2, decays=3),
    "few channels, lag": Case(channels=2, decays=3, lag=1),
    "decay by head": Case(channels=4),
    "decay by head, lag": Case(channels=4, lag=1),
    "decay by state": Case(channels=5, decays=3),
    "decay by state, lag": Case(channels=5, decays=3, lag=1),
    "one state": Case(heads=4, states=1, decays=1),
    "one state, lag": Case(heads=3, states=1, channels=2, decays=1, lag=1),
    "one token's length of decay": Case(channels=4, shared=("a",)),
    "shared input": Case(heads=3, decays=3, shared=("b",)),
    "shared output": Case(channels=4, shared=("c",)),
    "S6": Case(heads=4, decays=3, exponential=True, parts=("a", "b")),
    "S6 with one decay": Case(heads=4, decays=1, exponential=True, parts=("a", "b")),
    "SSD": Case(channels=4, exponential=True, parts=("a", "b")),
    "SSD, lag": Case(channels=4, exponential=True, parts=("b", "c"), lag=1),
    "every part": Case(heads=3, decays=3, parts=("a", "b", "c")),
    "gated delta": Case(channels=4, delta=True),
    "gated delta, one channel": Case(delta=True),
    "decays by state, delta": Case(channels=4, decays=3, delta=True),
    "delta, parts": Case(channels=4, delta=True, exponential=True, parts=("a", "b", "recall", "erase")),
    "decays by state, delta, parts": Case(channels=2, decays=3, delta=True, parts=("a", "b", "c", "recall", "erase")),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def factors_of(case: Case) -> list[list[tuple[Tensor, Tensor]]]:
    """The factors of every coefficient, with their references."""
    found = []
    for name in ("a", "b", "c", *(("recall", "erase") if case.delta else ())):
        N = case.decays if name == "a" else case.states
        whole = (1, 1) if name in case.shared else (B, L)
        shapes = [(B, L, case.heads, 1), (1, 1, case.heads, N)] if name in case.parts else [(*whole, case.heads, N)]
        pairs = [random(*shape) for shape in shapes]
        if name == "a":  # no growth
            pairs = [(v.detach().sigmoid(), r.sigmoid()) for v, r in pairs]
            if case.exponential:
                pairs[0] = -pairs[0][0], -pairs[0][1]
            pairs = [(v.requires_grad_(), r) for v, r in pairs]
        found.append(pairs)
    return found


def scan_of(case: Case, factors: list[list[tuple[Tensor, Tensor]]], tokens: int | None) -> Recurrence:
    coefficients: list[Any] = [Product(tuple(v for v, _ in pairs)) for pairs in factors]
    coefficients[0] = Product(coefficients[0].factors, exponential=case.exponential)
    if case.delta:
        return DeltaScan(*coefficients, head_size=case.channels, chunk=tokens)
    return Scan(*coefficients, lag=case.lag, head_size=case.channels, chunk=tokens)


def flat(factors: list[list[tuple[Tensor, Tensor]]], side: int) -> tuple[Tensor, ...]:
    return tuple(pair[side] for pairs in factors for pair in pairs)


def assert_exact(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape
    assert expected.abs().max() > 0
    assert (actual - expected).abs().max() <= 1e-12 * expected.abs().max().clamp_min(1)


@every_case
@pytest.mark.parametrize(("chunk", "share"), [(None, 0.5), (1, 0.75), (3, 1.0)])
def test_the_multipliers_are_those_of_every_product_of_every_token(case: Case, chunk: int | None, share: float) -> None:
    factors, x = factors_of(case), random(B, L, case.heads, case.channels)
    dy = torch.randn(B, L, case.heads, case.channels, dtype=torch.float64)
    leaves = [x[0], *flat(factors, 0)]
    expected, other = difference_of_recurrence(factors, x, case.lag, case.exponential, share)
    y, reference = difference_of_scans(
        scan_of(case, factors, chunk), (x[0], flat(factors, 0)), (x[1], flat(factors, 1)), share
    )
    assert_exact(y, expected)
    assert_exact(reference, other)
    assert not reference.requires_grad
    for found, wanted in zip(
        torch.autograd.grad((y * dy).sum(), leaves), torch.autograd.grad((expected * dy).sum(), leaves), strict=True
    ):
        assert_exact(found, wanted)


@every_case
@pytest.mark.parametrize("entries", [1, 200])
def test_the_number_of_chunks_at_once_never_changes_the_result(
    case: Case, entries: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One chunk at a time, two or three, or all, each of which hands its state on to the next."""
    factors, x = factors_of(case), random(B, L, case.heads, case.channels)
    leaves = [x[0], *flat(factors, 0)]
    dy, results = torch.randn(B, L, case.heads, case.channels, dtype=torch.float64), []
    for limit in (10**9, entries):
        monkeypatch.setattr(chunk, "_ENTRIES", DeviceSize(limit, limit))
        scan = scan_of(case, factors, 1)
        y, reference = difference_of_scans(scan, (x[0], flat(factors, 0)), (x[1], flat(factors, 1)), 0.75)
        results.append([y, reference, scan.mix(x[0]), *torch.autograd.grad((y * dy).sum(), leaves)])
    for one, other in zip(*results, strict=True):
        assert_exact(one, other)


@every_case
def test_the_difference_is_complete_at_every_output(case: Case) -> None:
    factors, x = factors_of(case), random(B, L, case.heads, case.channels)
    y, reference = difference_of_scans(scan_of(case, factors, None), (x[0], flat(factors, 0)), (x[1], flat(factors, 1)))
    pairs = [x, *zip(flat(factors, 0), flat(factors, 1))]
    for _ in range(3):
        dy = torch.randn_like(y)
        gradients = torch.autograd.grad((y * dy).sum(), [v for v, _ in pairs], retain_graph=True)
        found = sum(((v - r) * g).sum() for (v, r), g in zip(pairs, gradients))
        assert abs(found - ((y - reference) * dy).sum()) <= 1e-12 * (y * dy).abs().sum()


def test_a_reference_equal_to_the_value_gives_the_gradient() -> None:
    case = CASES["S6"]
    factors = [[(v, v.detach()) for v, _ in pairs] for pairs in factors_of(case)]
    x, _ = random(B, L, case.heads, 1)
    leaves = [x, *flat(factors, 0)]
    scan = scan_of(case, factors, None)
    y, reference = difference_of_scans(scan, (x, flat(factors, 0)), (x.detach(), flat(factors, 1)))
    assert_exact(y, reference)
    dy = torch.randn_like(y)
    plain = torch.autograd.grad((scan.mix(x) * dy).sum(), leaves)
    for found, wanted in zip(torch.autograd.grad((y * dy).sum(), leaves), plain, strict=True):
        assert_exact(found, wanted)


@every_case
def test_an_input_that_is_one_constant_may_have_changing_coefficients(case: Case) -> None:
    """With one example, also where value and reference are the same tensor: the ones that a normaliser sums."""
    factors = [[(v[:1].detach().requires_grad_(), r[:1]) for v, r in pairs] for pairs in factors_of(case)]
    x = torch.randn(1, L, case.heads, case.channels, dtype=torch.float64)
    leaves = list(flat(factors, 0))
    y, reference = difference_of_scans(scan_of(case, factors, None), (x, leaves), (x, flat(factors, 1)), 0.75)
    expected, other = difference_of_recurrence(factors, (x, x), case.lag, case.exponential, 0.75)
    assert_exact(y, expected)
    assert_exact(reference, other)
    changing = [v for v in leaves if v.requires_grad and v.shape[1] > 1]
    dy = torch.randn_like(y)
    gradients = torch.autograd.grad((y * dy).sum(), changing), torch.autograd.grad((expected * dy).sum(), changing)
    for found, wanted in zip(*gradients, strict=True):
        assert_exact(found, wanted)


def test_the_exponential_is_smooth_where_value_and_reference_meet() -> None:
    """In float32 the multipliers of decays a rounding apart are those of float64."""
    case = CASES["S6"]
    factors = [[(v, v.detach() * (1 + 1e-7 * torch.randn_like(v))) for v, _ in pairs] for pairs in factors_of(case)]
    x, other = random(B, L, case.heads, 1)
    found = []
    for dtype in (torch.float64, torch.float32):
        some = [[(v.detach().to(dtype).requires_grad_(), r.to(dtype)) for v, r in pairs] for pairs in factors]
        y, _ = difference_of_scans(
            scan_of(case, some, None), (x.detach().to(dtype), flat(some, 0)), (other.to(dtype), flat(some, 1))
        )
        found.append(torch.autograd.grad(y.sum(), flat(some, 0)))
    for wide, narrow in zip(*found, strict=True):
        assert (narrow.double() - wide).abs().max() <= 1e-5 * wide.abs().max()


def test_a_stacked_pair_comes_apart_again_and_a_constant_is_not_copied() -> None:
    value, reference = torch.randn(2, 3, 4, 1, 2).unbind()
    pair = Stacked.of(value, reference, 3)
    assert all(torch.equal(found, wanted) for found, wanted in zip(pair.pair, (value, reference), strict=True))
    assert torch.equal(pair.mean(0.0), reference) and torch.equal(pair.mean(1.0), value)
    assert torch.allclose(pair.mean(0.75), 0.75 * value + 0.25 * reference)
    one, other = torch.randn(2, 1, 4, 1, 2).unbind()
    assert Stacked.of(one, other, 3).tensor.shape[0] == 6 and Stacked.of(one, value, 3).tensor.shape[0] == 6
    constant = Stacked.of(one, one, 3)
    assert constant.tensor is one and constant.mean(0.3) is one and all(t is one for t in constant.pair)


# --- The Shapley value --------------------------------------------------------------------------------------------


def multiplied(*factors: Tensor) -> Tensor:
    return torch.stack(torch.broadcast_tensors(*factors)).prod(0)


@pytest.mark.parametrize("count", [2, 3])
def test_the_oracle_shares_a_product_by_its_shapley_value(count: int) -> None:
    pairs = [random(5) for _ in range(count)]
    y, _ = product(*pairs)
    gradients = torch.autograd.grad(y.sum(), [v for v, _ in pairs])
    wanted = shapley(multiplied, [v.detach() for v, _ in pairs], [r for _, r in pairs])
    for (value, reference), gradient, share in zip(pairs, gradients, wanted):
        assert_exact((value.detach() - reference) * gradient, share)


def test_one_step_of_a_recurrence_shares_step_size_b_and_x_by_their_shapley_value() -> None:
    """``y = c (step b x)`` from an empty state, c held: three factors, none of which comes first."""
    step, b, x = (random(3, 1, 4, 1) for _ in range(3))
    one = torch.ones(1, 1, 1, 1, dtype=torch.float64)
    scan = Scan(one, Product((step[0], b[0])), one)
    y, _ = difference_of_scans(scan, (x[0], (one, step[0], b[0], one)), (x[1], (one, step[1], b[1], one)))
    gradients = torch.autograd.grad(y.sum(), [step[0], b[0], x[0]])
    wanted = shapley(multiplied, [t[0].detach() for t in (step, b, x)], [t[1] for t in (step, b, x)])
    for (value, reference), gradient, share in zip((step, b, x), gradients, wanted):
        assert_exact((value.detach() - reference) * gradient, share)


@pytest.mark.parametrize("function", [torch.mul, torch.matmul, lambda x, y: torch.einsum("ij,jk->ik", x, y)])
def test_a_product_of_two_is_shared_by_the_shapley_value(function: Any) -> None:
    x, y = random(4, 4), random(4, 4)
    out = function(*(Traced.of(*pair, Difference()) for pair in (x, y)))
    gradients = torch.autograd.grad(out.value.sum(), [x[0], y[0]])
    wanted = shapley(lambda *t: function(*t).sum(), [x[0].detach(), y[0].detach()], [x[1], y[1]])
    for (value, reference), gradient, share in zip((x, y), gradients, wanted):
        assert_exact(((value.detach() - reference) * gradient).sum(), share)


@pytest.mark.parametrize("share", [0.0, 0.5, 0.75, 1.0])
@pytest.mark.parametrize("gate", ["activated", "inverse"])
@pytest.mark.parametrize("first", [True, False])
def test_a_value_and_what_reads_it_share_what_they_change_together(share: float, gate: Any, first: bool) -> None:
    """For a gate as the oracle has it; for one over b by its law, with the shares weighed by the denominators."""
    (v, w), (g, h) = random(5), random(5)
    if gate == "inverse":
        g, h = (g.detach().abs() + 0.1).requires_grad_(), h.abs() + 0.1
    rule = Difference(share)
    pairs = Traced.of(v, w, rule), Traced.of(g, h, rule, gate)
    out = operator.mul(*pairs) if first else operator.mul(*pairs[::-1])
    gradients = torch.autograd.grad(out.value.sum(), [v, g])
    if gate == "activated":
        wanted = torch.autograd.grad(read((v, w), (g, h), share)[0].sum(), [v, g])
    else:  # a/b - a'/b' = ((a - a') - (q a/b + p a'/b') (b - b')) / (p b + q b')
        b, c = 1 / g.detach(), 1 / h
        whole = share * b + (1 - share) * c
        mean = (1 - share) * v.detach() * g.detach() + share * w * h
        wanted = 1 / whole, mean * (c - b) / (g.detach() - h) / whole
    for found, expected in zip(gradients, wanted):
        assert_exact(found, expected)


@pytest.mark.parametrize("change", [
    lambda x, like: x.expand(3, 4), lambda x, like: x.expand_as(like), lambda x, like: x.reshape_as(like[:, :1]),
    lambda x, like: x.to(like), lambda x, like: x.unsqueeze(0)[0], lambda x, like: x.mT.contiguous().mT,
])  # fmt: skip
def test_what_only_changes_its_form_stays_the_inverse_that_it_is(change: Any) -> None:
    """Also where the form is that of something traced."""
    rule = Difference()
    x, reference = random(3, 1)
    scale: Any = torch.rsqrt(Traced.of(x.detach().abs(), reference.abs(), rule))
    assert scale.origin == "inverse"
    assert change(scale, Traced.of(*random(3, 4), rule)).origin == "inverse"


# --- Through the rules --------------------------------------------------------------------------------------------


@every_case
def test_a_held_recurrence_is_linear_with_its_adjoint_as_the_gradient(case: Case) -> None:
    factors, (x, r) = factors_of(case), random(B, L, case.heads, case.channels)
    scan = scan_of(case, [[(v.detach(), r) for v, r in pairs] for pairs in factors], None)
    dy = torch.randn(B, L, case.heads, case.channels, dtype=torch.float64)
    expected = scan.mix(x)
    found, other = linear_scan(scan, x, r)
    assert_exact(found, expected)
    assert_exact(other, scan.mix(r))
    (wanted,) = torch.autograd.grad((expected * dy).sum(), x)
    (gradient,) = torch.autograd.grad((found * dy).sum(), x)
    assert_exact(gradient, wanted)


@pytest.mark.parametrize("name", ["S6", "decay by head, lag", "delta, parts"])
def test_a_recurrence_of_traced_coefficients_goes_to_the_rule(name: str) -> None:
    case = CASES[name]
    factors, x = factors_of(case), random(B, L, case.heads, case.channels)
    dy = torch.randn(B, L, case.heads * case.channels, dtype=torch.float64)
    leaves = [x[0], *flat(factors, 0)]
    expected, other = difference_of_recurrence(factors, x, case.lag, case.exponential, state_share=0.8)
    wanted = torch.autograd.grad((expected.flatten(2) * dy).sum(), leaves)
    for rule in (Difference(0.8), Frozen()):
        pairs: Any = [[(Traced.of(*pair, rule), pair[1]) for pair in pairs] for pairs in factors]
        y: Any = scan_of(case, pairs, None).apply(Traced.of(*x, rule).flatten(2))
        gradients = torch.autograd.grad((y.value * dy).sum(), leaves, allow_unused=True)
        assert_exact(y.value, expected.flatten(2))
        if isinstance(rule, Difference):
            assert_exact(y.reference, other.flatten(2))
            for found, gradient in zip(gradients, wanted, strict=True):
                assert_exact(found, gradient)
        else:
            held = scan_of(case, factors, None).with_factors([f.detach() for f in flat(factors, 0)])
            (into_x,) = torch.autograd.grad((held.mix(x[0]).flatten(2) * dy).sum(), x[0])
            assert_exact(gradients[0], into_x)
            assert all(gradient is None for gradient in gradients[1:])
            assert_exact(y.reference, held.mix(x[1]).flatten(2))


# --- Averages with exponential weights ----------------------------------------------------------------------------


def averages_written_out(k: Any, v: Any, w: Tensor, bonus: Tensor) -> Any:
    """The averages as (L, L) matrices, from functions whose rules are tested above; one constant for each row."""
    L = k.shape[1]
    distance = torch.arange(L)[:, None] - 1 - torch.arange(L)
    shift = torch.where(torch.eye(L, dtype=torch.bool)[..., None], bonus, -distance[..., None] * w)  # (L, L, D)
    shift = shift.masked_fill(torch.ones(L, L, dtype=torch.bool).triu(1)[..., None], -torch.inf)
    exponents = [t[:, None] + shift for t in (k.value.detach(), k.reference)]
    c = torch.maximum(*exponents).amax(2, keepdim=True)
    weights = torch.exp(k.unsqueeze(1) + (shift - c))  # (B, L, L, D)
    own = weights.diagonal(dim1=1, dim2=2).transpose(1, 2)
    earlier = (weights * (1 - torch.eye(L, dtype=c.dtype))[..., None]).unsqueeze(-1).sum(-1)  # no gate any more
    number = (earlier * v.unsqueeze(1)).sum(2) + own * v
    return number / (earlier.sum(2) + own)


def multipliers_of_averages(
    function: Any, inputs: list[tuple[Tensor, Tensor]], weights: Tensor, share: float
) -> list[Tensor]:
    """The averages of value and reference, and the multipliers of their weighed sum in keys and values."""
    leaves = [value.detach().requires_grad_() for value, _ in inputs[:2]]
    rule = Difference(share)
    pairs = [Traced.of(leaf, reference, rule) for leaf, (_, reference) in zip(leaves, inputs)]
    out = function(*pairs, *(value for value, _ in inputs[2:]))
    return [out.value.detach(), out.reference, *torch.autograd.grad((out.value * weights).sum(), leaves)]


@pytest.mark.parametrize("level", [-150.0, 0.0, 150.0])
@pytest.mark.parametrize("length", [1, 2, 7, 50])
@pytest.mark.parametrize("share", [0.25, 0.5, 0.75])
def test_averages_have_the_rules_of_their_functions_at_any_level(share: float, length: int, level: float) -> None:
    """In float64; and in float32, where exponents of 104 are 0."""
    shape, tall = (2, length, 3), torch.randn(2, 1, 3, dtype=torch.float64).sign()
    k, r = (5 * t.detach() for t in random(*shape))
    v, u = (t.detach() for t in random(*shape))
    w, bonus = 0.5 * torch.rand(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    weights = torch.randn(shape, dtype=torch.float64)
    inputs = [(k + level * tall, r), (v, u), (w, w), (bonus, bonus)]

    def ours(k: Any, v: Any, w: Tensor, bonus: Tensor) -> Any:
        return averages(k, w, bonus).apply(v)

    expected = multipliers_of_averages(averages_written_out, inputs, weights, share)
    found = multipliers_of_averages(ours, inputs, weights, share)
    narrow = [(a.float(), b.float()) for a, b in inputs]
    in_float32 = multipliers_of_averages(ours, narrow, weights.float(), share)
    for one, other, close in zip(found, expected, in_float32):
        assert (one - other).abs().max() <= 1e-11
        assert (close.double() - other).abs().max() <= 1e-4 * other.abs().max().clamp_min(1e-3)


def test_averages_of_value_and_reference_are_those_of_the_plain_operator() -> None:
    (k, r), (v, u) = random(2, 6, 3), random(2, 6, 3)
    w, bonus = torch.rand(3, dtype=torch.float64), torch.randn(3, dtype=torch.float64)
    rule = Difference()
    found: Any = averages(Traced.of(k, r, rule), w, bonus).apply(Traced.of(v, u, rule))
    assert_exact(found.value, averages(k, w, bonus).apply(v))
    assert_exact(found.reference, averages(r, w, bonus).apply(u))
