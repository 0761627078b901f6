"""inseq: a language model's next word, attributed by the method that inseq runs on it; here integrated gradients."""

from __future__ import annotations

import copy
from typing import Any

import inseq
import torch
from torch import Tensor

from benchmarks.methods import STEPS, NotApplicableError, Question
from benchmarks.peers.peer import one_by_one
from benchmarks.peers.words import text, tokenizer


@one_by_one
def integrated_gradients(question: Question) -> Tensor:
    """Return inseq's integrated gradients (1, L) of the logit of the target as the next word.

    inseq's own reference is the unknown token at all places but those of the end token.

    Raises:
        NotApplicableError: If the inputs are images.
    """
    if question.images:
        raise NotApplicableError("inseq explains what a language model writes.")
    ids, reference = question.inputs[0], question.reference[0].tolist()
    words = tokenizer(question.model, unknown=reference[0], end=reference[-1])
    model = copy.deepcopy(question.model)
    # inseq reads the special tokens off the configuration, and lets the model make a state unless that says not to
    model.config.use_cache = False
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(model.config, name, getattr(words, name))
    explainer: Any = inseq.load_model(model, "integrated_gradients", tokenizer=words)
    output = explainer.attribute(
        text(ids),
        text(torch.cat((ids, question.target))),
        attributed_fn=lambda args: question.select(
            args.forward_output.logits[:, -1], torch.zeros(len(args.forward_output.logits), dtype=torch.long)
        ),
        n_steps=STEPS,
        show_progress=False,
    )
    found: Tensor = output.sequence_attributions[0].target_attributions
    return question.by_feature(found[None, : len(ids), 0]).detach()
