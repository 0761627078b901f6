"""Parts that stand in for plain weights: every method gives what it gives for the plain model of the same function."""

import warnings
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import utils
from torch.nn.utils import parametrizations, prune

import captum_ssm as cs
from captum_ssm.layers.mixers import known_mixers
from captum_ssm.layers.stand_ins import stand_ins
from tests.conftest import build
from tests.test_causes import Linear4bit, LoraLinear, MergedInPlace, QuantLinear

FAMILIES = ["mamba", "mamba2", "zamba", "rwkv", "recurrent_gemma", "qwen3_5", "lfm2", "xlstm"]
METHODS: dict[str, Callable[[Any], Any]] = {
    "signed": lambda model: cs.ImplicitAttentionAttribution(model, rectify=None),
    "rectified": cs.ImplicitAttentionAttribution,
    "rollout": cs.ImplicitAttentionRollout,
    "raw": cs.RawImplicitAttention,
    "frozen": cs.ImplicitAttentionRelevance,
    "reference": cs.ImplicitAttentionRelevance,
}
UNCALLED = ("dt_proj", "output", "value")
"""Projections that a model multiplies by as bare weights, or that RWKV-4 divides in place."""


def scores(name: str, model: nn.Module, ids: Tensor) -> Tensor:
    """The scores that a method gives."""
    options = {"baselines": 2} if name == "reference" else {}
    result: Tensor = METHODS[name](model).attribute(ids, *(() if name in ("rollout", "raw") else (1,)), **options)
    return result


def projections(model: nn.Module) -> Iterator[tuple[nn.Module, str]]:
    """The modules and names that hold the linear projections of the mixers of a model."""
    found = set()
    for mixer in known_mixers(model).values():
        for name, module in mixer.named_modules():
            parent, _, own = name.rpartition(".")
            if isinstance(module, nn.Linear) and own not in UNCALLED and module not in found:
                found.add(module)
                yield mixer.get_submodule(parent), own


def replaced(part: Callable[[nn.Linear], nn.Module]) -> Callable[[nn.Module, str], None]:
    return lambda home, name: setattr(home, name, part(getattr(home, name)).eval())


def changed(change: Callable[[Any], object]) -> Callable[[nn.Module, str], None]:
    def of(home: nn.Module, name: str) -> None:
        change(getattr(home, name))

    return of


def weight_norm(linear: Any) -> None:
    parametrizations.weight_norm(linear).eval()
    linear.parametrizations.weight.original0.data.mul_(1.3)


def patched(linear: Any) -> None:
    linear.forward = lambda x: nn.functional.linear(x, linear.weight) * 0.5 + 0.1


STATES: dict[str, Callable[[nn.Module, str], None]] = {
    "fine-tuned": replaced(LoraLinear),
    "fine-tuned, loralib": replaced(MergedInPlace),
    "quantised": replaced(Linear4bit),
    "quantised, buffers": replaced(QuantLinear),
    "fine-tuned and quantised": replaced(lambda linear: LoraLinear(Linear4bit(linear))),
    "weight_norm": changed(weight_norm),
    "spectral_norm": changed(lambda linear: parametrizations.spectral_norm(linear).eval()),
    "weight_norm, old": changed(lambda linear: utils.weight_norm(linear).weight_g.data.mul_(1.3)),
    "spectral_norm, old": changed(lambda linear: utils.spectral_norm(linear).eval()),
    "pruned": changed(lambda linear: prune.random_unstructured(linear, "weight", amount=0.3)),
    "hook": changed(lambda linear: linear.register_forward_hook(lambda _m, _x, y: 1.5 * y - 0.1)),
    "hook before": changed(lambda linear: linear.register_forward_pre_hook(lambda _m, x: (0.7 * x[0],))),
    "patched": changed(patched),
}


@torch.no_grad()
def plain(part: nn.Module, E: int) -> nn.Linear:
    """The linear layer that does what a part does, read off its outputs."""
    constant = part(torch.zeros(1, 1, E))[0, 0]
    linear = nn.Linear(E, len(constant))
    linear.weight.copy_((part(torch.eye(E)[None])[0] - constant).T)
    linear.bias.copy_(constant)
    if not constant.any():
        linear.register_parameter("bias", None)
    return linear.eval()


def in_state(family: str, state: str) -> tuple[nn.Module, nn.Module]:
    """A model in a state, and the plain model of the same function."""
    model, oracle = build(family), build(family)
    for (home, name), (other, _) in zip(list(projections(model)), list(projections(oracle))):
        E = getattr(home, name).in_features
        STATES[state](home, name)
        setattr(other, name, plain(getattr(home, name), E))
    return model.eval(), oracle


