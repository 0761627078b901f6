"""What an explanation costs for each kernel, in forward and backward passes of the model itself.

    python -m benchmarks.families                    every kernel, about two minutes on one core
    python -m benchmarks.families --kernels SSD GDN  some of them, by the start of their names
    python -m benchmarks.families --quick            smaller sizes, for a look

Only ratios are meant to be quoted: the explanation and the model's own pass are timed in turn in the same process, on
the same input. The models are random and small; their heads and states have the sizes of published checkpoints.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from statistics import median
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.speed import seconds
from captum_ssm import ImplicitAttentionAttribution
from captum_ssm.operators import DeltaScan, Product, Recurrence, Scan

TARGET = 5
LAYERS = 4

COMMON: dict[str, Any] = {
    "vocab_size": 1000, "hidden_size": 256, "num_hidden_layers": LAYERS,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip
HEADS: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2, "intermediate_size": 768}
EXPERTS: dict[str, Any] = {"num_local_experts": 4, "num_experts_per_tok": 2}
GDN: dict[str, Any] = {
    "head_dim": 64, "linear_num_key_heads": 4, "linear_num_value_heads": 8, "linear_key_head_dim": 64,
    "linear_value_head_dim": 64,
}  # fmt: skip
LINEAR = {"layer_types": ["linear_attention"] * LAYERS}
HYBRID = {"layer_types": (["linear_attention"] * 3 + ["full_attention"]) * (LAYERS // 4)}

KERNELS: dict[str, tuple[str, dict[str, Any]]] = {
    "S6": ("Mamba", {"state_size": 16}),
    "SSD": ("Mamba2", {"state_size": 128, "num_heads": 8, "head_dim": 64, "n_groups": 1}),
    "RG-LRU": ("RecurrentGemma", {**HEADS, "lru_width": 256, "block_types": ["recurrent"]}),
    "WKV-4": ("Rwkv", {}),
    "mLSTM": ("xLSTM", {"num_heads": 2, "qk_dim_factor": 0.5, "v_dim_factor": 1.0}),
    "lightning": ("MiniMax", {**HEADS, **EXPERTS, **LINEAR, "head_dim": 64, "intermediate_size": 384}),
    "short convolution": ("Lfm2", {**HEADS, "layer_types": ["conv"] * LAYERS}),
    "GDN": ("Qwen3_5", {**HEADS, **GDN, **LINEAR}),
    "KDA": ("KimiLinear", {
        **HEADS, **EXPERTS, **LINEAR, "linear_num_heads": 4, "linear_head_dim": 64, "num_key_value_heads": 4,
        "kv_lora_rank": 64, "qk_nope_head_dim": 64, "qk_rope_head_dim": 32, "v_head_dim": 64,
        "moe_intermediate_size": 256}),
    "GDN and softmax": ("Qwen3_5", {**HEADS, **GDN, **HYBRID}),
    "SSD and softmax": ("Bamba", {
        **HEADS, "attn_layer_indices": [1, 3], "mamba_d_state": 128, "mamba_n_heads": 8, "mamba_d_head": 64}),
}  # fmt: skip
"""The name of a model in transformers and what its configuration has besides :data:`COMMON`, by kernel."""


def build(name: str, options: Mapping[str, Any]) -> nn.Module:
    """Return a random model."""
    torch.manual_seed(0)
    config = getattr(hf, f"{name}TextConfig", None) or getattr(hf, f"{name}Config")
    return getattr(hf, f"{name}ForCausalLM")(config(**{**COMMON, **options})).eval()


def explanation_against_model(name: str, options: Mapping[str, Any], L: int, runs: int) -> tuple[str, str, str, str]:
    """Signed attribution against one forward and backward pass to the embeddings, on the same tokens.

    Returns:
        The median of the ratios, the spread of the ratios, the first call's additional time as a ratio, and the median
        times.
    """
    model: Any = build(name, options)
    ids = torch.randint(3, COMMON["vocab_size"], (1, L))
    embeddings = model.get_input_embeddings()(ids).detach().requires_grad_()
    signed = ImplicitAttentionAttribution(model, rectify=None)

    def explain() -> Tensor:
        return signed.attribute(ids, target=TARGET)

    def forward_and_backward() -> Tensor:
        score = model(inputs_embeds=embeddings, use_cache=False).logits[0, -1, TARGET]
        return torch.autograd.grad(score, embeddings)[0]

    forward_and_backward()
    first = seconds(explain)  # with the check of the model's structure, made once for each model
    pairs = [(seconds(explain), seconds(forward_and_backward)) for _ in range(runs)]
    ours, theirs = (median(times) for times in zip(*pairs))
    ratios = sorted(a / b for a, b in pairs)
    return (
        f"{median(ratios):.2f}",
        f"{ratios[len(ratios) // 4]:.2f} to {ratios[-1 - len(ratios) // 4]:.2f}",
        f"{(first - ours) / theirs:+.1f}",
        f"{1000 * ours:.0f} ms, {1000 * theirs:.0f} ms",
    )


def selective_scan(L: int, H: int, N: int) -> Scan:
    """Return a scan as Mamba's: H channels of N states, each with a decay of its own."""
    step = 0.1 * torch.rand(1, L, H, 1)
    return Scan(
        a=Product((step, -torch.arange(1.0, N + 1).expand(1, 1, H, N)), exponential=True),
        b=Product((step, torch.randn(1, L, 1, N))),
        c=torch.randn(1, L, 1, N),
    )


