"""Convolutions whose kernel depends on the input too: the product of input and kernel, and then the bias."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from captum_ssm.relevance.functions.table import FUNCTIONS, Function


def convolved(x: Tensor, weight: Tensor, *options: Any) -> Tensor:
    """Compute a convolution without bias, which is linear in each of its two tensors.

    Args:
        x: The input (B, channels, ...).
        weight: The kernel (output channels, channels of a group, ...); of a transposed convolution (channels, output
            channels of a group, ...).
        options: Those of ``torch.convolution``.

    Returns:
        The output (B, output channels, ...).
    """
    if has_torch_function((x, weight)):
        return handle_torch_function(convolved, (x, weight), x, weight, *options)
    return torch.convolution(x, weight, None, *options)


def _convolution(x: Tensor, weight: Tensor, bias: Tensor | None, *options: Any) -> Tensor:
    """Convolve examples, or a single one, and add the bias."""
    single = x.dim() < weight.dim()
    y = convolved(x.unsqueeze(0) if single else x, weight, *options)
    y = y if bias is None else y + bias.view(-1, *[1] * (weight.dim() - 2))
    return y.squeeze(0) if single else y


def _forward(
    x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, dilation: Any = 1, groups: int = 1
) -> Tensor:
    axes = weight.dim() - 2
    if isinstance(padding, str):
        raise NotImplementedError(f"padding {padding!r} of a convolution whose kernel depends on the input")
    each = (_listed(option, axes) for option in (stride, padding, dilation))
    return _convolution(x, weight, bias, *each, False, [0] * axes, groups)


def _transposed(
    x: Tensor, weight: Tensor, bias: Any = None, stride: Any = 1, padding: Any = 0, output_padding: Any = 0,
    groups: int = 1, dilation: Any = 1,
) -> Tensor:  # fmt: skip
    axes = weight.dim() - 2
    each = (_listed(option, axes) for option in (stride, padding, dilation))
    return _convolution(x, weight, bias, *each, True, _listed(output_padding, axes), groups)


def _listed(option: Any, axes: int) -> list[int]:
    return [option] * axes if isinstance(option, int) else list(option) * (axes if len(option) == 1 else 1)


FUNCTIONS.declare(Function("convolved", "product", contraction=True))
_compositions: dict[str, Callable[..., Tensor]] = {"convolution": _convolution}
for _axes in (1, 2, 3):
    _compositions |= {f"conv{_axes}d": _forward, f"conv_transpose{_axes}d": _transposed}
for _name, _composition in _compositions.items():
    FUNCTIONS.declare(Function(_name, "product", contraction=True, factors=1, composition=_composition))
