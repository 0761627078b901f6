"""A decomposed layer, split into output side, core and input side."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, get_args

import torch
from torch import Tensor

from captum_ssm.errors import InvalidInputError
from captum_ssm.layers.fidelity import Decomposition
from captum_ssm.layers.wires import Wire
from captum_ssm.operators import Chain

AttentionScope = Literal["unified", "scan"]
"""Whose matrices: those of the whole layer between its projections, or of its recurrence alone."""


@dataclass(frozen=True)
class Split:
    """A chain, split into output side, core and input side.

    Args:
        output: From the core's channels to the model's width, a tokenwise chain.
        core: The attention of every channel, a channelwise chain; it mixes channels too if the layer has a
            projection between two factors that mix tokens (RWKV).
        v: Input of the core, (B, L, input channels); 0 at padding.
        gradient: Gradient of the explained score with respect to the layer's output, (B, L, E), or None.
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
class SplitLayer:
    """One layer as a sum of split chains.

    Args:
        name: Dotted name of the layer in the model.
        splits: The summands: one, or several if no core has the attention of all.
        mask: 1 at real tokens and 0 at padding, (B, L, 1).
        wire: How the layer's output joins the residual stream.
        embedding_share: Share of the cores' input at each token that comes straight from the embeddings, (B, L).
    """

    name: str
    splits: tuple[Split, ...]
    mask: Tensor
    wire: Wire
    embedding_share: Tensor


def split_layer(
    layer: Decomposition,
    scope: AttentionScope,
    without: Sequence[str],
    mask: Tensor,
    gradient: Tensor | None = None,
    wire: Wire = Wire(),  # noqa: B008  a frozen value
) -> SplitLayer:
    """Split a decomposed layer for one scope of attention.

    Args:
        layer: The decomposed call.
        scope: ``"unified"`` takes all factors between the projections as the core, ``"scan"`` the recurrence alone
            and without its skip (Ali et al. 2024).
        without: Names of factors or terms to leave out of the core; ``"bias"`` also out of the core's input. A summand,
            such as a direction of a bidirectional layer, is left out as a whole.
        mask: 1 at real tokens and 0 at padding, (B, L).
        gradient: Gradient of the explained score with respect to the layer's output, (B, L, E), or None.
        wire: How the layer's output joins the residual stream.

    Returns:
        The summands of the layer, with the gradient and the wire.

    Raises:
        InvalidInputError: If ``without`` leaves nothing of the layer.
    """
    mask = mask.to(layer.x).unsqueeze(-1)  # (B, L, 1)
    splits, lengths = [], layer.x.new_zeros(2, *layer.x.shape[:2])  # (from the embeddings or not, B, L)
    for name, (output, core, into) in _summands(layer.chain, scope).items():
        if name in without:
            continue
        if scope == "scan" and "skip" in core.terms:
            core = core.without("skip")
        core = _leave_out(core, without)
        splits.append(Split(output, core, into.apply(layer.x, bias="bias" not in without) * mask, gradient))
        if wire.embeddings is not None:
            x = torch.zeros_like(layer.x)
            x[..., wire.embeddings] = layer.x[..., wire.embeddings]
            lengths += torch.stack([into.apply(part).norm(dim=-1) for part in (x, layer.x - x)])
    if not splits:
        raise InvalidInputError(f"Nothing of layer '{layer.name}' is left without {', '.join(without)}.")
    total = lengths.sum(0)
    return SplitLayer(layer.name, tuple(splits), mask, wire, torch.where(total > 0, lengths[0] / total, 0))


def _leave_out(core: Chain, terms: Sequence[str]) -> Chain:
    """Return the core without those of these terms that it has."""
    try:
        return core.without(*(term for term in terms if term in core.terms))
    except ValueError as error:  # all summands of a sum
        raise InvalidInputError(f"Nothing would be left without {', '.join(terms)}: {error}") from error


def _summands(chain: Chain, scope: AttentionScope) -> dict[str, tuple[Chain, Chain, Chain]]:
    """Return output side, core and input side of a layer, or of each of its summands by name.

    The summands of a layer are separated if no channelwise core has the attention of all.
    """
    if scope == "unified" and not chain.split()[1].mixes_channels:
        return {"": chain.split()}
    summands = chain.summands()
    return {name: c.split(c.mixers[0] if scope == "scan" else None) for name, c in summands.items()}


def check_scope(scope: str) -> None:
    """Raise if there is no such scope of attention.

    Raises:
        InvalidInputError: With the names of those that there are.
    """
    if scope not in get_args(AttentionScope):
        raise InvalidInputError(f"attention must be 'unified' or 'scan', not {scope!r}.")


def known_terms(layer: Decomposition, scope: AttentionScope) -> set[str]:
    """Return the names of all factors and terms that can be left out of a layer's attention."""
    known: set[str] = set()
    for name, (_, core, into) in _summands(layer.chain, scope).items():
        known.update({name} - {""}, core.terms, (term for term in into.terms if term == "bias"))
    return known


def refuse_unknown_terms(known: set[str], scope: AttentionScope, without: Sequence[str]) -> None:
    """Raise if an option names a factor that the attention of no layer has.

    Args:
        known: Names of the factors and terms of all layers.
        scope: The scope of attention.
        without: The names that the caller leaves out.

    Raises:
        InvalidInputError: With the names that can be left out.
    """
    unknown = [term for term in without if term not in known]
    if unknown:
        raise InvalidInputError(
            f"The {scope} attention of no layer has a factor named {unknown[0]!r}; what can be left out of this "
            f"model's: {', '.join(sorted(known))}."
        )
