"""Images as inputs: scores of tokens go to the pixels that they read, and relevance is that of the pixels."""

import copy
import functools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import captum.metrics
import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import pytest
import torch
from captum.attr import NoiseTunnel
from captum.attr import visualization as captum_visualization
from torch import Tensor, nn

from captum_ssm import (
    ImplicitAttentionAttribution,
    ImplicitAttentionRelevance,
    ImplicitAttentionRollout,
    InvalidInputError,
    ModelStateError,
    RawImplicitAttention,
    register,
    unregister,
)
from captum_ssm.operators import Chain, Projection, Scan
from tutorials.vision_mamba import Block, Mamba, RMSNorm

METHODS: dict[str, Callable[..., Any]] = {
    "channel": ImplicitAttentionAttribution,
    "signed": functools.partial(ImplicitAttentionAttribution, rectify=None),
    "rollout": ImplicitAttentionRollout,
    "raw": RawImplicitAttention,
}
every_attention_method = pytest.mark.parametrize("method", METHODS.values(), ids=list(METHODS))
every_method = pytest.mark.parametrize(
    "method", [*METHODS.values(), ImplicitAttentionRelevance], ids=[*METHODS, "relevance"]
)


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    assert actual.shape == expected.shape
    assert expected.abs().max() > 0
    difference = (actual.double() - expected.double()).abs().max()
    assert difference <= tolerance * expected.abs().max(), f"{difference:.1e}"


