"""Layers that read the sequence from both ends: the operators that they need, and Vision Mamba's layer."""

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_ssm import (
    ImplicitAttentionAttribution,
    ImplicitAttentionRelevance,
    ImplicitAttentionRollout,
    InvalidInputError,
    LayerImplicitAttention,
    RawImplicitAttention,
    register,
    unregister,
)
from captum_ssm.layers.adapters.native_s6 import bidirectional
from captum_ssm.matrices.core_matrix import channel_matrices
from captum_ssm.operators import Attention, CausalConv, Centre, Chain, Diagonal, Flip, Operator, Projection, Scan, Sum
from captum_ssm.testing import check_adapter
from tests import oracles, oracles_vision
from tutorials.vision_mamba import Mamba, VisionMamba

SHAPE = (2, 6, 3)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-12) -> None:
    assert actual.shape == expected.shape
    assert expected.abs().max() > 0
    difference = (actual - expected).abs().max()
    assert difference <= tolerance * expected.abs().max(), f"{difference:.1e}"


def randn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.float64)


def moved(module: nn.Module) -> Any:
    """The module in float64 with every weight moved, so that no direction, channel or layer is like another."""
    module = module.double().eval()
    with torch.no_grad():
        for weight in module.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return module


# --- The sequence read from its end ----------------------------------------------------------------------------------


def test_a_causal_operator_becomes_one_that_reads_the_future_alone() -> None:
    conv = CausalConv(randn(3, 3))
    matrices = channel_matrices(conv.flipped(), randn(*SHAPE))
    assert matrices.tril(-1).abs().max() == 0 < matrices.triu(1).abs().max()
    assert_close(matrices, channel_matrices(conv, randn(*SHAPE)).flip(-2, -1))
    assert conv.causal and not conv.flipped().causal


def test_what_is_the_same_for_every_token_is_flipped_into_itself() -> None:
    for operator in (Projection(randn(2, 3)), Centre(3)):
        assert operator.flipped() is operator


@pytest.mark.parametrize(
    "shape", [(), (1,), (3,), (1, 3), (6, 1), (1, 1, 1), (1, 1, 3), (1, 6, 1), (6, 3), (2, 6, 3)], ids=str
)
def test_a_scale_is_flipped_along_the_tokens_alone(shape: tuple[int, ...]) -> None:
    s, x = randn(*shape), randn(*SHAPE)
    for operator in (Diagonal(s), Diagonal(randn(2, 6, 3), s)):
        turned = operator.flipped()
        assert isinstance(turned, Diagonal)
        assert_close(turned.apply(x, True), operator.apply(x.flip(1), True).flip(1))
        assert turned.s.shape == operator.s.shape  # what is shared stays shared
    by_token = len(shape) > 1 and shape[-2] > 1
    assert torch.equal(Diagonal(s).flipped().s, s.flip(-2) if by_token else s)


def test_a_flipped_chain_is_the_chain_of_the_flipped() -> None:
    gate, conv = Diagonal(randn(*SHAPE)), CausalConv(randn(3, 2), randn(3))
    turned = Chain({"gate": gate, "conv": conv}).flipped()
    assert list(turned.factors) == ["gate", "conv"] and isinstance(turned.factors["conv"], Flip)
    assert torch.equal(turned.without("gate").apply(randn(*SHAPE) * 0 + 1), Flip(conv).apply(torch.ones(*SHAPE)))
    assert turned.without("bias").terms == ("gate", "conv")


# --- Sums ------------------------------------------------------------------------------------------------------------


def two_convolutions() -> tuple[Chain, Chain, Sum]:
    one = Chain({"gate": Diagonal(randn(*SHAPE)), "conv": CausalConv(randn(3, 2), randn(3))})
    two = Chain({"scan": Scan(*torch.rand(3, 2, 6, 3, 2, dtype=torch.float64)), "conv": CausalConv(randn(3, 3))})
    return one, two, Sum({"one": one, "two": two})


def test_a_sum_adds_its_summands() -> None:
    one, two, both = two_convolutions()
    x, taps = randn(*SHAPE), [one.factors["conv"].w, two.factors["conv"].w]  # type: ignore[attr-defined]
    scan = two.factors["scan"]
    assert isinstance(scan, Scan)
    first = oracles.diagonal_matrix(one.factors["gate"].s) @ oracles.conv_matrix(taps[0], 6)  # type: ignore[attr-defined]
    second = oracles.scan_alpha(scan.a, scan.b, scan.c) @ oracles.conv_matrix(taps[1], 6)  # type: ignore[arg-type]
    assert_close(channel_matrices(both, x), first + second)
    constant = one.factors["gate"].s * one.factors["conv"].bias  # type: ignore[attr-defined]
    assert_close(both.apply(x, bias=True), oracles.times(first + second, x) + constant)


def test_a_summand_is_left_out_by_its_name() -> None:
    one, two, both = two_convolutions()
    x = randn(*SHAPE)
    assert torch.equal(both.without("two").apply(x, True), one.apply(x, True))
    assert torch.equal(both.without("one").apply(x, True), two.apply(x, True))
    assert "two" not in both.without("one").terms, "the last one cannot be left out"


def test_a_term_is_left_out_of_every_summand_that_has_it() -> None:
    one, two, both = two_convolutions()
    x = randn(*SHAPE)
    for term, expected in {
        "conv": one.without("conv").apply(x, True) + two.without("conv").apply(x, True),
        "gate": one.without("gate").apply(x, True) + two.apply(x, True),
        "bias": one.apply(x) + two.apply(x),
    }.items():
        assert_close(both.without(term).apply(x, True), expected)
    assert torch.equal(both.without("one", "conv").apply(x, True), two.without("conv").apply(x, True))
    assert torch.equal(both.without("one", "gate").apply(x, True), two.apply(x, True)), "gone with its summand"
    assert set(both.terms) == {"one", "two", "gate", "conv", "scan", "bias"}


