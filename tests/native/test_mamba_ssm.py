"""mamba_ssm's layers and models: fidelity, the laws of an adapter, the recurrences written out, and every method."""

import copy
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any
from unittest.mock import patch

import pytest
import torch
import transformers as hf
from torch import Tensor, nn

from captum_ssm import (
    FidelityError,
    ImplicitAttentionAttribution,
    ImplicitAttentionRelevance,
    ImplicitAttentionRollout,
    InvalidInputError,
    LayerImplicitAttention,
    LayerImplicitAttentionAttribution,
    LLMImplicitAttention,
    ModelStateError,
    RawImplicitAttention,
    UnsupportedModelError,
    reference_kernels,
    register_rule,
    unregister_rule,
)
from captum_ssm.layers.fidelity import relative_error
from captum_ssm.layers.mixers import find_adapter
from captum_ssm.matrices.core_matrix import channel_matrices
from captum_ssm.network.examination import examine
from captum_ssm.network.forward import run_model
from captum_ssm.network.graph import EMBEDDINGS
from captum_ssm.network.interface import input_embeddings, is_language_model
from captum_ssm.network.recording import record_mixers
from captum_ssm.relevance.functions import EXTERNAL_CODE
from captum_ssm.testing import check_adapter
from tests.families import VOCABULARY, perturbed
from tests.native import mamba_ssm_cpu
from tests.native import oracles_mamba_ssm as oracles

mamba_ssm_cpu.enable()

from mamba_ssm.models.config_mamba import MambaConfig  # noqa: E402
from mamba_ssm.models.mixer_seq_simple import MambaLMHeadModel  # noqa: E402
from mamba_ssm.modules import block, mha  # noqa: E402
from mamba_ssm.modules.mamba2 import Mamba2  # noqa: E402
from mamba_ssm.modules.mamba2_simple import Mamba2Simple  # noqa: E402
from mamba_ssm.modules.mamba3 import Mamba3  # noqa: E402
from mamba_ssm.modules.mamba_simple import Mamba  # noqa: E402
from mamba_ssm.ops.triton import layer_norm  # noqa: E402
from mamba_ssm.utils.generation import InferenceParams  # noqa: E402

E, L, TARGET = 16, 9, 5
TOLERANCE = {"cpu": 1e-5, "cuda": 1e-2}
"""The kernels multiply in TF32."""

HEADS: dict[str, Any] = {"d_state": 3, "headdim": 4, "ngroups": 2}
MHA: dict[str, Any] = {"embed_dim": E, "num_heads": 4, "causal": True}
ROTARY: dict[str, Any] = {"rotary_emb_dim": 4, "rotary_emb_base": 100.0}

