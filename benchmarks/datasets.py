"""Speed and memory of explaining a whole data set, with the shipped model.

    python -m benchmarks.datasets                 speed, resume, memory over 10,000 rows; some minutes
    python -m benchmarks.datasets --rows 100000   memory over so many rows
    python -m benchmarks.datasets --ray           also Ray with one worker and with two

Needs the extra ``data``, with ``--ray`` the extra ``ray``: ``.venv-ray/bin/python -m benchmarks.datasets``. Only ratios
are meant to be quoted: both sides of each are timed in turn in the same process by the time that it computes, so a busy
machine slows both; those of Ray, whose workers are other processes, by the clock, so on a machine that does nothing
else.
"""

from __future__ import annotations

import argparse
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from captum_ssm import ImplicitAttentionRelevance
from captum_ssm.datasets import Explain, Ray, Source, explain_file
from captum_ssm.datasets.engines import Part
from captum_ssm.models import REVIEWS
from scripts.train_reviews import rotten_tomatoes_splits

Row = tuple[str, str, str]
"""What was measured, what is wanted, and the result."""

PART_ROWS = 250


def held_out() -> list[str]:
    """Return the 1,000 held-out reviews, in an order that mixes the labels."""
    texts = [text for text, _ in rotten_tomatoes_splits()["test"]]
    return [texts[k] for half in range(500) for k in (half, 500 + half)]


class Loop:
    """The loop that one writes by hand: sorted by length, padded on the right, batch by batch.

    Args:
        model: The model.
        tokenizer: Its tokenizer.
    """

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.method = ImplicitAttentionRelevance(self.log_probabilities, model)

    def log_probabilities(self, ids: Tensor, mask: Tensor) -> Tensor:
        """Return the log-probabilities (B, V) of the token that follows each text."""
        logits = self.model(ids, attention_mask=mask).logits
        return logits[torch.arange(len(ids)), mask.sum(1) - 1].log_softmax(-1)

    def __call__(self, texts: Sequence[str], rows: int) -> None:
        """Explain the prediction for each text, with F(x), F(x') and the error of the sum.

        Args:
            texts: The texts.
            rows: How many of them a batch has.
        """
        every = sorted(self.tokenizer(list(texts)).input_ids, key=len)
        for start in range(0, len(every), rows):
            batch = [torch.tensor(ids) for ids in every[start : start + rows]]
            ids = torch.nn.utils.rnn.pad_sequence(batch, batch_first=True)
            lengths = torch.tensor([[len(each)] for each in batch])
            mask = (torch.arange(ids.shape[1]) < lengths).long()
            with torch.no_grad():
                target = self.log_probabilities(ids, mask).argmax(1)
            baselines = torch.where(
                (ids == self.tokenizer.eos_token_id) | (mask == 0), ids, self.tokenizer.unk_token_id
            )
            self.method.attribute(ids, target, mask, baselines=baselines, return_convergence_delta=True)


def rates(runs: Iterable[tuple[str, Callable[[], object], int]], rounds: int) -> dict[str, float]:
    """Return the rows a second of each, the best of several rounds in turn, in the time that the process computes.

    Args:
        runs: Name, function and number of rows of each.
        rounds: How many rounds there are, after one to warm up.
    """
    runs, best = list(runs), dict[str, float]()
    for number in range(rounds + 1):
        for name, run, rows in runs:
            start = time.process_time()
            run()
            if number:
                best[name] = max(best.get(name, 0.0), rows / (time.process_time() - start))
    return best


