"""The tutorials' Vision Mamba is the published one: its equation, its names and shapes; and it knows digits."""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from tutorials.vision_mamba import (
    CANVAS,
    DIGITS,
    Block,
    Mamba,
    RMSNorm,
    VisionMamba,
    digit_images,
    load_digits_model,
    load_published,
    one_digit_canvases,
    paste,
    random_places,
    two_digit_canvases,
)

ROOT = Path(__file__).resolve().parents[1]

PARTS = ("train", "validation", "test")


def direction(value: Tensor, gate: Tensor, mixer: Mamba, suffix: str) -> Tensor:
    """One direction's (L, D) for one example, written out: a loop over tokens, channels and states."""
    weights = {name: getattr(mixer, name + suffix) for name in ("conv1d", "x_proj", "dt_proj", "D")}
    A_log: Tensor = getattr(mixer, "A_b_log" if suffix else "A_log")
    L, D = value.shape
    N, R, K = mixer.d_state, mixer.dt_rank, mixer.d_conv
    y = torch.zeros_like(value)
    h = value.new_zeros(D, N)
    for t in range(L):
        u = weights["conv1d"].bias.clone()
        for k in range(K):
            if t - k >= 0:
                u += weights["conv1d"].weight[:, 0, K - 1 - k] * value[t - k]
        u = u * torch.sigmoid(u)
        read = weights["x_proj"].weight @ u
        delta = torch.log1p(torch.exp(weights["dt_proj"].weight @ read[:R] + weights["dt_proj"].bias))
        b, c = read[R : R + N], read[R + N :]
        for d in range(D):
            for n in range(N):
                h[d, n] = torch.exp(-delta[d] * torch.exp(A_log[d, n])) * h[d, n] + delta[d] * b[n] * u[d]
            y[t, d] = (sum(c[n] * h[d, n] for n in range(N)) + weights["D"][d] * u[d]) * gate[t, d]
    return y * torch.sigmoid(gate)


def random_mixer(**sizes: Any) -> Mamba:
    """A mixer in float64 with every weight moved, so that no direction or channel is like another."""
    mixer = Mamba(**sizes).double()
    with torch.no_grad():
        for weight in mixer.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    return mixer


def random_model(**sizes: Any) -> VisionMamba:
    defaults = {"image_size": 16, "patch_size": 4, "channels": 2, "width": 8, "depth": 3, "state_size": 3, "classes": 5}
    return VisionMamba(**defaults | sizes).double().eval()


def scan_from_the_other_end(mixer: Mamba) -> Mamba:
    """The same mixer with the parameters of its two directions exchanged."""
    exchanged = {}
    for name, value in mixer.state_dict().items():
        module, _, rest = name.partition(".")
        other = {"A_log": "A_b_log", "A_b_log": "A_log"}.get(module) or module.removesuffix("_b") + "_b" * (
            not module.endswith("_b")
        )
        exchanged[name if module in ("in_proj", "out_proj") else other + "." * bool(rest) + rest] = value
    twin = Mamba(mixer.d_model, mixer.d_state, mixer.d_conv, mixer.expand).double()
    twin.load_state_dict(exchanged)
    return twin


# --- the mixer ---


@pytest.mark.parametrize(
    "sizes", [{"d_model": 4, "d_state": 3}, {"d_model": 20, "d_state": 2, "d_conv": 2, "expand": 1}]
)
@pytest.mark.parametrize("divide", [True, False])
@torch.no_grad()
def test_the_mixer_is_the_written_out_sum(sizes: dict[str, int], divide: bool) -> None:
    mixer = random_mixer(**sizes, if_divide_out=divide)
    x = torch.randn(2, 6, mixer.d_model, dtype=torch.float64)
    for example, found in zip(x, mixer(x)):
        value, gate = (example @ mixer.in_proj.weight.T).chunk(2, dim=-1)
        y = direction(value, gate, mixer, "") + direction(value.flip(0), gate.flip(0), mixer, "_b").flip(0)
        torch.testing.assert_close(found, (y / 2 if divide else y) @ mixer.out_proj.weight.T, rtol=1e-12, atol=1e-12)


