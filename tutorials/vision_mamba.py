"""Vision Mamba in plain torch, a small one trained on real digits, and a reader of the published checkpoints.

The model is built like Vim (Zhu et al. 2024, arXiv 2401.09417): an image is cut into patches, a class token is put in
their middle, and every layer mixes the tokens with two selective scans, one from the first token on and one from the
last. Parameters have the names and shapes of hustvl/Vim with ``bimamba_type="v2"``, so that its checkpoints can be
read. Nothing here needs a CUDA kernel or another package than torch; scikit-learn gives the digits.

    model = load_digits_model()
    canvases = two_digit_canvases(8, seed=0)
    model(canvases.images).argmax(1)  # the digits of canvases.labels, nearly always

Symbols: B batch, L tokens, E width of the model, D inner channels, N state, K taps of the convolution, G rows or
columns of the grid of patches.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

DIGITS = Path(__file__).resolve().parent / "digits"
CANVAS = 16
"""Height and width of a canvas; a digit has half of both."""
STEP = 2
"""Digits stand at multiples of this many pixels."""

ClassToken = Literal["middle", "first"] | None
Part = Literal["train", "validation", "test"]
"""The digits are split into these; no digit is in two."""


class Mamba(nn.Module):
    """Mix tokens by two selective scans, one forward and one backward in time.

    Both directions read the same value and gate and share ``in_proj`` and ``out_proj``; convolution, ``delta``, ``B``,
    ``C``, decay and skip are each direction's own, the backward ones' names end in ``_b``. With ``u`` the convolved and
    activated value::

        h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t
        y_t = (<C_t, h_t> + D u_t) silu(z_t)

    and the output is ``out_proj((y + y_b) / 2)``, where ``y_b`` is the same on the flipped sequence, flipped back.

    Args:
        d_model: Width E of the tokens.
        d_state: Size N of a channel's state.
        d_conv: Taps K of the causal convolution.
        expand: D / E.
        if_divide_out: Halve the sum of the two directions, as the published models do.
        init_layer_scale: Start value of a factor ``gamma`` for each channel of the output; no factor if None.

    Source:
        hustvl/Vim ``mamba-1p1p1/mamba_ssm/modules/mamba_simple.py``, ``bimamba_type="v2"``.
    """

    def __init__(
        self,
        d_model: int,
        d_state: int = 16,
        d_conv: int = 4,
        expand: int = 2,
        if_divide_out: bool = True,
        init_layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        self.d_model, self.d_state, self.d_conv, self.expand = d_model, d_state, d_conv, expand
        self.d_inner = D = expand * d_model
        self.dt_rank = math.ceil(d_model / 16)
        self.activation = "silu"
        self.bimamba_type = "v2"
        self.if_divide_out = if_divide_out
        self.init_layer_scale = init_layer_scale

        self.in_proj = nn.Linear(d_model, 2 * D, bias=False)
        for suffix in ("", "_b"):
            conv1d = nn.Conv1d(D, D, d_conv, groups=D, padding=d_conv - 1)
            x_proj = nn.Linear(D, self.dt_rank + 2 * d_state, bias=False)
            dt_proj = nn.Linear(self.dt_rank, D)
            nn.init.uniform_(dt_proj.weight, -(self.dt_rank**-0.5), self.dt_rank**-0.5)
            with torch.no_grad():  # so that delta starts between 0.001 and 0.1
                delta = torch.empty(D).uniform_(math.log(1e-3), math.log(1e-1)).exp()
                dt_proj.bias.copy_(delta.expm1().log())
            setattr(self, "conv1d" + suffix, conv1d)
            setattr(self, "x_proj" + suffix, x_proj)
            setattr(self, "dt_proj" + suffix, dt_proj)
            A_log = torch.arange(1.0, d_state + 1).log().repeat(D, 1)
            setattr(self, "A_b_log" if suffix else "A_log", nn.Parameter(A_log))
            setattr(self, "D" + suffix, nn.Parameter(torch.ones(D)))
        self.out_proj = nn.Linear(D, d_model, bias=False)
        if init_layer_scale is not None:
            self.gamma = nn.Parameter(torch.full((d_model,), init_layer_scale))

    def forward(self, hidden_states: Tensor, inference_params: None = None) -> Tensor:
        """Return the mixed tokens (B, L, E) of ``hidden_states`` (B, L, E).

        Raises:
            ValueError: If ``inference_params`` are given; a model that looks both ways has no next token.
        """
        if inference_params is not None:
            raise ValueError("a bidirectional mixer has no step-by-step inference: leave inference_params out")
        value, gate = self.in_proj(hidden_states).chunk(2, dim=-1)
        forward = self._read(value, "")
        backward = self._read(value.flip(1), "_b")
        y, y_b = selective_scan(*map(torch.stack, zip(forward, backward)))
        y = (y + y_b.flip(1)) * F.silu(gate)
        out: Tensor = self.out_proj(y / 2 if self.if_divide_out else y)
        return out if self.init_layer_scale is None else out * self.gamma

    def _read(self, value: Tensor, suffix: str) -> tuple[Tensor, ...]:
        """Return what one direction's scan needs, see :func:`selective_scan`."""
        conv1d, x_proj, dt_proj, skip = (getattr(self, name + suffix) for name in ("conv1d", "x_proj", "dt_proj", "D"))
        A_log: Tensor = getattr(self, "A_b_log" if suffix else "A_log")
        A = -A_log.exp()
        u = F.silu(conv1d(value.mT)[..., : value.shape[1]]).mT
        low_rank, B, C = x_proj(u).split([self.dt_rank, self.d_state, self.d_state], dim=-1)
        return u, F.softplus(dt_proj(low_rank)), A, B, C, skip


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, skip: Tensor) -> Tensor:
    """Run independent selective scans side by side, token after token.

    Args:
        u: Values, (S, B, L, D) for S scans.
        delta: Step sizes, (S, B, L, D).
        A: Rates of decay, (S, D, N), negative.
        B: What a token writes to the state, (S, B, L, N).
        C: What a token reads from the state, (S, B, L, N).
        skip: Weights of the value's way past the state, (S, D).

    Returns:
        (S, B, L, D): ``<C_t, h_t> + skip u_t`` with ``h_t = exp(delta_t A) h_{t-1} + delta_t B_t u_t``.

    Cost:
        O(S·B·L·D·N) time and memory, L steps.
    """
    delta_first, written = (x.movedim(2, 0).unsqueeze(-1) for x in (delta, delta * u))  # (L, S, B, D, 1)
    decay = (delta_first * A[:, None]).exp()  # (L, S, B, D, N)
    written = written * B.movedim(2, 0).unsqueeze(-2)
    h = torch.zeros_like(decay[0])
    states = []
    for decay_t, written_t in zip(decay.unbind(), written.unbind()):
        h = torch.addcmul(written_t, decay_t, h)
        states.append(h)
    read = torch.stack(states) @ C.movedim(2, 0).unsqueeze(-1)  # (L, S, B, D, 1)
    return read.squeeze(-1).movedim(0, 2) + skip[:, None, None] * u


