"""What is explained, and how the explanations are marked: synthetic tasks, sentences, and canvases with two digits."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Generator, Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.methods import Question
from benchmarks.tasks import CLASSES, TASKS, UNK, Batch
from captum_ssm import metrics, models
from captum_ssm.metrics import Curve
from scripts.train_reviews import rotten_tomatoes_splits
from tutorials.vision_mamba import load_digits_model, two_digit_canvases

SEQUENCES, SENTENCES, CANVASES = 100, 80, 64
"""How many inputs are explained: of a synthetic task, of one draw of sentences, of one draw of canvases."""
JUDGED, ELSEWHERE = 2**31 + 7, 2**31 + 8
"""Seeds of the sequences that are explained, and of others that tell how much each position matters on average."""


@dataclass(frozen=True)
class Marks:
    """How well one method did.

    Attributes:
        figures: By name, a figure for each input, (B,), or one for all of them, ().
        curves: By name, the mean evidence at each step.
    """

    figures: dict[str, Tensor]
    curves: dict[str, Tensor]


class Case(Protocol):
    """A model, and questions of which it can be told how good an explanation is.

    Attributes:
        questions: All inputs; each question those of one length.
        accuracy: Of the model.
    """

    questions: list[Question]
    accuracy: float

    def mark(self, scores: list[Tensor]) -> Marks:
        """Mark the scores (B, N) of each question."""


class Synthetic:
    """A task of :mod:`tasks` and a model that was trained on it: which tokens matter is known.

    The explained sequences are those that the model answers rightly. The last token asks, in all sequences, and is not
    judged.

    Args:
        task: Its name.
        model: The model.
        count: Number of sequences.
        wrong: Explain also the sequences that the model answers wrongly.
    """

    def __init__(self, task: str, model: Any, count: int = SEQUENCES, wrong: bool = False) -> None:
        batch = TASKS[task]().batch(count, Generator().manual_seed(JUDGED))
        elsewhere = TASKS[task]().batch(2000, Generator().manual_seed(ELSEWHERE))
        with torch.no_grad():
            answers = model(batch.ids).logits[:, -1].argmax(-1)
        right = answers == batch.label
        self.accuracy = float(right.float().mean())
        self._batch = batch = Batch(*(part[right | wrong] for part in batch))
        self._signed = task == "two-votes"
        self.questions = [
            Question(
                model,
                batch.ids,
                target=batch.label,
                contrast=sum(CLASSES) - batch.label if self._signed else None,
                reference=torch.cat((torch.full_like(batch.ids[:, 1:], UNK), batch.ids[:, -1:]), dim=1),
                prior=elsewhere.truth.mean(0),
            )
        ]

    def mark(self, scores: list[Tensor]) -> Marks:
        """Mark the scores (B, L)."""
        (found,), truth = scores, self._batch.truth
        judged = torch.ones_like(truth, dtype=torch.bool)
        judged[:, -1] = False
        matters = truth != 0
        figures = {f"{name}, absolute": figure for name, figure in located(found.abs(), matters, judged).items()}
        if self._signed:
            figures["sign accuracy"] = metrics.sign_accuracy(found, truth, mask=judged)
            figures["correlation"] = correlation(found[:, :-1], truth[:, :-1])
            found = torch.where(matters, found * truth.sign(), found.abs())
        return Marks(figures | located(found, matters, judged), {})


def located(scores: Tensor, matters: Tensor, judged: Tensor) -> dict[str, Tensor]:
    """Return AUC, average precision and recall of the entries that matter."""
    found = metrics.localisation(scores, matters, mask=judged)
    return {"AUC": found.auc, "AP": found.average_precision, "recall": found.recall}


def correlation(scores: Tensor, truth: Tensor) -> Tensor:
    """Return the correlation (B,) of scores (B, L) and truth (B, L), 0 where one of them is constant."""
    a, b = (x.double() - x.double().mean(1, keepdim=True) for x in (scores, truth))
    lengths = a.norm(dim=1) * b.norm(dim=1)
    return torch.where(lengths > 0, (a * b).sum(1) / lengths.clamp_min(1e-300), 0.0)


class Sentences:
    """Held-out film reviews and the verdict of the model that ships in the package.

    The verdict is explained, right or wrong, by how far its logit is above the other one's.

    Args:
        draw: Which of the sentences: there is one model, so several draws take the place of several seeds. No sentence
            is in two draws.
        count: Number of sentences.
    """

    def __init__(self, draw: int, count: int = SENTENCES) -> None:
        model: Any = AutoModelForCausalLM.from_pretrained(models.REVIEWS).eval().requires_grad_(False)
        tokenizer = AutoTokenizer.from_pretrained(models.REVIEWS)
        self._unknown, *answers = tokenizer.convert_tokens_to_ids(["<unk>", "negative", "positive"])
        self._answers = torch.tensor(answers)
        held_out = rotten_tomatoes_splits()["test"]
        order = torch.randperm(len(held_out), generator=Generator().manual_seed(0))
        drawn = [held_out[index] for index in order[draw * count : (draw + 1) * count].tolist()]
        by_length: dict[int, list[tuple[list[int], int]]] = {}
        for text, label in drawn:
            ids = tokenizer(text).input_ids
            by_length.setdefault(len(ids), []).append((ids, label))
        self.questions, right = [], 0
        for length, group in sorted(by_length.items()):
            ids, labels = (torch.tensor(part) for part in zip(*group))
            with torch.no_grad():
                verdict = model(ids).logits[:, -1, self._answers].argmax(-1)
            right += int((verdict == labels).sum())
            reference = torch.full_like(ids, self._unknown)
            reference[:, -1] = ids[:, -1]
            self.questions.append(
                Question(
                    model,
                    ids,
                    target=self._answers[verdict],
                    contrast=self._answers[1 - verdict],
                    reference=reference,
                    prior=torch.arange(length) / length,
                )
            )
        self.accuracy = right / len(drawn)

    def mark(self, scores: list[Tensor]) -> Marks:
        """Mark the scores (B, L) of the sentences of each length."""
        parts: dict[str, list[Curve]] = {}
        for question, found in zip(self.questions, scores):
            for name, curve in self._curves(question, found).items():
                parts.setdefault(name, []).append(curve)
        curves = {name: Curve.join(several) for name, several in parts.items()}
        figures = {
            "LeRF - MoRF, replaced": (curves["LeRF, replaced"] - curves["MoRF, replaced"]).area,
            "LeRF - MoRF, deleted": (curves["LeRF, deleted"] - curves["MoRF, deleted"]).area,
            "AUAC": curves["LeRF, replaced"].area,
            "AU-MSE": curves["pruning"].area,
        }
        return Marks(figures, {name: curve.mean for name, curve in curves.items()})

    def _curves(self, question: Question, found: Tensor) -> dict[str, Curve]:
        keep = torch.zeros_like(question.inputs, dtype=torch.bool)
        keep[:, -1] = True
        shared: dict[str, Any] = {"keep": keep, "internal_batch_size": 256}
        judged: dict[str, Any] = {
            "target": (question.target == self._answers[1]).long(),
            "evidence": lambda logits: logits[:, self._answers].softmax(-1),
        }
        forward = partial(_last_logits, question.model)
        return {
            **{
                f"{name}, replaced": metric(
                    forward, question.inputs, found, baselines=self._unknown, **judged, **shared
                )
                for name, metric in (("LeRF", metrics.lerf), ("MoRF", metrics.morf))
            },
            **{
                f"{name}, deleted": metric(forward, question.inputs, found, removal="delete", **judged, **shared)
                for name, metric in (("LeRF", metrics.lerf), ("MoRF", metrics.morf))
            },
            "pruning": metrics.pruning(
                forward,
                question.inputs,
                found,
                baselines=self._unknown,
                evidence=lambda logits: logits[:, self._answers],
                **shared,
            ),
        }


def _last_logits(model: Any, ids: Tensor) -> Tensor:
    """Return the logits of the last token alone, where the sentences are judged: far faster than those of all."""
    logits: Tensor = model(ids, use_cache=False, logits_to_keep=1).logits[:, -1]
    return logits


class Canvases:
    """Canvases with two digits, of which the smaller is the answer, and the Vision Mamba that ships with the tutorials.

    The explained canvases are those that the model answers rightly. Scores are those of its patches.

    Args:
        draw: Seed of the canvases; there is one model, so several draws take the place of several seeds.
        count: Number of canvases.
    """

    def __init__(self, draw: int, count: int = CANVASES) -> None:
        model = load_digits_model().requires_grad_(False)
        canvases = two_digit_canvases(count, seed=draw)
        elsewhere = two_digit_canvases(1000, seed=0, part="train")
        with torch.no_grad():
            right = model(canvases.images).argmax(1) == canvases.labels
        self.accuracy = float(right.float().mean())
        self._masks = canvases.masks[right]
        images = canvases.images[right]
        self._patch = model.patch_embed.proj.kernel_size[0]
        question = partial(Question, model, images, target=canvases.labels[right], patch=self._patch)
        nothing = torch.zeros_like(images)
        masks = elsewhere.masks[:, :1].float()
        prior = question(reference=nothing, prior=nothing).by_feature(masks).mean(0)
        self.questions = [question(reference=nothing, prior=prior)]

    def mark(self, scores: list[Tensor]) -> Marks:
        """Mark the scores (B, patches)."""
        (found,), (question,) = scores, self.questions
        size = question.inputs.shape[-1] // self._patch
        maps = found.unflatten(1, (size, size))
        pixels = (maps / self._patch**2).repeat_interleave(self._patch, 1).repeat_interleave(self._patch, 2)
        overlap = metrics.segmentation(maps, self._masks[:, 0])
        options: dict[str, Any] = {"baselines": 0.0, "patch_size": self._patch, "internal_batch_size": 256}
        curves = {
            "positive perturbation": metrics.positive_perturbation(question.model, question.inputs, pixels, **options),
            "negative perturbation": metrics.negative_perturbation(question.model, question.inputs, pixels, **options),
        }
        ink = self._masks.any(1)
        figures = {
            "pixel accuracy": overlap.right / overlap.judged,
            "mIoU": torch.tensor(overlap.mean_iou),
            "mAP": overlap.average_precision,
            "AUC on ink": metrics.localisation(pixels, self._masks[:, 0], mask=ink).auc,
            **{name: curve.area for name, curve in curves.items()},
        }
        return Marks(figures, {name: curve.mean for name, curve in curves.items()})