class Wide(nn.Module):
    """A small Vision Mamba for images of any shape: patches of 2 x 3 pixels, in a grid of 2 x 4 by default.

    Args:
        stride: Pixels from one patch to the next.
        class_position: Where the class token stands, None without one.
        snake: Whether every second row of patches is read from the right, as some models do.
        stem: What comes before the patches.
        size: Height and width of the images.
    """

    def __init__(
        self,
        stride: tuple[int, int] = (2, 3),
        class_position: int | None = 3,
        snake: bool = False,
        stem: nn.Module | None = None,
        size: tuple[int, int] = (4, 12),
        depth: int = 2,
    ) -> None:
        super().__init__()
        self.stem = stem or nn.Identity()
        self.proj = nn.Conv2d(2, 4, (2, 3), stride)
        self.rows, self.columns = ((n - k) // s + 1 for n, k, s in zip(size, (2, 3), stride, strict=True))
        self.snake, self.class_position = snake, class_position
        self.cls = nn.Parameter(torch.randn(1, 1, 4))
        self.positions = nn.Parameter(torch.randn(1, self.rows * self.columns + (class_position is not None), 4))
        self.layers = nn.ModuleList(Block(Mamba(4, 2)) for _ in range(depth))
        self.norm = RMSNorm(4)
        self.head = nn.Linear(4, 3)

    def order(self) -> list[tuple[int, int]]:
        """Row and column of each patch, in the order of the tokens."""
        cells = []
        for row in range(self.rows):
            line = [(row, column) for column in range(self.columns)]
            cells += line[::-1] if self.snake and row % 2 else line
        return cells

    def token(self, row: int, column: int) -> int:
        """The token of a patch."""
        number = self.order().index((row, column))
        return number + (self.class_position is not None and number >= self.class_position)

    def forward(self, images: Tensor, scale: Tensor | None = None) -> Tensor:
        """Return logits (B, 3); ``scale`` (B,) multiplies the images."""
        if scale is not None:
            images = images * scale.view(-1, 1, 1, 1)
        grid = self.proj(self.stem(images))
        tokens = torch.stack([grid[:, :, row, column] for row, column in self.order()], dim=1)
        if self.class_position is not None:
            cut = self.class_position
            tokens = torch.cat([tokens[:, :cut], self.cls.expand(len(tokens), -1, -1), tokens[:, cut:]], dim=1)
        hidden: Tensor = tokens + self.positions
        residual: Any = None
        for layer in self.layers:
            hidden, residual = layer(hidden, residual)
        tokens = self.norm(hidden + residual)
        read = tokens.mean(1) if self.class_position is None else tokens[:, self.class_position]
        logits: Tensor = self.head(read)
        return logits


def wide(**options: Any) -> Wide:
    torch.manual_seed(3)
    model = Wide(**options).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model


def some_images(count: int = 2, height: int = 4, width: int = 12) -> Tensor:
    return torch.randn(count, 2, height, width, dtype=torch.float64)


def of_every_token(method: Any, model: Wide, images: Tensor, **options: Any) -> Tensor:
    """The scores of all tokens (B, L): those of the same model that is given what enters its first layer."""

    class Rest(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, tokens: Tensor) -> Tensor:
            hidden: Tensor = tokens
            residual: Any = None
            for layer in model.layers:
                hidden, residual = layer(hidden, residual)
            tokens = model.norm(hidden + residual)
            read = tokens.mean(1) if model.class_position is None else tokens[:, model.class_position]
            logits: Tensor = model.head(read)
            return logits

    entering: list[Tensor] = []
    hook = model.layers[0].register_forward_pre_hook(lambda module, args: entering.append(args[0].detach()))
    model(images)
    hook.remove()
    scores: Tensor = method(Rest().eval()).attribute(entering[0], target=1, **options)
    return scores.sum(-1)


# --- Scores of tokens in the form of an image ------------------------------------------------------------------------


@every_attention_method
@pytest.mark.parametrize("snake", [False, True], ids=["rows", "snake"])
@pytest.mark.parametrize("class_position", [3, 8, None])
def test_every_pixel_has_an_equal_share_of_the_score_of_its_patch(
    method: Any, snake: bool, class_position: int | None
) -> None:
    model, images = wide(snake=snake, class_position=class_position), some_images()
    tokens = of_every_token(method, model, images)
    grid = method(model).attribute(images, target=1, patches=True)
    pixels = method(model).attribute(images, target=1)
    assert (model.rows, model.columns) == (2, 4)
    assert grid.shape == (2, 2, 4) and pixels.shape == images.shape
    for row in range(2):
        for column in range(4):
            score = tokens[:, model.token(row, column)]
            assert_close(grid[:, row, column], score)
            patch = pixels[:, :, 2 * row : 2 * row + 2, 3 * column : 3 * column + 3]
            assert_close(patch.sum((1, 2, 3)), score)
            assert_close(patch, (score / 12).view(2, 1, 1, 1).expand_as(patch))
    if class_position is not None:
        others = tokens.sum(1) - tokens[:, class_position]
        assert_close(pixels.sum((1, 2, 3)), others, 1e-5)
        assert tokens[:, class_position].abs().min() > 0, "the class token has a score, which no pixel gets"


@every_attention_method
@pytest.mark.parametrize("stride", [(1, 3), (2, 1), (1, 1)], ids=str)
def test_overlapping_patches_add_up_in_their_pixels(method: Any, stride: tuple[int, int]) -> None:
    model, images = wide(stride=stride), some_images()
    tokens = of_every_token(method, model, images)
    grid = method(model).attribute(images, target=1, patches=True)
    pixels = method(model).attribute(images, target=1)
    expected = torch.zeros_like(images)
    for row in range(model.rows):
        for column in range(model.columns):
            score = tokens[:, model.token(row, column)]
            assert_close(grid[:, row, column], score)
            top, left = stride[0] * row, stride[1] * column
            expected[:, :, top : top + 2, left : left + 3] += (score / 12).view(2, 1, 1, 1)
    assert grid.shape == (2, model.rows, model.columns)
    assert_close(pixels, expected)
    assert_close(pixels.sum((1, 2, 3)), grid.sum((1, 2)), 1e-5)


@every_method
def test_pixels_that_no_patch_reads_get_nothing(method: Any) -> None:
    model, images = wide(), some_images(height=5, width=14)
    scores = method(model).attribute(images, target=1)
    assert scores[:, :, 4:].abs().max() == 0 and scores[..., 12:].abs().max() == 0
    cut = images[:, :, :4, :12]
    assert_close(scores[:, :, :4, :12], method(model).attribute(cut, target=1))
    grid = method(model).attribute(images, target=1, patches=True)
    assert_close(grid, method(model).attribute(cut, target=1, patches=True))


@every_attention_method
def test_a_stem_before_the_patches_widens_what_a_token_reads(method: Any) -> None:
    """A convolution of 3 x 3 adds the pixels around a patch."""
    model, images = wide(stem=nn.Conv2d(2, 2, 3, padding=1)), some_images()
    tokens = of_every_token(method, model, images)
    expected = torch.zeros_like(images)
    for row in range(2):
        for column in range(4):
            top, bottom = max(0, 2 * row - 1), min(4, 2 * row + 3)
            left, right = max(0, 3 * column - 1), min(12, 3 * column + 4)
            score = tokens[:, model.token(row, column)] / (2 * (bottom - top) * (right - left))
            expected[:, :, top:bottom, left:right] += score.view(2, 1, 1, 1)
    assert_close(method(model).attribute(images, target=1), expected)
    grid = method(model).attribute(images, target=1, patches=True)
    assert_close(grid[:, 1, 2], tokens[:, model.token(1, 2)])


@every_method
def test_a_batch_is_its_images_one_by_one(method: Any) -> None:
    model, images, targets = wide(), some_images(3), torch.tensor([0, 2, 1])
    for patches in (False, True):
        whole = method(model).attribute(images, target=targets, patches=patches)
        alone = [
            method(model).attribute(image[None], target=int(t), patches=patches)
            for image, t in zip(images, targets, strict=True)
        ]
        assert_close(whole, torch.cat(alone))
        for size in (1, 2, 3, 7):
            cut = method(model).attribute(images, target=targets, patches=patches, internal_batch_size=size)
            assert_close(cut, whole)


@every_method
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-6), (torch.float32, 1e-3)], ids=str)
def test_scores_have_the_type_and_form_of_the_images(method: Any, dtype: torch.dtype, tolerance: float) -> None:
    model, images = wide(), some_images()
    expected = method(model).attribute(images, target=1)
    model, images = model.to(dtype), images.to(dtype)
    scores = method(model).attribute(images, target=1)
    assert scores.dtype == dtype and scores.is_contiguous() and not scores.requires_grad
    assert_close(scores, expected, tolerance)
    inside = method(model).attribute((images,), target=1)
    assert type(inside) is tuple and len(inside) == 1 and torch.equal(inside[0], scores)
    (grid,) = method(model).attribute((images,), target=1, patches=True)
    assert grid.dtype == dtype and torch.equal(grid, method(model).attribute(images, target=1, patches=True))


