"""The release of transformers that a model's code is from, as errors name it."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import TracebackType

OLDEST, NEWEST = "4.57", "5.24"
"""Releases of transformers that are tested: ``make test-versions``. Every supported layer of the newest is exact."""


def transformers_release(module: str) -> str:
    """Return the release that a module of transformers is from.

    Args:
        module: Name of the module, such as ``type(layer).__module__``.

    Returns:
        For example ``"transformers 5.8.1 (4.57 to 5.24 are tested)"``; empty for a module of another package.
    """
    if module.partition(".")[0] != "transformers":
        return ""
    return f"transformers {sys.modules['transformers'].__version__} ({OLDEST} to {NEWEST} are tested)"


def name_release(error: Exception) -> None:
    """Add a note to an error that the code of a model of transformers raised: its release, and the remedy.

    Args:
        error: The error.
    """
    models = [name for name in _modules(error.__traceback__) if name.startswith("transformers.models.")]
    if models:
        error.add_note(
            f"Raised while the model itself ran: {models[-1]} of {transformers_release(models[-1])}. If the model does "
            f"not run without captum_ssm either, upgrade transformers: {NEWEST} runs every supported model."
        )


def _modules(traceback: TracebackType | None) -> Iterator[str]:
    """Yield the names of the modules that an error went through, the innermost last."""
    while traceback is not None:
        yield traceback.tb_frame.f_globals.get("__name__", "")
        traceback = traceback.tb_next
