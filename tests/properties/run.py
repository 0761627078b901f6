"""Draw models and hold their explanations to the laws: ``python -m tests.properties.run --seed S --models N``.

``--only K`` draws model K alone, and says in words what it is. The exit status is 1 if a law is broken.
"""

import sys
from collections.abc import Iterator

from tests.properties.command import command
from tests.properties.laws import outcomes


def _become(seed: int, number: int) -> Iterator[tuple[str, str]]:
    """Draw a model, and yield what became of each method."""
    text, results = outcomes(seed, number)
    if not results:
        yield "models that do not run", ""
    for outcome in results:
        report = f"{outcome.method}: {outcome.result}\n    {text}\n    {outcome.detail}"
        yield f"{outcome.method.split(',')[0]:10s} {outcome.result}", report


if __name__ == "__main__":
    sys.exit(command("models", 500, __doc__, _become))