def delta_scan(L: int, H: int, N: int, decays: int) -> DeltaScan:
    """Return a delta rule of H heads of N states and as many channels, with 1 or N decays for each head."""
    k, q = (nn.functional.normalize(torch.randn(1, L, H, N), dim=-1) for _ in range(2))
    a, write = 1 - 0.1 * torch.rand(1, L, H, decays), torch.rand(1, L, H, 1) * k
    return DeltaScan(a=a, b=write, c=q, recall=a * k, erase=write, head_size=N)


SCANS: dict[str, Callable[[int], Recurrence]] = {
    "Scan, decays by state (S6: 256 channels, N 16)": lambda L: selective_scan(L, 256, 16),
    "DeltaScan, decays by head (GDN: 4 heads of 64, N 64)": lambda L: delta_scan(L, 4, 64, decays=1),
    "DeltaScan, decays by state (KDA: 4 heads of 64, N 64)": lambda L: delta_scan(L, 4, 64, decays=64),
}


def growth_of_apply(scan: Callable[[int], Recurrence], lengths: Iterable[int], runs: int) -> tuple[str, str]:
    """Exponent k of time ~ L^k of one product with a recurrence, by least squares over all lengths, and the times."""
    torch.manual_seed(0)
    products = {L: (operator := scan(L), torch.randn(1, L, operator.heads * operator.head_size)) for L in lengths}
    times: dict[int, list[float]] = {L: [] for L in products}
    for _ in range(runs + 1):
        for L, (operator, x) in products.items():
            times[L].append(seconds(partial(operator.apply, x)))
    medians = {L: median(taken[1:]) for L, taken in times.items()}  # the first of each warms up
    points = torch.tensor([[math.log(L), math.log(taken)] for L, taken in medians.items()])
    x, y = (points - points.mean(0)).unbind(1)
    shown = ", ".join(f"{L}: {1000 * taken:.0f} ms" for L, taken in medians.items())
    return f"{float((x * y).sum() / (x * x).sum()):.2f}", shown


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="smaller sizes")
    parser.add_argument("--kernels", nargs="*", default=[""], metavar="NAME", help="starts of kernels' names")
    options = parser.parse_args()
    L, runs, lengths = (64, 3, [64, 128, 256]) if options.quick else (256, 9, [512, 1024, 2048, 4096, 8192])
    torch.set_num_threads(1)
    hf.logging.set_verbosity_error()  # that kernels are not installed
    chosen = {name: model for name, model in KERNELS.items() if name.startswith(tuple(options.kernels))}
    with tqdm(total=len(chosen) + len(SCANS), desc="measuring", leave=False) as bar:
        rows = []
        for kernel, (name, config) in chosen.items():
            rows.append((kernel, name, *explanation_against_model(name, config, L, runs)))
            bar.update()
        growth = []
        for kernel, scan in SCANS.items():
            growth.append((kernel, *growth_of_apply(scan, lengths, 3 if options.quick else 5)))
            bar.update()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)\n")
    print(f"signed attribution of {L} tokens, {LAYERS} layers of 256, in forward and backward passes; wanted <= 3")
    heads = ("kernel", "model", "passes", "middle half", "first call", "medians")
    for row in (heads, *rows):
        print("{:<18} {:<15} {:>6}  {:<13} {:>10}  {}".format(*row))
    print("\ngrowth exponent of apply in L; wanted <= 1.15")
    for line in growth:
        print("{:<54} {:>5}  {}".format(*line))


if __name__ == "__main__":
    main()
