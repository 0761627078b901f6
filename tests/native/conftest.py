"""What the tests of the native packages share. Run by ``make test-native``, in an environment that has them."""

from importlib.util import find_spec

import pytest
import torch

collect_ignore_glob = [
    pattern
    for package, pattern in (
        ("mamba_ssm", "test_mamba_ssm*"),
        ("mamba_ssm", "test_transformers*"),
        ("fla", "test_fla*"),
    )
    if find_spec(package) is None
]


@pytest.fixture(
    params=[
        "cpu",
        pytest.param(
            "cuda",
            marks=[pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")],
        ),
    ]
)
def device(request: pytest.FixtureRequest) -> str:
    """Where a layer runs: on the package's references, and with a GPU on its kernels too."""
    return request.param
