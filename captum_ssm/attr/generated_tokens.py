"""The scores of every token of a generation: all at once from one run by the attention, one by one by relevance."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import partial
from threading import Lock

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.attr.base import ImplicitAttentionMethod
from captum_ssm.attr.relevance import ImplicitAttentionRelevance
from captum_ssm.errors import ModelStateError
from captum_ssm.layers.call import LayerCall, together
from captum_ssm.layers.fidelity import Decomposition
from captum_ssm.network.examination import examine
from captum_ssm.network.forward import language_logits
from captum_ssm.network.graph import ResidualGraph
from captum_ssm.network.inputs import token_mask
from captum_ssm.network.recording import outputs_through_chains, record_head, record_mixers
from captum_ssm.network.reference import Baseline, expanded_baseline
from captum_ssm.relevance.explanation import Explanation

_PASS = 2**22
"""How much one backward pass of several tokens may span, in tokens times channels: the size of a processor's cache."""

_HELD = 2**25
"""Entries of the gradients of all layers, and of a layer's matrices, that are held at once: 128 MB."""

_WARNINGS = Lock()
"""Held while warnings are filtered: Python has one filter for all threads."""


def attention_rows(
    method: ImplicitAttentionMethod, ids: Tensor, start: int, advance: Callable[[int], object]
) -> Tensor:
    """Return the scores of every token from ``start`` on, from one run of the model.

    Args:
        method: A method of all layers, of a language model itself.
        ids: Prompt and answer (1, L).
        start: Number of the first explained token, at least 1.
        advance: Called with the number of tokens that were explained, for a progress bar.

    Returns:
        (L - start, L - 1): row i has the scores for token start + i.

    Raises:
        ModelStateError: If the log-probability of a token is NaN or infinite.
    """
    model, inputs, answer = method.model, ids[:, :-1], ids[0, start:]
    positions = torch.arange(start - 1, inputs.shape[1], device=ids.device)
    hold = method.gradient_at == "last layer"  # no gradient is asked for
    mixers = record_mixers(model, hold=hold, replacement=None if hold else outputs_through_chains())
    with torch.enable_grad(), mixers as recorded, record_head(model) as head_inputs:
        logits = language_logits(model, inputs)
        log_probabilities = logits[0, positions].log_softmax(-1).gather(1, answer.unsqueeze(1))
    if not bool(log_probabilities.isfinite().all()):
        raise ModelStateError(
            "The log-probability of a generated token is NaN or infinite. Check the model's weights for NaN or "
            "infinity, or run the model in a wider floating-point type."
        )
    calls = together(recorded)
    mask = token_mask(model, (), calls)
    graph: ResidualGraph | None = None
    decompositions: dict[int, Decomposition] = {}  # shared by all generated tokens
    hidden = None if hold else head_inputs[-1]
    rows = []
    for some, gradients in _gradients(log_probabilities, hidden, positions, recorded, calls[-1].wide_input):
        if graph is None:  # not before, as what a backward pass needs may be freed by now
            graph = examine(model, calls, inputs, mask, partial(language_logits, model), language_logits)
        query = F.one_hot(positions[some], inputs.shape[1]).to(mask).unsqueeze(1)  # (M, 1, L)
        with torch.no_grad():
            scores = method.scores_of_calls(calls, gradients, graph, mask, query, decompositions=decompositions)
        rows.append(scores.squeeze(1))
        advance(len(query))
    return torch.cat(rows)


def _gradients(
    log_probabilities: Tensor, head_input: Tensor | None, positions: Tensor, calls: list[LayerCall], like: Tensor
) -> Iterator[tuple[slice, list[Tensor | None]]]:
    """Differentiate the log-probabilities, several at a time.

    The layers after the last mixer act on each token alone, and each log-probability is read at another position:
    so one backward pass to the head's input gives the gradients of all log-probabilities there, each at its
    position. From there on a backward pass takes as many tokens as are fast at once; those of several passes are
    handed on together, as a layer's matrices are computed once for all of them.

    Args:
        log_probabilities: Of the generated tokens, (M, 1).
        head_input: Input of the output embeddings (1, L, E); None if no gradient is asked for.
        positions: Where each log-probability is read, (M,).
        calls: The mixers' calls, part of the graph.
        like: A tensor of the type and on the device of the gradients.

    Yields:
        Some of the generated tokens, and their gradients at each call's output, (M, 1, L, E).
    """
    if head_input is None:
        yield slice(0, len(positions)), [None] * len(calls)
        return
    (at_head,) = torch.autograd.grad(log_probabilities.sum(), head_input, retain_graph=True)
    outputs = [call.y for call in calls]
    last, (L, E) = positions[-1], head_input.shape[1:]
    of_a_pass, held = max(1, _PASS // (L * E * 32)), max(1, _HELD // (L * (E * len(outputs) + L)))

    def backward(gradient: Tensor, is_last: bool = False) -> tuple[Tensor, ...]:
        return torch.autograd.grad(head_input, outputs, gradient, retain_graph=not is_last, materialize_grads=True)

    def backward_of_several(positions: Tensor) -> tuple[Tensor, ...]:
        each = F.one_hot(positions, L).to(at_head)[:, None, :, None] * at_head  # (M, 1, L, E)
        if len(each) == 1:
            return tuple(gradient[None] for gradient in backward(each[0], is_last=bool(positions[0] == last)))
        with _WARNINGS, warnings.catch_warnings():
            warnings.filterwarnings("ignore", "There is a performance drop")  # an operation without a batched form
            try:
                return torch.func.vmap(backward)(each)
            except RuntimeError:  # as what is sent between processes, or a norm of mixed types
                return tuple(map(torch.stack, zip(*map(backward, each))))

    for start in range(0, len(positions), held):
        some = slice(start, start + held)
        passes = map(backward_of_several, positions[some].split(of_a_pass))
        yield some, [torch.cat(gradients).to(like) for gradients in zip(*passes)]


def relevance_rows(
    method: ImplicitAttentionRelevance,
    ids: Tensor,
    start: int,
    baselines: Baseline | list[Baseline] | None,
    advance: Callable[[int], object],
) -> Tensor:
    """Return the relevance for every token from ``start`` on, each by a run on the tokens before it.

    Args:
        method: The relevance of a language model itself. After the call its ``terms`` have one entry for each explained
            token, (L - start,), and its other attributes are those of all runs.
        ids: Prompt and answer (1, L).
        start: Number of the first explained token, at least 1.
        baselines: The reference, or a list of several, see :meth:`LLMImplicitAttention.attribute`.
        advance: Called with the number of tokens that were explained, for a progress bar.

    Returns:
        (L - start, L - 1): row i has the scores for token start + i.
    """
    model, L = method.model, ids.shape[1]

    def log_probabilities(ids: Tensor) -> Tensor:
        return language_logits(model, ids)[:, -1].log_softmax(-1)

    one = copy.copy(method)
    one.forward_func, one._model = log_probabilities, model
    several = baselines if isinstance(baselines, list) else [baselines]
    references = [expanded_baseline(baseline, ids[:, :-1]) for baseline in several]
    explanations = []
    for position in range(start, L):
        x, target = ids[:, :position], int(ids[0, position])
        before = [b[:, :position] if isinstance(b, Tensor) and b.dim() > 1 else b for b in references]
        explanation = one.explained((x,), target, None, (), [(b,) for b in before], with_delta=False)
        row = F.pad(explanation.relevance[0].sum(-1), (0, L - 1 - position))
        explanations.append(replace(explanation, relevance=(row,)))
        advance(1)
    explanation = Explanation.joined(explanations)
    method.keep(explanation)
    return explanation.relevance[0]
