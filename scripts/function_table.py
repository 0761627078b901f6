"""List the functions that relevance passes and refuses; ``--write`` puts the list into ``docs/functions.md``.

Run it from the repository with the package's ``test`` extra installed::

    python -m scripts.function_table --write
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

from torch.overrides import get_overridable_functions

from captum_ssm.relevance.functions import FUNCTIONS, Function
from captum_ssm.relevance.functions.refused import DECISIONS, REASONS

PAGE = Path(__file__).resolve().parent.parent / "docs" / "functions.md"
TITLE = """# The functions that relevance follows

Every function of `torch`, `torch.nn.functional`, `torch.fft`, `torch.linalg`, `torch.special` and every method of a
tensor, by its `__name__`: `torch.fft.rfft` is `fft_rfft`. In-place forms (`add_`, `+=`) belong to the function that
they apply. The list is written by `scripts/function_table.py` from the table in
[`captum_ssm/relevance/functions`](../captum_ssm/relevance/functions/__init__.py), whose tests run every row on random
arguments; both rules are derived in [Relevance that adds up](relevance.md). `captum_ssm.register_rule` adds a row."""
SIMPLE = (
    ("linear", "Linear", "The function itself, applied to value and reference; also of complex numbers."),
    (
        "product", "Linear in each of two tensors",
        "If one is traced, it is linear; if both are, each factor's change counts times a mean of the other.",
    ),
    (
        "elementwise", "Of each entry",
        "The multiplier is the difference quotient; with frozen gates a gate on its own input, or a constant.",
    ),
)  # fmt: skip
DECIDED = """The input decides, the reference follows, and `method.held` names the decisions that the reference would
have made otherwise. *Entries by their positions*: the entries of value and reference at the positions that the input
chose. *Steps*: the input's rounded numbers, which are constants. *Other decisions*: positions, truth values and numbers
of Python."""


def names(rows: Iterable[Function]) -> str:
    """Return the names and aliases of rows, in the order of the alphabet."""
    return listed(name for row in rows for name in (row.name, *row.aliases))


def listed(each: Iterable[str]) -> str:
    """Return names as code, in the order of the alphabet."""
    return ", ".join(f"`{name}`" for name in sorted(set(each)))


def of_kind(kind: str) -> list[Function]:
    """Return the rows of a kind."""
    return [row for row in FUNCTIONS if row.kind == kind]


def composed() -> Iterator[str]:
    """Yield a line for each module of definitions, and one for the functions that are run as torch writes them."""
    homes: dict[str, list[Function]] = {}
    for row in of_kind("composed"):
        homes.setdefault(row.composition.__module__ if row.composition is not None else "", []).append(row)
    of_torch = [row for home, rows in homes.items() if home.startswith("torch") for row in rows]
    for home, rows in homes.items():
        if home.startswith("captum_ssm"):
            summary = (sys.modules[home].__doc__ or "").partition("\n\n")[0].replace("\n", " ")
            yield f"* [{home.rpartition('.')[2]}](../{home.replace('.', '/')}.py). {summary} {names(rows)}"
    yield f"* As torch itself writes them: {names(of_torch)}"


def page() -> str:
    """Return the page in Markdown."""
    parts = [TITLE]
    for kind, title, text in SIMPLE:
        parts += [f"## {title}", text, names(of_kind(kind))]
    alone = [row for row in of_kind("linear") if row.linear_in is not None]
    single = [row for row in of_kind("product") if row.factors == 1 and row.composition is None]
    parts[3] += f"\n\nRefused if another argument than the first is traced: {names(alone)}."
    parts[6] += f"\n\nRefused if both are traced: {names(single)}."
    parts += ["## Written in other functions", "\n".join(composed())]
    parts += ["## Decisions", DECIDED]
    parts += [f"Entries by their positions: {names(of_kind('selection'))}", f"Steps: {names(of_kind('step'))}"]
    parts += [f"Other decisions: {listed(DECISIONS.split())}"]
    parts += ["## Without values", f"Constants: {names(of_kind('constant'))}"]
    parts += [f"Types and devices, none narrower than the explanation's: {names(of_kind('cast'))}"]
    parts += [f"Shapes and types: {names(of_kind('form'))}"]
    parts += [f"Marks for autograd: {names(of_kind('mark'))}"]
    parts += ["## Refused", "\n".join(f"* {reason}: {listed(each.split())}" for reason, each in REASONS.items())]
    parts += [f"* what leaves torch cannot be followed: {names(of_kind('outside'))}"]
    parts[-2:] = ["\n".join(parts[-2:])]
    parts += [
        "Any other function with floating-point results is refused too; so are arguments of the functions above that"
        " are named in the error, such as dropout and batch normalization in training mode."
    ]
    return "\n\n".join(parts) + "\n"


def unlisted() -> set[str]:
    """Return the functions of the installed torch that have no place on the page, properties apart."""
    found = set()
    for functions in get_overridable_functions().values():
        for function in functions:
            name = getattr(function, "__name__", "__get__")
            row = FUNCTIONS.find(name.strip("_"))
            if name != "__get__" and row.kind == "decision" and row.name not in DECISIONS.split():
                found.add(row.name)
    return found


def main() -> None:
    """Print the page, or write it."""
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--write", action="store_true", help="rewrite docs/functions.md")
    if parser.parse_args().write:
        PAGE.write_text(page(), encoding="utf-8")
    else:
        print(page())


if __name__ == "__main__":
    main()
