"""Losses of classes, by their numbers or their probabilities."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.relevance.functions.losses import reduced, reduction_of
from captum_ssm.relevance.functions.table import composed
from captum_ssm.relevance.functions.torch_code import as_torch_writes_it


@composed("nll_loss", aliases=("nll_loss_nd",))
def _nll(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: Any = None, ignore_index: int = -100,
    reduce: Any = None, reduction: str | int = "mean",
) -> Tensor:  # fmt: skip
    shown = target != ignore_index
    numbers = target.masked_fill(~shown, 0)
    weights = shown.to(input.dtype) if weight is None else weight.to(input.dtype)[numbers] * shown
    axis = 0 if input.dim() == 1 else 1
    loss = -input.gather(axis, numbers.unsqueeze(axis)).squeeze(axis) * weights
    if size_average is None and reduce is None and reduction in ("mean", 1):
        return loss.sum() / weights.sum()
    return reduced(loss, reduction, size_average, reduce)


@composed("cross_entropy", aliases=("cross_entropy_loss",))
def _cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: Any = None, ignore_index: int = -100,
    reduce: Any = None, reduction: str = "mean", label_smoothing: float = 0.0,
) -> Tensor:  # fmt: skip
    axis = 0 if input.dim() == 1 else 1
    logs, C = F.log_softmax(input, axis), input.shape[axis]
    of_classes = torch.ones(C, dtype=logs.dtype, device=logs.device) if weight is None else weight.to(logs.dtype)
    of_classes = of_classes.view(-1, *[1] * (input.dim() - 2))
    if target.is_floating_point():
        target = target * (1 - label_smoothing) + label_smoothing / C
        loss = -(logs * of_classes * target).sum(axis)
        return loss.sum() * (C / input.numel()) if reduction == "mean" else reduced(loss, reduction)
    loss = _nll(logs, target, weight, size_average, ignore_index, reduce, reduction)
    if not label_smoothing:
        return loss
    shown = target != ignore_index
    smooth = -(logs * of_classes).sum(axis) * shown
    if reduction == "mean":
        seen = target.masked_fill(~shown, 0)
        total = (of_classes.flatten()[seen] * shown).sum()
        return (1 - label_smoothing) * loss + label_smoothing / C * (smooth.sum() / total)
    return (1 - label_smoothing) * loss + label_smoothing / C * reduced(smooth, reduction)


@composed("linear_cross_entropy")
def _linear_cross_entropy(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, linear_bias: Tensor | None = None,
    weight: Tensor | None = None, reduction: str = "mean", ignore_index: int | None = None,
    label_smoothing: float = 0.0, options: Any = None,
) -> Tensor:  # fmt: skip
    if linear_weight.dim() != 2:
        raise NotImplementedError("classes along several axes")
    logits, hidden = F.linear(input, linear_weight, linear_bias), -100 if ignore_index is None else ignore_index
    return _cross_entropy(logits, target, weight, None, hidden, None, reduction, label_smoothing)


@composed("multi_margin_loss")
def _multi_margin(
    input: Tensor, target: Tensor, p: int = 1, margin: float = 1.0, weight: Tensor | None = None, *reduction: Any,
    **by_name: Any,
) -> Tensor:  # fmt: skip
    numbers = target.view(*input.shape[:-1], 1)
    loss = (margin - input.gather(-1, numbers) + input).relu()
    loss = loss if p == 1 else loss.square()
    loss = loss if weight is None else loss * weight[numbers]
    others = torch.arange(input.shape[-1], device=input.device) != numbers
    return reduced((loss * others).sum(-1) / input.shape[-1], *reduction_of(*reduction, **by_name))


composed("multilabel_soft_margin_loss")(as_torch_writes_it(F.multilabel_soft_margin_loss))
