"""Gated DeltaNet, Kimi delta attention and lightning attention are decomposed exactly, with every option they have."""

import copy
import math
from functools import cache
from typing import Any

import oracles_delta as oracles
import pytest
import torch
from families import FAMILIES, VOCABULARY
from torch import Tensor, nn
from transformers.activations import ACT2FN

from captum_ssm import UnsupportedModelError
from captum_ssm.gates import activation, activation_name, inverse_length, secant
from captum_ssm.layers.call import LayerCall
from captum_ssm.layers.fidelity import decompose, relative_error
from captum_ssm.layers.mixers import find_adapter
from captum_ssm.matrices.core_matrix import channel_matrices
from captum_ssm.network.recording import record_mixers
from captum_ssm.operators import DeltaScan, Diagonal, Scan
from captum_ssm.testing import check_adapter

GDN = ("qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen4_exp", "olmo_hybrid")
KDA = ("kimi_linear", "bailing_hybrid", "glm5_next")
ORACLES = dict.fromkeys(GDN, oracles.gdn) | dict.fromkeys(KDA, oracles.kda) | {"minimax": oracles.lightning}
LAYERS = {
    "qwen3_next": "Qwen3NextGatedDeltaNet",
    "qwen3_5": "Qwen3_5GatedDeltaNet",
    "qwen3_5_moe": "Qwen3_5MoeGatedDeltaNet",
    "qwen4_exp": "Qwen4ExpTextGatedDeltaNet",
    "olmo_hybrid": "OlmoHybridGatedDeltaNet",
    "kimi_linear": "KimiLinearDeltaAttention",
    "bailing_hybrid": "BailingHybridDeltaAttention",
    "glm5_next": "Glm5NextTextLinearAttention",
    "minimax": "MiniMaxLightningAttention",
}
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
    return FAMILIES[name]()


def layers(name: str, model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__ == LAYERS[name]]


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


def arguments(name: str, mask: Tensor | None = None) -> dict[str, Any]:
    return {"attention_mask": mask} | ({"position_embeddings": None} if name == "minimax" else {})


def call_directly(name: str, mixer: nn.Module, x: Tensor, mask: Tensor | None = None) -> LayerCall:
    with torch.no_grad():
        y = mixer(x, **arguments(name, mask))
    return LayerCall(name, mixer, x, y if isinstance(y, Tensor) else y[0], arguments(name, mask))


def check(name: str, call: LayerCall, tolerance: float = 1e-5) -> None:
    """Compare a call with the model's output and, in float64, each of its parts with the oracle."""
    assert decompose(call, tolerance).error <= tolerance
    call = LayerCall(call.name, call.mixer, call.x.double(), call.y, call.kwargs)
    layer = decompose(call, tolerance)
    expected = ORACLES[name](call.mixer, call.x, call.kwargs.get("attention_mask"))
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
        conv = [] if name == "minimax" else ["conv"]
        masked = [] if call.kwargs.get("attention_mask") is None else ["mask"]
        factors = list(decompose(call).chain.factors)
        assert factors == ["out", "gate", "norm", "scan", "act", *conv, "in", *masked]


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
    report = check_adapter(mixer, torch.randn(2, 7, 16), arguments(name, mask))
    assert report.channels == {**dict.fromkeys(GDN, 24), **dict.fromkeys(KDA, 12), "minimax": 16}[name]


@every_family
@pytest.mark.parametrize(("B", "L"), [(1, 1), (3, 1), (1, 2), (1, 3), (2, 19)])
def test_the_layer_is_reproduced_at_any_size(name: str, B: int, L: int) -> None:
    """One token, fewer tokens than taps, more tokens than a chunk of ours or a block of MiniMax."""
    for call in record(name, tiny(name), torch.randint(1, VOCABULARY, (B, L))):
        check(name, call)


