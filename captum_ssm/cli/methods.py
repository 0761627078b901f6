"""The attribution methods of the command line, their options, and the facts to print about a method."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

from captum_ssm import (
    ImplicitAttentionAttribution,
    ImplicitAttentionRelevance,
    ImplicitAttentionRollout,
    RawImplicitAttention,
)
from captum_ssm.attr.model_method import ModelMethod

METHODS: dict[str, Callable[..., ModelMethod]] = {
    "relevance": lambda score, model, o: ImplicitAttentionRelevance(score, model, gate_rule=o.gates),
    "attribution": lambda score, model, o: ImplicitAttentionAttribution(
        score, model, rectify=None if o.rectify == "none" else o.rectify, attention=o.attention, without=o.without
    ),
    "rollout": lambda score, model, o: ImplicitAttentionRollout(
        score, model, fusion=o.fusion, attention=o.attention, without=o.without
    ),
    "raw": lambda score, model, o: RawImplicitAttention(
        score, model, fusion=o.fusion, attention=o.attention, without=o.without
    ),
}
"""Name of each method, and its constructor: from the forward function, the model and the options of the command."""

MATRIX_METHODS = ("attribution", "rollout", "raw")
"""The methods that read the matrices between tokens."""

METHOD_OPTIONS: dict[str, tuple[tuple[str, ...], Any]] = {
    "reference": (("relevance",), None),
    "gates": (("relevance",), "half"),
    "layers": (("relevance",), False),
    "rectify": (("attribution",), "none"),
    "fusion": (("rollout", "raw"), "root"),
    "attention": (MATRIX_METHODS, "unified"),
    "without": (MATRIX_METHODS, ()),
}
"""Options that only some methods have: the names of these methods, and the default."""


def make_method(options: argparse.Namespace, score: Callable[..., Any], model: Any) -> ModelMethod:
    """Return the method that the options of the command name; with the first argument bound it can be pickled.

    Args:
        options: The name of the method, and its options.
        score: The forward function.
        model: The model.
    """
    return METHODS[options.method](score, model, options)


def method_facts(method: ModelMethod, options: argparse.Namespace, source: str) -> dict[str, str]:
    """Return the facts about a method after its call, by name.

    Args:
        method: A method that has explained the text.
        options: The resolved options of the command.
        source: Where the model comes from, in words.

    Returns:
        The method with its options, its exactness, and the model, each in words.
    """
    exactness = "no layer is decomposed: all are followed function by function"
    if method.fidelity:
        layer, largest = max(method.fidelity.items(), key=lambda item: item[1])
        exactness = f"largest relative error over {len(method.fidelity)} layers {largest:.1e} ({layer})"
    return {
        "method": f"{type(method).__name__}: {describe_options(method, options)}",
        "exactness": exactness,
        "model": source,
    }


def describe_options(method: ModelMethod, options: argparse.Namespace) -> str:
    """Return the options of a method in words."""
    if isinstance(method, ImplicitAttentionRelevance):
        return f"frozen gates, rule {method.gate_rule}" if "bias" in method.terms else "difference to a reference"
    choice = f"rectify {options.rectify}" if options.method == "attribution" else f"{options.fusion} fusion"
    omission = f", without {', '.join(options.without)}" if options.without else ""
    return f"{choice}, {options.attention} attention{omission}"
