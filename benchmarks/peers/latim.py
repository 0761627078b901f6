"""LaTIM's decomposition of a Mamba-1 layer, restated: how much each token's values write into each output.

Source:
    Pitorro and Treviso, 2025 (arXiv 2502.15612): the output of a layer as a sum over source tokens, each measured by
    the length of what it adds. Where the paper approximates the activation behind the convolution, or trains a model
    without it, here it is its input times a sigmoid that is held, so the sum is the layer's output itself.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.methods import NotApplicableError, Question
from benchmarks.peers.peer import Explained


def latim(question: Question) -> Explained:
    """Return the lengths (B, L) of what each token writes into the last token's output of the last layer.

    Raises:
        NotApplicableError: If the model is no Mamba-1.
    """
    if type(question.model).__name__ != "MambaForCausalLM":
        raise NotApplicableError("The decomposition is restated for Mamba-1.")
    errors, lengths = [], torch.zeros(())
    with torch.no_grad():
        h = question.model.backbone.embeddings(question.inputs)
        for layer in question.model.backbone.layers:
            normed, before = layer.norm(h), h
            h = layer(h)
            if isinstance(h, tuple):
                h = h[0]
            y, parts, bias = h - before, *contributions(layer.mixer, normed)
            errors.append(float((parts.sum(2) + bias - y).abs().max() / y.abs().max()))
            lengths = parts[:, -1].norm(dim=-1)
    return Explained(lengths, layer=max(errors))


def contributions(mixer: Any, x: Tensor) -> tuple[Tensor, Tensor]:
    """Return what each token contributes to each output of a layer, in a loop over both.

    Args:
        mixer: The layer.
        x: Its input (B, L, E).

    Returns:
        The contributions (B, L, L, E), of token j to output i at [:, i, j], and what no token contributes, (B, L, E).
    """
    R, N = mixer.time_step_rank, mixer.ssm_state_size
    values, z = mixer.in_proj(x).chunk(2, dim=-1)
    before = convolved(mixer, values) + mixer.conv1d.bias
    held = torch.sigmoid(before)
    low, b, c = mixer.x_proj(held * before).split([R, N, N], dim=-1)
    delta = F.softplus(mixer.dt_proj(low))
    decay = torch.exp(delta[..., None] * -mixer.A_log.exp())
    gate = F.silu(z)

    def written(u: Tensor) -> Tensor:
        """Return the outputs (B, L, E) of the layer, all that is not a value being held, for these values (B, L, D)."""
        state, outputs = torch.zeros_like(decay[:, 0]), []
        for i in range(u.shape[1]):
            state = decay[:, i] * state + (delta * u)[:, i, :, None] * b[:, i, None]
            outputs.append((state * c[:, i, None]).sum(-1) + mixer.D * u[:, i])
        return torch.as_tensor(mixer.out_proj(gate * torch.stack(outputs, 1)))

    parts = []
    for j in range(x.shape[1]):
        only = torch.zeros_like(values)
        only[:, j] = values[:, j]
        parts.append(written(held * convolved(mixer, only)))
    return torch.stack(parts, 2), written(held * mixer.conv1d.bias)


def convolved(mixer: Any, values: Tensor) -> Tensor:
    """Return the causal convolution (B, L, D) of values (B, L, D), without its bias."""
    K, L = mixer.conv1d.weight.shape[-1], values.shape[1]
    padded = F.pad(values, (0, 0, K - 1, 0))
    return torch.stack([mixer.conv1d.weight[:, 0, k] * padded[:, k : k + L] for k in range(K)]).sum(0)
