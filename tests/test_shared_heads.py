"""The fused matrices of heads that share a matrix are those of their channels one by one."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from captum_ssm.matrices import lengths
from captum_ssm.matrices import shared_heads as module
from captum_ssm.matrices.core_matrix import CoreMatrix, channel_matrices
from captum_ssm.matrices.entrywise import ABSOLUTE, IDENTITY, POSITIVE, SQUARE, Entrywise
from captum_ssm.matrices.shared_heads import SharedHeads
from captum_ssm.operators import (
    Attention,
    CausalConv,
    Chain,
    DeltaScan,
    Diagonal,
    HeadOperator,
    Operator,
    Product,
    Projection,
    Scan,
)
from captum_ssm.operators.device_sizes import DeviceSize
from tests import oracles

TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-6}
KINDS = [
    "scan",
    "lagged scan",
    "scan with direct paths",
    "scan of one decay",
    "delta rule",
    "causal attention",
    "attention",
]
B, L, H, P, N = 2, 9, 3, 4, 2
D = H * P


def heads(kind: str, dtype: torch.dtype) -> HeadOperator:
    """A token mixer with H heads of P channels."""
    a, b, c, recall, erase = torch.rand(5, B, L, H, N, dtype=dtype) - 0.3
    if kind == "delta rule":
        return DeltaScan(a, b, c, recall / 2, erase / 2, head_size=P)
    if "attention" in kind:
        weights = torch.rand(B, H, L, L, dtype=dtype)
        return Attention(weights.tril() if kind == "causal attention" else weights, head_size=P)
    if kind == "scan of one decay":
        a, b = a[..., :1], Product((recall[..., :1], b[:, :, :1]))
    scan = Scan(a, b, c, head_size=P, lag=int(kind == "lagged scan"))
    skip, bonus = torch.randn(D, dtype=dtype), torch.randn(B, L, D, dtype=dtype)
    return replace(scan, skip=skip, bonus=bonus) if "direct" in kind else scan


def core_of(kind: str, taps: tuple[int, ...], dtype: torch.dtype = torch.float64) -> Chain:
    """Gates around a token mixer, behind convolutions with these numbers of taps."""
    gate, act = torch.randn(2, B, L, D, dtype=dtype)
    convolutions = {f"conv{number}": CausalConv(torch.randn(D, K, dtype=dtype)) for number, K in enumerate(taps)}
    return Chain({"gate": Diagonal(gate), "mix": heads(kind, dtype), "act": Diagonal(act), **convolutions})


def weights(padding: bool, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    """Output-side and input-side weights (B, L, D), 0 at two tokens of the second example if there is padding."""
    u, v = torch.randn(2, B, L, D, dtype=dtype)
    if padding:
        u[1, :2] = v[1, :2] = 0
    return u, v


def check(core: Operator, u: Tensor, v: Tensor, entrywise: Entrywise) -> None:
    """The fused matrix is the sum of the function of every channel's entries."""
    entries = torch.einsum("bid,bdij,bjd->bdij", u, channel_matrices(core, v), v)
    expected = entrywise(entries).sum(1)
    error = (CoreMatrix(core, u, v).dense(entrywise) - expected).abs().max()
    assert error <= TOLERANCE[u.dtype] * entrywise(entries).abs().sum(1).max()


