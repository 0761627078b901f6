"""Gated DeltaNet, Kimi delta attention and lightning attention are decomposed exactly, with every option they have."""

import copy
import math
from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from captum_ssm import UnsupportedModelError
from captum_ssm.layers.activations import activation, activation_name, secant
from captum_ssm.layers.call import LayerCall
from captum_ssm.layers.fidelity import decompose, relative_error
from captum_ssm.layers.mixers import find_adapter
from captum_ssm.layers.norms import inverse_length
from captum_ssm.matrices.core_matrix import channel_matrices
from captum_ssm.network.recording import record_mixers
from captum_ssm.operators import DeltaScan, Diagonal, Scan
from captum_ssm.testing import check_adapter
from tests import oracles_delta as oracles
from tests.families import FAMILIES, VOCABULARY, layers_of

LAYERS = {family: layer for family, _, layer in layers_of(oracles)}
CLASS = {family: name for family, name, _ in layers_of(oracles)}
"""The class of the linear layers of each family."""
CHANNELS = {oracles.gdn: 24, oracles.kda: 12, oracles.lightning: 16}
"""Of the tiny models' layers, by kernel: four heads of 6, three of 4, four of 4."""
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
HOLES = torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0, 1, 1, 0, 1, 1, 0]])
MASKS: dict[str, Tensor | None] = {
    "no mask": None, "left padding": LEFT, "right padding": LEFT.flip(1), "holes": HOLES, "boolean": LEFT.bool(),
}  # fmt: skip

every_family = pytest.mark.parametrize("name", LAYERS)
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


@cache
def tiny(name: str) -> nn.Module:
    """Return the family's model, built once: no test here may change it."""
    return FAMILIES[name].build()


def layers(name: str, model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__ == CLASS[name]]


def changeable(name: str) -> Any:
    """Return a copy of the family's first linear layer."""
    return copy.deepcopy(layers(name, tiny(name))[0])


def record(name: str, model: nn.Module, ids: Tensor, mask: Tensor | None = None) -> list[LayerCall]:
    """Run the model and return the calls of its linear layers."""
    with torch.no_grad(), record_mixers(model) as calls:
        model(input_ids=ids, attention_mask=mask, use_cache=False)
    linear = [call for call in calls if call.mixer in layers(name, model)]
    assert linear
    return linear


def arguments(name: str, x: Tensor, mask: Tensor | None = None) -> dict[str, Any]:
    return {"attention_mask": mask, **LAYERS[name].arguments(x)}


def call_directly(name: str, mixer: nn.Module, x: Tensor, mask: Tensor | None = None) -> LayerCall:
    with torch.no_grad():
        y = mixer(x, **arguments(name, x, mask))
    return LayerCall(name, mixer, x, y if isinstance(y, Tensor) else y[0], arguments(name, x, mask))


def check(name: str, call: LayerCall, tolerance: float = 1e-5) -> None:
    """Compare a call with the model's output and, in float64, each of its parts with the oracle."""
    assert decompose(call, tolerance).error <= tolerance
    call = LayerCall(call.name, call.mixer, call.x.double(), call.y, call.kwargs)
    layer = decompose(call, tolerance)
    expected = LAYERS[name].oracle(call.mixer, call.x, call.kwargs.get("attention_mask"))
    assert relative_error(expected["y"], call.y) <= tolerance  # the oracle is the layer

    chain = layer.chain
    recurrence = chain.split(chain.mixers[0])[1]
    assert relative_error(channel_matrices(recurrence, expected["v"]), expected["alpha"]) <= 1e-12
    _, core, into = chain.split()
    assert relative_error(channel_matrices(core, expected["v"]), expected["core"]) <= 1e-12
    assert relative_error(into.apply(layer.x), expected["v"]) <= 1e-12
    gate = chain.factors["gate"]
    assert isinstance(gate, Diagonal) and relative_error(gate.s, expected["gate"]) <= 1e-12
    assert relative_error(chain.apply(layer.x, bias=True), expected["y"]) <= 1e-12


# --- Every family -------------------------------------------------------------------------------------------------


@every_family
@every_mask
def test_the_layer_is_the_written_out_layer(name: str, mask: Tensor | None, ids: Tensor) -> None:
    for call in record(name, tiny(name), ids, mask):
        check(name, call)
        masked = [] if call.kwargs.get("attention_mask") is None else ["mask"]
        factors = list(decompose(call).chain.factors)
        assert factors == [*LAYERS[name].factors, *masked]


@every_family
def test_padding_is_not_attended_to(name: str, ids: Tensor) -> None:
    for call in record(name, tiny(name), ids, LEFT):
        scan = decompose(call).chain.split("scan")[1]
        alpha = channel_matrices(scan, torch.empty(2, 7, scan.sizes[0] or 0))
        assert alpha[0, :, :, :3].eq(0).all() and alpha[0, :, 4, 3].ne(0).all()


@every_family
@pytest.mark.parametrize("mask", [None, LEFT, HOLES], ids=["no mask", "left padding", "holes"])
def test_the_adapter_holds_every_law(name: str, mask: Tensor | None) -> None:
    mixer = layers(name, tiny(name))[0]
    x = torch.randn(2, 7, 16)
    report = check_adapter(mixer, x, arguments(name, x, mask))
    assert report.channels == CHANNELS[LAYERS[name].oracle]


@every_family
@pytest.mark.parametrize(("B", "L"), [(1, 1), (3, 1), (1, 2), (1, 3), (2, 19)])
def test_the_layer_is_reproduced_at_any_size(name: str, B: int, L: int) -> None:
    """One token, fewer tokens than taps, more tokens than a chunk of ours or a block of MiniMax."""
    for call in record(name, tiny(name), torch.randint(1, VOCABULARY, (B, L))):
        check(name, call)


