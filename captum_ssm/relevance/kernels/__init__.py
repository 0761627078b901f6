"""Kernels of the packages, by name: each with the closed rule of a recurrence, in linear time.

A kernel computes past torch's functions, so that none of them can be followed. Its rule is the same function, written
in the operators of :mod:`captum_ssm.operators`. No package is imported.

* :mod:`~captum_ssm.relevance.kernels.kernel`: how a kernel is called, and the results that are refused;
* :mod:`~captum_ssm.relevance.kernels.convolution`: causal_conv1d;
* :mod:`~captum_ssm.relevance.kernels.selective_scan`,
  :mod:`~captum_ssm.relevance.kernels.state_space_duality`: mamba_ssm;
* :mod:`~captum_ssm.relevance.kernels.linear_attention`, :mod:`~captum_ssm.relevance.kernels.delta_rule`,
  :mod:`~captum_ssm.relevance.kernels.generalized_delta_rule`: flash-linear-attention;
* :mod:`~captum_ssm.relevance.kernels.wkv`: RWKV; :mod:`~captum_ssm.relevance.kernels.mlstm`: xLSTM;
* :mod:`~captum_ssm.relevance.kernels.parallel_scan`: scans of any recurrence.
"""

from captum_ssm.relevance.kernels import (
    convolution,
    delta_rule,
    generalized_delta_rule,
    linear_attention,
    mlstm,
    parallel_scan,
    selective_scan,
    state_space_duality,
    wkv,
)
from captum_ssm.relevance.kernels.kernel import Kernel, Unfollowed

__all__ = [
    "Kernel",
    "Unfollowed",
    "convolution",
    "delta_rule",
    "generalized_delta_rule",
    "linear_attention",
    "mlstm",
    "parallel_scan",
    "selective_scan",
    "state_space_duality",
    "wkv",
]
