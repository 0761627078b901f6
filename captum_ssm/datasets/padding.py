"""The side on which a language model can be padded, measured: on which its answers stay those of each text alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from captum_ssm.layers.precision import computing_type
from captum_ssm.network.forward import run_model
from captum_ssm.network.interface import input_embeddings, is_mamba_ssm_model

Padding = Literal["right", "left", "none", "alone"]
"""Where the padding of a batch stands; ``"none"``: a batch has texts of one length; ``"alone"``: it is one text."""

_TOLERANCE = {torch.bfloat16: 5e-2, torch.float16: 1e-2}
"""Relative differences that are rounding, in types other than float32 and float64, for which it is 1e-3."""


def measured_padding(model: Any, pad: int) -> Padding:
    """Return the side of the padding that changes no answer of a language model.

    A recurrent layer that ignores the mask reads padding before a text as text, and one that reads both ways the
    padding behind it, too.

    Args:
        model: The model.
        pad: The id of the padding.

    Returns:
        ``"right"`` if the padding may stand there, else ``"left"``, else ``"none"``, and ``"alone"`` for a model that
        takes no batch at all, as a classifier that was given no padding token.
    """
    weight: Any = getattr(input_embeddings(model), "weight", None)
    count = len(weight) if weight is not None else 8
    texts = [
        [1 + (7 * k + 3 * shift) % max(count - 1, 1) for k in range(length)] for shift, length in enumerate((6, 9))
    ]
    device = weight.device if weight is not None and not weight.is_meta else torch.device("cpu")
    sides: tuple[Padding, ...] = ("right", "left")
    for side in () if is_mamba_ssm_model(model) else sides:
        if _changes_nothing(model, texts, pad, side, device):
            return side
    return "none" if _changes_nothing(model, [text[:6] for text in texts], pad, "none", device) else "alone"


def padded(rows: Sequence[Sequence[int]], pad: int, side: Padding, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return rows of ids as one tensor, and where they stand in it.

    Args:
        rows: The ids of each row.
        pad: The id of the padding.
        side: The side of the padding.
        device: The device of both.

    Returns:
        Ids (B, L), and the mask (B, L): 1 at ids and 0 at padding.
    """
    L = max(map(len, rows))
    ids, mask = torch.full((len(rows), L), pad, dtype=torch.long), torch.zeros(len(rows), L, dtype=torch.long)
    for k, row in enumerate(rows):
        place = slice(L - len(row), L) if side == "left" else slice(0, len(row))
        ids[k, place], mask[k, place] = torch.tensor(row), 1
    return ids.to(device), mask.to(device)


def _changes_nothing(model: Any, texts: Sequence[Sequence[int]], pad: int, side: Padding, device: torch.device) -> bool:
    """Whether the answers to padded texts are those to each alone."""

    def answers(texts: Sequence[Sequence[int]]) -> Tensor:
        ids, mask = padded(texts, pad, side, device)
        return run_model(model, ids, *([] if bool(mask.all()) else [mask]))

    with torch.no_grad():
        alone = torch.cat([answers([text]) for text in texts])
        try:
            together = answers(texts)
        except (RuntimeError, ValueError):  # a classifier without a padding token takes no batch
            return False
    tolerance = _TOLERANCE.get(computing_type(model), 1e-3)
    return together.shape == alone.shape and bool((together - alone).abs().max() <= tolerance * alone.abs().max())
