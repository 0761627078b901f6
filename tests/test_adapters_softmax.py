"""The softmax attention of the hybrid models is read exactly, whatever implementation the model runs with."""

import copy
import inspect
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import DynamicCache

from captum_ssm import ImplicitAttentionRelevance, UnsupportedModelError, supported
from captum_ssm.layers.call import LayerCall
from captum_ssm.layers.fidelity import relative_error
from captum_ssm.layers.mixers import find_adapter
from captum_ssm.layers.softmax_attention import softmax_attention
from captum_ssm.matrices.core_matrix import channel_matrices
from captum_ssm.network.recording import record_mixers
from captum_ssm.operators import Chain, SoftmaxAttention
from captum_ssm.testing import check_adapter
from tests import oracles_softmax as oracles
from tests.families import EARLIER, FAMILIES, VOCABULARY, layers_of

LAYERS = {family: layer for family, _, layer in layers_of(oracles)}
CLASS = {family: name for family, name, _ in layers_of(oracles)}
"""The class of the softmax layers of each family."""
LATENT = [family for family, layer in LAYERS.items() if "value" in layer.factors]
SPARSE = [family for family, layer in LAYERS.items() if layer.sparse]
IMPLEMENTATIONS = ("sdpa", "eager")
L = 9
LEFT = torch.tensor([[0] * 3 + [1] * 6, [1] * 9])
HOLES = torch.tensor([[1, 0, 1, 1, 0, 0, 1, 1, 0], [0, 1, 1, 0, 1, 1, 1, 0, 1]])
MASKS: dict[str, Tensor | None] = {
    "no mask": None, "all real": torch.ones(2, 9), "left padding": LEFT, "right padding": LEFT.flip(1), "holes": HOLES,
}  # fmt: skip
every_family = pytest.mark.parametrize("name", LAYERS)
every_mask = pytest.mark.parametrize("mask", MASKS.values(), ids=MASKS)
every_implementation = pytest.mark.parametrize("implementation", IMPLEMENTATIONS)


@cache
def tiny(name: str, implementation: str = "sdpa") -> Any:
    """Return the family's model, built once: no test here may change it."""
    model: Any = FAMILIES[name].build()
    return prepared(model, implementation)


def prepared(model: Any, implementation: str = "sdpa") -> Any:
    model.config.get_text_config()._experts_implementation = "eager"  # the fast one refuses these sizes in bfloat16
    model.set_attn_implementation(implementation)
    return model


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, VOCABULARY, (2, L), generator=torch.Generator().manual_seed(1))


def record(model: nn.Module, ids: Tensor, mask: Tensor | None = None, **kwargs: Any) -> list[LayerCall]:
    """Run the model and return the calls of its softmax layers."""
    with torch.no_grad(), record_mixers(model) as calls:
        model(input_ids=ids, attention_mask=mask, **{"use_cache": False, **kwargs})
    found = [call.detach() for call in calls if type(call.mixer).__name__ in CLASS.values()]
    assert found
    return found


def chain_of(call: LayerCall, x: Tensor | None = None) -> Chain:
    x = call.x.to(torch.promote_types(call.x.dtype, torch.float32)) if x is None else x
    adapter = find_adapter(call.mixer)
    assert adapter is not None
    return adapter(call.mixer, x, call.kwargs)


def weights_of(chain: Chain) -> Tensor:
    attention = chain.factors["attention"]
    assert isinstance(attention, SoftmaxAttention)
    return attention.weights


def real_of(call: LayerCall, mask: Tensor | None) -> Tensor:
    return torch.ones(call.x.shape[:2], dtype=torch.bool) if mask is None else mask.bool()


def error(call: LayerCall, mask: Tensor | None = None) -> float:
    """The relative error of the chain at the real tokens."""
    chain, real = chain_of(call), real_of(call, mask)
    x = call.x.to(torch.promote_types(call.x.dtype, torch.float32))
    return relative_error(chain.apply(x, bias=True)[real], call.y[real])


def check_masked(chain: Chain, real: Tensor, blind: bool = False) -> None:
    """Each real token spreads one unit over real tokens not after it; padding neither attends nor is attended to.

    If ``blind``, a token may also see nothing.
    """
    weights = weights_of(chain)
    assert chain.factors["attention"].causal and weights.triu(1).eq(0).all()
    for b in range(len(real)):
        assert weights[b][:, ~real[b]].eq(0).all() and weights[b][:, :, ~real[b]].eq(0).all()
        total = weights[b][:, real[b]].sum(-1)
        assert ((total - 1).abs().le(1e-6) | (total.eq(0) & blind)).all()


