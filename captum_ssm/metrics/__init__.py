"""Quality of an explanation, measured by perturbing the input, against a known truth, and by completeness.

The functions take the arguments of Captum's own metrics: the forward function and the inputs that were passed to an
attribution method, and the attributions that this method, whichever it is, returned. They return one figure, or one
curve, for each example; report its ``.mean()``, or :func:`mean_and_error` with the standard error.

* Perturbation: :func:`activation` (AUAC), :func:`pruning` (AU-MSE), :func:`morf`, :func:`lerf`,
  :func:`lerf_minus_morf`; for images :func:`positive_perturbation` and :func:`negative_perturbation`. They share their
  :class:`Options` and return a :class:`Curve`, drawn by :func:`captum_ssm.visualization.curves_figure`.
* Known truth: :func:`localisation`, :func:`sign_accuracy`, :func:`segmentation`.
* Completeness: :func:`conservation`, :func:`conservation_gap`.
* Controls: :func:`random_attributions`, :func:`position_attributions`.

No single figure ranks methods: replacing tokens by ``<unk>`` favours methods whose reference is ``<unk>``, and where
the answer always stands at the same position, scores that depend on the position alone win. Report several metrics, and
the two controls.
"""

from captum_ssm.metrics.baselines import Baselines
from captum_ssm.metrics.conservation import conservation, conservation_gap
from captum_ssm.metrics.controls import position_attributions, random_attributions
from captum_ssm.metrics.curve import Curve, mean_and_error
from captum_ssm.metrics.evidence import Evidence
from captum_ssm.metrics.images import negative_perturbation, positive_perturbation
from captum_ssm.metrics.localisation import Localisation, localisation, sign_accuracy
from captum_ssm.metrics.perturbation import Removal, activation, lerf, lerf_minus_morf, morf, pruning
from captum_ssm.metrics.segmentation import Segmentation, segmentation
from captum_ssm.metrics.trial import Options

__all__ = [
    "Baselines",
    "Curve",
    "Evidence",
    "Localisation",
    "Options",
    "Removal",
    "Segmentation",
    "activation",
    "conservation",
    "conservation_gap",
    "lerf",
    "lerf_minus_morf",
    "localisation",
    "mean_and_error",
    "morf",
    "negative_perturbation",
    "position_attributions",
    "positive_perturbation",
    "pruning",
    "random_attributions",
    "segmentation",
    "sign_accuracy",
]
