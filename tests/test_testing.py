"""check_adapter passes right adapters and says of wrong ones what is wrong; the registry says who owns a name."""

import dataclasses
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_ssm import (
    FidelityError,
    ImplicitAttentionAttribution,
    ModelStateError,
    UnsupportedModelError,
    register,
    supported,
    unregister,
)
from captum_ssm.layers.mixers import Support, find_adapter, find_mixers, supported_families
from captum_ssm.operators import CausalConv, Chain, Diagonal, Operator, Projection
from captum_ssm.testing import AdapterReport, check_adapter
from tests.conftest import FAMILY_NAMES, build
from tests.families import perturbed

Adapter = Callable[[Any, Tensor, Mapping[str, Any]], Chain]


class GatedConv(nn.Module):
    """``y = W_out (sigmoid(G x) * conv(W_in x))``, the smallest layer with every kind of factor."""

    def __init__(self, E: int = 6, D: int = 4) -> None:
        super().__init__()
        self.into, self.gate, self.out = nn.Linear(E, D), nn.Linear(E, D), nn.Linear(D, E)
        self.taps, self.bias = nn.Parameter(torch.randn(D, 3)), nn.Parameter(torch.randn(D))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        v = F.pad(self.into(x), (0, 0, 2, 0))
        mixed = v[:, :-2] * self.taps[:, 0] + v[:, 1:-1] * self.taps[:, 1] + v[:, 2:] * self.taps[:, 2] + self.bias
        mixed = mixed if scale is None else mixed * scale
        return self.out(torch.sigmoid(self.gate(x)) * mixed)


class Tuned(GatedConv):
    """A class derived from one whose name is registered."""


def factors(layer: Any, x: Tensor) -> dict[str, Operator]:
    return {
        "out": Projection(layer.out.weight, layer.out.bias),
        "gate": Diagonal(torch.sigmoid(F.linear(x, layer.gate.weight, layer.gate.bias))),
        "conv": CausalConv(layer.taps, layer.bias),
        "in": Projection(layer.into.weight, layer.into.bias),
    }


