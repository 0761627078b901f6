"""Speed and memory of captum_ssm as ratios, each measured side by side in one run.

    python -m benchmarks.speed            everything, about twenty-five minutes on two cores
    python -m benchmarks.speed --quick    smaller sizes, for a look

Only ratios are meant to be quoted: both sides of each are timed in turn in the same process, so a slow or busy
machine slows both. Weights are random; speed does not depend on them.
"""

from __future__ import annotations

import argparse
import math
import subprocess
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from captum.attr import InputXGradient, IntegratedGradients, LLMGradientAttribution, TextTokenInput
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    Mamba2Config,
    Mamba2ForCausalLM,
    MambaConfig,
    MambaForCausalLM,
    PreTrainedModel,
    Qwen3_5ForCausalLM,
    Qwen3_5TextConfig,
)
from transformers.utils import logging

from captum_ssm import (
    ImplicitAttentionAttribution,
    ImplicitAttentionRelevance,
    LayerImplicitAttentionAttribution,
    LLMImplicitAttention,
)
from captum_ssm.attr.attribution import Rectify
from captum_ssm.layers.fidelity import decompose
from captum_ssm.matrices.core_matrix import CoreMatrix, channel_matrices
from captum_ssm.matrices.entrywise import POSITIVE
from captum_ssm.models import REVIEWS
from captum_ssm.network.recording import record_mixers
from captum_ssm.operators import Product, Scan
from tests.oracles import published_alpha

ROOT = Path(__file__).parents[1]
TARGET = 5
Row = tuple[str, str, str]
"""What was measured, what is wanted, and the result."""


def seconds(function: Callable[[], object]) -> float:
    """Return the time of one call."""
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def compare(ours: Callable[[], object], theirs: Callable[[], object], runs: int) -> tuple[float, float]:
    """Time both in turn, after one call of each to warm up, and return the two medians."""
    ours(), theirs()
    pairs = [(seconds(ours), seconds(theirs)) for _ in range(runs)]
    return median(a for a, _ in pairs), median(b for _, b in pairs)


def mamba(layers: int, width: int) -> MambaForCausalLM:
    """Return a random Mamba with N = 16."""
    torch.manual_seed(0)
    config = MambaConfig(vocab_size=1000, hidden_size=width, num_hidden_layers=layers, state_size=16)
    return MambaForCausalLM(config).eval()


def mamba2(layers: int, width: int) -> Mamba2ForCausalLM:
    """Return a random Mamba-2 with N = 64 and heads of 32 channels."""
    torch.manual_seed(0)
    config = Mamba2Config(
        vocab_size=1000, hidden_size=width, num_hidden_layers=layers, state_size=64, head_dim=32, num_heads=width // 16,
        n_groups=1,
    )  # fmt: skip
    return Mamba2ForCausalLM(config).eval()


def gated_delta(layers: int, width: int) -> Qwen3_5ForCausalLM:
    """Return a random Qwen3.5: gated delta rule and softmax attention in turn."""
    torch.manual_seed(0)
    config = Qwen3_5TextConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=3 * width, num_hidden_layers=layers,
        layer_types=["linear_attention", "full_attention"] * (layers // 2), num_attention_heads=4,
        num_key_value_heads=2, head_dim=width // 4, linear_num_key_heads=2, linear_num_value_heads=4,
        linear_key_head_dim=32, linear_value_head_dim=64,
    )  # fmt: skip
    return Qwen3_5ForCausalLM(config).eval()


def selective_scan(L: int, D: int, N: int = 16) -> tuple[Scan, tuple[Tensor, Tensor, Tensor, Tensor]]:
    """Return a Mamba scan of one example and its delta (L, D), A (D, N), B (L, N), C (L, N)."""
    torch.manual_seed(0)
    delta, A = 0.1 * torch.rand(L, D), -torch.arange(1.0, N + 1).expand(D, N)
    B, C = torch.randn(L, N), torch.randn(L, N)
    step = delta[None, :, :, None]
    scan = Scan(
        a=Product((step, A[None, None]), exponential=True),
        b=Product((step, B[None, :, None])),
        c=C[None, :, None],
    )
    return scan, (delta, A, B, C)


def dense_against_loop(L: int, D: int) -> str:
    """Dense matrices of a core against the published loop over rows, columns and steps."""
    scan, parameters = selective_scan(L, D)
    like = torch.zeros(1, L, D)
    channel_matrices(scan, like)
    before = seconds(lambda: channel_matrices(scan, like))
    loop = seconds(lambda: published_alpha(*parameters))
    after = seconds(lambda: channel_matrices(scan, like))
    ours = (before + after) / 2
    return f"{loop / ours:.0f} x faster ({ours:.2f} s, {loop:.1f} s)"