def test_not_all_of_a_sum_can_be_left_out() -> None:
    _, _, both = two_convolutions()
    with pytest.raises(ValueError, match="at least one summand"):
        both.without("one", "two")
    with pytest.raises(ValueError, match="at least one summand"):
        Sum({})
    with pytest.raises(ValueError, match=r"Nothing named 'act' .* choose from .*gate"):
        both.without("act")


def test_summands_agree_on_their_channels() -> None:
    with pytest.raises(ValueError, match=r"\['a', 'b'\] have \[2, 3\] output channels"):
        Sum({"a": Projection(randn(2, 4)), "b": Projection(randn(3, 4))})
    with pytest.raises(ValueError, match=r"have \[4, None, 5\] input channels"):
        Sum({"a": Projection(randn(2, 4)), "b": Diagonal(randn(1)), "c": Projection(randn(2, 5))})
    assert Sum({"a": Diagonal(randn(1)), "b": Projection(randn(3, 3))}).sizes == (3, 3)
    with pytest.raises(ValueError, match="takes 3 channels, but 'sum' to its right gives 2"):
        Chain({"out": Projection(randn(1, 3)), "sum": Sum({"a": Projection(randn(2, 4))})})


def test_a_sum_keeps_its_own_summands() -> None:
    summands: dict[str, Operator] = {"a": Diagonal(randn(1))}
    both = Sum(summands)
    summands["b"] = Diagonal(randn(1))
    assert list(both.summands) == ["a"]
    with pytest.raises(TypeError):
        both.summands["a"] = summands["b"]  # type: ignore[index]


# --- The summands of a chain -----------------------------------------------------------------------------------------


def test_a_chain_is_the_sum_of_its_summands() -> None:
    _, _, both = two_convolutions()
    chain = Chain({"out": Projection(randn(4, 3), randn(4)), "both": both, "in": Projection(randn(3, 5), randn(3))})
    x, found = randn(2, 6, 5), chain.summands()
    assert list(found) == ["one", "two"]
    assert [list(summand.factors) for summand in found.values()] == [
        ["out", "gate", "conv", "in"],
        ["out", "scan", "conv", "in"],
    ]
    assert_close(found["one"].apply(x) + found["two"].apply(x), chain.apply(x))
    u = randn(2, 6, 4)
    assert_close(found["one"].adjoint(u) + found["two"].adjoint(u), chain.adjoint(u))


def test_each_summand_of_a_chain_has_the_biases_around_the_sum() -> None:
    """It is what the chain would be with that summand alone, so a bias of the output counts in each of them."""
    _, _, both = two_convolutions()
    out, into = Projection(randn(4, 3), randn(4)), Projection(randn(3, 5), randn(3))
    x = randn(2, 6, 5)
    chain = Chain({"out": out, "both": both, "in": into})
    found = chain.summands()
    for name, summand in both.summands.items():
        assert torch.equal(found[name].apply(x, True), out.apply(summand.apply(into.apply(x, True), True), True))
    total = found["one"].apply(x, True) + found["two"].apply(x, True)
    assert out.bias is not None
    assert_close(total - out.bias, chain.apply(x, True))


def test_sums_within_sums_come_apart() -> None:
    a, b, c, d = (Diagonal(randn(*SHAPE)) for _ in range(4))
    x = randn(*SHAPE)
    nested = Chain({"all": Sum({"a": a, "rest": Sum({"b": b, "c": c})})})
    assert list(nested.summands()) == ["a", "rest.b", "rest.c"]
    inside = Chain({"all": Sum({"a": a, "rest": Chain({"d": d, "inner": Sum({"b": b, "c": c})})})})
    assert list(inside.summands()) == ["a", "rest.b", "rest.c"]
    product = Chain({"first": Sum({"a": a, "b": b}), "second": Sum({"c": c, "d": d})})
    assert list(product.summands()) == ["a.c", "a.d", "b.c", "b.d"]
    for chain in (nested, inside, product):
        parts = chain.summands().values()
        assert not any(isinstance(factor, Sum) for part in parts for factor in part.factors.values())
        assert_close(torch.stack([part.apply(x) for part in parts]).sum(0), chain.apply(x))


def test_a_chain_without_a_sum_is_its_only_summand() -> None:
    chain = Chain({"conv": CausalConv(randn(3, 2))})
    assert chain.summands() == {"": chain}


def test_a_factor_with_the_name_of_one_outside_the_sum_gets_its_summand_s_in_front() -> None:
    gate, own, conv, other = (
        Diagonal(randn(*SHAPE)),
        Diagonal(randn(*SHAPE)),
        CausalConv(randn(3, 2)),
        Diagonal(randn(3)),
    )
    x = randn(*SHAPE)
    both = Sum({"one": Chain({"gate": own, "conv": conv}), "two": conv})
    chain = Chain({"gate": gate, "sum": both, "conv": other})
    found = chain.summands()
    assert {name: list(part.factors) for name, part in found.items()} == {
        "one": ["gate", "one.gate", "one.conv", "conv"],
        "two": ["gate", "two", "conv"],
    }
    assert_close(found["one"].apply(x) + found["two"].apply(x), chain.apply(x))
    named = Chain({"gate": gate, "sum": Sum({"gate": conv, "sum": own})}).summands()
    assert {name: list(part.factors) for name, part in named.items()} == {
        "gate": ["gate", "gate.gate"],
        "sum": ["gate", "sum"],
    }


