"""Small models of the packages' layers, and the packages' own models: all methods, and relevance that adds up."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from captum.attr import IntegratedGradients
from torch import Tensor, nn

from captum_ssm import (
    ImplicitAttentionAttribution,
    ImplicitAttentionRelevance,
    ImplicitAttentionRollout,
    LayerImplicitAttention,
    RawImplicitAttention,
    UnsupportedModelError,
)
from captum_ssm.network.forward import run_model
from tests.families import VOCABULARY, perturbed
from tests.packages.layers import LAYERS, RWKV7, E, L, Record, width

from mambapy import vim  # isort: skip
from mambapy.mamba import Mamba, MambaConfig  # isort: skip
from mambavision.models.mamba_vision import MambaVision  # isort: skip
from minGRU_pytorch.minLM import minLM  # isort: skip
from recurrentgemma.common import GriffinConfig, TemporalBlockType  # isort: skip
from recurrentgemma.torch import griffin  # isort: skip
from rwkv7_hf import RWKV7Config, RWKV7ForCausalLM  # isort: skip
from s5.s5_model import S5Block  # isort: skip
from torchscale.architecture.config import RetNetConfig  # isort: skip
from torchscale.architecture.retnet import RetNetDecoder  # isort: skip
from xlstm import (  # isort: skip
    mLSTMBlockConfig,
    mLSTMLayerConfig,
    sLSTMBlockConfig,
    sLSTMLayerConfig,
    xLSTMLMModel,
    xLSTMLMModelConfig,
)

TARGET = 1


class Reader(nn.Module):
    """Two layers on a residual stream, and answers that are read off the last token."""

    def __init__(self, record: Record) -> None:
        super().__init__()
        self.mixers = nn.ModuleList(record.make() for _ in range(2))
        self.D, self.arguments = width(self.mixers[0]), record.arguments
        self.embed, self.norm, self.head = nn.Linear(4, self.D), nn.LayerNorm(self.D), nn.Linear(self.D, 3)

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x)
        for mixer in self.mixers:
            y = mixer(self.norm(h), **self.arguments(len(x)))
            h = h + (y[0] if isinstance(y, tuple) else y)
        return self.head(self.norm(h)[:, -1])


def reader(name: str) -> nn.Module:
    torch.manual_seed(0)
    return perturbed(Reader(LAYERS[name]), std=0.1)


def inputs(seed: int = 1) -> Tensor:
    return torch.randn(2, L, 4, generator=torch.Generator().manual_seed(seed))


def ranks(a: Tensor) -> Tensor:
    return a.flatten().argsort().argsort().double()


def rank_correlation(a: Tensor, b: Tensor) -> float:
    return float(torch.corrcoef(torch.stack([ranks(a), ranks(b)]))[0, 1])


def difference(model: nn.Module, x: Tensor, reference: Tensor) -> Tensor:
    with torch.no_grad():
        return run_model(model, x)[..., TARGET] - run_model(model, reference)[..., TARGET]


every_layer = pytest.mark.parametrize("name", LAYERS)


@every_layer
def test_the_methods_of_matrices_explain_a_model_of_these_layers(name: str) -> None:
    model, x = reader(name), inputs()
    for method in (ImplicitAttentionRollout, RawImplicitAttention):
        scores = method(model).attribute(x)
        assert scores.shape == x.shape and scores.isfinite().all()
        assert scores.ge(0).all() and scores.any()
    for rectify in ("channel", "token", None):
        method = ImplicitAttentionAttribution(model, rectify=rectify)
        scores = method.attribute(x, TARGET)
        assert scores.shape == x.shape and scores.isfinite().all() and scores.any()
        assert len(method.fidelity) == 2 and max(method.fidelity.values()) <= 1e-5
    matrices = LayerImplicitAttention(model, "mixers.0").attribute(x)
    assert matrices.shape == (2, L, L)
    assert not LAYERS[name].causal or not matrices.triu(1).any()


@every_layer
def test_relevance_is_the_difference_that_the_model_makes(name: str) -> None:
    model, x, reference = reader(name), inputs(), inputs(seed=2)
    method = ImplicitAttentionRelevance(model)
    relevance = method.attribute(x, TARGET, baselines=reference)
    assert method.followed == {"mixers.0": "decomposition", "mixers.1": "decomposition"}
    expected = difference(model, x, reference)
    torch.testing.assert_close(relevance.flatten(1).sum(1), expected, atol=1e-5, rtol=1e-5)


@every_layer
def test_relevance_with_frozen_gates_is_the_score_less_a_bias(name: str) -> None:
    model, x = reader(name), inputs()
    method = ImplicitAttentionRelevance(model)
    relevance = method.attribute(x, TARGET)
    score = model(x)[:, TARGET].detach()
    torch.testing.assert_close(relevance.flatten(1).sum(1) + method.terms["bias"], score, atol=1e-5, rtol=1e-5)


@every_layer
@pytest.mark.parametrize(("step", "least"), [(0.1, 0.9), (0.5, 0.65)])
def test_relevance_ranks_as_integrated_gradients_of_many_steps(name: str, step: float, least: float) -> None:
    """Near the reference both are the gradient; half-way to 0 the norms of heads of four channels bend the paths."""
    model, x = reader(name), inputs()
    reference = (1 - step) * x
    relevance = ImplicitAttentionRelevance(model).attribute(x, TARGET, baselines=reference)
    integrated = IntegratedGradients(model).attribute(x, reference, TARGET, n_steps=100)
    assert rank_correlation(relevance, integrated) >= least


# --- The packages' own models -------------------------------------------------------------------------------------


class Language(nn.Module):
    """Embeds ids for a model that reads vectors, and reads the answer off the last token."""

    def __init__(self, model: nn.Module, **options: Any) -> None:
        super().__init__()
        self.embed, self.model, self.head = nn.Embedding(VOCABULARY, E), model, nn.Linear(E, VOCABULARY)
        self.options = options

    def forward(self, ids: Tensor) -> Tensor:
        y = self.model(self.embed(ids), **self.options)
        return self.head(y)[:, -1]


class Griffin(nn.Module):
    """RecurrentGemma: its model takes the positions of the tokens too."""

    def __init__(self) -> None:
        super().__init__()
        kinds = (TemporalBlockType.RECURRENT, TemporalBlockType.ATTENTION)
        self.model = griffin.Griffin(GriffinConfig(VOCABULARY, E, 24, 2, kinds, True, 3, 30.0))

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, torch.arange(ids.shape[1]).expand(len(ids), -1), return_cache=False)[0][:, -1]


class LastToken(nn.Module):
    """Reads the logits of the last token."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, ids: Tensor) -> Tensor:
        logits = self.model(ids)
        return (logits[0] if isinstance(logits, tuple) else logits)[:, -1]


