"""The layers of other packages: the laws of an adapter, the matrices written out, and what is refused."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_ssm import ModelStateError, UnsupportedModelError
from captum_ssm.layers.fidelity import relative_error
from captum_ssm.layers.mixers import find_adapter
from captum_ssm.matrices.core_matrix import channel_matrices
from captum_ssm.operators import Chain
from captum_ssm.testing import check_adapter
from tests.packages.layers import LAYERS, L, mamba_block, retention, s5, width

every_layer = pytest.mark.parametrize("name", LAYERS)


def inputs(layer: nn.Module) -> Tensor:
    return torch.randn(2, L, width(layer), generator=torch.Generator().manual_seed(1))


def decomposed(layer: nn.Module, x: Tensor, arguments: dict[str, Any]) -> Chain:
    adapter = find_adapter(layer)
    assert adapter is not None
    return adapter(layer, x, arguments)


@every_layer
def test_a_layer_is_decomposed_exactly(name: str) -> None:
    record = LAYERS[name]
    layer = record.build()
    report = check_adapter(layer, inputs(layer), record.arguments(2), causal=record.causal)
    assert report.fidelity <= 1e-5
    assert " ".join(report.factors) == record.factors


@every_layer
def test_the_decomposition_is_the_layer_written_out(name: str) -> None:
    """The scan's matrices, those of the first direction where there are two, and the output."""
    record = LAYERS[name]
    layer = record.build()
    x = inputs(layer).double()
    chain = decomposed(layer, x, record.arguments(2))
    written = [record.oracle(layer, row) for row in x]
    tolerance = 1e-6 if name.startswith(("s5", "torchscale")) else 1e-12  # whose code computes these in float32
    assert relative_error(chain.apply(x, bias=True), torch.stack([y for _, y in written])) <= tolerance
    first = next(iter(chain.summands().values()))
    _, core, _ = first.split(first.mixers[0])
    alpha = torch.stack([alpha for alpha, _ in written])
    matrices = channel_matrices(core, torch.zeros(*x.shape[:2], alpha.shape[1]).to(x))
    assert relative_error(matrices, alpha) <= tolerance


@pytest.mark.parametrize("name", [name for name in LAYERS if "minGRU_pytorch" in name])
def test_a_layer_that_starts_from_a_state_is_refused(name: str) -> None:
    layer = LAYERS[name].build()
    with pytest.raises(ModelStateError, match=r"'prev_hidden'.*in one call"):
        decomposed(layer, inputs(layer), {"prev_hidden": torch.ones(2, 1, 24)})
    assert decomposed(layer, inputs(layer), {"prev_hidden": None, "return_next_prev_hidden": True})


@pytest.mark.parametrize("name", [name for name in LAYERS if "recurrentgemma" in name])
def test_a_row_of_several_sequences_is_refused(name: str) -> None:
    layer = LAYERS[name].build()
    starts = torch.tensor([0, 1, 2, 0, 1, 2, 3, 4]).expand(2, -1)
    with pytest.raises(UnsupportedModelError, match=r"'segment_pos'.*packed into one"):
        decomposed(layer, inputs(layer), {"segment_pos": starts})
    with pytest.raises(ModelStateError, match="'cache'"):
        decomposed(layer, inputs(layer), {"segment_pos": starts, "cache": ()})


def test_the_other_forms_of_s5_are_refused() -> None:
    layer, liquid = s5().eval(), s5(liquid=True).eval()
    with pytest.raises(UnsupportedModelError, match=r"liquid.*captum_ssm.register"):
        decomposed(liquid, inputs(liquid), {})
    with pytest.raises(UnsupportedModelError, match="a step for each"):
        decomposed(layer, inputs(layer), {"step_scale": torch.ones(2, L)})
    with pytest.raises(ModelStateError, match="'state'"):
        decomposed(layer, inputs(layer), {"state": torch.ones(2, 8)})
    x = inputs(layer)
    assert relative_error(decomposed(layer, x, {"step_scale": 0.5}).apply(x), layer(x, step_scale=0.5)) <= 1e-5


def test_the_other_forms_of_retention_are_refused() -> None:
    layer = retention().eval()
    with pytest.raises(UnsupportedModelError, match="chunkwise_recurrent=False"):
        decomposed(layer, inputs(layer), {"chunkwise_recurrent": True})
    with pytest.raises(ModelStateError, match="'incremental_state'"):
        decomposed(layer, inputs(layer), {"incremental_state": {}})


def test_another_librarys_layer_of_the_name_is_no_mixer() -> None:
    """Names such as ``S5`` or ``MambaBlock`` are common; the packages stand in front of them."""
    assert find_adapter(mamba_block()) is not None
    for name in ("MambaBlock", "minGRU", "S5", "mLSTMLayer"):
        assert find_adapter(type(name, (nn.Linear,), {})(2, 2)) is None