@every_method
def test_scores_of_a_model_in_half_precision_have_its_type(method: Any) -> None:
    """They are computed in a wider one."""
    model, images = wide().bfloat16(), some_images().bfloat16()
    for patches in (False, True):
        assert method(model).attribute(images, target=1, patches=patches).dtype == torch.bfloat16


@every_method
def test_images_that_require_a_gradient_stay_as_they_are(method: Any) -> None:
    model, images = wide(), some_images().requires_grad_()
    before = images.detach().clone()
    scores = method(model).attribute(images, target=1)
    assert images.grad is None and torch.equal(images, before) and not scores.requires_grad
    assert torch.equal(method(model).attribute(before, target=1), scores)


@every_method
def test_arguments_of_the_model_go_with_their_images(method: Any) -> None:
    model, images = wide(), some_images()
    scale = torch.tensor([0.5, -2.0], dtype=torch.float64)
    scores = method(model).attribute(images, target=1, additional_forward_args=scale)
    expected = method(model).attribute(images * scale.view(-1, 1, 1, 1), target=1)
    assert_close(scores, expected)
    cut = method(model).attribute(images, target=1, additional_forward_args=scale, internal_batch_size=1)
    assert_close(cut, expected)


@every_method
def test_a_callable_reads_the_model_s_score(method: Any) -> None:
    model, images = wide(), some_images()

    def difference(images: Tensor) -> Tensor:
        logits = model(images)
        return logits[:, 1] - logits[:, 2]

    scores = method(difference, model=model).attribute(images)
    assert_close(scores, method(model).attribute(images, target=1, contrast=2))


# --- The explained patch ---------------------------------------------------------------------------------------------


@every_attention_method
@pytest.mark.parametrize("snake", [False, True], ids=["rows", "snake"])
@pytest.mark.parametrize("class_position", [3, None])
def test_a_patch_is_explained_by_its_row_and_column(method: Any, snake: bool, class_position: int | None) -> None:
    model, images = wide(snake=snake, class_position=class_position), some_images()
    attribute = functools.partial(method(model).attribute, images, target=1)
    for row in range(2):
        for column in range(4):
            expected = attribute(query=model.token(row, column))
            assert torch.equal(attribute(query=(row, column)), expected)
    assert (attribute(query=(0, 0)) - attribute(query=(1, 3))).abs().max() > 1e-3 * attribute().abs().max()


