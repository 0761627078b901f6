"""Attribution against Captum's gradient methods, and matrices against the loop of the published code."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch
from captum.attr import InputXGradient, IntegratedGradients

from benchmarks.speed.figures import Figure
from benchmarks.speed.growth import selective_scan
from benchmarks.speed.models import TARGET, last_logits, mamba, random_ids
from benchmarks.speed.timing import best
from captum_ssm import ImplicitAttentionAttribution
from captum_ssm.matrices.core_matrix import channel_matrices
from tests.oracles import published_alpha

STEPS = 50


def gradients(quick: bool) -> Iterator[Figure]:
    """Measure signed attribution, and the dense matrices of one core."""
    layers, width, L, D = (2, 64, 64, 32) if quick else (6, 256, 256, 64)
    model = mamba(layers, width)
    embeddings, forward = last_logits(model, random_ids(L))
    leaf = embeddings.clone().requires_grad_()
    # a few of its steps, one at a time: on a CPU a batch of several is slower for each
    path = partial(IntegratedGradients(forward).attribute, embeddings, target=TARGET, internal_batch_size=1)
    calls = {
        "ours": partial(ImplicitAttentionAttribution(model, rectify=None).attribute, embeddings, target=TARGET),
        "gradient": partial(InputXGradient(forward).attribute, leaf, target=TARGET),
    }
    times = best(calls, 3)
    what, of = "`rectify=None` (signed)", f"Mamba, {layers} × {width}, L {L}"
    yield Figure("gradients", what, "`InputXGradient`", of, 2, times["ours"] / times["gradient"])
    steps = best({"": partial(path, n_steps=5)}, 1)[""] * STEPS / 5
    yield Figure("gradients", what, f"`IntegratedGradients`, {STEPS} steps", of, 1 / 15, times["ours"] / steps)
    scan, parameters = selective_scan(L, D)
    dense = partial(channel_matrices, scan, torch.zeros(1, L, D))
    ours, loop = best({"": dense}, 3)[""], best({"": partial(published_alpha, *parameters)}, 1)[""]
    of = f"Mamba, D {D}, N 16, L {L}"
    yield Figure("gradients", "matrices of one core", "the published loop", of, 1 / 25, ours / loop)
