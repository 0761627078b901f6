"""The layers of Mamba-2, and the Mamba layers of hybrid models, are their decompositions."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_ssm.layers.call import LayerCall
from captum_ssm.layers.fidelity import decompose, relative_error
from captum_ssm.layers.mixers import find_adapter
from captum_ssm.matrices.core_matrix import channel_matrices
from captum_ssm.network.recording import record_mixers
from captum_ssm.operators import Chain, Product, Scan
from captum_ssm.testing import check_adapter
from tests import oracles_ssd
from tests.families import FAMILIES, VOCABULARY, layers_of

LAYERS = {family: layer for family, _, layer in layers_of(oracles_ssd)}
CLASS = {family: name for family, name, _ in layers_of(oracles_ssd)}
"""The class of the layers of each family."""

LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
MASKS = {"no mask": None, "left padding": LEFT, "right padding": LEFT.flip(1)}
every_family = pytest.mark.parametrize("name", LAYERS)
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


def count(name: str, model: Any) -> int:
    """Return how many of its layers the family's model has, from its configuration."""
    return sum(block.classes.count(CLASS[name]) for block in FAMILIES[name].blocks(model.config))


def mixers(name: str, model: nn.Module) -> list[Any]:
    found = [module for module in model.modules() if type(module).__name__ == CLASS[name]]
    assert len(found) == count(name, model) > 0
    return found


