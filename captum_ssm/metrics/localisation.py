"""Comparison of scores with the tokens or pixels that are known to matter."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from captum_ssm.errors import InvalidInputError
from captum_ssm.metrics.features import sum_components
from captum_ssm.metrics.ranking import Ranking


@dataclass(frozen=True)
class Localisation:
    """Figures of the ranking of the entries that matter, for each example.

    Attributes:
        auc: (B,) how often an entry that matters scores higher than one that does not; 0.5 is chance.
        average_precision: (B,) the mean of the precision over the entries that matter.
        recall: (B,) the share of the entries that matter which is among the k highest scores.
        precision: (B,) the share of the k highest scores whose entries matter; equals recall if k is left out.
    """

    auc: Tensor
    average_precision: Tensor
    recall: Tensor
    precision: Tensor


def localisation(
    attributions: Any, truth: Tensor, *, k: int | Tensor | None = None, mask: Tensor | None = None
) -> Localisation:
    """Compare scores with the entries that are known to matter.

    Where the answer always stands at the same position, scores that depend on the position alone do well: compare with
    :func:`~captum_ssm.metrics.position_attributions` and :func:`~captum_ssm.metrics.random_attributions`.

    Args:
        attributions: Scores by any method: (B, L) or (B, L, E) of tokens, (B, H, W) or (B, C, H, W) of pixels, or a
            tuple of one tensor; summed over E or C.
        truth: (B, L) or (B, H, W), bool or number; entries that are not 0 matter.
        k: The number of highest scores that recall and precision look at: one for all, or (B,). None: the number of
            entries that matter.
        mask: (B, L) or (B, H, W), 0 at entries that are not judged, such as padding and the token at which the answer
            is read; None: all are judged.

    Returns:
        Four figures for each example. Of equal scores AUC, recall and precision are the mean over all orders; average
        precision takes equal scores at once, in agreement with scikit-learn. So scores that are all equal have an AUC
        of 0.5.

    Raises:
        InvalidInputError: If shapes do not fit, no entry or every entry of an example matters, k is out of range, or
            both truth and scores are signed, so that it is not clear which scores should be high.

    Cost:
        O(L log L).

    Example:
        >>> import torch
        >>> result = localisation(torch.tensor([[3.0, 1.0, 2.0, 0.0]]), torch.tensor([[True, True, False, False]]))
        >>> result.auc, result.recall
        (tensor([0.7500], dtype=torch.float64), tensor([0.5000], dtype=torch.float64))
    """
    scores, truth, judged = _checked(attributions, truth, mask)
    if truth.dtype != torch.bool and bool((truth < 0).any()) and bool((scores < 0).any()):
        raise InvalidInputError(
            "Both truth and scores have negative entries. To find all entries that matter pass the absolute scores, to "
            "find those that speak for the answer pass truth > 0; signs are judged by sign_accuracy."
        )
    matters = truth != 0
    _refuse_one_sided(matters & judged, judged)
    ranking = Ranking.of(*(tensor.flatten(1) for tensor in (scores, matters, judged)))
    cutoff = _checked_k(k, ranking)
    hits = ranking.hits(cutoff)
    return Localisation(
        ranking.auc(), ranking.average_precision(), hits / ranking.count.squeeze(1), hits / cutoff.squeeze(1)
    )


def sign_accuracy(attributions: Any, truth: Tensor, *, mask: Tensor | None = None) -> Tensor:
    """Return the share of the entries that matter whose score has the right sign, (B,).

    Args:
        attributions: Scores by any method: (B, L) or (B, L, E) of tokens, (B, H, W) or (B, C, H, W) of pixels, or a
            tuple of one tensor; summed over E or C.
        truth: (B, L) or (B, H, W): positive where an entry speaks for the answer, negative where it speaks against it,
            0 where it does not matter.
        mask: (B, L) or (B, H, W), 0 at entries that are not judged, such as padding; None: all are judged.

    Returns:
        (B,) a share for each example; a score of 0 has no sign, so it counts as wrong.

    Raises:
        InvalidInputError: If shapes do not fit, or no entry of an example matters.

    Example:
        >>> import torch
        >>> sign_accuracy(torch.tensor([[2.0, 1.0, 5.0]]), torch.tensor([[3.0, -1.0, 0.0]]))
        tensor([0.5000], dtype=torch.float64)
    """
    scores, truth, judged = _checked(attributions, truth, mask)
    matters = ((truth != 0) & judged).flatten(1)
    _refuse_without_truth(matters)
    right = (scores.sign() == truth.to(scores.dtype).sign()).flatten(1)
    return (right & matters).sum(1).double() / matters.sum(1)


def _checked(attributions: Any, truth: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor, Tensor]:
    """Return scores, truth and a bool tensor that is True at judged entries, all of the truth's shape.

    Raises:
        InvalidInputError: If shapes do not fit, or truth has NaN or infinite entries.
    """
    if truth.dim() not in (2, 3) or truth.numel() == 0:
        raise InvalidInputError(
            f"truth must have shape (batch, tokens) or (batch, height, width), not {tuple(truth.shape)}. Of one "
            "example keep the batch dimension: truth[None]."
        )
    if truth.is_floating_point() and not bool(truth.isfinite().all()):
        raise InvalidInputError("truth has NaN or infinite entries. Leave entries that are not judged out by mask=.")
    scores = sum_components(attributions, tuple(truth.shape))
    judged = torch.ones_like(truth, dtype=torch.bool) if mask is None else mask.bool()
    if judged.shape != truth.shape:
        raise InvalidInputError(f"mask must have the truth's shape {tuple(truth.shape)}, not {tuple(judged.shape)}.")
    return scores, truth.to(scores.device), judged.to(scores.device)


def _refuse_without_truth(matters: Tensor) -> None:
    if empty := (~matters.flatten(1).any(1)).nonzero().flatten().tolist():
        raise InvalidInputError(f"In example {empty[0]} no judged entry matters, so nothing can be found. Drop it.")


def _refuse_one_sided(matters: Tensor, judged: Tensor) -> None:
    _refuse_without_truth(matters)
    if full := (matters == judged).flatten(1).all(1).nonzero().flatten().tolist():
        raise InvalidInputError(f"In example {full[0]} every judged entry matters, so all scores are as good. Drop it.")


def _checked_k(k: int | Tensor | None, ranking: Ranking) -> Tensor:
    """Return the number of highest scores that recall and precision look at, (B, 1).

    Raises:
        InvalidInputError: If k is not a whole number from 1 to the number of judged entries.
    """
    if k is None:
        return ranking.count
    cutoff = torch.as_tensor(k, device=ranking.count.device, dtype=torch.float64)
    is_whole = bool((cutoff >= 1).all() & (cutoff == cutoff.round()).all())
    if cutoff.numel() not in (1, len(ranking.count)) or not is_whole:
        raise InvalidInputError(f"k must be a whole number from 1 on, or one for each example, not {k}.")
    cutoff = cutoff.reshape(-1, 1).expand_as(ranking.count)
    if bool((cutoff > ranking.judged).any()):
        raise InvalidInputError(
            f"k is larger than the number of judged entries ({int(ranking.judged.min())} in an example). Pass a "
            "smaller k, or leave it out."
        )
    return cutoff
