"""Losses of entries and of distances, all of them, their mean or their sum."""

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
    return _weighed((input - target).square(), weight, *reduction_of(*reduction, **by_name))


@composed("l1_loss")
def _l1(input: Tensor, target: Tensor, *reduction: Any, weight: Any = None, **by_name: Any) -> Tensor:
    return _weighed((input - target).abs(), weight, *reduction_of(*reduction, **by_name))


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
    return reduced(F.softplus(-target * input), *reduction_of(*reduction, **by_name))


# --- Of distances -------------------------------------------------------------------------------------------------


@composed("hinge_embedding_loss")
def _hinge_embedding(input: Tensor, target: Tensor, margin: float = 1.0, *reduction: Any, **by_name: Any) -> Tensor:
    of_others, of_same = (margin - input).relu(), input
    loss = torch.where(target == 1, 0, of_others) + torch.where(target == -1, 0, of_same)
    return reduced(loss, *reduction_of(*reduction, **by_name))


@composed("margin_ranking_loss")
def _margin_ranking(
    input1: Tensor, input2: Tensor, target: Tensor, margin: float = 0, *reduction: Any, **by_name: Any
) -> Tensor:
    return reduced((-target * (input1 - input2) + margin).relu(), *reduction_of(*reduction, **by_name))


@composed("cosine_embedding_loss")
def _cosine_embedding(
    input1: Tensor, input2: Tensor, target: Tensor, margin: float = 0, *reduction: Any, **by_name: Any
) -> Tensor:
    cosine = cosine_similarity(input1, input2, -1)
    loss = torch.where(target == 1, 1 - cosine, (cosine - margin).relu())
    return reduced(loss, *reduction_of(*reduction, **by_name))


@composed("triplet_margin_loss")
def _triplet_margin(
    anchor: Tensor, positive: Tensor, negative: Tensor, margin: float = 1.0, p: float = 2, eps: float = 1e-6,
    swap: bool = False, *reduction: Any, **by_name: Any,
) -> Tensor:  # fmt: skip
    near, far = pairwise_distance(anchor, positive, p, eps), pairwise_distance(anchor, negative, p, eps)
    far = torch.minimum(far, pairwise_distance(positive, negative, p, eps)) if swap else far
    return reduced((near - far + margin).relu(), *reduction_of(*reduction, **by_name))


for _name in ("gaussian_nll_loss", "triplet_margin_with_distance_loss"):
    composed(_name)(as_torch_writes_it(getattr(F, _name)))


# --- Reduction ----------------------------------------------------------------------------------------------------


def reduction_of(
    size_average: Any = None, reduce: Any = None, reduction: str | int = "mean", **_: Any
) -> tuple[str | int, Any, Any]:
    """Return the last three arguments of most of torch's losses in the order of :func:`reduced`."""
    return reduction, size_average, reduce


def _weighed(loss: Tensor, weight: Tensor | None, reduction: str | int, *older: Any) -> Tensor:
    """Return the loss of entries, its mean relative to the sum of the weights if there are any."""
    if weight is None:
        return reduced(loss, reduction, *older)
    loss = loss * weight
    return loss.sum() / weight.expand_as(loss).sum() if reduction == "mean" else reduced(loss, reduction, *older)
