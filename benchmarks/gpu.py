"""Times, memory and kernel launches on a GPU, against the model's forward pass on the packages' CUDA kernels.

    python -m benchmarks.gpu                                         models of 130M, L 1024 and 8192; then the gpu tests
    python -m benchmarks.gpu --device cpu --layers 2 --width 128 --lengths 64   tiny, to see that the script works

The models are random, in bfloat16; layers are decomposed in float32, as all models of half precision are. transformers
takes the kernels of mamba_ssm, causal_conv1d and fla where they are installed; the first lines say which are. Without
them the forward pass is transformers' own code, which is slower. The yardstick reads the last token's logits alone, as
the methods do. Times are the shortest of some calls, each between two waits for the device; a call that is slow is made
less often. Launches are the operations of torch that make or change values, without those inside of packages' kernels;
waits are those of them that need a number from the device, or a size that depends on values. Without a GPU nothing is
measured.
"""

from __future__ import annotations

import argparse
import gc
import importlib.util
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.speed.figures import ROOT, shown
from benchmarks.speed.models import HEADS, TARGET, mamba, mamba2, random_ids, random_model
from benchmarks.speed.rollouts import ABSOLUTE, CHANNEL, MEAN, METHODS, NORM, SIGNED, TOKEN
from benchmarks.speed.rollouts import ROOT as ROLLOUT
from captum_ssm import ImplicitAttentionRelevance, LLMImplicitAttention

KERNELS = ("mamba_ssm", "causal_conv1d", "fla", "triton")
WRITTEN = 32
MOST_CALLS = 10
GPU_TESTS = "tests/test_gpu.py"
"""Those that need no package's kernels."""
WITHOUT_KERNEL = ("aten::empty", "aten::detach", "aten::lift_fresh")
"""Beginnings of the names of operations that neither read nor write values."""
WAITS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::equal", "aten::masked_select", "aten::_unique")
"""Beginnings of the names of operations whose result the processor waits for."""


def gated_delta(layers: int, width: int, **further: Any) -> Any:
    """Return a hybrid of the gated delta rule and, in every fourth layer, softmax attention."""
    heads = width // 64
    options = {**HEADS, "intermediate_size": 3 * width, "num_attention_heads": heads, "num_key_value_heads": heads}
    return random_model(
        "Qwen3_5", width, layers, **options, head_dim=64, linear_num_key_heads=heads, linear_num_value_heads=heads,
        linear_key_head_dim=64, linear_value_head_dim=64, **further,
    )  # fmt: skip


MODELS: dict[str, Callable[..., Any]] = {"Mamba-2": mamba2, "Mamba": mamba, "gated delta hybrid": gated_delta}


class Launches(TorchDispatchMode):
    """Counts operations that make or change values, each a launch of a kernel at least, and waits for their results."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.count = self.waits = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name()
        self.count += not (func.is_view or name.startswith(WITHOUT_KERNEL))
        self.waits += name.startswith(WAITS)
        return func(*args, **(kwargs or {}))


class Cost(NamedTuple):
    """What a call costs."""

    seconds: float
    gigabytes: float
    """Peak of the device's memory beyond what was held before; 0 on a CPU."""
    launches: int
    waits: int


def seconds(call: Callable[[], object], device: torch.device) -> float:
    """Return the time of one call, from an idle device to an idle device."""
    _wait(device)
    start = time.perf_counter()
    call()
    _wait(device)
    return time.perf_counter() - start


