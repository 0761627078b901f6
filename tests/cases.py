"""Many cases in one test: where a case takes a millisecond, what pytest itself does for each takes longer."""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

import torch


def on_all(name: str, values: Iterable[Any]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Run a test on all values of one argument, one after the other, as ``pytest.mark.parametrize`` does on its own.

    Each value starts from the same random numbers, so it can be run alone; a failure names it.

    Args:
        name: The name of the argument.
        values: Its values.

    Returns:
        A decorator; what pytest sees is a test without this argument.
    """
    cases = list(values)

    def decorate(test: Callable[..., None]) -> Callable[..., None]:
        @functools.wraps(test)
        def on_each(**arguments: Any) -> None:
            for case in cases:
                torch.manual_seed(0)
                try:
                    test(**{name: case}, **arguments)
                except BaseException as error:
                    error.add_note(f"{name} = {case!r}")
                    raise

        signature = inspect.signature(test)
        parameters = [parameter for parameter in signature.parameters.values() if parameter.name != name]
        on_each.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        return on_each

    assert cases
    return decorate