@torch.no_grad()
def test_the_backward_direction_is_the_forward_one_on_the_flipped_sequence() -> None:
    mixer = random_mixer(d_model=4, d_state=3)
    x = torch.randn(2, 7, 4, dtype=torch.float64)
    torch.testing.assert_close(mixer(x), scan_from_the_other_end(mixer)(x.flip(1)).flip(1), rtol=1e-12, atol=1e-12)


def test_the_mixer_looks_both_ways() -> None:
    x = torch.randn(1, 5, 4, dtype=torch.float64, requires_grad=True)
    reached = torch.autograd.grad(random_mixer(d_model=4)(x)[0, 2].sum(), x)[0].abs().sum(-1)
    assert (reached > 0).all()


def test_gradients_of_the_mixer() -> None:
    mixer = random_mixer(d_model=2, d_state=2)
    assert torch.autograd.gradcheck(mixer, torch.randn(1, 4, 2, dtype=torch.float64, requires_grad=True))


def test_a_layer_scale_weighs_the_channels() -> None:
    mixer = random_mixer(d_model=4, init_layer_scale=0.5)
    x, gamma = torch.randn(1, 3, 4, dtype=torch.float64), mixer.gamma.detach().clone()
    scaled = mixer(x)
    nn.init.ones_(mixer.gamma)
    torch.testing.assert_close(scaled, mixer(x) * gamma)


def test_the_mixer_refuses_step_by_step_inference() -> None:
    with pytest.raises(ValueError, match="leave inference_params out"):
        Mamba(4)(torch.zeros(1, 2, 4), inference_params=object())


# --- the model around it ---


