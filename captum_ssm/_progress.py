"""Progress bars, as Captum's own methods show them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from tqdm import tqdm


@contextmanager
def progress_bar(
    name: str, total: int, show: bool, unit: str = "layer", initial: int = 0
) -> Iterator[Callable[..., object]]:
    """Show a progress bar while the context is open, if it stays open for more than two seconds.

    Args:
        name: The label of the bar.
        total: How many steps there are.
        show: Whether to show it at all.
        unit: The name of a step.
        initial: How many steps were done before, which count in no rate.

    Yields:
        A function that advances the bar by a number of steps, or one.
    """
    with tqdm(total=total, initial=initial, desc=name, unit=unit, delay=2, leave=False, disable=not show) as bar:
        yield bar.update
