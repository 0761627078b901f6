"""Rollouts over both directions of a Vision Mamba, and its relevance, as multiples of its forward pass."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial

import torch

from benchmarks.speed.figures import Figure
from benchmarks.speed.models import TARGET, forward_pass
from benchmarks.speed.rollouts import ABSOLUTE, CHANNEL, FORWARD, MEAN, ROOT, SIGNED, Case, against_forward
from benchmarks.speed.timing import ratios
from captum_ssm import ImplicitAttentionRelevance
from tutorials.vision_mamba import VisionMamba


def vision(quick: bool) -> Iterator[Figure]:
    """Measure a model of the size of Vim-tiny."""
    torch.manual_seed(0)
    depth, pixels, rounds = (4, 112, 2) if quick else (24, 224, 2)
    model = VisionMamba(depth=depth, image_size=pixels).eval()
    image = torch.randn(1, 3, pixels, pixels)
    name = f"Vision Mamba, {depth} × 192, {(pixels // 16) ** 2 + 1} tokens"
    wanted = {ROOT: 5, CHANNEL: None, SIGNED: None, ABSOLUTE: None, MEAN: None}
    yield from against_forward("vision", Case(name, lambda: model, 0, wanted), image, rounds)
    calls = {"relevance, frozen gates": partial(ImplicitAttentionRelevance(model).attribute, image, target=TARGET)}
    for what, value in ratios(calls, forward_pass(model, image), rounds).items():
        yield Figure("vision", what, FORWARD, name, None, value)
