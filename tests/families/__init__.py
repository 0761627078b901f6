"""Every supported family of transformers: one record each, which all tests of families and layers draw from.

A new family is a new record in ``table.py``, with the oracle of each of its layers.
"""

from collections.abc import Iterator
from types import ModuleType

from tests.families.configurations import COMMON, S6, VOCABULARY, perturbed
from tests.families.record import Block, Family, Layer
from tests.families.table import FAMILIES

__all__ = ["COMMON", "EARLIER", "FAMILIES", "S6", "VOCABULARY", "Block", "Family", "Layer", "layers_of", "perturbed"]

EARLIER = {"RecurrentGemmaSdpaAttention": "RecurrentGemmaAttention", "JambaSdpaAttention": "JambaAttention"}
"""Names that layers had in earlier releases of transformers, and those that they have in the records."""


def layers_of(oracles: ModuleType) -> Iterator[tuple[str, str, Layer]]:
    """Yield the layers whose oracle stands in this module: family, name of the class, and the layer's record."""
    for family, record in FAMILIES.items():
        for name, layer in record.layers.items():
            if layer.oracle_module == oracles.__name__:
                yield family, name, layer
