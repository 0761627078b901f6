"""Constants of the model's own type in place of traced tensors, for code that is run beside the explanation."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from captum_ssm.layers.precision import computing_type
from captum_ssm.network.lookups import TokenIds
from captum_ssm.relevance.traced import Traced


@dataclass(frozen=True)
class PlainArguments:
    """Turns the arguments of a call into those that the model itself would have passed.

    Args:
        dtype: The floating-point type that the model, or the part of it whose code is run, computes in.
    """

    dtype: torch.dtype

    @classmethod
    def of(cls, module: nn.Module) -> PlainArguments:
        """Return the arguments of this model, or of a part of it."""
        return cls(computing_type(module))

    def __call__(self, nested: Any) -> Any:
        """Return a nest of arguments with constants in the model's type, also if the explanation's type has spread."""
        return tree_map(self._narrowed, nested)

    def _narrowed(self, leaf: Any) -> Any:
        if isinstance(leaf, Traced):
            return leaf.value.detach().to(self.dtype)
        if isinstance(leaf, TokenIds):
            return leaf.value
        half = self.dtype in (torch.bfloat16, torch.float16)
        return self._constant(leaf) if half and isinstance(leaf, Tensor) and leaf.dtype == torch.float32 else leaf

    def _constant(self, leaf: Tensor) -> Tensor:
        """Return a constant in the model's type: a mask that hides with the lowest number of float32 stays finite."""
        limits = torch.finfo(self.dtype)
        return leaf.where(leaf.isinf(), leaf.clamp(limits.min, limits.max)).to(self.dtype)
