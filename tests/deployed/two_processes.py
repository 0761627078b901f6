"""What each of two processes checks, started by ``test_processes.py``: the scores of the model in one process."""

import tempfile
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import AutoModelForCausalLM

import captum_ssm as cs
from tests.conftest import build
from tests.test_running import BOTH, METHODS, generated, last_logits, right

IDS = torch.tensor([[3, 5, 7, 11, 13, 2, 4], [6, 8, 10, 12, 14, 16, 18]])


def assert_same(found: Tensor, exact: Tensor) -> None:
    torch.testing.assert_close(found, exact, rtol=1e-4, atol=1e-5 * float(exact.abs().max()))


def under_fsdp(name: str) -> Any:
    model = build(name)
    blocks = next(m for m in model.modules() if isinstance(m, nn.ModuleList))
    for block in blocks:
        fully_shard(block)
    fully_shard(model)
    return model


def check_fsdp(name: str, methods: set[str]) -> None:
    model = under_fsdp(name)
    before = {n: (id(p), type(p)) for n, p in model.named_parameters()}
    hooks = {n: (list(m._forward_hooks), list(m._forward_pre_hooks)) for n, m in model.named_modules()}
    for method in methods:
        assert_same(METHODS[method](model, IDS, None), right(name, method, IDS))
        assert {n: (id(p), type(p)) for n, p in model.named_parameters()} == before
    with pytest.raises(AssertionError):
        cs.ImplicitAttentionRelevance(model).attribute(IDS)  # no target
    assert {n: (id(p), type(p)) for n, p in model.named_parameters()} == before
    assert {n: (list(m._forward_hooks), list(m._forward_pre_hooks)) for n, m in model.named_modules()} == hooks
    assert_same(generated(model, IDS), generated(build(name), IDS))
    model(IDS, use_cache=False).logits.square().sum().backward()  # trains as before
    assert all(parameter.grad is not None for parameter in model.parameters())


def check_tensor_parallel(name: str, folder: str) -> None:
    if dist.get_rank() == 0:
        build(name).save_pretrained(folder)
    dist.barrier()
    model = AutoModelForCausalLM.from_pretrained(folder, tp_plan="auto").eval()
    assert any(hasattr(parameter, "full_tensor") for parameter in model.parameters())
    for method in ("signed", "rollout", "layer"):
        assert_same(METHODS[method](model, IDS, None), right(name, method, IDS))
    assert_same(generated(model, IDS), generated(build(name), IDS))
    with pytest.raises(cs.UnsupportedModelError, match=r"tensor parallelism.*tp_plan"):
        METHODS["relevance"](model, IDS, None)


def main() -> None:
    """Run all checks."""
    torch.set_num_threads(1)
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    check_fsdp("mamba", set(METHODS))
    check_fsdp("jamba", BOTH)
    with tempfile.TemporaryDirectory() as folder:
        shared = [folder]
        dist.broadcast_object_list(shared)
        check_tensor_parallel("jamba", f"{shared[0]}/jamba")
        check_tensor_parallel("qwen3_next", f"{shared[0]}/qwen3_next")
        dist.barrier()
    model = DistributedDataParallel(build("mamba"))
    for method in BOTH:
        found = METHODS[method](lambda ids: model(ids, use_cache=False).logits[:, -1], IDS, model)
        assert_same(found, METHODS[method](last_logits(plain := build("mamba")), IDS, plain))
    with pytest.raises(cs.UnsupportedModelError, match=r"FullyShardedDataParallel.*fully_shard"):
        METHODS["signed"](FullyShardedDataParallel(build("mamba"), device_id=torch.device("cpu")), IDS, None)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
