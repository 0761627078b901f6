"""Padding and packing: which tokens of a call are real, and which calls an adapter refuses."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from captum_ssm.errors import InvalidInputError, UnsupportedModelError
from captum_ssm.operators import Diagonal


def padding_mask(kwargs: Mapping[str, Any], x: Tensor) -> dict[str, Diagonal]:
    """Build the factor that sets padding to 0.

    Args:
        kwargs: Arguments of the call; ``attention_mask`` (B, L) is 1 at real tokens and 0 at padding.
        x: Input of the layer (B, L, E).

    Returns:
        ``{"mask": ...}``, or an empty dictionary if the call had no mask.
    """
    mask = kwargs.get("attention_mask")
    return {} if mask is None else {"mask": Diagonal(mask.to(x).unsqueeze(-1))}


def own_masking(mixer: nn.Module, kwargs: Mapping[str, Any], x: Tensor) -> Mapping[str, Any]:
    """Return the arguments of a call with the padding that the layer's own code really sets to 0.

    Earlier releases of transformers give some layers a mask that they do not apply: to a batch of one sequence, or
    a mask of queries and keys. So the function that masks, which stands beside the class of the layer, is run on ones.

    Args:
        mixer: The layer.
        kwargs: Arguments of the call.
        x: Input of the layer (B, L, E).

    Returns:
        The arguments, with ``attention_mask`` (B, L) or None.
    """
    mask, function = kwargs.get("attention_mask"), masking_function(mixer)
    if mask is None or function is None:
        return kwargs
    ones = x.new_ones(*x.shape[:2], 1)
    applied = function(ones, mask)
    return {**kwargs, "attention_mask": None if applied is ones else applied.squeeze(-1)}


def masking_function(mixer: nn.Module) -> Callable[[Tensor, Tensor], Tensor] | None:
    """Return the function of transformers that sets padding to 0, if the code of the layer has one.

    Args:
        mixer: The layer.

    Returns:
        A function of (B, L, E) and a mask (B, L), or None.
    """
    name = "apply_mask_to_padding_states"
    modules = (vars(sys.modules[cls.__module__]) for cls in type(mixer).__mro__)
    return next((names[name] for names in modules if name in names), None)


def refuse_packed(mixer: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Refuse a call that packs several sequences into one row, at whose borders the layer starts anew.

    Args:
        mixer: The layer.
        kwargs: Arguments of the call.

    Raises:
        UnsupportedModelError: If an argument says where sequences start.
    """
    borders = [name for name in ("seq_idx", "cu_seqlens", "seqlen") if kwargs.get(name) is not None]
    if borders:
        raise UnsupportedModelError(
            f"A {type(mixer).__name__} layer was called with {borders[0]!r}: several sequences are packed into one. "
            "Pass them as the examples of a batch, (batch, tokens, width), without packing."
        )


def refuse_gaps(mixer: nn.Module, mask: Mapping[str, Diagonal]) -> None:
    """Refuse a call of a layer that takes padding out of its sequences, if tokens are masked between real ones.

    Args:
        mixer: The layer.
        mask: The factor of :func:`padding_mask`.

    Raises:
        InvalidInputError: If a sequence has a gap: the layer makes neighbours of the tokens around it.
    """
    if not mask:
        return
    tokens = mask["mask"].s.squeeze(-1)  # (B, L)
    runs = (tokens.diff(dim=1) == 1).sum(1).add(tokens[:, 0])  # (B,), of neighbouring real tokens
    if bool(runs.gt(1).any()):
        raise InvalidInputError(
            f"The attention mask leaves out tokens between real ones. A {type(mixer).__name__} layer takes them "
            "out of the sequence, so that those around them become neighbours: remove them from the inputs."
        )