@every_attention_method
@pytest.mark.parametrize("query", [(2, 0), (0, 4), (-1, 0), (0, -1), (5, 9), (1,), (0, 0, 0)], ids=str)
def test_a_patch_outside_the_grid_is_refused(method: Any, query: tuple[int, ...]) -> None:
    with pytest.raises(InvalidInputError, match=r"lies outside the grid of 2 x 4 patches"):
        method(wide()).attribute(some_images(), target=1, query=query)


# --- What is refused -------------------------------------------------------------------------------------------------


@every_method
def test_only_images_have_patches(method: Any, mamba: Any, ids: Tensor) -> None:
    embeddings = mamba.get_input_embeddings()(ids).detach()
    for inputs in (ids, embeddings):
        with pytest.raises(InvalidInputError, match=r"Only images .* have a grid of patches.*Leave out `patches`"):
            method(mamba).attribute(inputs, target=1, patches=True)


@every_attention_method
def test_only_images_have_patches_to_explain(method: Any, mamba: nn.Module, ids: Tensor) -> None:
    with pytest.raises(InvalidInputError, match=r"query \(0, 1\) is a patch, but the inputs are no images"):
        method(mamba).attribute(ids, target=1, query=(0, 1))


@every_method
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("first", [0, 1])
def test_a_bad_image_is_refused_and_spoils_no_later_call(method: Any, value: float, first: int) -> None:
    model, images = wide(), some_images()
    bad = images.clone()
    bad[first, 1, 2, 3] = value
    options = {"query": (0, 1)} if "query" in method(model).attribute.__wrapped__.__code__.co_varnames else {}
    for _ in range(2):
        with pytest.raises(InvalidInputError, match="NaN or infinite"):
            method(model).attribute(bad, target=1, **options)
    assert torch.equal(
        method(model).attribute(images, target=1, **options),
        method(copy.deepcopy(model)).attribute(images, 1, **options),
    )


@every_method
def test_a_model_in_training_mode_is_refused(method: Any) -> None:
    model, images = wide(), some_images()
    model.layers[1].train()
    with pytest.raises(ModelStateError, match=r"training mode.*eval"):
        method(model).attribute(images, target=1)
    with pytest.raises(ModelStateError, match=r"training mode.*eval"):
        method(model).attribute(images, target=1, patches=True)
    model.eval()
    assert method(model).attribute(images, target=1).isfinite().all()


@every_attention_method
def test_what_a_token_reads_is_not_measured_in_training_mode(method: Any) -> None:
    model, images = wide(stem=nn.Dropout(1.0)), some_images()
    model.stem.train()
    with pytest.raises(ModelStateError, match=r"training mode.*eval"):
        method(model).attribute(images, target=1, query=(0, 1))
    model.eval()
    assert method(model).attribute(images, target=1, query=(0, 1)).abs().max() > 0


@every_method
@pytest.mark.parametrize("shape", [(0, 2, 4, 12), (2, 0, 4, 12), (4,), (4, 12), (1, 2, 2, 4, 12)], ids=str)
def test_what_is_no_image_is_refused(method: Any, shape: tuple[int, ...]) -> None:
    """Relevance takes inputs of any shape, so there the model itself says what it takes."""
    errors = (InvalidInputError, RuntimeError) if method is ImplicitAttentionRelevance else InvalidInputError
    with pytest.raises(errors, match=r"inputs is empty|\(batch, channels, height, width\)|input to conv2d"):
        method(wide()).attribute(torch.zeros(shape, dtype=torch.float64), target=1)


class Mixed(nn.Module):
    """A model whose tokens are no patches: every one reads the whole image."""

    def __init__(self, count: int = 3) -> None:
        super().__init__()
        self.read = nn.Linear(2 * 4 * 12, 4 * count)
        self.count = count
        self.layers = nn.ModuleList([Block(Mamba(4, 2))])
        self.head = nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        hidden, residual = self.layers[0](self.read(images.flatten(1)).unflatten(1, (self.count, 4)))
        logits: Tensor = self.head((hidden + residual).mean(1))
        return logits


