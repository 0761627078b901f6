"""The decomposition of a layer is the layer: exactly the output that the model gave, or an error."""

from collections.abc import Mapping
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutput

from captum_ssm import (
    FidelityError,
    ImplicitAttentionAttribution,
    ImplicitAttentionRollout,
    InvalidInputError,
    LayerImplicitAttention,
    ModelStateError,
    RawImplicitAttention,
    UnsupportedModelError,
    register,
    unregister,
)
from captum_ssm.layers.call import LayerCall, first_output
from captum_ssm.layers.fidelity import Decomposition, decompose, relative_error
from captum_ssm.matrices.core_matrix import channel_matrices
from captum_ssm.network.recording import record_mixers
from captum_ssm.operators import CausalConv, Chain, Diagonal, Projection, Scan
from tests import oracles
from tests.families import FAMILIES, VOCABULARY, layers_of

LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
RIGHT = LEFT.flip(1)
HOLES = torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0, 1, 1, 0, 1, 1, 0]])
MASKS: dict[str, Tensor | None] = {
    "no mask": None, "all real": torch.ones(2, 7), "left padding": LEFT, "right padding": RIGHT, "holes": HOLES,
}  # fmt: skip
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def record(model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> list[LayerCall]:
    with torch.no_grad(), record_mixers(model) as calls:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    assert calls
    return calls


def errors(model: nn.Module, ids: Tensor, mask: Tensor | None = None, tolerance: float | None = 1e-5) -> list[float]:
    """The relative error of every layer, by decompose and once more by hand."""
    found = []
    for call in record(model, ids, mask):
        layer = decompose(call, tolerance)
        y = layer.chain.apply(layer.x, bias=True).detach()
        real = call.y.detach()
        by_hand = float((y - real).abs().max() / real.abs().max())
        assert abs(layer.error - by_hand) <= 1e-8
        found.append(by_hand)
    return found


# --- Every family -------------------------------------------------------------------------------------------------


@every_mask
def test_the_chain_reproduces_the_layers_output(family: nn.Module, ids: Tensor, mask: Tensor | None) -> None:
    assert max(errors(family, ids, mask)) <= 1e-5


@pytest.mark.parametrize("mask", [mask for mask in MASKS.values() if mask is not None], ids=[*MASKS][1:])
def test_the_chain_reproduces_the_layers_output_at_the_real_tokens(
    family: nn.Module, ids: Tensor, mask: Tensor
) -> None:
    for call in record(family, ids, mask):
        layer = decompose(call, 1e-5, mask)
        assert layer.error <= 1e-5
        real = mask.bool()
        difference = (layer.chain.apply(layer.x, bias=True) - call.y).detach()[real].abs().max()
        assert abs(layer.error - float(difference / call.y.detach()[real].abs().max())) <= 1e-8


@every_mask
def test_the_chain_reproduces_the_layers_output_in_float64(family: nn.Module, ids: Tensor, mask: Tensor | None) -> None:
    """transformers computes parts of its layers in float32, whatever the model's type."""
    assert max(errors(family.double(), ids, mask)) <= 1e-5


def test_the_chain_reproduces_the_layers_output_in_bfloat16(family: nn.Module, ids: Tensor) -> None:
    model = family.bfloat16()
    found = errors(model, ids, tolerance=None)
    assert 1e-5 < max(found) <= 5e-2
    for call in record(model, ids):
        layer = decompose(call)
        assert call.y.dtype == torch.bfloat16 and layer.x.dtype == layer.chain.apply(layer.x).dtype == torch.float32


@pytest.mark.parametrize(("B", "L"), [(1, 1), (3, 1), (1, 2), (4, 19)])
def test_the_chain_reproduces_the_layers_output_of_any_size(family: nn.Module, B: int, L: int) -> None:
    """One token, fewer tokens than taps, more tokens than a chunk."""
    assert max(errors(family, torch.randint(1, VOCABULARY, (B, L)))) <= 1e-5


def test_an_example_is_decomposed_alike_alone_and_in_a_batch(family: nn.Module, ids: Tensor) -> None:
    together = [decompose(call) for call in record(family, ids)]
    alone = [decompose(call) for call in record(family, ids[1:])]
    for one, other in zip(together, alone, strict=True):
        inside, single = one.chain.split()[1], other.chain.split()[1]
        D = inside.sizes[0]
        assert D is not None
        matrices, matrix = (
            channel_matrices(inside, torch.empty(2, 7, D)),
            channel_matrices(single, torch.empty(1, 7, D)),
        )
        assert relative_error(matrices[1:], matrix) <= 1e-5


def test_left_padding_moves_the_attention_and_changes_nothing_else(family: nn.Module, ids: Tensor) -> None:
    padded = torch.cat([torch.zeros(2, 3, dtype=ids.dtype), ids], dim=1)
    mask = torch.cat([torch.zeros(2, 3), torch.ones(2, 7)], dim=1)
    for one, other in zip(record(family, padded, mask), record(family, ids), strict=True):
        inside, plain = decompose(one).chain.split()[1], decompose(other).chain.split()[1]
        D = plain.sizes[0]
        assert D is not None
        shifted = channel_matrices(inside, torch.empty(2, 10, D))[..., 3:, 3:]
        assert relative_error(shifted, channel_matrices(plain, torch.empty(2, 7, D))) <= 1e-5


def test_the_bias_is_needed(family: nn.Module, ids: Tensor) -> None:
    """Without its constant term the product misses the output by far, so nothing above holds by accident."""
    for call in record(family, ids):
        layer = decompose(call)
        if "bias" in layer.chain.terms:
            assert relative_error(layer.chain.apply(layer.x), call.y) > 0.05


def test_every_factor_is_needed(family: nn.Module, ids: Tensor) -> None:
    for call in record(family, ids, LEFT):
        layer = decompose(call)
        for term in layer.chain.terms:
            left_out = layer.chain.without(term).apply(layer.x, bias=True)
            assert relative_error(left_out, call.y) > 1e-3, term


def test_the_layers_come_in_the_order_of_the_forward_pass(family: Any, ids: Tensor) -> None:
    calls = record(family, ids)
    mixers = [call.mixer for call in calls]
    assert [call.name for call in calls] == [name for name, module in family.named_modules() if module in mixers]
    assert all(call.x.shape == call.y.shape == (2, 7, family.config.hidden_size) for call in calls)
    assert all(call.y.requires_grad and not call.x.requires_grad for call in calls)


def test_recording_changes_neither_the_output_nor_the_model(family: nn.Module, ids: Tensor, unchanged: Any) -> None:
    plain = family(input_ids=ids, use_cache=False).logits
    with unchanged(family, ids), record_mixers(family):
        watched = family(input_ids=ids, use_cache=False).logits
    assert torch.equal(plain, watched)


def test_fidelity_is_reported_for_every_layer(family: nn.Module, ids: Tensor) -> None:
    method = ImplicitAttentionAttribution(family)
    method.attribute(ids, target=1)
    assert list(method.fidelity) == [call.name for call in record(family, ids)][::-1]  # decomposed last first
    assert 0 <= max(method.fidelity.values()) <= 1e-5


# --- Options of the configurations --------------------------------------------------------------------------------

LAYERS = {family: layer for family, _, layer in layers_of(oracles)}
every_s6 = pytest.mark.parametrize("name", LAYERS)
every_option = pytest.mark.parametrize(("name", "options"), [
    pytest.param(name, options, id=f"{name}-{key}")
    for name, layer in LAYERS.items() for key, options in {"as it is": {}, **layer.options}.items()
])  # fmt: skip


@every_option
def test_s6_is_reproduced_with_every_option(name: str, options: dict[str, Any], ids: Tensor) -> None:
    model = FAMILIES[name].build(**options)
    assert max(errors(model, ids)) <= 1e-5
    assert max(errors(model, ids, LEFT)) <= 1e-5


@every_option
def test_the_alpha_of_s6_is_the_published_one(name: str, options: dict[str, Any], ids: Tensor) -> None:
    model = FAMILIES[name].build(**options).double()
    for mask in (None, LEFT):
        for call in record(model, ids, mask):
            expected = LAYERS[name].oracle(call.mixer, call.x, mask)
            assert relative_error(expected["y"], call.y) <= 1e-5  # the oracle is the layer
            chain = decompose(call).chain
            scan = chain.factors["scan"]
            assert isinstance(scan, Scan)
            alpha = channel_matrices(scan.without("skip"), expected["v"])
            assert relative_error(alpha, expected["alpha"]) <= 1e-12
            skip = oracles.diagonal_matrix(expected["skip"].expand_as(expected["v"]))
            assert relative_error(channel_matrices(scan, expected["v"]) - alpha, skip) <= 1e-12
            if mask is not None:
                assert alpha[0, :, :, :3].eq(0).all()  # no attention to padding


@every_s6
@pytest.mark.parametrize("options", [{}, {"use_bias": True}, {"hidden_act": "gelu"}])
def test_the_unified_attention_of_s6_is_the_product_of_its_published_factors(
    name: str, options: dict[str, Any], ids: Tensor
) -> None:
    model = FAMILIES[name].build(**options).double()
    method = LayerImplicitAttention(model, 1)
    (call,) = [c for c in record(model, ids) if c.name == method.layer_name]
    expected = oracles.unified_s6(call.mixer, call.x)
    assert relative_error(method.attribute(ids, fusion=None), expected) <= 1e-12
    assert tuple(decompose(call).chain.factors) == LAYERS[name].factors


@every_s6
def test_the_scan_attention_of_s6_is_alpha_alone(name: str, ids: Tensor) -> None:
    model = FAMILIES[name].build().double()
    cases: list[tuple[tuple[str, ...], Any]] = [((), None), (("gate", "conv", "act", "skip"), "unified")]
    for without, of in cases:
        method = LayerImplicitAttention(model, 0, attention=of or "scan", without=without)
        (call,) = [c for c in record(model, ids) if c.name == method.layer_name]
        assert (
            relative_error(method.attribute(ids, fusion=None), LAYERS[name].oracle(call.mixer, call.x)["alpha"])
            <= 1e-12
        )


def test_falcon_mambas_norms_are_needed(ids: Tensor) -> None:
    """The same weights as a Mamba give another attention: the norms of delta, B and C are no detail."""
    falcon, plain = FAMILIES["falcon_mamba"].build().double(), FAMILIES["mamba"].build().double()
    plain.load_state_dict(falcon.state_dict(), strict=False)
    scans = [decompose(record(model, ids)[0]).chain.split("scan")[1] for model in (falcon, plain)]
    one, other = (channel_matrices(scan, torch.empty(2, 7, 16, dtype=torch.float64)) for scan in scans)
    assert relative_error(one, other) > 0.05


def test_an_activation_without_gate_form_is_refused_by_name(ids: Tensor) -> None:
    model = FAMILIES["mamba"].build(hidden_act="tanh")
    with pytest.raises(UnsupportedModelError, match=r"activation 'tanh' has no gate form; known: .*silu.*register"):
        ImplicitAttentionAttribution(model).attribute(ids, target=1)


# --- Rounding of the layer's own code -----------------------------------------------------------------------------

OWN_FLOAT32: dict[str, tuple[str, float]] = {
    "qwen3_next": ("norm.weight", 30), "qwen3_5": ("norm.weight", 30), "olmo_hybrid": ("norm.weight", 30),
    "kimi_linear": ("A_log", 3),
}  # fmt: skip
"""Families whose layers compute in float32 whatever the model's type is, and the weights that make it show."""


def rounding(family: str) -> tuple[nn.Module, LayerCall]:
    """A model of float64 and the call of a layer whose own code misses the decomposition by more than 1e-5."""
    name, factor = OWN_FLOAT32[family]
    model = FAMILIES[family].build().double()
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"
    for key, parameter in model.named_parameters():
        parameter.data.mul_(factor if key.endswith(name) else 1)
    ids = torch.randint(1, VOCABULARY, (2, 70), generator=torch.Generator().manual_seed(5))
    return model, record(model, ids)[0]


@pytest.mark.parametrize("family", OWN_FLOAT32)
def test_a_layer_of_float64_that_computes_in_float32_itself_is_not_refused(family: str) -> None:
    """Its own code, with all of it in float64, is the decomposition."""
    _, call = rounding(family)
    assert 1e-5 < decompose(call).error < 1e-3


@pytest.mark.parametrize("family", OWN_FLOAT32)
def test_a_changed_layer_of_float64_is_refused_also_if_it_computes_in_float32(family: str) -> None:
    """By a change that is of the size of that rounding."""
    _, call = rounding(family)
    changed = LayerCall(call.name, call.mixer, call.x, call.y * (1 + 4e-5), call.kwargs)
    with pytest.raises(FidelityError, match="patched"):
        decompose(changed)


# --- A layer that is not what its adapter says --------------------------------------------------------------------

METHODS = {
    "attribution": ImplicitAttentionAttribution,
    "rollout": ImplicitAttentionRollout,
    "raw": partial(RawImplicitAttention, layers=2),
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
PATCHED = "backbone.layers.0.mixer"


def patch_forward(mixer: nn.Module) -> None:
    forward = mixer.forward
    mixer.forward = lambda *args, **kwargs: 1.5 * forward(*args, **kwargs)


def hook_output(mixer: nn.Module) -> None:
    mixer.register_forward_hook(lambda module, args, output: output + 1)


def hook_one_entry(mixer: nn.Module) -> None:
    def change(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        changed = output.clone()
        changed[-1, -1, -1] += 0.1 * output.abs().max()
        return changed

    mixer.register_forward_hook(change)


def replace_inside(mixer: Any) -> None:
    mixer.out_proj = nn.Sequential(mixer.get_submodule("out_proj"), nn.Tanh())
    mixer.out_proj.eval().register_parameter("weight", mixer.out_proj[0].weight)


PATCHES = [patch_forward, hook_output, hook_one_entry, replace_inside]
every_patch = pytest.mark.parametrize("patch", PATCHES, ids=lambda patch: patch.__name__)


@every_method
@every_patch
def test_a_changed_layer_is_refused_by_name_and_error(
    mamba: nn.Module, ids: Tensor, unchanged: Any, method: Any, patch: Any
) -> None:
    patch(mamba.get_submodule(PATCHED))
    with unchanged(mamba, ids), pytest.raises(FidelityError) as caught:
        method(mamba).attribute(ids, target=1)
    assert caught.value.layer == PATCHED
    assert caught.value.error > 1e-2
    message = str(caught.value)
    assert f"'{PATCHED}'" in message and f"{caught.value.error:.1e}" in message
    assert "patched or hooked" in message and "register" in message and "tolerance" in message


@every_patch
def test_a_changed_layer_is_refused_when_it_alone_is_asked_for(
    mamba: nn.Module, ids: Tensor, unchanged: Any, patch: Any
) -> None:
    patch(mamba.get_submodule(PATCHED))
    with unchanged(mamba, ids), pytest.raises(FidelityError, match=PATCHED):
        LayerImplicitAttention(mamba, PATCHED).attribute(ids)
    assert LayerImplicitAttention(mamba, 1).attribute(ids).shape == (2, 7, 7)  # the other layer is as it was


def test_what_a_layer_gives_at_padding_is_not_compared(mamba: nn.Module, ids: Tensor) -> None:
    mamba.get_submodule(PATCHED).register_forward_hook(lambda m, args, y: y + (1 - RIGHT).unsqueeze(-1))
    call = record(mamba, ids, RIGHT)[0]
    assert decompose(call, 1e-5, RIGHT).error <= 1e-5
    for real in (None, torch.ones_like(RIGHT), RIGHT.roll(1, 1)):
        with pytest.raises(FidelityError, match=PATCHED):
            decompose(call, 1e-5, real)
    method = ImplicitAttentionAttribution(mamba)
    scores = method.attribute(ids, target=1, additional_forward_args=RIGHT)
    assert scores[RIGHT == 0].eq(0).all() and max(method.fidelity.values()) <= 1e-5


@pytest.mark.parametrize("mask", [LEFT, LEFT.flip(0), HOLES, HOLES.flip(0), LEFT.roll(1, 1), RIGHT])
def test_padding_on_the_left_that_changes_a_layer_is_refused_by_name(mask: Tensor, ids: Tensor) -> None:
    """The bias of the projection enters the convolution at padding too, so what follows it is another output."""
    call = record(FAMILIES["mamba"].build(use_bias=True), ids, mask)[0]
    decompose(call, 1e-5)  # the decomposition itself is exact
    leaks = bool((mask[:, 0] == 0).any())
    if leaks:
        with pytest.raises(
            InvalidInputError, match=rf"Padding on the left .* '{PATCHED}' \(MambaMixer\) .* by \d"
        ) as e:
            decompose(call, 1e-5, mask)
        assert "Pad on the right" in str(e.value) and "one by one" in str(e.value)
    elif mask is RIGHT:
        assert decompose(call, 1e-5, mask).error <= 1e-5
    else:
        with pytest.raises(
            InvalidInputError, match=rf"'{PATCHED}' \(MambaMixer\) reads tokens that the mask leaves out"
        ):
            decompose(call, 1e-5, mask)


def test_padding_that_is_masked_out_may_be_anywhere() -> None:
    """Also where the layer gives something at padding: its bias, and what its convolution carries there."""

    class Masked(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out, self.taps = nn.Linear(6, 6), nn.Parameter(torch.randn(6, 3))

        def forward(self, x: Tensor, mask: Tensor) -> Tensor:
            return self.out(oracles.conv(x * mask.unsqueeze(-1), self.taps))

    @register("Masked")
    def masked(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
        out, mask = Projection(mixer.out.weight, mixer.out.bias), Diagonal(kwargs["mask"].to(x).unsqueeze(-1))
        return Chain({"out": out, "conv": CausalConv(mixer.taps), "mask": mask})

    try:
        mixer, x = Masked().eval(), torch.randn(2, 7, 6)
        for mask in (LEFT, RIGHT, HOLES, HOLES.flip(1)):
            call = LayerCall("layer", mixer, x, mixer(x, mask).detach(), {"mask": mask})
            assert call.y[mask == 0].abs().max() > 0.1
            assert decompose(call, 1e-5, mask).error <= 1e-5
    finally:
        unregister("Masked")


def test_padding_on_the_right_changes_no_layer(ids: Tensor) -> None:
    for call in record(FAMILIES["mamba"].build(use_bias=True), ids, RIGHT):
        assert decompose(call, 1e-5, RIGHT).error <= 1e-5


def test_only_the_layers_that_are_shown_are_checked(mamba: nn.Module, ids: Tensor) -> None:
    """Layers are decomposed as they are needed, the last ones first."""
    method = RawImplicitAttention(mamba, fusion="absolute")
    method.attribute(ids, target=1)
    assert list(method.fidelity) == ["backbone.layers.1.mixer"]
    last = LayerImplicitAttention(mamba, 1).attribute(ids)[:, -1]
    hook_output(mamba.get_submodule(PATCHED))
    shifted = method.attribute(ids, target=1)
    assert shifted.shape == last.shape and list(method.fidelity) == ["backbone.layers.1.mixer"]
    assert relative_error(shifted, LayerImplicitAttention(mamba, 1).attribute(ids)[:, -1]) <= 1e-6
    with pytest.raises(FidelityError, match=PATCHED):
        RawImplicitAttention(mamba, layers=2).attribute(ids, target=1)


def test_a_hook_that_changes_the_input_is_no_error(mamba: nn.Module, ids: Tensor) -> None:
    """The layer is decomposed at the input that it really got."""
    mixer = mamba.get_submodule(PATCHED)
    mixer.register_forward_pre_hook(lambda module, args: (2 * args[0], *args[1:]) if args else None)
    mixer.register_forward_pre_hook(
        lambda module, args, kwargs: (args, {k: 2 * v if k == "hidden_states" else v for k, v in kwargs.items()}),
        with_kwargs=True,
    )
    assert max(errors(mamba, ids)) <= 1e-5


def test_the_tolerance_is_what_is_allowed(mamba: nn.Module, ids: Tensor) -> None:
    hook_one_entry(mamba.get_submodule(PATCHED))
    method = ImplicitAttentionAttribution(mamba, tolerance=0.5)
    method.attribute(ids, target=1)
    assert 0.05 < method.fidelity[PATCHED] < 0.2
    with pytest.raises(FidelityError, match=r"allowed 1\.0e-02"):
        ImplicitAttentionAttribution(mamba, tolerance=0.01).attribute(ids, target=1)


def test_an_error_that_is_nan_is_above_every_tolerance(mamba: nn.Module, ids: Tensor) -> None:
    @register("Renamed")
    def nothing(mixer: nn.Module, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
        return Chain({"gate": Diagonal(torch.full_like(x, float("nan")))})

    try:
        call = record(mamba, ids)[0]
        renamed = type("Renamed", (nn.Module,), {})()
        with pytest.raises(FidelityError, match="nan"):
            decompose(LayerCall(call.name, renamed, call.x, call.y, {}), tolerance=1e9)
    finally:
        unregister("Renamed")


def test_a_decomposition_that_overflows_in_float32_is_not_called_a_patched_layer(ids: Tensor) -> None:
    model = FAMILIES["mamba"].build()
    call = record(model, ids)[0]
    call.mixer.get_submodule("in_proj").get_parameter("weight").data[0] = 1e38
    with pytest.raises(FidelityError, match=r"model\.double\(\)") as caught:
        decompose(call)
    assert "patched" not in str(caught.value)


def test_what_is_not_finite_is_refused_by_layer(mamba: nn.Module, ids: Tensor) -> None:
    call = record(mamba, ids)[0]
    for value in (float("nan"), float("inf")):
        x, y = call.x.clone(), call.y.detach().clone()
        x[0, 0, 0] = y[0, 0, 0] = value
        with pytest.raises(ModelStateError, match=f"input of layer '{PATCHED}' has NaN or infinite"):
            decompose(LayerCall(call.name, call.mixer, x, call.y, call.kwargs))
        with pytest.raises(ModelStateError, match=f"output of layer '{PATCHED}' has NaN or infinite"):
            decompose(LayerCall(call.name, call.mixer, call.x, y, call.kwargs))


def test_a_layer_without_adapter_is_refused_by_name(ids: Tensor) -> None:
    x = torch.randn(1, 3, 4)
    with pytest.raises(UnsupportedModelError, match=r"No adapter is registered for layer 'lstm' \(LSTM\)"):
        decompose(LayerCall("lstm", nn.LSTM(4, 4), x, x, {}))


def test_the_relative_error_is_the_largest_difference_over_the_largest_value() -> None:
    assert relative_error(torch.tensor([1.0, -3.0]), torch.tensor([1.5, -4.0])) == 0.25
    assert relative_error(torch.tensor([0.5, 0.0]), torch.zeros(2)) == 0.5
    assert isinstance(Decomposition("n", Chain({}), torch.ones(1), 0.0).error, float)


def test_the_output_of_a_layer_is_its_first_value() -> None:
    y = torch.ones(1, 2, 3)
    for output in (y, (y, None), [y], BaseModelOutput(last_hidden_state=y)):
        assert first_output(output) is y