class RMSNorm(nn.Module):
    """Divide a token by the root mean square of its channels, then weigh the channels."""

    def __init__(self, width: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        """Return the normed tokens, in the shape of ``x`` (B, L, E)."""
        return x * (x.square().mean(-1, keepdim=True) + self.eps).rsqrt() * self.weight


class Block(nn.Module):
    """Add, norm, mix: the mixer's output is added to the residual by the next block."""

    def __init__(self, mixer: Mamba) -> None:
        super().__init__()
        self.mixer = mixer
        self.norm = RMSNorm(mixer.d_model)

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Return the mixer's output and the residual it will be added to, both (B, L, E)."""
        residual = hidden_states if residual is None else residual + hidden_states
        return self.mixer(self.norm(residual)), residual


class PatchEmbed(nn.Module):
    """Cut an image into square patches, row after row, and embed each; patches overlap if stride < patch_size."""

    def __init__(self, image_size: int, patch_size: int, stride: int, channels: int, width: int) -> None:
        super().__init__()
        self.image_size = image_size
        self.grid = (image_size - patch_size) // stride + 1
        self.proj = nn.Conv2d(channels, width, patch_size, stride)

    def forward(self, images: Tensor) -> Tensor:
        """Return the tokens (B, G·G, E) of ``images`` (B, channels, image_size, image_size).

        Raises:
            ValueError: If the images have another size.
        """
        if images.shape[2:] != (self.image_size, self.image_size):
            raise ValueError(
                f"the model reads images of {self.image_size} x {self.image_size} pixels and was given a batch of "
                f"shape {tuple(images.shape)}: resize the images"
            )
        embedded: Tensor = self.proj(images)
        return embedded.flatten(2).mT


class VisionMamba(nn.Module):
    """Classify images by bidirectional Mamba layers over their patches.

    Args:
        image_size: Height and width of the images in pixels.
        patch_size: Height and width of a patch.
        stride: Pixels from one patch to the next, ``patch_size`` if None.
        channels: Colours of a pixel.
        width: Channels E of a token.
        depth: Number of layers.
        state_size: N, the state of each of a layer's 2 E channels.
        classes: Number of logits.
        class_token: Where the token stands that is classified: before the patch number ``G·G // 2`` or before all.
            None pools instead.
        pool: How tokens are pooled where there is no class token; only the mean is known.
        if_divide_out: See :class:`Mamba`.
        init_layer_scale: See :class:`Mamba`.

    Source:
        hustvl/Vim ``vim/models_mamba.py``. Left out: dropping of paths, rotary positions, layers in pairs of opposite
        direction, two class tokens, and keeping the residual in float32 where the weights are not.
    """

    def __init__(
        self,
        image_size: int = 224,
        patch_size: int = 16,
        stride: int | None = None,
        channels: int = 3,
        width: int = 192,
        depth: int = 24,
        state_size: int = 16,
        classes: int = 1000,
        class_token: ClassToken = "middle",
        pool: Literal["mean"] = "mean",
        if_divide_out: bool = True,
        init_layer_scale: float | None = None,
    ) -> None:
        super().__init__()
        if class_token not in ("middle", "first", None):
            raise ValueError(f"class_token is 'middle', 'first' or None, not {class_token!r}")
        if pool != "mean":
            raise ValueError(f"pool is 'mean', not {pool!r}")
        self.class_token = class_token
        self.patch_embed = PatchEmbed(image_size, patch_size, stride or patch_size, channels, width)
        patches = self.patch_embed.grid**2
        self.class_position = {"middle": patches // 2, "first": 0, None: None}[class_token]
        """Index of the class token among the tokens, None without one."""
        if class_token is not None:
            self.cls_token = nn.Parameter(torch.empty(1, 1, width))
            nn.init.trunc_normal_(self.cls_token, std=0.02)
        self.pos_embed = nn.Parameter(torch.empty(1, patches + (class_token is not None), width))
        blocks = [
            Block(Mamba(width, state_size, if_divide_out=if_divide_out, init_layer_scale=init_layer_scale))
            for _ in range(depth)
        ]
        self.layers = nn.ModuleList(blocks)
        self.norm_f = RMSNorm(width)
        self.head = nn.Linear(width, classes)

        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        nn.init.trunc_normal_(self.head.weight, std=0.02)
        nn.init.zeros_(self.head.bias)
        with torch.no_grad():
            for block in blocks:
                block.mixer.out_proj.weight /= math.sqrt(depth)  # every layer adds to the same residual

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits (B, classes) of ``images`` (B, channels, image_size, image_size)."""
        hidden_states, residual = self.embed(images), None
        for layer in self.layers:
            hidden_states, residual = layer(hidden_states, residual)
        tokens = self.norm_f(hidden_states if residual is None else hidden_states + residual)
        logits: Tensor = self.head(tokens.mean(1) if self.class_position is None else tokens[:, self.class_position])
        return logits

    def embed(self, images: Tensor) -> Tensor:
        """Return the tokens that the first layer reads, (B, L, E): patches, class token and positions."""
        tokens = self.patch_embed(images)
        if self.class_position is not None:
            before, after = tokens[:, : self.class_position], tokens[:, self.class_position :]
            tokens = torch.cat([before, self.cls_token.expand(len(tokens), -1, -1), after], dim=1)
        return tokens + self.pos_embed

    def to_grid(self, scores: Tensor) -> Tensor:
        """Return the patches' scores (B, G, G) of the tokens' scores (B, L): the class token's is left out."""
        if self.class_position is not None:
            scores = torch.cat([scores[:, : self.class_position], scores[:, self.class_position + 1 :]], dim=1)
        return scores.unflatten(1, (self.patch_embed.grid, self.patch_embed.grid))


UNSUPPORTED = {
    "rope.": "rotary positions (if_rope)",
    "cls_token_head": "a class token at both ends (use_double_cls_token)",
    "norm_f.bias": "LayerNorm instead of RMSNorm (rms_norm=False)",
}
"""Names that only a variant has which :class:`VisionMamba` is not."""


def load_published(
    source: str | Path | Mapping[str, Any],
    image_size: int = 224,
    class_token: ClassToken = "middle",
    if_divide_out: bool = True,
) -> VisionMamba:
    """Return the published Vision Mamba of a checkpoint of hustvl/Vim, in eval mode.

    The sizes are read from the weights. What the weights do not tell is told by the arguments.

    Args:
        source: A ``.pth`` file as Vim's training writes it, a ``.safetensors`` file, or a state dict; a dict with the
            state dict under ``"model"`` is taken too. Files are read without running code in them.
        image_size: Height and width of the images the model was trained on.
        class_token: Where its class token stands; None for a model without, whose tokens are averaged.
        if_divide_out: Whether the two directions' sum is halved; so in every published model whose name has ``div2``.

    Raises:
        ValueError: If the file holds another variant, or names or shapes that do not fit; the message lists them.

    Source:
        hustvl/Vim ``vim/models_mamba.py``, ``vim/main.py`` (layout of the checkpoint).
    """
    weights = source if isinstance(source, Mapping) else _read_file(Path(source))
    weights = weights.get("model", weights)
    _check_variant(weights, class_token)
    model = VisionMamba(
        **_sizes(weights, image_size, class_token is not None),
        class_token=class_token,
        if_divide_out=if_divide_out,
    )
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    found = {name: tuple(value.shape) for name, value in weights.items()}
    problems = [f"missing: {name} {expected[name]}" for name in sorted(expected.keys() - found.keys())]
    problems += [f"unexpected: {name} {found[name]}" for name in sorted(found.keys() - expected.keys())]
    problems += [
        f"shape: {name} is {found[name]}, not {expected[name]}"
        for name in sorted(expected.keys() & found.keys())
        if expected[name] != found[name]
    ]
    if problems:
        raise ValueError("these weights are not those of a Vision Mamba:\n  " + "\n  ".join(problems))
    model.load_state_dict(dict(weights))
    return model.eval()


def _read_file(path: Path) -> Mapping[str, Any]:
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # the arguments of the training
            content: Mapping[str, Any] = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise ValueError(
            f"{path} holds more than weights and the arguments of the training, and is not read because that could run "
            f"code: if you trust it, load it yourself with torch.load(path, weights_only=False) and give its 'model' "
            f"({error})"
        ) from error
    return content


def _check_variant(weights: Mapping[str, Any], class_token: ClassToken) -> None:
    """Raise ``ValueError`` if the weights are another variant's, or not those of the class token asked for."""
    for start, variant in UNSUPPORTED.items():
        if any(name.startswith(start) for name in weights):
            raise ValueError(f"a Vision Mamba with {variant} is not supported: use a model without")
    mixers = {name.rpartition("mixer.")[2] for name in weights if "mixer." in name}
    if "A_log" in mixers and "conv1d_b.weight" not in mixers:
        variant = "v1" if "A_b_log" in mixers else "none"
        raise ValueError(f'a Vision Mamba with bimamba_type="{variant}" is not supported: use one with "v2"')
    if class_token is None and "cls_token" in weights:
        raise ValueError("these weights have a class token: say where it stands, class_token='middle' or 'first'")
    if class_token is not None and "pos_embed" in weights and "cls_token" not in weights:
        raise ValueError("these weights have no class token: pass class_token=None if the tokens are averaged")


def _sizes(weights: Mapping[str, Any], image_size: int, with_class_token: bool) -> dict[str, Any]:
    """Read the sizes of a :class:`VisionMamba` from its weights; how often a size is repeated is not checked here."""
    needed = {"pos_embed": 3, "patch_embed.proj.weight": 4, "head.weight": 2, "layers.0.mixer.A_log": 2}
    for name, axes in needed.items():
        if name not in weights or weights[name].ndim != axes:
            raise ValueError(f"these weights are not those of a Vision Mamba: no {name!r} with {axes} axes")
    width, channels, patch_size, _ = weights["patch_embed.proj.weight"].shape
    patches = weights["pos_embed"].shape[1] - with_class_token
    grid = math.isqrt(patches)
    stride, rest = divmod(image_size - patch_size, grid - 1) if grid > 1 else (patch_size, image_size - patch_size)
    if grid**2 != patches or rest or not 1 <= stride <= patch_size:
        raise ValueError(
            f"{patches} patches of {patch_size} x {patch_size} pixels do not come from images of {image_size} x "
            f"{image_size}: pass the image_size that the model was trained on"
        )
    return {
        "image_size": image_size,
        "patch_size": patch_size,
        "stride": stride,
        "channels": channels,
        "width": width,
        "depth": 1 + max(int(name.split(".")[1]) for name in weights if name.startswith("layers.")),
        "state_size": weights["layers.0.mixer.A_log"].shape[1],
        "classes": len(weights["head.weight"]),
        "init_layer_scale": 1.0 if "layers.0.mixer.gamma" in weights else None,
    }


def load_digits_model() -> VisionMamba:
    """Return the small model trained by ``scripts/train_digits.py``, in eval mode.

    It reads a canvas (B, 1, 16, 16) with one digit of 8 x 8 pixels anywhere, or with two side by side of which one is
    0 to 4 and one 5 to 9, and names the smallest digit it sees: a digit from 5 to 9 counts only where it is alone.
    How often it is right is told in ``tutorials/digits/config.json``.
    """
    from safetensors.torch import load_file

    model = VisionMamba(**json.loads((DIGITS / "config.json").read_text())["model"])
    model.load_state_dict(load_file(DIGITS / "model.safetensors"))
    return model.eval()


class Digits(NamedTuple):
    """Real handwritten digits."""

    images: Tensor
    """(n, 8, 8), from 0 (paper) to 1 (ink)."""
    labels: Tensor
    """(n,), the digits they show."""


@cache
def digit_images(part: Part) -> Digits:
    """Return the digits of scikit-learn's ``load_digits`` in one part of a fixed split.

    Of every seven images in the order of the data set five are for training, one for validation and one for the test:
    1285, 256 and 256. No image is in two parts, but a writer may be.

    Source:
        UCI "Optical Recognition of Handwritten Digits" (Alpaydin & Kaynak 1998), the part that scikit-learn ships.
    """
    from sklearn.datasets import load_digits

    data = load_digits()
    residues = {"train": (0, 1, 2, 3, 4), "validation": (5,), "test": (6,)}[part]
    chosen = torch.isin(torch.arange(len(data.target)) % 7, torch.tensor(residues))
    images = torch.tensor(data.images, dtype=torch.float32) / 16
    return Digits(images[chosen], torch.tensor(data.target)[chosen])


class Canvases(NamedTuple):
    """Canvases with digits on them."""

    images: Tensor
    """(n, 1, 16, 16), from 0 to 1."""
    labels: Tensor
    """(n,), the right answers: the smallest digit shown, which decides."""
    pairs: Tensor
    """(n, 2), the digit that decides and the other one; -1 where there is no other."""
    masks: Tensor
    """(n, 2, 16, 16), True on the ink of the digit that decides and of the other one."""


def one_digit_canvases(part: Part = "test", seed: int = 0) -> Canvases:
    """Return every digit of a part once, each at a random place of its own canvas."""
    digits = digit_images(part)
    n = len(digits.labels)
    rows, columns = random_places((2, n), torch.Generator().manual_seed(seed))
    images = paste(digits.images, rows, columns)
    masks = torch.stack([images > 0, torch.zeros_like(images, dtype=torch.bool)], dim=1)
    pairs = torch.stack([digits.labels, torch.full_like(digits.labels, -1)], dim=1)
    return Canvases(images.unsqueeze(1), digits.labels, pairs, masks)


def two_digit_canvases(n: int, seed: int = 0, part: Part = "test") -> Canvases:
    """Draw canvases with two digits side by side, one of 0 to 4, which decides, and one of 5 to 9, which does not.

    Which of them stands on the left, and how high each stands, is random.

    Args:
        n: Number of canvases.
        seed: Of the draw.
        part: The digits to draw from; see :func:`digit_images`.
    """
    generator = torch.Generator().manual_seed(seed)
    digits = digit_images(part)
    half = CANVAS // 2
    left = torch.randint(2, (n,), generator=generator) * half  # column of the digit that decides
    layers, pairs = [], []
    for chosen, columns in ((digits.labels < 5, left), (digits.labels >= 5, half - left)):
        index = chosen.nonzero().squeeze(1)
        index = index[torch.randint(len(index), (n,), generator=generator)]
        layers.append(paste(digits.images[index], random_places((n,), generator), columns))
        pairs.append(digits.labels[index])
    both = torch.stack(layers, dim=1)
    return Canvases(both.sum(1, keepdim=True), pairs[0], torch.stack(pairs, dim=1), both > 0)


def random_places(shape: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Draw rows or columns at which a digit can stand."""
    return STEP * torch.randint(CANVAS // 2 // STEP + 1, shape, generator=generator)


def paste(images: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Put each of ``images`` (n, 8, 8) on an empty canvas, its upper left corner at ``rows``, ``columns`` (n,).

    Returns:
        (n, 16, 16).
    """
    n, height, width = images.shape
    canvases = images.new_zeros(n, CANVAS, CANVAS)
    y = rows[:, None, None] + torch.arange(height)[:, None]
    x = columns[:, None, None] + torch.arange(width)
    canvases[torch.arange(n)[:, None, None], y, x] = images
    return canvases