# --- Every family -------------------------------------------------------------------------------------------------


def test_these_classes_are_registered_and_no_other() -> None:
    softmax = {support.layer: support.family for support in supported() if support.kernel == "softmax attention"}
    softmax = {layer: family for layer, family in softmax.items() if layer not in EARLIER}
    native = {"MHA": "mamba_ssm", "Attention": "fla", "LocalAttentionBlock": "recurrentgemma"}  # tests/native, packages
    assert softmax == {layer: family for family, layer in CLASS.items()} | native
    interface = type("LlamaAttention", (nn.Module,), vars(tiny("jamba").get_submodule("model.layers.1.self_attn")))
    assert find_adapter(interface()) is None


@every_family
@every_implementation
@every_mask
def test_the_layer_is_reproduced(name: str, implementation: str, mask: Tensor | None, ids: Tensor) -> None:
    holes_in_pools = name == "glm5_next" and mask is HOLES  # the indexer drops pools of tokens with a hole
    for call in record(tiny(name, implementation), ids, mask):
        assert error(call, mask) <= 1e-6 or (holes_in_pools and implementation == "eager")
        chain = chain_of(call)
        check_masked(chain, real_of(call, mask), blind=holes_in_pools)
        assert tuple(chain.factors) == LAYERS[name].factors


@every_family
def test_the_weights_do_not_depend_on_the_implementation(name: str, ids: Tensor) -> None:
    call = record(tiny(name), ids, LEFT)[0]
    other = record(tiny(name, "eager"), ids, LEFT)[0]
    one, two = (weights_of(chain_of(call, call.x)) for call in (call, other))
    assert relative_error(one, two) <= 1e-5


@every_family
@pytest.mark.parametrize(("B", "L"), [(1, 1), (3, 1), (1, 2), (2, 40)])
def test_any_size_is_reproduced(name: str, B: int, L: int) -> None:
    for call in record(tiny(name), torch.randint(1, VOCABULARY, (B, L))):
        assert error(call) <= 1e-6
        check_masked(chain_of(call), torch.ones(B, L, dtype=torch.bool))


@every_family
@every_implementation
def test_bfloat16_is_reproduced_in_float32(name: str, implementation: str, ids: Tensor) -> None:
    model = copy.deepcopy(tiny(name, implementation)).bfloat16()
    for call in record(model, ids, LEFT):
        assert weights_of(chain_of(call)).dtype == torch.float32
        assert 1e-4 < error(call, LEFT) <= 2e-2


@every_implementation
def test_relevance_of_bfloat16_is_that_of_float32_with_padding(implementation: str, ids: Tensor) -> None:
    """The mask of a model that is followed in float32 hides with a number that bfloat16 does not have."""
    model = copy.deepcopy(tiny("jamba", implementation)).bfloat16()
    expected = ImplicitAttentionRelevance(copy.deepcopy(model).float()).attribute(
        ids, target=5, additional_forward_args=LEFT
    )
    found = ImplicitAttentionRelevance(model).attribute(ids, target=5, additional_forward_args=LEFT)
    assert relative_error(found, expected) < 5e-2


def test_a_layer_that_is_followed_by_its_functions_adds_nothing_to_its_cache(ids: Tensor) -> None:
    """As with padding that only the model knows, whose rows the decomposition has as 0."""
    model = tiny("jamba", "eager")
    masked = ImplicitAttentionRelevance(lambda ids: model(ids, attention_mask=LEFT).logits[:, -1], model)
    told = ImplicitAttentionRelevance(model).attribute(ids, target=5, additional_forward_args=LEFT)
    assert relative_error(masked.attribute(ids, target=5), told) < 1e-4


@every_family
def test_the_laws_of_an_adapter_hold(name: str, ids: Tensor) -> None:
    call = record(tiny(name), ids)[0]
    report = check_adapter(call.mixer, call.x, call.kwargs)
    assert report.factors == tuple(chain_of(call).factors)


@every_family
def test_the_matrices_are_the_layer_also_with_padding(name: str, ids: Tensor) -> None:
    call = record(tiny(name), ids, LEFT)[0]
    with torch.no_grad():
        chain = chain_of(call)
        output, core, into = chain.split()
        v = into.apply(call.x, bias=True)
        y = output.apply(torch.einsum("bdij,bjd->bid", channel_matrices(core, v), v), bias=True)
        u = torch.randn_like(y)
        left, right = (u * chain.apply(call.x)).sum(), (chain.adjoint(u) * call.x).sum()
    assert relative_error(y[LEFT.bool()], call.y[LEFT.bool()]) <= 1e-6
    assert relative_error(left, right) <= 1e-5


