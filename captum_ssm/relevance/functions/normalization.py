"""Normalizations: by the statistics of an example itself, or by those that a model learnt."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.relevance.functions.table import composed
from captum_ssm.relevance.functions.torch_code import as_torch_writes_it


def normalized(x: Tensor, dims: list[int], weight: Any, bias: Any, eps: float, centre: bool) -> Tensor:
    """Return ``x`` over its root mean square along ``dims``, of its deviation from the mean if ``centre``."""
    x = x - x.mean(dims, keepdim=True) if centre else x
    y = x * torch.rsqrt(x.square().mean(dims, keepdim=True) + eps)
    y = y if weight is None else y * weight
    return y if bias is None else y + bias


@composed("layer_norm")
def _layer_norm(x: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any) -> Tensor:
    return normalized(x, list(range(-len(shape), 0)), weight, bias, eps, centre=True)


@composed("rms_norm")
def _rms_norm(x: Tensor, shape: Any, weight: Any = None, eps: float | None = None) -> Tensor:
    eps = torch.finfo(x.dtype).eps if eps is None else eps
    return normalized(x, list(range(-len(shape), 0)), weight, None, eps, centre=False)


@composed("group_norm")
def _group_norm(x: Tensor, groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5, *_: Any) -> Tensor:
    y = normalized(x.unflatten(1, (groups, -1)).flatten(2), [-1], None, None, eps, centre=True).view(x.shape)
    return _scaled(y, weight, bias)


def _as_in_functional(normalization: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return a function that also takes the nine arguments of the function of the same name in ``torch``."""

    def of_either(*args: Any, **kwargs: Any) -> Tensor:
        if len(args) == 9:
            x, weight, bias, mean, var, of_input, momentum, eps, _ = args
            args = (x, mean, var, weight, bias, of_input, momentum, eps)
        return normalization(*args, **kwargs)

    return of_either


@composed("batch_norm")
@_as_in_functional
def _batch_norm(
    input: Tensor, running_mean: Tensor, running_var: Tensor, weight: Tensor | None = None, bias: Tensor | None = None,
    training: bool = False, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if training:
        raise NotImplementedError("statistics of the batch, which mix its examples; run the model in evaluation mode")
    y = _scaled(input - _of_channels(running_mean, input), torch.rsqrt(running_var + eps), None)
    return _scaled(y, weight, bias)


@composed("instance_norm")
@_as_in_functional
def _instance_norm(
    input: Tensor, running_mean: Any = None, running_var: Any = None, weight: Tensor | None = None,
    bias: Tensor | None = None, use_input_stats: bool = True, momentum: float = 0.1, eps: float = 1e-5,
) -> Tensor:  # fmt: skip
    if not use_input_stats:
        return _batch_norm(input, running_mean, running_var, weight, bias, False, momentum, eps)
    y = normalized(input, list(range(2, input.dim())), None, None, eps, centre=True)
    return _scaled(y, weight, bias)


def _scaled(x: Tensor, weight: Any, bias: Any) -> Tensor:
    """Return ``x`` (N, C, ...) times a weight of each channel, plus a bias of each."""
    y = x if weight is None else x * _of_channels(weight, x)
    return y if bias is None else y + _of_channels(bias, x)


def _of_channels(t: Tensor, x: Tensor) -> Tensor:
    return t.view(-1, *[1] * (x.dim() - 2))


composed("local_response_norm")(as_torch_writes_it(F.local_response_norm))
