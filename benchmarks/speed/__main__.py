"""Measure, print, store and compare: see the docstring of the package."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Callable, Collection
from pathlib import Path

import torch
from transformers.utils import logging

import benchmarks.speed
from benchmarks.speed.figures import Figure, better, joined, read, report, slower, store, write_page
from benchmarks.speed.groups import GROUPS


def measured(
    groups: Collection[str], quick: bool, on_group: Callable[[list[Figure]], object] = lambda figures: None
) -> list[Figure]:
    """Measure groups and print their figures, and call a function with those of each group."""
    figures: list[Figure] = []
    for group in groups:
        start = sum(os.times()[:4])  # of this process and those that it starts
        print(f"\n{group}", flush=True)
        of_group = []
        for figure in GROUPS[group](quick):
            print(figure, flush=True)
            of_group.append(figure)
        on_group(of_group)
        figures += of_group
        print(f"({sum(os.times()[:4]) - start:.0f} s)", flush=True)
    return figures


def check(stored: list[Figure], found: list[Figure], quick: bool) -> bool:
    """Print what has become slower, also when it is measured once more, and return whether nothing has."""
    again = {new.group for _, new in slower(stored, found)}
    if again:
        print("\nonce more, as they seem slower:")
        found = better(found, measured([group for group in GROUPS if group in again], quick))
    keys = {figure.key for figure in stored}
    pairs = slower(stored, found)
    print(f"\n{report(pairs, sum(figure.key in keys for figure in found))}")
    return not pairs


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.speed",
        description=benchmarks.speed.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--quick", action="store_true", help="smaller sizes")
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=list(GROUPS), metavar="NAME", help="these groups")
    parser.add_argument("--json", type=Path, metavar="FILE", help="store the figures; groups that are not run stay")
    parser.add_argument("--page", action="store_true", help="write the table of docs/speed.md from the FILE of --json")
    parser.add_argument("--check", type=Path, metavar="FILE", help="compare with these figures; 1 if any is slower")
    options = parser.parse_args()
    if options.page and not options.json:
        parser.error("--page writes what --json FILE has; name the file, too.")
    torch.set_num_threads(1)
    logging.set_verbosity_error()  # that kernels are not installed
    logging.disable_progress_bar()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread")

    def keep(figures: list[Figure]) -> None:
        if options.json:
            store(joined(read(options.json) if options.json.exists() else [], figures), options.json)

    found = measured(options.only, options.quick, keep)
    if options.page:
        write_page(options.json)
    if options.check and not check(read(options.check), found, options.quick):
        sys.exit(1)


if __name__ == "__main__":
    main()
