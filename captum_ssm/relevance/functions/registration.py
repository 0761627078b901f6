"""Rules that a user adds or takes away."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, get_args

from captum_ssm.relevance.functions.external import EXTERNAL_CODE
from captum_ssm.relevance.functions.table import FUNCTIONS, Kind

Composition = TypeVar("Composition", bound=Callable[..., Any])


def register_rule(what: Callable[..., Any] | str, kind: Kind | None = None) -> Any:
    """Register the rule of a function, or of code that relevance cannot follow, such as a fused kernel.

    Args:
        what: A torch function; or the name of a class of modules, or of a function as the code of a module calls it,
            with or without the name of that module in front, ``"package.module.function"``.
        kind: Of a torch function: ``"linear"`` in its tensors together; ``"product"``: linear in each of two;
            ``"elementwise"``: each entry of the result depends on one entry, and torch has its derivative; or
            ``"constant"``: only the shape of its argument is read. None if the function is written in other functions.

    Returns:
        None if a kind is passed; otherwise a decorator for the same function, written in functions that have a rule.
        The definition for a module gets the module and then its arguments. Code registered by name also runs as it is,
        and its result must equal that of the definition.

    Raises:
        ValueError: If there is a rule already, or the kind is unknown.

    Example:
        >>> import torch
        >>> @register_rule(torch.special.bessel_j0)
        ... def bessel_j0(x):  # where |x| is below 0.5, to 1e-4
        ...     return 1 - x.square() / 4 + x.square().square() / 64
        >>> unregister_rule(torch.special.bessel_j0)
        >>> @register_rule("FusedSquare")
        ... def fused_square(module, x):
        ...     return x * x
        >>> unregister_rule("FusedSquare")
    """
    name = what if isinstance(what, str) else _name_of(what)
    if name in EXTERNAL_CODE if isinstance(what, str) else FUNCTIONS.find(name).has_rule:
        raise ValueError(f"A rule for {name!r} is already registered; call captum_ssm.unregister_rule first.")
    if kind is not None:
        if kind not in get_args(Kind) or isinstance(what, str):
            raise ValueError(f"{kind!r} is not a kind of function; choose from {', '.join(get_args(Kind))}.")
        FUNCTIONS.register(name, kind)
        return None

    def decorate(composition: Composition) -> Composition:
        if isinstance(what, str):
            EXTERNAL_CODE.add(name, composition)
        else:
            FUNCTIONS.register(name, None, composition)
        return composition

    return decorate


def unregister_rule(what: Callable[..., Any] | str) -> None:
    """Remove the rule of a function, or of named code.

    Args:
        what: The function or the name that has a rule, registered or of this package.

    Raises:
        KeyError: If there is none.
    """
    if isinstance(what, str):
        EXTERNAL_CODE.remove(what)
    else:
        FUNCTIONS.withdraw(_name_of(what))


def _name_of(function: Callable[..., Any]) -> str:
    return function.__name__.strip("_")
