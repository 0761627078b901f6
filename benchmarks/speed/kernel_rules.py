"""Relevance of models whose layers are known by their kernels alone, against the same models through adapters.

Each model is built twice with the same weights: its layers have the name of a class that has an adapter, or another
one, so that only the functions that they call are known. These are the packages' references, past torch's functions.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from captum.attr import IntegratedGradients
from torch import Tensor, nn

from benchmarks.speed.figures import Figure
from benchmarks.speed.timing import best
from captum_ssm import ImplicitAttentionRelevance
from tests.stand_in_kernels import hidden

N, K, HEAD = 16, 4, 32


def scan_by_token(a: Tensor, x: Tensor, c: Tensor) -> Tensor:
    """Run ``h_t = a_t h_{t-1} + x_t``, ``y_t = <c_t, h_t>`` for (B, L, D, N), token by token, as the references do."""
    h, ys = torch.zeros_like(x[:, 0]), []
    for a_t, x_t, c_t in zip(a.unbind(1), x.unbind(1), c.unbind(1)):
        h = a_t * h + x_t
        ys.append((h * c_t).sum(-1))
    return torch.stack(ys, 1)


def _selective_scan(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Any = None, z: Any = None, delta_bias: Any = None,
    delta_softplus: bool = False,
) -> Tensor:  # fmt: skip
    step = F.softplus((delta + delta_bias[:, None]).mT if delta_softplus else delta.mT).unsqueeze(-1)
    inner = scan_by_token((step * A).exp(), step * B.mT.unsqueeze(2) * u.mT.unsqueeze(-1), C.mT.unsqueeze(2)).mT
    return (inner + D[:, None] * u) * F.silu(z)


def _chunk_scan(
    x: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, chunk_size: int, D: Any = None, dt_bias: Any = None,
    dt_softplus: bool = False,
) -> Tensor:  # fmt: skip
    step = F.softplus(dt + dt_bias)[..., None, None]  # (B, L, H, 1, 1)
    b, c = B.unsqueeze(3), C.unsqueeze(3)  # (B, L, 1, 1, N)
    return scan_by_token((step * A[:, None, None]).exp(), step * b * x.unsqueeze(-1), c) + D[:, None] * x


def _causal_conv1d(x: Tensor, weight: Tensor, bias: Any = None, activation: Any = None) -> Tensor:
    y = F.conv1d(x, weight.unsqueeze(1), bias, padding=K - 1, groups=len(weight))[..., : x.shape[-1]]
    return F.silu(y)


selective_scan_fn = hidden("selective_scan_fn", _selective_scan)
mamba_chunk_scan_combined = hidden("mamba_chunk_scan_combined", _chunk_scan)
causal_conv1d_fn = hidden("causal_conv1d_fn", _causal_conv1d)


def s6(self: Any, x: Tensor) -> Tensor:
    """Run a layer of Mamba, (B, L, E), by the functions of its package."""
    u, z = self.in_proj(x).mT.chunk(2, dim=1)
    u = causal_conv1d_fn(u, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu")
    low, b, c = self.x_proj(u.mT).split([self.dt_proj.in_features, N, N], dim=-1)
    delta = (low @ self.dt_proj.weight.T).mT
    A = -self.A_log.exp()
    y = selective_scan_fn(u, delta, A, b.mT, c.mT, self.D, z, self.dt_proj.bias, delta_softplus=True)
    return self.out_proj(y.mT)


def ssd(self: Any, x: Tensor) -> Tensor:
    """Run a layer of Mamba-2, (B, L, E), by the functions of its package."""
    D, H = self.out_proj.in_features, len(self.A_log)
    z, u, dt = self.in_proj(x).split([D, D + 2 * N, H], dim=-1)
    u = causal_conv1d_fn(u.mT, self.conv1d.weight.squeeze(1), self.conv1d.bias, "silu").mT
    v, b, c = u.split([D, N, N], dim=-1)
    y = mamba_chunk_scan_combined(
        v.unflatten(-1, (H, -1)), dt, -self.A_log.exp(), b.unsqueeze(2), c.unsqueeze(2), 64, self.D, self.dt_bias, True
    ).flatten(2)
    return self.out_proj(y * F.silu(z))


def mixer(name: str, E: int, two: bool) -> Any:
    """Return a random layer whose class has this name, laid out as that of mamba_ssm."""
    D = 2 * E
    H, conv = D // HEAD, D + 2 * N if two else D
    layer: Any = type(name, (nn.Module,), {"forward": ssd if two else s6})()
    layer.in_proj = nn.Linear(E, D + conv + H if two else 2 * D, bias=False)
    layer.conv1d = nn.Conv1d(conv, conv, K, groups=conv, padding=K - 1)
    layer.out_proj = nn.Linear(D, E, bias=False)
    layer.D, layer.activation = nn.Parameter(torch.ones(H if two else D)), "silu"
    rates = torch.arange(1.0, H + 1) if two else torch.arange(1.0, N + 1).expand(D, N)
    layer.A_log = nn.Parameter(rates.log())
    if two:
        layer.dt_bias, layer.ngroups, layer.dt_limit = nn.Parameter(torch.zeros(H)), 1, (0.0, float("inf"))
    else:
        layer.x_proj, layer.dt_proj = nn.Linear(D, E // 16 + 2 * N, bias=False), nn.Linear(E // 16, D)
    return layer


class Model(nn.Module):
    """A residual stack of layers between norms, with scores read at the last token."""

    def __init__(self, name: str, layers: int, E: int, two: bool) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.RMSNorm(E, eps=1e-5) for _ in range(layers))
        self.mixers = nn.ModuleList(mixer(name, E, two) for _ in range(layers))
        self.head = nn.Linear(E, 10)
        self.eval()

    def forward(self, x: Tensor) -> Tensor:
        """Return ten scores of each example of ``x`` (B, L, E)."""
        for norm, layer in zip(self.norms, self.mixers):
            x = x + layer(norm(x))
        return self.head(x[:, -1])


def measure(two: bool, L: int, layers: int, E: int, rounds: int) -> Iterator[Figure]:
    """Time the same model by its functions, through its adapters, and by integrated gradients of 50 steps."""
    torch.manual_seed(0)
    known, unknown = (Model(name, layers, E, two) for name in ("Mamba2" if two else "Mamba", "OnesOwn"))
    unknown.load_state_dict(known.state_dict())
    x, reference = torch.randn(2, 1, L, E)
    methods = [ImplicitAttentionRelevance(model) for model in (unknown, known)]
    kernel, adapter = (partial(method.attribute, x, 1, baselines=reference) for method in methods)
    times = best({"kernel": kernel, "adapter": adapter}, rounds)
    gradient = partial(IntegratedGradients(unknown).attribute, x, reference, target=1, internal_batch_size=1)
    steps = 50 / 5 * best({"path": partial(gradient, n_steps=5)}, 1)["path"]
    of = f"`{'mamba_chunk_scan_combined' if two else 'selective_scan_fn'}`, {layers} × {E}, L {L}"
    what = "relevance of layers that are known by their kernels alone"
    yield Figure("kernel rules", what, "the adapters of the same layers", of, 1.3, times["kernel"] / times["adapter"])
    yield Figure("kernel rules", what, "`IntegratedGradients`, 50 steps", of, 1 / 20, times["kernel"] / steps)


def kernel_rules(quick: bool) -> Iterator[Figure]:
    """Measure a model with the layers of Mamba, and one with those of Mamba-2."""
    L, layers, E, rounds = (128, 2, 64, 3) if quick else (512, 4, 128, 4)
    for two in (False, True):
        yield from measure(two, L, layers, E, rounds)