def right(layer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Gated convolution of the tests.

    And a second line.
    """
    chain = factors(layer, x)
    if kwargs.get("scale") is not None:
        chain = {"out": chain["out"], "scale": Diagonal(kwargs["scale"]), **chain}
    return Chain(chain)


@contextmanager
def registered(adapter: Adapter, *names: str) -> Iterator[None]:
    names = names or ("GatedConv",)
    register(*names)(adapter)
    try:
        yield
    finally:
        for name in names:
            unregister(name)


@pytest.fixture
def layer() -> nn.Module:
    return perturbed(GatedConv())


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, 5, 6)


# --- Right adapters -----------------------------------------------------------------------------------------------

MASK = torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
PADDING: dict[str, Tensor | None] = {"no mask": None, "left": MASK, "right": MASK.flip(1), "all real": MASK * 0 + 1}


@pytest.mark.parametrize("mask", PADDING.values(), ids=PADDING)
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_every_registered_family_holds_every_law(name: str, mask: Tensor | None, unchanged: Any) -> None:
    model = build(name)
    kwargs = {} if mask is None else {"attention_mask": mask}
    x = torch.randn(2, 5, model.config.hidden_size)
    for mixer in find_mixers(model).values():
        with unchanged(model, x):
            report = check_adapter(mixer, x, kwargs)
        assert isinstance(report, AdapterReport)
        assert all(0 <= error <= 1e-5 for error in (report.fidelity, report.adjoint, report.dense))
        assert report.channels % model.config.hidden_size == 0
        assert report.factors[0] == "out" and "in" in report.factors and ("mask" in report.factors) == bool(kwargs)


@pytest.mark.parametrize("scale", [None, torch.rand(2, 5, 4)], ids=["plain", "with an argument"])
def test_a_right_adapter_of_ones_own_holds_every_law(
    scale: Tensor | None, layer: nn.Module, x: Tensor, unchanged: Any
) -> None:
    with registered(right), unchanged(layer, x):
        report = check_adapter(layer, x, {} if scale is None else {"scale": scale})
    assert report.channels == 4 and max(report.fidelity, report.adjoint, report.dense) <= 1e-5
    assert report.factors == ("out", *(() if scale is None else ("scale",)), "gate", "conv", "in")


def test_a_right_adapter_is_right_in_every_type(layer: nn.Module, x: Tensor) -> None:
    with registered(right):
        narrow, wide = check_adapter(layer, x), check_adapter(layer.double(), x.double(), tolerance=1e-12)
    assert wide.fidelity <= 1e-12 < narrow.fidelity


def test_a_layer_with_a_right_adapter_is_explained(layer: nn.Module) -> None:
    model = nn.Sequential(nn.Embedding(9, 6), layer, nn.Tanh()).eval()
    ids = torch.tensor([[1, 2, 3, 4, 5]])
    with registered(right):
        scores = ImplicitAttentionAttribution(lambda ids: model(ids)[:, -1], model=model).attribute(ids, target=1)
    assert scores[0, :2].eq(0).all() and scores[0, 2:].ne(0).any()  # three taps


# --- Wrong adapters -----------------------------------------------------------------------------------------------


class WrongAdjoint(Diagonal):
    def adjoint(self, u: Tensor) -> Tensor:
        return 1.5 * self.s * u


@dataclasses.dataclass(frozen=True)
class Future(Operator):
    """The next token's value is added: its own kind of operator, not causal."""

    mixes_tokens = True

    def apply(self, x: Tensor, bias: bool = False) -> Tensor:
        return x + F.pad(x, (0, 0, 0, 1))[..., 1:, :]

    def adjoint(self, u: Tensor) -> Tensor:
        return u + F.pad(u, (0, 0, 1, 0))[..., :-1, :]

    def channels(self, index: Any) -> "Future":
        return self


@dataclasses.dataclass(frozen=True)
class WrongChannels(Diagonal):
    def channels(self, index: Any) -> Diagonal:  # type: ignore[override]
        return Diagonal(self.s.flip(-1)[..., index])


def wrong_gate(layer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    gate = torch.sigmoid(F.linear(x, layer.gate.weight))  # its bias forgotten
    return Chain({**factors(layer, x), "gate": Diagonal(gate)})


def forgotten_bias(layer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    return Chain({**factors(layer, x), "conv": CausalConv(layer.taps)})


def reversed_taps(layer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    return Chain({**factors(layer, x), "conv": CausalConv(layer.taps.flip(1), layer.bias)})


def forgotten_argument(layer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    return Chain(factors(layer, x))


def detached(layer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    chain: dict[str, Any] = factors(layer, x.detach())
    kept = {k: {n: t.detach() for n, t in vars(v).items() if t is not None} for k, v in chain.items()}
    return Chain({k: dataclasses.replace(v, **kept[k]) for k, v in chain.items()})


def detached_input(layer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """The parameters still require gradients, so the chain does, but not by x."""
    return Chain(factors(layer, x.detach()))


def changes_parameters(layer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    with torch.no_grad():
        layer.bias.mul_(1.0 + 1e-6)
    return Chain(factors(layer, x))


def changes_input(layer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    chain = Chain(factors(layer, x.clone()))
    with torch.no_grad():
        x[0, 0, 0] += 1e-6 if not x.requires_grad else 0.0
    return chain


def mixes_examples(layer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Right for a batch of two alone."""
    chain = factors(layer, x)
    gate = chain["gate"].s  # type: ignore[attr-defined]
    return Chain({**chain, "gate": Diagonal(gate * (1.0 if len(x) == 2 else 1.1))})


def wrong_adjoint(layer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    chain = factors(layer, x)
    return Chain({**chain, "gate": WrongAdjoint(chain["gate"].s)})  # type: ignore[attr-defined]


def wrong_channels(layer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    chain = factors(layer, x)
    return Chain({**chain, "gate": WrongChannels(chain["gate"].s)})  # type: ignore[attr-defined]


def no_mixing(layer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    return Chain({"gate": Diagonal(layer(x) / x)})


WRONG: dict[str, tuple[Adapter, type[Exception], str]] = {
    "gate": (wrong_gate, FidelityError, r"misses its real output by .* \(relative; allowed"),
    "bias": (forgotten_bias, FidelityError, "misses its real output"),
    "taps": (reversed_taps, FidelityError, "misses its real output"),
    "detached": (detached, AssertionError, "must not detach"),
    "parameters": (changes_parameters, AssertionError, r"changed the layer's parameters \['bias'\]"),
    "input": (changes_input, AssertionError, "changed the layer's input in place"),
    "batch": (mixes_examples, AssertionError, r"decomposed alone differs from the same in a batch by \d"),
    "adjoint": (wrong_adjoint, AssertionError, r"adjoint is not its transpose; they differ by \d"),
    "channels": (wrong_channels, AssertionError, "core"),
}


@pytest.mark.parametrize(("adapter", "error", "message"), WRONG.values(), ids=WRONG)
def test_a_wrong_adapter_is_told_what_is_wrong(
    adapter: Adapter, error: type[Exception], message: str, layer: nn.Module, x: Tensor
) -> None:
    with registered(adapter), pytest.raises(error, match=message):
        check_adapter(layer, x)


def test_an_adapter_without_anything_that_mixes_tokens_is_told_so(layer: nn.Module, x: Tensor) -> None:
    with registered(no_mixing), pytest.raises(ValueError, match=r"No factor of .* mixes tokens"):
        check_adapter(layer, x)


def test_an_adapter_that_detaches_the_input_alone_is_told_so(layer: nn.Module, x: Tensor) -> None:
    with registered(detached_input), pytest.raises(AssertionError, match="must not detach"):
        check_adapter(layer, x)


def test_an_adapter_that_detaches_the_input_of_a_frozen_layer_is_told_so(layer: nn.Module, x: Tensor) -> None:
    layer.requires_grad_(False)
    with registered(right):
        check_adapter(layer, x)
    with registered(detached_input), pytest.raises(AssertionError, match="must not detach"):
        check_adapter(layer, x)


def test_an_adapter_that_forgets_an_argument_is_told_so(layer: nn.Module, x: Tensor) -> None:
    with registered(forgotten_argument):
        check_adapter(layer, x)
        with pytest.raises(FidelityError, match="misses its real output"):
            check_adapter(layer, x, {"scale": torch.rand(2, 5, 4)})


class ReadsTheFuture(GatedConv):
    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        v = self.into(x)
        v = v + F.pad(v, (0, 0, 0, 1))[:, 1:]
        return self.out(torch.sigmoid(self.gate(x)) * v)


def reads_the_future(layer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    chain = factors(layer, x)
    chain["conv"] = Future()
    return Chain(chain)


def test_a_layer_that_reads_the_future_is_told_so_unless_it_may(x: Tensor) -> None:
    """The decomposition is exact, but the layer is not what a causal model has."""
    layer = perturbed(ReadsTheFuture())
    with registered(reads_the_future, "ReadsTheFuture"):
        with pytest.raises(AssertionError, match=r"reads the future \(entries up to \d"):
            check_adapter(layer, x)
        check_adapter(layer, x, causal=False)


@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_a_family_without_one_of_its_terms_is_no_longer_the_layer(name: str) -> None:
    model = build(name)
    mixer = next(iter(find_mixers(model).values()))
    adapter, x = find_adapter(mixer), torch.randn(2, 5, model.config.hidden_size)
    assert adapter is not None

    class Copy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.mixer = mixer

        def forward(self, hidden_states: Tensor) -> Tensor:
            return self.mixer(hidden_states)

    terms = adapter(mixer, x, {}).terms
    assert len(terms) >= 3
    for term in terms:

        def less(layer: Any, x: Tensor, kwargs: Mapping[str, Any], term: str = term) -> Chain:
            return adapter(layer.mixer, x, kwargs).without(term)

        with registered(less, "Copy"), pytest.raises(FidelityError, match="misses its real output"):
            check_adapter(Copy().eval(), x)


class PlainFuture(Operator):
    """An operator of one's own that is no dataclass."""

    mixes_tokens = True
    apply, adjoint = Future.apply, Future.adjoint
    channels = Future.channels  # type: ignore[assignment]


def test_an_operator_of_ones_own_need_be_no_dataclass(x: Tensor) -> None:
    layer = perturbed(ReadsTheFuture())
    with registered(lambda m, x, kwargs: Chain({**factors(m, x), "conv": PlainFuture()}), "ReadsTheFuture"):
        check_adapter(layer, x, causal=False)


def test_the_tolerance_is_what_is_allowed(layer: nn.Module, x: Tensor) -> None:
    def almost(layer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
        chain = factors(layer, x)
        return Chain({**chain, "out": Projection(1.001 * layer.out.weight, layer.out.bias)})

    with registered(almost):
        report = check_adapter(layer, x, tolerance=0.01)
        assert 1e-5 < report.fidelity < 0.01
        with pytest.raises(FidelityError, match=r"allowed 1\.0e-05"):
            check_adapter(layer, x)


# --- Wrong calls --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(1, 5, 6), (2, 1, 6), (5, 6)])
def test_an_input_that_cannot_show_a_mistake_is_refused(shape: tuple[int, ...], layer: nn.Module) -> None:
    with registered(right), pytest.raises(AssertionError, match=r"B, L >= 2, not \(" + str(shape[0])):
        check_adapter(layer, torch.randn(shape))


def test_a_layer_in_training_is_refused(layer: nn.Module, x: Tensor) -> None:
    with registered(right), pytest.raises(AssertionError, match=r"mixer\.eval\(\)"):
        check_adapter(layer.train(), x)


def test_a_layer_without_an_adapter_is_refused(layer: nn.Module, x: Tensor) -> None:
    with pytest.raises(UnsupportedModelError, match="GatedConv"):
        check_adapter(layer, x)


def test_a_layer_whose_output_is_not_finite_is_refused(layer: Any, x: Tensor) -> None:
    with torch.no_grad():
        layer.bias.fill_(float("inf"))
    with registered(right), pytest.raises(ModelStateError, match="NaN or infinite"):
        check_adapter(layer, x)


# --- Registry -----------------------------------------------------------------------------------------------------


def test_a_name_is_registered_once_and_its_owner_named() -> None:
    with pytest.raises(ValueError, match=r"captum_ssm\.layers\.adapters\.s6\.mamba") as caught:
        register("MambaMixer")(right)
    assert "'MambaMixer' is already registered" in str(caught.value) and "unregister('MambaMixer')" in str(caught.value)
    with registered(right), pytest.raises(ValueError, match=re.escape(f"{right.__module__}.right")):
        register("GatedConv")(right)


def test_of_several_names_none_is_registered_if_one_is_taken() -> None:
    before = supported()
    for names in (("Fresh", "MambaMixer"), ("MambaMixer", "Fresh")):
        with pytest.raises(ValueError, match="MambaMixer"):
            register(*names)(right)
        assert supported() == before


def test_registering_returns_the_adapter_itself() -> None:
    try:
        assert register("GatedConv", "Other", kernel="gated convolution", family="mine")(right) is right
        assert Support("GatedConv", "gated convolution", "mine") in supported()
        assert Support("Other", "gated convolution", "mine") in supported()
    finally:
        unregister("GatedConv")
        unregister("Other")


def test_supported_lists_layers_by_family_and_name_those_of_none_last() -> None:
    listed = supported()
    assert all(isinstance(support, Support) and all(support) for support in listed)
    assert Support("MambaMixer", "S6", "mamba") in listed
    assert Support(layer="FalconMambaMixer", kernel="S6", family="falcon_mamba") in listed
    assert listed == sorted(listed, key=lambda support: (support.family, support.layer))
    with registered(right, "AAA", "Zzz"):
        assert supported() == [*listed, Support("AAA", "", ""), Support("Zzz", "", "")]
        families = supported_families().split(", ")
        assert families == [*dict.fromkeys(support.family for support in listed), "AAA", "Zzz"]
    listed.clear()
    assert supported()  # a copy


def test_what_is_unregistered_is_unknown() -> None:
    with registered(right):
        assert find_adapter(GatedConv()) is right and Support("GatedConv", "", "") in supported()
    assert find_adapter(GatedConv()) is None and not any(support.layer == "GatedConv" for support in supported())
    with pytest.raises(KeyError):
        unregister("GatedConv")


def test_a_derived_class_has_the_adapter_of_the_nearest_registered_one(x: Tensor) -> None:
    layer = perturbed(Tuned())
    with registered(right):
        assert find_adapter(layer) is right
        check_adapter(layer, x)
        with registered(wrong_gate, "Tuned"):
            assert find_adapter(layer) is wrong_gate and find_adapter(GatedConv()) is right
        assert find_adapter(layer) is right
    assert find_adapter(layer) is None


def test_mixers_are_found_by_name_from_outside_in(layer: nn.Module) -> None:
    holder = nn.ModuleDict({"first": layer, "second": nn.Sequential(nn.Linear(2, 2), Tuned())})
    with registered(right), registered(right, "Sequential"):
        assert list(find_mixers(holder)) == ["first", "second"]  # not second.1, which second holds
    with registered(right):
        assert list(find_mixers(holder)) == ["first", "second.1"]
        assert list(find_mixers(layer)) == [""]
    with pytest.raises(UnsupportedModelError, match="ModuleDict has no layer"):
        find_mixers(holder)