# --- The adapter of Vision Mamba's layer -----------------------------------------------------------------------------

SIZES: dict[str, dict[str, Any]] = {
    "plain": {"d_model": 4, "d_state": 3},
    "whole": {"d_model": 4, "d_state": 2, "if_divide_out": False},
    "scaled": {"d_model": 3, "d_state": 3, "init_layer_scale": 0.5},
    "whole and scaled": {"d_model": 3, "d_state": 1, "init_layer_scale": 0.5, "if_divide_out": False, "expand": 1},
    "one tap": {"d_model": 5, "d_state": 2, "d_conv": 1},
    "more taps than tokens": {"d_model": 2, "d_state": 2, "d_conv": 9},
    "wide rank": {"d_model": 20, "d_state": 2, "d_conv": 2},
}
LENGTHS = [1, 2, 7]


def layer(options: dict[str, Any], biases: bool = False) -> Any:
    """A layer, with a bias in its projections where asked for: the published one can have them."""
    mixer = Mamba(**options)
    if biases:
        mixer.in_proj.bias = nn.Parameter(torch.randn(2 * mixer.d_inner))
        mixer.out_proj.bias = nn.Parameter(torch.randn(mixer.d_model))
    return moved(mixer)


every_size = pytest.mark.parametrize("options", SIZES.values(), ids=list(SIZES))
with_and_without_biases = pytest.mark.parametrize("biases", [False, True], ids=["", "biases"])


@every_size
@with_and_without_biases
@torch.no_grad()
def test_the_chain_is_the_layer(options: dict[str, Any], biases: bool) -> None:
    mixer = layer(options, biases)
    for L in (1, 2, 7, 40):
        x = randn(2, L, mixer.d_model)
        assert_close(bidirectional(mixer, x).apply(x, bias=True), mixer(x))


@every_size
@with_and_without_biases
@torch.no_grad()
def test_the_matrices_are_those_of_both_directions_written_out(options: dict[str, Any], biases: bool) -> None:
    mixer = layer(options, biases)
    for L in LENGTHS:
        x = randn(2, L, mixer.d_model)
        parts = oracles_vision.bidirectional(mixer, x)
        assert_close(parts["y"], mixer(x))
        output, core, into = bidirectional(mixer, x).split()
        forward, backward = (oracles_vision.unified(parts, name) for name in ("forward", "backward"))
        assert_close(channel_matrices(core, parts["value"]), forward + backward)
        assert_close(channel_matrices(core.without("backward"), parts["value"]), forward)
        assert_close(channel_matrices(core.without("forward"), parts["value"]), backward)
        assert_close(into.apply(x, bias=True), parts["value"])
        assert_close(output.apply(parts["gate"]), parts["gate"] @ parts["out"].T)


def test_the_factors_are_those_of_the_equation() -> None:
    names = ["out", "gate", "half", "directions", "in"]
    whole = {"if_divide_out": False}
    for options, expected in {
        "plain": (SIZES["plain"], names),
        "whole": (SIZES["plain"] | whole, ["out", "gate", "directions", "in"]),
        "scaled": (SIZES["scaled"], ["layer_scale", *names]),
    }.values():
        chain = bidirectional(layer(options), randn(1, 3, options["d_model"]))
        assert list(chain.factors) == expected
        directions = chain.factors["directions"]
        assert isinstance(directions, Sum)
        assert {name: list(d.factors) for name, d in directions.summands.items()} == {  # type: ignore[attr-defined]
            "forward": ["scan", "act", "conv"],
            "backward": ["scan", "act", "conv"],
        }


@torch.no_grad()
def test_the_other_spelling_of_the_halving_is_read_too() -> None:
    mixer, x = layer(SIZES["plain"]), randn(1, 5, 4)
    expected = mixer(x)
    del mixer.if_divide_out
    mixer.if_devide_out = True
    assert_close(bidirectional(mixer, x).apply(x, True), expected)
    mixer.if_devide_out = False
    assert_close(bidirectional(mixer, x).apply(x, True), 2 * expected)


