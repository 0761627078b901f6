"""States in which a layer starts: a call that brings one is refused, as part of its output would have no token."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn

from captum_ssm.errors import ModelStateError


def refuse_state(mixer: nn.Module, kwargs: Mapping[str, Any], *names: str) -> None:
    """Refuse a call that hands the layer a state of an earlier one.

    Args:
        mixer: The layer.
        kwargs: Arguments of the call.
        *names: Names of the arguments that hold a state.

    Raises:
        ModelStateError: If one of them is given.
    """
    given = [name for name in names if kwargs.get(name) is not None]
    if given:
        raise ModelStateError(
            f"A {type(mixer).__name__} layer was called with {given[0]!r}, a state of tokens before these. Explain the "
            "whole sequence in one call, without it."
        )