def forget(name: str, mixer: Any, log_rate: float) -> None:
    """Set the logarithm of the rate at which every head forgets."""
    with torch.no_grad():
        if LAYERS[name].oracle is oracles.lightning:
            mixer.slope_rate.fill_(math.exp(log_rate))
            buffers = mixer.decay_factors(mixer.slope_rate)
            for buffer, value in zip((mixer.query_decay, mixer.key_decay, mixer.diagonal_decay), buffers, strict=True):
                buffer.copy_(value)
        else:
            (mixer.forget_gate if LAYERS[name].oracle is oracles.kda else mixer).A_log.fill_(log_rate)


@every_family
@pytest.mark.parametrize(("log_rate", "L"), [(-3.0, 70), (4.0, 20), (8.0, 20)])
def test_memories_long_and_short_neither_overflow_nor_lose_digits(name: str, log_rate: float, L: int) -> None:
    """Slow decays over more tokens than a chunk of transformers (64), and decays down to 0.

    At the latter transformers itself loses digits to differences of cumulated logarithms: up to 2e-5 in float32.
    """
    mixer = changeable(name)
    forget(name, mixer, log_rate)
    call = call_directly(name, mixer, torch.randn(1, L, 16))
    check(name, call, tolerance=1e-4)
    single = decompose(call)
    expected = LAYERS[name].oracle(mixer, call.x.double())["y"]
    assert relative_error(single.chain.apply(single.x), expected) <= 1e-5
    scan = single.chain.factors["scan"]
    assert isinstance(scan, DeltaScan | Scan)
    decays = scan.products.a.tokens(0, L)
    assert decays.min() >= 0 and decays.max() <= 1
    if log_rate == 8 and name not in ("bailing_hybrid", "glm5_next"):  # these bound their decays
        assert decays.min() == 0


@every_family
@pytest.mark.parametrize("size", [1e-1, 1e-2, 1e-3])
def test_small_inputs_meet_the_eps_of_every_norm(name: str, size: float) -> None:
    """Queries and keys so short that the 1e-6 of their length counts, and an output as small as the norm's eps."""
    check(name, call_directly(name, changeable(name), size * torch.randn(2, 7, 16), LEFT))


@every_family
def test_an_empty_input_gives_an_empty_output_with_finite_gradients(name: str) -> None:
    """Queries, keys and outputs have length 0, and every activation is at 0."""
    call = call_directly(name, changeable(name), torch.zeros(1, 5, 16))
    adapter = find_adapter(call.mixer)
    assert adapter is not None and decompose(call).error == 0
    x = call.x.clone().requires_grad_()
    core = adapter(call.mixer, x, call.kwargs).split()[1]
    matrices = channel_matrices(core, torch.empty(1, 5, core.sizes[0] or 0))
    (gradient,) = torch.autograd.grad(matrices.sum(), x)
    assert matrices.isfinite().all() and gradient.isfinite().all()


# --- Options of the configurations --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "options"),
    [pytest.param(name, o, id=f"{name}-{key}") for name, layer in LAYERS.items() for key, o in layer.options.items()],
)
def test_every_option_is_reproduced(name: str, options: dict[str, Any]) -> None:
    mixer = layers(name, FAMILIES[name].build(**options))[0]
    check(name, call_directly(name, mixer, torch.randn(2, 7, 16), LEFT))


@pytest.mark.parametrize("name", [*LAYERS])
def test_an_activation_without_gate_form_is_refused_by_name(name: str) -> None:
    options = {"output_gate_type": "silu"} if name == "qwen4_exp" else {}
    mixer = layers(name, FAMILIES[name].build(hidden_act="tanh", **options))[0]
    with pytest.raises(UnsupportedModelError, match="activation 'tanh' has no gate form"):
        decompose(call_directly(name, mixer, torch.randn(1, 3, 16)))


# --- The nonlinearities that these layers brought -----------------------------------------------------------------


def test_an_output_gate_is_the_activation_itself() -> None:
    u = torch.randn(5, dtype=torch.float64)
    for name in ("sigmoid", "silu", "gelu", "relu"):
        assert relative_error(activation(name, u), oracles.ACTIVATIONS[name](u)) <= 1e-12
    with pytest.raises(UnsupportedModelError, match="'tanh'"):
        activation("tanh", u)


EXACT = ["silu", "swish", "gelu", "gelu_python_tanh", "gelu_pytorch_tanh", "relu", "linear"]


@pytest.mark.parametrize("name", EXACT)
def test_an_activations_module_is_known_by_its_name(name: str) -> None:
    """Every name stands for the function that the module computes."""
    u = torch.randn(5, dtype=torch.float64)
    module = ACT2FN[name]
    assert relative_error(secant(activation_name(module), u) * u, module(u)) <= 1e-12


@pytest.mark.parametrize("name", sorted(ACT2FN.keys() - {*EXACT, "gelu_python", "xielu"}))
def test_an_approximation_of_an_activation_is_not_taken_for_it(name: str) -> None:
    with pytest.raises(UnsupportedModelError):
        secant(activation_name(ACT2FN[name]), torch.zeros(()))


def test_the_inverse_length_has_a_finite_gradient_at_zero() -> None:
    x = torch.tensor([[3.0, 4.0], [0.0, 0.0]], dtype=torch.float64, requires_grad=True)
    scale = inverse_length(x, 1e-6)
    assert relative_error(scale, torch.tensor([[0.2], [1000.0]])) <= 1e-6 and scale.shape == (2, 1)
    assert torch.autograd.grad(scale.sum(), x)[0].isfinite().all()
