"""Measure which method explains which kind of model; ``--write`` puts it into ``docs/methods.md``.

Run it from the repository with the package's ``test`` extra installed::

    python -m scripts.method_table --write
"""

from __future__ import annotations

import argparse
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from captum_ssm import (
    FidelityError,
    ImplicitAttentionAttribution,
    ImplicitAttentionRelevance,
    ImplicitAttentionRollout,
    InvalidInputError,
    LayerImplicitAttentionRelevance,
    ModelStateError,
    NeuronImplicitAttentionRelevance,
    RawImplicitAttention,
    UnsupportedModelError,
)
from tests.conftest import build
from tests.families import VOCABULARY
from tests.test_any_model import Fused, Series, filled, inputs, known
from tests.test_causes import LoraLinear
from tests.test_function_models import MODELS
from tutorials.vision_mamba import VisionMamba

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "methods.md"
REFUSALS = (UnsupportedModelError, InvalidInputError, ModelStateError, FidelityError)
B, L = 2, 10
TITLE = """# Which method explains which kind of model

`ImplicitAttentionRelevance` needs no layer that it knows. Any module or callable that is written in torch is followed
function by function, a loop over tokens step by step, with inputs of any shape, several of them, and one score for each
example. The layers that it knows still run by their decomposition; `method.followed` says which did. Rollout, raw and
gradient-weighted attention need [layers that they know](layers.md), and no other layer that mixes tokens.

## Measured

Each row is a small model of random weights, each column a method, and each figure was measured by
`python -m scripts.method_table --write` on a CPU, in float32, or in float64 if the model has complex weights. *Exact*
gives the largest relative error, rounded up to a power of ten, from 1e-07 on:

* of **relevance**: of the sum of all scores and terms against the difference F(x) − F(x′) that the model itself makes,
  or, with frozen gates, against F(x); relative to the sum of the scores without their signs. *At a layer* the same, if
  every path passes the layer; else, and *of a neuron*, it is `method.completeness`, with a reference.
* of **rollout**, **raw** attention and **gradient**-weighted attribution, whose scores have no such sum: of the
  decomposition of any layer against the layer's own output.

*No* is a refusal, with the number of its cause below the table: no method returns scores that it cannot vouch for.
Models of the layers of mamba_ssm and flash-linear-attention need an environment of their own and have no row here;
`make test-native` runs the methods on them."""


@dataclass
class Kind:
    """A kind of model, with a call to explain."""

    name: str
    forward: Callable[..., Any]
    inputs: tuple[Tensor, ...]
    baselines: tuple[Any, ...]
    layer: str
    """A layer whose input is explained, and the output of which has the neuron."""
    neuron: tuple[int, ...]
    target: int | None = None
    model: nn.Module | None = None
    """The model behind a callable, if it is passed too."""
    args: tuple[Any, ...] = ()
    through: bool = True
    """Whether every path from the inputs to the score passes the layer."""

    def score(self, inputs: tuple[Tensor, ...]) -> Tensor:
        """Return the score that is explained (B,), by the model's own run."""
        with torch.no_grad():
            output = self.forward(*inputs, *self.args)
        output = output.logits[:, -1] if hasattr(output, "logits") else output
        return output if self.target is None else output[:, self.target]

    @property
    def reference(self) -> tuple[Tensor, ...]:
        """The inputs of the reference."""
        return tuple(torch.as_tensor(b).to(x).expand_as(x) for b, x in zip(self.baselines, self.inputs))

    @property
    def baseline(self) -> Any:
        """The baselines as a method takes them."""
        return self.baselines if len(self.inputs) > 1 else self.baselines[0]

    def gap(self, scores: tuple[Tensor, ...], terms: dict[str, Tensor], with_reference: bool) -> float:
        """Return how far the sum of scores and terms is from what the model itself gives, relative to their size."""
        expected = self.score(self.inputs) - (self.score(self.reference) if with_reference else 0)
        parts = torch.cat([each.reshape(len(expected), -1) for each in (*scores, *terms.values())], dim=1)
        return float(((parts.sum(1) - expected).abs() / parts.abs().sum(1)).max())

    def call(self, method: Any, *before: Any, **options: Any) -> tuple[Tensor, ...]:
        """Return a method's scores, always as a tuple."""
        only = self.inputs[0] if len(self.inputs) == 1 else self.inputs
        found = method.attribute(only, *before, additional_forward_args=self.args or None, **options)
        return found if isinstance(found, tuple) else (found,)


