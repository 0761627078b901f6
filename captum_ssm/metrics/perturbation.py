"""Curves of the evidence as features are inserted, replaced or deleted in the order of their relevance."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, Unpack

from torch import Tensor

from captum_ssm.errors import InvalidInputError
from captum_ssm.metrics.baselines import Baselines
from captum_ssm.metrics.curve import Curve
from captum_ssm.metrics.evidence import Evidence, evidence_function, evidence_reader
from captum_ssm.metrics.trial import Options, Trial
from captum_ssm.network.inputs import Target

Removal = Literal["replace", "delete"]
"""The way in which a feature is removed.

* ``"replace"``: by a baseline, which favours methods that have this baseline as their reference;
* ``"delete"``: tokens are cut out, and the sequence gets shorter. The same tokens are cut out of additional arguments
  of shape (B, L, ...), such as a mask. At least one token has to remain, see ``keep`` and ``fractions``, and a target
  that names a position counts it from the end.
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
        forward_func: The explained model: a language model, or any callable.
        inputs: Token ids (B, L), embeddings (B, L, E), images (B, C, H, W), or a tuple of one of them.
        attributions: Scores of the inputs by any method, of the inputs' shape, or one for each token (B, L) or pixel
            (B, H, W); of ids also of their embeddings. The score of a token is the sum over its components.
        baselines: The values of features that are not inserted yet, such as the id of ``<unk>``. For token ids do not
            take the padding token: transformers' classifiers read their answer at the last token that is no padding.
        target: The explained class, in any form that Captum takes.
        contrast: The class that the target is explained against, in the same forms; None: no class.
        evidence: The function of the output that is measured, see :data:`Evidence`.
        options: Arguments that all perturbation metrics share, see :class:`Options`.

    Returns:
        (B, S) the evidence with this share of the features inserted. The mean area over the examples is **AUAC**:
        higher is better. Without equal scores and with fractions that cut no feature in two, AUAC equals the area of
        :func:`lerf`: report one of the two.

    Raises:
        InvalidInputError: If shapes, types or options do not fit.
        ModelStateError: If the model is in training mode, or returns NaN or infinity.
        AssertionError: If ``target`` does not fit the output: Captum raises the same error.

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
    return trial.replace(
        trial.scores, baselines, evidence_reader(evidence, target, contrast, len(trial.inputs)), insert=True
    )


