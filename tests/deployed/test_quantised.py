"""Quantised models: every method gives what it gives for the dequantised model, or states what it approximates."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import accelerate
import bitsandbytes as bnb
import gguf
import peft
import pytest
import torch
import torchao.quantization as ao
import transformers as hf
from hqq.core.quantize import BaseQuantizeConfig, HQQLinear
from optimum.quanto import freeze, qint8, quantize
from torch import Tensor, nn
from torchao.quantization.granularity import PerAxis

import captum_ssm as cs
from captum_ssm.layers.mixers import known_mixers
from tests.conftest import build
from tests.test_stand_ins import METHODS, UNCALLED, assert_alike, close, plain, scores

EVERY = ["mamba", "jamba", "recurrent_gemma", "qwen3_5", "falcon_h1", "xlstm"]


def linear_parts(model: nn.Module) -> dict[str, nn.Linear]:
    """The projections of a model's mixers by name, those without a call left out."""
    found = {}
    for path, mixer in known_mixers(model).items():
        for name, part in mixer.named_modules():
            if isinstance(part, nn.Linear) and name.rpartition(".")[2] not in UNCALLED:
                found[f"{path}.{name}"] = part
    return found


def set_part(model: nn.Module, path: str, part: nn.Module) -> None:
    home, _, name = path.rpartition(".")
    setattr(model.get_submodule(home), name, part.eval())


def by_part(make: Callable[[nn.Linear], nn.Module]) -> Callable[[nn.Module], None]:
    def of(model: nn.Module) -> None:
        for path, part in linear_parts(model).items():
            set_part(model, path, make(part))

    return of


def by_torchao(config: Any) -> Callable[[nn.Module], None]:
    def of(model: nn.Module) -> None:
        parts = {id(part) for part in linear_parts(model).values()}
        ao.quantize_(model, config, filter_fn=lambda part, _: id(part) in parts)

    return of


def by_quanto(model: nn.Module) -> None:
    names = set(linear_parts(model))
    quantize(model, weights=qint8, exclude=[name for name, _ in model.named_modules() if name not in names])
    freeze(model)


def int8(part: nn.Linear) -> nn.Module:
    new = bnb.nn.Linear8bitLt(part.in_features, part.out_features, part.bias is not None, has_fp16_weights=False)
    new.weight = bnb.nn.Int8Params(part.weight.data.clone(), requires_grad=False, has_fp16_weights=False)
    new.bias = part.bias
    return new.to("cpu")


def nf4(part: nn.Linear) -> nn.Module:
    new = bnb.nn.Linear4bit(part.in_features, part.out_features, part.bias is not None, torch.float32, quant_type="nf4")
    new.weight = bnb.nn.Params4bit(part.weight.data.clone(), requires_grad=False, quant_type="nf4")
    new.bias = part.bias
    return new.to("cpu")


def hqq(part: nn.Linear) -> nn.Module:
    config = BaseQuantizeConfig(nbits=4, group_size=8)
    return HQQLinear(part, config, compute_dtype=torch.float32, device="cpu", del_orig=False)


WEIGHTS_ALONE: dict[str, Callable[[nn.Module], None]] = {
    "torchao int8": by_torchao(ao.Int8WeightOnlyConfig()),
    "torchao int4": by_torchao(ao.IntxWeightOnlyConfig(weight_dtype=vars(torch)["int4"], granularity=PerAxis(0))),
    "torchao float8": by_torchao(ao.Float8WeightOnlyConfig()),
    "quanto int8": by_quanto,
    "hqq int4": by_part(hqq),
}
INPUTS_TOO: dict[str, Callable[[nn.Module], None]] = {
    "bitsandbytes int8": by_part(int8),
    "torchao dynamic int8": by_torchao(ao.Int8DynamicActivationInt8WeightConfig()),
}


def in_state(family: str, quantise: Callable[[nn.Module], None]) -> tuple[Any, Any]:
    """A quantised model, and the dequantised one."""
    model, oracle = build(family).requires_grad_(False), build(family)
    quantise(model)
    for path, part in linear_parts(oracle).items():
        set_part(oracle, path, plain(model.get_submodule(path), part.in_features))
    return model.eval(), oracle


@pytest.mark.parametrize("state", WEIGHTS_ALONE)
@pytest.mark.parametrize("family", EVERY)
def test_quantised_weights(family: str, state: str, ids: Tensor) -> None:
    assert_alike(*in_state(family, WEIGHTS_ALONE[state]), ids, ("signed", "rollout", "reference"), 5e-4)


