"""The groups of figures by name."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from benchmarks.speed.figures import Figure
from benchmarks.speed.generation import generation
from benchmarks.speed.gradients import gradients
from benchmarks.speed.growth import growth
from benchmarks.speed.kernel_rules import kernel_rules
from benchmarks.speed.memory import memory
from benchmarks.speed.relevance import references, relevance, sentence
from benchmarks.speed.rollouts import kernels, published
from benchmarks.speed.vision import vision

GROUPS: dict[str, Callable[[bool], Iterator[Figure]]] = {
    "rollouts": published,
    "kernels": kernels,
    "vision": vision,
    "gradients": gradients,
    "relevance": relevance,
    "references": references,
    "sentence": sentence,
    "kernel rules": kernel_rules,
    "generation": generation,
    "memory": memory,
    "growth": growth,
}
"""From the name of a group to the function that measures it, with smaller sizes if asked for."""
