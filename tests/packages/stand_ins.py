"""Small stand-ins for what these packages import and their layers need little or nothing of.

mambavision calls the kernel of mamba_ssm, which needs a GPU: here the recurrence runs token by token. timm and
fairscale need a torchvision that is built against the same torch. recurrentgemma imports its code for jax beside that
for torch.
"""

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from types import ModuleType
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch import Tensor, nn


def selective_scan(
    x: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, delta_bias: Tensor, **options: Any
) -> Tensor:
    """Run the recurrence of mamba_ssm's kernel; ``x`` and ``delta`` are (B, D, L), ``B`` and ``C`` are (B, N, L)."""
    assert options["delta_softplus"] and options["z"] is None
    delta = F.softplus(delta + delta_bias.unsqueeze(-1))
    h, outputs = x.new_zeros(*x.shape[:2], A.shape[1]), []
    for t in range(x.shape[2]):
        decay = torch.exp(delta[:, :, t, None] * A)
        h = decay * h + (delta[:, :, t] * x[:, :, t]).unsqueeze(-1) * B[:, None, :, t]
        outputs.append((h * C[:, None, :, t]).sum(-1) + D * x[:, :, t])
    return torch.stack(outputs, -1)


class Mlp(nn.Module):
    """The MLP of timm."""

    def __init__(self, in_features: int, hidden_features: int, act_layer: Callable[[], nn.Module], drop: float) -> None:
        super().__init__()
        self.fc1, self.act = nn.Linear(in_features, hidden_features), act_layer()
        self.fc2 = nn.Linear(hidden_features, in_features)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


class LayerNorm2d(nn.LayerNorm):
    """The layer norm over the channels of an image (B, C, H, W), of timm."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.movedim(1, -1)).movedim(-1, 1)


def unused(*args: Any, **kwargs: Any) -> Any:
    """Stands for what no test calls."""
    raise NotImplementedError


def same(function: Any) -> Any:
    """A decorator that changes nothing."""
    return function


class Anything:
    """Stands for a type of jaxtyping, of any shape."""

    def __class_getitem__(cls, item: Any) -> type[Any]:
        return cls


MODULES: dict[str, dict[str, Any]] = {
    "timm.models.registry": {"register_model": same},
    "timm.models.layers": {
        "trunc_normal_": nn.init.trunc_normal_, "DropPath": nn.Identity, "LayerNorm2d": LayerNorm2d,
        "drop_path": unused,
    },
    "timm.models._builder": {"resolve_pretrained_cfg": unused, "_update_default_kwargs": unused},
    "timm.models.vision_transformer": {"Mlp": Mlp, "PatchEmbed": unused},
    "mamba_ssm.ops.selective_scan_interface": {"selective_scan_fn": selective_scan},
    "jaxtyping": dict.fromkeys(("Float", "Integer", "Bool", "Int", "Shaped", "PRNGKeyArray"), Anything),
    "sentencepiece": {"SentencePieceProcessor": Anything},
    "recurrentgemma.jax": dict.fromkeys(("complex_lib", "layers", "scan"), None),
    "fairscale.nn": {"checkpoint_wrapper": unused, "wrap": unused},
}  # fmt: skip


@contextmanager
def installed() -> Iterator[None]:
    """Let imports find the stand-ins while the context is open."""
    stand_ins: dict[str, ModuleType] = {}
    for path, contents in MODULES.items():
        parts = path.split(".")
        installed_root = find_spec(parts[0]) is not None
        for depth in range(len(parts) if installed_root else 1, len(parts) + 1):
            stand_ins.setdefault(name := ".".join(parts[:depth]), ModuleType(name))
        vars(stand_ins[path]).update(contents)
    with patch.dict(sys.modules, stand_ins):
        imported = dict(sys.modules)
        yield
        imported = {name: module for name, module in sys.modules.items() if name not in imported}
    sys.modules.update(imported)
