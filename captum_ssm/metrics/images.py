"""Positive and negative perturbation of images: the accuracy as pixels are taken away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Unpack

import torch
from torch import Tensor

from captum_ssm.errors import InvalidInputError
from captum_ssm.metrics.baselines import Baselines
from captum_ssm.metrics.curve import Curve
from captum_ssm.metrics.evidence import Read, finite, of_examples
from captum_ssm.metrics.trial import TENTHS, Options, Trial


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
        forward_func: What the attribution method got; its outputs are (B, classes).
        inputs: Images (B, C, H, W), or a tuple of one such tensor; or any other inputs of :func:`activation`.
        attributions: What any attribution method returned for them; a pixel's score is the sum over its channels, a
            patch's over its pixels. Also (B, 1, H, W) or (B, H, W).
        baselines: What takes the place of a pixel, as the model gets it. The published figures have black pixels, 0
            before the images are normalised: ``-mean / std``, as a tensor (C, 1, 1).
        target: The label of each image, or one for all. None: the model's own answers to the whole images, which are
            then all right.
        options: See :class:`Options`.

    Returns:
        1 where the model's answer is right and 0 where it is wrong, with this share of the pixels replaced; the mean is
        the top-1 accuracy. The mean of the area over the images is what is reported (over 0.1 to 0.9, so at most 0.8):
        lower is better.

    Raises:
        InvalidInputError: If something does not fit; the message says what.
        ModelStateError: If the model is in training mode, or gives NaN or infinity.

    Cost:
        One forward for each image and fraction, and one more for each image if there is no target.

    Source:
        Chefer, Gur & Wolf, "Transformer Interpretability Beyond Attention Visualization" (CVPR 2021), section 4, and
        their code: floor(fraction * pixels) pixels.
    """
    return _accuracy(1, "positive perturbation", forward_func, inputs, attributions, baselines, target, options)


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

    The same as :func:`positive_perturbation` of the negated attributions.

    Args:
        forward_func: As in :func:`positive_perturbation`.
        inputs: As there.
        attributions: As there.
        baselines: As there.
        target: As there.
        options: See :class:`Options`.

    Returns:
        As there; higher is better.

    Raises:
        InvalidInputError: If something does not fit; the message says what.
        ModelStateError: If the model is in training mode, or gives NaN or infinity.

    Cost:
        As there.

    Source:
        As there.
    """
    return _accuracy(-1, "negative perturbation", forward_func, inputs, attributions, baselines, target, options)


def _accuracy(
    sign: int,
    name: str,
    forward_func: Callable[..., Any],
    inputs: Any,
    attributions: Any,
    baselines: Baselines,
    target: int | Tensor | list[int] | None,
    options: Options,
) -> Curve:
    options.setdefault("fractions", TENTHS[1:-1])
    trial = Trial(name, forward_func, inputs, attributions, **options, whole=True)
    answers = _answers(trial.outputs()) if target is None else _labels(target, len(trial.inputs))
    return trial.replace(sign * trial.scores, baselines, _right(answers))


def _right(answers: Tensor) -> Read:
    def right(output: Tensor, examples: Tensor) -> Tensor:
        wanted = of_examples(answers, examples, len(answers)).to(output.device)
        return (_answers(output) == wanted).to(output.dtype)

    return right


def _answers(output: Tensor) -> Tensor:
    if output.dim() != 2 or output.shape[1] < 2:
        raise InvalidInputError(
            f"The accuracy needs outputs of shape (batch, classes), not {tuple(output.shape)}. For a score without "
            "classes take morf and lerf."
        )
    return finite(output).argmax(1)


def _labels(target: int | Tensor | list[int], count: int) -> Tensor:
    labels = torch.as_tensor(target)
    if labels.is_floating_point() or labels.dtype == torch.bool or labels.dim() > 1 or labels.numel() not in (1, count):
        raise InvalidInputError(
            f"target must be a class, or one class for each of {count} images, not {labels.dtype} of shape "
            f"{tuple(labels.shape)}."
        )
    return labels.expand(count)