@pytest.mark.parametrize("state", [*WEIGHTS_ALONE, *INPUTS_TOO])
@pytest.mark.parametrize("family", EVERY)
def test_relevance_adds_up(family: str, state: str, ids: Tensor) -> None:
    model, _ = in_state(family, {**WEIGHTS_ALONE, **INPUTS_TOO}[state])
    method = cs.ImplicitAttentionRelevance(model)
    result = method.attribute(ids, 1, baselines=2)
    with torch.no_grad():
        right = [model(text, use_cache=False).logits[:, -1, 1] for text in (ids, torch.full_like(ids, 2))]
    missing = result.sum(1) + sum(method.terms.values()) - (right[0] - right[1])
    allowed = 0.05 if state in INPUTS_TOO else 1e-3  # the last digit of an input decides how it is rounded
    assert (missing.abs() <= allowed * result.abs().sum(1)).all()


@pytest.mark.parametrize("family", ["mamba", "jamba"])
def test_offloaded_parts_that_round_their_inputs_have_the_same_secants(family: str, ids: Tensor) -> None:
    model, _ = in_state(family, INPUTS_TOO["torchao dynamic int8"])
    right = scores("reference", model, ids)
    accelerate.cpu_offload(model, "cpu")
    close(scores("reference", model, ids), right, 1e-4)


@pytest.mark.parametrize("state", INPUTS_TOO)
@pytest.mark.parametrize("family", ["mamba", "mamba2", "qwen3_5"])
def test_relevance_behind_padding_adds_up(family: str, state: str, ids: Tensor) -> None:
    """That parts round their inputs is no padding that leaks."""
    model, _ = in_state(family, INPUTS_TOO[state])
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    method = cs.ImplicitAttentionRelevance(model)
    result, delta = method.attribute(ids, 1, mask, baselines=2, return_convergence_delta=True)
    assert not result[0, :2].any()
    assert (delta.abs() <= 0.05 * result.abs().sum(1)).all()


@pytest.mark.parametrize("state", INPUTS_TOO)
@pytest.mark.parametrize("method", ["signed", "rollout"])
def test_matrices_of_quantised_inputs_are_a_named_approximation(method: str, state: str, ids: Tensor) -> None:
    model, oracle = in_state("mamba", INPUTS_TOO[state])
    with pytest.raises(cs.FidelityError, match=r"'in_proj' .* not linear in its input.* `tolerance`"):
        scores(method, model, ids)
    make = {
        "signed": lambda m: cs.ImplicitAttentionAttribution(m, rectify=None, tolerance=0.1),
        "rollout": lambda m: cs.ImplicitAttentionRollout(m, tolerance=0.1),
    }[method]
    target = (1,) if method == "signed" else ()
    approximate = make(model)
    close(approximate.attribute(ids, *target), make(oracle).attribute(ids, *target), 0.1)
    assert all(1e-4 < error < 0.1 for error in approximate.fidelity.values())


@pytest.mark.parametrize("method", ["frozen", "reference"])
def test_relevance_of_quantised_inputs_is_near_that_of_the_weights(method: str, ids: Tensor) -> None:
    model, oracle = in_state("mamba", INPUTS_TOO["bitsandbytes int8"])
    close(scores(method, model, ids), scores(method, oracle, ids), 0.05)


@pytest.mark.parametrize("method", ["frozen", "reference"])
def test_a_fine_tuned_quantised_model(method: str, ids: Tensor) -> None:
    """QLoRA, on weights of 8 bits."""
    names = ["in_proj", "q_proj", "v_proj"]
    wrapped = build("jamba").requires_grad_(False)
    by_part(int8)(wrapped)
    tuned = peft.get_peft_model(wrapped, peft.LoraConfig(r=2, target_modules=names, init_lora_weights=False)).eval()
    inner = tuned.base_model.model
    explained = METHODS[method](inner)
    result = explained.attribute(ids, 1, baselines=2 if method == "reference" else None)
    assert result.isfinite().all()
    assert set(explained.followed.values()) == {"decomposition"}


def test_weights_of_four_bits_of_bitsandbytes(ids: Tensor) -> None:
    """Its kernel for the CPU takes sizes that are multiples of 64."""
    config = hf.MambaConfig(hidden_size=64, num_hidden_layers=2, vocab_size=32, state_size=4, use_cache=False)
    model = hf.MambaForCausalLM(config).eval().requires_grad_(False)
    for layer in model.backbone.layers:
        layer.mixer.in_proj = nf4(layer.mixer.in_proj).eval()
    for _ in range(2):  # the first run lays the weights out anew
        method = cs.ImplicitAttentionRelevance(model)
        result = method.attribute(ids, 1, baselines=2)
        with torch.no_grad():
            right = [model(text, use_cache=False).logits[:, -1, 1] for text in (ids, torch.full_like(ids, 2))]
        missing = result.sum(1) + sum(method.terms.values()) - (right[0] - right[1])
        assert (missing.abs() <= 0.02 * result.abs().sum(1)).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("state", ["bitsandbytes", "torchao", "quanto"])