@every_method
def test_tokens_that_are_no_patches_have_no_grid(method: Any) -> None:
    model, images = Mixed().double().eval(), some_images()
    with pytest.raises(InvalidInputError, match=r"3 tokens that read pixels do not form a grid.*Leave out `patches`"):
        method(model).attribute(images, target=1, patches=True)
    assert method(model).attribute(images, target=1).shape == images.shape


@every_attention_method
def test_tokens_that_read_the_whole_image_share_their_scores_with_all_of_it(method: Any) -> None:
    scores = method(Mixed().double().eval()).attribute(some_images(), target=1)
    assert_close(scores, scores.mean((1, 2, 3), keepdim=True).expand_as(scores))


@every_method
def test_a_model_that_does_not_read_the_images_is_refused(method: Any) -> None:
    model, fixed = wide(), some_images(1)

    def blind(images: Tensor) -> Tensor:
        logits: Tensor = model(fixed.expand(len(images), -1, -1, -1))
        return logits

    for _ in range(2):
        with pytest.raises(InvalidInputError, match=r"reads nothing of these images|does not depend on the inputs"):
            method(blind, model=model).attribute(some_images(), target=1)
    model.requires_grad_(False)
    with pytest.raises(InvalidInputError, match=r"reads nothing of these images|does not depend on the inputs"):
        method(blind, model=model).attribute(some_images(), target=1)


# --- What a token reads does not depend on the image that is looked at first -----------------------------------------


@every_attention_method
def test_what_a_token_reads_is_found_on_a_black_image_too(method: Any) -> None:
    model, images = wide(), some_images()
    black = torch.zeros_like(images)
    scores = method(model).attribute(black, target=1)
    grid = method(model).attribute(black, target=1, patches=True)
    assert_close(scores.sum((1, 2, 3)), grid.sum((1, 2)))
    assert_close(method(model).attribute(images, target=1), method(copy.deepcopy(model)).attribute(images, target=1))


@every_attention_method
def test_a_dark_first_image_does_not_hide_what_a_token_reads(method: Any) -> None:
    """Behind a ReLU nothing has a gradient at a pixel that is 0: other images are not to suffer from it."""
    model, images = wide(stem=nn.ReLU()), some_images().abs()
    expected = method(copy.deepcopy(model)).attribute(images, target=1)
    dark = images.clone()
    dark[0, :, :, :6] = 0
    method(model).attribute(dark, target=1)
    assert_close(method(model).attribute(images, target=1), expected)


@every_attention_method
def test_a_patch_whose_pixels_are_all_dark_keeps_its_score(method: Any) -> None:
    model, images = wide(stem=nn.ReLU()), some_images().abs()
    images[:, :, :2, :3] = 0
    grid = of_every_token(method, model, images)[:, model.token(0, 0)]
    assert_close(method(model).attribute(images, target=1)[:, :, :2, :3].sum((1, 2, 3)), grid)


@every_attention_method
def test_images_of_another_size_have_patches_of_their_own(method: Any) -> None:
    model = wide(class_position=None)
    model.positions = nn.Parameter(model.positions[:, :1])
    for rows, columns in ((2, 4), (3, 2), (2, 4)):
        model.rows, model.columns = rows, columns
        images = some_images(height=2 * rows, width=3 * columns)
        grid = method(model).attribute(images, target=1, patches=True)
        assert grid.shape == (2, rows, columns)
        assert_close(method(model).attribute(images, target=1).sum((1, 2, 3)), grid.sum((1, 2)), 1e-5)


# --- Relevance of pixels ---------------------------------------------------------------------------------------------

BASELINES: dict[str, Callable[[Tensor], Any]] = {
    "number": lambda images: 0.5,
    "whole number": lambda images: 0,
    "image": lambda images: torch.full_like(images[:1], 0.1).cumsum(-1),
    "images": lambda images: images.flip(0, -1),
    "channel means": lambda images: images.mean((0, 2, 3)).view(-1, 1, 1),
    "tensor of a number": lambda images: torch.tensor(0.3),
    "tuple": lambda images: (images.flip(-1),),
}


