"""Losses: of entries, of distances, and of classes; then reduced to their mean or their sum."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.relevance.functions.statistics import cosine_similarity, pairwise_distance
from captum_ssm.relevance.functions.table import composed
from captum_ssm.relevance.functions.torch_code import as_torch_writes_it

REDUCTIONS = ("none", "mean", "sum")


def reduced(loss: Tensor, reduction: str | int = "mean", size_average: Any = None, reduce: Any = None) -> Tensor:
    """Return all entries, their mean, or their sum; functions in ``torch`` number the three."""
    if size_average is not None or reduce is not None:
        reduction = "none" if reduce is False else "sum" if size_average is False else "mean"
    name = reduction if isinstance(reduction, str) else REDUCTIONS[reduction]
    return loss if name == "none" else loss.mean() if name == "mean" else loss.sum()


# --- Of entries ---------------------------------------------------------------------------------------------------


@composed("mse_loss")
def _mse(input: Tensor, target: Tensor, *reduction: Any, weight: Any = None, **by_name: Any) -> Tensor:
    return _weighed((input - target).square(), weight, *_reduction(*reduction, **by_name))


@composed("l1_loss")
def _l1(input: Tensor, target: Tensor, *reduction: Any, weight: Any = None, **by_name: Any) -> Tensor:
    return _weighed((input - target).abs(), weight, *_reduction(*reduction, **by_name))


@composed("smooth_l1_loss")
def _smooth_l1(
    input: Tensor, target: Tensor, size_average: Any = None, reduce: Any = None, reduction: str = "mean",
    beta: float = 1.0,
) -> Tensor:  # fmt: skip
    distance = (input - target).abs()
    return reduced(_bent(distance, beta) / beta if beta else distance, reduction, size_average, reduce)


@composed("huber_loss")
def _huber(
    input: Tensor, target: Tensor, reduction: str = "mean", delta: float = 1.0, weight: Tensor | None = None
) -> Tensor:
    return _weighed(_bent((input - target).abs(), delta), weight, reduction)


def _bent(distance: Tensor, bend: float) -> Tensor:
    """Return ``d² / 2`` up to the bend, and the line of the same slope from there on."""
    near = distance.clamp_max(bend)
    return near.square() / 2 + bend * (distance - near)


@composed("binary_cross_entropy")
def _binary_cross_entropy(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: Any = None, reduce: Any = None,
    reduction: str = "mean",
) -> Tensor:  # fmt: skip
    log, log_of_rest = (t.log().clamp_min(-100) for t in (input, 1 - input))
    loss = -(target * log + (1 - target) * log_of_rest)
    return reduced(loss if weight is None else loss * weight, reduction, size_average, reduce)


@composed("binary_cross_entropy_with_logits")
def _binary_cross_entropy_of_logits(
    input: Tensor, target: Tensor, weight: Tensor | None = None, size_average: Any = None, reduce: Any = None,
    reduction: str = "mean", pos_weight: Tensor | None = None,
) -> Tensor:  # fmt: skip
    of_positive = F.softplus(-input) if pos_weight is None else F.softplus(-input) * pos_weight
    loss = target * of_positive + (1 - target) * F.softplus(input)
    return reduced(loss if weight is None else loss * weight, reduction, size_average, reduce)


@composed("kl_div")
def _kl(
    input: Tensor, target: Tensor, size_average: Any = None, reduce: Any = None, reduction: str = "mean",
    log_target: bool = False,
) -> Tensor:  # fmt: skip
    loss = target.exp() * (target - input) if log_target else torch.xlogy(target, target) - target * input
    if reduction == "batchmean":
        return loss.sum() / len(input)
    return reduced(loss, reduction, size_average, reduce)


@composed("poisson_nll_loss")
def _poisson_nll(
    input: Tensor, target: Tensor, log_input: bool = True, full: bool = False, size_average: Any = None,
    eps: float = 1e-8, reduce: Any = None, reduction: str = "mean",
) -> Tensor:  # fmt: skip
    loss = input.exp() - target * input if log_input else input - target * (input + eps).log()
    if full:
        one = torch.where(target > 1, target, torch.ones_like(target))
        stirling = one * one.log() - one + 0.5 * (2 * math.pi * one).log()
        loss = loss + stirling.masked_fill(target <= 1, 0)
    return reduced(loss, reduction, size_average, reduce)


@composed("soft_margin_loss")
def _soft_margin(input: Tensor, target: Tensor, *reduction: Any, **by_name: Any) -> Tensor:
    return reduced(F.softplus(-target * input), *_reduction(*reduction, **by_name))


# --- Of distances -------------------------------------------------------------------------------------------------


@composed("hinge_embedding_loss")
def _hinge_embedding(input: Tensor, target: Tensor, margin: float = 1.0, *reduction: Any, **by_name: Any) -> Tensor:
    of_others, of_same = (margin - input).relu(), input
    loss = torch.where(target == 1, 0, of_others) + torch.where(target == -1, 0, of_same)
    return reduced(loss, *_reduction(*reduction, **by_name))


@composed("margin_ranking_loss")
def _margin_ranking(
    input1: Tensor, input2: Tensor, target: Tensor, margin: float = 0, *reduction: Any, **by_name: Any
) -> Tensor:
    return reduced((-target * (input1 - input2) + margin).relu(), *_reduction(*reduction, **by_name))


@composed("cosine_embedding_loss")
def _cosine_embedding(
    input1: Tensor, input2: Tensor, target: Tensor, margin: float = 0, *reduction: Any, **by_name: Any
) -> Tensor:
    cosine = cosine_similarity(input1, input2, -1)
    loss = torch.where(target == 1, 1 - cosine, (cosine - margin).relu())
    return reduced(loss, *_reduction(*reduction, **by_name))


@composed("triplet_margin_loss")
def _triplet_margin(
    anchor: Tensor, positive: Tensor, negative: Tensor, margin: float = 1.0, p: float = 2, eps: float = 1e-6,
    swap: bool = False, *reduction: Any, **by_name: Any,
) -> Tensor:  # fmt: skip
    near, far = pairwise_distance(anchor, positive, p, eps), pairwise_distance(anchor, negative, p, eps)
    far = torch.minimum(far, pairwise_distance(positive, negative, p, eps)) if swap else far
    return reduced((near - far + margin).relu(), *_reduction(*reduction, **by_name))


# --- Of classes ---------------------------------------------------------------------------------------------------


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
    return reduced((loss * others).sum(-1) / input.shape[-1], *_reduction(*reduction, **by_name))


for _name in ("gaussian_nll_loss", "multilabel_soft_margin_loss", "triplet_margin_with_distance_loss"):
    composed(_name)(as_torch_writes_it(getattr(F, _name)))


# --- Reduction ----------------------------------------------------------------------------------------------------


def _reduction(
    size_average: Any = None, reduce: Any = None, reduction: str | int = "mean", **_: Any
) -> tuple[str | int, Any, Any]:
    """Return the last three arguments of torch's losses in the order of :func:`reduced`."""
    return reduction, size_average, reduce


def _weighed(loss: Tensor, weight: Tensor | None, reduction: str | int, *older: Any) -> Tensor:
    """Return the loss of entries, its mean relative to the sum of the weights if there are any."""
    if weight is None:
        return reduced(loss, reduction, *older)
    loss = loss * weight
    return loss.sum() / weight.expand_as(loss).sum() if reduction == "mean" else reduced(loss, reduction, *older)
