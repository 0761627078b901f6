"""RG-LRU, WKV-4, mLSTM and the short convolution are decomposed exactly, with every option they have."""

import copy
import inspect
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache, RwkvConfig, xLSTMConfig
from transformers.models.rwkv.modeling_rwkv import RwkvSelfAttention
from transformers.models.xlstm.modeling_xlstm import xLSTMLayer

from captum_ssm import FidelityError
from captum_ssm.layers.activations import activation, secant
from captum_ssm.layers.call import LayerCall
from captum_ssm.layers.fidelity import decompose, relative_error
from captum_ssm.layers.log_domain import running_max
from captum_ssm.layers.mixers import find_adapter
from captum_ssm.matrices.core_matrix import channel_matrices
from captum_ssm.network.recording import record_mixers
from captum_ssm.operators import Chain, Scan
from captum_ssm.testing import check_adapter
from tests import oracles_gated as oracles
from tests.families import FAMILIES, VOCABULARY, layers_of, perturbed

LAYERS = {name: layer for _, name, layer in layers_of(oracles)}
FAMILY = {name: family for family, name, _ in layers_of(oracles)}
"""The family of each class of layers."""
CONVS = [name for name, layer in LAYERS.items() if layer.oracle is oracles.short_conv]
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])
HOLES = torch.tensor([[1, 0, 1, 1, 0, 0, 1], [0, 1, 1, 0, 1, 1, 0]])
MASKS: dict[str, Tensor | None] = {
    "no mask": None, "left padding": LEFT, "right padding": LEFT.flip(1), "holes": HOLES, "boolean": LEFT.bool(),
}  # fmt: skip

every_layer = pytest.mark.parametrize("layer", LAYERS)
every_conv = pytest.mark.parametrize("layer", CONVS)
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)


@cache
def tiny(family: str) -> nn.Module:
    """Return the family's model, built once: no test here may change it."""
    return FAMILIES[family].build()


def mixers(layer: str, model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if type(module).__name__ == layer]


def changeable(layer: str) -> Any:
    """Return a copy of the last layer of this class in its family's model."""
    return copy.deepcopy(mixers(layer, tiny(FAMILY[layer]))[-1])


def record(layer: str, model: nn.Module, ids: Tensor, mask: Tensor | None = None, **options: Any) -> list[LayerCall]:
    """Run the model and return the calls of its layers of this class."""
    with torch.no_grad(), record_mixers(model) as calls:
        model(input_ids=ids, attention_mask=mask, **{"use_cache": False, **options})
    found = [call for call in calls if type(call.mixer).__name__ == layer]
    assert len(found) == len(mixers(layer, model)) > 0
    return found


def call_directly(mixer: nn.Module, x: Tensor, **kwargs: Any) -> LayerCall:
    kwargs = {**LAYERS[type(mixer).__name__].arguments(x), **kwargs}
    with torch.no_grad():
        output = mixer(x, **kwargs)
    return LayerCall(type(mixer).__name__, mixer, x, output if isinstance(output, Tensor) else output[0], kwargs)


