"""Relevance against Captum's gradient methods and occlusion; several references against one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from captum.attr import FeatureAblation, InputXGradient, IntegratedGradients
from torch import Tensor
from transformers import AutoModelForCausalLM

from benchmarks.speed.figures import Figure
from benchmarks.speed.models import TARGET, delta_hybrid, forward_pass, last_logits, mamba, mamba2, random_ids
from benchmarks.speed.timing import Call, best
from captum_ssm import ImplicitAttentionRelevance
from captum_ssm.models import REVIEWS

FROZEN, REFERENCE = "relevance, frozen gates", "relevance with a reference"
STEPS = 50


def gradient_calls(model: Any, ids: Tensor) -> dict[str, Call]:
    """Return relevance by both rules and Captum's gradient methods, on the embeddings of the same tokens."""
    embeddings, forward = last_logits(model, ids)
    relevance = ImplicitAttentionRelevance(model)
    explain = partial(relevance.attribute, embeddings, target=TARGET)
    leaf = embeddings.clone().requires_grad_()
    return {
        "forward": forward_pass(model, ids),
        "gradient": partial(InputXGradient(forward).attribute, leaf, target=TARGET),
        FROZEN: explain,
        REFERENCE: partial(explain, baselines=0.0),
        "path": partial(IntegratedGradients(forward).attribute, leaf, target=TARGET, n_steps=5, internal_batch_size=1),
    }


def relevance(quick: bool) -> Iterator[Figure]:
    """Measure relevance on whole texts, also without the one plain forward pass that checks a reference."""
    L, layers, width, rounds = (64, 2, 64, 2) if quick else (512, 4, 128, 4)
    cases: dict[str, tuple[Callable[[], Any], float, float]] = {
        f"Mamba-2, {layers} × {width}, L {L}": (partial(mamba2, layers, width, 32, 64), 1.2, 1 / 20),
        f"gated delta hybrid, {layers} × {width}, L {L}": (partial(delta_hybrid, layers, width), 1.5, 1 / 15),
        f"Mamba, 2 × {width}, L {L}": (partial(mamba, 2, width), 1, 1 / 20),
    }
    for of, (build, wanted, of_path) in cases.items():
        calls = gradient_calls(build(), random_ids(L))
        path = 10 * best({"": calls.pop("path")}, 1)[""]
        times = best(calls, rounds)
        gradient = times["gradient"]
        without = (times[REFERENCE] - times["forward"]) / gradient
        yield Figure("relevance", FROZEN, "`InputXGradient`", of, 1.5, times[FROZEN] / gradient)
        yield Figure("relevance", f"{REFERENCE}, without its check", "`InputXGradient`", of, wanted, without)
        yield Figure("relevance", REFERENCE, "`InputXGradient`", of, None, times[REFERENCE] / gradient)
        yield Figure(
            "relevance", REFERENCE, f"`IntegratedGradients`, {STEPS} steps", of, of_path, times[REFERENCE] / path
        )


def references(quick: bool) -> Iterator[Figure]:
    """Measure two references, or frozen gates besides one, against one reference."""
    shipped = AutoModelForCausalLM.from_pretrained(REVIEWS).eval()
    layers, width, L = (2, 64, 64) if quick else (4, 128, 512)
    cases = {
        "the shipped model, 20 tokens": (shipped, 20, 1.3, 10),
        f"Mamba-2, {layers} × {width}, L {L}": (mamba2(layers, width, 32, 64), L, 1.8, 4),
        f"gated delta hybrid, {layers} × {width}, L {L}": (delta_hybrid(layers, width), L, 1.8, 4),
    }
    for of, (model, length, wanted, rounds) in cases.items():
        method, ids = ImplicitAttentionRelevance(model), random_ids(length)
        explain = partial(method.attribute, ids, target=TARGET)
        kinds: dict[str, Any] = {"one": 2, "two": [2, 9], "frozen": [2, None]}
        try:
            explain(baselines=kinds["frozen"])
        except Exception:
            del kinds["frozen"]
        times = best({name: partial(explain, baselines=kind) for name, kind in kinds.items()}, rounds)
        yield Figure("references", "two references", "one reference", of, wanted, times["two"] / times["one"])
        if "frozen" in times:
            value = times["frozen"] / times["one"]
            yield Figure("references", "frozen gates and a reference", "one reference", of, 1.5, value)


def sentence(quick: bool) -> Iterator[Figure]:
    """Measure one sentence of 20 tokens on the shipped model."""
    model, ids = AutoModelForCausalLM.from_pretrained(REVIEWS).eval(), random_ids(20)
    embeddings, forward = last_logits(model, ids)
    method = ImplicitAttentionRelevance(model)
    # all 20 at once: its fastest
    ablation = FeatureAblation(lambda ids: model(ids, use_cache=False).logits[:, -1])
    occlude = partial(ablation.attribute, ids, baselines=2, target=TARGET, perturbations_per_eval=20)
    path = IntegratedGradients(forward)
    calls: dict[str, Call] = {
        "forward": forward_pass(model, ids),
        "relevance": partial(method.attribute, ids, target=TARGET, baselines=2),
        "occlusion": torch.no_grad()(occlude),
        "path": partial(path.attribute, embeddings, target=TARGET, n_steps=STEPS, internal_batch_size=STEPS),
    }
    times, of = best(calls, 3 if quick else 10), "the shipped model, 20 tokens"
    without = times["relevance"] - times["forward"]
    occlusion = "occlusion, all tokens at once"
    yield Figure("sentence", f"{REFERENCE}, without its check", occlusion, of, 0.8, without / times["occlusion"])
    yield Figure("sentence", REFERENCE, occlusion, of, None, times["relevance"] / times["occlusion"])
    path_time = times["relevance"] / times["path"]
    yield Figure("sentence", REFERENCE, f"`IntegratedGradients`, {STEPS} steps", of, 1 / 10, path_time)