@pytest.mark.parametrize("baseline", BASELINES.values(), ids=list(BASELINES))
@pytest.mark.parametrize("class_position", [3, None])
def test_relevance_sums_to_the_difference(baseline: Callable[[Tensor], Any], class_position: int | None) -> None:
    model, images = wide(class_position=class_position), some_images()
    reference = baseline(images)
    method = ImplicitAttentionRelevance(model)
    scores, delta = method.attribute(images, target=1, baselines=reference, return_convergence_delta=True)
    inner = reference[0] if isinstance(reference, tuple) else reference
    other = torch.as_tensor(inner, dtype=torch.float64).expand_as(images)
    difference = (model(images) - model(other))[:, 1].detach()
    assert scores.shape == images.shape
    assert_close(scores.sum((1, 2, 3)), difference, 1e-5)
    assert delta.abs().max() < 1e-8
    grid = method.attribute(images, target=1, baselines=reference, patches=True)
    assert_close(grid.sum((1, 2)), difference, 1e-5)


def test_relevance_of_several_references_is_their_mean() -> None:
    model, images = wide(), some_images()
    method = ImplicitAttentionRelevance(model)
    references: list[Any] = [0, images.flip(0), images.mean((0, 2, 3)).view(-1, 1, 1)]
    several = method.attribute(images, target=1, baselines=references)
    each = [method.attribute(images, target=1, baselines=reference) for reference in references]
    assert_close(several, torch.stack(each).mean(0))


@pytest.mark.parametrize("gate_rule", ["half", "value"])
def test_relevance_with_frozen_gates_and_the_bias_sum_to_the_score(gate_rule: Any) -> None:
    model, images = wide(), some_images()
    method = ImplicitAttentionRelevance(model, gate_rule=gate_rule)
    scores = method.attribute(images, target=1)
    assert_close(scores.sum((1, 2, 3)), model(images)[:, 1].detach() - method.terms["bias"], 1e-5)


def test_relevance_of_a_patch_is_the_sum_over_its_pixels() -> None:
    model, images = wide(snake=True), some_images()
    method = ImplicitAttentionRelevance(model)
    for options in ({}, {"baselines": 0.5}, {"sign": "positive"}, {"sign": "negative", "baselines": 0}):
        pixels = method.attribute(images, target=1, **options)
        grid = method.attribute(images, target=1, patches=True, **options)
        assert_close(grid, pixels.unflatten(2, (2, 2)).unflatten(4, (4, 3)).sum((1, 3, 5)))
        if "sign" in options:
            assert pixels.mul(1 if options["sign"] == "positive" else -1).min() >= 0


@pytest.mark.parametrize("stride", [(1, 3), (2, 1), (1, 2)], ids=str)
def test_a_pixel_that_several_patches_read_is_shared_by_them(stride: tuple[int, int]) -> None:
    model, images = wide(stride=stride), some_images()
    method = ImplicitAttentionRelevance(model)
    pixels = method.attribute(images, target=1).sum(1)
    readers = torch.zeros(4, 12)
    for row in range(model.rows):
        for column in range(model.columns):
            readers[stride[0] * row : stride[0] * row + 2, stride[1] * column : stride[1] * column + 3] += 1
    shared = pixels / readers.clamp(min=1)
    expected = torch.zeros(2, model.rows, model.columns, dtype=torch.float64)
    for row in range(model.rows):
        for column in range(model.columns):
            top, left = stride[0] * row, stride[1] * column
            expected[:, row, column] = shared[:, top : top + 2, left : left + 3].sum((1, 2))
    assert_close(method.attribute(images, target=1, patches=True), expected)


