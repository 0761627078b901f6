"""Draw models and hold their explanations to the laws: ``python -m tests.properties.run --seed S --models N``.

``--only K`` draws model K alone, and says in words what it is. The exit status is 1 if a law is broken.
"""

import argparse
import sys
import time
import warnings
from collections import Counter

import torch
import transformers

from tests.properties.laws import outcomes


def main() -> int:
    """Run, print the counts, and return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--models", type=int, default=500)
    parser.add_argument("--first", type=int, default=0, help="the number of the first model")
    parser.add_argument("--only", type=int, help="the number of the one model to draw")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.utils.logging.set_verbosity_error()
    torch.set_num_threads(1)
    numbers = range(options.first, options.first + options.models) if options.only is None else [options.only]
    counts: Counter[str] = Counter()
    began = time.perf_counter()
    for number in numbers:
        text, results = outcomes(options.seed, number)
        counts["models that do not run"] += not results
        for outcome in results:
            counts[f"{outcome.method.split(',')[0]:10s} {outcome.result}"] += 1
            if outcome.is_wrong or options.only is not None:
                print(f"--seed {options.seed} --only {number}: {outcome.method}: {outcome.result}\n    {text}")
                print(f"    {outcome.detail[: 300 if options.only is None else None]}", flush=True)
    took = time.perf_counter() - began
    for name, count in sorted(counts.items()):
        print(f"{count:6d}  {name}")
    print(f"{len(numbers)} models of seed {options.seed} in {took:.0f} s, {len(numbers) / took:.1f} a second")
    return int(any("WRONG" in name for name in counts))


if __name__ == "__main__":
    sys.exit(main())