def retnet() -> nn.Module:
    config = RetNetConfig(
        decoder_embed_dim=E, decoder_value_embed_dim=2 * E, decoder_retention_heads=4, decoder_ffn_embed_dim=24,
        decoder_layers=2, vocab_size=VOCABULARY, no_output_layer=False,
    )  # fmt: skip
    return LastToken(RetNetDecoder(config, embed_tokens=nn.Embedding(VOCABULARY, E)))


def xlstm(**options: Any) -> nn.Module:
    block = mLSTMBlockConfig(mlstm=mLSTMLayerConfig(num_heads=4))
    config = xLSTMLMModelConfig(
        mlstm_block=block, num_blocks=2, embedding_dim=E, vocab_size=VOCABULARY, context_length=L, **options
    )
    return LastToken(xLSTMLMModel(config))


def with_slstm() -> nn.Module:
    """One of the two blocks is an sLSTM, on its code in torch."""
    layer = sLSTMLayerConfig(backend="vanilla", num_heads=4, conv1d_kernel_size=3)
    return xlstm(slstm_block=sLSTMBlockConfig(slstm=layer), slstm_at=[1])


def s5_blocks() -> nn.Module:
    return Language(nn.Sequential(S5Block(E, 8, bidir=False), S5Block(E, 8, bidir=True)))


