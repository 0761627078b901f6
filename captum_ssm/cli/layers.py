"""The relevance of a text's tokens before each layer of a model, as views of the text."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from captum_ssm.cli.problems import CommandError
from captum_ssm.visualization import Passage, Views


def layer_views(total: Passage, model: nn.Module, relevance_before: Callable[[list[str]], list[Tensor]]) -> Views:
    """Return a text with one view for each layer: the relevance of each token's state before it.

    Where the residual stream is all that a layer reads, each view has the same sum as the first.

    Args:
        total: The text with the relevance of its tokens.
        model: The model.
        relevance_before: From the names of layers to the relevance of their inputs, each (1, L, E).

    Returns:
        The views. Cost: one explanation.

    Raises:
        CommandError: If the model has no list of layers.
    """
    names = blocks(model)
    if not names:
        raise CommandError(f"{type(model).__name__} has no list of layers to show; leave --layers out.")
    scores = torch.stack([relevance[0].sum(-1) for relevance in relevance_before(names)])
    numbered = [f"before layer {number}" for number in range(len(names))]
    return Views(total, "embeddings", numbered, scores.detach().to("cpu").double())


def blocks(model: nn.Module) -> list[str]:
    """Return the names of a model's layers: the items of its longest list of modules that lies in no other list."""
    lists: dict[str, int] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{other}.") for other in lists):
            lists[name] = len(module)
    longest = max(lists, key=lists.__getitem__, default=None)
    return [] if longest is None else [f"{longest}.{number}" for number in range(lists[longest])]
