"""The lengths of what an output side makes of vectors are those of its own outputs, however they are computed."""

from __future__ import annotations

import pytest
import torch

from captum_ssm.matrices import lengths as module
from captum_ssm.matrices.lengths import OutputLengths
from captum_ssm.operators import Centre, Chain, Diagonal, Operator, Projection

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
    monkeypatch.setattr(module, "_COLUMNS", 1)
    of_output = OutputLengths.of(Chain({"out": Projection(weights("wide"))}), MANY)
    assert of_output.triangular is not None
    zeros = torch.ones_like(of_output.triangular).tril(-1).bool()
    unread = OutputLengths(of_output.output, of_output.triangular.masked_fill(zeros, torch.nan))
    x = torch.randn(1, L, 150, dtype=torch.float64)
    assert torch.equal(unread.from_token(0, x), of_output.from_token(0, x))