def rwkv7() -> nn.Module:
    return RWKV7ForCausalLM(RWKV7Config(**{**RWKV7.to_dict(), "vocab_size": VOCABULARY}))


MODELS: dict[str, Callable[[], nn.Module]] = {
    "mambapy": lambda: Language(Mamba(MambaConfig(d_model=E, n_layers=2, d_state=3))),
    "mambapy, Vision Mamba": lambda: Language(vim.VMamba(vim.MambaConfig(d_model=E, n_layers=2, d_state=3))),
    "minGRU": lambda: LastToken(minLM(num_tokens=VOCABULARY, dim=E, depth=2)),
    "minLSTM": lambda: LastToken(minLM(num_tokens=VOCABULARY, dim=E, depth=2, use_lstm=True)),
    "recurrentgemma": Griffin,  # its blocks are checkpointed
    "RWKV-7": rwkv7,
    "S5": s5_blocks,
    "RetNet": retnet,
    "xLSTM": xlstm,
}


def built(make: Callable[[], nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return perturbed(make(), std=0.1)


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, VOCABULARY, (2, L), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("make", MODELS.values(), ids=MODELS)
def test_a_model_of_the_package_is_explained_by_every_method(make: Callable[[], nn.Module], ids: Tensor) -> None:
    model = built(make)
    for method in (ImplicitAttentionRollout(model), RawImplicitAttention(model)):
        assert method.attribute(ids).any()
    assert ImplicitAttentionAttribution(model).attribute(ids, TARGET).shape == ids.shape
    method = ImplicitAttentionRelevance(model)
    relevance = method.attribute(ids, TARGET, baselines=3)
    assert set(method.followed.values()) == {"decomposition"} and len(method.followed) == (6 if make is rwkv7 else 2)
    expected = difference(model, ids, torch.full_like(ids, 3))
    torch.testing.assert_close(relevance.sum(1), expected, atol=1e-5, rtol=1e-5)


def test_an_slstm_is_refused_by_the_methods_of_matrices(ids: Tensor) -> None:
    with pytest.raises(UnsupportedModelError, match=r"blocks\.1\.xlstm.*mixes tokens.*sLSTMLayer is not gated-linear"):
        ImplicitAttentionRollout(built(with_slstm)).attribute(ids)


def test_an_slstm_is_followed_by_relevance(ids: Tensor) -> None:
    model = built(with_slstm)
    relevance = ImplicitAttentionRelevance(model).attribute(ids, TARGET, baselines=3)
    expected = difference(model, ids, torch.full_like(ids, 3))
    torch.testing.assert_close(relevance.sum(1), expected, atol=1e-5, rtol=1e-5)


def mambavision() -> nn.Module:
    return MambaVision(
        dim=8, in_dim=4, depths=[1, 1, 3, 2], window_size=[4, 4, 2, 2], mlp_ratio=2, num_heads=[1, 1, 2, 2],
        num_classes=3, drop_path_rate=0.0,
    )  # fmt: skip


@pytest.fixture
def images() -> Tensor:
    return torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def test_mambavision_is_followed_by_relevance(images: Tensor) -> None:
    model = built(mambavision)
    relevance = ImplicitAttentionRelevance(model).attribute(images, TARGET, baselines=0.0)
    expected = difference(model, images, torch.zeros_like(images))
    torch.testing.assert_close(relevance.flatten(1).sum(1), expected, atol=1e-5, rtol=1e-5)


def test_mambavision_is_refused_by_the_methods_of_matrices(images: Tensor) -> None:
    """Its convolutions over the whole image mix the tokens of the mixers, which lie in windows."""
    with pytest.raises(UnsupportedModelError, match=r"levels\.2\.blocks\.0\.mixer.*windows"):
        ImplicitAttentionRollout(built(mambavision)).attribute(images)