def kinds() -> Iterator[Kind]:
    """Yield all rows of the table."""
    ids = torch.randint(1, VOCABULARY, (B, L), generator=torch.Generator().manual_seed(1))
    mamba = build("mamba")
    text: dict[str, Any] = {"inputs": (ids,), "baselines": (3,), "target": 5}
    inside: dict[str, Any] = {"layer": "backbone.norm_f", "neuron": (4, 2)}
    yield Kind("language model of transformers: Mamba", mamba, **text, **inside)
    jamba = build("jamba")
    yield Kind(
        "hybrid of transformers, with attention and experts: Jamba", jamba, **text, layer="model.final_layernorm",
        neuron=(4, 2),
    )  # fmt: skip
    log_probability = lambda ids: mamba(ids).logits[:, -1].log_softmax(-1)  # noqa: E731
    yield Kind("the same Mamba behind a callable, with `model=`", log_probability, **text, **inside, model=mamba)
    yield Kind("the same without `model=`", log_probability, **text, **inside)
    tuned = build("mamba")
    for block in tuned.backbone.layers:
        block.mixer.in_proj = LoraLinear(block.mixer.in_proj)
    yield Kind("fine-tuned by LoRA, not merged", filled(tuned), **text, **inside)

    torch.manual_seed(0)
    vision = VisionMamba(image_size=16, patch_size=4, channels=1, width=8, depth=2, state_size=4, classes=3).eval()
    yield Kind("images: Vision Mamba", vision, (inputs(B, 1, 16, 16),), (0.0,), "head", (1,), target=1)

    series, reference = (inputs(B, L, 3),), (inputs(B, L, 3, seed=2),)
    own, mixed = filled(Series()), Series()
    mixed.mixers[1] = known()
    yield Kind("recurrence of one's own, a loop", own, series, reference, "head", (1,), target=1)
    yield Kind("one known layer, one of one's own", filled(mixed), series, reference, "head", (1,), target=1)
    fused = filled(Fused())
    several = *series, inputs(B, 5), torch.arange(B * L).reshape(B, L) % 7
    references = (*reference, 0.0, 3)
    yield Kind(
        "several inputs: series, features and ids", fused, several, references, "table", (1,), target=1, through=False
    )
    yield Kind(
        "forecaster with features that are not explained", lambda x, features: fused(x, features, several[2]), series,
        reference, "series.head", (1,), target=0, model=fused, args=(several[1],),
    )  # fmt: skip
    insides = {
        "U-Net": ("segmenter: U-Net", "first", (0, 1, 1)),
        "convolution and LSTM": ("convolutions and an LSTM", "head", (0,)),
        "S4D": ("state space by Fourier transforms: S4D", "out", (3, 2)),
        "Hyena": ("long convolutions between gates: Hyena", "into", (3, 2)),
        "LRU": ("complex recurrence: LRU", "gate", (3, 2)),
        "transformer": ("transformer of torch, with padding", "head", (0,)),
        "retrieval": ("retrieval: GRU and cosine similarity", "cell", (2,)),
    }
    for name, (title, layer, neuron) in insides.items():
        create, shape = MODELS[name]
        torch.manual_seed(0)
        model, x, r = create().eval(), inputs(*shape), 0.1 * inputs(*shape, seed=2)
        wide = any(p.dtype == torch.cdouble for p in model.parameters())
        model, x, r = (model.double(), x.double(), r.double()) if wide else (model, x, r)
        yield Kind(title, model, (x,), (r,), layer, neuron, through=layer == "head")
    table = filled(nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 2)))
    yield Kind("table of features: MLP", table, (inputs(B, 6),), (0.0,), "2", (1,), target=1)
    bag = lambda x: (lambda h: (h[:, :1].softmax(0) * h[:, 1:]).sum(0))(table(x))  # noqa: E731
    yield Kind("bag of instances with one score, a callable", bag, (inputs(7, 6),), (0.0,), "0", (1,), model=table)
    outside = lambda x: torch.as_tensor(table(x).detach().numpy() ** 2)  # noqa: E731
    yield Kind(
        "a callable that leaves torch (NumPy)", outside, (inputs(B, 6),), (0.0,), "2", (1,), target=1, model=table
    )
    scripted = torch.jit.trace(table, inputs(B, 6))
    yield Kind("code of `torch.jit`", scripted, (inputs(B, 6),), (0.0,), "2", (1,), target=1)
    noisy = lambda x: table(x + torch.normal(x, 1.0))  # noqa: E731
    yield Kind("random, even in evaluation", noisy, (inputs(B, 6),), (0.0,), "2", (1,), target=1, model=table)