def speed(texts: Sequence[str], folder: Path, rounds: int) -> list[Row]:
    """Measure the callable and the local engine against loops by hand."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(REVIEWS).eval(), AutoTokenizer.from_pretrained(REVIEWS)
    loop, explain = Loop(model, tokenizer), Explain(model, tokenizer)
    path = folder / "speed.txt"
    path.write_text("\n".join(texts), encoding="utf-8")

    def engine() -> None:
        with tempfile.TemporaryDirectory() as out:
            explain_file(explain, Source(str(path), block_rows=PART_ROWS), out)

    single = texts[:: max(len(texts) // 25, 1)]
    found = rates(
        [
            ("engine", engine, len(texts)),
            ("alone", lambda: loop(single, 1), len(single)),
            *((f"loop {rows}", lambda rows=rows: loop(texts, rows), len(texts)) for rows in (8, 16, 32, 64)),
        ],
        rounds,
    )
    loops = {name: rate for name, rate in found.items() if name.startswith("loop")}
    best = max(loops, key=lambda name: loops[name])
    return [
        ("rows a second of the local engine", "", f"{found['engine']:.0f}"),
        (f"… of the best loop by hand (batches of {best[5:]})", "", f"{loops[best]:.0f}"),
        ("… of one row at a time", "", f"{found['alone']:.0f}"),
        ("engine ÷ best loop", "0.9 or more", f"{found['engine'] / loops[best]:.2f}"),
        ("engine ÷ one row at a time", "5 or more", f"{found['engine'] / found['alone']:.2f}"),
    ]


def resume(texts: Sequence[str], folder: Path, rounds: int) -> list[Row]:
    """Measure the time that parts, manifest and lock take of a run, and that a run takes that finds all done."""
    model, tokenizer = AutoModelForCausalLM.from_pretrained(REVIEWS).eval(), AutoTokenizer.from_pretrained(REVIEWS)
    explain, path = Explain(model, tokenizer), folder / "resume.txt"
    path.write_text("\n".join(texts), encoding="utf-8")
    source, done = Source(str(path), block_rows=PART_ROWS), folder / "done"
    explain_file(explain, source, done)
    seconds: dict[str, float] = {}
    for _ in range(rounds):
        start = time.process_time()
        for block in source.blocks():
            explain.explained(block.rows)
        middle = time.process_time()
        explain_file(explain, source, done, resume=True)
        end = time.process_time()
        for name, took in (("explain", middle - start), ("done", end - middle)):
            seconds[name] = min(seconds.get(name, took), took)
    return [("a resumed run that finds all done ÷ the run", "below 2 %", f"{seconds['done'] / seconds['explain']:.2%}")]


def memory(rows: int, folder: Path) -> list[Row]:
    """Measure the memory of a run over many short rows in a process of its own, beyond that after its first part."""
    path, out = folder / "memory.txt", folder / "memory"
    with path.open("w", encoding="utf-8") as file:
        file.writelines(f"{word} film\n" for k in range(rows) for word in [("good", "bad", "dull", "fine")[k % 4]])
    command = [sys.executable, "-m", "benchmarks.datasets", "--memory-of", str(path), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    first, last, seconds = (float(word) for word in done.stdout.split()[-3:])
    name = f"memory after {rows:,} rows beyond that after the first {PART_ROWS}"
    return [(name, "below 1 GB", f"{(last - first) / 1024:.0f} MB, {rows / seconds:.0f} rows a second")]


def memory_of(path: str, out: str) -> None:
    """Explain a file, and print the largest memory after one part and at the end, in KB, and the seconds."""
    seen: list[float] = []

    class Watched(Explain):
        def explained(self, *args: Any, **options: Any) -> Any:
            found = super().explained(*args, **options)
            seen.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
            return found

    start = time.process_time()
    explain_file(Watched(REVIEWS), Source(path, block_rows=PART_ROWS), out)
    print(seen[0], resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.process_time() - start)


@dataclass(frozen=True)
class Timed(Ray):
    """An engine that notes when each part comes."""

    times: list[float] = field(default_factory=list)

    def parts(self, *args: Any) -> Iterator[Part]:
        """Yield the parts.

        Args:
            *args: Those of the engine.
        """
        for part in super().parts(*args):
            self.times.append(time.perf_counter())
            yield part


def workers(texts: Sequence[str], folder: Path) -> list[Row]:
    """Measure Ray with two workers against one, by the clock, with the workers started."""
    import ray

    path, took = folder / "ray.txt", dict[int, float]()
    path.write_text("\n".join(texts), encoding="utf-8")
    ray.init(num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level="ERROR")
    for count in (1, 2, 1, 2):
        with tempfile.TemporaryDirectory() as out:
            engine = Timed(workers=count)
            explain_file(Explain(REVIEWS), Source(str(path), block_rows=25), out, engine=engine)
            times = engine.times
        first = count  # the first part of each worker is its start
        rate = (len(times) - first) / (times[-1] - times[first - 1])
        took[count] = max(took.get(count, 0.0), rate)
    ray.shutdown()
    return [("Ray: two workers ÷ one, parts a second", "1.6 or more", f"{took[2] / took[1]:.2f}")]


def main() -> None:
    """Measure, and print one line for each figure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--rows", type=int, default=10_000, help="rows over which the memory is measured")
    parser.add_argument("--texts", type=int, default=500, help="reviews over which the speed is measured")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--ray", action="store_true")
    parser.add_argument("--memory-of", nargs=2, metavar=("IN", "OUT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    os.environ["HF_HUB_OFFLINE"] = "1"
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    torch.set_num_threads(1)
    if options.memory_of:
        memory_of(*options.memory_of)
        return
    texts = held_out()[: options.texts]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        measured = [*speed(texts, folder, options.rounds), *resume(texts, folder, 2), *memory(options.rows, folder)]
        measured += workers(texts, folder) if options.ray else []
    for what, wanted, result in measured:
        print(f"{what:<62} {wanted:<14} {result}")


if __name__ == "__main__":
    main()