def model_of(mixer: nn.Module) -> nn.Module:
    """The smallest model with this layer, read at every token's sum; its inputs are what the layer gets."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = mixer

        def forward(self, x: Tensor) -> Tensor:
            mixed: Tensor = self.mixer(x)
            return (x + mixed).sum(1)

    return Model().eval()


def test_the_layer_passes_the_conformance_suite() -> None:
    for options in (SIZES["plain"], SIZES["scaled"]):
        check_adapter(layer(options), randn(2, 6, options["d_model"]), causal=False)
        with pytest.raises(AssertionError, match="future"):
            check_adapter(layer(options), randn(2, 6, options["d_model"]))


def read(
    mixer: Any, value: Tensor, end: str, A_log: Tensor, order: list[int], convolved: Tensor | None = None
) -> Tensor:
    """Read the tokens of ``value`` (B, L, D) in this order, one after the other; the output is in their own order.

    Each is convolved with those that are read before it, unless the convolved input (B, L, D) is given.
    """
    conv, x_proj, dt_proj = (getattr(mixer, name + end) for name in ("conv1d", "x_proj", "dt_proj"))
    h, y, K = value.new_zeros(len(value), mixer.d_inner, mixer.d_state), torch.zeros_like(value), mixer.d_conv
    for place, token in enumerate(order):
        taken = [(k, order[place - (K - 1) + k]) for k in range(K) if place - (K - 1) + k >= 0]
        pre = sum((conv.weight[:, 0, k] * value[:, before] for k, before in taken), conv.bias)
        u = F.silu(pre) if convolved is None else convolved[:, token]
        low, b, c = x_proj(u).split([mixer.dt_rank, mixer.d_state, mixer.d_state], -1)
        delta = F.softplus(dt_proj(low)).unsqueeze(-1)
        h = torch.exp(-delta * A_log.exp()) * h + delta * u.unsqueeze(-1) * b.unsqueeze(1)
        y[:, token] = (h * c.unsqueeze(1)).sum(-1) + getattr(mixer, "D" + end) * u
    return y


class FirstVersion(Mamba):
    """Vision Mamba's layer of ``bimamba_type="v1"``: the directions share all but their decays, and are not halved."""

    def __init__(self, **options: Any) -> None:
        super().__init__(if_divide_out=False, **options)
        self.bimamba_type = "v1"
        for name in ("conv1d_b", "x_proj_b", "dt_proj_b", "D_b"):
            delattr(self, name)

    def forward(self: Any, hidden_states: Tensor, inference_params: None = None) -> Tensor:
        value, z = self.in_proj(hidden_states).chunk(2, -1)
        u = F.silu(self.conv1d(value.mT)[..., : value.shape[1]].mT)
        order = [*range(value.shape[1])]
        y = read(self, value, "", self.A_log, order) + read(self, value, "", self.A_b_log, order[::-1], u)
        return self.out_proj(y * F.silu(z))


class Volume(Mamba):
    """SegMamba's layer, ``bimamba_type="v3"``, which also reads the first token of each slice, then the second, ..."""

    def __init__(self, nslices: int, **options: Any) -> None:
        super().__init__(if_divide_out=False, **options)
        self.bimamba_type, self.nslices = "v3", nslices
        for name in ("conv1d", "x_proj", "dt_proj", "D"):
            setattr(self, f"{name}_s", copy.deepcopy(getattr(self, name)))
        self.A_s_log = copy.deepcopy(self.A_log)

    def forward(self: Any, hidden_states: Tensor, inference_params: None = None) -> Tensor:
        value, z = self.in_proj(hidden_states).chunk(2, -1)
        L = value.shape[1]
        of_a_slice = L // self.nslices
        slices = [k * of_a_slice + number for number in range(of_a_slice) for k in range(self.nslices)]
        orders = {"": range(L), "_b": range(L - 1, -1, -1), "_s": slices}
        ways = (read(self, value, end, getattr(self, f"A{end}_log"), [*order]) for end, order in orders.items())
        out: Tensor = self.out_proj(sum(ways) * F.silu(z))
        return out


OTHERS: dict[str, tuple[Callable[[], nn.Module], list[str]]] = {
    "v1": (lambda: FirstVersion(d_model=4, d_state=3), ["forward", "backward"]),
    "v3": (lambda: Volume(3, d_model=4, d_state=3), ["forward", "backward", "slices"]),
}


@pytest.mark.parametrize("name", OTHERS)
def test_layers_with_other_directions_are_their_loops_written_out(name: str) -> None:
    make, directions = OTHERS[name]
    mixer = moved(make())
    report = check_adapter(mixer, randn(2, 6, 4), causal=False, tolerance=1e-12)
    after = ("act", "conv") if name == "v1" else ()
    assert report.factors == ("out", "gate", "directions", *after, "in")
    chain = bidirectional(mixer, randn(2, 6, 4))
    assert list(chain.factors["directions"].summands) == directions  # type: ignore[attr-defined]


@pytest.mark.parametrize("name", OTHERS)
def test_a_model_of_layers_with_other_directions_is_explained(name: str) -> None:
    embed, head = nn.Linear(3, 4), nn.Linear(4, 2)
    model = moved(nn.Sequential(embed, OTHERS[name][0](), OTHERS[name][0](), head))
    forward, x, other = (lambda x: model(x).mean(1)), randn(2, 6, 3), randn(2, 6, 3)
    assert ImplicitAttentionRollout(forward, model=model).attribute(x).any()
    method = ImplicitAttentionAttribution(forward, model=model, without=("backward",))
    assert method.attribute(x, 1).any() and max(method.fidelity.values()) <= 1e-12
    relevance = ImplicitAttentionRelevance(forward, model).attribute(x, 1, baselines=other)
    assert_close(relevance.flatten(1).sum(1), (forward(x) - forward(other))[:, 1].detach(), 1e-9)


@pytest.mark.parametrize("attention", ["unified", "scan"])
def test_the_matrices_of_every_channel(attention: Any) -> None:
    mixer, x = layer(SIZES["scaled"]), randn(2, 6, 3)
    parts, model = oracles_vision.bidirectional(mixer, x), model_of(mixer)

    def one(name: str) -> Tensor:
        alpha: Tensor = parts[name]["alpha"]
        return alpha if attention == "scan" else oracles_vision.unified(parts, name)

    def found(**options: Any) -> Tensor:
        method = LayerImplicitAttention(model, 0, attention=attention, **options)
        matrices: Tensor = method.attribute(x, fusion=None)
        return matrices

    assert_close(found(), one("forward") + one("backward"))
    assert_close(found(without="backward"), one("forward"))
    assert_close(found(without="forward"), one("backward"))
    assert found(without="backward").triu(1).abs().max() == 0
    assert found(without="forward").tril(-1).abs().max() == 0