def record(name: str, model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> list[LayerCall]:
    with torch.no_grad(), record_mixers(model) as calls:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    calls = [call for call in calls if type(call.mixer).__name__ == CLASS[name]]
    assert len(calls) == count(name, model) > 0
    return calls


def call_of(mixer: nn.Module, x: Tensor, mask: Tensor | None = None) -> LayerCall:
    kwargs: dict[str, Any] = {"attention_mask": mask}
    with torch.no_grad():
        return LayerCall(type(mixer).__name__, mixer, x, mixer(x, **kwargs), kwargs)


def pieces_of(name: str, model: Any, mixer: Any, x: Tensor, mask: Tensor | None = None) -> oracles_ssd.Pieces:
    multipliers = getattr(model.config, "ssm_multipliers", None)
    return LAYERS[name].oracle(mixer, x, mask, *([] if multipliers is None else [multipliers]))


def width(mixer: Any) -> int:
    size: int = mixer.in_proj.weight.shape[1]
    return size


# --- Every family, as it is ---------------------------------------------------------------------------------------


@every_family
@every_mask
def test_the_chain_reproduces_the_layers_output(name: str, ids: Tensor, mask: Tensor | None) -> None:
    calls = record(name, FAMILIES[name].build(), ids, mask)
    for call in calls:
        layer = decompose(call)
        assert layer.error <= 2e-6
        assert list(layer.chain.factors) == [*LAYERS[name].factors, *(["mask"] if mask is not None else [])]
    masks = [call.kwargs.get("attention_mask") for call in calls]
    assert all((seen is None) == (mask is None) for seen in masks)


@every_family
@pytest.mark.parametrize(("B", "L"), [(1, 1), (3, 1), (1, 2), (2, 4), (1, 41)])
def test_the_chain_reproduces_inputs_of_any_size(name: str, B: int, L: int) -> None:
    """One token, fewer tokens than taps, exactly one chunk, a part of a chunk after ten."""
    for call in record(name, FAMILIES[name].build(), torch.randint(1, VOCABULARY, (B, L))):
        assert decompose(call).error <= 2e-6


@every_family
def test_the_chain_reproduces_bfloat16(name: str) -> None:
    for mixer in mixers(name, FAMILIES[name].build().bfloat16()):
        layer = decompose(call_of(mixer, torch.randn(2, 7, width(mixer), dtype=torch.bfloat16), LEFT))
        assert layer.x.dtype == layer.chain.apply(layer.x, bias=True).dtype == torch.float32
        assert 1e-5 < layer.error <= 5e-2


@every_family
@pytest.mark.parametrize("masked", [False, True])
def test_every_layer_holds_the_laws_of_adapters(name: str, masked: bool) -> None:
    for mixer in mixers(name, FAMILIES[name].build()):
        report = check_adapter(mixer, torch.randn(2, 7, width(mixer)), {"attention_mask": LEFT} if masked else None)
        assert max(report.fidelity, report.adjoint, report.dense) <= 2e-6


@every_family
@every_mask
def test_the_gradient_of_the_chain_is_that_of_the_layer(name: str, mask: Tensor | None) -> None:
    """Nothing is detached: with its gates recomputed from x, the chain is the layer as a function of x."""
    mixer = mixers(name, FAMILIES[name].build())[0]
    adapter = find_adapter(mixer)
    assert adapter is not None
    x, u = torch.randn(2, 2, 7, width(mixer)).unbind()
    x.requires_grad_()
    kwargs: Mapping[str, Any] = {"attention_mask": mask}
    (expected,) = torch.autograd.grad((u * mixer(x, **kwargs)).sum(), x)
    (found,) = torch.autograd.grad((u * adapter(mixer, x, kwargs).apply(x, bias=True)).sum(), x)
    assert relative_error(found, expected) <= 1e-5


# --- The equations, with every option of the configurations -------------------------------------------------------

OPTIONS = {family: {"as it is": {}, **layer.options} for family, layer in LAYERS.items()}
CASES = [(name, option) for name, options in OPTIONS.items() for option in options]
NUMBERS = ("a large epsilon", "gelu", "relu", "steps", "norm before gate", "other multipliers")
"""Options that leave the shapes of the parameters as they are."""


def built(name: str, option: str) -> nn.Module:
    return FAMILIES[name].build(**OPTIONS[name][option])


@pytest.mark.parametrize(("name", "option"), CASES)
def test_every_option_is_reproduced(name: str, option: str) -> None:
    mixer = mixers(name, built(name, option))[-1]
    x = torch.randn(2, 7, width(mixer))
    for mask in MASKS.values():
        assert decompose(call_of(mixer, x, mask)).error <= 2e-6


@pytest.mark.parametrize(("name", "option"), [case for case in CASES if case[1].startswith(NUMBERS)])
def test_every_option_matters(name: str, option: str) -> None:
    """An option that changes nothing at these inputs would test nothing."""
    mixer, plain = (mixers(name, built(name, key))[-1] for key in (option, "as it is"))
    plain.load_state_dict(mixer.state_dict())
    x = torch.randn(2, 7, width(mixer))
    assert relative_error(call_of(mixer, x).y, call_of(plain, x).y) > 1e-3


@pytest.mark.parametrize(("name", "option"), CASES)
def test_the_factors_are_the_written_out_equations(name: str, option: str) -> None:
    model = built(name, option).double()
    mixer = mixers(name, model)[-1]
    x = torch.randn(2, 5, width(mixer), dtype=torch.float64)
    mask = LEFT[:, 2:]  # the second example has no padding
    call, expected = call_of(mixer, x, mask), pieces_of(name, model, mixer, x, mask)
    assert relative_error(expected.y, call.y) <= 2e-6  # the oracle is the layer, which computes in float32
    chain = decompose(call).chain
    assert relative_error(chain.apply(x, bias=True), expected.y) <= 1e-12

    _, scan, _ = chain.split(chain.mixers[0])
    assert list(scan.factors) == ["scan"]
    like = torch.empty_like(expected.gate)
    alpha = channel_matrices(scan.without("skip"), like)
    assert relative_error(alpha, expected.alpha) <= 1e-12
    assert not alpha[0, :, :, 0].any()  # no attention to padding
    assert relative_error(channel_matrices(scan, like), oracles_ssd.scan(expected)) <= 1e-12
    assert relative_error(channel_matrices(chain.split()[1], like), oracles_ssd.core(expected)) <= 1e-12

    gate = Chain({name: factor for name, factor in chain.factors.items() if name in ("norm", "gate")})
    assert relative_error(gate.apply(torch.ones_like(like)), expected.gate) <= 1e-12

    L, E = x.shape[1:]
    columns = torch.eye(L * E, dtype=x.dtype).view(L * E, 1, L, E).expand(-1, 2, -1, -1)
    matrix = chain.apply(columns).permute(1, 2, 3, 0).unflatten(-1, (L, E))
    assert relative_error(matrix, oracles_ssd.operator(expected)) <= 1e-12


@pytest.mark.parametrize(("option", "order"), [
    ("as it is", ["norm", "gate"]), ("norm before gate", ["gate", "norm"]),
    ("four groups, norm before gate", ["gate", "norm"]),
])  # fmt: skip
def test_the_norm_normalises_each_group_of_what_reaches_it(option: str, order: list[str]) -> None:
    """Both are diagonal, so that no output tells their order: the norm's input must have the size it divides by."""
    mixer = mixers("falcon_h1", built("falcon_h1", option))[0]
    x = torch.randn(2, 7, width(mixer))
    chain = decompose(call_of(mixer, x)).chain
    names = list(chain.factors)
    assert names == ["out", *order, "scan", "act", "conv", "in"]
    before = Chain({name: chain.factors[name] for name in names[names.index("norm") + 1 :]}).apply(x, bias=True)
    after = chain.factors["norm"].apply(before) / mixer.norm.weight
    size, normed = (t.unflatten(-1, (mixer.n_groups, -1)).square().mean(-1) for t in (before, after))
    torch.testing.assert_close(normed, size / (size + mixer.norm.variance_epsilon))


def test_jambas_b_and_c_have_their_own_norms() -> None:
    """The attention has the product of both norms' weights alone, so that it does not tell which is whose."""
    mixer = mixers("jamba", FAMILIES["jamba"].build())[0]
    scan = decompose(call_of(mixer, torch.randn(2, 7, width(mixer)))).chain.factors["scan"]
    assert isinstance(scan, Scan) and isinstance(scan.b, Product) and isinstance(scan.c, Tensor)
    for normed, norm in ((scan.b.factors[1], mixer.b_layernorm), (scan.c, mixer.c_layernorm)):
        size = (normed / norm.weight).square().mean(-1)
        torch.testing.assert_close(size, torch.ones(2, 7, 1), atol=1e-3, rtol=0)


# --- Long sequences and strong decays -----------------------------------------------------------------------------


def forgetful(mixer: Any) -> None:
    """Let the decays of different heads and channels spread from 1 to 0."""
    with torch.no_grad():
        mixer.A_log.copy_(torch.linspace(-6, 8, mixer.A_log.numel()).view_as(mixer.A_log))


@every_family
def test_long_sequences_with_strong_decays_stay_exact(name: str) -> None:
    mixer = mixers(name, FAMILIES[name].build())[0]
    forgetful(mixer)
    call = call_of(mixer, torch.randn(1, 200, width(mixer)))
    layer = decompose(call)
    assert layer.error <= 2e-6
    scan = layer.chain.factors["scan"]
    assert isinstance(scan, Scan)
    decays = scan.products.a.tokens(0, 200)
    assert decays.min() < 1e-30 and 0.99 < decays.max() <= 1


@every_family
def test_the_gradient_with_strong_decays_is_finite(name: str) -> None:
    mixer = mixers(name, FAMILIES[name].build())[0]
    forgetful(mixer)
    adapter = find_adapter(mixer)
    assert adapter is not None
    x = torch.randn(1, 70, width(mixer), requires_grad=True)
    (gradient,) = torch.autograd.grad(adapter(mixer, x, {}).apply(x, bias=True).square().sum(), x)
    assert gradient.isfinite().all() and gradient.abs().max() > 0


# --- What is shared -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "option", "heads"), [
    ("mamba2", "as it is", 8), ("mamba2", "one group", 1), ("zamba", "as it is", 32), ("zamba", "one head", 1),
    ("jamba", "as it is", 1),
])  # fmt: skip
def test_what_all_heads_share_is_held_once(name: str, option: str, heads: int) -> None:
    mixer = mixers(name, built(name, option))[0]
    scan = decompose(call_of(mixer, torch.randn(2, 7, width(mixer)))).chain.factors["scan"]
    assert isinstance(scan, Scan) and isinstance(scan.c, Tensor)
    assert scan.c.shape == (2, 7, heads, 3)


