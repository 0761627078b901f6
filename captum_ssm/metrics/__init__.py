"""How good an explanation is: by perturbing the input, by what is known to matter, and by whether it adds up.

The functions take what Captum's own metrics take: the forward function and the inputs that an attribution method got,
and the attributions that it returned, whichever method it was. They return one figure, or one curve, for each example;
``.mean()`` is the figure that is reported, :func:`mean_and_error` with its standard error.

* Perturbation: :func:`activation` (AUAC), :func:`pruning` (AU-MSE), :func:`morf`, :func:`lerf`,
  :func:`lerf_minus_morf`; for images :func:`positive_perturbation` and :func:`negative_perturbation`. They share their
  :class:`Options` and return a :class:`Curve`, drawn by :func:`captum_ssm.visualization.curves_figure`.
* Known truth: :func:`localisation`, :func:`sign_accuracy`, :func:`segmentation`.
* Adding up: :func:`conservation`, :func:`conservation_gap`.
* To compare with: :func:`random_attributions`, :func:`position_attributions`.

No single figure ranks methods: replacing by ``<unk>`` favours those that compare with ``<unk>``, and where the answer
always stands in the same place, a score that knows positions alone wins. Report several, and the two controls.
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