# --- The equations ------------------------------------------------------------------------------------------------


def frequencies(name: str, call: LayerCall) -> list[float]:
    """Return the frequencies of the rotary positions of a layer, from its configuration; none without them."""
    if call.kwargs.get("position_embeddings") is None and name != "recurrent_gemma":
        return []
    mixer: Any = call.mixer
    rope = mixer.config.rope_parameters
    rope = rope.get(getattr(mixer, "layer_type", None), rope)
    P = mixer.qk_rope_head_dim if name in LATENT else mixer.head_dim
    part = int(P * rope.get("partial_rotary_factor", 1))
    if rope["rope_type"] == "proportional":
        return [rope["rope_theta"] ** (-2 * n / P) if n < part // 2 else 0.0 for n in range(P // 2)]
    return [rope["rope_theta"] ** (-2 * n / part) for n in range((part + 1) // 2)]


@torch.no_grad()
def check_equations(name: str, call: LayerCall, mask: Tensor | None) -> None:
    """Compare a call of a float32 model and its decomposition in float64 with the equations in float64.

    transformers computes the softmax, the norms and the rotary angles in float32 whatever the layer's type.
    """
    mixer: Any = call.mixer
    real, x = real_of(call, mask), call.x.double()
    window = getattr(mixer, "sliding_window", getattr(mixer.config, "sliding_window", None))
    place = mixer.layer_dic[call.kwargs["layer_idx"]] if hasattr(mixer, "linear_v_adapter_list") else None
    expected = oracles.layer(mixer, x, real, window, frequencies(name, call), place)
    assert relative_error(expected["y"][real], call.y[real]) <= 1e-5  # the equations are the layer

    chain = chain_of(call, x)
    attention = chain.split("attention")[1]
    _, core, _ = chain.split()
    into = chain.split("attention")[2]
    assert relative_error(into.apply(x, bias=True), expected["v"]) <= (1e-6 if name in LATENT else 1e-12)
    assert relative_error(channel_matrices(attention, expected["v"]), expected["alpha"]) <= 1e-6
    assert relative_error(channel_matrices(core, expected["v"]), expected["core"]) <= 1e-6
    assert relative_error(chain.apply(x, bias=True), expected["y"]) <= 1e-6


@every_family
@pytest.mark.parametrize("mask", [None, LEFT.flip(1)], ids=["no mask", "right padding"])
def test_the_layer_is_the_written_out_layer(name: str, mask: Tensor | None, ids: Tensor) -> None:
    for call in record(tiny(name), ids, mask):
        check_equations(name, call, mask)


@pytest.mark.parametrize(("name", "options"), [
    pytest.param(name, options, id=f"{name} {options}")
    for name, layer in LAYERS.items() for options in layer.options.values()
])  # fmt: skip
def test_every_option_is_decomposed(name: str, options: dict[str, Any], ids: Tensor) -> None:
    model = prepared(FAMILIES[name].build(**options))
    for mask in (None, LEFT):
        for call in record(model, ids, mask):
            assert error(call, mask) <= 1e-6
            selects_itself = not getattr(call.mixer, "skip_topk", False)
            if mask is not None and selects_itself:
                check_equations(name, call, mask)


# --- What enters the weights --------------------------------------------------------------------------------------


@every_family
@pytest.mark.parametrize(("implementation", "mask"), [("sdpa", None), ("sdpa", LEFT), ("eager", LEFT.flip(1))])
def test_the_gradient_is_the_layers_own(name: str, implementation: str, mask: Tensor | None, ids: Tensor) -> None:
    """The chain differentiated by value and gates is the layer differentiated by its input."""
    for call in record(tiny(name, implementation), ids, mask):
        real, x = real_of(call, mask), call.x.clone().requires_grad_()
        u = torch.randn_like(call.y) * real.unsqueeze(-1)
        y = chain_of(call, x).apply(x, bias=True)
        (found,) = torch.autograd.grad((u * y).sum(), x)
        y = type(call.mixer).forward(call.mixer, x, **call.kwargs)[0]
        (expected,) = torch.autograd.grad((u * y).masked_fill(~real.unsqueeze(-1), 0).sum(), x)
        assert relative_error(found, expected) <= 1e-5
        gates = torch.autograd.grad((u * chain_of(call, x).apply(call.x, bias=True)).sum(), x)[0]
        assert gates.abs().max() > 1e-3 * expected.abs().max()


@every_family
def test_the_gradient_is_finite_in_float64_with_padding(name: str, ids: Tensor) -> None:
    """Rows of padding alone are a softmax over nothing in float32, where the layer runs it in that type."""
    for mask in (LEFT, LEFT.flip(1)):
        for call in record(tiny(name), ids, mask):
            x = call.x.double().requires_grad_()
            (found,) = torch.autograd.grad(chain_of(call, x).apply(x).sum(), x)
            assert found.isfinite().all()


def windowed(name: str, **options: Any) -> Any:
    return prepared(FAMILIES[name].build(**options))


@pytest.mark.parametrize(
    ("name", "options"), [("recurrent_gemma", {}), ("minimax", {"sliding_window": 4}), ("lfm3", {})]
)
def test_a_window_shorter_than_the_sequence_is_kept(name: str, options: dict[str, Any], ids: Tensor) -> None:
    weights = weights_of(chain_of(record(windowed(name, **options), ids)[0]))
    assert weights.tril(-4).eq(0).all()
    assert weights.tril(-3).ne(0).any()


def test_shared_layers_have_adapters_of_their_own(ids: Tensor) -> None:
    model = prepared(FAMILIES["zamba2"].build(num_mem_blocks=1))
    one, two = record(model, ids)
    assert one.mixer.get_submodule("v_proj").weight is two.mixer.get_submodule("v_proj").weight
    assert error(one) <= 1e-6 and error(two) <= 1e-6
    assert error(LayerCall("", one.mixer, one.x, one.y, {**one.kwargs, "layer_idx": two.kwargs["layer_idx"]})) > 0.05


@pytest.mark.parametrize("name", SPARSE)
@every_implementation
def test_a_sparse_layer_sees_what_it_selects(name: str, implementation: str, ids: Tensor) -> None:
    for call in record(tiny(name, implementation), ids):
        seen = weights_of(chain_of(call)).ne(0).sum(-1)
        assert seen[..., -1].le(5).all() and seen[..., :5].eq(torch.arange(1, 6)).all()


@pytest.mark.parametrize("name", SPARSE)
def test_the_selection_of_a_bfloat16_layer_is_its_own(name: str) -> None:
    """In float32 other keys would win: the best of many differ in the last digit."""
    model = copy.deepcopy(tiny(name)).bfloat16()
    for seed in range(3):
        torch.manual_seed(seed)
        for call in record(model, torch.randint(1, VOCABULARY, (2, 60))):
            assert error(call) <= 2e-2


def test_a_token_that_may_see_nothing_has_a_row_of_0(ids: Tensor) -> None:
    """GLM-5 without the tail, before the first pool is whole. Eager attention then gives the mean over all tokens, also
    over later ones, which no decomposition into causal attention can be: the fidelity check refuses it.
    """
    options = {"index_kpool_always_select_tail": False, "index_kpool": 3, "index_topk": 3}
    (call, *_) = record(prepared(FAMILIES["glm5_next"].build(**options)), ids)
    weights = weights_of(chain_of(call))
    assert weights[:, :, :2].eq(0).all() and (weights[:, :, 2:].sum(-1) - 1).abs().max() <= 1e-6
    assert error(call) <= 1e-6
    (call, *_) = record(prepared(FAMILIES["glm5_next"].build(**options), "eager"), ids)
    assert error(call) > 1e-2 and weights_of(chain_of(call)).triu(1).eq(0).all()


# --- Masks that a call may have -----------------------------------------------------------------------------------


def with_mask(call: LayerCall, mask: Any) -> LayerCall:
    return LayerCall(call.name, call.mixer, call.x, call.y, {**call.kwargs, "attention_mask": mask})


@pytest.mark.parametrize("name", sorted(set(LAYERS) - set(SPARSE)))
def test_every_form_of_a_mask_gives_the_same(name: str, ids: Tensor) -> None:
    """(B, L) is what flash attention gets; additive masks differ in what they call minus infinity."""
    call = record(tiny(name), ids, LEFT)[0]
    mask = call.kwargs["attention_mask"]
    assert mask.dtype == torch.bool
    expected = weights_of(chain_of(call))
    additive = [torch.zeros(mask.shape).masked_fill(~mask, low) for low in (-torch.inf, -1e9, -65504.0, -1e4)]
    for form in (LEFT, LEFT.bool(), LEFT.float(), *additive, additive[0].double(), additive[2].half()):
        assert relative_error(weights_of(chain_of(with_mask(call, form))), expected) <= 1e-6
    (plain, *_) = record(tiny(name), ids)
    for full in (None, torch.ones(2, L)):
        assert relative_error(weights_of(chain_of(with_mask(plain, full))), weights_of(chain_of(plain))) <= 1e-6


def test_an_additive_mask_that_is_a_bias_is_kept(ids: Tensor) -> None:
    call = record(tiny("jamba", "eager"), ids)[0]
    mask = call.kwargs["attention_mask"] + torch.randn(L, L)
    with torch.no_grad():
        y, expected = call.mixer(call.x, attention_mask=mask)
    assert torch.equal(weights_of(chain_of(with_mask(call, mask))), expected)
    assert relative_error(chain_of(with_mask(call, mask)).apply(call.x), y) <= 1e-6


def test_a_mask_that_is_no_tensor_is_refused_with_the_remedy(ids: Tensor) -> None:
    call = record(tiny("jamba"), ids)[0]
    with pytest.raises(UnsupportedModelError, match=r"mask of type object .*attn_implementation='sdpa' or 'eager'"):
        chain_of(with_mask(call, object()))


# --- Nothing is touched -------------------------------------------------------------------------------------------


@every_family
def test_reading_the_weights_leaves_no_trace(name: str, ids: Tensor, unchanged: Any) -> None:
    model = copy.deepcopy(tiny(name))
    fired: list[str] = []
    calls = record(model, ids, LEFT)
    for module in model.modules():
        module.register_forward_pre_hook(lambda *_: fired.append("before"))
        module.register_forward_hook(lambda *_: fired.append("after"))
    with unchanged(model, ids):
        for call in calls:
            before = {key: id(value) for key, value in vars(call.mixer.config).items()}
            chain_of(call)
            assert before == {key: id(value) for key, value in vars(call.mixer.config).items()}
    assert not fired and model.config._attn_implementation == "sdpa"


@every_family
def test_the_model_is_not_touched_for_a_moment(name: str, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """While a copy runs, everything of the original is in place."""
    model = copy.deepcopy(tiny(name))
    call = record(model, ids)[0]
    mixer: Any = call.mixer
    expected = {key: value for part in mixer.modules() for key, value in part._parameters.items()}
    forward, seen = type(mixer).forward, []

    def watched(*args: Any, **kwargs: Any) -> Any:
        try:
            return forward(*args, **kwargs)
        finally:
            now = {key: value for part in mixer.modules() for key, value in part._parameters.items()}
            seen.append(all(now[key] is expected[key] for key in expected) and args[0] is not mixer)
            seen.append(mixer.config._attn_implementation == "sdpa")

    monkeypatch.setattr(type(mixer), "forward", watched)
    softmax_attention(mixer, call.x, call.kwargs, 1)
    assert seen and all(seen)


@every_family
def test_patches_of_the_layer_and_its_parts_do_not_run(name: str, ids: Tensor) -> None:
    """As accelerate patches modules: the object's forward, bound to the original."""
    model = copy.deepcopy(tiny(name))
    (call, *_) = record(model, ids)

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a patched forward ran")

    for part in call.mixer.modules():
        part.forward = fail
    assert error(call) <= 1e-6


@pytest.mark.parametrize("name", [name for name in LAYERS if name not in SPARSE])
def test_nothing_behind_the_weights_runs_to_read_them(name: str, ids: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    """The product with the values and the projection behind it are the decomposition's."""
    (call, *_) = record(tiny(name), ids)
    out = next(getattr(call.mixer, part) for part in ("o_proj", "out_proj") if hasattr(call.mixer, part))
    weights, linear = [], F.linear

    def watched(x: Tensor, weight: Tensor, *bias: Any) -> Tensor:
        weights.append(weight.data_ptr())
        return linear(x, weight, *bias)

    monkeypatch.setattr(F, "linear", watched)
    softmax_attention(call.mixer, call.x, call.kwargs, 1)
    assert weights and out.weight.data_ptr() not in weights


@every_family
def test_a_cache_is_neither_read_nor_written(name: str, ids: Tensor) -> None:
    """Called with an empty cache, the layer has filled it when it is decomposed."""
    model = tiny(name)
    with torch.no_grad():
        full = getattr(model(input_ids=ids, use_cache=True), "past_key_values", None)
    caches = [(DynamicCache(config=model.config), 0)] + ([] if full is None else [(full, L)])  # RecurrentGemma hides it
    for call in record(model, ids):
        index: Any = call.kwargs.get("layer_idx", call.mixer.layer_idx)
        for past, length in caches:
            kwargs = {**call.kwargs, "past_key_values": past}
            assert error(LayerCall(call.name, call.mixer, call.x, call.y, kwargs)) <= 1e-6
            assert past.get_seq_length(index) == length


def test_the_adapter_names_no_library() -> None:
    module = inspect.getmodule(softmax_attention)
    assert module is not None and "import transformers" not in inspect.getsource(module)
