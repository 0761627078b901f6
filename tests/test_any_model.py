"""Relevance of models that no adapter knows, and of several inputs of any shape: sums to the model's own difference."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from captum_ssm import (
    FidelityError,
    ImplicitAttentionRelevance,
    ImplicitAttentionRollout,
    InvalidInputError,
    LayerImplicitAttentionRelevance,
    NeuronImplicitAttentionRelevance,
    UnsupportedModelError,
    register,
    supported,
    unregister,
)
from captum_ssm.operators import Chain, Diagonal
from captum_ssm.relevance.explanation import Explanation

D, N, L = 6, 4, 10


class S6(nn.Module):
    """A selective scan as one writes it by hand: a loop over tokens."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.out, self.step = nn.Linear(D, 2 * D), nn.Linear(D, D), nn.Linear(D, D)
        self.b, self.c, self.log_a = nn.Linear(D, N), nn.Linear(D, N), nn.Parameter(torch.zeros(D, N))
        self.conv = nn.Conv1d(D, D, 3, groups=D, padding=2)

    def forward(self, x: Tensor) -> Tensor:
        u, z = self.inner(x).chunk(2, -1)
        u = F.silu(self.conv(u.mT)[..., : x.shape[1]].mT)
        step, b, c = F.softplus(self.step(u)), self.b(u), self.c(u)
        h, outputs = x.new_zeros(len(x), D, N), []
        for t in range(x.shape[1]):
            h = torch.exp(-step[:, t, :, None] * self.log_a.exp()) * h + (step * u)[:, t, :, None] * b[:, t, None]
            outputs.append((h * c[:, t, None]).sum(-1))
        return self.out(torch.stack(outputs, 1) * F.silu(z))


class Series(nn.Module):
    """A classifier of series (B, L, 3), with blocks of one kind."""

    def __init__(self, mixer: Callable[[], nn.Module] = S6) -> None:
        super().__init__()
        self.embed, self.norm, self.head = nn.Linear(3, D), nn.LayerNorm(D), nn.Linear(D, 2)
        self.mixers = nn.ModuleList([mixer() for _ in range(2)])

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for mixer in self.mixers:
            y = mixer(self.norm(h))
            h = h + (y[0] if isinstance(y, tuple) else y)
        return self.head(h.mean(1))


def filled(model: nn.Module) -> Any:
    torch.manual_seed(0)
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    return model.eval()


def known() -> nn.Module:
    return MambaMixer(MambaConfig(hidden_size=D, state_size=3, time_step_rank=2), 0)