def forget(name: str, mixer: Any, log_rate: float) -> None:
    """Set the logarithm of the rate at which every head forgets."""
    with torch.no_grad():
        if name == "minimax":
            mixer.slope_rate.fill_(math.exp(log_rate))
            buffers = mixer.decay_factors(mixer.slope_rate)
            for buffer, value in zip((mixer.query_decay, mixer.key_decay, mixer.diagonal_decay), buffers, strict=True):
                buffer.copy_(value)
        else:
            (mixer.forget_gate if name in KDA else mixer).A_log.fill_(log_rate)


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
    expected = ORACLES[name](mixer, call.x.double())["y"]
    assert relative_error(single.chain.apply(single.x), expected) <= 1e-5
    scan = single.chain.factors["scan"]
    assert isinstance(scan, DeltaScan | Scan)
    decays = scan.products[0].tokens(0, L)
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

SHARED: dict[str, dict[str, Any]] = {
    "one tap": {"linear_conv_kernel_dim": 1},
    "more taps than tokens": {"linear_conv_kernel_dim": 9},
    "gelu": {"hidden_act": "gelu"},
    "relu": {"hidden_act": "relu"},
    "large eps": {"rms_norm_eps": 0.5},
}
GDN_OPTIONS: dict[str, dict[str, Any]] = SHARED | {
    "a key for each value head": {"linear_num_key_heads": 4},
    "one key for all value heads": {"linear_num_key_heads": 1},
    "three value heads to a key": {"linear_num_key_heads": 2, "linear_num_value_heads": 6},
    "one head": {"linear_num_key_heads": 1, "linear_num_value_heads": 1},
    "one state": {"linear_key_head_dim": 1},
    "one channel": {"linear_value_head_dim": 1},
}
KDA_OPTIONS: dict[str, dict[str, Any]] = SHARED | {
    "one head": {"linear_num_heads": 1},
    "five heads": {"linear_num_heads": 5},
    "one state": {"linear_head_dim": 1},
}
OPTIONS: dict[str, dict[str, dict[str, Any]]] = {
    **dict.fromkeys(GDN, GDN_OPTIONS),
    **dict.fromkeys(KDA, KDA_OPTIONS),
    "qwen4_exp": {
        **{key: {"output_gate_type": "silu"} | options for key, options in GDN_OPTIONS.items()},
        "sigmoid gate": {"output_gate_type": "sigmoid"},
        "gate like the activation": {"output_gate_type": None},
    },
    "olmo_hybrid": GDN_OPTIONS | {"no negative eigenvalues": {"linear_allow_neg_eigval": False}},
    "bailing_hybrid": KDA_OPTIONS
    | {"no lower bound": {"kda_safe_gate": False}, "high lower bound": {"kda_lower_bound": -0.5}},
    "glm5_next": KDA_OPTIONS
    | {"no lower bound": {"linear_lower_bound": None}, "high lower bound": {"linear_lower_bound": -0.5}},
    "minimax": {
        "gelu": {"hidden_act": "gelu"},
        "relu": {"hidden_act": "relu"},
        "large eps": {"rms_norm_eps": 0.5},
        "two heads": {"num_attention_heads": 2},
        "one head": {"num_attention_heads": 1, "num_key_value_heads": 1},
        "wide heads": {"head_dim": 6},
        "heads by the width": {"head_dim": None},
        "blocks of one": {"block_size": 1},
        "uneven blocks": {"block_size": 5},
        "one block": {"block_size": 64},
    },
}


@pytest.mark.parametrize(
    ("name", "options"),
    [pytest.param(name, o, id=f"{name}-{key}") for name, options in OPTIONS.items() for key, o in options.items()],
)
def test_every_option_is_reproduced(name: str, options: dict[str, Any]) -> None:
    mixer = layers(name, FAMILIES[name](**options))[0]
    check(name, call_directly(name, mixer, torch.randn(2, 7, 16), LEFT))


@pytest.mark.parametrize("name", [*LAYERS])
def test_an_activation_without_gate_form_is_refused_by_name(name: str) -> None:
    options = {"output_gate_type": "silu"} if name == "qwen4_exp" else {}
    mixer = layers(name, FAMILIES[name](hidden_act="tanh", **options))[0]
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
