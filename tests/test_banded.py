"""The fused matrices of cores that read a few tokens back are those of their channels one by one."""

from __future__ import annotations

import pytest
import torch

from captum_ssm.matrices.banded import Banded
from captum_ssm.matrices.core_matrix import CoreMatrix, channel_matrices
from captum_ssm.matrices.entrywise import ABSOLUTE, IDENTITY, POSITIVE, SQUARE, Entrywise
from captum_ssm.matrices.single_channels import SingleChannels
from captum_ssm.operators import CausalConv, Chain, Diagonal, Operator, Projection, Scan
from tests import oracles
from tests.test_shared_heads import D, H, L, N, P, check, weights


def core_of(taps: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Chain:
    """Gates around and between convolutions with these numbers of taps."""
    factors: dict[str, Operator] = {}
    for number, K in enumerate(taps):
        factors[f"gate{number}"] = Diagonal(torch.randn(2, L, D, dtype=dtype))
        factors[f"conv{number}"] = CausalConv(torch.randn(D, K, dtype=dtype))
    return Chain({**factors, "input": Diagonal(torch.randn(2, L, D, dtype=dtype))})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("entrywise", [IDENTITY, ABSOLUTE, POSITIVE, SQUARE, Entrywise(1.0, 0.5, 0.25)])
@pytest.mark.parametrize("taps", [(1,), (3,), (4,), (3, 2), (12,)])
def test_a_few_diagonals_are_the_channels_one_by_one(
    taps: tuple[int, ...], entrywise: Entrywise, dtype: torch.dtype
) -> None:
    torch.manual_seed(sum(taps))
    core, (u, v) = core_of(taps, dtype), weights(padding=True, dtype=dtype)
    assert Banded.of(core, v) is not None
    check(core, u, v, entrywise)
    check(core.flipped(), u, v, entrywise)


@pytest.mark.parametrize("taps", [(4,), (12,)])
def test_several_queries_and_projections_among_the_factors(taps: tuple[int, ...]) -> None:
    torch.manual_seed(1)
    core, (u, v) = core_of(taps), weights(padding=True)
    queries = torch.stack([u, 2 * u, u.flip(1)])
    alone = torch.stack([CoreMatrix(core, query, v).dense(ABSOLUTE) for query in queries])
    assert torch.allclose(CoreMatrix(core, queries, v).dense(ABSOLUTE), alone, rtol=0, atol=1e-12)
    W, w = torch.randn(D, 6, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    mixed, few = Chain({"value": Projection(W), "shift": CausalConv(w)}), torch.randn(2, L, 6, dtype=torch.float64)
    entries = torch.einsum("bid,de,eij,bje->bdij", u, W, oracles.conv_matrix(w, L), few)
    assert torch.allclose(CoreMatrix(mixed, u, few).dense(ABSOLUTE), entries.abs().sum(1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("taps", [(4,), (3, 2), (12,)])
def test_lengths_are_those_of_all_contributions(taps: tuple[int, ...]) -> None:
    torch.manual_seed(2)
    core, (u, v) = core_of(taps), weights(padding=True)
    W, s = torch.randn(5, D, dtype=torch.float64), torch.randn(2, L, 5, dtype=torch.float64)
    output = Chain({"scale": Diagonal(s), "out": Projection(W)})
    contributions = torch.einsum("bie,ed,bdij,bjd->bije", s, W, channel_matrices(core, v), v)
    assert torch.allclose(CoreMatrix(core, u, v).lengths(output), contributions.norm(dim=-1), rtol=0, atol=1e-12)


def test_a_core_with_a_recurrence_is_not_banded() -> None:
    _, v = weights(padding=False)
    scan = Scan(*torch.rand(3, 2, L, H, N), head_size=P)
    assert Banded.of(Chain({"scan": scan, "conv": CausalConv(torch.ones(D, 2))}), v) is None
    assert Banded.of(core_of((2,)).flipped(), v) is None


@pytest.mark.parametrize("entrywise", [IDENTITY, ABSOLUTE, SQUARE])
def test_a_projection_before_a_scan_of_single_channels_is_part_of_its_blocks(entrywise: Entrywise) -> None:
    """As in RWKV-4, whose value is projected from two tokens."""
    torch.manual_seed(4)
    w, W = torch.randn(6, 2, dtype=torch.float64), torch.randn(D, 6, dtype=torch.float64)
    scan, gate = Scan(*torch.rand(3, 2, L, D, N, dtype=torch.float64), lag=1), torch.randn(2, L, D, dtype=torch.float64)
    core = Chain({"gate": Diagonal(gate), "scan": scan, "value": Projection(W), "shift": CausalConv(w)})
    u, v = torch.randn(2, L, D, dtype=torch.float64), torch.randn(2, L, 6, dtype=torch.float64)
    assert SingleChannels.of(core, v) is not None
    shift = oracles.conv_matrix(w, L)
    entries = torch.einsum("bid,bdit,de,etj,bje->bdij", u * gate, channel_matrices(scan, u), W, shift, v)
    found = CoreMatrix(core, u, v).dense(entrywise)
    assert torch.allclose(found, entrywise(entries).sum(1), rtol=0, atol=1e-11)
