"""A whole generation in one call: a written token in forward passes of the whole text, and Captum's loop."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from captum.attr import LLMGradientAttribution, TextTokenInput
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.speed.figures import Figure
from benchmarks.speed.models import TARGET, forward_pass, gated_delta, mamba, mamba2, random_ids
from benchmarks.speed.rollouts import CHANNEL, METHODS, ROOT, ROWS, SIGNED
from benchmarks.speed.timing import best, ratios
from captum_ssm import (
    ImplicitAttentionAttribution,
    LayerImplicitAttentionAttribution,
    LLMImplicitAttention,
)
from captum_ssm.models import REVIEWS

WHOLE_TEXT = "the model's forward pass on the whole text"
WANTED: dict[str, float | None] = {SIGNED: 4, CHANNEL: 10, ROWS: 10, ROOT: 10}


def generation(quick: bool) -> Iterator[Figure]:
    """Measure written tokens: those of random models in forward passes, those of the shipped one in Captum's loop."""
    prompt, written = (32, 8) if quick else (128, 32)
    sizes = ((2, 64), (2, 64)) if quick else ((6, 768), (4, 256))
    (layers, width), (few, narrow) = sizes
    cases: dict[str, Callable[[], Any]] = {
        f"Mamba-2, {layers} × {width}": partial(mamba2, layers, width),
        f"Mamba, {layers} × {width}": partial(mamba, layers, width),
        f"gated delta, {few} × {narrow}": partial(gated_delta, few, narrow),
    }
    for of, build in cases.items():
        model, ids = build(), random_ids(prompt + written)
        for name, wanted in WANTED.items():
            method = LLMImplicitAttention(METHODS[name](model), None)
            method.explain(ids, ids.shape[1] - 1)  # a model is examined once for each length
            explain = partial(method.explain, ids, prompt)
            value = ratios({name: explain}, forward_pass(model, ids), 2)[name] / written
            what = f"a written token of {written} after {prompt}, {name}"
            yield Figure("generation", what, WHOLE_TEXT, of, wanted, value)
    yield from against_captum(prompt, written)


def against_captum(prompt: int, written: int) -> Iterator[Figure]:
    """Measure Captum's loop over the written tokens against single calls, and all tokens at once against it."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(REVIEWS).eval(), AutoTokenizer.from_pretrained(REVIEWS)
    words = torch.randint(50, 4000, (prompt + written,), generator=torch.Generator().manual_seed(0))
    text, ids = tokenizer.decode(words[: prompt - 1]), words[prompt:]
    layer = LayerImplicitAttentionAttribution(model, model.get_input_embeddings(), rectify=None)
    inp = TextTokenInput(text, tokenizer)
    direct = LLMImplicitAttention(ImplicitAttentionAttribution(model, rectify=None), tokenizer)

    def last(ids: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False).logits[:, -1].log_softmax(-1)

    single = ImplicitAttentionAttribution(last, model, rectify=None)
    half = words[None, : prompt + written // 2]
    calls = {
        "one": partial(single.attribute, half, target=TARGET),
        "loop": partial(LLMGradientAttribution(layer, tokenizer).attribute, inp, target=ids),
        "ours": partial(direct.attribute, inp, target=ids[None]),
    }
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Captum's, on how it shows random words
        times = best(calls, 2)
    of = f"the shipped model, {written} tokens after {prompt}"
    loop = "`LLMGradientAttribution` with our layer class"
    yield Figure("generation", loop, f"{written} single calls", of, 1.5, times["loop"] / (written * times["one"]))
    yield Figure("generation", "`LLMImplicitAttention`, signed", loop, of, 1 / 5, times["ours"] / times["loop"])
