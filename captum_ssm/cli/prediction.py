"""The explanation of one prediction: a class, or the next token."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor

from captum_ssm import ImplicitAttentionRelevance, LayerImplicitAttentionRelevance, UnsupportedModelError
from captum_ssm.cli.encoding import Encoding
from captum_ssm.cli.explanation import Explanation
from captum_ssm.cli.layers import layer_views
from captum_ssm.cli.methods import METHODS, method_facts
from captum_ssm.cli.problems import CommandError
from captum_ssm.cli.text_model import TextModel
from captum_ssm.network.forward import run_model
from captum_ssm.visualization import Passage, text_figure


def explain_prediction(options: argparse.Namespace, text_model: TextModel, encoding: Encoding) -> Explanation:
    """Explain one prediction.

    Args:
        options: The resolved options of the command.
        text_model: The model with its tokenizer.
        encoding: The text in tokens.

    Returns:
        The text coloured by the contributions of its tokens to the score of the target.

    Raises:
        CommandError: If target, contrast or reference are unknown, the contrast is the target, the model calls a
            function that relevance has no rule for, or has no list of layers to show.
    """
    with torch.no_grad():
        logits = run_model(text_model.model, encoding.ids, encoding.mask)[0]  # (V,)
    target = int(logits.argmax()) if options.target is None else text_model.target(options.target, len(logits))
    contrast = None if options.contrast is None else text_model.target(options.contrast, len(logits))
    if contrast == target:
        raise CommandError(f"the contrast is the target itself, {text_model.name(target)!r}; name another one.")

    def transform(logits: Tensor) -> Tensor:
        return logits.log_softmax(-1) if options.score == "log-probability" else logits

    def forward(ids: Tensor, mask: Tensor) -> Tensor:
        return transform(run_model(text_model.model, ids, mask))

    reference = text_model.reference(options.reference) if options.method == "relevance" else None
    method = METHODS[options.method](forward, text_model.model, options)
    attribute = partial(method.attribute, encoding.ids, target, encoding.mask, contrast=contrast, show_progress=True)
    sums, baselines = {}, None
    if isinstance(method, ImplicitAttentionRelevance):
        evidence = transform(logits)
        value = float(evidence[target] if contrast is None else evidence[target] - evidence[contrast])
        baselines = None if reference is None else encoding.reference_ids(reference)
        relevance, gap = _relevance_and_gap(partial(attribute, baselines=baselines))
        sums = {
            "reference": encoding.describe_reference(reference),
            "completeness": describe_completeness(method, float(relevance.sum()), value, gap),
        }
    else:
        relevance = attribute()
    name, other = text_model.name(target), "" if contrast is None else text_model.name(contrast)
    facts = {
        "prediction": text_model.prediction(logits.float()),
        "explained": f"{options.score} of {name!r}" + (f" less that of {other!r}" if other else ""),
        **sums,
        **method_facts(method, options, text_model.source),
    }
    not_shown = encoding.describe_added(relevance[0])  # in the text; the views have all tokens
    title = f"Why {name!r}" + (f" and not {other!r}?" if other else "?")
    passage = Passage.from_offsets(encoding.text, encoding.offsets, relevance[0], title, facts | not_shown)
    views = None
    if options.layers:

        def relevance_before(layers: list[str]) -> list[Tensor]:
            inner = LayerImplicitAttentionRelevance(forward, layers, method.model, gate_rule=options.gates)
            return inner.attribute(encoding.ids, target, encoding.mask, contrast=contrast, baselines=baselines)

        names = text_model.tokenizer.convert_ids_to_tokens(encoding.ids[0].tolist())
        total = Passage.from_tokens(encoding.texts, names, relevance[0], title, facts)
        views = layer_views(total, method.model, relevance_before)
    return Explanation(passage, partial(text_figure, passage), views=views)


def _relevance_and_gap(attribute: Callable[..., tuple[Tensor, Tensor]]) -> tuple[Tensor, float]:
    """Run a relevance.

    Args:
        attribute: Its ``attribute``, all but one of whose arguments are set.

    Returns:
        The scores (1, L), and the convergence delta.

    Raises:
        CommandError: If the model calls a function that has no rule.
    """
    try:
        relevance, gap = attribute(return_convergence_delta=True)
    except UnsupportedModelError as error:
        raise CommandError(f"{error} Or choose another method: --method attribution.") from error
    return relevance, float(gap)


def describe_completeness(method: ImplicitAttentionRelevance, total: float, value: float, gap: float) -> str:
    """Return in words how the scores of a relevance add up.

    Args:
        method: The method after its call.
        total: The sum of the scores.
        value: F(text), the explained score.
        gap: The convergence delta: scores and terms less the explained difference.

    Returns:
        The sum, the terms that belong to no token, the explained difference and the gap.
    """
    terms = {name: float(term) for name, term in method.terms.items()}
    complete = total + sum(terms.values())
    words = f"the scores sum to {total:+.4f}"
    for name, term in terms.items():
        functions = f" ({', '.join(sorted(method.held))})" if name == "decisions" else ""
        words += f", the term of {name}{functions} is {term:+.4f}"
    words += f", together {complete:+.4f}" if terms else ""
    explained = f"F(text) = {value:+.4f}"
    if "bias" not in terms:
        difference = complete - gap
        explained = f"F(text) - F(reference) = {value:.4f} - ({value - difference:.4f}) = {difference:+.4f}"
    dtype = next(method.model.parameters()).dtype
    rounding = f", rounding of the model's own {str(dtype).removeprefix('torch.')}" if dtype.itemsize < 4 else ""
    return f"{words}; {explained}; gap {gap:+.1e}{rounding}"
