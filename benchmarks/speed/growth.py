"""How times grow with the number of tokens.

Most of the time of this group is not timed: a rollout examines the model once for each length, by some thirty runs.
Explanations are timed in processes of their own that keep the memory that they have freed. Otherwise glibc gives back
large pieces and asks for them again, which takes a tenth to a third of the time of long texts, and none of short ones:

    MALLOC_MMAP_MAX_=0 MALLOC_TRIM_THRESHOLD_=1099511627776 python -m benchmarks.speed.growth MODEL L ...
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.figures import ROOT, Figure
from benchmarks.speed.models import TARGET, gated_delta, mamba, mamba2, random_ids
from benchmarks.speed.timing import Call
from benchmarks.speed.timing import growth as exponents
from captum_ssm import ImplicitAttentionRelevance, ImplicitAttentionRollout
from captum_ssm.operators import DeltaScan, Product, Recurrence, Scan


def selective_scan(L: int, D: int, N: int = 16) -> tuple[Scan, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return a scan of one example as Mamba's, and its delta (L, D), A (D, N), B (L, N), C (L, N)."""
    torch.manual_seed(0)
    delta, A = 0.1 * torch.rand(L, D), -torch.arange(1.0, N + 1).expand(D, N)
    B, C = torch.randn(L, N), torch.randn(L, N)
    step = delta[None, :, :, None]
    scan = Scan(
        a=Product((step, A[None, None]), exponential=True),
        b=Product((step, B[None, :, None])),
        c=C[None, :, None],
    )
    return scan, (delta, A, B, C)


def delta_scan(L: int, decays: int, H: int = 4, N: int = 64) -> DeltaScan:
    """Return a delta rule of H heads of N states and as many channels, with 1 or N decays for each head."""
    k, q = (nn.functional.normalize(torch.randn(1, L, H, N), dim=-1) for _ in range(2))
    a, write = 1 - 0.1 * torch.rand(1, L, H, decays), torch.rand(1, L, H, 1) * k
    return DeltaScan(a=a, b=write, c=q, recall=a * k, erase=write, head_size=N)


SCANS: dict[str, Callable[[int], Recurrence]] = {
    "`Scan`, decays by state (S6: 256 channels, N 16)": lambda L: selective_scan(L, 256)[0],
    "`DeltaScan`, decays by head (GDN: 4 heads of 64, N 64)": lambda L: delta_scan(L, 1),
    "`DeltaScan`, decays by state (KDA: 4 heads of 64, N 64)": lambda L: delta_scan(L, 64),
}


def products(L: int) -> dict[str, Call]:
    """Return one product with each recurrence of L tokens."""
    scans = {name: make(L) for name, make in SCANS.items()}
    return {name: partial(scan.apply, torch.randn(1, L, scan.heads * scan.head_size)) for name, scan in scans.items()}


def explanations(model: Any, L: int) -> dict[str, Call]:
    """Return explanations of L tokens that make no matrix: a row of a rollout, and relevance by both rules."""
    ids, relevance = random_ids(L), ImplicitAttentionRelevance(model)
    explain = partial(relevance.attribute, ids, target=TARGET)
    return {
        'rollout\'s row, `fusion="mean"`': partial(
            ImplicitAttentionRollout(model, fusion="mean").attribute, ids, target=TARGET
        ),
        "relevance, frozen gates": explain,
        "relevance with a reference": partial(explain, baselines=2),
    }


MODELS: dict[str, Callable[[], Any]] = {
    "S6, 2 × 32": partial(mamba, 2, 32),
    "SSD, 2 × 64": partial(mamba2, 2, 64),
    "gated delta, 1 × 64": partial(gated_delta, 1, 64, softmax=False),
}

KEPT = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**40)}
"""Settings by which glibc keeps all memory that a process has freed."""


def in_a_process(model: str, lengths: Sequence[int]) -> dict[str, float]:
    """Return the exponents of explanations of a model, by name, measured in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.speed.growth", model, *map(str, lengths)]
    environment = {**os.environ, **KEPT}
    run = subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT, env=environment)
    found: dict[str, float] = json.loads(run.stdout)
    return found


def growth(quick: bool) -> Iterator[Figure]:
    """Measure the exponents of products and of whole explanations."""
    lengths = [64, 128, 256] if quick else [512, 1024, 2048, 4096, 8192]
    span, against = f"L {lengths[0]} to {lengths[-1]}", "L, as its exponent"
    for of, value in exponents(products, lengths, 3).items():
        yield Figure("growth", f"growth of `apply`, {span}", against, of, 1.1, value)
    lengths = [64, 256] if quick else [512, 4096, 32768]
    span, against = f"L {lengths[0]} to {lengths[-1]}", "L, as its exponent, where freed memory is kept"
    for of in MODELS:
        for name, value in in_a_process(of, lengths).items():
            yield Figure("growth", f"growth of {name}, {span}", against, of, 1.05, value)


def main() -> None:
    """Print the exponents of explanations of one model."""
    name, *lengths = sys.argv[1:]
    torch.set_num_threads(1)
    print(json.dumps(exponents(partial(explanations, MODELS[name]()), list(map(int, lengths)), 2)))


if __name__ == "__main__":
    main()