def test_the_norm_divides_by_the_root_mean_square() -> None:
    x = torch.randn(2, 3, 8)
    norm = RMSNorm(8)
    nn.init.normal_(norm.weight)
    torch.testing.assert_close(norm(x), x / (x.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm.weight)


@torch.no_grad()
def test_a_block_adds_then_norms_then_mixes() -> None:
    block = Block(random_mixer(d_model=4)).double()
    hidden, residual = torch.randn(2, 1, 5, 4, dtype=torch.float64)
    mixed, carried = block(hidden, residual)
    torch.testing.assert_close(carried, hidden + residual)
    torch.testing.assert_close(mixed, block.mixer(block.norm(hidden + residual)))
    torch.testing.assert_close(block(hidden)[1], hidden)


@pytest.mark.parametrize("image_size, stride, position", [(16, None, 8), (12, None, 4), (12, 2, 12)])
def test_the_class_token_stands_in_the_middle(image_size: int, stride: int | None, position: int) -> None:
    model = random_model(image_size=image_size, stride=stride)
    images = torch.randn(1, 2, image_size, image_size, dtype=torch.float64)
    tokens = model.embed(images) - model.pos_embed
    patches = F.unfold(images, 4, stride=stride or 4).mT @ model.patch_embed.proj.weight.flatten(1).T
    assert model.patch_embed.proj.bias is not None
    patches = patches + model.patch_embed.proj.bias
    assert model.class_position == position == patches.shape[1] // 2
    torch.testing.assert_close(tokens[:, position], model.cls_token[:, 0])
    torch.testing.assert_close(torch.cat([tokens[:, :position], tokens[:, position + 1 :]], dim=1), patches)


@pytest.mark.parametrize("class_token", ["middle", "first", None])
@torch.no_grad()
def test_the_model_is_a_residual_stream_read_at_the_class_token_or_averaged(class_token: Any) -> None:
    model = random_model(class_token=class_token)
    images = torch.randn(2, 2, 16, 16, dtype=torch.float64)
    stream = model.embed(images)
    for layer in model.layers:
        assert isinstance(layer, Block)
        stream = stream + layer.mixer(layer.norm(stream))
    stream = model.norm_f(stream)
    read = {"middle": stream[:, 8], "first": stream[:, 0], None: stream.mean(1)}[class_token]
    torch.testing.assert_close(model(images), read @ model.head.weight.T + model.head.bias, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("class_token", ["middle", "first", None])
def test_scores_go_back_to_their_patches(class_token: Any) -> None:
    model = random_model(class_token=class_token)
    images = torch.zeros(16, 2, 16, 16, dtype=torch.float64)
    for patch in range(16):  # image number p is bright at patch number p alone
        images[patch, :, 4 * (patch // 4) : 4 * (patch // 4) + 4, 4 * (patch % 4) : 4 * (patch % 4) + 4] = 1
    empty = model.embed(torch.zeros_like(images))
    bright = (model.embed(images) - empty).abs().sum(-1) > 0
    assert model.to_grid(bright).flatten(1).equal(torch.eye(16, dtype=torch.bool))


def test_images_of_another_size_are_refused() -> None:
    with pytest.raises(ValueError, match="16 x 16 pixels"):
        random_model()(torch.zeros(1, 2, 8, 8, dtype=torch.float64))


@pytest.mark.parametrize("wrong", [{"class_token": "last"}, {"pool": "max"}])
def test_unknown_readings_are_refused(wrong: dict[str, str]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong.values()))):
        random_model(**wrong)


# --- the published checkpoints ---


def published(width: int = 192, depth: int = 24, tokens: int = 197, N: int = 16, patch: int = 16) -> dict[str, Tensor]:
    """A state dict with the names, the order and the shapes of Vim's; with the defaults, of Vim-tiny's."""
    D, R = 2 * width, -(-width // 16)
    shapes: dict[str, tuple[int, ...]] = {
        "cls_token": (1, 1, width),
        "pos_embed": (1, tokens, width),
        "patch_embed.proj.weight": (width, 3, patch, patch),
        "patch_embed.proj.bias": (width,),
        "head.weight": (1000, width),
        "head.bias": (1000,),
    }
    for layer in range(depth):
        mixer = {
            "A_log": (D, N),
            "D": (D,),
            "A_b_log": (D, N),
            "D_b": (D,),
            "in_proj.weight": (2 * D, width),
            "conv1d.weight": (D, 1, 4),
            "conv1d.bias": (D,),
            "x_proj.weight": (R + 2 * N, D),
            "dt_proj.weight": (D, R),
            "dt_proj.bias": (D,),
            "conv1d_b.weight": (D, 1, 4),
            "conv1d_b.bias": (D,),
            "x_proj_b.weight": (R + 2 * N, D),
            "dt_proj_b.weight": (D, R),
            "dt_proj_b.bias": (D,),
            "out_proj.weight": (width, D),
        }
        shapes |= {f"layers.{layer}.mixer.{name}": shape for name, shape in mixer.items()}
        shapes[f"layers.{layer}.norm.weight"] = (width,)
    shapes["norm_f.weight"] = (width,)
    return {name: 0.1 * torch.randn(shape) for name, shape in shapes.items()}


SMALL = {"width": 24, "depth": 2, "tokens": 17, "N": 4, "patch": 8}
"""Sizes of a model for images of 32 x 32 pixels."""


def save_like_vim(weights: dict[str, Tensor], path: Path, **more: Any) -> Path:
    """A checkpoint as Vim's training writes it: weights, state of the optimizer, arguments and epoch."""
    optimizer = {"state": {0: {"step": 1.0}}, "param_groups": [{"lr": 1e-3, "params": [0]}]}
    arguments = argparse.Namespace(model="vim", lr=1e-3, opt_betas=None, output_dir="")
    torch.save({"model": weights, "optimizer": optimizer, "epoch": 299, "args": arguments} | more, path)
    return path


def test_vim_tiny_is_read_from_a_checkpoint(tmp_path: Path) -> None:
    weights = published()
    assert weights["layers.23.mixer.in_proj.weight"].shape == (768, 192)
    assert weights["layers.0.mixer.x_proj_b.weight"].shape == (44, 384)
    model = load_published(save_like_vim(weights, tmp_path / "vim.pth"))
    assert not model.training
    assert (len(model.layers), model.patch_embed.grid, model.class_position) == (24, 14, 98)
    assert model.patch_embed.proj.stride == (16, 16)
    state = model.state_dict()
    assert state.keys() == weights.keys()
    assert all(state[name].equal(value) for name, value in weights.items())


def test_overlapping_patches_are_told_by_the_number_of_positions() -> None:
    model = load_published(published(depth=1, tokens=27 * 27 + 1))
    assert (model.patch_embed.grid, model.patch_embed.proj.stride) == (27, (8, 8))


def test_what_is_read_is_what_was_saved(tmp_path: Path) -> None:
    model = VisionMamba(32, 8, width=24, depth=2, state_size=4, init_layer_scale=0.5).eval()
    images = torch.randn(1, 3, 32, 32)
    save_file(model.state_dict(), tmp_path / "vim.safetensors")
    for source in (tmp_path / "vim.safetensors", model.state_dict(), {"model": model.state_dict()}):
        torch.testing.assert_close(load_published(source, image_size=32)(images), model(images), rtol=0, atol=0)


def test_what_weights_do_not_tell_is_told_by_the_arguments() -> None:
    weights = published(**SMALL)
    images = torch.randn(1, 3, 32, 32)
    middle = load_published(weights, image_size=32)
    first = load_published(weights, image_size=32, class_token="first")
    whole = load_published(weights, image_size=32, if_divide_out=False)
    assert (middle.class_position, first.class_position) == (8, 0)
    assert not torch.allclose(middle(images), first(images))
    assert not torch.allclose(middle(images), whole(images))
    del weights["cls_token"]
    weights["pos_embed"] = weights["pos_embed"][:, 1:]
    assert load_published(weights, image_size=32, class_token=None).class_position is None


def without(name: str) -> dict[str, Tensor]:
    return {other: value for other, value in published(**SMALL).items() if name not in other}


@pytest.mark.parametrize(
    "weights, said",
    [
        (published(**SMALL) | {"rope.freqs_cos": torch.zeros(2)}, "if_rope"),
        (published(**SMALL) | {"norm_f.bias": torch.zeros(24)}, "rms_norm=False"),
        (without("cls_token") | {"cls_token_head": torch.zeros(1, 1, 24)}, "use_double_cls_token"),
        ({name: value for name, value in without("_b.").items() if not name.endswith("D_b")}, '"v1"'),
        ({name: value for name, value in without("_b.").items() if "_b" not in name}, '"none"'),
        (without("cls_token"), "pass class_token=None"),
        (without("pos_embed"), "no 'pos_embed'"),
        (without("head.weight"), "no 'head.weight'"),
        ({"hello": torch.zeros(2)}, "not those of a Vision Mamba"),
        (without("layers.1.mixer.dt_proj_b.bias"), r"missing: layers.1.mixer.dt_proj_b.bias \(48,\)"),
        (published(**SMALL) | {"dist_token": torch.zeros(1, 1, 24)}, r"unexpected: dist_token \(1, 1, 24\)"),
        (published(**SMALL) | {"head.bias": torch.zeros(7)}, r"shape: head.bias is \(7,\), not \(1000,\)"),
    ],
)
def test_other_weights_are_refused_by_name(weights: dict[str, Tensor], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        load_published(weights, image_size=32)


def test_another_reading_of_the_weights_is_refused() -> None:
    with pytest.raises(ValueError, match="pass the image_size"):
        load_published(published(**SMALL))
    with pytest.raises(ValueError, match="say where it stands"):
        load_published(published(**SMALL), image_size=32, class_token=None)


class Surprise:
    """What a checkpoint must not bring to life."""

    alive = False

    def __setstate__(self, state: dict[str, Any]) -> None:
        type(self).alive = True

    def __getstate__(self) -> dict[str, Any]:
        return {"some": "state"}


def test_no_code_in_a_checkpoint_is_run(tmp_path: Path) -> None:
    path = save_like_vim(published(**SMALL), tmp_path / "vim.pth", surprise=Surprise())
    with pytest.raises(ValueError, match="if you trust it"):
        load_published(path, image_size=32)
    assert not Surprise.alive


# --- the digits and the trained model ---


def test_no_digit_is_in_two_parts() -> None:
    parts = [digit_images(part) for part in PARTS]
    assert sum(len(part.labels) for part in parts) == 1797
    assert all(set(part.labels.tolist()) == set(range(10)) for part in parts)
    assert all(part.images.min() == 0 and part.images.max() == 1 for part in parts)
    seen = [{tuple(image.flatten().tolist()) for image in part.images} for part in parts]
    assert not (seen[0] & seen[1] or seen[0] & seen[2] or seen[1] & seen[2])


def test_a_digit_is_pasted_where_it_is_told() -> None:
    image = torch.rand(1, 8, 8)
    canvas = paste(image, torch.tensor([3]), torch.tensor([8]))
    torch.testing.assert_close(canvas[:, 3:11, 8:], image)
    assert canvas.count_nonzero() == image.count_nonzero()


def test_digits_stand_on_the_grid_of_the_models_patches() -> None:
    places = random_places((200,), torch.Generator().manual_seed(0))
    patch = load_digits_model().patch_embed.proj.kernel_size[0]
    assert set(places.tolist()) == set(range(0, CANVAS - 8 + 1, patch))


def test_a_canvas_with_one_digit() -> None:
    canvases = one_digit_canvases("validation", seed=1)
    digits = digit_images("validation")
    assert canvases.labels.equal(digits.labels)
    assert canvases.masks[:, 0].equal(canvases.images[:, 0] > 0)
    assert not canvases.masks[:, 1].any()
    assert canvases.pairs.equal(torch.stack([digits.labels, torch.full_like(digits.labels, -1)], dim=1))
    torch.testing.assert_close(canvases.images.sum((1, 2, 3)), digits.images.sum((1, 2)))


def test_a_canvas_with_two_digits() -> None:
    canvases = two_digit_canvases(200, seed=1)
    digits = digit_images("test")
    assert canvases.images.shape == (200, 1, CANVAS, CANVAS)
    assert canvases.labels.equal(canvases.pairs.amin(1))
    assert (canvases.pairs[:, 0] < 5).all() and (canvases.pairs[:, 1] >= 5).all()
    assert not canvases.masks.all(1).any()
    assert canvases.masks.any(1).equal(canvases.images[:, 0] > 0)
    halves = canvases.masks.unflatten(-1, (2, 8)).any(-1).any(2)  # canvas, digit, half
    assert (halves.sum(-1) == 1).all() and (halves[:, 0] != halves[:, 1]).all()
    assert 60 < halves[:, 0, 0].sum() < 140  # the digit that decides stands on either side
    known = {
        label: {tuple(image[image > 0].tolist()) for image in digits.images[digits.labels == label]}
        for label in range(10)
    }
    for image, masks, pair in zip(canvases.images, canvases.masks, canvases.pairs):
        for mask, label in zip(masks, pair.tolist()):
            assert tuple(image[0][mask].tolist()) in known[label]


def test_a_seed_is_a_draw() -> None:
    for draw in (lambda seed: two_digit_canvases(5, seed), lambda seed: one_digit_canvases("test", seed)):
        assert all(a.equal(b) for a, b in zip(draw(3), draw(3)))
        assert not draw(3).images.equal(draw(4).images)


@torch.no_grad()
def test_the_trained_model_knows_digits_it_never_saw() -> None:
    model = load_digits_model()
    assert not model.training
    for draws in ([one_digit_canvases("test", seed) for seed in range(2)], [two_digit_canvases(512)]):
        right = torch.cat([model(canvases.images).argmax(1) == canvases.labels for canvases in draws])
        assert right.double().mean() >= 0.95


def test_the_trained_model_is_small_and_says_how_good_it_is() -> None:
    assert sum(file.stat().st_size for file in DIGITS.iterdir()) < 1.5e6
    accuracy = json.loads((DIGITS / "config.json").read_text())["accuracy"]
    assert min(accuracy["test"].values()) >= 0.95


def test_notebooks_find_the_module_from_another_folder_and_need_nothing_of_the_library(tmp_path: Path) -> None:
    code = """
import sys
from tutorials.vision_mamba import load_digits_model
load_digits_model()
assert not {"captum_ssm", "mamba_ssm", "transformers"} & set(sys.modules)
"""
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, check=True)
