"""Peak memory of an explanation, as a multiple of that of the model's own forward and backward pass.

Each is read from a process of its own, as the peak of a process never falls:

    python -m benchmarks.speed.memory MODEL WHAT L
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM
from transformers.utils import logging

from benchmarks.speed.figures import ROOT as REPOSITORY
from benchmarks.speed.figures import Figure
from benchmarks.speed.models import TARGET, delta_hybrid, gated_delta, last_logits, mamba, mamba2, random_ids
from benchmarks.speed.rollouts import ABSOLUTE, CHANNEL, MEAN, METHODS, NORM, ROOT, ROWS, SIGNED, TOKEN
from captum_ssm import ImplicitAttentionRelevance, LLMImplicitAttention
from captum_ssm.models import REVIEWS

OWN, FORWARD = "the model's own forward and backward pass", "the model's forward pass, with its graph"
FROZEN, REFERENCE = "relevance, frozen gates", "relevance with a reference"
GENERATION = f"a generation of 4 tokens, {CHANNEL}"
RELEVANCE: dict[str, Any] = {FROZEN: None, REFERENCE: 0.0}
MODELS: dict[str, Callable[[], Any]] = {
    "Mamba-2, 2 × 384": partial(mamba2, 2, 384),
    "gated delta, 2 × 256": partial(gated_delta, 2, 256),
    "Mamba, 1 × 128": partial(mamba, 1, 128),
    "gated delta hybrid, 4 × 128": partial(delta_hybrid, 4, 128),
    "the shipped model": lambda: AutoModelForCausalLM.from_pretrained(REVIEWS).eval(),
}


def call(model: Any, what: str, L: int) -> object:
    """Run the model on L tokens, or explain it."""
    ids = random_ids(L)
    embeddings, forward = last_logits(model, ids)
    if what in (OWN, FORWARD):
        score = forward(embeddings.requires_grad_())[0, TARGET]
        return torch.autograd.grad(score, embeddings) if what == OWN else score
    if what in RELEVANCE:
        method = ImplicitAttentionRelevance(model)
        return method.attribute(embeddings, target=TARGET, baselines=RELEVANCE[what])
    if what == GENERATION:
        return LLMImplicitAttention(METHODS[CHANNEL](model), None).explain(ids, L - 4)
    return METHODS[what](model).attribute(ids, target=TARGET)


def gigabytes(kind: str) -> float:
    """Return the resident memory of this process now, ``"VmRSS"``, or its peak so far, ``"VmHWM"``."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(kind))
    return int(line.split()[1]) / 1e6


def grown(function: Callable[[], object]) -> float:
    """Return by how many GB one call raises the peak resident memory of this process."""
    # raise resident memory to the peak again, so that what follows is counted in full
    ballast = torch.ones(int((gigabytes("VmHWM") - gigabytes("VmRSS")) * 1e9 / 4))
    before = gigabytes("VmHWM")
    function()
    after = gigabytes("VmHWM")
    del ballast
    return after - before


def in_a_process(model: str, what: str, L: int) -> float:
    """Return by how many GB a call raises the peak memory of a process of its own."""
    command = [sys.executable, "-m", "benchmarks.speed.memory", model, what, str(L)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True, cwd=REPOSITORY).stdout)


def memory(quick: bool) -> Iterator[Figure]:
    """Measure all methods at L 2048, and relevance at the length of a long document."""
    L, long = (256, 512) if quick else (2048, 16384)
    matrices = [ROOT, CHANNEL, ROWS, TOKEN, SIGNED, ABSOLUTE, MEAN, GENERATION]
    # transformers' own passes of a Mamba take a time that grows with the square of L
    asked = {
        "Mamba, 1 × 128": [ROOT, CHANNEL, SIGNED, MEAN],
        "gated delta hybrid, 4 × 128": [SIGNED],
        "the shipped model": [],
    }
    for model in MODELS:
        own = in_a_process(model, OWN, L)
        for what in [*asked.get(model, matrices), *RELEVANCE]:
            value = in_a_process(model, what, L) / own
            yield Figure("memory", f"peak memory, {what}", OWN, f"{model}, L {L}", 2, value)
    model = "the shipped model"
    own = in_a_process(model, FORWARD, long)
    for what in RELEVANCE:
        value = in_a_process(model, what, long) / own
        yield Figure("memory", f"peak memory, {what}", FORWARD, f"{model}, L {long}", 1.2, value)
    own, norm = (in_a_process("gated delta, 2 × 256", what, L // 2) for what in (OWN, NORM))
    yield Figure("memory", f"peak memory, {NORM}", OWN, f"gated delta, 2 × 256, L {L // 2}", 2, norm / own)


def main() -> None:
    """Print the memory of one call, in GB."""
    name, what, L = sys.argv[1:]
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    model = MODELS[name]()
    call(model, what, 16)
    print(grown(partial(call, model, what, int(L))))


if __name__ == "__main__":
    main()