LAYERS: dict[str, tuple[Callable[..., nn.Module], dict[str, Any], Callable[..., Tensor], str]] = {
    "Mamba": (Mamba, {"d_state": 3}, oracles.mamba, "out gate scan act conv in"),
    "Mamba: biases": (
        Mamba, {"bias": True, "conv_bias": False, "dt_rank": 2, "d_conv": 2}, oracles.mamba,
        "out gate scan act conv in",
    ),
    "Mamba2": (Mamba2, HEADS, oracles.mamba2, "out norm gate scan act conv in"),
    "Mamba2: not fused": (
        Mamba2, {**HEADS, "use_mem_eff_path": False}, oracles.mamba2, "out norm gate scan act conv in",
    ),
    "Mamba2: one group, biases, a skip for each channel": (
        Mamba2, {**HEADS, "ngroups": 1, "bias": True, "conv_bias": False, "D_has_hdim": True}, oracles.mamba2,
        "out norm gate scan act conv in",
    ),
    "Mamba2: limits": (Mamba2, {**HEADS, "dt_limit": (0.5, 0.9)}, oracles.mamba2, "out norm gate scan act conv in"),
    "Mamba2: no norm": (Mamba2, {**HEADS, "rmsnorm": False}, oracles.mamba2, "out gate scan act conv in"),
    "Mamba2: norm before the gate": (
        Mamba2, {**HEADS, "norm_before_gate": True}, oracles.mamba2, "out gate norm scan act conv in",
    ),
    "Mamba2: gated channels": (
        Mamba2, {**HEADS, "d_ssm": 24, "D_has_hdim": True, "bias": True, "norm_before_gate": True}, oracles.mamba2,
        "out gate norm scan act conv in",
    ),
    "Mamba2: gated channels, not fused": (
        Mamba2, {**HEADS, "d_ssm": 16, "use_mem_eff_path": False}, oracles.mamba2, "out norm gate scan act conv in",
    ),
    "Mamba2: gated channels, no norm": (
        Mamba2, {**HEADS, "d_ssm": 24, "rmsnorm": False, "conv_bias": False, "dt_limit": (0.5, 0.9)}, oracles.mamba2,
        "out gate scan act conv in",
    ),
    "Mamba2: gated channels that are no whole heads, one group": (
        Mamba2, {"d_state": 3, "headdim": 12, "d_ssm": 24}, oracles.mamba2, "out norm gate scan act conv in",
    ),
    "Mamba2: gated channels, one head": (
        Mamba2, {"d_state": 3, "headdim": 8, "d_ssm": 8}, oracles.mamba2, "out norm gate scan act conv in",
    ),
    "Mamba2Simple": (Mamba2Simple, HEADS, oracles.mamba2, "out norm gate scan act conv in"),
    "Mamba2Simple: not fused": (
        Mamba2Simple, {**HEADS, "use_mem_eff_path": False, "dt_limit": (0.5, 0.9), "bias": True}, oracles.mamba2,
        "out norm gate scan act conv in",
    ),
    "Mamba3": (Mamba3, {"d_state": 6, "headdim": 4}, oracles.mamba3, "out gate scan in"),
    "Mamba3: groups, all turned, norm, slowest decay": (
        Mamba3,
        {"d_state": 6, "headdim": 4, "ngroups": 2, "rope_fraction": 1.0, "is_outproj_norm": True, "A_floor": 0.7},
        oracles.mamba3, "out gate norm scan in",
    ),
    "MHA": (mha.MHA, MHA, oracles.attention, "out attention in"),
    "MHA: groups, convolution, no bias": (
        mha.MHA,
        {**MHA, "num_heads_kv": 2, "d_conv": 3, "softmax_scale": 0.3, "qkv_proj_bias": False, "out_proj_bias": False},
        oracles.attention, "out attention conv in",
    ),
    "MHA: not causal": (mha.MHA, {**MHA, "causal": False}, oracles.attention, "out attention in"),
    "MHA: gated channels": (
        mha.MHA, {**MHA, "mlp_dim": 4, "num_heads_kv": 2}, oracles.attention, "out gate attention in",
    ),
    "MHA: gated channels, convolution": (
        mha.MHA, {**MHA, "mlp_dim": 4, "d_conv": 4, "head_dim": 6, "qkv_proj_bias": False}, oracles.attention,
        "out gate attention conv in",
    ),
    "MHA: turned": (mha.MHA, {**MHA, **ROTARY, "head_dim": 6}, oracles.attention, "out attention in"),
    "MHA: turned, neighbours": (
        mha.MHA, {**MHA, **ROTARY, "rotary_emb_interleaved": True}, oracles.attention, "out attention in",
    ),
}  # fmt: skip


class Rotary(nn.Module):
    """Stands in for flash_attn's rotary positions, which cannot be installed without a GPU."""

    scale_base = None

    def __init__(self, dim: int, base: float, interleaved: bool, device: Any = None) -> None:
        super().__init__()
        self.dim, self.base, self.interleaved = dim, base, interleaved

    def forward(self, q: Tensor, kv: Tensor, seqlen_offset: int, max_seqlen: Any) -> tuple[Tensor, Tensor]:
        def turn(t: Tensor) -> Tensor:
            return torch.stack([oracles.turned(row, self.dim, self.base, self.interleaved) for row in t])

        return turn(q), torch.stack([turn(kv[:, :, 0]), kv[:, :, 1]], 2)