def _wait(device: torch.device) -> None:
    """Wait until a device has done what it was asked to do."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def cost(call: Callable[[], object], device: torch.device, budget: float) -> Cost:
    """Return the shortest time of some calls, the memory of these, and the launches of one.

    Args:
        call: What is measured. A first call prepares it: a model is examined, and kernels are chosen.
        device: Where it runs.
        budget: Seconds after which no further call begins. There is one timed call at least.
    """
    call()
    with Launches() as launches:
        call()
    gc.collect()
    held, peak = 0, 0
    if device.type == "cuda":
        held = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
    taken = [seconds(call, device)]
    while len(taken) < MOST_CALLS and sum(taken) + taken[-1] < budget:
        taken.append(seconds(call, device))
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated(device) - held
    return Cost(min(taken), peak / 1e9, launches.count, launches.waits)


def calls(model: Any, ids: Tensor, norm: bool) -> Iterator[tuple[str, Callable[[], object]]]:
    """Yield the model's own passes, and the methods, by name."""
    embeddings = model.get_input_embeddings()(ids).detach()

    def logits(inputs: Tensor) -> Tensor:
        return model(inputs_embeds=inputs, use_cache=False, logits_to_keep=1).logits[:, -1]

    def backward() -> Tensor:
        leaf = embeddings.detach().requires_grad_()
        return torch.autograd.grad(logits(leaf)[0, TARGET], leaf)[0]

    yield "forward pass", torch.no_grad()(partial(logits, embeddings))
    yield "forward and backward pass", backward
    for name in (ROLLOUT, MEAN, ABSOLUTE, CHANNEL, TOKEN, SIGNED, *([NORM] if norm else [])):
        yield name, partial(METHODS[name](model).attribute, ids, target=TARGET)
    relevance = ImplicitAttentionRelevance(model)
    yield "relevance, frozen gates", partial(relevance.attribute, ids, target=TARGET)
    yield "relevance with a reference", partial(relevance.attribute, ids, target=TARGET, baselines=2)
    for name in (SIGNED, CHANNEL):
        explain = LLMImplicitAttention(METHODS[name](model), None).explain
        yield f"{WRITTEN} written tokens, {name}", partial(explain, ids, ids.shape[1] - WRITTEN)


def measure(name: str, model: Any, ids: Tensor, budget: float, norm: bool) -> None:
    """Print the costs of all methods on token ids (1, L), in those of the model's own passes."""
    columns = f"{'forwards':>8} {'ms':>9} {'memory':>7} {'launches':>9} {'waits':>6}"
    print(f"\n{name}, L {ids.shape[1]}\n{'':<58} {columns}", flush=True)
    forward = own = Cost(float("nan"), float("nan"), 0, 0)
    for what, call in calls(model, ids, norm):
        try:
            found = cost(call, ids.device, budget)
        except Exception as error:
            print(f"{what:<58} {type(error).__name__}: {str(error)[:200]}", flush=True)
            continue
        forward = found if what == "forward pass" else forward
        own = found if what == "forward and backward pass" else own
        memory = shown(found.gigabytes / own.gigabytes) if own.gigabytes > 0 else "-"
        times = f"{shown(found.seconds / forward.seconds):>8} {1000 * found.seconds:>9.1f}"
        print(f"{what:<58} {times} {memory:>7} {found.launches:>9} {found.waits:>6}", flush=True)


def main() -> None:
    """Print the tables, and run the tests that need a GPU."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--layers", type=int, default=24)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--vocabulary", type=int, default=50280)
    parser.add_argument("--lengths", type=int, nargs="+", default=[1024, 8192])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS), metavar="NAME")
    parser.add_argument("--budget", type=float, default=3, help="seconds of timed calls of one method")
    parser.add_argument(
        "--norm", action="store_true", help='also fusion="norm", which takes far longer than all others'
    )
    parser.add_argument("--no-tests", action="store_true", help="leave out the tests that need a GPU")
    options = parser.parse_args()
    device = torch.device(options.device)
    if device.type == "cuda" and not torch.cuda.is_available():
        print("There is no GPU here, so nothing is measured. To try the script itself: --device cpu --layers 2 ...")
        return
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "a CPU"
    installed = ", ".join(f"{name} {'is' if importlib.util.find_spec(name) else 'is not'} there" for name in KERNELS)
    print(f"{where}, torch {torch.__version__}; {installed}\nmemory: in that of the forward and backward pass")
    for name in options.models:
        model = MODELS[name](options.layers, options.width, vocab_size=options.vocabulary).to(device, torch.bfloat16)
        size = sum(parameter.numel() for parameter in model.parameters()) / 1e6
        for L in options.lengths:
            ids, sizes = random_ids(L).to(device), f"{options.layers} × {options.width}, {size:.0f}M"
            measure(f"{name}, {sizes}", model, ids, options.budget, options.norm)
        del model
    if device.type == "cuda" and not options.no_tests:
        tests = [GPU_TESTS, *(["tests/native"] if importlib.util.find_spec("fla") else [])]
        sys.exit(subprocess.run([sys.executable, "-m", "pytest", "-m", "gpu", *tests], cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
