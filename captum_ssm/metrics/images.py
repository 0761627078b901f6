"""Positive and negative perturbation of images: the accuracy as pixels are replaced."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import Tensor

from captum_ssm.errors import InvalidInputError
from captum_ssm.metrics.baselines import Baselines
from captum_ssm.metrics.curve import Curve
from captum_ssm.metrics.evidence import Reader, checked_finite
from captum_ssm.metrics.trial import TENTHS, Options, Trial
from captum_ssm.network.inputs import select_examples


def positive_perturbation(
    forward_func: Callable[..., Any],
    inputs: Any,
    attributions: Any,
    *,
    baselines: Baselines,
    target: int | Tensor | list[int] | None = None,
    **options: Unpack[Options],
) -> Curve:
    """Replace the pixels of images, the most relevant first; the accuracy should fall fast.

    Args:
        forward_func: The explained model: a language model, or any callable; its outputs are (B, classes).
        inputs: Images (B, C, H, W); or token ids (B, L), or embeddings (B, L, E); or a tuple of one of them.
        attributions: Scores (B, C, H, W), (B, 1, H, W) or (B, H, W) of the images by any method; a pixel's score is the
            sum over its channels, a patch's the sum over its pixels.
        baselines: The values that replace a pixel, in the units of the model's input. The published figures have black
            pixels, 0 before the images are normalised: ``-mean / std``, as a tensor (C, 1, 1).
        target: (B,) the label of each image, or one label for all. None: the model's answers to the original images,
            so that all are right at the start.
        options: Arguments that all perturbation metrics share, see :class:`Options`.

    Returns:
        (B, S): 1 where the model's answer is right and 0 where it is wrong, with this share of the pixels replaced; the
        mean over the images is the top-1 accuracy. Report the mean of the area (over 0.1 to 0.9, so at most 0.8): lower
        is better.

    Raises:
        InvalidInputError: If shapes, types or options do not fit.
        ModelStateError: If the model is in training mode, or returns NaN or infinity.

    Cost:
        One forward for each image and fraction, and one more for each image if there is no target.

    Source:
        Chefer, Gur & Wolf, "Transformer Interpretability Beyond Attention Visualization" (CVPR 2021), section 4, and
        their code: floor(fraction * pixels) pixels.
    """
    return _accuracy_curve(1, "positive perturbation", forward_func, inputs, attributions, baselines, target, options)


def negative_perturbation(
    forward_func: Callable[..., Any],
    inputs: Any,
    attributions: Any,
    *,
    baselines: Baselines,
    target: int | Tensor | list[int] | None = None,
    **options: Unpack[Options],
) -> Curve:
    """Replace the pixels of images, the least relevant first; the answers should stay right.

    The result equals :func:`positive_perturbation` of the negated attributions.

    Args:
        forward_func: The explained model: a language model, or any callable; its outputs are (B, classes).
        inputs: Images (B, C, H, W); or token ids (B, L), or embeddings (B, L, E); or a tuple of one of them.
        attributions: Scores (B, C, H, W), (B, 1, H, W) or (B, H, W) of the images by any method.
        baselines: The values that replace a pixel, in the units of the model's input, such as a colour (C, 1, 1).
        target: (B,) the label of each image, or one label for all. None: the model's answers to the original images.
        options: Arguments that all perturbation metrics share, see :class:`Options`.

    Returns:
        (B, S): 1 where the model's answer is right and 0 where it is wrong, with this share of the pixels replaced. The
        mean of the area is reported: higher is better.

    Raises:
        InvalidInputError: If shapes, types or options do not fit.
        ModelStateError: If the model is in training mode, or returns NaN or infinity.

    Cost:
        One forward for each image and fraction, and one more for each image if there is no target.

    Source:
        Chefer, Gur & Wolf, "Transformer Interpretability Beyond Attention Visualization" (CVPR 2021), section 4.
    """
    return _accuracy_curve(-1, "negative perturbation", forward_func, inputs, attributions, baselines, target, options)


def _accuracy_curve(
    sign: int,
    name: str,
    forward_func: Callable[..., Any],
    inputs: Any,
    attributions: Any,
    baselines: Baselines,
    target: int | Tensor | list[int] | None,
    options: Options,
) -> Curve:
    """Return the accuracy as the features with the highest ``sign * score`` are replaced first."""
    options.setdefault("fractions", TENTHS[1:-1])
    trial = Trial(name, forward_func, inputs, attributions, **options, round_down=True)
    labels = _answers(trial.outputs()) if target is None else _labels(target, len(trial.inputs))
    return trial.replace(sign * trial.scores, baselines, _correctness(labels))


def _correctness(labels: Tensor) -> Reader:
    """Return a reader that gives 1 where the model's answer is the label (B,) of the example, else 0."""

    def correctness(output: Tensor, examples: Tensor) -> Tensor:
        expected = select_examples(labels, len(labels), examples).to(output.device)
        return (_answers(output) == expected).to(output.dtype)

    return correctness


def _answers(output: Tensor) -> Tensor:
    """Return the class with the highest output, (B,).

    Raises:
        InvalidInputError: If the outputs are not (B, classes).
        ModelStateError: If an output is NaN or infinite.
    """
    if output.dim() != 2 or output.shape[1] < 2:
        raise InvalidInputError(
            f"The accuracy needs outputs of shape (batch, classes), not {tuple(output.shape)}. For a score without "
            "classes take morf and lerf."
        )
    return checked_finite(output).argmax(1)


def _labels(target: int | Tensor | list[int], count: int) -> Tensor:
    """Return one class for each of ``count`` images, (B,).

    Raises:
        InvalidInputError: If the target is not one class, or one for each image.
    """
    labels = torch.as_tensor(target)
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.dim() > 1 or labels.numel() not in (1, count):
        raise InvalidInputError(
            f"target must be a class, or one class for each of {count} images, not {labels.dtype} of shape "
            f"{tuple(labels.shape)}."
        )
    return labels.expand(count)
