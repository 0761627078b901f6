"""The output of a model that is explained: of a language model at the last token alone."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from captum_ssm.layers.precision import computing_type
from captum_ssm.network.forward import language_logits, run_model
from captum_ssm.network.interface import output_embeddings
from captum_ssm.network.threads import hook

Forward = Callable[..., Tensor]
"""A function from the inputs of a batch and the additional arguments to the outputs, (B, V) or (B,)."""


class LastToken:
    """A language model as a function from ids (B, L) to the logits (B, V) at the last real token of each text.

    Its output layer, often the largest, runs on that one token instead of on all L; and without gradients, equal texts
    of a batch, as references of one length are, run once.

    Args:
        model: A causal language model of transformers whose output layer is a module that it calls.
    """

    def __init__(self, model: Any) -> None:
        self._model, self._head = model, output_embeddings(model)

    def __call__(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        """Return the logits.

        Args:
            ids: Token ids (B, L).
            mask: 1 at tokens and 0 at padding, (B, L).

        Returns:
            (B, V).
        """
        if not torch.is_grad_enabled():
            different, place = torch.unique(
                ids if mask is None else torch.cat([ids, mask], 1), dim=0, return_inverse=True
            )
            if len(different) < len(ids):
                L = ids.shape[1]
                return self._run(different[:, :L], None if mask is None else different[:, L:])[place]
        return self._run(ids, mask)

    def _run(self, ids: Tensor, mask: Tensor | None) -> Tensor:
        """Return the logits (B, V) at the last real token of each text."""
        rows = torch.arange(len(ids), device=ids.device)
        last = ids.shape[1] - 1 if mask is None else (torch.arange(ids.shape[1], device=mask.device) * mask).amax(1)
        with ExitStack() as hooks:
            if self._head is not None:
                hook(self._head.register_forward_pre_hook, lambda _, args: (args[0][rows, last].unsqueeze(1),), hooks)
            return language_logits(self._model, ids, mask)[:, 0]

    def agrees(self, ids: Tensor) -> bool:
        """Whether this gives the logits that the model itself gives for these ids (B, L)."""
        if not isinstance(self._head, nn.Module):
            return False
        with torch.no_grad():
            whole = run_model(self._model, ids)
            try:
                own = self(ids)
            except (RuntimeError, ValueError, TypeError, IndexError):  # a model that calls it with something else
                return False
        rounding = 1e-2 if computing_type(self._model).itemsize < 4 else 1e-4
        return own.shape == whole.shape and bool((own - whole).abs().max() <= rounding * whole.abs().max())


class Scored:
    """The outputs of a model in the form that is explained.

    Args:
        run: From the inputs and arguments to the outputs.
        log_probability: Take the logarithm of their softmax.
    """

    def __init__(self, run: Forward, log_probability: bool) -> None:
        self._run, self._log_probability = run, log_probability

    def __call__(self, *inputs: Tensor) -> Tensor:
        """Return the outputs, (B, V) or (B,)."""
        outputs: Any = self._run(*inputs)
        return outputs.log_softmax(-1) if self._log_probability else outputs
