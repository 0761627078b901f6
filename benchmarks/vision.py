"""Time of a rollout of both directions of a Vision Mamba, in forward passes of the same model.

    python -m benchmarks.vision      a model of the size of Vim-tiny, less than a minute on one core

Both sides of each ratio are timed in turn in one process. The forward pass is that of ``tutorials/vision_mamba.py``,
without a graph. Weights are random; speed does not depend on them.
"""

from __future__ import annotations

from functools import partial

import torch

from benchmarks.speed import compare
from captum_ssm import ImplicitAttentionAttribution, ImplicitAttentionRelevance, ImplicitAttentionRollout
from tutorials.vision_mamba import VisionMamba


def main() -> None:
    """Print the table."""
    torch.manual_seed(0)
    model, image = VisionMamba().eval(), torch.randn(1, 3, 224, 224)
    methods = {
        "rollout, fusion='mean'": ImplicitAttentionRollout(model, fusion="mean"),
        "rollout, fusion='absolute'": ImplicitAttentionRollout(model),
        "attribution, rectify=None": ImplicitAttentionAttribution(model, rectify=None),
        "attribution, rectify='channel'": ImplicitAttentionAttribution(model),
        "relevance, frozen gates": ImplicitAttentionRelevance(model),
    }

    def forward() -> None:
        with torch.no_grad():
            model(image)

    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s), 24 layers of width 192, 197 tokens")
    for name, method in methods.items():
        ours, own = compare(partial(method.attribute, image, target=5), forward, runs=3)
        print(f"{name:<32} {ours / own:5.1f} x the forward's {own:.2f} s")


if __name__ == "__main__":
    main()
