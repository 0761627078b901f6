"""The explanation of every token that a model generates after a text."""

from __future__ import annotations

import argparse
from functools import partial

import torch
from torch import Tensor

from captum_ssm import ImplicitAttentionRelevance, LLMImplicitAttention
from captum_ssm.cli.encoding import Encoding
from captum_ssm.cli.explanation import Explanation
from captum_ssm.cli.methods import METHODS, method_facts
from captum_ssm.cli.problems import CommandError
from captum_ssm.cli.text_model import TextModel
from captum_ssm.visualization import Passage, Views, token_heatmap, token_texts


def explain_generation(options: argparse.Namespace, text_model: TextModel, encoding: Encoding) -> Explanation:
    """Let the model continue the text, and explain every generated token.

    Args:
        options: The resolved options of the command.
        text_model: The model with its tokenizer.
        encoding: The text in tokens.

    Returns:
        The text coloured by the sum over the generated tokens, each generated token's strongest scores as details, and
        all scores as a heat map.

    Raises:
        CommandError: If an option does not go with a generation, or the model is a classifier.
    """
    _refuse_other_options(options, text_model)
    encoding = encoding.to_continue()
    method = METHODS[options.method](text_model.model, None, options)
    llm = LLMImplicitAttention(method, text_model.tokenizer)
    answer = llm.generate(encoding.ids, {"max_new_tokens": options.generate, "do_sample": False})
    ids = torch.cat([encoding.ids, answer], dim=1)
    start = encoding.ids.shape[1]
    sums, baselines = {}, None
    if isinstance(method, ImplicitAttentionRelevance):
        reference = text_model.reference(options.reference)
        baselines = None if reference is None else _reference_ids(encoding, reference, ids)
        sums = {"reference": encoding.describe_reference(reference)}
    rows = llm.explain(
        ids, start, baselines=baselines, show_progress=True
    )  # (generated tokens, all tokens but the last)
    if isinstance(method, ImplicitAttentionRelevance):
        sums["completeness"] = _describe_completeness(method)

    tokens = [text_model.name(token) for token in ids[0].tolist()]
    of_text = rows.sum(0)[:start]
    facts = {
        "written": text_model.tokenizer.decode(answer[0]),
        "explained": f"log-probability of each of {len(rows)} tokens; the text is coloured by their sum",
        **sums,
        **method_facts(method, options, text_model.source),
    }
    not_shown = encoding.describe_added(of_text)  # in the text; the views have all tokens
    title = f"Where {facts['written'].strip()!r} comes from"
    draw = partial(
        token_heatmap,
        torch.nn.functional.pad(rows, (0, 1)).cpu(),  # the last token explains nothing
        tokens[start:],
        tokens,
        reads="before itself",
        label="score for the log-probability",
        title=title,
    )
    passage = Passage.from_offsets(encoding.text, encoding.offsets, of_text, title, facts | not_shown)
    texts = [*encoding.texts, *token_texts(text_model.tokenizer, ids[0].tolist())[start:]]
    names = text_model.tokenizer.convert_ids_to_tokens(ids[0].tolist())
    views = Views.of_answer(texts, names, rows, title, facts)
    return Explanation(passage, draw, tuple(_strongest(rows, tokens, start)), views)


def _reference_ids(encoding: Encoding, token: int, ids: Tensor) -> Tensor:
    """Return the reference of all tokens but the last: one token everywhere but where the tokenizer added a token.

    Args:
        encoding: The text in tokens.
        token: The id of the token.
        ids: Text and written tokens (1, L).

    Returns:
        Token ids (1, L - 1).
    """
    start = encoding.ids.shape[1]
    return torch.cat([encoding.reference_ids(token), torch.full_like(ids[:, start:-1], token)], dim=1)


def _describe_completeness(method: ImplicitAttentionRelevance) -> str:
    """Return in words how the scores of each written token add up."""
    terms = " and ".join(f"a term of {name}" for name in method.terms)
    difference = "" if "bias" in method.terms else ", less that after the reference"
    together = f"together with {terms} " if terms else ""
    return (
        f"the scores of each written token {together}sum to its log-probability{difference}; largest relative error "
        f"{method.completeness:.1e}"
    )


def _refuse_other_options(options: argparse.Namespace, text_model: TextModel) -> None:
    """Raise if an option does not go with a generation.

    Raises:
        CommandError: If there is a target, a contrast, another score or no token to generate, layers are asked for, or
            the model is a classifier.
    """
    if options.target is not None or options.contrast is not None:
        raise CommandError("--generate explains what the model writes; leave --target and --contrast out.")
    if options.score != "log-probability":
        raise CommandError("--generate explains log-probabilities; leave --score out.")
    if options.layers:
        raise CommandError("--layers shows the layers of one prediction; leave it or --generate out.")
    if text_model.classifies:
        raise CommandError("the model is a classifier and generates no text; leave --generate out.")
    if options.generate < 1:
        raise CommandError(f"--generate takes a number of tokens, at least 1, not {options.generate}.")


def _strongest(rows: Tensor, tokens: list[str], start: int) -> list[str]:
    """Return one line for each generated token with its strongest scores, after a heading."""
    width = max(map(len, tokens[start:]))
    lines = ["every token that was written, and what spoke most for (+) and against (-) it:"]
    for token, row in zip(tokens[start:], rows):
        strongest = row.abs().topk(min(4, len(row))).indices.tolist()
        lines.append(f"  {token:<{width}}  " + ", ".join(f"{tokens[j]} {float(row[j]):+.2g}" for j in strongest))
    return [*lines, ""]
