"""Adapters of peft: every method gives what it gives for the plain model of the same function."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import captum_ssm as cs
from captum_ssm.layers.mixers import known_mixers
from tests.conftest import build
from tests.test_stand_ins import METHODS, UNCALLED, assert_alike, close, plain, scores

Lora = peft.LoraConfig
EVERY = ["mamba", "mamba2", "falcon_mamba", "jamba", "zamba2", "rwkv", "recurrent_gemma", "qwen3_next", "bamba",
         "falcon_h1", "lfm2", "xlstm"]  # fmt: skip
FEW = ["mamba", "recurrent_gemma", "falcon_h1"]


def targets(model: nn.Module) -> list[str]:
    """Names of the projections of a model's mixers; peft itself refuses ``out_proj`` of Mamba's."""
    parts = [item for mixer in known_mixers(model).values() for item in mixer.named_modules()]
    names = {name.rpartition(".")[2] for name, part in parts if isinstance(part, nn.Linear)}
    return sorted(name for name in names - {"out_proj", *UNCALLED} if not name.isdigit())


def randomised(model: Any) -> Any:
    """The model with adapters that do something: those of a new one add nothing."""
    generator = torch.Generator().manual_seed(3)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(False)
        if ".default" in name or ".other" in name:
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.2)
    return model.eval()


def tuned(config: Callable[..., Any], **options: Any) -> Callable[[Any], Any]:
    return lambda model: randomised(peft.get_peft_model(model, config(target_modules=targets(model), **options)))


def two(model: Any) -> Any:
    names = targets(model)
    tuned_model = peft.get_peft_model(model, Lora(r=2, target_modules=names))
    tuned_model.add_adapter("other", Lora(r=3, target_modules=names))
    return randomised(tuned_model)


def both(model: Any) -> Any:
    tuned_model = two(model)
    tuned_model.base_model.set_adapter(["default", "other"])
    return tuned_model


def the_other(model: Any) -> Any:
    tuned_model = two(model)
    tuned_model.set_adapter("other")
    return tuned_model


def disabled(model: Any) -> Any:
    tuned_model = two(model)
    tuned_model.base_model.disable_adapter_layers()
    return tuned_model


def merged_in_place(model: Any) -> Any:
    tuned_model = two(model)
    tuned_model.merge_adapter()
    return tuned_model


def everywhere(model: Any) -> Any:
    """With adapters on embeddings and head too."""
    embeddings = next(name for name, part in model.named_modules() if isinstance(part, nn.Embedding))
    names = [*targets(model), embeddings.rpartition(".")[2], "head" if hasattr(model, "head") else "lm_head"]
    return randomised(peft.get_peft_model(model, Lora(r=2, target_modules=names)))


def saved(model: Any) -> Any:
    """With a projection, a head and norms that were trained as a whole."""
    first, *others = targets(model)
    modules = [*others[:1], "lm_head", "norm"]
    return randomised(peft.get_peft_model(model, Lora(r=2, target_modules=[first], modules_to_save=modules)))


STATES: dict[str, Callable[[Any], Any]] = {
    "LoRA": tuned(Lora, r=2),
    "rsLoRA": tuned(Lora, r=2, use_rslora=True),
    "DoRA": tuned(Lora, r=2, use_dora=True),
    "LoRA with biases": tuned(Lora, r=2, lora_bias=True, bias="all"),
    "IA3": tuned(peft.IA3Config, feedforward_modules=[]),
    "LoHa": tuned(peft.LoHaConfig, r=2),
    "OFT": tuned(peft.OFTConfig, oft_block_size=4),
    "two adapters": both,
    "the other of two": the_other,
    "disabled": disabled,
    "merged in place": merged_in_place,
    "embeddings and head": everywhere,
    "modules to save": saved,
}


@torch.no_grad()
def merged(model: nn.Module) -> nn.Module:
    """The plain model: each part that peft replaced is the plain one that does the same."""
    model = copy.deepcopy(model)
    done: dict[nn.Module, nn.Module] = {}
    parts: list[tuple[str, Any]] = list(model.named_modules(remove_duplicate=False))
    for path, part in parts:
        base: Any = getattr(part, "base_layer", None) or getattr(part, "original_module", None)
        if base is None or any(f".{within}." in path for within in ("base_layer", "modules_to_save")):
            continue
        if isinstance(base, nn.Linear):
            done.setdefault(part, plain(part, base.in_features))
        elif isinstance(base, nn.Embedding):
            vectors = nn.Parameter(part(torch.arange(base.num_embeddings)))
            base.weight = vectors
            done[part] = base
        else:
            done[part] = part.modules_to_save["default"]
        home, _, name = path.rpartition(".")
        setattr(model.get_submodule(home), name, done[part])
    return model.eval()


def compare(family: str, state: str, methods: Iterable[str], ids: Tensor) -> None:
    inner = STATES[state](build(family)).base_model.model
    assert_alike(inner, merged(inner), ids, methods, 5e-4)


@pytest.mark.parametrize("family", EVERY)
def test_lora_of_every_family(family: str, ids: Tensor) -> None:
    compare(family, "LoRA", METHODS, ids)


@pytest.mark.parametrize("state", [state for state in STATES if state != "LoRA"])
@pytest.mark.parametrize("family", FEW)
def test_every_state(family: str, state: str, ids: Tensor) -> None:
    compare(family, state, ("signed", "rollout", "frozen", "reference"), ids)


@pytest.mark.parametrize("family", EVERY)
def test_relevance_adds_up_by_decomposition(family: str, ids: Tensor) -> None:
    model = STATES["DoRA"](build(family)).base_model.model
    method = cs.ImplicitAttentionRelevance(model)
    result = method.attribute(ids, 1, baselines=2).sum(1) + sum(method.terms.values())
    with torch.no_grad():
        right = [model(text, use_cache=False).logits[:, -1, 1] for text in (ids, torch.full_like(ids, 2))]
    torch.testing.assert_close(result, right[0] - right[1], atol=2e-4, rtol=1e-3)
    assert set(method.followed.values()) == {"decomposition"}


def test_an_adapter_that_mamba_never_applies(ids: Tensor) -> None:
    tuned_model = randomised(peft.get_peft_model(build("mamba"), Lora(r=2, target_modules=["dt_proj"])))
    with pytest.warns(UserWarning, match="adapter on 'dt_proj' of MambaMixer has no effect"):
        result = scores("signed", tuned_model.base_model.model, ids)
    close(result, scores("signed", build("mamba"), ids), 1e-6)
