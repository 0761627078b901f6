"""How much is treated at once: what fits a processor's cache, and more where each launch of a kernel has a price."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor


class DeviceSize(NamedTuple):
    """A number of entries, or of rows, that depends on the type of device.

    Args:
        cpu: On a processor.
        others: On all other devices.
    """

    cpu: int
    others: int

    def of(self, t: Tensor) -> int:
        """Return the size on the device of a tensor."""
        return self.cpu if t.device.type == "cpu" else self.others