def fused(parts: dict[str, Any], attention: str, fusion: str, names: tuple[str, ...]) -> Tensor:
    """The token matrix of a layer, by its definition; directions are fused apart where only the scan is wanted."""
    directions = [parts[name] for name in names]
    B, L, _ = parts["value"].shape
    if attention == "unified":
        cores = [torch.stack([oracles_vision.unified(parts, name) for name in names]).sum(0)]
        ways, values = [parts["out"].expand(B, L, *parts["out"].shape)], [parts["value"]]
    else:
        cores, values = [p["alpha"] for p in directions], [p["v"] for p in directions]
        ways = [parts["out"] * parts["gate"].unsqueeze(2)] * len(cores)  # (B, L, E, D)
    if fusion not in ("norm", "root"):
        return torch.stack([oracles.fused(core, fusion) for core in cores]).sum(0)
    total = torch.zeros(B, L, L, dtype=torch.float64)
    for core, way, v in zip(cores, ways, values, strict=True):
        for i in range(L):
            for j in range(L):
                added = way[:, i] * (core[:, :, i, j] * v[:, j]).unsqueeze(1)  # (B, E, D)
                total[:, i, j] += added.sum(-1).norm(dim=-1) if fusion == "norm" else added.flatten(1).norm(dim=-1)
    return total


def weighted(parts: dict[str, Any], gradient: Tensor, attention: str, rectify: str | None) -> Tensor:
    """The gradient-weighted token matrix of a layer, by its definition."""
    u = gradient @ parts["out"]
    if attention == "unified":
        cores = [oracles_vision.unified(parts, "forward") + oracles_vision.unified(parts, "backward")]
        us, vs = [u], [parts["value"]]
    else:
        directions = [parts["forward"], parts["backward"]]
        cores, vs, us = [p["alpha"] for p in directions], [p["v"] for p in directions], [u * parts["gate"]] * 2
    entries = [oracles.weighted(*each) for each in zip(cores, us, vs, strict=True)]
    if rectify == "channel":
        return torch.stack([e.clamp(min=0).sum(1) / e.shape[1] for e in entries]).sum(0)
    total = torch.stack([e.sum(1) for e in entries]).sum(0)
    return total.clamp(min=0) if rectify == "token" else total


@pytest.mark.parametrize("attention", ["unified", "scan"])
@pytest.mark.parametrize("fusion", ["mean", "absolute", "positive", "norm", "root"])
def test_the_fused_matrix_of_a_layer(attention: Any, fusion: Any) -> None:
    mixer, x = layer(SIZES["scaled"]), randn(2, 6, 3)
    parts, model = oracles_vision.bidirectional(mixer, x), model_of(mixer)
    for without, names in {
        (): ("forward", "backward"),
        ("backward",): ("forward",),
        ("forward",): ("backward",),
    }.items():
        method = LayerImplicitAttention(model, 0, attention=attention, without=without)
        assert_close(method.attribute(x, fusion=fusion), fused(parts, attention, fusion, names))


@pytest.mark.parametrize("attention", ["unified", "scan"])
def test_both_directions_cannot_be_left_out(attention: Any) -> None:
    model, x = model_of(layer(SIZES["plain"])), randn(1, 4, 4)
    without = ("forward", "backward")
    with pytest.raises(InvalidInputError, match="left without forward, backward"):
        LayerImplicitAttention(model, 0, attention=attention, without=without).attribute(x)
    with pytest.raises(InvalidInputError, match="left without forward, backward"):
        ImplicitAttentionRollout(model, attention=attention, without=without).attribute(x, target=0)


# --- A whole Vision Mamba --------------------------------------------------------------------------------------------


def vision_mamba(**options: Any) -> Any:
    sizes = {"image_size": 6, "patch_size": 2, "channels": 2, "width": 4, "depth": 3, "state_size": 2, "classes": 5}
    return moved(VisionMamba(**sizes | options))


CLASS_TOKENS = ["middle", "first", None]


def read_positions(model: Any, gradient: Tensor) -> Tensor:
    """Where a score is read: at the class token, or at every token by the gradient's length."""
    if model.class_position is not None:
        return nn.functional.one_hot(torch.full((len(gradient),), model.class_position), gradient.shape[1]).double()
    lengths = gradient.square().sum(-1).sqrt()
    return lengths / lengths.sum(1, keepdim=True)


def of_tokens(method: Any, images: Tensor, **options: Any) -> Tensor:
    """The scores of the tokens that read pixels, in the order of the grid's rows, (B, rows * columns)."""
    scores: Tensor = method.attribute(images, patches=True, **options)
    return scores.flatten(1)


def patches_of(model: Any, scores: Tensor) -> Tensor:
    return model.to_grid(scores).flatten(1)


@pytest.mark.parametrize("class_token", CLASS_TOKENS)
@pytest.mark.parametrize("attention", ["unified", "scan"])
@pytest.mark.parametrize("fusion", ["mean", "absolute", "positive", "norm", "root"])
def test_the_rollout_is_the_product_of_the_written_out_matrices(class_token: Any, attention: Any, fusion: Any) -> None:
    model, images = vision_mamba(class_token=class_token), randn(2, 2, 6, 6)
    reads, gradients, _ = oracles_vision.recorded(model, images, 3)
    names = ("forward", "backward")
    matrices = [
        fused(oracles_vision.bidirectional(block.mixer, x), attention, fusion, names)
        for block, x in zip(model.layers, reads, strict=True)
    ]
    expected = oracles.rollout(matrices, read_positions(model, gradients[-1]))
    method = ImplicitAttentionRollout(model, attention=attention, fusion=fusion)
    assert_close(of_tokens(method, images, target=3), patches_of(model, expected), 1e-6)