def tokens(mixer: Any, B: int, L: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a random input of the layer."""
    widths = {"linear_x": 1, "receptance": 1, "q": 1, "qkv_opreact": 1, "in_proj": 1}
    name = next(name for name in widths if hasattr(mixer, name))
    return torch.randn(B, L, mixer.get_submodule(name).weight.shape[1], dtype=dtype)


def errors(layer: str, model: nn.Module, ids: Tensor, mask: Tensor | None = None, **options: Any) -> float:
    """Return the largest relative error of the layers of this class, by hand."""
    found = []
    for call in record(layer, model, ids, mask, **options):
        decomposed = decompose(call, 1e-5)
        y, real = decomposed.chain.apply(decomposed.x, bias=True).detach(), call.y.detach()
        found.append(float((y - real).abs().max() / real.abs().max()))
    return max(found)


def oracle(mixer: Any, x: Tensor, **kwargs: Any) -> dict[str, Tensor]:
    """Return what the layer's oracle says, given the arguments of the layer that enter its equation."""
    equation = LAYERS[type(mixer).__name__].oracle
    names = inspect.signature(equation).parameters
    return equation(mixer, x, **{name: value for name, value in kwargs.items() if name in names})


def chain_of(mixer: nn.Module, x: Tensor, **kwargs: Any) -> Chain:
    adapter = find_adapter(mixer)
    assert adapter is not None
    with torch.no_grad():
        return adapter(mixer, x, {**LAYERS[type(mixer).__name__].arguments(x), **kwargs})


def matrices(chain: Chain, x: Tensor) -> Tensor:
    """Return the matrices of the recurrence alone."""
    core = chain.split(chain.mixers[0])[1]
    D = core.sizes[0]
    assert D is not None
    return channel_matrices(core, x.new_empty(*x.shape[:2], D))


def whole(chain: Chain, x: Tensor) -> Tensor:
    """Return the chain's matrix between all tokens and widths, (B, L·E, L·E), column by column."""
    B, L, E = x.shape
    basis = torch.eye(L * E, dtype=x.dtype).view(L * E, 1, L, E).expand(-1, B, -1, -1)
    return chain.apply(basis).flatten(2).permute(1, 2, 0)


def agrees(mixer: Any, x: Tensor, tolerance: float = 1e-12, **kwargs: Any) -> None:
    """Compare a layer's chain with the oracle: the recurrence, the whole operator and the output."""
    x = x.double()
    kwargs = {**LAYERS[type(mixer).__name__].arguments(x), **kwargs}
    chain, expected = chain_of(mixer, x, **kwargs), oracle(mixer, x, **kwargs)
    assert relative_error(matrices(chain, x), expected["alpha"]) <= tolerance
    assert relative_error(whole(chain, x), expected["operator"]) <= tolerance
    assert relative_error(chain.apply(x, bias=True), expected["y"]) <= tolerance


# --- The layer as the model runs it --------------------------------------------------------------------------------


@every_layer
@every_mask
def test_the_chain_reproduces_every_layers_output(layer: str, mask: Tensor | None, ids: Tensor) -> None:
    assert errors(layer, tiny(FAMILY[layer]), ids, mask) <= 1e-5


@every_layer
@pytest.mark.parametrize(("B", "L"), [(1, 1), (3, 1), (1, 2), (4, 19)])
def test_the_chain_reproduces_the_output_of_any_size(layer: str, B: int, L: int) -> None:
    """One token, fewer tokens than taps, more tokens than a chunk and no multiple of it."""
    assert errors(layer, tiny(FAMILY[layer]), torch.randint(1, VOCABULARY, (B, L))) <= 1e-5


@pytest.mark.parametrize("layer", ["RwkvSelfAttention", "RwkvFeedForward", "xLSTMLayer"])
def test_the_chain_reproduces_the_output_with_the_state_that_the_model_starts(layer: str, ids: Tensor) -> None:
    sizes = {"hidden_size": 64, "qk_dim_factor": 1.0, "v_dim_factor": 1.0}  # xLSTM's cache has 64s of states
    model = FAMILIES["xlstm"].build(**sizes) if layer == "xLSTMLayer" else tiny(FAMILY[layer])
    assert errors(layer, model, ids, use_cache=True) <= 1e-5
    assert errors(layer, model, ids, use_cache=True) <= 1e-5, "the first call left something behind"


@pytest.mark.parametrize("layer", ["RecurrentGemmaRecurrentBlock", *CONVS])
def test_the_chain_reproduces_the_output_with_an_empty_cache(layer: str) -> None:
    mixer = changeable(layer)
    for _ in range(2):
        x = tokens(mixer, 2, 7)
        cache = {"past_key_values": DynamicCache(config=mixer.config)} if layer in CONVS else {"use_cache": True}
        assert decompose(call_directly(mixer, x, **cache), 1e-5).error <= 1e-6


@every_layer
def test_the_factors_are_named_in_the_order_of_the_equation(layer: str, ids: Tensor) -> None:
    for call in record(layer, tiny(FAMILY[layer]), ids):
        assert tuple(decompose(call).chain.factors) == LAYERS[layer].factors
    for call in record(layer, tiny(FAMILY[layer]), ids, LEFT):
        masked = ("mask",) if LAYERS[layer].takes_mask else ()
        assert tuple(decompose(call).chain.factors) == LAYERS[layer].factors + masked


@every_layer
def test_every_factor_is_needed(layer: str, ids: Tensor) -> None:
    for call in record(layer, tiny(FAMILY[layer]), ids, LEFT):
        decomposed = decompose(call)
        for term in set(decomposed.chain.terms) - {"mask"}:  # without a bias nothing comes from padding that is masked
            assert relative_error(decomposed.chain.without(term).apply(decomposed.x, bias=True), call.y) > 1e-3, term


@every_layer
def test_the_laws_of_adapters_hold(layer: str) -> None:
    for mixer in mixers(layer, tiny(FAMILY[layer])):
        x = tokens(mixer, 2, 6)
        masks: list[dict[str, Any]] = [{"attention_mask": LEFT[:, 1:]}] if LAYERS[layer].takes_mask else []
        for kwargs in [{}, *masks]:
            report = check_adapter(mixer, x, {**LAYERS[layer].arguments(x), **kwargs})
            assert report.factors[: len(LAYERS[layer].factors)] == LAYERS[layer].factors


@pytest.mark.parametrize("layer", [layer for layer in LAYERS if FAMILY[layer] not in ("xlstm", "lfm2_moe")])
def test_the_chain_reproduces_the_output_in_bfloat16(layer: str, ids: Tensor) -> None:
    """transformers' xLSTM and grouped experts do not run in bfloat16 here."""
    calls = record(layer, copy.deepcopy(tiny(FAMILY[layer])).bfloat16(), ids)
    for call in calls:
        decomposed = decompose(call)
        assert decomposed.x.dtype == torch.float32 and decomposed.error <= 5e-2


# --- The oracle ----------------------------------------------------------------------------------------------------


@every_layer
@pytest.mark.parametrize(("B", "L"), [(2, 7), (1, 1), (1, 2)])
def test_the_layer_is_the_papers_sum(layer: str, B: int, L: int) -> None:
    mixer = changeable(layer)
    agrees(mixer, tokens(mixer, B, L))


@every_conv
@every_mask
def test_the_masked_layer_is_the_papers_sum(layer: str, mask: Tensor | None) -> None:
    mixer = changeable(layer)
    agrees(mixer, tokens(mixer, 2, 7), attention_mask=mask)


@every_layer
def test_the_oracle_is_the_layer(layer: str) -> None:
    """Parts of transformers' layers are in float32, whatever the model's type."""
    mixer = changeable(layer).double()
    call = call_directly(mixer, tokens(mixer, 2, 9, torch.float64))
    assert relative_error(oracle(mixer, call.x, **call.kwargs)["y"], call.y) <= 1e-6


# --- Options -------------------------------------------------------------------------------------------------------

every_option = pytest.mark.parametrize(
    ("layer", "options"),
    [pytest.param(name, options, id=f"{name}-{key}")
     for name, layer in LAYERS.items() for key, options in layer.options.items()],
)  # fmt: skip


@every_option
def test_every_option_is_reproduced(layer: str, options: dict[str, Any], ids: Tensor) -> None:
    model = FAMILIES[FAMILY[layer]].build(**options)
    assert errors(layer, model, ids) <= 1e-5
    assert errors(layer, model, ids, LEFT) <= 1e-5
    mixer = mixers(layer, model)[-1]
    agrees(mixer, tokens(mixer, 2, 5))


@every_conv
def test_a_bias_reaches_gates_and_padding(layer: str) -> None:
    mixer = mixers(layer, FAMILIES[FAMILY[layer]].build(conv_bias=True))[0]
    agrees(mixer, tokens(mixer, 2, 7), attention_mask=HOLES)
    call = call_directly(mixer, tokens(mixer, 2, 7), attention_mask=HOLES)
    decomposed = decompose(call, 1e-5)
    for term in ("mask", "bias"):
        assert relative_error(decomposed.chain.without(term).apply(decomposed.x, bias=True), call.y) > 1e-2


# --- RG-LRU --------------------------------------------------------------------------------------------------------

POSITIONS = {
    "from 0": torch.arange(7).unsqueeze(0),
    "of each example": torch.tensor([[0, 1, 2, 3, 4, 5, 6], [0, 0, 0, 0, 1, 2, 3]]),
    "two documents": torch.tensor([[0, 1, 2, 0, 1, 2, 3], [0, 0, 1, 2, 3, 4, 0]]),
    "no start": torch.arange(3, 10).unsqueeze(0),
}


@pytest.mark.parametrize("positions", POSITIONS.values(), ids=POSITIONS)
def test_the_recurrence_starts_anew_where_a_position_is_0(positions: Tensor, ids: Tensor) -> None:
    layer = "RecurrentGemmaRecurrentBlock"
    assert errors(layer, tiny("recurrent_gemma"), ids, position_ids=positions) <= 1e-5
    mixer = changeable(layer)
    x = tokens(mixer, 2, 7)
    agrees(mixer, x, position_ids=positions)
    alpha = matrices(chain_of(mixer, x, position_ids=positions), x)
    for b, t in (positions.expand(2, 7)[:, 1:] == 0).nonzero().tolist():
        assert alpha[b, :, t + 1 :, : t + 1].abs().max() == 0


@pytest.mark.parametrize("bias", [-40.0, -12.0, -6.0, 6.0, 40.0])
def test_gates_near_their_ends_are_reproduced_and_have_gradients(bias: float) -> None:
    """Near a = 1 the layer's ``1 - a²`` is rounded; at a = 1 its root has no derivative."""
    mixer = changeable("RecurrentGemmaRecurrentBlock")
    mixer.rg_lru.recurrent_gate_bias.data.fill_(bias)
    call = call_directly(mixer, tokens(mixer, 2, 150))
    assert decompose(call, 1e-5).error <= 1e-5
    x = call.x.clone().requires_grad_()
    adapter = find_adapter(mixer)
    assert adapter is not None
    assert torch.autograd.grad(adapter(mixer, x, call.kwargs).apply(x).sum(), x)[0].isfinite().all()


def test_the_tanh_form_of_gelu_is_torchs() -> None:
    u = torch.cat([torch.linspace(-30, 30, 601, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)])
    for name in ("gelu_pytorch_tanh", "gelutanh"):
        assert relative_error(activation(name, u), F.gelu(u, approximate="tanh")) <= 1e-14
        assert secant(name, u)[-1] == 0.5
    assert torch.equal(secant("relu2", u) * u, u.relu().square())


def test_a_state_left_by_an_earlier_call_is_not_overlooked() -> None:
    """The layer keeps the state of generation on itself, where no argument shows it."""
    mixer = changeable("RecurrentGemmaRecurrentBlock")
    x = tokens(mixer, 2, 7)
    call_directly(mixer, x, use_cache=True)
    continued = {"use_cache": True, "position_ids": POSITIONS["no start"]}
    with pytest.raises(FidelityError):
        decompose(call_directly(mixer, x, **continued))
    assert decompose(call_directly(mixer, x, use_cache=True), 1e-5).error <= 1e-6, "from position 0 on it starts anew"


# --- WKV-4 ---------------------------------------------------------------------------------------------------------


def with_keys(mixer: Any, scale: float, decay: float, bonus: float) -> Any:
    mixer.key.weight.data *= scale
    mixer.time_decay.data += decay
    mixer.time_first.data += bonus
    return mixer


EXTREMES = {
    "mild": (1.0, 0.0, 0.0),
    "large keys": (200.0, 0.0, 0.0),
    "large keys, strong decay": (200.0, 4.0, 0.0),
    "large keys, no decay": (50.0, -20.0, 0.0),
    "strong decay": (1.0, 6.0, 0.0),
    "no decay": (1.0, -20.0, 0.0),
    "the current token alone": (1.0, 0.0, 300.0),
    "never the current token": (1.0, 0.0, -300.0),
}
every_extreme = pytest.mark.parametrize("extreme", EXTREMES.values(), ids=EXTREMES)


@every_extreme
def test_rows_sum_to_one_whatever_the_keys(extreme: tuple[float, float, float]) -> None:
    mixer = with_keys(changeable("RwkvSelfAttention"), *extreme)
    x = tokens(mixer, 2, 60)
    alpha = matrices(chain_of(mixer, x), x)
    assert alpha.min() >= 0
    assert (alpha.sum(-1) - 1).abs().max() <= 1e-5


@every_extreme
def test_extreme_keys_are_reproduced(extreme: tuple[float, float, float]) -> None:
    """Where keys are of the order of 1000, the layer's own rounding is seen: it is no nearer to the exact weights."""
    mixer = with_keys(changeable("RwkvSelfAttention"), *extreme)
    call = call_directly(mixer, tokens(mixer, 2, 24))
    decomposed, exact = decompose(call, 1e-4), oracles.wkv(mixer, call.x.double())["y"]
    assert relative_error(decomposed.chain.apply(call.x, bias=True), exact) <= max(3e-6, relative_error(call.y, exact))
    agrees(mixer, call.x[:, :9], tolerance=1e-11)


@every_extreme
def test_extreme_keys_have_gradients(extreme: tuple[float, float, float]) -> None:
    mixer = with_keys(changeable("RwkvSelfAttention"), *extreme)
    x = tokens(mixer, 2, 40).requires_grad_()
    adapter = find_adapter(mixer)
    assert adapter is not None
    assert torch.autograd.grad(adapter(mixer, x, {}).apply(x).square().sum(), x)[0].isfinite().all()


def test_the_gates_have_the_layers_gradient() -> None:
    """What keeps the exponents small cancels, also in the derivative."""
    mixer = changeable("RwkvSelfAttention")
    x = tokens(mixer, 1, 6, torch.float64).requires_grad_()
    adapter = find_adapter(mixer)
    assert adapter is not None
    u = torch.randn(1, 6, 16, dtype=torch.float64)
    found = torch.autograd.grad((u * adapter(mixer, x, {}).apply(x)).sum(), x)[0]
    expected = torch.autograd.grad((u * oracles.wkv(mixer, x)["y"]).sum(), x)[0]
    assert relative_error(found, expected) <= 1e-12


def test_each_call_reads_the_weights_that_the_model_has_rescaled(ids: Tensor) -> None:
    """The model divides weights at the first call in evaluation, and restores them in training."""
    for layer in ("RwkvSelfAttention", "RwkvFeedForward"):
        model = FAMILIES["rwkv"].build(rescale_every=1)
        for train in (False, False, True, False):
            if train:
                model.train()
                with torch.no_grad():
                    model(input_ids=ids, use_cache=False)
                model.eval()
            assert errors(layer, model, ids) <= 1e-5


def test_a_state_that_is_handed_over_is_not_overlooked(ids: Tensor) -> None:
    model = tiny("rwkv")
    with torch.no_grad():
        state = model(input_ids=ids, use_cache=True).state
    for layer in ("RwkvSelfAttention", "RwkvFeedForward"):
        call = record(layer, model, ids, state=copy.deepcopy(state), use_cache=True)[0]
        with pytest.raises(FidelityError):
            decompose(call)


# --- mLSTM ---------------------------------------------------------------------------------------------------------


def with_gates(mixer: Any, i: float, f: float, scale: float = 1.0) -> Any:
    mixer.igate_preact.bias.data += i
    mixer.fgate_preact.bias.data += f
    mixer.igate_preact.weight.data *= scale
    mixer.fgate_preact.weight.data *= scale
    return mixer


GATES = {
    "mild": (0.0, 0.0, 1.0),
    "as initialised": (-10.0, 4.0, 0.1),
    "nothing forgotten": (0.0, 15.0, 1.0),
    "all forgotten": (0.0, -15.0, 1.0),
    "all written": (15.0, 0.0, 1.0),
    "nothing written": (-15.0, 0.0, 1.0),
    "the smallest normaliser": (60.0, -60.0, 1.0),
    "gates at their caps": (0.0, 0.0, 50.0),
}


@pytest.mark.parametrize("gates", GATES.values(), ids=GATES)
@pytest.mark.parametrize("L", [9, 203])
def test_extreme_gates_are_reproduced(gates: tuple[float, float, float], L: int) -> None:
    mixer = with_gates(changeable("xLSTMLayer"), *gates)
    call = call_directly(mixer, tokens(mixer, 2, L))
    assert decompose(call, 1e-5).error <= 1e-5
    if L == 9:
        agrees(mixer, call.x, tolerance=1e-11)
    x = call.x.clone().requires_grad_()
    adapter = find_adapter(mixer)
    assert adapter is not None
    assert torch.autograd.grad(adapter(mixer, x, {}).apply(x).square().sum(), x)[0].isfinite().all()


def test_the_eps_of_the_normaliser_is_relative_to_the_states_size() -> None:
    """At the cap of the input gate the layer's eps is of the size of its normaliser."""
    mixer = with_gates(changeable("xLSTMLayer"), 60.0, 60.0)
    x = tokens(mixer, 1, 5, torch.float64)
    found = matrices(chain_of(mixer, x), x)
    mixer.config = copy.copy(mixer.config)
    mixer.config.eps = 0.0
    assert relative_error(matrices(chain_of(mixer, x), x), found) > 1e-7


def test_fused_weights_are_split() -> None:
    """transformers cannot initialise a model with fused weights; the layer alone runs."""
    for qk, v, biased in ((1.0, 1.0, False), (0.5, 2.0, False), (0.5, 2.0, True)):
        sizes = {"hidden_size": 32, "num_heads": 2, "qk_dim_factor": qk, "v_dim_factor": v, "chunk_size": 4}
        config = xLSTMConfig(**sizes, use_bias=biased, weight_mode="fused")
        mixer = perturbed(xLSTMLayer(config))
        assert decompose(call_directly(mixer, tokens(mixer, 2, 7)), 1e-5).error <= 1e-6
        agrees(mixer, tokens(mixer, 2, 7))


def test_the_bias_of_the_norm_is_carried_past_the_gate(ids: Tensor) -> None:
    call = record("xLSTMLayer", FAMILIES["xlstm"].build(use_bias=True), ids)[0]
    chain = decompose(call, 1e-5).chain
    assert "bias" in chain.factors["norm"].terms
    unbiased = Chain({**chain.factors, "norm": chain.factors["norm"].without("bias")})
    assert relative_error(unbiased.apply(call.x, bias=True), call.y) > 1e-2


def test_centring_before_the_recurrence_is_centring_after_it() -> None:
    mixer = changeable("xLSTMLayer")
    x = tokens(mixer, 2, 7, torch.float64)
    chain = chain_of(mixer, x)
    scan, centre, into = (chain.factors[name] for name in ("scan", "centre", "in"))
    v = into.apply(x)
    assert relative_error(scan.apply(centre.apply(v)), centre.apply(scan.apply(v))) <= 1e-12


def test_the_core_of_mlstm_is_channelwise_and_shared_by_heads() -> None:
    mixer = changeable("xLSTMLayer")
    x = tokens(mixer, 2, 7)
    chain = chain_of(mixer, x)
    assert not chain.split()[1].mixes_channels
    alpha = matrices(chain, x).unflatten(1, (2, -1))
    assert torch.equal(alpha, alpha[:, :, :1].expand_as(alpha))


# --- Of both -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("L", [1, 2, 3, 4, 5, 8, 13, 64, 100])
def test_the_running_maximum_is_the_recurrence(L: int) -> None:
    step, values = -5 * torch.rand(2, L, 3, dtype=torch.float64), 9 * torch.randn(2, L, 3, dtype=torch.float64)
    m = values[:, 0]
    expected = [m]
    for t in range(1, L):
        m = torch.maximum(m + step[:, t], values[:, t])
        expected.append(m)
    assert (running_max(step, values) - torch.stack(expected, dim=1)).abs().max() <= 1e-12


def test_the_running_maximum_forgets_what_is_out_of_reach() -> None:
    """The logarithm of a long sequence's decay is large; what is near is not rounded to its precision."""
    values = torch.randn(1, 20_000, 1)
    step = torch.full_like(values, -15.0)
    assert torch.equal(running_max(step, values), values)


def in_chunks(operator: Any, chunk: int) -> Any:
    """Return an operator with every scan in it walked in chunks of this size."""
    if isinstance(operator, Chain):
        return Chain({name: in_chunks(factor, chunk) for name, factor in operator.factors.items()})
    return replace(operator, chunk=chunk) if isinstance(operator, Scan) else operator


CHUNKED: list[tuple[str, Callable[[Any], Any]]] = [
    ("RecurrentGemmaRecurrentBlock", lambda mixer: mixer),
    ("RwkvSelfAttention", lambda mixer: with_keys(mixer, 1.0, 4.0, 0.0)),
    ("xLSTMLayer", lambda mixer: with_gates(mixer, 0.0, -10.0)),
]


@pytest.mark.parametrize(("layer", "strong"), CHUNKED, ids=[layer for layer, _ in CHUNKED])
def test_long_sequences_with_strong_decays_are_reproduced_in_any_chunks(
    layer: str, strong: Callable[[Any], Any]
) -> None:
    mixer = strong(changeable(layer))
    call = call_directly(mixer, tokens(mixer, 2, 250))
    chain = decompose(call, 1e-5).chain
    for chunk in (7, 64, 250):
        chunked = in_chunks(chain, chunk)
        assert relative_error(chunked.apply(call.x, bias=True), call.y) <= 1e-5


def test_a_layer_outside_a_model_is_decomposed_too() -> None:
    config = RwkvConfig(hidden_size=8, attention_hidden_size=6, num_hidden_layers=2)
    mixer = perturbed(RwkvSelfAttention(config))
    for parameter in mixer.parameters():  # torch.empty
        nn.init.normal_(parameter, std=0.5)
    agrees(mixer, tokens(mixer, 2, 7))
