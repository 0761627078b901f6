"""Code that a rule cannot follow, such as a fused kernel: by its name, the same code written in functions of torch."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from captum_ssm.layers.registry import Registry
from captum_ssm.relevance.functions.normalization import normalized

EXTERNAL_CODE: Registry[Any] = Registry("A rule", "captum_ssm.unregister_rule")
"""By the name of a class of modules, or of a function that they call past torch's functions: its composition.

The composition of a module gets the module and then its arguments. A function's name may be preceded by the name of the
module that calls it: ``"package.module.function"``. A :class:`~captum_ssm.relevance.kernels.Kernel` is called
by the names of its arguments.
"""


def _add_and_norm(
    x: Tensor, weight: Tensor, bias: Tensor | None, residual: Tensor | None = None, *, eps: float = 1e-6,
    prenorm: bool = False, is_rms_norm: bool = False, **_: Any,
) -> Any:  # fmt: skip
    """Add a residual and normalize, as the kernels of mamba_ssm and fla do; with ``prenorm`` return the sum too."""
    x = x if residual is None else x + residual
    y = normalized(x, [-1], weight, bias, eps, centre=not is_rms_norm)
    return (y, x) if prenorm else y


def _swiglu(x: Tensor, y: Tensor) -> Tensor:
    return F.silu(x) * y


def _swiglu_linear(x: Tensor, y: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return F.linear(F.silu(x) * y, weight, bias)


for _name, _composition, _owner in (
    ("layer_norm_fn", _add_and_norm, _add_and_norm),
    ("rms_norm_fn", partial(_add_and_norm, is_rms_norm=True), _add_and_norm),
    ("fla.modules.norm.layernorm.layer_norm", partial(_add_and_norm, eps=1e-5), _add_and_norm),
    ("fla.modules.norm.layernorm.rms_norm", partial(_add_and_norm, eps=1e-5, is_rms_norm=True), _add_and_norm),
    ("fla.modules.mlp.swiglu", _swiglu, _swiglu),
    ("fla.modules.mlp.swiglu_linear", _swiglu_linear, _swiglu_linear),
):
    EXTERNAL_CODE.add(_name, _composition, _owner)
