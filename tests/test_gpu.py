"""Explanations on a GPU are those on a processor, and no tensor is made where no other is."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.families import VOCABULARY
from tests.test_memory import METHODS, L, model_of

NAMES = ["mamba", "mamba2", "qwen3_5", "kimi_linear", "lfm2"]
ON_GPU = ["mamba", "mamba2", "qwen3_5", "lfm2", "rwkv", "recurrent_gemma", "xlstm"]
"""Models without experts, whose product of groups of matrices takes no float64."""


def text_of(method: str) -> Tensor:
    """Two texts, or one for a method that takes no more."""
    texts = torch.randint(3, VOCABULARY, (2, L), generator=torch.Generator().manual_seed(0))
    return texts[:1] if method == "generation" else texts


@pytest.mark.parametrize("name", NAMES)
def test_tensors_are_made_where_the_inputs_are(name: str) -> None:
    """With another default device, a tensor that is made without one fails to meet those of the model."""
    model: Any = model_of(name)
    for method, explain in METHODS.items():
        text = text_of(method)
        expected = explain(model, text)
        with torch.device("meta"):
            found = explain(model, text)
        assert torch.equal(found, expected), method


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("name", ON_GPU)
def test_scores_on_a_gpu_are_those_on_a_processor(name: str) -> None:
    model: Any = copy.deepcopy(model_of(name)).double()
    expected = {method: explain(model, text_of(method)) for method, explain in METHODS.items()}
    model.cuda()
    for method, explain in METHODS.items():
        found, scores = explain(model, text_of(method).cuda()), expected[method]
        assert found.is_cuda
        assert torch.allclose(found.cpu(), scores, rtol=0, atol=1e-9 * float(scores.abs().max())), method
