"""Complex diagonal recurrences as real scans: against the recurrence in complex numbers, and S4D written out."""

import math
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_ssm import ImplicitAttentionRelevance, ImplicitAttentionRollout, UnsupportedModelError, register, unregister
from captum_ssm.layers.complex_states import complex_states
from captum_ssm.layers.fidelity import relative_error
from captum_ssm.layers.mixers import find_adapter
from captum_ssm.matrices.core_matrix import channel_matrices
from captum_ssm.operators import Chain
from captum_ssm.testing import check_adapter
from tests.families import perturbed

E, N = 5, 3


def drawn(*shape: int) -> Tensor:
    return torch.randn(shape, dtype=torch.cdouble)


@pytest.mark.parametrize("L", [1, 7, 2000])
def test_the_chain_is_the_recurrence_in_complex_numbers(L: int) -> None:
    """Also after many turns: the angles of late tokens are as exact as those of early ones."""
    decay = torch.polar(torch.tensor([0.9, 0.99, 0.9999]).double(), torch.tensor([3.0, -1.3, 0.7]).double())
    B, C, skip, x = drawn(N, E), drawn(E, N), torch.randn(E).double(), torch.randn(2, L, E).double()
    chain = complex_states(decay, B, C, skip, x)
    h, y = torch.zeros(2, N, dtype=torch.cdouble), torch.zeros_like(x)
    for t in range(L):
        h = decay * h + x[:, t].to(B) @ B.T
        y[:, t] = (h @ C.T).real + skip * x[:, t]
    assert relative_error(chain.apply(x), y) <= 1e-11
    assert relative_error(chain.without("skip").apply(x), y - skip * x) <= 1e-11
    u = torch.randn_like(y)
    assert relative_error((u * y).sum(), (chain.adjoint(u) * x).sum()) <= 1e-9
    assert list(chain.factors) == ["out", "scan", "in"] and chain.factors["scan"].sizes == (4 * N + E,) * 2


class Kernel(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.C, self.log_dt = nn.Parameter(torch.randn(E, N, 2)), nn.Parameter(torch.randn(E) - 1)
        self.log_A_real, self.A_imag = nn.Parameter(torch.randn(E, N)), nn.Parameter(math.pi * torch.randn(E, N))


class S4D(nn.Module):
    """S4D as in state-spaces/s4, its convolution written out token by token."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.D, self.kernel, self.transposed = nn.Parameter(torch.randn(E)), Kernel(), transposed
        self.output_linear = nn.Sequential(nn.Conv1d(E, 2 * E, 1), nn.GLU(dim=-2))

    def taps(self, L: int) -> Tensor:
        k = self.kernel
        A = torch.complex(-k.log_A_real.exp(), k.A_imag)
        step = A * k.log_dt.exp().unsqueeze(-1)
        C = torch.view_as_complex(k.C) * (step.exp() - 1) / A
        return torch.stack([2 * (C * torch.exp(step * t)).sum(-1).real for t in range(L)])  # (L, E)

    def forward(self, x: Tensor) -> tuple[Tensor, None]:
        taps, L = self.taps(x.shape[1]), x.shape[1]
        y = torch.stack([sum((taps[t - s] * x[:, s] for s in range(t + 1)), self.D * x[:, t]) for t in range(L)], 1)
        return self.output_linear(F.gelu(y).mT).mT, None


def test_s4d_is_its_convolution_written_out() -> None:
    layer, L = perturbed(S4D().double(), std=0.1), 9
    x = torch.randn(2, L, E).double()
    report = check_adapter(layer, x, tolerance=1e-11)
    assert report.factors == ("gate", "out", "act", "scan")
    adapter = find_adapter(layer)
    assert adapter is not None
    core = Chain({"scan": adapter(layer, x, {}).factors["scan"]})
    matrices, taps = channel_matrices(core, x), layer.taps(L)
    for i in range(L):
        for j in range(i + 1):
            assert torch.allclose(matrices[:, :, i, j], (taps[i - j] + (layer.D if i == j else 0)).expand(2, -1))


def test_a_model_of_s4d_is_explained() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers, self.head = nn.ModuleList([S4D(), S4D()]), nn.Linear(E, 2)

        def forward(self, x: Tensor) -> Tensor:
            for layer in self.layers:
                x = x + layer(x)[0]
            return self.head(x[:, -1])

    model, x, other = perturbed(Model(), std=0.1), torch.randn(2, 8, E), torch.randn(2, 8, E)
    assert ImplicitAttentionRollout(model).attribute(x).any()
    method = ImplicitAttentionRelevance(model)
    relevance = method.attribute(x, 1, baselines=other)
    assert set(method.followed.values()) == {"decomposition"}
    difference = (model(x) - model(other))[:, 1].detach()
    torch.testing.assert_close(relevance.flatten(1).sum(1), difference, atol=1e-5, rtol=1e-5)


def test_a_layer_that_reads_tokens_last_is_refused() -> None:
    layer = S4D(transposed=True).eval()
    adapter = find_adapter(layer)
    assert adapter is not None
    with pytest.raises(UnsupportedModelError, match=r"transposed=False.*captum_ssm.register"):
        adapter(layer, torch.randn(2, 8, E), {})


class Constant(nn.Module):
    """A recurrence with the same coefficients for all inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.decay = nn.Parameter(torch.tensor([0.9, 0.5, 0.2]))

    def forward(self, x: Tensor) -> Tensor:
        return complex_of(self, x, {}).apply(x)


def complex_of(layer: Any, x: Tensor, kwargs: Any) -> Chain:
    decay = torch.polar(layer.decay.detach(), torch.arange(3.0))
    square = torch.ones(E, N).to(decay)
    return complex_states(decay, square.T, square, torch.ones(E), x)


def test_a_layer_without_gates_passes_the_conformance_suite() -> None:
    register(Constant)(complex_of)
    try:
        assert check_adapter(Constant().eval(), torch.randn(2, 6, E)).fidelity <= 1e-6
    finally:
        unregister(Constant)