def close(result: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
    assert (result - expected).abs().max() <= tolerance * expected.abs().max()


def assert_alike(model: Any, oracle: Any, ids: Tensor, methods: Iterable[str], tolerance: float = 1e-4) -> None:
    """Every method gives the same for both models, which are examined once for all of them."""
    for method in methods:
        close(scores(method, model, ids), scores(method, oracle, ids), tolerance)


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize(
    ("family", "methods"), [("mamba", ("signed", "reference")), ("qwen3_5", ("rollout", "frozen"))], ids=str
)
def test_a_part_is_what_it_does(family: str, state: str, methods: tuple[str, ...], ids: Tensor) -> None:
    assert_alike(*in_state(family, state), ids, methods)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_fine_tuned_model_is_its_merged_model(family: str, ids: Tensor) -> None:
    assert_alike(*in_state(family, "fine-tuned"), ids, ("rectified", "raw", "frozen", "reference"), 3e-4)


@pytest.mark.parametrize("state", ["fine-tuned", "quantised", "spectral_norm"])
@pytest.mark.parametrize("family", ["mamba", "jamba", "rwkv"])
def test_relevance_adds_up_and_leaves_the_model_as_it_was(family: str, state: str, ids: Tensor, unchanged: Any) -> None:
    model, _ = in_state(family, state)
    with unchanged(model, ids):
        method = cs.ImplicitAttentionRelevance(model)
        result = method.attribute(ids, 1, baselines=2).sum(1) + sum(method.terms.values())
    with torch.no_grad():
        right = [model(text, use_cache=False).logits[:, -1, 1] for text in (ids, torch.full_like(ids, 2))]
    torch.testing.assert_close(result, right[0] - right[1], atol=1e-4, rtol=1e-3)
    assert set(method.followed.values()) == {"decomposition"}


@pytest.mark.parametrize("norm", [lambda conv: parametrizations.weight_norm(conv).eval(), utils.weight_norm])
@pytest.mark.parametrize("family", ["mamba", "mamba2", "recurrent_gemma", "lfm2"])
def test_a_convolution_is_what_it_does(family: str, norm: Any, ids: Tensor) -> None:
    model, oracle = build(family), build(family)
    for module in list(model.modules()):
        if isinstance(module, nn.Conv1d):
            norm(module)
    assert_alike(model, oracle, ids, ("signed", "rollout", "reference"))


@pytest.mark.parametrize("method", ["signed", "rollout", "frozen", "reference"])
def test_what_the_model_never_applies_is_left_out(method: str, ids: Tensor) -> None:
    """Mamba multiplies by the weight of ``dt_proj``, and calls no module: an adapter on it does nothing."""
    model, oracle = build("mamba"), build("mamba")
    for mixer in known_mixers(model).values():
        part: Any = LoraLinear(mixer.dt_proj)
        part.bias = part.base_layer.bias
        mixer.dt_proj = part
    with pytest.warns(UserWarning, match="'dt_proj' of MambaMixer has no effect: the model itself never applies it"):
        close(scores(method, model.eval(), ids), scores(method, oracle, ids), 1e-6)


@pytest.mark.parametrize("method", METHODS)
def test_hooks_that_observe_see_no_more_than_runs_of_the_model(method: str, ids: Tensor) -> None:
    model, oracle = build("mamba"), build("mamba")
    shapes = set()
    for home, name in projections(model):
        getattr(home, name).register_forward_hook(lambda _m, x, _y: shapes.add(x[0].shape[:2]))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        close(scores(method, model, ids), scores(method, oracle, ids), 1e-6)
    assert all(ids.shape[1] == L for _, L in shapes)
    assert not any(stand_ins(mixer) for mixer in known_mixers(model).values())


@pytest.mark.parametrize("method", ["signed", "rectified", "rollout", "raw"])
@pytest.mark.parametrize("hook", [lambda _m, _x, y: y.relu(), lambda _m, _x, y: y + 0.5 * y.roll(1, 1)])
def test_a_part_that_is_no_linear_map_of_each_token_is_refused_by_name(hook: Any, method: str, ids: Tensor) -> None:
    model = build("mamba")
    model.backbone.layers[1].mixer.in_proj.register_forward_hook(hook)
    with pytest.raises(cs.UnsupportedModelError, match=r"'in_proj' \(Linear\).*ImplicitAttentionRelevance"):
        scores(method, model, ids)


def test_relevance_follows_a_part_that_is_not_linear(ids: Tensor) -> None:
    model = build("mamba")
    model.backbone.layers[1].mixer.in_proj.register_forward_hook(lambda _m, _x, y: y.tanh())
    method = cs.ImplicitAttentionRelevance(model)
    result = method.attribute(ids, 1, baselines=2).sum(1)
    right = [model(text, use_cache=False).logits[:, -1, 1] for text in (ids, torch.full_like(ids, 2))]
    torch.testing.assert_close(result, right[0] - right[1], atol=1e-4, rtol=1e-3)


class Dynamic(Linear4bit):
    """Rounds its input to 8 bits too, for each token: its own gradient is 0 almost everywhere."""

    def forward(self, x: Tensor) -> Tensor:
        step = (x.abs().amax(-1, keepdim=True) / 127).clamp(min=1e-9)
        return super().forward((x / step).round() * step)


def dynamic(ids: Tensor) -> tuple[nn.Module, nn.Module]:
    """A model that rounds the inputs of its projections, and the one that does not."""
    model, oracle = build("mamba"), build("mamba")
    for (home, name), (other, _) in zip(list(projections(model)), list(projections(oracle))):
        weight = getattr(home, name)
        setattr(home, name, Dynamic(weight))
        setattr(other, name, Linear4bit(weight))
    return model.eval(), oracle.eval()


@pytest.mark.parametrize("method", ["frozen", "reference"])
def test_relevance_takes_the_secant_of_a_part_that_rounds_its_input(method: str, ids: Tensor) -> None:
    model, oracle = dynamic(ids)
    close(scores(method, model, ids), scores(method, oracle, ids), 0.1)
    explained = METHODS[method](model)
    result, delta = explained.attribute(
        ids, 1, baselines=2 if method == "reference" else None, return_convergence_delta=True
    )
    assert delta.abs().max() <= 0.02 * result.abs().sum(1).max()


def test_the_secant_of_one_part_is_exact() -> None:
    """And it is next to the weight: Broyden's update is the least change that has the difference."""
    part = Dynamic(nn.Linear(6, 4)).eval()
    model = nn.Sequential(part, nn.Flatten()).eval()
    x, other = torch.randn(2, 2, 3, 6)
    scores, delta = cs.ImplicitAttentionRelevance(model).attribute(
        x, 1, baselines=other, return_convergence_delta=True
    )  # target 1 is channel 1 of token 0
    assert delta.abs().max() < 1e-6
    d, w = x[:, 0] - other[:, 0], part.weight[1] * part.scale
    e = part(x)[:, 0, 1] - part(other)[:, 0, 1] - d @ w
    expected = d * (w + e[:, None] * d / d.square().sum(-1, keepdim=True))
    torch.testing.assert_close(scores[:, 0], expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "method", [cs.ImplicitAttentionRollout, lambda *a, **k: cs.ImplicitAttentionAttribution(*a, rectify=None, **k)]
)
def test_matrices_of_a_part_that_rounds_its_input_are_a_named_approximation(method: Any, ids: Tensor) -> None:
    model, oracle = dynamic(ids)
    target = () if method is cs.ImplicitAttentionRollout else (1,)
    with pytest.raises(cs.FidelityError, match=r"by \d.*\(Dynamic\).*not linear in its input.*`tolerance`"):
        method(model).attribute(ids, *target)
    approximate = method(model, tolerance=0.1)
    close(approximate.attribute(ids, *target), method(oracle).attribute(ids, *target), 0.1)
    assert all(1e-4 < error < 0.1 for error in approximate.fidelity.values())


def test_a_quantised_part_that_mixes_tokens_is_refused_by_name(ids: Tensor) -> None:
    class Mixing(Linear4bit):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x.flip(1))

    model = build("jamba")
    feed_forward = model.model.layers[0].feed_forward
    feed_forward.down_proj = Mixing(feed_forward.down_proj).eval()
    with pytest.raises(cs.FidelityError, match="down_proj' is no projection of each token"):
        cs.ImplicitAttentionRelevance(model).attribute(ids, 1, baselines=torch.arange(ids.shape[1]).expand_as(ids))


@pytest.mark.parametrize("method", METHODS)
def test_parts_outside_the_mixers(method: str, ids: Tensor) -> None:
    model, oracle = build("jamba"), build("jamba")
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and ("feed_forward" in name or name == "lm_head") and "router" not in name:
            home, _, own = name.rpartition(".")
            part = LoraLinear(Linear4bit(module)) if "down" in name else Linear4bit(module)
            setattr(model.get_submodule(home), own, part.eval())
            setattr(oracle.get_submodule(home), own, plain(part, module.in_features))
    close(scores(method, model, ids), scores(method, oracle, ids))


@pytest.mark.parametrize("method", ["signed", "reference"])
def test_half_precision(method: str, ids: Tensor) -> None:
    model, oracle = in_state("mamba", "fine-tuned")
    close(scores(method, model.bfloat16(), ids), scores(method, oracle.bfloat16(), ids), 0.1)
