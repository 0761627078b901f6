"""Run a model on its pure-torch code instead of an installed kernel.

transformers calls the kernels of ``flash-linear-attention``, ``mamba_ssm`` and ``causal_conv1d`` as soon as they are
installed, also with tensors that they cannot take: on a CPU the call fails. Next to each kernel it keeps its own
reference in torch, which this module puts in the kernel's place for a while.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from types import FunctionType
from unittest.mock import patch

from torch import nn

_DISPATCHERS = ("transformers.integrations", "kernels")
"""Modules whose wrappers choose between a kernel and a reference in torch."""

_REFERENCE = "Run it on its reference implementation in torch: with captum_ssm.reference_kernels(model): ..."
_LOOP = (
    "Its experts run on torch's product of groups of matrices, which takes no float64. Run them one after the other: "
    "model.set_experts_implementation('eager'); or run the model in float32."
)
_REMEDIES = {
    "active drivers": _REFERENCE,
    "is_cuda() to be true": _REFERENCE,
    "must be a CUDA tensor": _REFERENCE,
    "Pointer argument": _REFERENCE,
    "Float32, BFloat16 or Float16 matrix": _LOOP,
}
"""By a part of the message by which a kernel refuses tensors: how the model runs without the kernel."""


@contextmanager
def reference_kernels(model: nn.Module) -> Iterator[None]:
    """Run the model on its reference implementation in torch while the context is open.

    The functions of the modules that define the model's layers are replaced, and restored when the context is left,
    even after an error. The results equal those of the kernels up to rounding, and take longer. Not for use in several
    threads at once.

    Args:
        model: A transformers model.

    Yields:
        None.

    Example:
        >>> import torch
        >>> from transformers import AutoModelForCausalLM
        >>> from captum_ssm import models, reference_kernels
        >>> model = AutoModelForCausalLM.from_pretrained(models.REVIEWS)
        >>> with reference_kernels(model):
        ...     output = model(torch.tensor([[5, 7, 11]]), use_cache=False)
    """
    homes = {type(module).__module__ for module in model.modules()}
    with ExitStack() as replaced:
        for home in [sys.modules[name] for name in homes if name in sys.modules]:
            dispatched = {name: value for name, value in vars(home).items() if _is_dispatched(value)}
            for name, function in dispatched.items():
                replaced.enter_context(patch.object(home, name, inspect.unwrap(function)))
        yield


def remedy_for(error: BaseException) -> str | None:
    """Return how the model runs without the kernel that refused its tensors, None if the error is of no kernel."""
    return next((remedy for complaint, remedy in _REMEDIES.items() if complaint in str(error)), None)


def _is_dispatched(value: object) -> bool:
    """Whether ``value`` is a function that chooses between a kernel and its reference."""
    while isinstance(value, FunctionType) and hasattr(value, "__wrapped__"):
        if value.__globals__.get("__name__", "").startswith(_DISPATCHERS):
            return True
        value = value.__wrapped__
    return False
