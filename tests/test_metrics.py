"""Metrics restate their definitions, written out as loops, and nothing but the attributions moves them."""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from itertools import permutations
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from captum.attr import FeatureAblation, InputXGradient, IntegratedGradients, LayerIntegratedGradients, Saliency
from torch import Tensor, nn

from captum_ssm import ImplicitAttentionAttribution, ImplicitAttentionRelevance, ImplicitAttentionRollout, metrics
from captum_ssm.errors import InvalidInputError, ModelStateError
from captum_ssm.metrics import Curve, Segmentation
from captum_ssm.metrics.ranking import Ranking
from captum_ssm.network.forward import run_model as model_scores
from captum_ssm.visualization import curves_figure
from tests.families import VOCABULARY
from tests.oracles_metrics import (
    area,
    auc,
    average_precision,
    bilinear,
    descending,
    hits,
    inserted,
    patch_sums,
    segmented,
    taken_away,
    without_patches,
)

TENTHS = [Fraction(k, 10) for k in range(11)]
BATCH, LENGTH, WIDTH, CLASSES = 3, 7, 4, 3
SIZES = [None, 1, 4, 1000]


class Recurrent(nn.Module):
    """Logits (B, classes) of a sequence of any length; a token's place matters."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.state = nn.Linear(WIDTH, WIDTH)
        self.out = nn.Linear(WIDTH, CLASSES)
        self.eval().double().requires_grad_(False)

    def forward(self, inputs: Tensor, shift: Tensor | None = None) -> Tensor:
        x = inputs if inputs.is_floating_point() else self.embedding(inputs)
        if shift is not None:
            x = x + shift.unsqueeze(-1)
        h = torch.zeros_like(x[:, 0])
        for t in range(x.shape[1]):
            h = torch.tanh(self.state(h) + 2 * x[:, t])
        return 4 * self.out(h)


class Vision(nn.Module):
    """Logits (B, classes) of images (B, 2, 6, 4)."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(48, CLASSES)
        self.eval().double().requires_grad_(False)

    def forward(self, images: Tensor) -> Tensor:
        return self.out(images.flatten(1).sin())


@pytest.fixture
def model() -> Recurrent:
    return Recurrent()


@pytest.fixture
def tokens() -> Tensor:
    return torch.randint(1, VOCABULARY, (BATCH, LENGTH))


def probability(model: Callable[[Tensor], Tensor], target: int) -> Callable[[Tensor], float]:
    def score(x: Tensor) -> float:
        exponentials = [math.exp(logit) for logit in model(x[None])[0].tolist()]
        return exponentials[target] / sum(exponentials)

    return score


def same(curve: Curve, example: int, expected: list[float]) -> None:
    assert curve.values[example].tolist() == pytest.approx(expected, abs=1e-12)


# --- Perturbation equals its definition ---------------------------------------------------------------------------

KINDS = ["ids", "embeddings"]