# --- The methods ---------------------------------------------------------------------------------------------------


def of_matrices(method: Callable[..., Any], **options: Any) -> Callable[[Kind], float]:
    """Return the measurement of a method that reads the matrices of layers."""

    def measure(kind: Kind) -> float:
        made = method(kind.forward, kind.model, **options)
        assert all(scores.isfinite().all() for scores in kind.call(made, target=kind.target))
        return max(made.fidelity.values())

    return measure


def of_sum(with_reference: bool) -> Callable[[Kind], float]:
    """Return the measurement of relevance: how far scores and terms are from the model's own difference."""

    def measure(kind: Kind) -> float:
        method = ImplicitAttentionRelevance(kind.forward, kind.model)
        scores = kind.call(method, target=kind.target, baselines=kind.baseline if with_reference else None)
        assert all(s.shape == x.shape for s, x in zip(scores, kind.inputs))
        return kind.gap(scores, method.terms, with_reference)

    return measure


def at_layer(kind: Kind) -> float:
    """Measure relevance at the input of a layer."""
    method = LayerImplicitAttentionRelevance(kind.forward, kind.layer, kind.model)
    scores = kind.call(method, target=kind.target, baselines=kind.baseline)
    assert all(each.isfinite().all() for each in scores)
    return kind.gap(scores, method.terms, True) if kind.through else method.completeness


def of_neuron(kind: Kind) -> float:
    """Measure the relevance of a neuron."""
    method = NeuronImplicitAttentionRelevance(kind.forward, kind.layer, kind.model)
    scores = kind.call(method, kind.neuron, baselines=kind.baseline)
    assert all(each.isfinite().all() for each in scores)
    return method.completeness


METHODS: dict[str, Callable[[Kind], float]] = {
    "relevance, reference": of_sum(True),
    "relevance, frozen gates": of_sum(False),
    "at a layer": at_layer,
    "of a neuron": of_neuron,
    "rollout": of_matrices(ImplicitAttentionRollout),
    "raw": of_matrices(RawImplicitAttention),
    "gradient": of_matrices(ImplicitAttentionAttribution, rectify=None),
}


# --- The page ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """The outcome of one method on one kind: an error, or a cause."""

    error: float = math.nan
    cause: str = ""


def measure(kind: Kind, method: Callable[[Kind], float]) -> Cell:
    """Return the outcome of one method on one kind of model."""
    torch.manual_seed(0)
    try:
        return Cell(error=method(kind))
    except REFUSALS as error:
        return Cell(cause=cause(str(error)))


def cause(message: str) -> str:
    """Return the first sentence of an error's message, without the name of the model's class."""
    sentence = re.split(r"(?<=[a-z0-9)'\]])[.;] ", " ".join(message.split()))[0].rstrip(".")
    return re.sub(r"^\w+ has no layer that", "The model has no layer that", sentence).replace("|", "\\|")


def results() -> dict[str, tuple[Kind, list[Cell]]]:
    """Return the outcomes of all methods by the name of the kind."""
    return {kind.name: (kind, [measure(kind, method) for method in METHODS.values()]) for kind in kinds()}


def rounded(error: float) -> str:
    """Return an error rounded up to a power of ten, not below that of float32."""
    return f"{10.0 ** math.ceil(math.log10(max(error, 1e-7))):.0e}"


def page(found: dict[str, tuple[Kind, list[Cell]]]) -> str:
    """Return the page in Markdown."""
    causes = list(dict.fromkeys(cell.cause for _, cells in found.values() for cell in cells if cell.cause))
    rows = [["model", *METHODS], ["---"] * (1 + len(METHODS))]
    for name, (_, cells) in found.items():
        shown = [f"no ({1 + causes.index(c.cause)})" if c.cause else f"exact, {rounded(c.error)}" for c in cells]
        rows.append([name, *shown])
    listed = "\n".join(f"{number}. {each}." for number, each in enumerate(causes, 1))
    return f"{TITLE}\n\n{markdown(rows)}\n\n## Causes\n\n{listed}\n"


def markdown(rows: list[list[str]]) -> str:
    """Return rows as a table."""
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def main() -> None:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0] if __doc__ else None)
    parser.add_argument("--write", action="store_true", help="rewrite docs/methods.md")
    write = parser.parse_args().write
    found = results()
    if not write:
        print(page(found))
        return
    PAGE.write_text(page(found), encoding="utf-8")


if __name__ == "__main__":
    main()
