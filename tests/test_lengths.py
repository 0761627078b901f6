"""The lengths of what an output side makes of vectors are those of its own outputs, however they are computed."""

from __future__ import annotations

import pytest
import torch

from captum_ssm.matrices import lengths as module
from captum_ssm.matrices.core_matrix import CoreMatrix, channel_matrices
from captum_ssm.matrices.lengths import OutputLengths
from captum_ssm.matrices.single_channels import SingleChannels
from captum_ssm.operators import CausalConv, Centre, Chain, Diagonal, Operator, Projection, Scan
from captum_ssm.operators.device_sizes import DeviceSize

L, MANY, FEW = 5, 10**6, 10
SHAPES = {"square": (150, 150), "wide": (70, 150), "tall": (150, 70), "small": (3, 8)}


def weights(shape: str, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    """A weight of an output side, from channels to the model's width."""
    return torch.randn(*SHAPES[shape], dtype=dtype)


def error(output: Operator, of_output: OutputLengths, x: torch.Tensor, start: int = 0) -> float:
    """The largest error of lengths, as a share of the largest length."""
    whole = torch.cat([torch.zeros_like(x[..., :1, :])] * start + [x], dim=-2)  # (..., L, channels)
    expected = output.apply(whole).norm(dim=-1)[..., start:]
    return float((of_output.from_token(start, x) - expected).abs().max() / expected.max())


@pytest.mark.parametrize("rank", [None, 2])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-6)])
def test_lengths_behind_a_triangular_factor_are_those_of_the_outputs(
    shape: str, rank: int | None, dtype: torch.dtype, tolerance: float
) -> None:
    torch.manual_seed(len(shape))
    W = weights(shape, dtype)
    if rank:
        W = W[:, :rank] @ W[:rank]
    scale = torch.randn(1, L, W.shape[1], dtype=dtype)
    output = Chain({"out": Projection(W, torch.ones(len(W), dtype=dtype)), "gate": Diagonal(scale)})
    of_output = OutputLengths.of(output, MANY)
    assert of_output.triangular is not None and torch.equal(of_output.triangular, of_output.triangular.triu())
    assert error(output, of_output, torch.randn(4, 2, L, W.shape[1], dtype=dtype)) <= tolerance
    assert error(output, of_output, torch.randn(4, 2, L - 2, W.shape[1], dtype=dtype), start=2) <= tolerance


def test_other_output_sides_and_few_vectors_are_multiplied_as_they_are() -> None:
    W = weights("square")
    gated = Chain({"gate": Diagonal(torch.randn(1, L, 150, dtype=W.dtype)), "out": Projection(W)})
    centred = Chain({"centre": Centre(50), "out": Projection(W)})
    x = torch.randn(3, 2, L, 150, dtype=W.dtype)
    for output, vectors in ((gated, MANY), (centred, MANY), (Chain({}), MANY), (Chain({"out": Projection(W)}), FEW)):
        of_output = OutputLengths.of(output, vectors)
        assert of_output.triangular is None
        assert error(output, of_output, x) <= 1e-12


def test_half_precision_has_the_lengths_of_its_weights() -> None:
    W = weights("wide", torch.bfloat16)
    x = torch.randn(3, 2, L, 150, dtype=torch.bfloat16)
    found = OutputLengths.of(Chain({"out": Projection(W)}), MANY).from_token(0, x)
    exact = Projection(W.double()).apply(x.double()).norm(dim=-1)
    assert found.dtype == torch.bfloat16 and torch.allclose(found.double(), exact, rtol=2**-8)


def test_the_products_with_zeros_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "_COLUMNS", DeviceSize(1, 1))
    of_output = OutputLengths.of(Chain({"out": Projection(weights("wide"))}), MANY)
    assert of_output.triangular is not None
    zeros = torch.ones_like(of_output.triangular).tril(-1).bool()
    unread = OutputLengths(of_output.output, of_output.triangular.masked_fill(zeros, torch.nan))
    x = torch.randn(1, L, 150, dtype=torch.float64)
    assert torch.equal(unread.from_token(0, x), of_output.from_token(0, x))


@pytest.mark.parametrize("size", [1, 64, 2**11])
@pytest.mark.parametrize("taps", [(), (2,), (4,), (3, 2), (30,)])
@pytest.mark.parametrize("lag", [0, 1])
def test_the_lengths_of_single_channels_are_those_of_their_channels_vectors(
    lag: int, taps: tuple[int, ...], size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(sum(taps) + lag)
    monkeypatch.setattr(module, "_VECTORS_AT_ONCE", DeviceSize(size, size))
    B, T, D, N = 2, 21, 6, 3
    a, b, c = torch.rand(3, B, T, D, N, dtype=torch.float64) - 0.3
    gate, act, bonus, v = torch.randn(4, B, T, D, dtype=torch.float64)
    scan = Scan(a, b, c, lag=lag, skip=torch.randn(D, dtype=torch.float64), bonus=bonus)
    convolutions = {f"conv{n}": CausalConv(torch.randn(D, K, dtype=torch.float64)) for n, K in enumerate(taps)}
    core = Chain({"gate": Diagonal(gate), "scan": scan, "act": Diagonal(act), **convolutions})
    W, scale = torch.randn(5, D, dtype=torch.float64), torch.randn(B, T, 5, dtype=torch.float64)
    contributions = torch.einsum("bdij,bjd->bijd", channel_matrices(core, v), v)
    alike = Chain({"out": Projection(W), "centre": Centre(3)})
    form = SingleChannels.of(core, v)
    assert form is not None
    found = form.lengths(alike)
    assert torch.equal(CoreMatrix(core, v, v).lengths(alike), found)
    assert torch.allclose(found, alike.apply(contributions).norm(dim=-1), rtol=0, atol=1e-12)
    scaled = Chain({"scale": Diagonal(scale), "out": Projection(W)})  # not alike for all tokens
    expected = (scale.unsqueeze(2) * (contributions @ W.T)).norm(dim=-1)
    assert torch.allclose(CoreMatrix(core, v, v).lengths(scaled), expected, rtol=0, atol=1e-12)
