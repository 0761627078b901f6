"""Curves of the evidence as features are inserted, replaced or deleted in the order of their relevance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Unpack

from torch import Tensor

from captum_ssm.errors import InvalidInputError
from captum_ssm.metrics.baselines import Baselines
from captum_ssm.metrics.curve import Curve
from captum_ssm.metrics.evidence import Evidence, reader, transformed
from captum_ssm.metrics.trial import Options, Trial
from captum_ssm.network.inputs import Target

Removal = Literal["replace", "delete"]
"""How a feature is taken away.

* ``"replace"``: a baseline takes its place, which favours methods that have this baseline as their reference;
* ``"delete"``: tokens are cut out, and the sequence gets shorter. Additional arguments of shape (B, L, ...), such as a
  mask, are cut alike. At least one token has to stay, see ``keep`` and ``fractions``, and a target that names a
  position counts it from the end.
"""


def activation(
    forward_func: Callable[..., Any],
    inputs: Any,
    attributions: Any,
    *,
    baselines: Baselines,
    target: Target = None,
    contrast: Target = None,
    evidence: Evidence = "probability",
    **options: Unpack[Options],
) -> Curve:
    """Insert the features into an input of baselines, the most relevant first; the evidence should rise fast.

    Args:
        forward_func: What the attribution method got: a transformers model as it is, or any callable.
        inputs: Token ids (B, L), embeddings (B, L, E), images (B, C, H, W), or a tuple of one of them.
        attributions: What any attribution method returned for them; a token's score is the sum over its components. In
            place of their shape also one score for each token or pixel, or, of token ids, scores of their embeddings.
        baselines: What stands where nothing is inserted, such as the id of ``<unk>``. Of token ids not the padding
            token: transformers' classifiers look for it to find where to read.
        target: The explained class, in any form that Captum takes.
        contrast: What it is explained against, likewise, if anything; see :data:`Evidence`.
        evidence: What is read off the output, see :data:`Evidence`.
        options: See :class:`Options`.

    Returns:
        The evidence with this share of the features inserted. The mean of its area over the examples is **AUAC**:
        higher is better. Without equal scores and with fractions that cut no feature in two, it equals the area of
        :func:`lerf`: count it once.

    Raises:
        InvalidInputError: If something does not fit; the message says what.
        ModelStateError: If the model is in training mode, or gives NaN or infinity.
        AssertionError: If ``target`` does not fit the output, as in Captum.

    Cost:
        One forward for each example and fraction.

    Source:
        Ali et al., "XAI for Transformers" (ICML 2022), section 4.2 and their code: ceil(fraction * tokens) tokens.

    Example:
        >>> import torch
        >>> from captum_ssm import metrics
        >>> weights, inputs = torch.tensor([3.0, 1.0, 2.0]), torch.ones(1, 3)
        >>> curve = metrics.activation(
        ...     lambda x: x @ weights, inputs, inputs * weights, baselines=0, evidence="logit", fractions=[0, 1 / 3, 1]
        ... )
        >>> curve.values
        tensor([[0., 3., 6.]])
    """
    trial = Trial("activation", forward_func, inputs, attributions, **options)
    return trial.replace(trial.scores, baselines, reader(evidence, target, contrast, len(trial.inputs)), insert=True)


def pruning(
    forward_func: Callable[..., Any],
    inputs: Any,
    attributions: Any,
    *,
    baselines: Baselines,
    evidence: Evidence = "logit",
    **options: Unpack[Options],
) -> Curve:
    """Replace the features, the least relevant by absolute score first; the outputs should stay as they are.

    Args:
        forward_func: As in :func:`activation`.
        inputs: As there.
        attributions: As there.
        baselines: As there.
        evidence: What is compared, the logits by default; a callable may pick some of them.
        options: See :class:`Options`.

    Returns:
        The squared difference to the outputs for the whole input, summed over the outputs, with this share of the
        features replaced. The mean of its area over the examples is **AU-MSE**: lower is better.

    Raises:
        InvalidInputError: If something does not fit; the message says what.
        ModelStateError: If the model is in training mode, or gives NaN or infinity.

    Cost:
        One forward for each example and fraction, and one more for each example.

    Source:
        As :func:`activation`.
    """
    transform = transformed(evidence)
    trial = Trial("pruning", forward_func, inputs, attributions, **options)
    whole = transform(trial.outputs())

    def error(output: Tensor, examples: Tensor) -> Tensor:
        change: Tensor = transform(output) - whole[examples.to(whole.device)]
        return change.square().reshape(len(output), -1).sum(1)

    return trial.replace(-trial.scores.abs(), baselines, error)


def morf(
    forward_func: Callable[..., Any],
    inputs: Any,
    attributions: Any,
    *,
    baselines: Baselines | None = None,
    target: Target = None,
    contrast: Target = None,
    evidence: Evidence = "probability",
    removal: Removal = "replace",
    **options: Unpack[Options],
) -> Curve:
    """Take the features away, the most relevant first (MoRF); the evidence should fall fast.

    Args:
        forward_func: As in :func:`activation`.
        inputs: As there.
        attributions: As there.
        baselines: As there; needed unless tokens are deleted.
        target: As there.
        contrast: As there.
        evidence: As there.
        removal: How a feature is taken away, see :data:`Removal`.
        options: See :class:`Options`.

    Returns:
        The evidence with this share of the features taken away; a smaller area is better.

    Raises:
        InvalidInputError: If something does not fit; the message says what.
        ModelStateError: If the model is in training mode, or gives NaN or infinity.
        AssertionError: If ``target`` does not fit the output, as in Captum.

    Cost:
        One forward for each example and fraction.

    Source:
        Samek et al., "Evaluating the visualization of what a deep neural network has learned" (2017), for the order.
    """
    trial = Trial("morf", forward_func, inputs, attributions, **options)
    read = reader(evidence, target, contrast, len(trial.inputs))
    return _taken_away(trial, trial.scores, baselines, read, removal, (target, contrast))


def lerf(
    forward_func: Callable[..., Any],
    inputs: Any,
    attributions: Any,
    *,
    baselines: Baselines | None = None,
    target: Target = None,
    contrast: Target = None,
    evidence: Evidence = "probability",
    removal: Removal = "replace",
    **options: Unpack[Options],
) -> Curve:
    """Take the features away, the least relevant first (LeRF); the evidence should stay, or rise.

    The same as :func:`morf` of the negated attributions, and with the same arguments.

    Args:
        forward_func: As in :func:`activation`.
        inputs: As there.
        attributions: As there.
        baselines: As there; needed unless tokens are deleted.
        target: As there.
        contrast: As there.
        evidence: As there.
        removal: How a feature is taken away, see :data:`Removal`.
        options: See :class:`Options`.

    Returns:
        The evidence with this share of the features taken away; a larger area is better.

    Raises:
        InvalidInputError: If something does not fit; the message says what.
        ModelStateError: If the model is in training mode, or gives NaN or infinity.
        AssertionError: If ``target`` does not fit the output, as in Captum.

    Cost:
        One forward for each example and fraction.
    """
    trial = Trial("lerf", forward_func, inputs, attributions, **options)
    read = reader(evidence, target, contrast, len(trial.inputs))
    return _taken_away(trial, -trial.scores, baselines, read, removal, (target, contrast))


def lerf_minus_morf(
    forward_func: Callable[..., Any],
    inputs: Any,
    attributions: Any,
    *,
    baselines: Baselines | None = None,
    target: Target = None,
    contrast: Target = None,
    evidence: Evidence = "probability",
    removal: Removal = "replace",
    **options: Unpack[Options],
) -> Curve:
    """Return by how much the evidence is higher without the least relevant features than without the most relevant.

    Args:
        forward_func: As in :func:`activation`.
        inputs: As there.
        attributions: As there.
        baselines: As there; needed unless tokens are deleted.
        target: As there.
        contrast: As there.
        evidence: As there.
        removal: How a feature is taken away, see :data:`Removal`.
        options: See :class:`Options`.

    Returns:
        The difference :func:`lerf` - :func:`morf`; the mean of its area over the examples is what Jafari et al. call
        the delta of the two areas. Higher is better; scores that are all equal give 0, random ones 0 on average.

    Raises:
        InvalidInputError: If something does not fit; the message says what.
        ModelStateError: If the model is in training mode, or gives NaN or infinity.
        AssertionError: If ``target`` does not fit the output, as in Captum.

    Cost:
        Two forwards for each example and fraction.

    Source:
        Jafari et al., "MambaLRP" (NeurIPS 2024), section 5.
    """
    trial = Trial("lerf minus morf", forward_func, inputs, attributions, **options)
    read = reader(evidence, target, contrast, len(trial.inputs))
    least, most = (
        _taken_away(trial, sign * trial.scores, baselines, read, removal, (target, contrast), name)
        for sign, name in ((-1, ", lerf"), (1, ", morf"))
    )
    return least - most


def _taken_away(
    trial: Trial,
    scores: Tensor,
    baselines: Baselines | None,
    read: Callable[[Tensor, Tensor], Tensor],
    removal: Removal,
    targets: tuple[Target, ...],
    name: str = "",
) -> Curve:
    if removal == "replace":
        return trial.replace(scores, baselines, read, name=name)
    if removal != "delete":
        raise InvalidInputError(f"removal must be 'replace' or 'delete', not {removal!r}.")
    if baselines is not None:
        raise InvalidInputError("Tokens that are deleted have no baselines. Leave them out, or pass removal='replace'.")
    places = [place for target in targets for place in (target if isinstance(target, list) else [target])]
    if any(isinstance(place, tuple) and len(place) > 1 and place[0] >= 0 for place in places):
        raise InvalidInputError(
            "The target names a position from the start, which another token has once some are deleted. Count it from "
            "the end, such as (-1, 3), or let forward_func return that position alone."
        )
    return trial.delete(scores, read, name)