@pytest.mark.parametrize("class_token", CLASS_TOKENS)
@pytest.mark.parametrize("attention", ["unified", "scan"])
@pytest.mark.parametrize("rectify", ["channel", "token", None])
def test_the_attribution_is_the_product_of_the_written_out_matrices(
    class_token: Any, attention: Any, rectify: Any
) -> None:
    model, images = vision_mamba(class_token=class_token), randn(2, 2, 6, 6)
    reads, gradients, _ = oracles_vision.recorded(model, images, 3)
    matrices = [
        weighted(oracles_vision.bidirectional(block.mixer, x), g, attention, rectify)
        for block, x, g in zip(model.layers, reads, gradients, strict=True)
    ]
    expected = oracles.rollout(matrices, read_positions(model, gradients[-1]))
    method = ImplicitAttentionAttribution(model, attention=attention, rectify=rectify)
    assert_close(of_tokens(method, images, target=3), patches_of(model, expected), 1e-6)


@pytest.mark.parametrize("class_token", ["middle", None])
def test_every_token_can_be_explained(class_token: Any) -> None:
    model, images = vision_mamba(class_token=class_token, depth=2), randn(2, 2, 6, 6)
    reads, gradients, _ = oracles_vision.recorded(model, images, 3)
    rolled, raw = (method(model, fusion="absolute") for method in (ImplicitAttentionRollout, RawImplicitAttention))
    attributed = ImplicitAttentionAttribution(model)
    layers = [oracles_vision.bidirectional(block.mixer, x) for block, x in zip(model.layers, reads, strict=True)]
    matrices = [fused(parts, "unified", "absolute", ("forward", "backward")) for parts in layers]
    by_gradient = [weighted(parts, g, "unified", "channel") for parts, g in zip(layers, gradients, strict=True)]
    L = reads[0].shape[1]
    for token in range(L):
        query = nn.functional.one_hot(torch.tensor([token, token]), L).double()
        for method, expected in {
            rolled: oracles.rollout(matrices, query),
            attributed: oracles.rollout(by_gradient, query),
            raw: matrices[-1][:, token],
        }.items():
            assert_close(of_tokens(method, images, target=3, query=token), patches_of(model, expected), 1e-6)
    both = torch.tensor([1, L - 1])
    expected = oracles.rollout(matrices, nn.functional.one_hot(both, L).double())
    assert_close(of_tokens(rolled, images, target=3, query=both), patches_of(model, expected), 1e-6)


def test_relevance_of_a_bidirectional_model_adds_up() -> None:
    model, images = vision_mamba(class_token="middle", init_layer_scale=0.7), randn(2, 2, 6, 6)
    score = model(images)[:, 3].detach()
    for gate_rule in ("half", "value"):
        frozen = ImplicitAttentionRelevance(model, gate_rule=gate_rule)
        relevance = frozen.attribute(images, target=3)
        assert_close(relevance.flatten(1).sum(1) + frozen.terms["bias"], score, 1e-10)
    other = randn(2, 2, 6, 6)
    relevance = ImplicitAttentionRelevance(model).attribute(images, target=3, baselines=other)
    assert_close(relevance.flatten(1).sum(1), score - model(other)[:, 3].detach(), 1e-10)


def test_what_passes_the_recurrences_of_both_directions_directly_can_be_kept_apart() -> None:
    model, images = vision_mamba(), randn(2, 2, 6, 6)
    score = model(images)[:, 3].detach()
    method = ImplicitAttentionRelevance(model, apart="skip")
    relevance = method.attribute(images, target=3)
    assert method.terms["skip"].abs().min() > 0
    assert_close(relevance.flatten(1).sum(1) + method.terms["bias"] + method.terms["skip"], score, 1e-10)


# --- A sum of two whole layers ---------------------------------------------------------------------------------------


class TwoWay(nn.Module):
    """Two layers of fixed decays side by side, each with projections of its own; the second reads from the end.

    Without an activation the layer is linear.
    """

    def __init__(self, width: int = 4, inner: int = 3, activated: bool = False) -> None:
        super().__init__()
        self.activated = activated
        for name in ("forward_", "backward_"):
            for part, sizes in {"in": (inner, width), "out": (width, inner)}.items():
                self.register_parameter(f"{name}{part}", nn.Parameter(torch.randn(sizes)))
                self.register_parameter(f"{name}{part}_bias", nn.Parameter(torch.randn(sizes[0])))
            self.register_parameter(f"{name}a", nn.Parameter(torch.randn(inner)))
            self.register_parameter(f"{name}taps", nn.Parameter(torch.randn(inner, 2)))

    def one(self, x: Tensor, name: str) -> Tensor:
        p = {key.removeprefix(name): value for key, value in self.named_parameters()}
        v = x @ p["in"].T + p["in_bias"]
        v = v * v.sigmoid() if self.activated else v
        before = torch.cat([torch.zeros_like(v[:, :1]), v[:, :-1]], dim=1)
        v = p["taps"][:, 1] * v + p["taps"][:, 0] * before
        h, read = torch.zeros_like(v[:, 0]), []
        for t in range(v.shape[1]):
            h = p["a"].sigmoid() * h + v[:, t]
            read.append(h)
        return torch.stack(read, dim=1) @ p["out"].T + p["out_bias"]

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x, "forward_") + self.one(x.flip(1), "backward_").flip(1)

    def matrices(self, L: int) -> dict[str, Tensor]:
        """The matrices (D, L, L) of both directions, written out."""
        found = {}
        for name in ("forward_", "backward_"):
            a = getattr(self, f"{name}a").detach().sigmoid()
            alpha = torch.zeros(len(a), L, L, dtype=a.dtype)
            for i in range(L):
                for j in range(i + 1):
                    alpha[:, i, j] = a ** (i - j)
            matrix = alpha @ oracles.conv_matrix(getattr(self, f"{name}taps").detach(), L)
            found[name] = matrix if name == "forward_" else matrix.flip(-2, -1)
        return found


