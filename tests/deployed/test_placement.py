"""Models that accelerate spreads over devices, or runs in mixed precision, have the scores of the plain ones."""

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import pytest
import torch
from accelerate.state import AcceleratorState
from torch import Tensor, nn

import captum_ssm as cs
from captum_ssm.layers.mixers import known_mixers
from tests.conftest import build
from tests.test_placement import FAMILIES, expected, state, whole
from tests.test_running import BOTH, METHODS, generated, right

Place = Callable[[Any, Path], None]


def blocks(model: nn.Module) -> tuple[str, list[str]]:
    """The name of the list of blocks, and those of the blocks."""
    name, members = next((n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList))
    return name, [f"{name}.{number}" for number in range(len(members))]


def device_map(model: nn.Module) -> dict[str, str]:
    """Every other block on disk, all else on the CPU."""
    home, names = blocks(model)
    leaves = [n for n, m in model.named_modules() if not [*m.children()] and not n.startswith(f"{home}.")]
    return dict.fromkeys(leaves, "cpu") | {n: "disk" if k % 2 else "cpu" for k, n in enumerate(names)}


def disk(model: Any, folder: Path) -> None:
    accelerate.disk_offload(model, folder, "cpu", offload_buffers=True)


def dispatched(model: Any, folder: Path) -> None:
    accelerate.dispatch_model(model, device_map(model), main_device="cpu", offload_dir=folder, force_hooks=True)


def preloaded(kind: str) -> Place:
    def place(model: Any, folder: Path) -> None:
        mixers = list(known_mixers(model).values())
        inside = mixers if kind == "mixers" else [model.get_submodule(name) for name in blocks(model)[1]]
        accelerate.cpu_offload(model, "cpu", preload_module_classes=[type(module).__name__ for module in inside])

    return place


PLACES: dict[str, Place] = {
    "cpu_offload": lambda model, folder: accelerate.cpu_offload(model, "cpu"),
    "cpu_offload with buffers": lambda model, folder: accelerate.cpu_offload(model, "cpu", offload_buffers=True),
    "disk_offload": disk,
    "dispatch_model": dispatched,
    "preloaded mixers": preloaded("mixers"),
    "preloaded blocks": preloaded("blocks"),
}


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", FAMILIES)
def test_an_offloaded_model_is_explained_as_the_whole_one(name: str, place: str, ids: Tensor, tmp_path: Path) -> None:
    model = copy.deepcopy(whole(name))
    PLACES[place](model, tmp_path)
    assert any(tensor.is_meta for tensor in model.parameters())
    before = state(model)
    for method in METHODS if place == "cpu_offload" else (*sorted(BOTH), "layer"):
        torch.testing.assert_close(METHODS[method](model, ids, None), expected(name, method, ids))
        assert state(model) == before
    torch.testing.assert_close(generated(model, ids), generated(whole(name), ids))


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "rwkv"])  # which runs otherwise: see below
def test_a_device_map_of_from_pretrained(name: str, ids: Tensor, tmp_path: Path) -> None:
    plain = build(name)
    plain.save_pretrained(tmp_path / "model")
    places = device_map(plain)
    model = type(plain).from_pretrained(tmp_path / "model", device_map=places, offload_folder=tmp_path / "rest")
    assert any(tensor.is_meta for tensor in model.parameters())
    for method in BOTH:
        torch.testing.assert_close(METHODS[method](model.eval(), ids, None), right(name, method, ids))


def test_an_offloaded_parametrization_is_explained_as_the_whole_one(ids: Tensor) -> None:
    model = build("mamba")
    nn.utils.parametrizations.weight_norm(model.backbone.layers[1].mixer.in_proj)
    model.eval()

    def explained() -> list[Tensor]:
        relevance = cs.ImplicitAttentionRelevance(model).attribute(ids, 3, baselines=2)
        return [cs.ImplicitAttentionRollout(model).attribute(ids), relevance]

    whole = explained()
    accelerate.cpu_offload(model, "cpu")
    for offloaded, plain in zip(explained(), whole, strict=True):
        torch.testing.assert_close(offloaded, plain, rtol=0, atol=1e-6)


def test_an_rwkv_that_cannot_divide_its_weights_is_explained_as_it_runs(ids: Tensor) -> None:
    """It divides weights at its first run, which reaches none of those that are offloaded."""
    model = build("rwkv")
    accelerate.cpu_offload(model, "cpu")
    method = cs.ImplicitAttentionRelevance(model)
    scores = method.attribute(ids, 1, baselines=2)
    with torch.no_grad():
        of_text, of_reference = (model(x, use_cache=False).logits[:, -1, 1] for x in (ids, torch.full_like(ids, 2)))
    torch.testing.assert_close(scores.sum(1), of_text - of_reference, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_mixed_precision_of_accelerate(name: str, ids: Tensor) -> None:
    """It runs the model's own function under autocast, and returns outputs in float32."""
    AcceleratorState._reset_state(True)
    model = accelerate.Accelerator(mixed_precision="bf16", cpu=True).prepare(build(name)).eval()
    torch.testing.assert_close(METHODS["layer"](model, ids, None), right(name, "layer", ids))
    method = cs.ImplicitAttentionRelevance(model)
    scores = method.attribute(ids, 1, baselines=2)
    with torch.no_grad():
        of_text, of_reference = (model(x, use_cache=False).logits[:, -1, 1] for x in (ids, torch.full_like(ids, 2)))
    total = scores.sum(1) + sum(method.terms.values())
    scale = scores.abs().sum(1) + sum(term.abs() for term in method.terms.values())
    assert float(((total - of_text + of_reference).abs() / scale).max()) < 0.1
    METHODS["signed"](model, ids, None)
    generated(model, ids)
