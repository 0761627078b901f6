"""A decomposed layer, cut as a method wants to see it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from captum_ssm.errors import InvalidInputError
from captum_ssm.fidelity import Decomposition
from captum_ssm.operators import Chain
from captum_ssm.wiring import Wire

Attention = Literal["unified", "scan"]
"""Which matrices: of the whole layer between its projections, or of its recurrence alone."""


@dataclass(frozen=True)
class LayerView:
    """One layer, cut into what follows the attention, the attention, and what enters it.

    Args:
        name: Dotted name of the layer in the model.
        output: From the attention's channels to the model's width, a tokenwise chain.
        core: The attention of every channel, a channelwise chain; it mixes channels too where the layer has a
            projection between two factors that mix tokens (RWKV).
        v: What enters the core, (B, L, input channels); 0 at padding.
        real: 1 at real tokens and 0 at padding, (B, L, 1).
        gradient: Of the explained score with respect to the layer's output, (B, L, E), or None.
        wire: How the layer's output joins the residual stream.
        embedded: Share of ``v`` at each token that comes straight from the embeddings, (B, L).
    """

    name: str
    output: Chain
    core: Chain
    v: Tensor
    real: Tensor
    gradient: Tensor | None
    wire: Wire
    embedded: Tensor

    @property
    def channels(self) -> int:
        """D, the number of channels that leave the core."""
        size = self.core.sizes[0]
        return self.v.shape[-1] if size is None else size

    @property
    def u(self) -> Tensor:
        """Gradient of the score with respect to the core's output, (B, L, D)."""
        if self.gradient is None:
            raise ValueError("This layer was recorded without a gradient.")
        return self.output.adjoint(self.gradient)


def view(
    layer: Decomposition,
    attention: Attention,
    without: Sequence[str],
    real: Tensor,
    gradient: Tensor | None = None,
    wire: Wire = Wire(),  # noqa: B008  a frozen value
) -> LayerView:
    """Cut a decomposed layer as the caller wants to see it.

    Args:
        layer: The decomposed call.
        attention: ``"unified"`` takes all between the projections as the core, ``"scan"`` the recurrence alone
            and without its skip (Ali et al. 2024).
        without: Names of factors or terms to leave out of the core; ``"bias"`` also out of what enters it.
        real: 1 at real tokens and 0 at padding, (B, L).
        gradient: As in :class:`LayerView`.
        wire: Likewise.
    """
    output, core, into = _cut(layer.chain, attention)
    if attention == "scan" and "skip" in core.terms:
        core = core.without("skip")
    core = core.without(*(term for term in without if term in core.terms))
    real = real.to(layer.x).unsqueeze(-1)
    v = into.apply(layer.x, bias="bias" not in without) * real
    embedded = layer.x.new_zeros(layer.x.shape[:2])
    if wire.embeddings is not None:
        x = torch.zeros_like(layer.x)
        x[..., wire.embeddings] = layer.x[..., wire.embeddings]
        lengths = [into.apply(part).norm(dim=-1) for part in (x, layer.x - x)]
        embedded = torch.where(sum(lengths) > 0, lengths[0] / sum(lengths), 0)
    return LayerView(layer.name, output, core, v, real, gradient, wire, embedded)


def _cut(chain: Chain, attention: Attention) -> tuple[Chain, Chain, Chain]:
    """Return output side, core and input side of a layer."""
    return chain.split(chain.mixers[0] if attention == "scan" else None)


def check_attention(attention: str) -> None:
    """Raise if there is no such attention.

    Raises:
        InvalidInputError: With the names of those that there are.
    """
    if attention not in get_args(Attention):
        raise InvalidInputError(f"attention must be 'unified' or 'scan', not {attention!r}.")


def known_terms(layer: Decomposition, attention: Attention) -> set[str]:
    """Return the names of all that can be left out of a layer's attention."""
    _, core, into = _cut(layer.chain, attention)
    return {*core.terms, *(term for term in into.terms if term == "bias")}


def refuse_unknown_terms(known: set[str], attention: Attention, without: Sequence[str]) -> None:
    """Raise if an option names a factor that the attention of no layer has.

    Raises:
        InvalidInputError: With the names that can be left out.
    """
    unknown = [term for term in without if term not in known]
    if unknown:
        raise InvalidInputError(
            f"The {attention} attention of no layer has a factor named {unknown[0]!r}; what can be left out of this "
            f"model's: {', '.join(sorted(known))}."
        )
