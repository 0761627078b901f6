"""Rollouts and gradient-weighted rollouts, as multiples of the model's forward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any, NamedTuple

from torch import nn

from benchmarks.speed.figures import Figure
from benchmarks.speed.linear_layers import KINDS, LinearModel
from benchmarks.speed.models import TARGET, by_kernel, forward_pass, gated_delta, mamba, mamba2, random_ids
from benchmarks.speed.timing import ratios
from captum_ssm import ImplicitAttentionAttribution, ImplicitAttentionRollout

FORWARD = "the model's forward pass"
METHODS: dict[str, Callable[[nn.Module], Any]] = {
    '`ImplicitAttentionRollout`, `"root"` (default)': ImplicitAttentionRollout,
    '`ImplicitAttentionAttribution`, `"channel"` (default)': ImplicitAttentionAttribution,
    '`rectify="channel"`, `normalize="rows"`': partial(ImplicitAttentionAttribution, normalize="rows"),
    '`rectify="token"`': partial(ImplicitAttentionAttribution, rectify="token"),
    "`rectify=None` (signed)": partial(ImplicitAttentionAttribution, rectify=None),
    '`fusion="absolute"`': partial(ImplicitAttentionRollout, fusion="absolute"),
    '`fusion="positive"`': partial(ImplicitAttentionRollout, fusion="positive"),
    '`fusion="norm"`': partial(ImplicitAttentionRollout, fusion="norm"),
    '`fusion="mean"`': partial(ImplicitAttentionRollout, fusion="mean"),
}
ROOT, CHANNEL, ROWS, TOKEN, SIGNED, ABSOLUTE, POSITIVE, NORM, MEAN = METHODS
OTHERS: dict[str, float | None] = {TOKEN: 8, SIGNED: None, ABSOLUTE: 8, POSITIVE: 8, NORM: 8}
SHARED: dict[str, float | None] = {ROOT: 6, CHANNEL: 8, **OTHERS}
"""What is wanted where the channels of a head share a matrix, by method."""


class Case(NamedTuple):
    """A model, how many tokens it gets, and what is wanted of each method."""

    name: str
    build: Callable[[], Any]
    L: int
    wanted: Mapping[str, float | None]


def against_forward(group: str, case: Case, inputs: Any, rounds: int) -> list[Figure]:
    """Return the times of the methods of a case, in forward passes on the same inputs."""
    model = case.build()
    calls = {name: partial(METHODS[name](model).attribute, inputs, target=TARGET) for name in case.wanted}
    found = ratios(calls, forward_pass(model, inputs), rounds)
    return [Figure(group, name, FORWARD, case.name, case.wanted[name], value) for name, value in found.items()]


def _measured(group: str, cases: list[Case], rounds: int) -> Iterator[Figure]:
    for case in cases:
        yield from against_forward(group, case, random_ids(case.L), rounds)


def published(quick: bool) -> Iterator[Figure]:
    """Measure Mamba-2 and Mamba."""
    layers, width, L, long = (2, 256, 64, 128) if quick else (6, 768, 256, 1024)
    of_two, of_one = partial(mamba2, layers, width), partial(mamba, layers, width)
    of_many: dict[str, float | None] = {ROOT: 4, CHANNEL: 8, SIGNED: None, ABSOLUTE: None}
    size = f"{layers} × {width}"
    short = [
        Case(f"Mamba-2, {size}, L {L}", of_two, L, {ROOT: 4, CHANNEL: 6, ROWS: None, **OTHERS}),
        Case(f"Mamba, {size}, L {L}", of_one, L, of_many),
    ]
    yield from _measured("rollouts", short, 3)
    yield from _measured("rollouts", [Case(f"Mamba-2, {size}, L {long}", of_two, long, {ROOT: 12, CHANNEL: 20})], 2)


def kernels(quick: bool) -> Iterator[Figure]:
    """Measure all other kernels."""
    layers, width, L = (2, 128, 64) if quick else (4, 256, 256)
    builders: dict[str, Callable[[], Any]] = {
        "gated delta": partial(gated_delta, layers, width),
        **by_kernel(layers, width),
    }
    builders |= {kind: partial(LinearModel, layers, width, kind) for kind in KINDS}
    single: dict[str, float | None] = {ROOT: None, CHANNEL: None, SIGNED: None}
    cases = [
        Case(name, build, L, single if name in ("RG-LRU", "WKV-4") else SHARED) for name, build in builders.items()
    ]
    yield from _measured("kernels", cases, 3)
