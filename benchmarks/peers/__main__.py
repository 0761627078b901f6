"""Measure, store, and write the page: see the docstring of the package."""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import torch
import transformers as hf

import benchmarks.peers
from benchmarks.peers import page

if TYPE_CHECKING:
    from benchmarks.peers.peer import Peer

PACKAGES = ("torch", "transformers", "captum", "inseq", "shap", "transformer-lens")


def parts() -> dict[str, Callable[[dict[str, Peer]], Any]]:
    """Return what can be measured, by name."""
    from benchmarks.peers import families, tasks, times

    return {
        "families": lambda peers: dict(families.measured(families.questions(), peers)),
        "trained": lambda peers: dict(families.measured(families.trained(), peers)),
        "times": lambda peers: dict(times.measured(peers)),
        "tasks": lambda peers: list(tasks.measured(peers)),
    }


def dump(stored: dict[str, Any]) -> str:
    """Return the figures as JSON, a line for each model."""

    def lines(part: Any) -> str:
        if isinstance(part, list):
            return "[\n" + ",\n".join(f"  {json.dumps(item, ensure_ascii=False)}" for item in part) + "\n ]"
        items = (f"  {json.dumps(name)}: {json.dumps(item, ensure_ascii=False)}" for name, item in part.items())
        return "{\n" + ",\n".join(items) + "\n }"

    return "{\n" + ",\n".join(f' "{name}": {lines(part)}' for name, part in stored.items()) + "\n}\n"


def main() -> None:
    """Do what the command line asks for."""
    parser = argparse.ArgumentParser(
        "python -m benchmarks.peers",
        description=benchmarks.peers.__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    names = ("families", "trained", "times", "tasks")
    parser.add_argument("--only", nargs="+", choices=names, default=names, metavar="PART", help="these parts")
    parser.add_argument("--page", action="store_true", help="measure nothing")
    options = parser.parse_args()
    torch.set_num_threads(1)
    hf.logging.set_verbosity_error()
    hf.logging.disable_progress_bar()
    stored = page.read()
    if not options.page:
        from benchmarks.peers.table import PEERS

        about = {
            name: {"package": p.package, "sum": p.sum, "claimed": p.claimed, "stored": p.stored}
            for name, p in PEERS.items()
        }
        stored |= {"versions": {name: version(name).partition("+")[0] for name in PACKAGES}, "peers": about}
        for name in options.only:
            start = time.process_time()
            stored[name] = parts()[name](PEERS)
            print(f"{name} {time.process_time() - start:.0f} s", flush=True)
            page.STORED.write_text(dump(stored), encoding="utf-8")
    page.write(stored)


if __name__ == "__main__":
    main()
