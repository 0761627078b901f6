"""The state that a layer's call leaves for its next one, and whether that call gets it.

A layer hands its state on by a cache, by tensors that it returns beside its output, or by tensors that it was given and
that have been written into since.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves

from captum_ssm.network.state import versions


@dataclass(frozen=True)
class LeftState:
    """What one call of a layer may have left for a later one.

    Args:
        caches: The caches that it was given.
        place: Its place in them, if a layer that several blocks share is told whose turn it is.
        given: The floating-point tensors that it was given beside its input.
        counts: For each of these, how often it had been written into.
        returned: The memory of the tensors that it returned beside its output; they need not live on.
    """

    caches: list[Any]
    place: Any
    given: list[Tensor]
    counts: list[Any]
    returned: list[StorageWeakRef]

    @classmethod
    def of(cls, arguments: Mapping[str, Any], output: Any) -> LeftState:
        """Return the state that a call leaves.

        Args:
            arguments: Its arguments but for the input.
            output: All that it returned.
        """
        given = _vectors(arguments)
        beside = [] if isinstance(output, Tensor) else _vectors(output[1:])
        caches = [argument for argument in arguments.values() if is_cache(argument)]
        return cls(caches, arguments.get("layer_idx"), given, versions(given), _memory(beside))

    def is_among(self, arguments: Mapping[str, Any]) -> bool:
        """Whether the arguments of a later call hold this state."""
        same_place = self.place == arguments.get("layer_idx")
        if same_place and any(cache is argument for cache in self.caches for argument in arguments.values()):
            return True
        written = [t for t, old, now in zip(self.given, self.counts, versions(self.given)) if old != now]
        left = {memory.cdata for memory in [*_memory(written), *self.returned] if not memory.expired()}
        return bool(left) and any(memory.cdata in left for memory in _memory(_vectors(arguments)))


def is_cache(value: Any) -> bool:
    """Whether ``value`` is a cache of transformers or mamba_ssm."""
    return callable(getattr(value, "has_previous_state", None)) or hasattr(value, "key_value_memory_dict")


def _vectors(values: Any) -> list[Tensor]:
    """Return the plain floating-point tensors among values, and in lists, tuples and dictionaries of them."""
    return [leaf for leaf in tree_leaves(values) if type(leaf) is Tensor and leaf.is_floating_point()]


def _memory(tensors: list[Tensor]) -> list[StorageWeakRef]:
    return [StorageWeakRef(tensor.untyped_storage()) for tensor in tensors if tensor.layout == torch.strided]
