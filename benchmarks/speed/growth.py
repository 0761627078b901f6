"""How times grow with the number of tokens."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.speed.figures import Figure
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


def growth(quick: bool) -> Iterator[Figure]:
    """Measure the exponents of products and of whole explanations."""
    lengths = [64, 128, 256] if quick else [512, 1024, 2048, 4096, 8192]
    span, against = f"L {lengths[0]} to {lengths[-1]}", "L, as its exponent"
    for of, value in exponents(products, lengths, 3).items():
        yield Figure("growth", f"growth of `apply`, {span}", against, of, 1.1, value)
    lengths = [64, 256] if quick else [512, 2048, 8192, 32768]
    span = f"L {lengths[0]} to {lengths[-1]}"
    models: dict[str, Callable[[], Any]] = {
        "S6, 2 × 32": partial(mamba, 2, 32),
        "SSD, 2 × 64": partial(mamba2, 2, 64),
        "gated delta, 2 × 64": partial(gated_delta, 2, 64, softmax=False),
    }
    for of, build in models.items():
        for name, value in exponents(partial(explanations, build()), lengths, 2).items():
            yield Figure("growth", f"growth of {name}, {span}", against, of, 1.05, value)