def pruning(
    forward_func: Callable[..., Any],
    inputs: Any,
    attributions: Any,
    *,
    baselines: Baselines,
    evidence: Evidence = "logit",
    **options: Unpack[Options],
) -> Curve:
    """Replace the features, the least relevant by absolute score first; the outputs should not change.

    Args:
        forward_func: The explained model: a language model, or any callable.
        inputs: Token ids (B, L), embeddings (B, L, E), images (B, C, H, W), or a tuple of one of them.
        attributions: Scores of the inputs by any method, of the inputs' shape, or one for each token (B, L) or pixel
            (B, H, W); of ids also of their embeddings.
        baselines: The values that replace a feature, such as the id of ``<unk>``.
        evidence: The function of the output that is compared, by default the logits; a callable may select some.
        options: Arguments that all perturbation metrics share, see :class:`Options`.

    Returns:
        (B, S) the squared difference to the outputs for the original input, summed over the outputs, with this share of
        the features replaced. The mean area over the examples is **AU-MSE**: lower is better.

    Raises:
        InvalidInputError: If shapes, types or options do not fit.
        ModelStateError: If the model is in training mode, or returns NaN or infinity.

    Cost:
        One forward for each example and fraction, and one more for each example.

    Source:
        Ali et al., "XAI for Transformers" (ICML 2022), section 4.2 and their code: ceil(fraction * tokens) tokens.
    """
    transform = evidence_function(evidence)
    trial = Trial("pruning", forward_func, inputs, attributions, **options)
    original = transform(trial.outputs())

    def squared_error(output: Tensor, examples: Tensor) -> Tensor:
        change: Tensor = transform(output) - original[examples.to(original.device)]
        return change.square().reshape(len(output), -1).sum(1)

    return trial.replace(-trial.scores.abs(), baselines, squared_error)


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
    """Remove the features, the most relevant first (MoRF); the evidence should fall fast.

    Args:
        forward_func: The explained model: a language model, or any callable.
        inputs: Token ids (B, L), embeddings (B, L, E), images (B, C, H, W), or a tuple of one of them.
        attributions: Scores of the inputs by any method, of the inputs' shape, or one for each token (B, L) or pixel
            (B, H, W); of ids also of their embeddings.
        baselines: The values that replace a feature, such as the id of ``<unk>``; None if tokens are deleted.
        target: The explained class, in any form that Captum takes.
        contrast: The class that the target is explained against, in the same forms; None: no class.
        evidence: The function of the output that is measured, see :data:`Evidence`.
        removal: Replace a feature or delete it, see :data:`Removal`.
        options: Arguments that all perturbation metrics share, see :class:`Options`.

    Returns:
        (B, S) the evidence with this share of the features removed; a smaller area is better.

    Raises:
        InvalidInputError: If shapes, types or options do not fit.
        ModelStateError: If the model is in training mode, or returns NaN or infinity.
        AssertionError: If ``target`` does not fit the output: Captum raises the same error.

    Cost:
        One forward for each example and fraction.

    Source:
        Samek et al. (IEEE TNNLS 2017, arXiv 1509.06321), for the order.
    """
    trial = Trial("morf", forward_func, inputs, attributions, **options)
    read = evidence_reader(evidence, target, contrast, len(trial.inputs))
    return _removal_curve(trial, trial.scores, baselines, read, removal, (target, contrast))


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
    """Remove the features, the least relevant first (LeRF); the evidence should stay or rise.

    The result equals :func:`morf` of the negated attributions.

    Args:
        forward_func: The explained model: a language model, or any callable.
        inputs: Token ids (B, L), embeddings (B, L, E), images (B, C, H, W), or a tuple of one of them.
        attributions: Scores of the inputs by any method, of the inputs' shape, or one for each token (B, L) or pixel
            (B, H, W); of ids also of their embeddings.
        baselines: The values that replace a feature, such as the id of ``<unk>``; None if tokens are deleted.
        target: The explained class, in any form that Captum takes.
        contrast: The class that the target is explained against, in the same forms; None: no class.
        evidence: The function of the output that is measured, see :data:`Evidence`.
        removal: Replace a feature or delete it, see :data:`Removal`.
        options: Arguments that all perturbation metrics share, see :class:`Options`.

    Returns:
        (B, S) the evidence with this share of the features removed; a larger area is better.

    Raises:
        InvalidInputError: If shapes, types or options do not fit.
        ModelStateError: If the model is in training mode, or returns NaN or infinity.
        AssertionError: If ``target`` does not fit the output: Captum raises the same error.

    Cost:
        One forward for each example and fraction.
    """
    trial = Trial("lerf", forward_func, inputs, attributions, **options)
    read = evidence_reader(evidence, target, contrast, len(trial.inputs))
    return _removal_curve(trial, -trial.scores, baselines, read, removal, (target, contrast))


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
    """Return the evidence without the least relevant features less the evidence without the most relevant ones.

    Args:
        forward_func: The explained model: a language model, or any callable.
        inputs: Token ids (B, L), embeddings (B, L, E), images (B, C, H, W), or a tuple of one of them.
        attributions: Scores of the inputs by any method, of the inputs' shape, or one for each token (B, L) or pixel
            (B, H, W); of ids also of their embeddings.
        baselines: The values that replace a feature, such as the id of ``<unk>``; None if tokens are deleted.
        target: The explained class, in any form that Captum takes.
        contrast: The class that the target is explained against, in the same forms; None: no class.
        evidence: The function of the output that is measured, see :data:`Evidence`.
        removal: Replace a feature or delete it, see :data:`Removal`.
        options: Arguments that all perturbation metrics share, see :class:`Options`.

    Returns:
        (B, S) the difference :func:`lerf` - :func:`morf`. The mean area over the examples is the delta of the two areas
        of Jafari et al.: higher is better; scores that are all equal give 0, random ones 0 on average.

    Raises:
        InvalidInputError: If shapes, types or options do not fit.
        ModelStateError: If the model is in training mode, or returns NaN or infinity.
        AssertionError: If ``target`` does not fit the output: Captum raises the same error.

    Cost:
        Two forwards for each example and fraction.

    Source:
        Jafari et al., "MambaLRP" (NeurIPS 2024), section 5.
    """
    trial = Trial("lerf minus morf", forward_func, inputs, attributions, **options)
    read = evidence_reader(evidence, target, contrast, len(trial.inputs))
    least, most = (
        _removal_curve(trial, sign * trial.scores, baselines, read, removal, (target, contrast), name)
        for sign, name in ((-1, ", lerf"), (1, ", morf"))
    )
    return least - most


def _removal_curve(
    trial: Trial,
    scores: Tensor,
    baselines: Baselines | None,
    read: Callable[[Tensor, Tensor], Tensor],
    removal: Removal,
    targets: tuple[Target, ...],
    name: str = "",
) -> Curve:
    """Remove the features in the order of some scores, by replacement or deletion.

    Args:
        trial: The model and its inputs.
        scores: (B, N) scores that order the features.
        baselines: The values that replace a feature; None if tokens are deleted.
        read: The reader of the evidence.
        removal: Replace a feature or delete it.
        targets: Target and contrast, to check that deletion does not move them.
        name: The name of the order, for the progress bar.

    Returns:
        (B, S) the evidence at each fraction.

    Raises:
        InvalidInputError: If ``removal`` is unknown, or does not go with the baselines or a target.
    """
    if removal == "replace":
        return trial.replace(scores, baselines, read, name=name)
    if removal != "delete":
        raise InvalidInputError(f"removal must be 'replace' or 'delete', not {removal!r}.")
    if baselines is not None:
        raise InvalidInputError("Tokens that are deleted have no baselines. Leave them out, or pass removal='replace'.")
    indices = [index for target in targets for index in (target if isinstance(target, list) else [target])]
    if any(isinstance(index, tuple) and len(index) > 1 and index[0] >= 0 for index in indices):
        raise InvalidInputError(
            "The target names a position from the start, which another token has once some are deleted. Count it from "
            "the end, such as (-1, 3), or let forward_func return that position alone."
        )
    return trial.delete(scores, read, name)