@pytest.mark.parametrize("entrywise", [IDENTITY, ABSOLUTE, POSITIVE, SQUARE, Entrywise(1.0, 0.5, 0.25)])
@pytest.mark.parametrize("taps", [(), (1,), (2,), (3,), (4,), (3, 2), (12,)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_channels_of_a_head_together_are_its_channels_one_by_one(
    kind: str, taps: tuple[int, ...], entrywise: Entrywise
) -> None:
    torch.manual_seed(len(kind) + sum(taps))
    core, (u, v) = core_of(kind, taps), weights(padding=bool(len(taps)))
    assert SharedHeads.of(core, v) is not None
    check(core, u, v, entrywise)
    check(core.flipped(), u, v, entrywise)


@pytest.mark.parametrize("lag", [0, 1])
@pytest.mark.parametrize(
    ("of_b", "of_c"),
    [
        ([(B, L, H, N)], [(B, L, H, N)]),
        ([(B, L, H, 1), (1, L, 1, N)], [(B, L, 1, N)]),
        ([(B, L, 1, 1)], [(1, 1, H, N), (B, L, 1, 1)]),
        ([(1, 1, 1, N)], [(1, 1, H, 1)]),
    ],
)
def test_one_decay_of_all_states_is_taken_apart_from_keys_and_queries(
    of_b: list[tuple[int, ...]], of_c: list[tuple[int, ...]], lag: int
) -> None:
    """Whichever axes the coefficients share, and whether or not they are exponentials."""
    torch.manual_seed(8)
    like = torch.zeros(B, L, D, dtype=torch.float64)
    for exponential in (False, True):
        b, c = (Product(tuple(torch.randn(s, dtype=torch.float64) for s in of), exponential) for of in (of_b, of_c))
        scan = Scan(torch.randn(1, L, H, 1, dtype=torch.float64), b, c, head_size=P, lag=lag)
        expected = channel_matrices(scan, like)[:, ::P]
        assert torch.allclose(scan.matrices(like), expected, rtol=0, atol=1e-12 * float(expected.abs().max()))


def check_lengths(core: Operator, v: Tensor) -> None:
    """The lengths are those of the vectors that the channels' entries make, scaled by token and projected."""
    scale, W = torch.randn(B, L, 1, dtype=v.dtype), torch.randn(5, D, dtype=v.dtype)
    output = Chain({"scale": Diagonal(scale.expand(-1, -1, 5)), "out": Projection(W)})
    vectors = torch.einsum("bio,od,bdij,bjd->bijo", scale.expand(-1, -1, 5), W, channel_matrices(core, v), v)
    expected = vectors.norm(dim=-1)
    error = (CoreMatrix(core, v, v).lengths(output) - expected).abs().max()
    assert error <= TOLERANCE[v.dtype] * expected.max()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("taps", [(), (2,), (4,), (3, 2), (12,)])
@pytest.mark.parametrize("kind", KINDS)
def test_the_lengths_of_heads_are_those_of_their_channels_vectors(
    kind: str, taps: tuple[int, ...], dtype: torch.dtype
) -> None:
    torch.manual_seed(len(kind) + sum(taps))
    core, (_, v) = core_of(kind, taps, dtype), weights(padding=bool(len(taps)), dtype=dtype)
    check_lengths(core, v)
    check_lengths(core.flipped(), v)


@pytest.mark.parametrize("entrywise", [ABSOLUTE, POSITIVE, SQUARE])
@pytest.mark.parametrize("kind", KINDS)
def test_single_precision_is_as_exact(kind: str, entrywise: Entrywise) -> None:
    torch.manual_seed(3)
    check(core_of(kind, (4,), torch.float32), *weights(False, torch.float32), entrywise)


@pytest.mark.parametrize("entrywise", [IDENTITY, ABSOLUTE, SQUARE])
def test_several_queries_share_the_heads(entrywise: Entrywise, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(4)
    core, (_, v) = core_of("scan with direct paths", (3,)), weights(padding=True)
    queries = torch.randn(5, B, L, D, dtype=torch.float64)
    alone = torch.stack([CoreMatrix(core, u, v).dense(entrywise) for u in queries])
    matrices, calls = HeadOperator.matrices, []

    def counted(heads: HeadOperator, like: Tensor) -> Tensor:
        calls.append(heads)
        return matrices(heads, like)

    monkeypatch.setattr(HeadOperator, "matrices", counted)
    assert torch.allclose(CoreMatrix(core, queries, v).dense(entrywise), alone, rtol=0, atol=1e-12)
    assert len(calls) == 1


@pytest.mark.parametrize("entrywise", [IDENTITY, ABSOLUTE, SQUARE])
def test_a_projection_before_the_heads_leaves_their_matrices_shared(entrywise: Entrywise) -> None:
    """As in RWKV, between the token shift and the recurrence."""
    torch.manual_seed(5)
    shift, W = CausalConv(torch.randn(6, 2, dtype=torch.float64)), torch.randn(D, 6, dtype=torch.float64)
    scan = heads("scan with direct paths", torch.float64)
    core = Chain({"scan": scan, "value": Projection(W), "shift": shift})
    u, v = torch.randn(B, L, D, dtype=torch.float64), torch.randn(B, L, 6, dtype=torch.float64)
    assert SharedHeads.of(core, v) is not None
    alpha = channel_matrices(scan, u)  # (B, D, L, L)
    contributions = torch.einsum("bdit,de,etj,bje->bdij", alpha, W, oracles.conv_matrix(shift.w, L), v)
    expected = entrywise(u.transpose(1, 2).unsqueeze(-1) * contributions).sum(1)
    assert torch.allclose(CoreMatrix(core, u, v).dense(entrywise), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("size", [1, 2**5, 2**10])
def test_how_the_work_is_cut_never_changes_the_result(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(6)
    monkeypatch.setattr(module, "_BLOCK", DeviceSize(size, size))
    monkeypatch.setattr(module, "_MATRICES", DeviceSize(size, size))
    monkeypatch.setattr(module, "_HEADS", DeviceSize(size, size))
    monkeypatch.setattr(lengths, "_VECTORS_AT_ONCE", DeviceSize(size, size))
    for kind in KINDS:
        check(core_of(kind, (4,)), *weights(padding=True), ABSOLUTE)
        check_lengths(core_of(kind, (4,)), weights(padding=True)[1])


@pytest.mark.parametrize("bound", [L * P, 2 * L * P, H * L * L * P])
def test_absolute_values_are_taken_in_blocks_that_fit_the_cache(bound: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many examples, heads, rows and channels there are."""
    torch.manual_seed(7)
    S, V, U = torch.rand(2, B, H, L, L), torch.rand(2, B, H, L, P), torch.rand(1, B, H, L, P)
    monkeypatch.setattr(module, "_BLOCK", DeviceSize(bound, bound))
    of_block, entries = module._absolute, []

    def recorded(S: Tensor, V: Tensor, U: Tensor) -> Tensor:
        entries.append(S[0].numel() * V.shape[-1])
        return of_block(S, V, U)

    monkeypatch.setattr(module, "_absolute", recorded)
    module.Terms(S, V, U).absolute()
    assert max(entries) <= bound
    assert sum(entries) == B * H * L * L * P


@pytest.mark.parametrize(
    "other",
    [
        {"back": CausalConv(torch.ones(D, 2))},
        {"out": Projection(torch.ones(D, D))},
        {"again": Scan(*torch.rand(3, 1, L, H, N), head_size=P)},
    ],
)
def test_a_core_of_another_form_is_no_core_of_shared_heads(other: dict[str, Operator]) -> None:
    core = core_of("scan", (2,), torch.float32)
    assert SharedHeads.of(Chain({**other, **core.factors}), torch.ones(B, L, D)) is None


def test_a_recurrence_of_single_channels_is_walked_row_by_row() -> None:
    assert SharedHeads.of(Scan(*torch.rand(3, 1, L, D, N)), torch.ones(B, L, D)) is None
