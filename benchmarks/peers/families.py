"""Which models a peer explains, and how far its scores are from what they should sum to."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Generator, Tensor, nn

from benchmarks.methods import NotApplicableError, Question
from benchmarks.peers.peer import Explained, Peer, part
from benchmarks.run import MODELS, case
from scripts.method_table import Kind
from tests.conftest import build
from tests.families import FAMILIES, VOCABULARY
from tutorials.vision_mamba import VisionMamba

B, L, TARGET, REFERENCE = 2, 10, 5, 3
"""The size of the inputs; the logit that is explained; the token that each is compared with."""
NAMES = tuple(name for name in FAMILIES if " " not in name)
"""The families of transformers, without their variants."""
TRAINED = ("marker-needle", "two-votes")
"""Tasks whose last token is the same everywhere, so that all libraries can be given one reference."""


class Outside(nn.Module):
    """A classifier of images that leaves torch: nothing but its outputs can be seen.

    Args:
        inside: What it computes.
    """

    def __init__(self, inside: nn.Module) -> None:
        super().__init__()
        self._call = inside.eval().requires_grad_(False).__call__

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes) of images (B, C, H, W)."""
        return torch.from_numpy(self._call(torch.from_numpy(images.detach().numpy())).numpy().copy())


def convolutions() -> nn.Module:
    """Return a small classifier of images of 16 × 16, without any recurrence."""
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(4, 8, 3, padding=1), nn.ReLU(),
        nn.Flatten(), nn.Linear(8 * 8 * 8, 3),
    ).eval()  # fmt: skip


class Determinants(nn.Module):
    """The determinants of matrices: a function that this package has no rule for."""

    def forward(self, matrices: Tensor) -> Tensor:
        """Return the determinants (B, classes) of matrices (B, classes, N, N)."""
        return torch.linalg.det(matrices)


def determinants() -> nn.Module:
    """Return a classifier of images of 16 × 16 by determinants of what it reads linearly."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 27), nn.Unflatten(1, (3, 3, 3)), Determinants()).eval()


def questions() -> Iterator[tuple[str, Question]]:
    """Yield a question about a tiny random model of each family, and about some models of images."""
    ids = torch.randint(REFERENCE + 1, VOCABULARY, (B, L), generator=Generator().manual_seed(1))
    for name in NAMES:
        yield name, asked(build(name), ids, torch.full_like(ids, REFERENCE), TARGET)
    torch.manual_seed(0)
    vision = VisionMamba(image_size=16, patch_size=4, channels=1, width=8, depth=2, state_size=4, classes=3)
    images = torch.rand(B, 1, 16, 16, generator=Generator().manual_seed(1))
    models = {
        "Vision Mamba": vision.eval(),
        "convolutions": convolutions(),
        "determinants": determinants(),
        "outside torch": Outside(convolutions()).eval(),
    }
    for name, model in models.items():
        yield name, asked(model, images, torch.zeros_like(images), 1, patch=4)


def trained() -> Iterator[tuple[str, Question]]:
    """Yield questions about some sequences of models that were trained on tasks of the benchmark."""
    for task in TRAINED:
        for family in MODELS[task]:
            found = case(task, family, seed=0)
            if not isinstance(found, float):
                yield f"{task}, {family}", part(found.questions[0], slice(4))


def asked(model: Any, inputs: Tensor, reference: Tensor, target: int, patch: int = 1) -> Question:
    """Return a question about one logit."""
    return Question(model, inputs, torch.full((len(inputs),), target), reference, torch.zeros(()), patch=patch)


def gap(question: Question, peer: Peer, found: Explained) -> float:
    """Return how far scores and terms are from what they should sum to, as ``docs/methods.md`` has it.

    It is the largest difference over the inputs, relative to the sum of the scores without their signs.
    """
    score = partial(question.score, rows=question.rows)
    kind = Kind("", score, (question.inputs,), (question.reference,), "", ())
    return kind.gap((found.scores,), dict(found.terms), with_reference=peer.sum == "difference")


def tried(peer: Peer, question: Question) -> dict[str, Any]:
    """Return what comes of asking: ``{"sum": ..., "layer": ...}``, either or both, or ``{"refused": why}``."""
    torch.manual_seed(0)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            found = peer.explain(question)
    except NotApplicableError:
        return {"refused": ""}
    except Exception as error:  # whatever it is: it is what a user gets
        return {"refused": f"{type(error).__name__}: {' '.join(str(error).split())}"[:200]}
    errors = {} if peer.sum is None else {"sum": gap(question, peer, found)}
    if found.layer is not None:
        errors["layer"] = found.layer
    return {name: float(f"{error:.1e}") for name, error in errors.items()}


def measured(
    questions: Iterable[tuple[str, Question]], peers: Mapping[str, Peer]
) -> Iterator[tuple[str, dict[str, dict[str, Any]]]]:
    """Yield what comes of asking each peer about a model, by the name of the model."""
    for name, question in questions:
        yield name, {peer: tried(found, own(question)) for peer, found in peers.items()}


def own(question: Question) -> Question:
    """Return the question with inputs of its own: some methods leave theirs changed, above all after an error."""
    return replace(question, inputs=question.inputs.clone(), reference=question.reference.clone())