def last_logits(model: PreTrainedModel, L: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Return embeddings of random tokens (1, L, E), and the logits at the last token as a function of embeddings."""
    embeddings = model.get_input_embeddings()(torch.randint(0, 1000, (1, L))).detach()
    return embeddings, lambda inputs: model(inputs_embeds=inputs, use_cache=False).logits[:, -1]


def attribution_against_captum(L: int, layers: int, width: int, steps: int, runs: int) -> tuple[str, str]:
    """Signed attribution against Captum's gradient methods, on the same embeddings."""
    model = mamba(layers, width)
    embeddings, forward = last_logits(model, L)
    signed = ImplicitAttentionAttribution(model, rectify=None)
    gradient, integrated = InputXGradient(forward), IntegratedGradients(forward)
    leaf = embeddings.clone().requires_grad_()
    ours, theirs = compare(
        lambda: signed.attribute(embeddings, target=TARGET), lambda: gradient.attribute(leaf, target=TARGET), runs
    )
    # one step at a time: on a CPU larger batches of a 12-layer model are slower, not faster
    path = seconds(lambda: integrated.attribute(embeddings, target=TARGET, n_steps=steps, internal_batch_size=1))
    again = seconds(lambda: signed.attribute(embeddings, target=TARGET))
    return (
        f"{ours / theirs:.2f} x its time ({ours:.2f} s, {theirs:.2f} s)",
        f"{2 * path / (ours + again):.0f} x faster ({(ours + again) / 2:.2f} s, {path:.1f} s)",
    )


def relevance_against_captum(name: str, model: PreTrainedModel, L: int, runs: int, steps: int) -> list[Row]:
    """Relevance by both rules against Captum's gradient methods, on the same embeddings.

    Args:
        name: Of the model.
        model: The model.
        L: Tokens.
        runs: Number of measurements, after one to warm up; with 0 a single one, cold.
        steps: Of the integrated gradients; 0 leaves them out.

    Returns:
        One row of the table for each comparison.
    """
    embeddings, forward = last_logits(model, L)
    gradient, integrated, leaf = InputXGradient(forward), IntegratedGradients(forward), embeddings.clone()
    half, value = (ImplicitAttentionRelevance(model, gate_rule=rule) for rule in ("half", "value"))
    methods = {
        "InputXGradient": lambda: gradient.attribute(leaf.requires_grad_(), target=TARGET),
        "frozen gates, half": lambda: half.attribute(embeddings, target=TARGET),
        "frozen gates, value": lambda: value.attribute(embeddings, target=TARGET),
        "difference": lambda: half.attribute(embeddings, target=TARGET, baselines=0.0),
    }
    taken: dict[str, list[float]] = {method: [] for method in methods}
    for _ in range(runs + 1):
        for method, call in methods.items():
            taken[method].append(seconds(call))
    times = {method: median(measured[min(runs, 1) :]) for method, measured in taken.items()}
    theirs = times.pop("InputXGradient")
    rows = [
        (
            f"relevance, {name}, L {L}: {method} against InputXGradient",
            "<= 2.5 x its time" if method == "difference" else "<= 1.5 x its time",
            f"{ours / theirs:.2f} x its time ({ours:.2f} s, {theirs:.2f} s)",
        )
        for method, ours in times.items()
    ]
    if steps:

        def path(steps: int, size: int) -> float:
            return seconds(lambda: integrated.attribute(leaf, target=TARGET, n_steps=steps, internal_batch_size=size))

        # the better of one step at a time and ten at once
        tried = {size: path(max(steps // 5, 2), size) for size in (1, 10)}
        took = path(steps, min(tried, key=lambda size: tried[size]))
        ours = times["difference"]
        shown = f"{took / ours:.0f} x slower ({took:.1f} s, {ours:.2f} s)"
        rows.append(
            (
                f"relevance, {name}, L {L}: IntegratedGradients, {steps} steps, against difference",
                ">= 15 x slower",
                shown,
            )
        )
    return rows


def generation_against_captum(prompt: int, answer: int, rectify: Rectify, runs: int) -> tuple[str, str]:
    """A generation by the shipped model: Captum's LLMGradientAttribution, and all at once, against single calls."""
    logging.disable_progress_bar()
    model, tokenizer = AutoModelForCausalLM.from_pretrained(REVIEWS).eval(), AutoTokenizer.from_pretrained(REVIEWS)
    words = torch.randint(50, 4000, (prompt + answer,), generator=torch.Generator().manual_seed(0))
    text, ids = tokenizer.decode(words[: prompt - 1]), words[prompt:]
    layer = LayerImplicitAttentionAttribution(model, model.get_input_embeddings(), rectify=rectify)
    stock, inp = LLMGradientAttribution(layer, tokenizer), TextTokenInput(text, tokenizer)
    direct = LLMImplicitAttention(ImplicitAttentionAttribution(model, rectify=rectify), tokenizer)

    def last(ids: Tensor) -> Tensor:
        return model(input_ids=ids, use_cache=False).logits[:, -1].log_softmax(-1)

    single, half = ImplicitAttentionAttribution(last, model, rectify=rectify), words[None, : prompt + answer // 2]
    ours, theirs = compare(
        lambda: direct.attribute(inp, target=ids[None]), lambda: stock.attribute(inp, target=ids), runs
    )
    one = median(seconds(lambda: single.attribute(half, target=TARGET)) for _ in range(8))
    return (
        f"{theirs / (answer * one):.2f} x {answer} calls ({theirs:.2f} s, {one:.3f} s a call)",
        f"{theirs / ours:.1f} x faster ({ours:.2f} s)",
    )


def growth_of_apply(lengths: list[int], D: int, runs: int) -> str:
    """Exponent k of time ~ L^k of one product with a scan, by least squares over all lengths."""
    scans = {L: (selective_scan(L, D)[0], torch.randn(1, L, D)) for L in lengths}
    times: dict[int, list[float]] = {L: [] for L in lengths}
    for _ in range(runs + 1):
        for L, (scan, x) in scans.items():
            times[L].append(seconds(partial(scan.apply, x)))
    points = torch.tensor([[math.log(L), math.log(median(times[L][1:]))] for L in lengths])
    x, y = (points - points.mean(0)).unbind(1)
    shown = ", ".join(f"{L}: {1000 * median(t[1:]):.0f} ms" for L, t in times.items())
    return f"{float((x * y).sum() / (x * x).sum()):.2f} ({shown})"


class LargestTensor(TorchDispatchMode):
    """Records the number of entries of the largest tensor that any operation returns."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.entries = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(tensor, Tensor):
                self.entries = max(self.entries, tensor.numel())
        return result


def peak_memory() -> float:
    """Return the peak resident memory of this process so far, in GB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmHWM"))
    return int(line.split()[1]) / 1e6


def rectified_memory(L: int, width: int) -> str:
    """Return in words the memory of the channel-rectified matrix of one layer, beyond the peak of the model's own run.

    Runs in a separate process: the peak of a process never falls.
    """
    model = mamba(1, width)
    with torch.no_grad(), record_mixers(model) as calls:
        model(torch.randint(0, 1000, (1, L)), use_cache=False)
    layer = decompose(calls[0])
    _, core, into = layer.chain.split()
    v = into.apply(layer.x, bias=True).detach()
    u = torch.randn_like(v)
    with torch.no_grad(), LargestTensor() as largest:
        grown, took = growth(lambda: CoreMatrix(core, u, v).dense(POSITIVE))
    share = largest.entries / (v.shape[-1] * L * L)
    return f"{grown:.2f} GB; largest tensor {share:.1%} of (B, D, L, L) ({took:.0f} s)"


def growth(function: Callable[[], object]) -> tuple[float, float]:
    """Return by how many GB one call raises the peak resident memory of this process, and its time."""
    # raise resident memory to the peak again, so that what follows is counted in full
    ballast = torch.ones(int((peak_memory() - resident_memory()) * 1e9 / 4))
    before = peak_memory()
    took = seconds(function)
    grown = peak_memory() - before
    del ballast
    return grown, took


def relevance_memory(what: str, L: int) -> str:
    """Return in words the peak memory of one explanation by the shipped model, beyond that of the loaded model.

    Args:
        what: ``"own"``, the model's own forward and backward; ``"forward"``, its forward alone, with what it holds for
            the backward; ``"frozen"`` or ``"difference"``, either with ``"-checkpoints"``.
        L: Tokens.

    Runs in a process of its own.
    """
    logging.disable_progress_bar()
    model = AutoModelForCausalLM.from_pretrained(REVIEWS).eval()
    rule, _, checkpoints = what.partition("-")
    method = ImplicitAttentionRelevance(model, checkpoints=bool(checkpoints))

    def run(L: int) -> object:
        embeddings, forward = last_logits(model, L)
        if rule in ("own", "forward"):
            score = forward(embeddings.requires_grad_())[0, TARGET]
            return torch.autograd.grad(score, embeddings) if rule == "own" else score
        return method.attribute(embeddings, target=TARGET, baselines=0.0 if rule == "difference" else None)

    run(16)
    grown, took = growth(lambda: run(L))
    return f"{grown:.2f} GB ({took:.0f} s)"


def relevance_memories(lengths: list[int], longest: int) -> list[Row]:
    """Memory of both rules against the model's own; its backward takes time L², so not at the longest length."""
    ours = ["frozen", "difference", "frozen-checkpoints", "difference-checkpoints"]
    tasks = [(what, L) for L in lengths for what in ["own", *ours]] + [(what, longest) for what in ["forward", *ours]]
    rows = []
    for what, L in tqdm(tasks, desc="memory of relevance", leave=False):
        grown = in_a_process("--relevance-memory", what, str(L))
        name = {"own": "own forward and backward", "forward": "own forward alone"}.get(what, f"relevance, {what}")
        rows.append((f"memory, shipped model, L {L}: {name}", "a small multiple", grown))
    return rows


def in_a_process(*arguments: str) -> str:
    """Run this module with these arguments and return what it prints: the peak of a process never falls."""
    command = [sys.executable, "-m", "benchmarks.speed", *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True, cwd=ROOT).stdout.strip()


def resident_memory() -> float:
    """Return the resident memory of this process now, in GB."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1e6


def rows_of_attribution(quick: bool) -> list[Row]:
    """Measure attribution, its generation, and what they are made of."""
    L, layers, width, steps, runs = (64, 2, 64, 10, 2) if quick else (256, 12, 256, 50, 3)
    memory = (256, 128) if quick else (2048, 768)
    with tqdm(total=6, desc="measuring", leave=False) as bar:
        rows = [("dense of one core against the published triple loop", "25 x faster", dense_against_loop(L, L))]
        bar.update()
        gradient, integrated = attribution_against_captum(L, layers, width, steps, runs)
        rows += [
            ("signed attribution against InputXGradient", "<= 2 x its time", gradient),
            (f"the same against IntegratedGradients, {steps} steps", "15 x faster", integrated),
        ]
        bar.update()
        words = (16, 4) if quick else (128, 32)
        for rectify in (None, "channel"):
            stock, direct = generation_against_captum(*words, rectify, runs)
            what = f"{words[1]} generated tokens, rectify={rectify!r}"
            rows += [
                (f"{what}: LLMGradientAttribution", "<= 1.5 x calls", stock),
                (f"{what}: all at once against that", "5 x faster", direct),
            ]
            bar.update()
        lengths = [64, 128, 256] if quick else [512, 1024, 2048, 4096, 8192]
        rows.append(("growth exponent of Scan.apply in L", "<= 1.1", growth_of_apply(lengths, 256, runs)))
        bar.update()
        grown = in_a_process("--memory", *map(str, memory))
        rows.append((f"memory of a rectified matrix, L {memory[0]}, D {2 * memory[1]}", "<= 1 GB", grown))
        bar.update()
    return rows


def rows_of_relevance(quick: bool) -> list[Row]:
    """Measure relevance on models named by layers x width."""
    L, long, layers, width, steps, runs = (64, 128, 2, 64, 5, 1) if quick else (512, 4096, 4, 128, 50, 3)
    models: dict[str, Callable[[], PreTrainedModel]] = {
        f"Mamba 2 x {width}": lambda: mamba(2, width),
        f"Mamba-2 {layers} x {width}": lambda: mamba2(layers, width),
        f"GDN hybrid {layers} x {width}": lambda: gated_delta(layers, width),
    }
    rows = []
    with tqdm(total=len(models) + 1, desc="measuring relevance", leave=False) as bar:
        for name, build in models.items():
            rows += relevance_against_captum(name, build(), L, runs, steps)
            bar.update()
        # transformers' backward through its loop grows with the square of L: a smaller model, once
        rows += relevance_against_captum(f"Mamba 2 x {width // 2}", mamba(2, width // 2), long, 0, 0)
        bar.update()
    return rows + relevance_memories([64] if quick else [2048, 4096], 256 if quick else 16384)


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller sizes")
    parser.add_argument("--memory", nargs=2, type=int, metavar=("L", "WIDTH"), help=argparse.SUPPRESS)
    parser.add_argument("--relevance-memory", nargs=2, metavar=("WHAT", "L"), help=argparse.SUPPRESS)
    parser.add_argument("--relevance", action="store_true", help="of relevance alone")
    options = parser.parse_args()
    if options.memory:
        print(rectified_memory(*options.memory))
        return
    if options.relevance_memory:
        print(relevance_memory(options.relevance_memory[0], int(options.relevance_memory[1])))
        return
    rows = [] if options.relevance else rows_of_attribution(options.quick)
    rows += rows_of_relevance(options.quick)
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    for what, wanted, measured in rows:
        print(f"{what:<94} {wanted:<18} {measured}")


if __name__ == "__main__":
    main()