def two_way(mixer: Any, x: Tensor, kwargs: Any) -> Chain:
    """The adapter that a user writes for it."""

    def chain(name: str, x: Tensor) -> Chain:
        p = {key.removeprefix(name): value.to(x) for key, value in mixer.named_parameters()}
        one = torch.ones(1, 1, 1, 1).to(x)
        into = Projection(p["in"], p["in_bias"])
        return Chain({
            "out": Projection(p["out"], p["out_bias"]),
            "scan": Scan(p["a"].sigmoid().view(1, 1, -1, 1).expand(*x.shape[:2], -1, 1), one, one),
            "conv": CausalConv(p["taps"]),
            **({"act": Diagonal(into.apply(x, bias=True).sigmoid())} if mixer.activated else {}),
            "in": into,
        })  # fmt: skip

    directions = {"forward": chain("forward_", x), "backward": chain("backward_", x.flip(1)).flipped()}
    return Chain({"directions": Sum(directions)})


@pytest.fixture
def registered() -> Iterator[None]:
    register("TwoWay")(two_way)
    yield
    unregister("TwoWay")


class TwoWayModel(nn.Module):
    """Two such layers on a residual stream, averaged."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([TwoWay(), TwoWay()])
        self.head = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        for mixer in self.layers:
            x = x + mixer(x)
        logits: Tensor = self.head(x.mean(1))
        return logits


def two_way_run(model: Any, x: Tensor, target: int) -> tuple[list[Tensor], list[Tensor]]:
    reads, outputs = [], []
    for mixer in model.layers:
        reads.append(x)
        outputs.append(mixer(x))
        x = x + outputs[-1]
    gradients = torch.autograd.grad(model.head(x.mean(1))[:, target].sum(), outputs)
    return [read.detach() for read in reads], list(gradients)


def two_way_matrix(mixer: Any, x: Tensor, entry: Callable[[Tensor, Tensor, Tensor, Tensor, Tensor], Tensor]) -> Tensor:
    """Sum over the directions of ``entry(A_ij (D,), v_j (B, D), W_out, i, j)``."""
    B, L, _ = x.shape
    total = torch.zeros(B, L, L, dtype=torch.float64)
    for name, A in mixer.matrices(L).items():
        p = {key.removeprefix(name): value.detach() for key, value in mixer.named_parameters()}
        v = x @ p["in"].T + p["in_bias"]
        for i in range(L):
            for j in range(L):
                total[:, i, j] += entry(A[:, i, j], v[:, j], p["out"], torch.tensor(i), torch.tensor(j))
    return total


@pytest.mark.usefixtures("registered")
def test_a_layer_of_two_whole_layers_passes_the_conformance_suite() -> None:
    check_adapter(moved(TwoWay(activated=True)), randn(2, 5, 4), causal=False)


FUSED = {
    "mean": lambda A, v, W, i, j: A.mean().expand(len(v)),
    "absolute": lambda A, v, W, i, j: A.abs().mean().expand(len(v)),
    "positive": lambda A, v, W, i, j: A.clamp(min=0).mean().expand(len(v)),
    "norm": lambda A, v, W, i, j: ((A * v) @ W.T).norm(dim=-1),
}


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("fusion", FUSED)
def test_the_matrix_of_two_whole_layers_is_the_sum_of_theirs(fusion: Any) -> None:
    model, x = moved(TwoWayModel()), randn(2, 5, 4)
    reads, gradients = two_way_run(model, x, 1)
    matrices = [two_way_matrix(mixer, x, FUSED[fusion]) for mixer, x in zip(model.layers, reads, strict=True)]
    assert_close(LayerImplicitAttention(model, -1).attribute(x, fusion=fusion), matrices[-1])
    lengths = gradients[-1].norm(dim=-1)
    query = lengths / lengths.sum(1, keepdim=True)
    scores = ImplicitAttentionRollout(model, fusion=fusion).attribute(x, target=1).sum(-1)
    assert_close(scores, oracles.rollout(matrices, query), 1e-6)
    raw = RawImplicitAttention(model, fusion=fusion).attribute(x, target=1, query=2).sum(-1)
    assert_close(raw, matrices[-1][:, 2])


@pytest.mark.usefixtures("registered")
@pytest.mark.parametrize("rectify", ["channel", "token", None])
def test_the_attribution_of_two_whole_layers_is_the_sum_of_theirs(rectify: Any) -> None:
    model, x = moved(TwoWayModel()), randn(2, 5, 4)
    reads, gradients = two_way_run(model, x, 1)
    matrices = []
    for mixer, read, g in zip(model.layers, reads, gradients, strict=True):

        def entry(A: Tensor, v: Tensor, W: Tensor, i: Tensor, j: Tensor, g: Tensor = g) -> Tensor:
            products = (g[:, i] @ W) * A * v
            return products.clamp(min=0).mean(-1) if rectify == "channel" else products.sum(-1)

        matrix = two_way_matrix(mixer, read, entry)
        matrices.append(matrix.clamp(min=0) if rectify == "token" else matrix)
    lengths = gradients[-1].norm(dim=-1)
    query = lengths / lengths.sum(1, keepdim=True)
    scores = ImplicitAttentionAttribution(model, rectify=rectify).attribute(x, target=1).sum(-1)
    assert_close(scores, oracles.rollout(matrices, query), 1e-6)


@pytest.mark.usefixtures("registered")
def test_the_parts_of_two_whole_layers_have_their_options() -> None:
    model, x = moved(TwoWayModel()), randn(2, 5, 4)
    A = model.layers[0].matrices(5)
    expand = (2, -1, -1, -1)

    def found(**options: Any) -> Tensor:
        matrices: Tensor = LayerImplicitAttention(model, 0, **options).attribute(x, fusion=None)
        return matrices

    assert_close(found(), (A["forward_"] + A["backward_"]).expand(expand))
    assert_close(found(without="backward"), A["forward_"].expand(expand))
    assert_close(found(without="forward"), A["backward_"].expand(expand))
    for attention in ("scan", "unified"):
        without = "conv" if attention == "unified" else ()
        decays = [getattr(model.layers[0], f"{name}a").detach().sigmoid() for name in ("forward_", "backward_")]
        powers = [torch.stack([a ** (i - j) if i >= j else 0 * a for i in range(5) for j in range(5)]) for a in decays]
        forward, backward = (power.T.view(3, 5, 5) for power in powers)
        expected = (forward + backward.flip(-2, -1)).expand(expand)
        assert_close(found(attention=attention, without=without), expected)
    with pytest.raises(InvalidInputError, match="left without forward, backward"):
        found(without=("forward", "backward"))
    with pytest.raises(InvalidInputError, match=r"what can be left out of this model's: .*backward.*conv"):
        found(without="gate")


@pytest.mark.usefixtures("registered")
def test_relevance_of_a_linear_model_is_gradient_times_difference() -> None:
    model, x, other = moved(TwoWayModel()), randn(2, 5, 4).requires_grad_(), randn(2, 5, 4)
    (slope,) = torch.autograd.grad(model(x)[:, 1].sum(), x)
    for baseline in (None, other):
        scores = ImplicitAttentionRelevance(model).attribute(x.detach(), target=1, baselines=baseline)
        assert_close(scores, slope * (x.detach() - (0 if baseline is None else other)), 1e-10)


# --- Padding in a layer that is not causal ---------------------------------------------------------------------------


class Averages(nn.Module):
    """Every token gets the mean of all; ``mask`` leaves out padding, unless the layer ignores it."""

    def __init__(self, ignores: bool) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.tensor([1.0, 2.0, -1.0]))
        self.ignores = ignores

    def forward(self, x: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        weights = averages(self, x, attention_mask)
        return self.scale * (weights @ x)


def averages(mixer: Any, x: Tensor, mask: Tensor | None) -> Tensor:
    shown = torch.ones_like(x[..., 0]) if mask is None or mixer.ignores else mask.to(x)
    return (shown / shown.sum(1, keepdim=True)).unsqueeze(1).expand(-1, x.shape[1], -1)


class AveragesModel(nn.Module):
    def __init__(self, ignores: bool) -> None:
        super().__init__()
        self.mixer = Averages(ignores)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        y = x + self.mixer(x, attention_mask=mask)
        shown = torch.ones_like(x[..., 0]) if mask is None else mask.to(x)
        return (y * shown.unsqueeze(-1)).sum(1) / shown.sum(1, keepdim=True)


@pytest.fixture
def registered_averages() -> Iterator[None]:
    @register("Averages")
    def adapter(mixer: Any, x: Tensor, kwargs: Any) -> Chain:
        weights = averages(mixer, x, kwargs.get("attention_mask")).unsqueeze(1)
        return Chain({"scale": Diagonal(mixer.scale.to(x)), "attention": Attention(weights, head_size=3)})

    yield
    unregister("Averages")


MASKS = {"left": [0, 0, 1, 1, 1], "right": [1, 1, 1, 0, 0], "within": [1, 1, 0, 0, 1], "ends": [0, 1, 1, 1, 0]}
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=list(MASKS))


@pytest.mark.usefixtures("registered_averages")
@every_mask
@pytest.mark.parametrize("method", [ImplicitAttentionRollout, ImplicitAttentionAttribution, ImplicitAttentionRelevance])
def test_a_layer_that_reads_masked_tokens_is_refused(mask: list[int], method: Any) -> None:
    model, x = AveragesModel(ignores=True).double().eval(), randn(1, 5, 3)
    with pytest.raises(InvalidInputError, match=r"reads tokens that the mask leaves out.*Remove these tokens"):
        method(model).attribute(x, target=1, additional_forward_args=torch.tensor([mask]))
    everything = torch.ones(1, 5)
    assert method(model).attribute(x, target=1, additional_forward_args=everything).isfinite().all()


@pytest.mark.usefixtures("registered_averages")
@every_mask
@pytest.mark.parametrize("method", [ImplicitAttentionRollout, ImplicitAttentionAttribution, ImplicitAttentionRelevance])
def test_masked_tokens_change_nothing_where_a_layer_leaves_them_out(mask: list[int], method: Any) -> None:
    model, x = AveragesModel(ignores=False).double().eval(), randn(1, 5, 3)
    real = torch.tensor(mask).bool()
    masked = method(model).attribute(x, target=1, additional_forward_args=torch.tensor([mask]))
    assert_close(masked[:, real], method(model).attribute(x[:, real], target=1), 1e-6)
    assert masked[:, ~real].abs().max() == 0