def layer(name: str, device: str = "cpu") -> Any:
    cls, options, _, _ = LAYERS[name]
    torch.manual_seed(0)
    with patch.object(mha, "RotaryEmbedding", Rotary):
        made = cls(**({} if cls is mha.MHA else {"d_model": E}), **options)
    return perturbed(made).to(device)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(2, L, E, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_is_decomposed_exactly(name: str, x: Tensor, device: str) -> None:
    tolerance, causal = TOLERANCE[device], LAYERS[name][1].get("causal", True)
    report = check_adapter(layer(name, device), x.to(device), tolerance=tolerance, causal=causal)
    assert report.fidelity <= tolerance
    assert " ".join(report.factors) == LAYERS[name][3]


@pytest.mark.parametrize("name", LAYERS)
def test_the_decomposition_is_the_recurrence_written_out(name: str, x: Tensor) -> None:
    module, x = layer(name), x.double()
    adapter = find_adapter(module)
    assert adapter is not None
    written_out = torch.stack([LAYERS[name][2](module, row) for row in x])
    assert relative_error(adapter(module, x, {}).apply(x, bias=True), written_out) <= 1e-12


@pytest.mark.parametrize("name", [name for name in LAYERS if "Mamba3" in name])
def test_the_attention_of_mamba3_is_its_closed_form(name: str, x: Tensor) -> None:
    module, x = layer(name), x.double()
    adapter = find_adapter(module)
    assert adapter is not None
    chain = adapter(module, x, {})
    _, scan, _ = chain.split("scan")
    v = torch.randn(2, L, scan.sizes[1] or 0, dtype=x.dtype)
    heads = channel_matrices(scan, v).unflatten(1, (-1, 4))[:, :, 0]
    expected = torch.stack([oracles.mamba3_alpha(module, row) for row in x])
    assert relative_error(heads, expected) <= 1e-12


@pytest.mark.parametrize("name", [name for name in LAYERS if "gated channels" in name])
def test_gated_channels_mix_no_tokens(name: str, x: Tensor) -> None:
    module = layer(name)
    adapter = find_adapter(module)
    assert adapter is not None
    chain = adapter(module, x, {})
    _, core, _ = chain.split(chain.mixers[0])
    M = module.mlp_dim // 2 if isinstance(module, mha.MHA) else module.d_inner - module.d_ssm
    channels = slice(-M, None) if isinstance(module, mha.MHA) else slice(M)
    v = torch.randn(2, L, core.sizes[1] or 0)
    matrices = channel_matrices(core, v)[:, channels]
    assert matrices.shape[1] == M
    assert torch.equal(matrices, torch.eye(L).expand_as(matrices))


def lm(mixer: str = "Mamba1", **options: Any) -> MambaLMHeadModel:
    torch.manual_seed(0)
    ssm: dict[str, Any] = {"layer": mixer, **(HEADS if mixer == "Mamba2" else {"d_state": 3})}
    config = MambaConfig(
        **{
            "d_model": E, "n_layer": 4, "d_intermediate": 24, "vocab_size": VOCABULARY, "ssm_cfg": ssm,
            "attn_layer_idx": [1, 3], "attn_cfg": {"causal": True, "num_heads": 4, "num_heads_kv": 2, "d_conv": 3},
            "pad_vocab_size_multiple": 1, **options,
        }
    )  # fmt: skip
    return perturbed(MambaLMHeadModel(config))


NORMS: dict[str, dict[str, Any]] = {
    "as it is by default": {},
    "norms that are not fused": {"fused_add_norm": False},
    "layer norms": {"fused_add_norm": False, "rms_norm": False},
    "fused layer norms": {"rms_norm": False},
}
METHODS: dict[str, Callable[..., Tensor]] = {
    "rollout": lambda model, inputs: ImplicitAttentionRollout(model).attribute(inputs),
    "raw": lambda model, inputs: RawImplicitAttention(model).attribute(inputs),
    "attribution": lambda model, inputs: ImplicitAttentionAttribution(model).attribute(inputs, TARGET),
    "relevance": lambda model, inputs: ImplicitAttentionRelevance(model).attribute(inputs, TARGET),
    "difference": lambda model, inputs: ImplicitAttentionRelevance(model).attribute(
        inputs, TARGET, baselines=token_vector(model)
    ),
    "layer": lambda model, inputs: LayerImplicitAttention(model, mixers(model)[0]).attribute(inputs),
    "checkpoints": lambda model, inputs: ImplicitAttentionRelevance(model, checkpoints=True).attribute(inputs, TARGET),
}


def mixers(model: Any) -> list[nn.Module]:
    return [module.mixer for module in model.backbone.layers]


def embedded(model: Any, ids: Tensor) -> Tensor:
    return model.backbone.embedding(ids).detach()


def token_vector(model: nn.Module) -> Tensor:
    """The embedding of a token that serves as the reference, of a model of either package."""
    embeddings = input_embeddings(model)
    assert embeddings is not None
    return embeddings(torch.tensor(3)).detach()


def per_token(scores: Tensor, tokens: bool) -> Tensor:
    return scores.sum(-1) if scores.dim() == 3 and not tokens else scores


@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize("mixer", ["Mamba1", "Mamba2"])
@pytest.mark.parametrize("method", METHODS)
def test_embeddings_are_explained_as_their_ids(
    method: str, mixer: str, norms: str, ids: Tensor, unchanged: Callable[..., AbstractContextManager[None]]
) -> None:
    model = lm(mixer, **NORMS[norms])
    vectors = embedded(model, ids)
    with unchanged(model, ids, vectors):
        of_ids, of_vectors = (METHODS[method](model, inputs) for inputs in (ids, vectors))
    tokens = method == "layer"
    assert of_ids.shape == ((2, 7, 7) if tokens else (2, 7))
    assert relative_error(per_token(of_vectors, tokens), of_ids) <= 1e-5


@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize("mixer", ["Mamba1", "Mamba2"])
@pytest.mark.parametrize("baseline", [None, 3])
def test_relevance_adds_up(mixer: str, norms: str, baseline: int | None, ids: Tensor, device: str) -> None:
    model, ids = lm(mixer, **NORMS[norms]).to(device), ids.to(device)
    method = ImplicitAttentionRelevance(model)
    relevance, delta = method.attribute(ids, TARGET, baselines=baseline, return_convergence_delta=True)
    score = run_model(model, ids)[:, TARGET]
    assert delta.abs().max() <= 1e-4 * score.abs().max()
    if baseline is not None:
        reference = run_model(model, torch.full_like(ids, baseline))[:, TARGET]
        torch.testing.assert_close(relevance.sum(1), score - reference, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("norms", NORMS)
@pytest.mark.parametrize("inputs", ["ids", "embeddings"])
def test_every_layer_reads_the_sum_of_all_before(inputs: str, norms: str, ids: Tensor) -> None:
    """A block hands on its mixer's output and the residual stream apart; the next one adds them."""
    model = lm(**NORMS[norms])
    given = ids if inputs == "ids" else embedded(model, ids)
    with record_mixers(model) as calls:
        run_model(model, given)
    wiring = examine(model, calls, given, torch.ones(ids.shape), lambda inputs: run_model(model, inputs), model)
    assert list(wiring.reads) == [frozenset(range(EMBEDDINGS, number)) for number in range(len(calls))]
    assert wiring.output == frozenset(range(EMBEDDINGS, len(calls)))


@pytest.mark.parametrize("inputs", ["ids", "embeddings"])
def test_a_language_model_is_read_at_its_last_token(inputs: str, ids: Tensor) -> None:
    model = lm()
    given = ids if inputs == "ids" else embedded(model, ids)
    assert torch.equal(run_model(model, given), model(ids).logits[:, -1])
    assert is_language_model(model)
    assert not is_language_model(model.backbone)
    assert input_embeddings(model) is input_embeddings(model.backbone) is model.backbone.embedding


@pytest.mark.parametrize("method", [ImplicitAttentionAttribution, ImplicitAttentionRelevance])
def test_hidden_states_are_explained_at_any_token(method: Any, ids: Tensor) -> None:
    """The model without its head is a plain callable: its target names a token and an entry."""
    model = lm()
    whole = method(lambda ids: model.backbone(ids)[:, 4], model=model.backbone).attribute(ids, TARGET)
    for inputs in (ids, embedded(model, ids)):
        explained = method(model.backbone).attribute(inputs, (4, TARGET))
        assert relative_error(per_token(explained, False), whole) <= 1e-5


def test_the_scores_of_the_embedding_layer_are_those_of_the_tokens(ids: Tensor) -> None:
    model = lm()
    layer_scores = LayerImplicitAttentionAttribution(model, model.backbone.embedding).attribute(ids, TARGET)
    expected = ImplicitAttentionAttribution(model, rectify=None).attribute(ids, TARGET)
    torch.testing.assert_close(layer_scores.sum(-1), expected)


def twins() -> tuple[nn.Module, nn.Module]:
    """A model of transformers, and mamba_ssm's with the same parameters."""
    config = hf.MambaConfig(
        vocab_size=VOCABULARY, hidden_size=E, state_size=3, num_hidden_layers=3, time_step_rank=1,
        residual_in_fp32=True, tie_word_embeddings=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    theirs = perturbed(hf.MambaForCausalLM(config))
    ours = lm(n_layer=3, d_intermediate=0, attn_layer_idx=[], tie_embeddings=False)
    renamed = {name.replace("embeddings", "embedding"): tensor for name, tensor in theirs.state_dict().items()}
    ours.load_state_dict(renamed)
    return theirs, ours


@pytest.mark.parametrize("method", METHODS)
def test_transformers_model_with_the_same_parameters_is_explained_alike(method: str, ids: Tensor) -> None:
    """The blocks differ, residual stream and norm in one or two, and so does the code; the function is the same."""
    theirs, ours = twins()
    with reference_kernels(theirs):
        expected = METHODS[method](theirs, ids)
    assert relative_error(METHODS[method](ours, ids), expected) <= 1e-4


class Kernel(torch.autograd.Function):
    """A norm that leaves torch, as a kernel does: what is traced comes out as a plain tensor."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Any, residual: Any, eps: float, prenorm: bool) -> Any:
        plain = [t if t is None else t.detach().as_subclass(Tensor) for t in (x, weight, bias, residual)]
        return layer_norm.rms_norm_ref(*plain, eps=eps, prenorm=prenorm)


def kernel(x: Tensor, weight: Tensor, bias: Any, residual: Any = None, eps: float = 1e-6, prenorm: bool = False,
           **_: Any) -> Any:  # fmt: skip
    return Kernel.apply(x, weight, bias, residual, eps, prenorm)


def test_relevance_passes_a_fused_norm_by_its_rule(ids: Tensor) -> None:
    model = lm("Mamba2")
    expected = METHODS["difference"](model, ids)
    with patch.object(block, "layer_norm_fn", kernel):
        torch.testing.assert_close(METHODS["difference"](model, ids), expected)
        assert block.layer_norm_fn is kernel
        rule = EXTERNAL_CODE["layer_norm_fn"]
        unregister_rule("layer_norm_fn")
        try:
            with pytest.raises((InvalidInputError, FidelityError, UnsupportedModelError)):
                METHODS["difference"](model, ids)
        finally:
            register_rule("layer_norm_fn")(rule)


def test_a_fused_norm_that_does_more_than_its_rule_is_refused(ids: Tensor) -> None:
    def louder(*args: Any, **kwargs: Any) -> Any:
        y, residual = kernel(*args, **kwargs)
        return 1.1 * y, residual

    with (
        patch.object(block, "layer_norm_fn", louder),
        pytest.raises(FidelityError, match="wrong rule for layer_norm_fn"),
    ):
        METHODS["relevance"](lm(), ids)


def test_a_mask_is_refused(ids: Tensor, unchanged: Callable[..., AbstractContextManager[None]]) -> None:
    model = lm()
    for callee in (model, model.backbone):
        with unchanged(model), pytest.raises(InvalidInputError, match=r"takes no attention mask.*one by one"):
            ImplicitAttentionAttribution(callee).attribute(ids, TARGET, torch.ones_like(ids))


def test_ids_outside_the_vocabulary_are_refused(ids: Tensor) -> None:
    with pytest.raises(InvalidInputError, match=rf"0 to {VOCABULARY - 1}.*{VOCABULARY}"):
        ImplicitAttentionAttribution(lm()).attribute(torch.full_like(ids, VOCABULARY), TARGET)


@pytest.mark.parametrize("method", [ImplicitAttentionRelevance, ImplicitAttentionAttribution])
def test_a_generation_is_written_and_explained(method: Any, ids: Tensor) -> None:
    """Without a GPU the package's own ``generate`` cannot run; the rows are the method's own for each token."""
    model = lm().eval()
    llm = LLMImplicitAttention(method(model), None)
    answer = llm.generate(ids[:1], {"max_new_tokens": 2})
    whole = torch.cat([ids[:1], answer], 1)
    rows = llm.explain(whole, ids.shape[1])
    for row, k in enumerate(range(ids.shape[1], whole.shape[1])):
        alone = method(lambda ids: model(ids).logits[:, -1].log_softmax(-1), model)
        expected = alone.attribute(whole[:, :k], int(whole[0, k]))[0]
        torch.testing.assert_close(rows[row, :k], expected, rtol=1e-4, atol=1e-5)
        assert int(model(whole[:, :k]).logits[0, -1].argmax()) == whole[0, k]


def test_the_embedding_is_restored_if_the_model_fails(
    ids: Tensor, unchanged: Callable[..., AbstractContextManager[None]]
) -> None:
    model = lm()
    vectors = embedded(model, ids)[..., 1:]
    with unchanged(model), pytest.raises(InvalidInputError, match="15 components"):
        run_model(model, vectors)


@pytest.mark.parametrize("before", [0, 3])
@pytest.mark.parametrize("mixer", ["Mamba1", "Mamba2"])
def test_a_cache_is_left_alone_if_it_is_empty_and_else_refused(before: int, mixer: str, ids: Tensor) -> None:
    model = lm(mixer)

    def with_cache(tokens: Tensor) -> Tensor:
        cache = InferenceParams(max_seqlen=12, max_batch_size=2, seqlen_offset=before)
        return model(tokens, inference_params=cache).logits[:, -1]

    method = ImplicitAttentionAttribution(with_cache, model=model)
    if before:
        with pytest.raises(ModelStateError, match="a cache that already holds a state"):
            method.attribute(ids, TARGET)
    elif mixer == "Mamba1":  # Mamba2 fills its cache from what its kernel alone returns
        expected = METHODS["attribution"](model, ids)
        assert relative_error(method.attribute(ids, TARGET), expected) <= 1e-4


@pytest.mark.parametrize("name", ["Mamba", "Mamba2", "Mamba2Simple", "Mamba3"])
@pytest.mark.parametrize("argument", ["seq_idx", "cu_seqlens"])
def test_packed_sequences_are_refused(name: str, argument: str, x: Tensor) -> None:
    module = layer(name)
    adapter = find_adapter(module)
    assert adapter is not None
    with pytest.raises(UnsupportedModelError, match=rf"{name} layer was called with '{argument}'.*without packing"):
        adapter(module, x, {argument: torch.zeros(2, L, dtype=torch.int32)})


def test_several_inputs_and_outputs_of_one_state_are_refused_by_name(x: Tensor) -> None:
    module = layer("Mamba3")
    module.is_mimo = True
    with pytest.raises(UnsupportedModelError, match=r"MIMO.*captum_ssm.register"):
        check_without_running(module, x)


def test_learnt_initial_states_are_refused_by_name(x: Tensor) -> None:
    module = Mamba2Simple(E, **HEADS, learnable_init_states=True).eval()
    with pytest.raises(UnsupportedModelError, match=r"learnable_init_states.*captum_ssm.register"):
        check_without_running(module, x)


def test_scaled_rotary_positions_are_refused_by_name(x: Tensor) -> None:
    module = copy.deepcopy(layer("MHA: turned"))
    module.rotary_emb.scale_base = 512
    with pytest.raises(UnsupportedModelError, match=r"scale_base.*captum_ssm.register"):
        check_without_running(module, x)


def check_without_running(module: nn.Module, x: Tensor) -> None:
    adapter = find_adapter(module)
    assert adapter is not None
    adapter(module, x, {})


def foreign(name: str) -> nn.Module:
    """A layer of another make that only shares the name."""

    return type(name, (nn.Sequential,), {})(nn.Linear(E, E), nn.SiLU()).eval()


@pytest.mark.parametrize("name", ["Mamba", "Mamba2", "Mamba2Simple", "Mamba3", "MHA"])
def test_a_layer_of_the_same_name_without_its_parts_is_another(name: str, x: Tensor) -> None:
    with pytest.raises(UnsupportedModelError, match=rf"No adapter is registered for layer .*\({name}\)"):
        check_adapter(foreign(name), x)
