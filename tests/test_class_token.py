"""The published recipes for Vision Mamba's class token, against the published code written out."""

from typing import Any

import pytest
import torch
from torch import Tensor

from captum_ssm import ClassTokenAttention, ImplicitAttentionRollout, InvalidInputError
from tests import oracles_vision
from tutorials.vision_mamba import VisionMamba

RECIPES = ["raw", "rollout", "attribution-2024", "attribution-2025"]
every_recipe = pytest.mark.parametrize("recipe", RECIPES)
every_attention = pytest.mark.parametrize("attention", ["scan", "unified"])
PUBLISHED = {"late": False, "both": False}
"""How the class token's row is put together: see :func:`oracles_vision.published_row`."""


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-6) -> None:
    assert actual.shape == expected.shape
    assert expected.abs().max() > 0
    difference = (actual - expected).abs().max()
    assert difference <= tolerance * expected.abs().max(), f"{difference:.1e}"


def vision_mamba(class_token: Any = "middle", **options: Any) -> Any:
    torch.manual_seed(5)
    sizes = {"image_size": 6, "patch_size": 2, "channels": 2, "width": 4, "depth": 4, "state_size": 2, "classes": 5}
    model = VisionMamba(**sizes | options, class_token=class_token).double().eval()
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))
    return model