def test_heads_share_their_attention() -> None:
    """One (L, L) matrix serves all channels of a head of Mamba-2, and the B and C of a group all heads of it."""
    mixer = mixers("mamba2", FAMILIES["mamba2"].build())[0]
    chain = decompose(call_of(mixer, torch.randn(2, 7, 16))).chain
    scan = chain.factors["scan"]
    assert isinstance(scan, Scan) and (scan.heads, scan.head_size) == (8, 4)
    alpha = channel_matrices(scan.without("skip"), torch.empty(2, 7, 32)).unflatten(1, (8, 4))
    assert torch.equal(alpha, alpha[:, :, :1].expand_as(alpha))
    assert isinstance(scan.c, Tensor)
    groups = scan.c.unflatten(2, (2, 4))
    assert torch.equal(groups, groups[:, :, :, :1].expand_as(groups)) and not torch.equal(
        groups[:, :, 0], groups[:, :, 1]
    )


def test_a_layer_derived_from_a_supported_one_has_its_adapter() -> None:
    """So do the layers of models that build on these, such as those around Nemotron-H."""
    mixer = mixers("nemotron_h", FAMILIES["nemotron_h"].build())[0]
    mixer.__class__ = type("OwnMixer", (type(mixer),), {})
    assert decompose(call_of(mixer, torch.randn(2, 7, 16))).error <= 2e-6
