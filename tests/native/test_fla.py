"""The layers of flash-linear-attention: fidelity, the laws of an adapter, and the papers' recurrences."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("fla")

from fla.layers import (
    Attention,
    DeltaNet,
    GatedDeltaNet,
    GatedLinearAttention,
    HGRN2Attention,
    KimiDeltaAttention,
    MultiScaleRetention,
    RWKV6Attention,
    RWKV7Attention,
)
from fla.models.rwkv6.modeling_rwkv6 import RWKV6FeedForward
from fla.models.rwkv7.modeling_rwkv7 import RWKV7FeedForward
from fla.ops.rwkv6.recurrent_naive import naive_recurrent_rwkv6

from captum_ssm import InvalidInputError, UnsupportedModelError
from captum_ssm.layers.call import LayerCall
from captum_ssm.layers.fidelity import decompose
from captum_ssm.layers.mixers import find_adapter
from captum_ssm.matrices.core_matrix import channel_matrices
from captum_ssm.operators import Chain, Diagonal, HeadOperator, SoftmaxAttention
from captum_ssm.testing import check_adapter
from tests.native import fla_cpu
from tests.native import oracles_fla as oracles

E, L = 16, 9

LAYERS: dict[str, tuple[type[nn.Module], dict[str, Any], str]] = {
    "retention": (MultiScaleRetention, {"num_heads": 2}, "out gate norm scan in"),
    "retention: groups, feature map, convolution": (
        MultiScaleRetention,
        {"num_heads": 4, "num_kv_heads": 2, "expand_k": 1.0, "expand_v": 1.5, "feature_map": "silu",
         "use_short_conv": True, "conv_bias": True, "gate_fn": "sigmoid", "norm_eps": 0.1},
        "out gate norm scan act conv in",
    ),
    "retention: no gate": (
        MultiScaleRetention,
        {"num_heads": 2, "use_output_gate": False, "elementwise_affine": False, "mode": "parallel"},
        "out norm scan in",
    ),
    "GLA": (GatedLinearAttention, {"num_heads": 2, "gate_low_rank_dim": 3}, "out gate norm scan in"),
    "GLA: groups, feature map, convolution, bound": (
        GatedLinearAttention,
        {"num_heads": 4, "num_kv_heads": 2, "expand_k": 1.0, "expand_v": 1.5, "feature_map": "silu",
         "use_short_conv": True, "conv_bias": True, "fuse_norm": False, "clamp_min": -0.1,
         "gate_logit_normalizer": 4, "mode": "fused_chunk"},
        "out gate norm scan act conv in",
    ),
    "GLA: no gate": (GatedLinearAttention, {"num_heads": 2, "use_output_gate": False}, "out norm scan in"),
    "HGRN2": (HGRN2Attention, {"expand_ratio": 8}, "out norm scan in"),
    "HGRN2: convolution, its own eps": (
        HGRN2Attention,
        {"num_heads": 4, "expand_ratio": None, "use_short_conv": True, "conv_bias": True, "norm_eps": 0.1},
        "out norm scan conv in",
    ),
    "HGRN2: first layer": (HGRN2Attention, {"expand_ratio": 4, "layer_idx": 0}, "out norm scan in"),
    "DeltaNet": (DeltaNet, {"num_heads": 2}, "out norm scan act conv in"),
    "DeltaNet: elu, sum, gate, negative": (
        DeltaNet,
        {"num_heads": 2, "expand_v": 2.0, "use_gate": True, "use_short_conv": False, "qk_activation": "elu",
         "qk_norm": "sum", "allow_neg_eigval": True},
        "out gate norm scan act in",
    ),
    "DeltaNet: relu, no beta": (
        DeltaNet, {"num_heads": 4, "use_beta": False, "conv_bias": True, "qk_activation": "relu"},
        "out norm scan act conv in",
    ),
    "DeltaNet: silu, identity": (
        DeltaNet, {"num_heads": 2, "use_short_conv": False, "qk_activation": "identity"}, "out norm scan act in",
    ),
    "GDN": (GatedDeltaNet, {"head_dim": 4, "num_heads": 2}, "out gate norm scan act conv in"),
    "GDN: groups, no gate, negative": (
        GatedDeltaNet,
        {"head_dim": 4, "num_heads": 2, "num_v_heads": 4, "expand_v": 1.5, "use_gate": False, "conv_bias": True,
         "allow_neg_eigval": True},
        "out norm scan act conv in",
    ),
    "GDN: sigmoid, no convolution": (
        GatedDeltaNet,
        {"head_dim": 4, "num_heads": 2, "use_short_conv": False, "output_gate_activation": "sigmoid"},
        "out gate norm scan act in",
    ),
    "KDA": (KimiDeltaAttention, {"head_dim": 4, "num_heads": 2}, "out gate norm scan act conv in"),
    "KDA: groups, bound, no convolution": (
        KimiDeltaAttention,
        {"head_dim": 4, "num_heads": 2, "num_v_heads": 4, "lower_bound": -4.0, "safe_gate": True, "expand_v": 2,
         "use_short_conv": False, "allow_neg_eigval": True},
        "out gate norm scan act in",
    ),
    "RWKV-6": (RWKV6Attention, {"num_heads": 2, "proj_low_rank_dim": 3}, "out gate norm scan centre value shift"),
    "RWKV-6: sigmoid, no affine norm": (
        RWKV6Attention,
        {"num_heads": 4, "expand_k": 1.0, "expand_v": 1.5, "gate_fn": "sigmoid", "elementwise_affine": False,
         "gate_low_rank_dim": 5, "norm_eps": 0.1},
        "out gate norm scan centre value shift",
    ),
    "RWKV-7": (
        RWKV7Attention, {"head_dim": 8, "layer_idx": 1, "num_hidden_layers": 3}, "out gate heads mix value shift",
    ),
    "RWKV-7: first layer, fused norm": (
        RWKV7Attention,
        {"head_dim": 4, "layer_idx": 0, "num_hidden_layers": 3, "fuse_norm": True, "decay_low_rank_dim": 3,
         "norm_eps": 0.01},
        "out gate heads value shift",
    ),
    "softmax": (Attention, {"num_heads": 4}, "out attention in"),
    "softmax: groups, bias, norms, window": (
        Attention, {"num_heads": 4, "num_kv_heads": 2, "qkv_bias": True, "qk_norm": True, "window_size": 3},
        "out attention in",
    ),
    "RWKV-6 channels": (RWKV6FeedForward, {"intermediate_size": 24}, "gate value act key shift"),
    "RWKV-7 channels": (
        RWKV7FeedForward, {"intermediate_size": 24, "layer_idx": 1, "num_hidden_layers": 2}, "value act key shift",
    ),
}  # fmt: skip
"""Class, options, and the factors that the layer has: together all options that change what a layer is made of."""

MASKS = {
    "none": None,
    "left": [[0, 0, 0, 1, 1, 1, 1, 1, 1], [1] * 9],
    "right": [[1] * 9, [1, 1, 1, 1, 1, 1, 0, 0, 0]],
}

ORACLES: dict[type[nn.Module], Callable[..., Tensor]] = {
    MultiScaleRetention: oracles.retention,
    GatedLinearAttention: oracles.gla,
    HGRN2Attention: oracles.hgrn2,
    DeltaNet: oracles.delta_net,
    GatedDeltaNet: oracles.gated_delta_net,
    KimiDeltaAttention: oracles.kimi_delta,
    RWKV6Attention: oracles.rwkv6,
}


def build(name: str, **more: Any) -> nn.Module:
    """Return a layer with all parameters off their initial values, so that no symmetry hides an error."""
    cls, options, _ = LAYERS[name]
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        mixer = cls(hidden_size=E, **{"layer_idx": 1, **options, **more})
    with torch.no_grad():
        for parameter in mixer.parameters():
            parameter.add_(0.3 * torch.randn(parameter.shape))
    return mixer.eval()


def arguments(mixer: nn.Module, mask: list[list[int]] | None = None) -> dict[str, Any]:
    """Return what the model passes on to such a layer."""
    torch.manual_seed(1)
    kwargs: dict[str, Any] = {}
    if isinstance(mixer, HGRN2Attention):
        kwargs["lower_bound"] = torch.rand(E)
    if isinstance(mixer, RWKV7Attention):
        kwargs["v_first"] = torch.randn(2, L, E)
    if mask is not None:
        kwargs["attention_mask"] = torch.tensor(mask)
    return kwargs


def inputs() -> Tensor:
    return torch.randn(2, L, E, generator=torch.Generator().manual_seed(2))


def decomposed(mixer: nn.Module, x: Tensor, kwargs: dict[str, Any]) -> Chain:
    adapter = find_adapter(mixer)
    assert adapter is not None
    return adapter(mixer, x, kwargs)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_its_chain(name: str, mask: str) -> None:
    mixer = build(name)
    report = check_adapter(mixer, inputs(), arguments(mixer, MASKS[mask]))
    assert report.fidelity <= 1e-5
    factors = [factor for factor in report.factors if factor not in ("mask", "padding")]
    assert factors == LAYERS[name][2].split()
    assert ("mask" in report.factors) == (mask != "none" and not name.startswith("softmax"))


@pytest.mark.parametrize("name", [name for name, (cls, _, _) in LAYERS.items() if cls in ORACLES])
def test_the_attention_is_the_papers_sum(name: str) -> None:
    mixer, x = build(name).double(), inputs().double()
    kwargs = arguments(mixer)
    with torch.no_grad():
        scan = decomposed(mixer, x, kwargs).factors["scan"]
        assert isinstance(scan, HeadOperator)
        expected = ORACLES[type(mixer)](mixer, x, kwargs)
        found = channel_matrices(scan, x.new_ones(*x.shape[:2], scan.heads * scan.head_size))[:, :: scan.head_size]
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("name", ["RWKV-7", "RWKV-7: first layer, fused norm"])
def test_rwkv7_is_the_papers_state_written_out(name: str) -> None:
    mixer, x = build(name).double(), inputs().double()
    kwargs = arguments(mixer)
    with torch.no_grad():
        found = decomposed(mixer, x, kwargs).apply(x, bias=True)
        expected = oracles.rwkv7(mixer, x, kwargs)
    assert (found - expected).abs().max() <= 1e-12 * expected.abs().max()


@pytest.mark.parametrize("name", LAYERS)
def test_a_training_step_runs_the_same_layer(name: str) -> None:
    """Layers choose another kernel where gradients are wanted, and for long sequences."""
    mixer, x = build(name), inputs()
    kwargs = arguments(mixer)
    y = mixer(x, **kwargs)[0]
    assert y.requires_grad
    with torch.no_grad():
        assert (decomposed(mixer, x, kwargs).apply(x, bias=True) - y).abs().max() <= 1e-5 * y.abs().max()


@pytest.mark.parametrize("name", ["retention", "GLA", "HGRN2", "DeltaNet", "GDN", "KDA"])
def test_padding_is_taken_out_of_the_sequence(name: str) -> None:
    """So a padded example is the example alone, and gives 0 at padding, biases of convolutions or not."""
    mixer, x = build(name, use_short_conv=True, conv_bias=True), inputs()
    with torch.no_grad():
        chain = decomposed(mixer, x, arguments(mixer, MASKS["left"]))
        alone = decomposed(mixer, x[:1, 3:], arguments(mixer))
        y, expected = chain.apply(x, bias=True)[0], alone.apply(x[:1, 3:], bias=True)[0]
    assert (y[:3] == 0).all()
    assert (y[3:] - expected).abs().max() <= 1e-5 * expected.abs().max()


@pytest.mark.parametrize("name", ["retention", "GLA", "HGRN2", "DeltaNet", "GDN", "KDA", "softmax"])
@pytest.mark.parametrize("gap", [[1, 1, 0, 1, 1, 1, 1, 1, 1], [0, 1, 1, 0, 0, 1, 1, 0, 0], [1, 0, 1, 0, 1, 0, 1, 0, 1]])
def test_what_is_masked_between_real_tokens_is_refused(name: str, gap: list[int]) -> None:
    mixer = build(name)
    with pytest.raises(InvalidInputError, match=f"between real ones. A {type(mixer).__name__} layer"):
        decomposed(mixer, inputs(), arguments(mixer, [[1] * 9, gap]))


@pytest.mark.parametrize("name", ["RWKV-6", "RWKV-7", "RWKV-7: first layer, fused norm", "RWKV-6 channels"])
def test_rwkv_sets_what_is_masked_to_zero_wherever_it_is(name: str) -> None:
    mixer = build(name)
    check_adapter(mixer, inputs(), arguments(mixer, [[1] * 9, [1, 0, 1, 0, 0, 1, 1, 0, 1]]))


@pytest.mark.parametrize("name", LAYERS)
def test_packed_sequences_are_refused(name: str) -> None:
    mixer = build(name)
    with pytest.raises(UnsupportedModelError, match=f"A {type(mixer).__name__} layer was called with 'cu_seqlens'"):
        decomposed(mixer, inputs()[:1], {**arguments(mixer), "cu_seqlens": torch.tensor([0, 4, L])})


@pytest.mark.parametrize("name, activation", [("retention", "tanh"), ("GLA", "logsigmoid")])
def test_an_activation_without_a_gate_form_is_refused_by_name(name: str, activation: str) -> None:
    mixer = build(name, feature_map=activation)
    with pytest.raises(UnsupportedModelError, match=f"'{activation}' has no gate form"):
        decomposed(mixer, inputs(), {})


@pytest.mark.parametrize("name", [name for name in LAYERS if ":" not in name])
def test_another_librarys_class_of_the_same_name_is_another_layer(name: str) -> None:
    cls = LAYERS[name][0].__name__
    other = type(cls, (nn.Module,), {})()
    with pytest.raises(UnsupportedModelError, match=rf"No adapter is registered for layer 'mixer' \({cls}\)"):
        decompose(LayerCall("mixer", other, inputs(), inputs(), {}))


@pytest.mark.parametrize("name", ["softmax", "softmax: groups, bias, norms, window"])
def test_the_weights_are_the_softmax_of_turned_queries_and_keys(name: str) -> None:
    mixer, x = build(name).double(), inputs().double()
    with torch.no_grad():
        attention = decomposed(mixer, x, arguments(mixer, MASKS["left"])).factors["attention"]
        assert isinstance(attention, SoftmaxAttention)
        found = attention.weights
        expected = oracles.softmax(mixer, x, torch.tensor(MASKS["left"]))
    assert (found - expected).abs().max() <= 1e-12


def test_the_first_values_are_a_bias_of_rwkv7() -> None:
    """They change the output, not the attention; without the bias they are left out."""
    mixer, x = build("RWKV-7"), inputs()
    kwargs = arguments(mixer)
    with torch.no_grad():
        chain = decomposed(mixer, x, kwargs)
        none = decomposed(mixer, x, {"v_first": torch.zeros_like(kwargs["v_first"])})
        assert (chain.without("mix").apply(x) != chain.apply(x)).any()
        values = Chain({name: chain.factors[name] for name in ("mix", "value", "shift")})
        same = Chain({name: none.factors[name] for name in ("mix", "value", "shift")})
        assert torch.equal(values.apply(x), same.apply(x, bias=True))
        mix = chain.factors["mix"]
        assert isinstance(mix, Diagonal)
        m = 1 - mix.s
        assert ((values.apply(x, bias=True) - values.apply(x)) - m * kwargs["v_first"]).abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["GDN", "KDA", "DeltaNet", "RWKV-7"])
def test_the_gradient_reaches_the_gates(name: str) -> None:
    """The decomposition has the layer's own gradient: that of its gates included."""
    mixer, x = build(name), inputs().requires_grad_()
    kwargs = arguments(mixer)
    (own,) = torch.autograd.grad(mixer(x, **kwargs)[0].square().sum(), x)
    (found,) = torch.autograd.grad(decomposed(mixer, x, kwargs).apply(x, bias=True).square().sum(), x)
    assert (found - own).abs().max() <= 1e-4 * own.abs().max()


def test_the_stand_in_for_a_kernel_agrees_with_a_second_reference() -> None:
    """RWKV-6's function with a scale of 1 is the package's own; a sum over tokens checks it once more."""
    torch.manual_seed(0)
    r, k, v, w = (torch.randn(1, 5, 2, 3) for _ in "rkvw")
    w, u = -w.exp(), torch.randn(2, 3)
    y, _ = fla_cpu.rwkv6(r, k, v, w, u, 1.0)
    expected, _ = naive_recurrent_rwkv6(*fla_cpu.swap(r, k, v, w), u, 1.0)
    assert torch.equal(y, expected.transpose(1, 2))
    last = (r[0, 4] * u * k[0, 4]).sum(-1, keepdim=True) * v[0, 4]
    for j in range(4):
        last = last + (r[0, 4] * w[0, j + 1 : 4].sum(0).exp() * k[0, j]).sum(-1, keepdim=True) * v[0, j]
    assert (y[0, 4] - last).abs().max() <= 1e-5
