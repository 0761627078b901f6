"""Packages of the extras ``data`` and ``ray``, imported when they are first needed."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from captum_ssm.errors import InvalidInputError

_EXTRAS = {"pyarrow": "data", "ray": "ray"}


def needed(module: str) -> Any:
    """Return a module of a package that an extra installs.

    Args:
        module: Its full name.

    Returns:
        The module.

    Raises:
        InvalidInputError: If it is not installed, with the extra.
    """
    package = module.partition(".")[0]
    try:
        return import_module(module)
    except ImportError as error:
        raise InvalidInputError(
            f"this needs {package}: pip install 'captum-ssm[{_EXTRAS[package]}]' ({error})"
        ) from error
