"""Watch the tensors that operations make."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class Entries(TorchDispatchMode):
    """Counts the entries that operations write while the mode is on."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        self.count += sum(t.numel() for t in tree_leaves(result) if isinstance(t, Tensor) and not t._is_view())
        return result


class Largest(TorchDispatchMode):
    """Records the most entries that a tensor made while the mode is on holds; a view holds those of its base."""

    entries = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        held = (t.untyped_storage().nbytes() // t.element_size() for t in tree_leaves(result) if isinstance(t, Tensor))
        self.entries = max(self.entries, *held, 0)
        return result
