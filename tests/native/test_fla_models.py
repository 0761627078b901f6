"""The language models of flash-linear-attention, explained as they are."""

import functools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

pytest.importorskip("fla")

import fla.models
from fla.models.cache_utils import Cache

from captum_ssm import (
    ImplicitAttentionAttribution,
    ImplicitAttentionRelevance,
    ImplicitAttentionRollout,
    LayerImplicitAttention,
    ModelStateError,
)
from captum_ssm.layers.mixers import find_mixers
from tests.native import fla_cpu  # noqa: F401  lets the models run without a GPU

SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "vocab_size": 13, "intermediate_size": 24}

MODELS: dict[str, dict[str, Any]] = {
    "RetNet": {"num_heads": 2},
    "GLA": {"num_heads": 2},
    "HGRN2": {"expand_ratio": 8},
    "RWKV6": {"num_heads": 2},
    "RWKV7": {"head_dim": 8},
    "DeltaNet": {"num_heads": 2},
    "GatedDeltaNet": {"head_dim": 4, "num_heads": 2},
    "KDA": {"head_dim": 4, "num_heads": 2},
    "GLA with softmax": {"num_heads": 2, "attn": {"layers": [1], "num_heads": 4, "num_kv_heads": 2, "window_size": 4}},
}
"""Options by name: the model's, and what tells it from another of the same."""

METHODS: dict[str, Callable[..., Any]] = {
    "rollout": ImplicitAttentionRollout,
    "rollout mean": functools.partial(ImplicitAttentionRollout, fusion="mean"),
    "channel": ImplicitAttentionAttribution,
    "signed": functools.partial(ImplicitAttentionAttribution, rectify=None),
    "relevance": ImplicitAttentionRelevance,
}

IDS = torch.randint(1, 13, (2, 9), generator=torch.Generator().manual_seed(1))
TARGET = 3

every_model = pytest.mark.parametrize("name", MODELS)
every_method = pytest.mark.parametrize("method", METHODS)


@functools.cache
def build(name: str) -> nn.Module:
    """Return a model with all parameters off their initial values, so that no symmetry hides an error."""
    torch.manual_seed(0)
    kind = name.partition(" ")[0]
    config = getattr(fla.models, f"{kind}Config")(**SMALL, **MODELS[name])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model: nn.Module = getattr(fla.models, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape))
    return model.eval()


def explain(name: str, method: str, ids: Tensor, mask: Tensor | None = None, **options: Any) -> Tensor:
    args = () if mask is None else (mask,)
    found = METHODS[method](build(name))
    scores: Tensor = found.attribute(ids, target=TARGET, additional_forward_args=args, **options)
    assert max(found.fidelity.values()) <= 1e-5
    return scores


def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> bool:
    return bool((found - expected).abs().max() <= tolerance * expected.abs().max())


@every_model
def test_every_layer_that_mixes_tokens_is_known(name: str) -> None:
    parts = ("attn", "ffn") if name.startswith("RWKV") else ("attn",)
    assert list(find_mixers(build(name))) == [f"model.layers.{n}.{part}" for n in (0, 1) for part in parts]


@every_model
@every_method
def test_every_token_has_a_score(name: str, method: str) -> None:
    scores = explain(name, method, IDS)
    assert scores.shape == IDS.shape and bool(scores.isfinite().all()) and bool(scores.ne(0).all())
    if method == "rollout":
        assert bool((scores > 0).all()) and close(scores.sum(1), torch.ones(2))


@every_model
@every_method
def test_an_example_is_explained_alike_alone_and_in_a_batch(name: str, method: str) -> None:
    together, alone = explain(name, method, IDS), [explain(name, method, row.unsqueeze(0)) for row in IDS]
    assert close(together, torch.cat(alone))


@every_model
@every_method
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_score_and_has_none(name: str, method: str, side: str) -> None:
    real = slice(3, None) if side == "left" else slice(None, -3)
    mask = torch.zeros_like(IDS)
    mask[0, real] = 1
    mask[1] = 1
    scores = explain(name, method, IDS, mask)
    assert close(scores[0, real], explain(name, method, IDS[:1, real])[0])
    assert bool((scores[0] * (1 - mask[0]) == 0).all())


@every_model
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types_give_much_the_same_rollout(name: str, dtype: torch.dtype) -> None:
    """The package's references compute in float32; what bfloat16 rounds changes the gates."""
    model = build.__wrapped__(name).to(dtype)
    scores = ImplicitAttentionRollout(model).attribute(IDS)
    assert close(scores.float(), explain(name, "rollout", IDS), 1e-5 if dtype == torch.float64 else 5e-2)


@every_model
def test_no_token_after_the_explained_position_has_a_score(name: str) -> None:
    scores = explain(name, "rollout", IDS, query=5)
    assert bool((scores[:, 6:] == 0).all()) and bool((scores[:, :6] > 0).all())


@every_model
@pytest.mark.parametrize("part", ["attn", "ffn"])
def test_the_matrix_of_a_layer_is_causal(name: str, part: str) -> None:
    model = build(name)
    if f"model.layers.1.{part}" not in find_mixers(model):
        pytest.skip("a feed-forward that mixes no tokens")
    matrix = LayerImplicitAttention(model, f"model.layers.1.{part}").attribute(IDS, fusion="absolute")
    assert bool((matrix.triu(1) == 0).all()) and bool((matrix.diagonal(dim1=-2, dim2=-1) > 0).all())


@every_model
def test_frozen_relevance_and_the_bias_add_up_to_the_score(name: str) -> None:
    method = ImplicitAttentionRelevance(build(name))
    relevance, delta = method.attribute(IDS, target=TARGET, return_convergence_delta=True)
    with torch.no_grad():
        score = build(name)(IDS).logits[:, -1, TARGET]
    assert close(relevance.sum(1) + method.terms["bias"], score)
    assert method.completeness <= 1e-5 and bool((delta.abs() <= 1e-4 * score.abs().max()).all())


@every_model
def test_relevance_to_a_baseline_adds_up_to_the_difference(name: str) -> None:
    """Through decays, erasure, norms and shifts: all that depends on the tokens is followed."""
    model = build(name)
    relevance, _ = ImplicitAttentionRelevance(model).attribute(
        IDS, target=TARGET, baselines=5, return_convergence_delta=True
    )
    with torch.no_grad():
        score, other = (model(ids).logits[:, -1, TARGET] for ids in (IDS, torch.full_like(IDS, 5)))
    assert close(relevance.sum(1), score - other)


@every_model
def test_a_cache_that_holds_a_state_is_refused(name: str) -> None:
    model = build(name)
    cache = Cache()
    for layer in range(2):
        cache.update(recurrent_state=torch.ones(2, 2, 4, 8), conv_state=torch.ones(2, 16), layer_idx=layer, offset=4)

    def forward(ids: Tensor) -> Tensor:
        return model(ids, past_key_values=cache).logits[:, -1]

    with pytest.raises(ModelStateError, match="a cache that already holds a state"):
        ImplicitAttentionRollout(forward, model).attribute(IDS, target=TARGET)
