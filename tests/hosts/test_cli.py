"""The command line explains adapters and quantised models from a folder."""

import json
import re
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers as hf

from captum_ssm import ImplicitAttentionRelevance
from captum_ssm.cli.loading import Placement, load
from captum_ssm.models import REVIEWS
from tests.test_cli import GOOD, assert_refused, run

__all__ = ["run"]  # the fixture


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """An adapter of the shipped model whose matrices are not zero, at a part that every method reads as it is."""
    model = hf.AutoModelForCausalLM.from_pretrained(REVIEWS)
    config = peft.IA3Config(task_type="CAUSAL_LM", target_modules=["out_proj"], feedforward_modules=[])
    host = peft.get_peft_model(model, config)
    torch.manual_seed(0)
    for name, weight in host.named_parameters():
        if "ia3" in name:
            torch.nn.init.uniform_(weight, 0.5, 1.5)
    host.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_an_adapter_is_loaded_on_its_model(adapter: Path, run: Any) -> None:
    model, tokenizer = load(str(adapter), Placement())
    ids = tokenizer(GOOD, return_tensors="pt").input_ids
    merged = peft.PeftModel.from_pretrained(
        hf.AutoModelForCausalLM.from_pretrained(REVIEWS), adapter
    ).merge_and_unload()
    with torch.no_grad():
        torch.testing.assert_close(model(ids).logits, merged.eval()(ids).logits, rtol=1e-4, atol=1e-4)
        plain = hf.AutoModelForCausalLM.from_pretrained(REVIEWS).eval()(ids).logits
    assert (model(ids).logits - plain).abs().max() > 0.1
    shown = run(GOOD, "--model", adapter)
    assert shown.status == 0 and shown.fact("model") == f"{adapter}, MambaForCausalLM"
    best = float(merged(ids).logits[0, -1].softmax(-1).max())
    assert shown.fact("prediction").split()[1].rstrip(",") == f"{best:.1%}"
    assert run(GOOD, "--model", adapter, "--generate", 2, "--method", "relevance").status == 0


def test_an_adapter_whose_model_is_nowhere_is_refused(adapter: Path, run: Any) -> None:
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(
        json.dumps({**config, "base_model_name_or_path": str(adapter / "none")})
    )
    assert_refused(run(GOOD, "--model", adapter), "cannot load a model from .*none")


@pytest.mark.parametrize("fault", ["no weights", "broken weights", "weights of other parts", "unknown kind"])
def test_an_adapter_that_does_not_fit_is_refused_by_name(fault: str, adapter: Path, run: Any) -> None:
    weights, file = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    config = json.loads(file.read_text())
    if fault == "no weights":
        weights.unlink()
    elif fault == "broken weights":
        weights.write_bytes(b"x" * 40)
    elif fault == "weights of other parts":
        file.write_text(json.dumps({**config, "target_modules": ["x_proj"]}))
    else:
        file.write_text(json.dumps({**config, "peft_type": "NONE_SUCH"}))
    assert_refused(run(GOOD, "--model", adapter), "cannot load the adapter in .*is it complete, and that model's")


def test_a_model_that_cannot_run_where_it_is_spread_is_refused(run: Any) -> None:
    device_map = '{"backbone": "cpu", "lm_head": "disk"}'  # a tied weight, which accelerate does not find on disk
    assert_refused(run(GOOD, "--device-map", device_map), "cannot run on devices .*--device-map")


@pytest.fixture
def wide(tmp_path: Path) -> Path:
    """A model of widths that bitsandbytes has 4-bit kernels for on a CPU: blocks of 64 inputs and 32 outputs."""
    options = {"hidden_size": 64, "num_hidden_layers": 1, "state_size": 16, "vocab_size": 10000, "time_step_rank": 64}
    torch.manual_seed(0)
    hf.MambaForCausalLM(hf.MambaConfig(**options)).save_pretrained(tmp_path / "wide")
    hf.AutoTokenizer.from_pretrained(REVIEWS).save_pretrained(tmp_path / "wide")
    return tmp_path / "wide"


@pytest.mark.parametrize("bits", ["8bit", "4bit"])
def test_a_model_is_loaded_quantised(bits: str, wide: Path) -> None:
    """All projections but the outputs and the step's, whose weight Mamba's own code multiplies by."""
    model, tokenizer = load(str(wide), Placement(load_in=bits))
    kinds = {name: type(part).__name__ for name, part in model.backbone.layers[0].mixer.named_children()}
    quantised = {"8bit": "Linear8bitLt", "4bit": "Linear4bit"}[bits]
    assert kinds["in_proj"] == kinds["x_proj"] == kinds["out_proj"] == quantised and kinds["dt_proj"] == "Linear"
    plain = hf.AutoModelForCausalLM.from_pretrained(wide).eval().backbone.layers[0].mixer
    x = torch.randn(1, 5, 64)
    with torch.no_grad():
        expected = plain.in_proj(x)
        assert (model.backbone.layers[0].mixer.in_proj(x).float() - expected).norm() < 0.15 * expected.norm()
    assert tokenizer.is_fast


def test_a_quantised_model_is_explained(wide: Path, run: Any) -> None:
    shown = run(GOOD, "--model", wide, "--load-in", "8bit")
    assert shown.status == 0, shown.err
    assert "largest relative error over 1 layers" in shown.fact("exactness")


def test_a_kernel_of_four_bits_is_right_or_refused(wide: Path, run: Any) -> None:
    """On a processor with AVX512-BF16, bitsandbytes takes a transposed input, as Mamba's, for a contiguous one."""
    model, _ = load(str(wide), Placement(load_in="4bit"))
    out_proj, x = model.backbone.layers[0].mixer.out_proj, torch.randn(1, 20, 128)
    with torch.no_grad():
        difference = out_proj(x.mT.contiguous().mT) - out_proj(x)
    shown = run(GOOD, "--model", wide, "--load-in", "4bit")
    if difference.abs().max() > 0.1 * out_proj(x).abs().max():
        assert shown.status == 2
        assert re.search("out_proj' is no projection .* its kernel is wrong on this device", shown.err)
    else:
        assert shown.status == 0, shown.err


def test_a_model_that_cannot_run_quantised_is_refused(run: Any) -> None:
    """The shipped model is 96 wide: no whole blocks of 64."""
    shown = run(GOOD, "--load-in", "4bit")
    assert_refused(shown, "cannot run in 4bit here .*leave --load-in out")


@pytest.mark.parametrize("device_map", ["auto", "cpu", '{"": "cpu"}'])
def test_a_model_is_spread_over_devices(device_map: str, run: Any) -> None:
    with_map, without = run(GOOD, "--device-map", device_map), run(GOOD)
    assert with_map.status == 0 and with_map.flat == without.flat


def test_the_loaded_adapter_is_explained_with_its_sum(adapter: Path) -> None:
    model, tokenizer = load(str(adapter), Placement())
    ids = tokenizer(GOOD, return_tensors="pt").input_ids
    scores = ImplicitAttentionRelevance(model).attribute(ids, 5, baselines=tokenizer.unk_token_id)
    with torch.no_grad():
        reference = model(torch.full_like(ids, tokenizer.unk_token_id)).logits
        difference = (model(ids).logits - reference)[0, -1, 5]
    torch.testing.assert_close(scores.sum(), difference, rtol=1e-4, atol=1e-4)
