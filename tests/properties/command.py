"""The command of both suites: draw cases by number, count what became of them, and show what broke a law."""

import argparse
import math
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable

import torch
import transformers


def command(
    noun: str, count: int, about: str | None, become: Callable[[int, int], Iterable[tuple[str, str]]],
    most: float = math.inf,
) -> int:  # fmt: skip
    """Run, print the counts, and return the exit status: 1 if a law is broken.

    Args:
        noun: What is drawn, in the plural; the option that says how many.
        count: How many by default.
        about: The description of the command.
        become: From a seed and a number to each outcome, which has ``WRONG`` in it if a law is broken, and its report.
            What cannot be tried has an outcome without a report.
        most: How many reports of one outcome are shown.
    """
    parser = argparse.ArgumentParser(description=about)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(f"--{noun}", dest="count", type=int, default=count)
    parser.add_argument("--first", type=int, default=0, help="the first number")
    parser.add_argument("--only", type=int, help="the one number to draw")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    numbers = range(options.first, options.first + options.count) if options.only is None else [options.only]
    counts: Counter[str] = Counter()
    began = time.perf_counter()
    for number in numbers:
        for outcome, report in become(options.seed, number):
            counts[outcome] += 1
            if report and (options.only is not None or ("WRONG" in outcome and counts[outcome] <= most)):
                report = report if options.only is not None else report[:1000]
                print(f"--seed {options.seed} --only {number}: {report}", flush=True)
    took = time.perf_counter() - began
    for outcome, times in sorted(counts.items()):
        print(f"{times:6d}  {outcome}")
    print(f"{len(numbers)} {noun} of seed {options.seed} in {took:.0f} s, {len(numbers) / took:.1f} a second")
    return int(any("WRONG" in outcome for outcome in counts))
