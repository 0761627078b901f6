"""The record of a family: how its tiny model is built, its layers, and where they stand in the model."""

from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

Options = Mapping[str, Any]
"""Options of a family's configuration."""


def nothing(x: Tensor) -> dict[str, Any]:
    """Return no arguments."""
    return {}


@dataclass(frozen=True)
class Layer:
    """A class of layers that mix tokens.

    Attributes:
        oracle: The layer's equation, from a module ``tests.oracles*``. The tests of that module's kernels draw the
            layers that they run on from the records, by the module of the oracle.
        factors: Names of the factors of its chain, in the order of the equation, without the mask.
        options: Configurations of the family, by name, on which the layer is compared with its oracle too.
        takes_mask: Whether the layer sets its input to 0 at padding, or leaves padding out of its softmax.
        sparse: Whether the layer selects, for each query, the keys that it attends to.
        arguments: From its input (B, L, E) to the further arguments of its forward, without the mask.
    """

    oracle: Callable[..., Any]
    factors: tuple[str, ...]
    options: Mapping[str, Options] = field(default_factory=dict)
    takes_mask: bool = True
    sparse: bool = False
    arguments: Callable[[Tensor], dict[str, Any]] = nothing

    @property
    def oracle_module(self) -> str:
        """The name of the module in which the oracle stands; empty where there is no oracle."""
        return getattr(self.oracle, "__module__", "")


class Block(NamedTuple):
    """One block of a model: how its mixers, by dotted name, join the residual stream."""

    shape: str
    """``residual``: one after the other; ``parallel``: side by side; ``branch``: the first adds to the second's input
    alone; ``streams``: residual in several streams."""
    mixers: list[str]
    classes: list[str]
    keep: float = 1.0
    write: tuple[float, ...] = (1.0,)


def is_causal(model: Any) -> bool:
    """Whether the last token changes nothing at the others, in the model's own code."""
    ids = torch.arange(1, 15).view(2, 7)
    with torch.no_grad():
        before, after = (
            model(input_ids=torch.cat([ids[:, :-1], last], 1), use_cache=False).logits[:, :-1]
            for last in (ids[:, -1:], ids[:, :1])
        )
    return bool((before - after).abs().max() <= 1e-5 * before.abs().max())


@dataclass(frozen=True)
class Family:
    """A family of models.

    Attributes:
        build: Build its tiny model, with other options of the configuration if given.
        layers: Its layers that mix tokens, by the name of their class: those of its modeling file, all of them.
        blocks: From the text model's configuration to its blocks in order, as its modeling file writes them down.
        earlier: Other options of the configuration, for earlier releases of transformers: the first are taken with
            which the release's own code runs and is causal.
        connection: In a model of several streams, the module beside each mixer that says how the mixer's output is
            written into them, and the place of that factor in the module's output.
    """

    build: Callable[..., Any]
    layers: Mapping[str, Layer]
    blocks: Callable[[Any], list[Block]]
    connection: tuple[str, int] | None = None
    earlier: tuple[Options, ...] = ()

    def build_here(self, **options: Any) -> Any:
        """Build the tiny model with those of its options that the installed release of transformers has right.

        Args:
            options: Further options.

        Returns:
            The model, or None if the release has none of them right.
        """
        for own in ({}, *self.earlier):
            with suppress(Exception):  # of the release's own code
                if is_causal(self.build(**{**own, **options})):
                    return self.build(**{**own, **options})  # one that has no state yet
        return None

    @property
    def reads_mask(self) -> bool:
        """Whether every layer takes the attention mask."""
        return all(layer.takes_mask for layer in self.layers.values())


# --- Where the layers stand ----------------------------------------------------------------------------------------


def layer_types(config: Any) -> list[str]:
    """Return the type of each layer, as most configurations spell it."""
    return list(config.layer_types)


def in_each(home: str, **mixers: str) -> Callable[[Any], list[Block]]:
    """Say that every block of a model has the same mixers, one after the other: attribute and class of each."""

    def blocks(config: Any) -> list[Block]:
        return [
            Block("residual", [f"{home}.{i}.{name}" for name in mixers], [*mixers.values()])
            for i in range(config.num_hidden_layers)
        ]

    return blocks


def by_type(
    home: str,
    mixers: Mapping[str, tuple[str, str] | None],
    types: Callable[[Any], list[str]] = layer_types,
    factors: Callable[[Any, str], dict[str, Any]] = lambda config, kind: {},
) -> Callable[[Any], list[Block]]:
    """Say that every block of a model has one mixer, which depends on the type of the layer.

    Args:
        home: Dotted name of the list of layers.
        mixers: Attribute and class of the mixer of each type of layer; None for a layer that mixes no tokens.
        types: From the configuration to the type of each layer.
        factors: From the configuration and a type to further fields of its :class:`Block`.
    """

    def blocks(config: Any) -> list[Block]:
        kinds = types(config)
        assert len(kinds) == config.num_hidden_layers
        placed = ((i, kind, mixers[kind]) for i, kind in enumerate(kinds))
        return [
            Block(**{"shape": "residual", "mixers": [f"{home}.{i}.{mixer[0]}"], "classes": [mixer[1]],
                     **factors(config, kind)})
            for i, kind, mixer in placed if mixer is not None
        ]  # fmt: skip

    return blocks