def some_images(count: int = 2) -> Tensor:
    return torch.randn(count, 2, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def published(
    model: Any, images: Tensor, recipe: str, attention: str, start: int, token: int | None = None, **row: bool
) -> Tensor:
    """The scores of the patches, (B, rows, columns), one image after the other, by the published code."""
    scores = []
    token = model.class_position if token is None else token
    for image in images:
        reads, gradients, _ = oracles_vision.recorded(model, image[None], 3)
        options = {"late": recipe != "attribution-2025", "both": recipe == "attribution-2025"} | row
        rows = [
            oracles_vision.published_row(block.mixer, x, token, attention, **options)[0]
            for block, x in zip(model.layers, reads, strict=True)
        ]
        slopes = [gradient[0] for gradient in gradients]
        scores.append(oracles_vision.recipe_of_one_image(recipe, rows, slopes, token, start))
    return torch.stack(scores)


def patches(method: Any, images: Tensor, **options: Any) -> Tensor:
    grid: Tensor = method.attribute(images, target=3, patches=True, **options)
    return grid.flatten(1)


# --- The recipes -----------------------------------------------------------------------------------------------------


@every_recipe
@every_attention
@pytest.mark.parametrize("start_layer", [0, 2])
@pytest.mark.parametrize(
    "options", [{}, {"class_token": "first"}, {"if_divide_out": False, "init_layer_scale": 0.5}], ids=str
)
def test_a_recipe_is_the_published_code(recipe: Any, attention: Any, start_layer: int, options: dict[str, Any]) -> None:
    model, images = vision_mamba(**options), some_images()
    method = ClassTokenAttention(model, recipe=recipe, attention=attention, start_layer=start_layer)
    assert_close(patches(method, images), published(model, images, recipe, attention, start_layer))


@pytest.mark.parametrize("recipe", RECIPES[:3])
def test_the_row_of_2024_ends_before_the_class_token(recipe: Any) -> None:
    """``compute_middle_attn_vector`` multiplies the decays, and fills the columns, before the class token alone."""
    model, images = vision_mamba(), some_images()
    method = ClassTokenAttention(model, recipe=recipe, attention="scan")
    assert_close(patches(method, images), published(model, images, recipe, "scan", 0, late=True))


def test_the_row_of_2025_has_both_directions_at_the_class_token() -> None:
    """``attn_vec`` is the sum of both directions' vectors."""
    model, images = vision_mamba(), some_images()
    method = ClassTokenAttention(model, recipe="attribution-2025")
    assert_close(patches(method, images), published(model, images, "attribution-2025", "unified", 0, both=True))


def test_the_default_is_the_recipe_of_2025() -> None:
    model, images = vision_mamba(), some_images()
    named = ClassTokenAttention(model, recipe="attribution-2025", attention="unified", start_layer=0)
    assert torch.equal(patches(ClassTokenAttention(model), images), patches(named, images))


@every_recipe
def test_a_batch_is_its_images_one_by_one(recipe: Any) -> None:
    model, images = vision_mamba(), some_images(3)
    method = ClassTokenAttention(model, recipe=recipe)
    whole = patches(method, images)
    assert_close(whole, torch.cat([patches(method, image[None]) for image in images]))
    assert_close(patches(method, images, internal_batch_size=2), whole)


@every_recipe
@every_attention
@pytest.mark.parametrize("token", [0, 2, 9])
def test_the_token_may_be_named(recipe: Any, attention: Any, token: int) -> None:
    model, images = vision_mamba(), some_images()
    method = ClassTokenAttention(model, recipe=recipe, attention=attention)
    named = method.attribute(images, target=3, query=model.class_position)
    assert torch.equal(named, method.attribute(images, target=3))
    expected = published(model, images, recipe, attention, 0, token)  # of all tokens but the named one
    others = [t for t in range(10) if t != token]
    scores = torch.zeros(2, 10, dtype=torch.float64)
    scores[:, others] = expected
    without_class = [t for t in range(10) if t != model.class_position]
    assert_close(patches(method, images, query=token), scores[:, without_class])


@every_recipe
@every_attention
def test_scores_are_not_negative_and_the_class_token_s_is_zero(recipe: Any, attention: Any) -> None:
    """Of the tokens themselves: a model that is given them, so that every token's score is seen."""
    model, images = vision_mamba(), some_images()
    tokens = model.embed(images).detach()

    class Rest(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = model

        def forward(self, tokens: Tensor) -> Tensor:
            hidden: Tensor = tokens
            residual: Any = None
            for layer in model.layers:
                hidden, residual = layer(hidden, residual)
            logits: Tensor = model.head(model.norm_f(hidden + residual)[:, model.class_position])
            return logits

    method = ClassTokenAttention(Rest().eval(), recipe=recipe, attention=attention)
    scores = method.attribute(tokens, target=3).sum(-1)
    assert scores.min() >= 0 and scores[:, model.class_position].abs().max() == 0
    expected = published(model, images, recipe, attention, 0)
    assert_close(torch.cat([scores[:, :4], scores[:, 5:]], dim=1), expected)


@every_recipe
def test_a_direction_can_be_left_out(recipe: Any) -> None:
    """The class token stands first: of the forward direction nothing but its own column is left."""
    model, images = vision_mamba("first"), some_images()
    method = ClassTokenAttention(model, recipe=recipe, attention="scan", without="backward")
    if recipe == "rollout":
        assert patches(method, images).abs().max() == 0
    assert patches(method, images).isfinite().all()


def test_a_row_without_differences_scales_to_zero() -> None:
    """One token alone: its only entry is the smallest and the largest."""
    model = vision_mamba(image_size=2)
    for recipe in ("raw", "attribution-2024", "attribution-2025"):
        method = ClassTokenAttention(model, recipe=recipe)
        scores = method.attribute(some_images()[..., :2, :2], target=3)
        assert scores.isfinite().all()


# --- What is refused -------------------------------------------------------------------------------------------------


def test_unknown_options_are_refused() -> None:
    model = vision_mamba()
    with pytest.raises(InvalidInputError, match=r"recipe must be one of raw, rollout, .* not 'ours'"):
        ClassTokenAttention(model, recipe="ours")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="start_layer must be an int of at least 0, not -1"):
        ClassTokenAttention(model, start_layer=-1)
    with pytest.raises(InvalidInputError, match="start_layer is 4, but the model has 4 layers"):
        ClassTokenAttention(model, start_layer=4).attribute(some_images(), target=3)
    assert ClassTokenAttention(model, start_layer=3).attribute(some_images(), target=3).isfinite().all()
    with pytest.raises(InvalidInputError, match="attention must be 'unified' or 'scan'"):
        ClassTokenAttention(model, attention="both")


@every_recipe
def test_a_model_that_pools_has_no_class_token(recipe: Any) -> None:
    model = vision_mamba(None)
    method = ClassTokenAttention(model, recipe=recipe)
    with pytest.raises(InvalidInputError, match=r"read at several tokens.*`query`.*ImplicitAttentionRollout"):
        method.attribute(some_images(), target=3)
    assert method.attribute(some_images(), target=3, query=4).isfinite().all()
    with pytest.raises(InvalidInputError, match="read at several tokens"):
        method.attribute(some_images(), target=3, query=torch.full((2, 9), 0.5))


@every_recipe
def test_the_recipes_look_at_less_than_a_rollout(recipe: Any) -> None:
    """They are not the rollout of the whole matrices, and do not claim to be."""
    model, images = vision_mamba(), some_images()
    rolled = patches(ImplicitAttentionRollout(model), images)
    assert (patches(ClassTokenAttention(model, recipe=recipe), images) - rolled).abs().max() > 1e-3 * rolled.max()