def make(kind: str, model: Recurrent, tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Inputs, attributions of their shape, and baselines that broadcast to them."""
    if kind == "ids":
        return tokens, torch.randn(BATCH, LENGTH), torch.tensor(0)
    return torch.randn(BATCH, LENGTH, WIDTH).double(), torch.randn(BATCH, LENGTH, WIDTH), torch.randn(WIDTH).double()


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_curves_are_the_loops(kind: str, size: int | None, model: Recurrent, tokens: Tensor) -> None:
    """Also with tokens that are kept, a different target for each example, and any batch size."""
    inputs, attributions, baseline = make(kind, model, tokens)
    keep = torch.zeros(BATCH, LENGTH, dtype=torch.bool)
    keep[0, -1] = keep[1, 0] = keep[1, 3] = True
    target = [2, 0, 1]
    kept: dict[str, Any] = {"keep": keep, "internal_batch_size": size}
    common = {**kept, "target": target}
    found = {
        "activation": metrics.activation(model, inputs, attributions, baselines=baseline, **common),
        "morf": metrics.morf(model, inputs, attributions, baselines=baseline, **common),
        "lerf": metrics.lerf(model, inputs, attributions, baselines=baseline, **common),
        "delta": metrics.lerf_minus_morf(model, inputs, attributions, baselines=baseline, **common),
        "pruning": metrics.pruning(model, inputs, attributions, baselines=baseline, **kept),
    }
    for example, x in enumerate(inputs):
        scores = attributions[example].tolist() if kind == "ids" else attributions[example].sum(-1).tolist()
        free = [place for place in range(LENGTH) if not keep[example, place]]
        most = descending(scores, free)
        absolute = descending([abs(score) for score in scores], free)
        full = baseline.expand(x.shape)
        score = probability(model, target[example])
        whole = model(x[None])[0]
        morf, lerf = (taken_away(score, x, order, TENTHS, full) for order in (most, most[::-1]))
        same(found["activation"], example, inserted(score, x, most, TENTHS, full))
        same(found["morf"], example, morf)
        same(found["lerf"], example, lerf)
        same(found["delta"], example, [b - a for a, b in zip(morf, lerf)])

        def error(y: Tensor, whole: Tensor = whole) -> float:
            return sum((a - b) ** 2 for a, b in zip(whole.tolist(), model(y[None])[0].tolist()))

        same(found["pruning"], example, taken_away(error, x, absolute[::-1], TENTHS, full))
        expected = area([float(f) for f in TENTHS], lerf) - area([float(f) for f in TENTHS], morf)
        assert float(found["delta"].area[example]) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("kind", KINDS)
def test_deletion_cuts_tokens_out_and_what_goes_with_them(
    kind: str, size: int | None, model: Recurrent, tokens: Tensor
) -> None:
    inputs, attributions, _ = make(kind, model, tokens)
    shift = torch.randn(BATCH, LENGTH).double()
    keep = F.one_hot(torch.tensor([LENGTH - 1, 0, 3]), LENGTH).bool()
    keep[1, 1] = True  # another number of tokens can go
    found = {
        metric: metric(
            model, inputs, attributions, target=torch.tensor([2, 0, 1]), removal="delete", keep=keep,
            additional_forward_args=shift, internal_batch_size=size,
        )
        for metric in (metrics.morf, metrics.lerf)
    }  # fmt: skip
    embedded = inputs if kind == "embeddings" else model.embedding(inputs)
    for example, x in enumerate(embedded + shift.unsqueeze(-1)):
        scores = (attributions if kind == "ids" else attributions.sum(-1))[example].tolist()
        most = descending(scores, [place for place in range(LENGTH) if not keep[example, place]])
        score = probability(model, [2, 0, 1][example])
        same(found[metrics.morf], example, taken_away(score, x, most, TENTHS, None))
        same(found[metrics.lerf], example, taken_away(score, x, most[::-1], TENTHS, None))


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("side", [1, 2])
@pytest.mark.parametrize("channels", [None, 1, 2])
def test_images_lose_patches(side: int, channels: int | None, size: int | None) -> None:
    model, images = Vision(), torch.randn(BATCH, 2, 6, 4).double()
    pixels = torch.randn(BATCH, 6, 4)
    attributions = pixels if channels is None else torch.randn(BATCH, channels, 6, 4)
    pixels = pixels if channels is None else attributions.sum(1)
    colour = torch.randn(2, 1, 1).double()
    labels = torch.tensor([0, 2, 1])
    fractions = [Fraction(k, 10) for k in range(1, 10)]
    for target in (None, labels, 1):
        arguments: dict[str, Any] = {
            "baselines": colour, "target": target, "patch_size": side, "internal_batch_size": size,
        }  # fmt: skip
        positive = metrics.positive_perturbation(model, images, attributions, **arguments)
        negative = metrics.negative_perturbation(model, images, attributions, **arguments)
        assert positive.fractions.tolist() == pytest.approx([float(fraction) for fraction in fractions])
        for example, image in enumerate(images):
            label = (
                int(model(image[None]).argmax()) if target is None else int(torch.as_tensor(target).expand(3)[example])
            )
            sums = patch_sums(pixels[example].double(), side)
            most = descending(sums, range(len(sums)))
            for curve, order in ((positive, most), (negative, most[::-1])):
                expected = []
                for fraction in fractions:
                    gone = order[: math.floor(fraction * len(order))]
                    logits = model(without_patches(image, colour.flatten(), gone, side)[None])[0].tolist()
                    expected.append(float(logits.index(max(logits)) == label))
                same(curve, example, expected)


@pytest.mark.parametrize("count", range(1, 41))
def test_a_fraction_of_tokens_is_counted_exactly(count: int) -> None:
    """Also where the fractions are rounded to 32 bits, to a little more or less than they should be."""
    inputs = torch.ones(1, count, dtype=torch.float64)
    several: list[dict[str, Any]] = [{}, {"fractions": torch.linspace(0, 1, 11)}]
    for given in several:
        curve = metrics.morf(lambda x: x.sum(1), inputs, inputs, baselines=0, evidence="logit", **given)
        same(curve, 0, [count - math.ceil(fraction * count) for fraction in TENTHS])
    two = lambda x: torch.stack((x.sum(1) - 0.5, torch.zeros(len(x))), dim=1)  # noqa: E731
    fractions = torch.tensor([k / count for k in range(count + 1)], dtype=torch.float32)
    curve = metrics.positive_perturbation(two, inputs, inputs, baselines=0, target=0, fractions=fractions)
    same(curve, 0, [1.0] * count + [0.0])


def test_evidence_is_read_off_the_output_as_asked(model: Recurrent, tokens: Tensor) -> None:
    attributions = torch.randn(BATCH, LENGTH)
    logits = metrics.morf(model, tokens, attributions, baselines=0, target=1, evidence="logit")
    own = metrics.morf(model, tokens, attributions, baselines=0, evidence=lambda output: output[:, 1])
    assert torch.equal(logits.values, own.values)
    assert logits.values[:, 0].tolist() == pytest.approx(model(tokens)[:, 1].tolist())
    default = metrics.morf(model, tokens, attributions, baselines=0, target=1)
    softmax = metrics.morf(model, tokens, attributions, baselines=0, target=1, evidence=lambda o: o.softmax(1))
    assert torch.equal(default.values, softmax.values) and not torch.equal(default.values, logits.values)
    some = metrics.pruning(model, tokens, attributions, baselines=0, evidence=lambda output: output[:, :1])
    first = metrics.pruning(lambda ids: model(ids)[:, :1], tokens, attributions, baselines=0)
    assert torch.equal(some.values, first.values)


@pytest.mark.parametrize("target", [2, [2, 2, 2], torch.tensor(2), torch.tensor([2, 2, 2]), torch.tensor([2]), (2,)])
def test_targets_may_have_any_form_of_captums(target: Any, model: Recurrent, tokens: Tensor) -> None:
    attributions = torch.randn(BATCH, LENGTH)
    curve = metrics.morf(model, tokens, attributions, baselines=0, target=target)
    shorter = metrics.morf(model, tokens, attributions, removal="delete", fractions=[0, 0.5], target=target)
    assert torch.equal(curve.values[:, 0], shorter.values[:, 0])
    assert curve.values[:, 0].tolist() == pytest.approx(model(tokens).softmax(1)[:, 2].tolist())


def test_a_contrast_is_taken_off_the_target(model: Recurrent, tokens: Tensor) -> None:
    """As a probability it is that of the target among the two, and each example may have a contrast of its own."""
    n = len(tokens)
    attributions, contrast = torch.randn(tokens.shape), [(number % 2) * 2 for number in range(n)]
    given: dict[str, Any] = {"baselines": 1, "target": 1}

    def of_two(output: Tensor) -> Tensor:
        return output[:, :2].softmax(-1)[:, 1]

    for metric in (metrics.activation, metrics.morf, metrics.lerf, metrics.lerf_minus_morf):
        two = metric(model, tokens, attributions, contrast=0, **given)
        alike = metric(
            model, tokens, attributions, baselines=1, evidence=lambda output: output[:, :2].softmax(-1)[:, 1]
        )
        assert torch.allclose(two.values, alike.values, atol=1e-6)
        each = metric(model, tokens, attributions, contrast=contrast, evidence="logit", **given)
        for row in range(n):
            one = slice(row, row + 1)
            apart = [metric(model, tokens[one], attributions[one], evidence="logit", baselines=1, target=t)
                     for t in (1, contrast[row])]  # fmt: skip
            assert torch.allclose(each.values[one], (apart[0] - apart[1]).values, atol=1e-5)
    gap = metrics.conservation(model, tokens, attributions, contrast=0, **given)
    assert torch.allclose(gap, metrics.conservation(model, tokens, attributions, baselines=1,
                                                    evidence=lambda output: output[:, 1] - output[:, 0]))  # fmt: skip


def test_a_row_for_each_example_must_come_back(tokens: Tensor) -> None:
    with pytest.raises(InvalidInputError, match="one row for each"):
        metrics.morf(lambda ids: ids[:1].double(), tokens, torch.randn(tokens.shape), baselines=1, evidence="logit")


def test_the_mean_and_its_error() -> None:
    assert metrics.mean_and_error(torch.tensor([1.0, 2.0, 6.0])) == pytest.approx((3.0, (14 / 6) ** 0.5))
    assert math.isnan(metrics.mean_and_error(torch.tensor([1.0]))[1])


def test_a_target_may_name_position_and_class(mamba: nn.Module, ids: Tensor) -> None:
    attributions = torch.randn(ids.shape)
    arguments: dict[str, Any] = {"removal": "delete", "keep": F.one_hot(torch.tensor([6, 6]), 7).bool()}
    whole = metrics.morf(mamba, ids, attributions, target=3, **arguments)
    every = lambda ids: mamba(ids, use_cache=False).logits  # noqa: E731
    targets: list[Any] = [(-1, 3), [(-1, 3), (-1, 3)]]
    for target in targets:
        curve = metrics.morf(every, ids, attributions, target=target, **arguments)
        assert torch.allclose(whole.values, curve.values, atol=1e-6)


# --- Laws ---------------------------------------------------------------------------------------------------------


def test_the_best_order_is_the_best() -> None:
    """On an additive model no other order has a smaller area under MoRF, a larger one under LeRF or activation."""
    weights = torch.tensor([0.3, -1.0, 2.0, 0.7, -0.2])
    inputs = torch.ones(1, 5)
    areas = {}
    for order in permutations(range(5)):
        scores = torch.tensor([order], dtype=torch.float32)
        areas[order] = [
            float(metric(lambda x: x @ weights, inputs, scores, baselines=0, evidence="logit").area)
            for metric in (metrics.morf, metrics.lerf, metrics.activation, metrics.lerf_minus_morf)
        ]
    best = areas[tuple(weights.argsort().argsort().tolist())]
    smallest, *largest = zip(*areas.values())
    assert best[0] == pytest.approx(min(smallest))
    assert best[1:] == pytest.approx([max(column) for column in largest])


@pytest.mark.parametrize("removal", ["replace", "delete"])
def test_negation_swaps_morf_and_lerf(removal: Any, model: Recurrent, tokens: Tensor) -> None:
    """Also where scores are equal."""
    attributions = torch.randint(-1, 2, (BATCH, LENGTH)).float()
    keep = torch.zeros(BATCH, LENGTH, dtype=torch.bool).index_fill_(1, torch.tensor([LENGTH - 1]), True)
    arguments: dict[str, Any] = {
        "target": 0, "removal": removal, "keep": keep, "baselines": 0 if removal == "replace" else None,
    }  # fmt: skip
    morf = metrics.morf(model, tokens, -attributions, **arguments)
    lerf = metrics.lerf(model, tokens, attributions, **arguments)
    assert torch.equal(morf.values, lerf.values)
    delta, opposite = (metrics.lerf_minus_morf(model, tokens, sign * attributions, **arguments) for sign in (1, -1))
    assert torch.equal(delta.values, -opposite.values)
    equal = metrics.lerf_minus_morf(model, tokens, torch.zeros(BATCH, LENGTH), **arguments)
    assert not equal.values.any()


def test_activation_is_lerf_from_the_other_end(model: Recurrent) -> None:
    tokens, attributions = torch.randint(1, VOCABULARY, (4, 10)), torch.randn(4, 10)
    activation = metrics.activation(model, tokens, attributions, baselines=0, target=1)
    lerf = metrics.lerf(model, tokens, attributions, baselines=0, target=1)
    assert torch.allclose(activation.values, lerf.values.flip(1), atol=1e-12)
    assert torch.allclose(activation.area, lerf.area, atol=1e-12)


def test_only_the_order_of_scores_matters(model: Recurrent, tokens: Tensor) -> None:
    attributions = torch.randn(BATCH, LENGTH)
    curves = [
        metrics.morf(model, tokens, scores, baselines=0, target=1).values
        for scores in (attributions, 3 * attributions - 7, attributions.exp(), attributions.double())
    ]
    assert all(torch.equal(curves[0], other) for other in curves)


def test_equal_scores_are_taken_in_random_order() -> None:
    """Where position 0 alone matters: equal, random and position-only scores stay at chance if it is not known."""
    count, length = 3000, 8
    inputs = torch.rand(count, length, generator=torch.Generator().manual_seed(3))
    model = lambda x: (x[:, 0] > 0).double()  # noqa: E731
    arguments: dict[str, Any] = {
        "baselines": 0,
        "evidence": "logit",
        "fractions": [k / length for k in range(length + 1)],
    }
    for scores in (torch.zeros_like(inputs), metrics.random_attributions(inputs)):
        mean = metrics.morf(model, inputs, scores, **arguments).mean  # the share of examples that still have it
        expected = torch.linspace(1, 0, length + 1, dtype=torch.float64)
        error = (expected * (1 - expected) / count).sqrt()
        assert bool(((mean - expected).abs() <= 4 * error).all()), (mean, expected)
    first, other = (metrics.morf(model, inputs, torch.zeros_like(inputs), seed=seed, **arguments) for seed in (0, 1))
    again = metrics.morf(model, inputs, torch.zeros_like(inputs), seed=0, **arguments)
    assert torch.equal(first.values, again.values) and not torch.equal(first.values, other.values)


def test_minus_zero_is_zero(model: Recurrent, tokens: Tensor) -> None:
    zeros = torch.zeros(BATCH, LENGTH)
    signed = torch.where(torch.rand(BATCH, LENGTH) < 0.5, zeros, -zeros)
    plain, mixed = (metrics.morf(model, tokens, scores, baselines=0, target=1) for scores in (zeros, signed))
    assert torch.equal(plain.values, mixed.values)


@pytest.mark.parametrize("metric", [metrics.activation, metrics.pruning, metrics.lerf_minus_morf, metrics.morf])
def test_an_example_alone_is_as_in_a_batch(metric: Callable[..., Curve], model: Recurrent, tokens: Tensor) -> None:
    """Also if its scores are equal, so that the order is drawn."""
    attributions = torch.randint(0, 2, (BATCH, LENGTH)).float()
    arguments: dict[str, Any] = {"baselines": 0, "evidence": lambda output: output[:, 1]}
    whole = metric(model, tokens, attributions, **arguments)
    parts = [metric(model, tokens[k : k + 1], attributions[k : k + 1], **arguments) for k in range(BATCH)]
    assert torch.allclose(whole.values, Curve.join(parts).values, atol=1e-12)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("removal", ["replace", "delete"])
@pytest.mark.parametrize("form", ["transformers", "callable"])
def test_padding_is_neither_perturbed_nor_counted(form: str, removal: Any, side: str, mamba: nn.Module) -> None:
    """A padded batch has the curves of its sequences one by one, also where scores are equal."""
    sequences = [torch.randint(1, VOCABULARY, (length,)) for length in (5, 8, 3)]
    attributions = [torch.randint(0, 3, sequence.shape).float() for sequence in sequences]

    def padded(rows: list[Tensor], value: float) -> Tensor:
        before = (lambda k: (8 - k, 0)) if side == "left" else (lambda k: (0, 8 - k))
        return torch.stack([F.pad(row, before(len(row)), value=value) for row in rows])

    ids, scores = padded(sequences, 0), padded(attributions, 100.0)  # padding is said to matter most
    mask, last = (
        padded([row(s) for s in sequences], 0) for row in (torch.ones_like, lambda s: torch.arange(len(s)) + 1)
    )
    keep = last == mask.sum(1, keepdim=True)
    baselines = 4 if removal == "replace" else None
    if form == "transformers":
        found = metrics.morf(
            mamba, ids, scores, baselines=baselines, target=3, additional_forward_args=mask, keep=keep, removal=removal
        )
    else:
        found = metrics.morf(
            lambda ids, mask: model_scores(mamba, ids, mask), ids, scores, baselines=baselines, target=3,
            additional_forward_args=mask, keep=keep | (mask == 0), removal=removal,
        )  # fmt: skip
    for example, (sequence, own) in enumerate(zip(sequences, attributions)):
        kept = torch.arange(len(sequence))[None] == len(sequence) - 1
        alone = metrics.morf(
            mamba, sequence[None], own[None], baselines=baselines, target=3, keep=kept, removal=removal
        )
        assert torch.allclose(found.values[example], alone.values[0], atol=1e-6)


def test_nothing_is_changed(mamba: Any, ids: Tensor, unchanged: Any) -> None:
    attributions = torch.randn(ids.shape)
    embeddings = mamba.get_input_embeddings()(ids).detach().requires_grad_()
    images = torch.rand(2, 3, 4, 4)
    with unchanged(mamba, ids, attributions, embeddings, images):
        for metric in (metrics.activation, metrics.morf, metrics.lerf, metrics.lerf_minus_morf):
            for inputs in (ids, embeddings):
                metric(mamba, inputs, attributions, baselines=0, target=3)
        metrics.pruning(mamba, ids, attributions, baselines=0)
        metrics.morf(mamba, ids, attributions, target=3, removal="delete", fractions=[0, 0.5])
        metrics.conservation(mamba, embeddings, embeddings, baselines=0, target=3)
        metrics.positive_perturbation(lambda x: x.flatten(1), images, images, baselines=0)
        metrics.segmentation(images, images[:, 0] > 0.5)
        metrics.localisation(attributions, attributions > 0)
        metrics.random_attributions(ids)
        metrics.position_attributions(attributions)
    with torch.inference_mode():
        curve = metrics.morf(mamba, ids, attributions, baselines=0, target=3)
    assert torch.equal(curve.values, metrics.morf(mamba, ids, attributions, baselines=0, target=3).values)
    assert not curve.values.requires_grad


def test_any_attribution_of_captum_is_taken(mamba: Any, ids: Tensor) -> None:
    """Of token ids, of embeddings, as tuples, and of the embedding layer for token ids."""
    embeddings = mamba.get_input_embeddings()(ids).detach().requires_grad_()
    read = lambda inputs: model_scores(mamba, inputs)  # noqa: E731
    layer = LayerIntegratedGradients(read, mamba.get_input_embeddings())
    ablation = FeatureAblation(read)
    of_ids = [
        method(mamba).attribute(ids, target=3)
        for method in (ImplicitAttentionAttribution, ImplicitAttentionRollout, ImplicitAttentionRelevance)
    ]
    of_ids += [layer.attribute(ids, baselines=0 * ids, target=3, n_steps=2), ablation.attribute(ids, target=3)]
    of_ids += [(of_ids[0],), of_ids[0].to(torch.bfloat16)]
    for attributions in of_ids:
        assert metrics.lerf_minus_morf(mamba, ids, attributions, baselines=0, target=3).values.shape == (2, 11)
    of_embeddings = [
        method(read).attribute(embeddings, target=3) for method in (Saliency, InputXGradient, IntegratedGradients)
    ]
    of_embeddings += [ImplicitAttentionAttribution(mamba).attribute((embeddings,), target=3), of_ids[0]]
    for attributions in of_embeddings:
        curve = metrics.lerf_minus_morf(mamba, (embeddings,), attributions, baselines=0, target=3)
        assert curve.values.shape == (2, 11)
    by_ids = metrics.morf(mamba, ids, of_ids[0], baselines=0, target=3)
    vector = mamba.get_input_embeddings().weight[0].detach()
    by_embeddings = metrics.morf(mamba, embeddings, of_ids[0], baselines=vector, target=3)
    assert torch.allclose(by_ids.values, by_embeddings.values, atol=1e-6)


def test_arguments_go_with_their_examples(model: Recurrent, tokens: Tensor) -> None:
    """Tensors with a row for each example do, all else is shared."""
    factor, attributions = torch.randn(BATCH).double(), torch.randn(BATCH, LENGTH)
    forward = lambda ids, factor, power: (model(ids) * factor.unsqueeze(1)) ** power  # noqa: E731
    found = metrics.morf(
        forward, tokens, attributions, baselines=0, target=1, additional_forward_args=(factor, 3), internal_batch_size=2
    )
    for k in range(BATCH):
        alone = metrics.morf(
            lambda ids, k=k: (model(ids) * factor[k]) ** 3, tokens[k : k + 1], attributions[k : k + 1], baselines=0,
            target=1,
        )  # fmt: skip
        assert torch.allclose(found.values[k], alone.values[0], atol=1e-12)


def test_components_are_summed_in_single_precision_and_no_graph_is_kept() -> None:
    seen = []

    def first(x: Tensor) -> Tensor:
        seen.append(torch.is_grad_enabled())
        return x[:, 0, 0]

    inputs = torch.ones(1, 2, 2, requires_grad=True)
    attributions = torch.tensor([[[256.0, 1.0], [256.0, 0.0]]], dtype=torch.bfloat16)
    for seed in range(8):  # equal scores would be taken in the other order for some seed
        curve = metrics.morf(
            first, inputs, attributions, baselines=0, evidence="logit", seed=seed, fractions=[0, 0.5, 1]
        )
        same(curve, 0, [1, 0, 0])
    assert not any(seen)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_curves_of_half_precision_are_measured_in_single(dtype: torch.dtype) -> None:
    inputs = torch.ones(1, 10, dtype=dtype)
    curve = metrics.morf(lambda x: x[:, :2], inputs, inputs, baselines=0, target=1)
    assert curve.values.dtype == torch.float32 and curve.values[0, 0] == 0.5


def test_progress_counts_every_row(model: Recurrent, tokens: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Any] = []

    @contextmanager
    def bar(name: str, total: int, show: bool, unit: str) -> Iterator[Callable[[int], None]]:
        done: list[int] = []
        yield done.append
        seen.append((name, total, show, sum(done)))

    monkeypatch.setattr("captum_ssm.metrics.trial.progress_bar", bar)
    arguments: dict[str, Any] = {"target": 1, "internal_batch_size": 2}
    metrics.morf(model, tokens, torch.randn(BATCH, LENGTH), baselines=0, show_progress=True, **arguments)
    metrics.lerf_minus_morf(
        model, tokens, torch.randn(BATCH, LENGTH), removal="delete", fractions=[0, 0.5], **arguments
    )
    assert [row[1:] for row in seen] == [(33, True, 33), (6, False, 6), (6, False, 6)]
    assert "morf" in seen[0][0] and "lerf" in seen[1][0]


# --- Curves -------------------------------------------------------------------------------------------------------


def test_a_curve_has_mean_error_and_area() -> None:
    fractions, values = torch.tensor([0.0, 0.1, 0.5, 1.0]).double(), torch.randn(5, 4).double()
    curve = Curve(fractions, values)
    for k, row in enumerate(values.tolist()):
        assert float(curve.area[k]) == pytest.approx(area(fractions.tolist(), row))
    assert curve.mean.tolist() == pytest.approx([sum(column) / 5 for column in values.T.tolist()])
    assert curve.standard_error.tolist() == pytest.approx((values.numpy().std(0, ddof=1) / math.sqrt(5)).tolist())
    assert bool(Curve(fractions, values[:1]).standard_error.isnan().all())
    joined = Curve.join([Curve(fractions, values[:2]), Curve(fractions, values[2:])])
    assert torch.equal(joined.values, values)
    assert not (curve - joined).values.any()


def test_curves_that_do_not_fit_are_refused() -> None:
    curve, other = Curve(torch.tensor([0, 1.0]), torch.ones(2, 2)), Curve(torch.tensor([0, 0.5]), torch.ones(2, 2))
    for refused in (
        lambda: curve - other,
        lambda: curve - Curve(curve.fractions, torch.ones(3, 2)),
        lambda: Curve.join([curve, other]),
        lambda: Curve.join([]),
        lambda: Curve(torch.tensor([0, 1.0]), torch.ones(2)),
        lambda: Curve(torch.tensor([0, 1.0]), torch.ones(2, 3)),
    ):
        with pytest.raises(InvalidInputError):
            refused()


def test_a_picture_shows_means_and_errors() -> None:
    fractions = torch.linspace(0, 1, 11)
    curves = {
        name: Curve(fractions, torch.rand(count, 11))
        for name, count in (("relevance", 6), ("_$x^{\\frac$ <unk>", 6), ("one", 1))
    }
    figure = curves_figure(curves, title="$ what", ylabel="p_$")
    figure.savefig("/dev/null", format="png")
    (axes,) = figure.axes
    for line, curve in zip(axes.lines, curves.values()):
        assert np.allclose(line.get_xdata(), fractions) and np.allclose(line.get_ydata(), curve.mean)
    assert len(axes.lines) == 3 and len(axes.collections) == 2
    for band, curve in zip(axes.collections, curves.values()):
        heights = np.asarray(band.get_paths()[0].vertices)[:, 1]
        assert heights.max() == pytest.approx(float((curve.mean + curve.standard_error).max()))
        assert heights.min() == pytest.approx(float((curve.mean - curve.standard_error).min()))
    (legend,) = figure.legends
    for text, (name, curve) in zip(legend.get_texts(), curves.items()):
        assert text.get_text().startswith(f"{name}: {curve.area.mean():.3f}")
    assert len(legend.get_texts()) == 3
    assert len({(line.get_color(), line.get_marker()) for line in axes.lines}) == 3
    assert axes.get_title(loc="left") == "$ what" and axes.get_ylabel().startswith("p_$")
    assert "6 examples" in curves_figure({"relevance": curves["relevance"]}).axes[0].get_title(loc="left")


def test_many_curves_can_be_told_apart() -> None:
    curve = Curve(torch.tensor([0, 1.0]), torch.rand(2, 2))
    lines = curves_figure({f"method {k}": curve for k in range(14)}).axes[0].lines
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 14


def test_pictures_of_nothing_are_refused() -> None:
    for curves in ({}, {"nan": Curve(torch.tensor([0, 1.0]), torch.full((2, 2), torch.nan))},
                   {"none": Curve(torch.tensor([0, 1.0]), torch.ones(0, 2))}):  # fmt: skip
        with pytest.raises(InvalidInputError):
            curves_figure(curves)


# --- Localisation -------------------------------------------------------------------------------------------------


def drawn(seed: int, length: int, levels: int) -> tuple[Tensor, Tensor, Tensor]:
    """Scores with ties, a truth with both kinds in every example, and a mask that leaves both."""
    random = torch.Generator().manual_seed(seed)
    scores = torch.randint(-levels, levels, (6, length), generator=random).double() / 3
    truth = torch.rand(6, length, generator=random) < 0.4
    mask = torch.rand(6, length, generator=random) < 0.8
    truth[:, 0], truth[:, 1], mask[:, :2] = True, False, True
    return scores, truth, mask


@pytest.mark.parametrize("levels", [1, 2, 1000])
@pytest.mark.parametrize("seed", range(4))
def test_ranks_are_those_of_the_loops(seed: int, levels: int) -> None:
    scores, truth, mask = drawn(seed, 6, levels)
    found = metrics.localisation(scores, truth, mask=mask)
    for k in range(6):
        own, true = (tensor[k][mask[k]].tolist() for tensor in (scores, truth))
        assert float(found.auc[k]) == pytest.approx(auc(own, true))
        assert float(found.average_precision[k]) == pytest.approx(average_precision(own, true))
        count = sum(true)
        assert float(found.recall[k]) == pytest.approx(hits(own, true, count) / count)
        for first in range(1, int(mask.sum(1).min()) + 1):
            at = metrics.localisation(scores, truth, mask=mask, k=first)
            assert float(at.recall[k]) == pytest.approx(hits(own, true, first) / count)
            assert float(at.precision[k]) == pytest.approx(hits(own, true, first) / first)
    assert torch.equal(found.recall, found.precision)
    each = metrics.localisation(scores, truth, mask=mask, k=(truth & mask).sum(1))
    assert torch.equal(each.recall, found.recall)


@pytest.mark.parametrize("levels", [1, 3, 1000])
@pytest.mark.parametrize("seed", range(5))
def test_auc_and_average_precision_are_scikit_learns(seed: int, levels: int) -> None:
    sklearn = pytest.importorskip("sklearn.metrics")
    scores, truth, mask = drawn(seed, 50, levels)
    found = metrics.localisation(scores, truth, mask=mask)
    for k in range(6):
        own, true = (tensor[k][mask[k]].numpy() for tensor in (scores, truth))
        assert float(found.auc[k]) == pytest.approx(sklearn.roc_auc_score(true, own), abs=1e-12)
        assert float(found.average_precision[k]) == pytest.approx(sklearn.average_precision_score(true, own), abs=1e-12)


def test_localisation_sums_what_belongs_to_a_token_or_pixel() -> None:
    truth = torch.tensor([[True, False, False, True]])
    wide = torch.randn(1, 4, 5)
    assert metrics.localisation((wide,), truth) == metrics.localisation(wide.sum(-1), truth)
    images, where = torch.randn(2, 3, 4, 4), torch.rand(2, 4, 4) < 0.5
    of_pixels, of_channels = (metrics.localisation(a, where).auc for a in (images.sum(1), images))
    assert torch.equal(of_pixels, of_channels)
    flat = metrics.localisation(images.sum(1).flatten(1), where.flatten(1)).auc
    assert torch.equal(of_pixels, flat)


def test_equal_scores_are_at_chance() -> None:
    truth = torch.tensor([[True, False, False, True, False]])
    found = metrics.localisation(torch.zeros(1, 5), truth)
    assert found.auc.item() == 0.5 and found.recall.item() == pytest.approx(0.4) == found.average_precision.item()
    assert metrics.localisation(truth.float(), truth).auc.item() == 1
    opposite = metrics.localisation(-truth.float(), truth)
    assert opposite.auc.item() == 0 == opposite.recall.item()


def test_signs_are_right_or_wrong() -> None:
    scores, truth = torch.randn(5, 9), torch.randint(-2, 3, (5, 9)).float()
    scores[0, 0], truth[:, 0] = 0.0, 1.0
    mask = torch.ones(5, 9)
    mask[:, -2:] = 0
    found = metrics.sign_accuracy(scores, truth, mask=mask)
    for k in range(5):
        right = [
            (s > 0) == (t > 0) and s != 0 for s, t in zip(scores[k, :-2].tolist(), truth[k, :-2].tolist()) if t != 0
        ]
        assert float(found[k]) == pytest.approx(sum(right) / len(right))
    assert metrics.sign_accuracy(truth, truth).min() == 1 and metrics.sign_accuracy(-truth, truth).max() == 0


# --- Segmentation -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(5, 7), (2, 3), (10, 14)])
def test_segmentation_is_the_loops(shape: tuple[int, int]) -> None:
    maps = torch.randn(4, 2, *shape).double()
    masks = torch.randint(0, 2, (4, 5, 7))
    masks[1, 0] = masks[2, :, 3] = -1
    masks[:, 2, :2] = torch.tensor([0, 1])
    found = metrics.segmentation(maps, masks)
    totals: list[Any] = [0, 0, [0, 0], [0, 0]]
    precisions = []
    for k in range(4):
        relevance = bilinear(maps[k].sum(0), 5, 7).float().double()
        right, judged, intersection, union = segmented(relevance, masks[k])
        assert found.right[k] == right and found.judged[k] == judged
        assert found.intersection[k].tolist() == intersection and found.union[k].tolist() == union
        sums = ([a + b for a, b in zip(*pair)] for pair in zip(totals[2:], (intersection, union)))
        totals = [totals[0] + right, totals[1] + judged, *sums]
        where = masks[k] >= 0
        relevance = (relevance - relevance.min()) / (relevance.max() - relevance.min())
        own, true = relevance[where], masks[k][where] == 1
        both = torch.cat((1 - own, own)).tolist(), torch.cat((~true, true)).tolist()
        precisions.append((average_precision(*both), average_precision(own.tolist(), true.tolist())))
    assert found.pixel_accuracy == pytest.approx(totals[0] / totals[1])
    assert found.mean_iou == pytest.approx(sum(i / u for i, u in zip(totals[2], totals[3])) / 2)
    assert found.average_precision.tolist() == pytest.approx([both for both, _ in precisions])
    assert found.mean_average_precision == pytest.approx(sum(both for both, _ in precisions) / 4)
    foreground = metrics.segmentation(maps, masks, classes="foreground")
    assert foreground.average_precision.tolist() == pytest.approx([own for _, own in precisions])


def test_segmentation_of_batches_is_joined_over_all_pixels() -> None:
    maps, masks = torch.rand(5, 4, 4), torch.rand(5, 8, 8) < torch.tensor([0.1, 0.2, 0.5, 0.8, 0.9]).view(5, 1, 1)
    whole = metrics.segmentation(maps, masks)
    joined = Segmentation.join([metrics.segmentation(maps[:2], masks[:2]), metrics.segmentation(maps[2:], masks[2:])])
    for name in ("pixel_accuracy", "mean_iou", "mean_average_precision"):
        assert getattr(whole, name) == pytest.approx(getattr(joined, name))
    each = [metrics.segmentation(maps[k : k + 1], masks[k : k + 1]).mean_iou for k in range(5)]
    assert whole.mean_iou != pytest.approx(sum(each) / 5)
    with pytest.raises(InvalidInputError):
        Segmentation.join([])


def test_the_mask_itself_is_the_best_map() -> None:
    masks = torch.rand(3, 6, 6) < 0.4
    best, worst = (metrics.segmentation(maps, masks) for maps in (masks.float(), (~masks).float()))
    assert best.pixel_accuracy == best.mean_iou == best.mean_average_precision == 1
    assert worst.pixel_accuracy == worst.mean_iou == 0


def test_scale_matters_to_a_fixed_threshold_alone() -> None:
    maps, masks = torch.rand(3, 6, 6).double(), torch.rand(3, 6, 6) < 0.4
    for other in (3 * maps + 5, maps / 7 - 1):
        one, two = metrics.segmentation(maps, masks), metrics.segmentation(other, masks)
        assert torch.equal(one.intersection, two.intersection)
        assert torch.allclose(one.average_precision, two.average_precision)
    fixed = metrics.segmentation(maps, masks, threshold=0.7, minmax=False)
    assert fixed.right.tolist() == [((m > 0.7) == t).sum().item() for m, t in zip(maps, masks)]
    with pytest.raises(InvalidInputError, match="minmax"):
        metrics.segmentation(3 * maps + 5, masks, minmax=False)
    metrics.segmentation(3 * maps + 5, masks, minmax=False, classes="foreground")
    for minmax in (True, False):
        constant = metrics.segmentation(torch.full((3, 6, 6), 0.1), masks, minmax=minmax)
        assert constant.right.tolist() == (~masks).sum((1, 2)).tolist()


# --- Conservation -------------------------------------------------------------------------------------------------


def test_conservation_is_the_relative_gap(model: Recurrent, tokens: Tensor) -> None:
    target = torch.tensor([2, 0, 1])
    difference = (model(tokens) - model(0 * tokens)).gather(1, target[:, None]).squeeze(1)
    scores = torch.randn(BATCH, LENGTH).double()
    expected = [abs(sum(s) - d) / abs(d) for s, d in zip(scores.tolist(), difference.tolist())]
    for size in SIZES:
        found = metrics.conservation(model, tokens, scores, baselines=0, target=target, internal_batch_size=size)
        assert found.tolist() == pytest.approx(expected)
    assert metrics.conservation_gap((scores,), difference).tolist() == pytest.approx(expected)
    exact = scores * (difference / scores.sum(1)).unsqueeze(1)
    assert metrics.conservation(model, tokens, exact, baselines=0, target=target).max() < 1e-12
    gap = metrics.conservation(model, tokens, 0.75 * exact, baselines=0, target=target)
    assert gap.tolist() == pytest.approx([0.25] * BATCH)


def test_no_difference_is_conserved_by_no_score() -> None:
    scores = torch.tensor([[1.0, -1.0], [1.0, 0.0]])
    assert metrics.conservation_gap(scores, torch.zeros(2)).tolist() == [0, math.inf]


def test_relevance_is_conserved(mamba: nn.Module, ids: Tensor) -> None:
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    arguments: dict[str, Any] = {"baselines": 4 * torch.ones_like(ids), "target": 3, "additional_forward_args": mask}
    scores = ImplicitAttentionRelevance(mamba).attribute(ids, **arguments)
    assert metrics.conservation(mamba, ids, scores, **arguments).max() < 1e-3
    assert metrics.conservation(mamba, ids, 2 * scores, **arguments).tolist() == pytest.approx([1, 1], abs=2e-3)


# --- Controls -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", [(4, 5), (4, 5, 3), (4, 2, 3, 3)])
def test_random_scores_belong_to_an_example(shape: tuple[int, ...]) -> None:
    inputs = torch.randn(shape)
    inputs[3] = inputs[0]
    scores = metrics.random_attributions(inputs)
    assert scores.shape == inputs.shape and torch.equal(scores[0], scores[3])
    assert torch.equal(scores[1:2], metrics.random_attributions(inputs[1:2]))
    assert not torch.equal(scores[0], scores[1])
    assert not torch.equal(scores, metrics.random_attributions(inputs, seed=1))
    many = metrics.random_attributions(torch.randn(4000, 3))
    assert bool((many.mean(0) - 0.5).abs().max() < 4 * math.sqrt(1 / 12 / 4000))


def test_position_scores_are_the_mean_of_the_others() -> None:
    scores, mask = torch.randn(5, 4, 3).double(), torch.rand(5, 4) < 0.6
    mask[:, 0] = False
    mask[2, 0] = True
    found = metrics.position_attributions(scores, mask)
    for k in range(5):
        for place in range(4):
            others = [scores[j, place] for j in range(5) if j != k and mask[j, place]]
            expected = torch.stack(others).mean(0) if others else torch.zeros(3).double()
            assert torch.allclose(found[k, place], expected)
    plain = metrics.position_attributions(scores)
    assert torch.allclose(plain, metrics.position_attributions(scores, torch.ones(5, 4)))


def test_position_scores_win_where_the_place_is_always_the_same() -> None:
    """And are at chance where it is not."""
    fixed = torch.zeros(200, 10).index_fill_(1, torch.tensor([4]), 1.0)
    anywhere = F.one_hot(torch.randint(10, (200,)), 10)
    assert metrics.localisation(metrics.position_attributions(fixed), fixed).auc.min() == 1
    found = metrics.localisation(metrics.position_attributions(anywhere), anywhere).auc
    assert float(found.mean()) < 0.6


# --- What cannot be measured is refused ---------------------------------------------------------------------------

NAN = float("nan")
ONES = torch.ones(BATCH, LENGTH)


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"attributions": torch.ones(BATCH, LENGTH + 1)}, "what the attribution method returned"),
        ({"attributions": torch.ones(LENGTH)}, "what the attribution method returned"),
        ({"attributions": ONES * NAN}, "NaN"),
        ({"attributions": (ONES, ONES)}, "tuple of one"),
        ({"attributions": [1.0]}, "tuple of one"),
        ({"inputs": torch.ones(3).long()}, "inputs must be"),
        ({"inputs": torch.ones(0, 7).long()}, "not empty"),
        ({"inputs": (ONES.long(), ONES.long())}, "one tensor"),
        ({"target": None}, "Target not provided"),
        ({"baselines": None}, "baselines is missing"),
        ({"baselines": NAN}, "NaN"),
        ({"baselines": 0.5}, "whole numbers"),
        ({"baselines": torch.zeros(5).long()}, "broadcast"),
        ({"fractions": [0.5, 0.1]}, "ascending"),
        ({"fractions": [0.5, 0.5]}, "ascending"),
        ({"fractions": [0.5, 1.5]}, "from 0 to 1"),
        ({"fractions": [-0.1, 0.5]}, "from 0 to 1"),
        ({"fractions": [NAN, 0.5]}, "from 0 to 1"),
        ({"fractions": [0.5]}, "two or more"),
        ({"evidence": "logits"}, "'probability', 'logit'"),
        ({"keep": torch.ones(BATCH, LENGTH).bool()}, "no feature to perturb"),
        ({"keep": torch.ones(BATCH, LENGTH)}, "bool"),
        ({"keep": torch.ones(LENGTH).bool()}, "bool"),
        ({"patch_size": 2}, "for images"),
        ({"internal_batch_size": 0}, "at least 1"),
        ({"removal": "delete"}, "no baselines"),
        ({"removal": "delete", "baselines": None}, "no token is left"),
        ({"removal": "delete", "baselines": None, "target": (0, 1), "fractions": [0, 0.5]}, "from the end"),
        ({"removal": "cut"}, "'replace' or 'delete'"),
        ({"forward_func": lambda ids: ids.sum()}, "one row for each"),
        ({"forward_func": lambda ids: {"logits": ids}}, "type dict"),
        ({"forward_func": lambda ids: ids.double().sum(1), "target": None}, "evidence='logit'"),
        ({"forward_func": lambda ids: ids[:, :1].double()}, "evidence='logit'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_refused(change: dict[str, Any], names: str, model: Recurrent, tokens: Tensor) -> None:
    arguments = {"forward_func": model, "inputs": tokens, "attributions": torch.rand(BATCH, LENGTH), "baselines": 0,
                 "target": 1, **change}  # fmt: skip
    with pytest.raises(InvalidInputError, match=names):
        metrics.morf(**arguments)


def test_captums_errors_for_targets_are_kept(model: Recurrent, tokens: Tensor) -> None:
    targets: list[Any] = [7, [0, 1], "one"]
    for target in targets:
        with pytest.raises(AssertionError):
            metrics.morf(model, tokens, torch.rand(BATCH, LENGTH), baselines=0, target=target)


def test_a_model_that_gives_no_numbers_is_refused(model: Recurrent, tokens: Tensor) -> None:
    broken = lambda ids: torch.where((ids == 0).any(1, keepdim=True), torch.nan, model(ids))  # noqa: E731
    for metric in (metrics.activation, metrics.morf, metrics.positive_perturbation):
        with pytest.raises(ModelStateError, match="NaN"):
            metric(broken, tokens, torch.rand(BATCH, LENGTH), baselines=0, target=1)
    with pytest.raises(ModelStateError, match="NaN"):
        metrics.pruning(broken, tokens, torch.rand(BATCH, LENGTH), baselines=0)
    model.state.train()
    for call in (metrics.morf, metrics.positive_perturbation, metrics.conservation):
        with pytest.raises(ModelStateError, match="training"):
            call(model, tokens, torch.rand(BATCH, LENGTH), baselines=0, target=1)


def test_tokens_that_a_model_lacks_are_refused(mamba: nn.Module, ids: Tensor) -> None:
    with pytest.raises(InvalidInputError, match="baselines: Token ids"):
        metrics.morf(mamba, ids, torch.rand(ids.shape), baselines=VOCABULARY, target=1)
    with pytest.raises(InvalidInputError, match="inputs: Token ids"):
        metrics.morf(mamba, ids + VOCABULARY, torch.rand(ids.shape), baselines=0, target=1)
    with pytest.raises(InvalidInputError, match="attention mask"):
        metrics.morf(mamba, ids, torch.rand(ids.shape), baselines=0, target=1, additional_forward_args=torch.ones(2, 3))


@pytest.mark.parametrize(
    ("change", "names"),
    [
        ({"patch_size": 3}, "do not tile"),
        ({"patch_size": 0}, "do not tile"),
        ({"attributions": torch.rand(3, 2, 4, 6)}, "height"),
        ({"target": [0, 1]}, "one class for each"),
        ({"target": 0.5}, "must be a class"),
        ({"forward_func": lambda x: x.sum((1, 2, 3))}, "batch, classes"),
    ],
)
def test_images_that_do_not_fit_are_refused(change: dict[str, Any], names: str) -> None:
    arguments = {"forward_func": Vision(), "inputs": torch.rand(3, 2, 6, 4).double(), "baselines": 0,
                 "attributions": torch.rand(3, 2, 6, 4), **change}  # fmt: skip
    with pytest.raises(InvalidInputError, match=names):
        metrics.positive_perturbation(**arguments)


def test_pixels_cannot_be_deleted() -> None:
    images = torch.rand(3, 2, 6, 4).double()
    with pytest.raises(InvalidInputError, match="Of an image"):
        metrics.morf(Vision(), images, images, target=0, removal="delete", fractions=[0, 0.5])


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        ({"truth": torch.zeros(1, 4)}, "matters, so nothing"),
        ({"truth": torch.ones(1, 4)}, "every judged entry"),
        ({"truth": torch.tensor([[1, -1, 0, 0]])}, "absolute"),
        ({"truth": torch.tensor([1, 0, 0, 0])}, "truth must have shape"),
        ({"truth": torch.tensor([[1.0, NAN, 0, 0]])}, "truth has NaN"),
        ({"truth": torch.tensor([[1, 0, 0]])}, "attributions must have the shape"),
        ({"k": 0}, "whole number from 1"),
        ({"k": 1.5}, "whole number from 1"),
        ({"k": 5}, "larger than the number"),
        ({"k": 4, "mask": torch.tensor([[1, 1, 1, 0]])}, "larger than the number"),
        ({"mask": torch.ones(4)}, "mask must have"),
        ({"mask": torch.tensor([[0, 1, 1, 1]])}, "matters, so nothing"),
    ],
)
def test_truth_that_cannot_be_found_is_refused(arguments: dict[str, Any], names: str) -> None:
    truth = arguments.pop("truth", torch.tensor([[True, False, False, False]]))
    with pytest.raises(InvalidInputError, match=names):
        metrics.localisation(torch.tensor([[1.0, -2.0, 0.0, 1.0]]), truth, **arguments)


@pytest.mark.parametrize(
    ("maps", "masks", "options", "names"),
    [
        (torch.rand(2, 9), torch.ones(2, 3, 3), {}, "Unfold"),
        (torch.rand(3, 3, 3), torch.ones(2, 3, 3), {}, "batch of"),
        (torch.rand(2, 3, 3), torch.ones(3, 3), {}, "masks must have shape"),
        (torch.rand(2, 3, 3), 2 * torch.ones(2, 3, 3), {}, "several classes"),
        (torch.rand(2, 3, 3), -torch.ones(2, 3, 3), {}, "no judged pixel"),
        (torch.rand(2, 3, 3), torch.zeros(2, 3, 3), {"classes": "foreground"}, "no foreground"),
        (torch.rand(2, 3, 3), torch.zeros(2, 3, 3), {"classes": "background"}, "'both' or 'foreground'"),
        (NAN * torch.rand(2, 3, 3), torch.zeros(2, 3, 3), {}, "NaN"),
    ],
)
def test_masks_that_do_not_fit_are_refused(maps: Tensor, masks: Tensor, options: dict[str, Any], names: str) -> None:
    with pytest.raises(InvalidInputError, match=names):
        metrics.segmentation(maps, masks, **options)


def test_sums_and_controls_that_do_not_fit_are_refused(model: Recurrent, tokens: Tensor) -> None:
    with pytest.raises(InvalidInputError, match="one number for each"):
        metrics.conservation_gap(ONES, torch.ones(2))
    with pytest.raises(InvalidInputError, match="NaN"):
        metrics.conservation_gap(ONES * NAN, torch.ones(BATCH))
    with pytest.raises(InvalidInputError, match="at least 1"):
        metrics.conservation(model, tokens, ONES, baselines=0, target=1, internal_batch_size=0)
    with pytest.raises(InvalidInputError, match="two or more"):
        metrics.position_attributions(ONES[:1])
    with pytest.raises(InvalidInputError, match="mask must have"):
        metrics.position_attributions(ONES, ONES[:2])


def test_an_unknown_option_is_refused(model: Recurrent, tokens: Tensor) -> None:
    with pytest.raises(TypeError, match="n_steps"):
        metrics.morf(model, tokens, ONES, baselines=0, target=1, n_steps=3)  # type: ignore[call-arg]


def test_long_rankings_need_little_memory() -> None:
    """224 x 224 pixels, counted exactly."""
    count = 224 * 224
    scores = torch.arange(count).float().flip(0)[None]
    truth = (torch.arange(count) < 100)[None]
    ranking = Ranking.of(scores, truth, torch.ones_like(truth))
    assert ranking.auc().item() == 1 and ranking.average_precision().item() == 1