class Sums(nn.Module):
    """A linear layer: running sums."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x: Tensor) -> Tensor:
        return (x @ self.weight.T).cumsum(1)


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.proj, self.mixer, self.head = nn.Conv2d(2, 4, (2, 3), (2, 3)), Sums(), nn.Linear(4, 3)

    def forward(self, images: Tensor) -> Tensor:
        tokens = self.proj(images).flatten(2).mT
        logits: Tensor = self.head((tokens + self.mixer(tokens)).mean(1))
        return logits


@pytest.fixture
def linear() -> Iterator[nn.Module]:
    @register("Sums")
    def adapter(mixer: Any, x: Tensor, kwargs: Any) -> Chain:
        one = x.new_ones(*x.shape[:2], 4, 1)
        return Chain({"scan": Scan(one, one, one), "in": Projection(mixer.weight.to(x))})

    yield Linear().double().eval()
    unregister("Sums")


def test_relevance_of_a_linear_model_is_gradient_times_difference(linear: nn.Module) -> None:
    images, other = some_images(), some_images()
    pixels = images.clone().requires_grad_()
    (slope,) = torch.autograd.grad(linear(pixels)[:, 1].sum(), pixels)
    method = ImplicitAttentionRelevance(linear)
    assert_close(method.attribute(images, target=1), slope * images)
    assert_close(method.attribute(images, target=1, baselines=other), slope * (images - other))
    assert_close(method.attribute(images, target=1, baselines=0.5), slope * (images - 0.5))
    grid = method.attribute(images, target=1, baselines=0.5, patches=True)
    expected = (slope * (images - 0.5)).unflatten(2, (2, 2)).unflatten(4, (4, 3)).sum((1, 3, 5))
    assert_close(grid, expected)


@pytest.mark.parametrize("shape", [(3, 1, 1), (2, 4, 11), (4, 2, 4, 12), (12, 4), (1, 1, 2, 4, 12), (5,)], ids=str)
def test_baselines_of_another_shape_are_refused(shape: tuple[int, ...]) -> None:
    method = ImplicitAttentionRelevance(wide())
    with pytest.raises(InvalidInputError, match="does not fit inputs of shape"):
        method.attribute(some_images(), target=1, baselines=torch.zeros(shape, dtype=torch.float64))


def test_a_baseline_that_is_not_finite_is_refused() -> None:
    for bad in (float("nan"), torch.full((2, 1, 1), float("inf"))):
        with pytest.raises(InvalidInputError, match="NaN or infinite"):
            ImplicitAttentionRelevance(wide()).attribute(some_images(), target=1, baselines=bad)


# --- Captum's own tools ----------------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("view", ["heat_map", "blended_heat_map", "masked_image"])
def test_captum_shows_the_scores(method: Any, view: str) -> None:
    model, images = wide(), some_images()
    scores = method(model).attribute(images, target=1)
    shown, original = (t[0].permute(1, 2, 0).float().numpy() for t in (scores, images))
    original = (original - original.min()) / (original.max() - original.min())
    original = original[..., [0, 1, 1]]  # a picture has three colours
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sign = "absolute_value" if view == "masked_image" else "all"
        figure, _ = captum_visualization.visualize_image_attr(shown, original, method=view, sign=sign, use_pyplot=False)
    figure.canvas.draw()
    plt.close(figure)


@every_method
def test_a_noise_tunnel_takes_images(method: Any) -> None:
    model, images = wide(), some_images()
    expected = method(model).attribute(images, target=1)
    still = NoiseTunnel(method(model)).attribute(images, target=1, nt_samples=3, stdevs=0.0)
    assert_close(still, expected)
    noisy = NoiseTunnel(method(model)).attribute(images, target=1, nt_samples=3, stdevs=0.3, nt_samples_batch_size=2)
    assert noisy.shape == images.shape and noisy.isfinite().all()
    assert (noisy - expected).abs().max() > 1e-3 * expected.abs().max()


@every_method
def test_infidelity_measures_the_scores_of_images(method: Any) -> None:
    model, images = wide(), some_images()
    scores = method(model).attribute(images, target=1)

    def remove(inputs: Any) -> tuple[Tensor, Tensor]:
        noise = 0.1 * torch.randn_like(inputs)
        return noise, inputs - noise

    def still(inputs: Any) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(inputs), inputs

    measure = functools.partial(captum.metrics.infidelity, model, inputs=images, attributions=scores, target=1)
    value = measure(perturb_func=remove, n_perturb_samples=3)
    assert value.shape == (2,) and value.isfinite().all() and value.gt(0).all()
    assert measure(perturb_func=still).abs().max() <= 1e-10


def test_infidelity_of_the_relevance_of_a_linear_model_is_zero(linear: nn.Module) -> None:
    images = some_images()
    scores = ImplicitAttentionRelevance(linear).attribute(images, target=1, baselines=0)

    def darken(inputs: Any) -> tuple[Tensor, Tensor]:
        """What is taken away, as a share of each pixel: the scores are those of whole pixels."""
        kept = torch.rand_like(inputs).round()
        return 1 - kept, inputs * kept

    value = captum.metrics.infidelity(linear, darken, images, scores, target=1, n_perturb_samples=5)
    assert value.max() <= 1e-20
