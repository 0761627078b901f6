"""transformers takes up mamba_ssm, causal_conv1d and flash-linear-attention where it finds them: nothing changes."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from captum_ssm import ModelStateError
from tests.native import explain_transformers, mamba_ssm_cpu

mamba_ssm_cpu.enable()

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Tensor, Tensor]]:
    """What comes out of a process that has none of the packages."""
    file = tmp_path_factory.mktemp("alone") / "explained.pt"
    subprocess.run([sys.executable, "-m", explain_transformers.__name__, str(file)], check=True, cwd=ROOT)
    return torch.load(file)


def assert_same(results: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor]) -> None:
    for result, wanted in zip(results, expected):
        torch.testing.assert_close(result, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", explain_transformers.NAMES)
def test_on_reference_kernels_the_results_are_the_same(name: str, alone: dict[str, tuple[Tensor, Tensor]]) -> None:
    assert_same(explain_transformers.explained(name, reference=True), alone[name])


@pytest.mark.parametrize("name", explain_transformers.NAMES)
def test_on_the_installed_kernels_they_are_the_same_or_the_remedy_is_named(
    name: str, alone: dict[str, tuple[Tensor, Tensor]]
) -> None:
    try:
        results = explain_transformers.explained(name, reference=False)
    except ModelStateError as error:
        assert "reference_kernels" in str(error)
    else:
        assert_same(results, alone[name])
