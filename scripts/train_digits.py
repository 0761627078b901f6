"""Train the small Vision Mamba that ships in ``tutorials/digits``.

The model is ``tutorials.vision_mamba.VisionMamba``. It is trained on a CPU, from the digits of scikit-learn's
``load_digits`` alone, on canvases of two kinds: one digit anywhere, and two digits side by side of which the one from
0 to 4 is the answer and the one from 5 to 9 distracts.

Run from the root of the repository, with torch, safetensors and scikit-learn installed::

    python -m scripts.train_digits --out tutorials/digits

Weights are chosen on the validation digits; the test digits are read once, at the end, by the model as reloaded from
disk. No digit is in two parts.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from tutorials.vision_mamba import (
    CANVAS,
    Digits,
    Part,
    VisionMamba,
    digit_images,
    one_digit_canvases,
    paste,
    random_places,
    two_digit_canvases,
)

MODEL: dict[str, Any] = {
    "image_size": CANVAS,
    "patch_size": 2,
    "channels": 1,
    "width": 48,
    "depth": 3,
    "state_size": 4,
    "classes": 10,
    "class_token": "middle",
}
CHECKS = 4
"""How often every held-out digit is placed anew on a canvas of its own, when accuracy is measured."""
PAIRS = 1024
"""Number of held-out canvases with two digits."""


@dataclass(frozen=True)
class Round:
    """One descent from a high learning rate to none."""

    steps: int
    learning_rate: float
    turn: float
    """Radians by which a digit is turned, at most."""
    stretch: float
    """Share by which its height and width change, at most."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result; chosen on the validation digits."""

    seed: int = 0
    threads: int = 1
    rounds: tuple[Round, ...] = (Round(1600, 4e-3, turn=0.15, stretch=0.1), Round(1200, 3e-3, turn=0.25, stretch=0.2))
    batch: int = 64
    warmup: int = 100
    weight_decay: float = 0.05
    clip: float = 1.0
    smoothing: float = 0.05
    check_every: int = 100


def draw(digits: Digits, n: int, deformation: Round, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Draw ``n`` canvases with one digit and ``n`` with two.

    Returns:
        Canvases (2 n, 1, 16, 16) and the digits that decide them (2 n,).
    """
    half = CANVAS // 2
    low, high = (digits.labels < 5).nonzero().squeeze(1), (digits.labels >= 5).nonzero().squeeze(1)
    alone = torch.randint(len(digits.labels), (n,), generator=generator)
    deciding = low[torch.randint(len(low), (n,), generator=generator)]
    distracting = high[torch.randint(len(high), (n,), generator=generator)]
    images = deform(digits.images[torch.cat([alone, deciding, distracting])], deformation, generator)
    rows = random_places((3 * n,), generator)
    left = torch.randint(2, (n,), generator=generator) * half
    columns = torch.cat([random_places((n,), generator), left, half - left])
    one, two, three = paste(images, rows, columns).split(n)
    return torch.cat([one, two + three]).unsqueeze(1), digits.labels[torch.cat([alone, deciding])]


def deform(images: Tensor, deformation: Round, generator: torch.Generator) -> Tensor:
    """Turn and stretch every one of ``images`` (n, 8, 8) a little, about its middle."""
    uniform = 2 * torch.rand(len(images), 3, generator=generator) - 1
    angle = deformation.turn * uniform[:, 0]
    matrix = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).view(-1, 2, 2)
    matrix = matrix * (1 + deformation.stretch * uniform[:, 1:, None])
    grid = F.affine_grid(F.pad(matrix, (0, 1)), [len(images), 1, *images.shape[1:]], align_corners=False)
    return F.grid_sample(images.unsqueeze(1), grid, align_corners=False).squeeze(1)


def accuracies(model: nn.Module, part: Part) -> dict[str, float]:
    """Return the shares of a part's canvases that are named right, for one digit and for two."""
    ones = [one_digit_canvases(part, seed) for seed in range(CHECKS)]
    return {
        "one_digit": sum(right(model, canvases.images, canvases.labels) for canvases in ones) / CHECKS,
        "two_digits": right(model, *two_digit_canvases(PAIRS, part=part)[:2]),
    }


@torch.no_grad()
def right(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Return the share of ``images`` whose largest logit is the label's."""
    answers = torch.cat([model(batch).argmax(1) for batch in images.split(256)])
    return (answers == labels).double().mean().item()


def train(recipe: Recipe) -> VisionMamba:
    """Return the model that named the validation canvases best; every round starts where the last was best."""
    torch.manual_seed(recipe.seed)
    model = VisionMamba(**MODEL)
    for number in range(len(recipe.rounds)):
        train_round(model, recipe, number)
    return model


def train_round(model: VisionMamba, recipe: Recipe, number: int) -> None:
    """Train ``model`` in place for the round ``number``, and leave it as it was when it was best."""
    this = recipe.rounds[number]
    generator = torch.Generator().manual_seed(recipe.seed + number)
    digits = digit_images("train")
    decayed = [p for name, p in model.named_parameters() if name.endswith("weight") and p.ndim > 1]
    others = [p for p in model.parameters() if all(p is not q for q in decayed)]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": recipe.weight_decay}, {"params": others, "weight_decay": 0.0}],
        lr=this.learning_rate,
        betas=(0.9, 0.98),
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer,
        lambda step: min((step + 1) / recipe.warmup, 0.5 * (1 + math.cos(math.pi * step / this.steps))),
    )
    best, best_weights, start = 0.0, {}, time.perf_counter()
    for step in range(1, this.steps + 1):
        images, labels = draw(digits, recipe.batch // 2, this, generator)
        loss = F.cross_entropy(model(images), labels, label_smoothing=recipe.smoothing)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        optimizer.step()
        schedule.step()
        if step % recipe.check_every == 0:
            found = accuracies(model, "validation")
            print(
                f"round {number + 1}  step {step}  loss {loss.item():.3f}  "
                f"validation: one digit {found['one_digit']:.4f}  two digits {found['two_digits']:.4f}  "
                f"{time.perf_counter() - start:.0f} s",
                flush=True,
            )
            if sum(found.values()) > best:
                best = sum(found.values())
                best_weights = {name: value.clone() for name, value in model.state_dict().items()}
    model.load_state_dict(best_weights)


def main() -> None:
    """Train, save, reload and test."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("tutorials/digits"), help="folder of the weights")
    parser.add_argument("--seed", type=int, default=Recipe.seed)
    arguments = parser.parse_args()
    recipe = Recipe(seed=arguments.seed)
    torch.set_num_threads(recipe.threads)
    torch.use_deterministic_algorithms(True)
    model = train(recipe)

    arguments.out.mkdir(parents=True, exist_ok=True)
    save_file(model.state_dict(), arguments.out / "model.safetensors")
    model = VisionMamba(**MODEL)
    model.load_state_dict(load_file(arguments.out / "model.safetensors"))
    parts = {part: accuracies(model, part) for part in ("validation", "test")}
    config = {"model": MODEL, "recipe": asdict(recipe), "accuracy": parts}
    (arguments.out / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    print(json.dumps(parts, indent=2))


if __name__ == "__main__":
    main()
