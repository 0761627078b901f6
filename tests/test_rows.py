"""Some rows of a fused matrix: those of the whole matrix, in the time of as many products."""

from __future__ import annotations

import pytest
import torch

from captum_ssm import ImplicitAttentionAttribution, ImplicitAttentionRollout, RawImplicitAttention
from captum_ssm.matrices import core_matrix
from captum_ssm.matrices.core_matrix import CoreMatrix, FusedMatrix
from captum_ssm.matrices.entrywise import ABSOLUTE, IDENTITY, POSITIVE, SQUARE, Entrywise
from captum_ssm.matrices.token_matrix import DenseMatrix, MatrixProduct, MatrixSum, RearrangedMatrix, ScaledMatrix
from captum_ssm.operators import CausalConv, Chain, Diagonal, Scan, Sum
from tests.tensors_made import Entries

B, L, D = 2, 24, 4


def scan(P: int) -> Scan:
    a, b, c = torch.rand(3, B, L, D // P, 2, dtype=torch.float64)
    return Scan(a, b - 0.5, c - 0.5, skip=torch.randn(D, dtype=torch.float64), head_size=P)


def cores() -> dict[str, Chain]:
    gate, conv = Diagonal(torch.randn(B, L, D, dtype=torch.float64)), CausalConv(torch.randn(D, 3, dtype=torch.float64))
    return {
        "channels": Chain({"gate": gate, "scan": scan(1), "conv": conv}),
        "heads": Chain({"gate": gate, "scan": scan(2), "conv": conv}),
        "two directions": Chain({"gate": gate, "both": Sum({"on": scan(1), "back": scan(1).flipped()})}),
    }


@pytest.mark.parametrize("f", [IDENTITY, ABSOLUTE, POSITIVE, SQUARE, Entrywise(1.0, 0.5, 0.25)])
@pytest.mark.parametrize("name", ["channels", "heads", "two directions"])
@pytest.mark.parametrize("queries", [(), (3,)])
def test_a_few_rows_are_those_of_the_whole_matrix(
    queries: tuple[int, ...], name: str, f: Entrywise, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch.manual_seed(0)
    core, v = cores()[name], torch.randn(B, L, D, dtype=torch.float64)
    u = torch.randn(*queries, B, L, D, dtype=torch.float64)
    rows = torch.zeros(B, L, dtype=torch.bool)
    rows[0, -1] = rows[1, 7] = True
    few = FusedMatrix(CoreMatrix(core, u, v), f).on_rows(rows).dense()
    monkeypatch.setattr(core_matrix, "_FEW_ROWS", -1)
    whole = FusedMatrix(CoreMatrix(core, u, v), f).dense()
    assert few[..., ~rows, :].eq(0).all() and whole[..., ~rows, :].ne(0).any()
    torch.testing.assert_close(few, whole * rows.unsqueeze(-1), rtol=1e-12, atol=1e-12)


def test_rows_of_matrices_made_of_matrices_are_those_of_the_whole() -> None:
    torch.manual_seed(0)
    first, second = (DenseMatrix(torch.rand(B, L, L, dtype=torch.float64)) for _ in range(2))
    u, v = torch.rand(2, B, L, D, dtype=torch.float64)
    order = torch.stack([torch.randperm(L) for _ in range(B)])
    fused = FusedMatrix(CoreMatrix(cores()["channels"], u, v), SQUARE, torch.sqrt)
    rows = torch.rand(B, L) < 0.1
    for matrix in (
        fused, first, CoreMatrix(cores()["heads"], u, v), MatrixProduct((fused, second)), MatrixSum((first, fused)),
        RearrangedMatrix(fused, order), ScaledMatrix(fused, torch.rand(B, L, dtype=torch.float64)),
    ):  # fmt: skip
        on_rows, r = matrix.on_rows(rows), torch.rand(B, L, dtype=torch.float64) * rows
        torch.testing.assert_close(on_rows.dense()[rows], matrix.dense()[rows], rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(on_rows.adjoint(r), matrix.adjoint(r), rtol=1e-12, atol=1e-12)
        one = torch.ones(B, L, dtype=torch.float64)
        torch.testing.assert_close(on_rows.apply(one)[rows], matrix.apply(one)[rows], rtol=1e-12, atol=1e-12)


METHODS = {
    "raw": lambda model: RawImplicitAttention(model, layers=2),
    "rollout": lambda model: ImplicitAttentionRollout(model),
    "channel": lambda model: ImplicitAttentionAttribution(model),
}


@pytest.mark.parametrize(("method", "layers"), [("raw", 2), ("rollout", 1), ("channel", 1)])
def test_the_explained_row_of_a_layer_takes_linear_time(method: str, layers: int) -> None:
    from transformers import MambaConfig, MambaForCausalLM

    torch.manual_seed(0)
    config = MambaConfig(vocab_size=20, hidden_size=16, state_size=8, num_hidden_layers=layers)
    explain, written = METHODS[method](MambaForCausalLM(config).eval()), []
    for length in (256, 512):
        ids = torch.randint(20, (1, length))
        explain.attribute(ids, target=3)  # the model is examined
        with Entries() as entries:
            explain.attribute(ids, target=3)
        written.append(entries.count)
    assert written[1] / written[0] < 2.1