class Doubled(MambaMixer):
    """A layer with the name of its base, to an adapter, and other code."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return 2 * super().forward(*args, **kwargs)


def inputs(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def difference(model: Callable[..., Tensor], x: tuple[Any, ...], reference: tuple[Any, ...]) -> Tensor:
    with torch.no_grad():
        return model(*x) - model(*reference)


def total(relevance: tuple[Tensor, ...]) -> Tensor:
    return sum((r.flatten(1).sum(1) for r in relevance), torch.zeros(len(relevance[0])))


# --- No known layer -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_known", [False, True])
def test_layers_without_an_adapter_are_followed_function_by_function(with_known: bool) -> None:
    model = Series()
    if with_known:
        model.mixers[1] = known()
    filled(model)
    x, reference = inputs(2, L, 3), inputs(2, L, 3, seed=2)
    method = ImplicitAttentionRelevance(model)
    relevance, delta = method.attribute(x, 1, baselines=reference, return_convergence_delta=True)
    assert relevance.shape == x.shape and delta.abs().max() <= 1e-5
    torch.testing.assert_close(total((relevance,)), difference(model, (x,), (reference,))[:, 1], atol=1e-5, rtol=1e-5)
    assert method.followed == ({"mixers.1": "decomposition"} if with_known else {})


def test_with_frozen_gates_the_score_is_the_sum_and_a_bias() -> None:
    model, x = filled(Series()), inputs(2, L, 3)
    method = ImplicitAttentionRelevance(model)
    relevance = method.attribute(x, 1)
    torch.testing.assert_close(total((relevance,)) + method.terms["bias"], model(x)[:, 1], atol=1e-5, rtol=1e-5)


def test_relevance_of_a_small_step_is_the_gradient_times_it() -> None:
    """In float64, where the square of a step of 1e-4 is lost."""
    model, x = filled(Series()).double(), inputs(2, L, 3).double()
    step = 1e-4 * inputs(2, L, 3, seed=2).double()
    relevance = ImplicitAttentionRelevance(model).attribute(x, 1, baselines=x - step)
    (slope,) = torch.autograd.grad(model(leaf := x.clone().requires_grad_())[:, 1].sum(), leaf)
    torch.testing.assert_close(relevance, slope * step, atol=1e-6 * float((slope * step).abs().max()), rtol=1e-2)


def test_one_way_or_the_other_the_sum_is_the_same() -> None:
    """The mixers by their decomposition, and the same mixers in a model that the method is not told of."""
    model, x, reference = filled(Series(known)), inputs(2, L, 3), inputs(2, L, 3, seed=2)
    stranger = Series(known)
    stranger.load_state_dict(model.state_dict())
    stranger.eval()
    by_loop = ImplicitAttentionRelevance(lambda x: stranger(x))  # the model is not known
    by_chain = ImplicitAttentionRelevance(model)
    one, other = (method.attribute(x, 1, baselines=reference) for method in (by_chain, by_loop))
    torch.testing.assert_close(total((one,)), total((other,)), atol=1e-5, rtol=1e-5)
    assert len(by_chain.followed) == 2 and by_loop.followed == {}


def test_a_callable_and_a_method_need_no_model() -> None:
    x = inputs(3, 4)
    square = ImplicitAttentionRelevance(lambda x: (x**2).sum(1))
    torch.testing.assert_close(square.attribute(x, baselines=0), x**2)
    model = filled(Series(known))
    method = ImplicitAttentionRelevance(model.forward)
    assert method.model is model
    assert ImplicitAttentionRollout(model.forward).model is model


def test_the_other_methods_ask_for_known_layers_and_say_what_does_not() -> None:
    with pytest.raises(UnsupportedModelError, match=r"Layers that look like token mixers: S6.*Relevance needs none"):
        ImplicitAttentionRollout(filled(Series()))
    for network in (nn.LSTM(2, 2), nn.GRU(2, 2), type("sLSTMLayer", (nn.Linear,), {})(2, 2)):
        with pytest.raises(
            UnsupportedModelError, match=rf"{type(network).__name__} is not gated-linear.*Relevance needs"
        ):
            ImplicitAttentionRollout(nn.Sequential(network))


def test_a_layer_and_a_neuron_of_any_model() -> None:
    model, x, reference = filled(Series()), inputs(2, L, 3), inputs(2, L, 3, seed=2)
    expected = difference(model, (x,), (reference,))[:, 1]
    layer = LayerImplicitAttentionRelevance(model, "mixers.1.out")
    assert layer.attribute(x, 1, baselines=reference).shape == (2, L, D)
    head = LayerImplicitAttentionRelevance(model, "head").attribute(x, 1, baselines=reference)
    torch.testing.assert_close(total((head,)), expected, atol=1e-5, rtol=1e-5)
    neuron = NeuronImplicitAttentionRelevance(model, "embed").attribute(x, (0, 2), baselines=reference)
    assert neuron.shape == x.shape and neuron[:, 1:].eq(0).all()


def test_several_layers_are_explained_by_one_run() -> None:
    model, x, reference = filled(Series()), inputs(2, L, 3), inputs(2, L, 3, seed=2)
    runs: list[Any] = []
    model.register_forward_hook(lambda module, args, output: runs.append(output))
    asked: list[Any] = [model.head, "mixers.1.out", model.head]
    for baseline in (reference, None):
        alone = [LayerImplicitAttentionRelevance(model, layer).attribute(x, 1, baselines=baseline) for layer in asked]
        runs.clear()
        method = LayerImplicitAttentionRelevance(model, asked)
        together = method.attribute(x, 1, baselines=baseline)
        assert isinstance(together, list) and len(runs) == (2 if baseline is not None else 1)
        for one, other in zip(alone, together, strict=True):
            torch.testing.assert_close(one, other)
    assert method.layer == [model.head, model.mixers[1].out, model.head]
    with pytest.raises(InvalidInputError, match="list of layers is empty"):
        LayerImplicitAttentionRelevance(model, [])


def test_each_of_several_layers_has_to_run() -> None:
    model, x = filled(Series()), inputs(2, L, 3)
    model.unused = nn.Linear(D, D).eval()
    with pytest.raises(InvalidInputError, match="Layer 'unused' was not run by forward_func"):
        LayerImplicitAttentionRelevance(model, ["head", "unused"]).attribute(x, 1)


def test_a_layer_beside_one_that_is_followed_function_by_function() -> None:
    """Only the factors of a chain ask for the decomposition, not the input of a layer."""
    model: Any = Series(known)
    model.mixers[0] = Doubled(MambaConfig(hidden_size=D, state_size=3, time_step_rank=2), 0)
    filled(model)
    x, reference = inputs(2, L, 3), inputs(2, L, 3, seed=2)
    method = LayerImplicitAttentionRelevance(model, "head")
    relevance = method.attribute(x, 1, baselines=reference)
    torch.testing.assert_close(total((relevance,)), difference(model, (x,), (reference,))[:, 1], atol=1e-5, rtol=1e-5)
    assert "misses its real output" in method.followed["mixers.0"] and method.followed["mixers.1"] == "decomposition"
    with pytest.raises(FidelityError, match=r"'mixers\.0' misses its real output"):
        LayerImplicitAttentionRelevance(model, "mixers.1", factor="scan").attribute(x, 1, baselines=reference)


@pytest.mark.parametrize("method", [LayerImplicitAttentionRelevance, NeuronImplicitAttentionRelevance])
def test_a_layer_of_a_callable_needs_its_model(method: Any) -> None:
    model = filled(Series())
    with pytest.raises(InvalidInputError, match=r"layer 'head' is not known.*\(forward_func, layer, model\)"):
        method(lambda x: model(x), "head")
    assert method(lambda x: model(x), "head", model).layer is model.head


# --- Inputs of any shape, and several -----------------------------------------------------------------------------

SHAPES = {
    "features": (2, 5),
    "series": (2, 7, 3),
    "images": (2, 3, 4, 4),
    "volumes": (2, 1, 3, 4, 4),
    "points": (2, 9, 3),
}


@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
@pytest.mark.parametrize("baseline", [0, 0.5, "tensor"])
def test_inputs_of_any_shape(shape: tuple[int, ...], baseline: Any) -> None:
    weights = inputs(*shape[1:], seed=3)
    model = lambda x: torch.tanh((x * weights).flatten(1)).cumsum(1).sin().sum(1)  # noqa: E731
    x = inputs(*shape)
    reference = inputs(*shape, seed=2) if baseline == "tensor" else baseline
    relevance = ImplicitAttentionRelevance(model).attribute(x, baselines=reference)
    assert relevance.shape == x.shape
    expected = difference(model, (x,), (torch.as_tensor(reference).expand(shape),))
    torch.testing.assert_close(total((relevance,)), expected, atol=1e-5, rtol=1e-5)


class Fused(nn.Module):
    """A series, features and ids."""

    def __init__(self) -> None:
        super().__init__()
        self.series, self.table, self.kinds = Series(), nn.Linear(5, 2), nn.Embedding(7, 3)

    def forward(self, x: Tensor, features: Tensor, ids: Tensor, scale: float = 1.0) -> Tensor:
        return scale * self.series(x + self.kinds(ids)) * torch.sigmoid(self.table(features))


def test_several_inputs_with_a_baseline_each() -> None:
    model = filled(Fused())
    x, features, ids = inputs(2, L, 3), inputs(2, 5), torch.arange(2 * L).reshape(2, L) % 7
    method = ImplicitAttentionRelevance(model)
    references = (inputs(2, L, 3, seed=5), 0.0, 3)
    parts = method.attribute((x, features, ids), 0, 2.0, baselines=references)
    assert [p.shape for p in parts] == [x.shape, features.shape, ids.shape]
    plain = (references[0], torch.zeros_like(features), torch.full_like(ids, 3))
    expected = difference(lambda *x: model(*x, scale=2.0), (x, features, ids), plain)[:, 0]
    torch.testing.assert_close(total(parts), expected, atol=1e-5, rtol=1e-5)
    two = method.attribute((x, features), 0, ids, baselines=(0, 0))  # what is not explained is passed on
    plain = (torch.zeros_like(x), torch.zeros_like(features), ids)
    torch.testing.assert_close(total(two), difference(model, (x, features, ids), plain)[:, 0], atol=1e-5, rtol=1e-5)
    one_by_one = method.attribute((x, features, ids), 0, baselines=references[1:2] * 2 + (3,), internal_batch_size=1)
    assert [p.shape for p in one_by_one] == [x.shape, features.shape, ids.shape]


def test_several_references_of_several_inputs_are_averaged() -> None:
    model = filled(Fused())
    x = inputs(2, L, 3), inputs(2, 5), torch.arange(2 * L).reshape(2, L) % 7
    method = ImplicitAttentionRelevance(model)
    references = [(0, 0, 3), (0.5, 0.1, 6)]
    found = method.attribute(x, 0, baselines=references)
    each = [method.attribute(x, 0, baselines=reference) for reference in references]
    for part, one, other in zip(found, *each):
        torch.testing.assert_close(part, (one + other) / 2)


@pytest.mark.parametrize(
    "baselines", [(0, 0), (0, None, 3), torch.zeros(2, L, 3)], ids=["two", "one missing", "tensor"]
)
def test_baselines_that_do_not_fit_several_inputs_are_refused(baselines: Any) -> None:
    x = inputs(2, L, 3), inputs(2, 5), torch.zeros(2, L, dtype=torch.long)
    with pytest.raises(InvalidInputError, match=r"baseline"):
        ImplicitAttentionRelevance(filled(Fused())).attribute(x, 0, baselines=baselines)


def test_a_bag_has_one_score() -> None:
    """Attention over the instances of one bag (n, d), as in pathology."""
    model = filled(nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 2)))
    bag = lambda x: (lambda h: (h[:, :1].softmax(0) * h[:, 1:]).sum(0))(model(x))  # noqa: E731
    x = inputs(8, 4)
    relevance, delta = ImplicitAttentionRelevance(bag, model).attribute(x, baselines=0.0, return_convergence_delta=True)
    assert relevance.shape == x.shape and delta.shape == (1,)
    torch.testing.assert_close(relevance.sum(), difference(bag, (x,), (x * 0,))[0], atol=1e-5, rtol=1e-5)


def test_a_model_that_runs_twice() -> None:
    """The two towers of a siamese network share their weights."""
    model = filled(Series())
    x, y = inputs(2, L, 3), inputs(2, L, 3, seed=4)
    for join in (lambda a, b: (a * b).sum(1), F.cosine_similarity):
        twice = lambda x, y, join=join: join(model(x), model(y))  # noqa: E731
        parts = ImplicitAttentionRelevance(twice, model).attribute((x, y), baselines=(0, 0))
        expected = difference(twice, (x, y), (x * 0, y * 0))
        assert expected.shape == (2,)
        torch.testing.assert_close(total(parts), expected, atol=1e-5, rtol=1e-5)


def test_complex_inputs_are_refused() -> None:
    with pytest.raises(InvalidInputError, match="view_as_real"):
        ImplicitAttentionRelevance(lambda x: x.real.sum(1)).attribute(torch.zeros(2, 3, dtype=torch.cfloat))


# --- Two classes of one name --------------------------------------------------------------------------------------


def gate(mixer: nn.Module, x: Tensor, kwargs: Any) -> Chain:
    return Chain({"gate": Diagonal(x.sigmoid())})


def half(mixer: nn.Module, x: Tensor, kwargs: Any) -> Chain:
    return Chain({"half": Diagonal(torch.full_like(x, 0.5))})


Gate = type("Twin", (nn.Module,), {"forward": lambda self, x: x * x.sigmoid(), "__module__": "first.layers.gates"})
Half = type("Twin", (nn.Module,), {"forward": lambda self, x: x * 0.5, "__module__": "second.layers"})


@pytest.mark.parametrize(
    "names",
    [(Gate, Half), ("first.Twin", "second.layers.Twin"), ("Twin", Half), ("first.layers.Twin", "Twin")],
    ids=str,
)
def test_two_packages_may_have_a_class_of_one_name(names: tuple[Any, Any]) -> None:
    for name, adapter in zip(names, (gate, half)):
        register(name)(adapter)
    try:
        model = filled(nn.Sequential(nn.Linear(3, 3), Gate(), Half(), nn.Linear(3, 2)))
        forward = lambda x: model(x)[:, -1]  # noqa: E731
        method = ImplicitAttentionRelevance(forward, model)
        method.attribute(inputs(2, 5, 3), 0)
        assert sorted(method.fidelity) == ["1", "2"] and max(method.fidelity.values()) <= 1e-6
        assert [s.layer for s in supported()].count("Twin") == 2
    finally:
        for name in names:
            unregister(name)


def test_the_error_of_a_clash_names_both() -> None:
    register("Twin")(gate)
    try:
        with pytest.raises(ValueError, match=rf"'Twin'.*{__name__}\.gate.*{__name__}\.half.*pass the class itself"):
            register("Twin")(half)
        register(Half)(half)
        with pytest.raises(ValueError, match=r"second\.layers\.Twin"):
            register(Half)(gate)
        unregister(Half)
    finally:
        unregister("Twin")


def test_a_class_of_a_common_name_is_another_layer_if_its_parts_are_missing() -> None:
    """Many repositories have a ``Mamba`` that is a whole model."""
    model = filled(type("Mamba", (Series,), {})())
    with pytest.raises(UnsupportedModelError, match="S6"):
        ImplicitAttentionRollout(model)
    assert ImplicitAttentionRelevance(model).attribute(inputs(2, L, 3), 1, baselines=0).shape == (2, L, 3)


def test_batches_whose_layers_went_different_ways_are_joined() -> None:
    """A layer that was decomposed in the second batch alone keeps its error."""
    parts = [
        Explanation((torch.ones(1, 2),), {}, torch.zeros(1), 0.0, set(), fidelity, {}, torch.ones(1), torch.zeros(1))
        for fidelity in ({"first": 1e-7}, {"first": 2e-7, "second": 3e-7})
    ]
    assert Explanation.joined(parts).fidelity == {"first": 2e-7, "second": 3e-7}
