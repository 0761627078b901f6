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
class Cut:
    """A chain, cut into what follows the attention, the attention, and what enters it.

    Args:
        output: From the attention's channels to the model's width, a tokenwise chain.
        core: The attention of every channel, a channelwise chain; it mixes channels too where the layer has a
            projection between two factors that mix tokens (RWKV).
        v: What enters the core, (B, L, input channels); 0 at padding.
        gradient: Of the explained score with respect to the layer's output, (B, L, E), or None.
    """

    output: Chain
    core: Chain
    v: Tensor
    gradient: Tensor | None

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


@dataclass(frozen=True)
class LayerView:
    """One layer, cut as a method wants to see it.

    Args:
        name: Dotted name of the layer in the model.
        cuts: The layer is their sum: one, or several where summands have no attention in common.
        real: 1 at real tokens and 0 at padding, (B, L, 1).
        wire: How the layer's output joins the residual stream.
        embedded: Share of what enters the cores at each token that comes straight from the embeddings, (B, L).
    """

    name: str
    cuts: tuple[Cut, ...]
    real: Tensor
    wire: Wire
    embedded: Tensor


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
        without: Names of factors or terms to leave out of the core; ``"bias"`` also out of what enters it. A summand,
            such as a direction of a bidirectional layer, is left out as a whole.
        real: 1 at real tokens and 0 at padding, (B, L).
        gradient: As in :class:`Cut`.
        wire: As in :class:`LayerView`.

    Raises:
        InvalidInputError: If ``without`` leaves nothing of the layer.
    """
    real = real.to(layer.x).unsqueeze(-1)
    cuts, lengths = [], layer.x.new_zeros(2, *layer.x.shape[:2])
    for name, (output, core, into) in _cut(layer.chain, attention).items():
        if name in without:
            continue
        if attention == "scan" and "skip" in core.terms:
            core = core.without("skip")
        core = _without(core, without)
        cuts.append(Cut(output, core, into.apply(layer.x, bias="bias" not in without) * real, gradient))
        if wire.embeddings is not None:
            x = torch.zeros_like(layer.x)
            x[..., wire.embeddings] = layer.x[..., wire.embeddings]
            lengths += torch.stack([into.apply(part).norm(dim=-1) for part in (x, layer.x - x)])
    if not cuts:
        raise InvalidInputError(f"Nothing of layer '{layer.name}' is left without {', '.join(without)}.")
    total = lengths.sum(0)
    return LayerView(layer.name, tuple(cuts), real, wire, torch.where(total > 0, lengths[0] / total, 0))


def _without(core: Chain, without: Sequence[str]) -> Chain:
    """Leave out what a core has of these terms."""
    try:
        return core.without(*(term for term in without if term in core.terms))
    except ValueError as error:  # all summands of a sum
        raise InvalidInputError(f"Nothing would be left without {', '.join(without)}: {error}") from error


def _cut(chain: Chain, attention: Attention) -> dict[str, tuple[Chain, Chain, Chain]]:
    """Return output side, core and input side of a layer, or of each of its summands by name.

    The summands of a layer are taken apart where no channelwise core holds them all.
    """
    if attention == "unified" and not chain.split()[1].mixes_channels:
        return {"": chain.split()}
    summands = chain.summands()
    return {name: c.split(c.mixers[0] if attention == "scan" else None) for name, c in summands.items()}


def check_attention(attention: str) -> None:
    """Raise if there is no such attention.

    Raises:
        InvalidInputError: With the names of those that there are.
    """
    if attention not in get_args(Attention):
        raise InvalidInputError(f"attention must be 'unified' or 'scan', not {attention!r}.")


def known_terms(layer: Decomposition, attention: Attention) -> set[str]:
    """Return the names of all that can be left out of a layer's attention."""
    known: set[str] = set()
    for name, (_, core, into) in _cut(layer.chain, attention).items():
        known.update({name} - {""}, core.terms, (term for term in into.terms if term == "bias"))
    return known


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