def test_a_model_that_transformers_quantises_as_it_loads(state: str, dtype: torch.dtype, tmp_path: Path) -> None:
    configs: dict[str, Callable[[], Any]] = {
        "bitsandbytes": lambda: hf.BitsAndBytesConfig(load_in_8bit=True),
        "torchao": lambda: hf.TorchAoConfig(ao.Int8WeightOnlyConfig()),
        "quanto": lambda: hf.QuantoConfig(weights="int8"),
    }
    config = hf.Mamba2Config(hidden_size=32, num_hidden_layers=2, vocab_size=32, state_size=8, num_heads=4, head_dim=16,
                             n_groups=1, use_cache=False)  # fmt: skip
    hf.Mamba2ForCausalLM(config).save_pretrained(tmp_path)
    options = {"quantization_config": configs[state](), "device_map": "cpu", "dtype": dtype}
    model = hf.Mamba2ForCausalLM.from_pretrained(tmp_path, **options).eval()
    ids = torch.randint(1, 32, (2, 7))
    method = cs.ImplicitAttentionRelevance(model)
    result = method.attribute(ids, 1, baselines=2)
    with torch.no_grad():
        right = [model(text).logits[:, -1, 1].to(result) for text in (ids, torch.full_like(ids, 2))]
    missing = result.sum(1) + sum(method.terms.values()) - (right[0] - right[1])
    assert (missing.abs() <= (1e-3 if dtype == torch.float32 else 0.05) * result.abs().sum(1)).all()
    assert set(method.followed.values()) == {"decomposition"}


def test_a_model_that_transformers_loads_from_gguf(tmp_path: Path) -> None:
    """It takes the weights out of their blocks as it loads them: the model is a plain one."""
    E, D, R, N = 64, 128, 4, 16
    config = hf.MambaConfig(hidden_size=E, num_hidden_layers=1, vocab_size=32, state_size=N, time_step_rank=R)
    mixer = (model := hf.MambaForCausalLM(config).eval()).backbone.layers[0].mixer
    writer = gguf.GGUFWriter(tmp_path / "model.gguf", "mamba")
    writer.add_embedding_length(E), writer.add_block_count(1), writer.add_layer_norm_rms_eps(config.layer_norm_epsilon)
    writer.add_ssm_conv_kernel(4), writer.add_ssm_inner_size(D), writer.add_ssm_state_size(N)
    writer.add_ssm_time_step_rank(R), writer.add_vocab_size(32), writer.add_context_length(64)
    writer.add_tokenizer_model("gpt2"), writer.add_token_list([f"t{i}" for i in range(32)])
    kind = gguf.GGMLQuantizationType.Q8_0
    for name, tensor in {
        "token_embd.weight": model.backbone.embeddings.weight, "output_norm.weight": model.backbone.norm_f.weight,
        "output.weight": model.lm_head.weight, "blk.0.attn_norm.weight": model.backbone.layers[0].norm.weight,
        "blk.0.ssm_conv1d.weight": mixer.conv1d.weight.squeeze(1), "blk.0.ssm_conv1d.bias": mixer.conv1d.bias,
        "blk.0.ssm_dt.weight": mixer.dt_proj.weight, "blk.0.ssm_dt.bias": mixer.dt_proj.bias,
        "blk.0.ssm_a": -mixer.A_log.exp(), "blk.0.ssm_d": mixer.D,
    }.items():  # fmt: skip
        writer.add_tensor(name, tensor.detach().numpy())
    for name, part in {"ssm_in": mixer.in_proj, "ssm_x": mixer.x_proj, "ssm_out": mixer.out_proj}.items():
        packed = gguf.quants.quantize(part.weight.detach().numpy(), kind)
        writer.add_tensor(f"blk.0.{name}.weight", packed, raw_dtype=kind)
    writer.write_header_to_file(), writer.write_kv_data_to_file(), writer.write_tensors_to_file(), writer.close()
    loaded = hf.MambaForCausalLM.from_pretrained(tmp_path, gguf_file="model.gguf").eval()
    ids = torch.randint(1, 32, (2, 7))
    close(scores("reference", loaded, ids), scores("reference", model, ids), 0.05)
