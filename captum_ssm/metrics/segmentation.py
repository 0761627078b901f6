"""Comparison of relevance maps with the masks of the objects in images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.errors import InvalidInputError
from captum_ssm.metrics.features import finite_tensor
from captum_ssm.metrics.ranking import Ranking

Classes = Literal["both", "foreground"]


@dataclass(frozen=True)
class Segmentation:
    """Counts of pixels in each image, and the figures over all images.

    Attributes:
        right: (B,) the number of pixels that the map puts on the side of the mask.
        judged: (B,) the number of judged pixels.
        intersection: (B, 2) the number of pixels that both map and mask call background, and foreground.
        union: (B, 2) the number of pixels that at least one of them calls background, and foreground.
        average_precision: (B,) the average precision of each image.
    """

    right: Tensor
    judged: Tensor
    intersection: Tensor
    union: Tensor
    average_precision: Tensor

    @property
    def pixel_accuracy(self) -> float:
        """The share of all judged pixels that the maps put on the side of the masks."""
        return float(self.right.sum() / self.judged.sum())

    @property
    def iou(self) -> Tensor:
        """Intersection over union of background and foreground, (2,), after both are summed over the images."""
        return self.intersection.sum(0) / self.union.sum(0).clamp(min=1)

    @property
    def mean_iou(self) -> float:
        """The mean IoU of background and foreground."""
        return float(self.iou.mean())

    @property
    def mean_average_precision(self) -> float:
        """The mean of the average precision over the images."""
        return float(self.average_precision.mean())

    @classmethod
    def join(cls, parts: Sequence[Segmentation]) -> Segmentation:
        """Join the counts of several batches, such as of images of different sizes.

        Args:
            parts: One result or more.

        Returns:
            The counts of all images, in this order.

        Raises:
            InvalidInputError: If there is no result.
        """
        if not parts:
            raise InvalidInputError("There is nothing to join: pass one or more results of segmentation.")
        return cls(*(torch.cat([getattr(part, field.name) for part in parts]) for field in fields(cls)))


def segmentation(
    maps: Any,
    masks: Tensor,
    *,
    threshold: float | None = None,
    minmax: bool = True,
    classes: Classes = "both",
) -> Segmentation:
    """Compare relevance maps with the objects' masks.

    A map is upsampled bilinearly to its mask, and pixels above the mean of the map are called foreground.

    Args:
        maps: (B, h, w) or (B, C, h, w), summed over channels, of any resolution: scores of the patches or of the pixels
            by any method; or a tuple of one tensor.
        masks: (B, H, W): 1 or True in the object, 0 outside, -1 where a pixel is not judged.
        threshold: Pixels above this number are called foreground; None: pixels above the mean of their map.
        minmax: Scale each upsampled map to 0..1 first. The scale matters for a fixed threshold, and for average
            precision of both classes, which needs maps in 0..1. Constant maps become 0: all background.
        classes: The classes that average precision ranks. ``"both"``, like the published figures: each pixel twice, by
            its relevance as foreground and by 1 less its relevance as background. ``"foreground"``: each pixel once.

    Returns:
        Counts for each image, with pixel accuracy, mean IoU and mean average precision over all images.

    Raises:
        InvalidInputError: If shapes or numbers do not fit, or an option is unknown.

    Cost:
        O(H·W log(H·W)).

    Source:
        Chefer, Gur & Wolf, "Transformer Interpretability Beyond Attention Visualization" (CVPR 2021), section 4, and
        their code (``imagenet_seg_eval.py``).

    Example:
        >>> import torch
        >>> mask = torch.tensor([[[1, 0], [0, 0]]])
        >>> result = segmentation(torch.tensor([[[0.9, 0.1], [0.2, 0.6]]]), mask)
        >>> result.pixel_accuracy, result.mean_average_precision
        (0.75, 0.95)
    """
    truth, judged = _checked_masks(masks)
    relevance = _upsampled(maps, tuple(truth.shape)).to(truth.device)
    scaled = _scaled(relevance)
    if minmax:
        relevance = scaled
    # Scaling does not change which pixels lie above the mean, but the mean of a constant map is exact only once scaled.
    foreground = scaled > scaled.mean((1, 2), keepdim=True) if threshold is None else relevance > threshold
    pairs = [(~foreground & judged, ~truth & judged), (foreground & judged, truth & judged)]
    intersection = torch.stack([_count(predicted & true) for predicted, true in pairs], dim=1)
    union = torch.stack([_count(predicted | true) for predicted, true in pairs], dim=1)
    return Segmentation(
        _count((foreground == truth) & judged),
        _count(judged),
        intersection,
        union,
        _average_precision(relevance.flatten(1), truth.flatten(1), judged.flatten(1), classes),
    )


def _scaled(maps: Tensor) -> Tensor:
    """Return each map scaled to 0..1, or 0 if it is constant."""
    low, high = maps.amin((1, 2), keepdim=True), maps.amax((1, 2), keepdim=True)
    return torch.where(high > low, (maps - low) / (high - low), 0.0)


def _count(pixels: Tensor) -> Tensor:
    """Return the number of True pixels in each image, (B,)."""
    return pixels.sum((1, 2)).double()


def _average_precision(relevance: Tensor, truth: Tensor, judged: Tensor, classes: Classes) -> Tensor:
    if classes == "both":
        if bool((relevance < 0).any() | (relevance > 1).any()):
            raise InvalidInputError(
                "Average precision of both classes takes 1 less the relevance for the background, so maps must lie in "
                "0..1. Pass minmax=True, or classes='foreground'."
            )
        relevance = torch.cat((1 - relevance, relevance), dim=1)
        truth, judged = torch.cat((~truth, truth), dim=1), torch.cat((judged, judged), dim=1)
    elif classes != "foreground":
        raise InvalidInputError(f"classes must be 'both' or 'foreground', not {classes!r}.")
    elif empty := (~(truth & judged).any(1)).nonzero().flatten().tolist():
        raise InvalidInputError(f"Image {empty[0]} has no foreground to rank. Drop it, or pass classes='both'.")
    return Ranking.of(relevance, truth, judged).average_precision()


def _checked_masks(masks: Tensor) -> tuple[Tensor, Tensor]:
    """Return two bool tensors (B, H, W): True in the object, and True at judged pixels.

    Raises:
        InvalidInputError: If the shape or a number does not fit, or no pixel of an image is judged.
    """
    if masks.dim() != 3 or masks.numel() == 0:
        raise InvalidInputError(f"masks must have shape (batch, height, width), not {tuple(masks.shape)}.")
    if not bool(((masks == 0) | (masks == 1) | (masks == -1)).all()):
        raise InvalidInputError(
            "masks must be 1 in the object, 0 outside and -1 where a pixel is not judged, but there are other numbers. "
            "Of a mask with several classes take one: masks == 3."
        )
    judged = masks != -1
    if not bool(judged.flatten(1).any(1).all()):
        raise InvalidInputError("A mask has no judged pixel at all. Drop that image.")
    return masks == 1, judged


def _upsampled(maps: Any, shape: tuple[int, ...]) -> Tensor:
    """Upsample the maps to the masks.

    Args:
        maps: (B, h, w) or (B, C, h, w), or a tuple of one tensor.
        shape: The masks' shape, (B, H, W).

    Returns:
        (B, H, W) in 64 bits, but rounded to 32 bits, so that rounding breaks no tie.

    Raises:
        InvalidInputError: If the shapes do not fit.
    """
    tensor = finite_tensor(maps, "maps")
    if tensor.dim() not in (3, 4) or len(tensor) != shape[0] or tensor.numel() == 0:
        raise InvalidInputError(
            f"maps must have shape (batch, height, width), or (batch, channels, height, width), with a batch of "
            f"{shape[0]} as in masks, not {tuple(tensor.shape)}. Unfold tokens into rows of patches first: "
            "scores.unflatten(1, (rows, columns))."
        )
    pixels = (tensor if tensor.dim() == 4 else tensor.unsqueeze(1)).double().sum(1, keepdim=True)
    if pixels.shape[2:] != shape[1:]:
        pixels = F.interpolate(pixels, shape[1:], mode="bilinear", align_corners=False)
    return pixels.squeeze(1).float().double()
