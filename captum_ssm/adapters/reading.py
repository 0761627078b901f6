"""What every adapter reads from a mixer and its call, in the type and on the device of the mixer's input."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from captum_ssm.errors import UnsupportedModelError
from captum_ssm.operators import Diagonal


def parameters(mixer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    """Return the mixer's parameters and floating-point buffers by dotted name, as ``x`` in type and device."""
    tensors = [*mixer.named_parameters(), *mixer.named_buffers()]
    return {name: tensor.to(x.device, x.dtype) for name, tensor in tensors if tensor.is_floating_point()}


def padding(kwargs: Mapping[str, Any], x: Tensor) -> dict[str, Diagonal]:
    """Return the factor that sets padding to 0, ``{"mask": ...}``, or nothing if the call had no mask.

    Args:
        kwargs: The call's arguments; ``attention_mask`` (B, L) is 0 at padding.
        x: Input of the mixer (B, L, E).
    """
    mask = kwargs.get("attention_mask")
    return {} if mask is None else {"mask": Diagonal(mask.to(x).unsqueeze(-1))}


def refuse_packed(mixer: nn.Module, kwargs: Mapping[str, Any]) -> None:
    """Raise if a call packs several sequences into one row, at whose borders the layer starts anew.

    Raises:
        UnsupportedModelError: If an argument that says where they start is given.
    """
    given = [name for name in ("seq_idx", "cu_seqlens", "seqlen") if kwargs.get(name) is not None]
    if given:
        raise UnsupportedModelError(
            f"A {type(mixer).__name__} layer was called with {given[0]!r}: several sequences are packed into one. Pass "
            "them as the examples of a batch, (batch, tokens, width), without packing."
        )


def to_heads(t: Tensor, H: int) -> Tensor:
    """Return ``t`` (B, L, groups, N) for H heads: a group serves consecutive heads, and one alone stays shared."""
    groups = t.shape[2]
    return t if groups == 1 else t.repeat_interleave(H // groups, dim=2)
