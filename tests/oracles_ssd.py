"""The layers of Mamba-2 and of the hybrid models with Mamba layers, written out token by token, for the tests.

As in ``oracles``: nothing here is fast, nothing is taken from captum_ssm, and each loop is an index of the equation.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracles import conv, conv_matrix, diagonal_matrix, published_alpha, times

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


class Pieces(NamedTuple):
    """A layer given its gates: ``y = out diag(gate) [alpha + diag(skip)] diag(act) conv into diag(real) x + bias``."""

    real: Tensor  # (B, L, 1), 0 at padding
    into: Tensor  # (D, E)
    taps: Tensor  # (D, K)
    act: Tensor  # (B, L, D), the quotient of the activation, and 0 at padding
    alpha: Tensor  # (B, D, L, L), the recurrence without its skip
    skip: Tensor  # (D,)
    gate: Tensor  # (B, L, D), the gate times the scale of the norm
    out: Tensor  # (E, D)
    y: Tensor  # (B, L, E), the layer's output, biases included


def scan(pieces: Pieces) -> Tensor:
    """Return ``alpha + diag(skip)``, (B, D, L, L)."""
    return pieces.alpha + diagonal_matrix(pieces.skip.expand_as(pieces.gate))


def core(pieces: Pieces) -> Tensor:
    """Return ``diag(gate) [alpha + diag(skip)] diag(act) conv``, (B, D, L, L)."""
    taps = conv_matrix(pieces.taps, pieces.act.shape[1])
    return diagonal_matrix(pieces.gate) @ scan(pieces) @ diagonal_matrix(pieces.act) @ taps


def operator(pieces: Pieces) -> Tensor:
    """Return the whole layer's matrix from token j, input f to token i, output e: (B, L, E, L, E)."""
    return torch.einsum("ed,bdij,df,bj->biejf", pieces.out, core(pieces), pieces.into, pieces.real[..., 0])


def ssd_alpha(delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Return the hidden attention of SSD of one example, head by head.

    ``alpha[h, i, j] = <C_i, B_j> (prod_{j < k <= i} exp(delta_kh A_h)) delta_jh`` with B and C of the head's group

    Args:
        delta: Step sizes (L, H).
        A: Continuous decays (H,), negative.
        B: Input weights (L, G, N): heads 0 to H/G - 1 are of the first group.
        C: Read-out weights (L, G, N).

    Returns:
        (H, L, L), lower triangular.
    """
    L, H = delta.shape
    alpha = delta.new_zeros(H, L, L)
    for h in range(H):
        g = h * B.shape[1] // H
        for i in range(L):
            decay = delta.new_ones(())
            for j in range(i, -1, -1):
                alpha[h, i, j] = (C[i, g] @ B[j, g]) * decay * delta[j, h]
                decay = decay * torch.exp(delta[j, h] * A[h])
    return alpha


def rms_scale(y: Tensor, weight: Tensor, eps: float, groups: int = 1) -> Tensor:
    """Return what an RMS norm multiplies ``y`` (B, L, D) by, token by token, group of consecutive channels by group."""
    scale = torch.zeros_like(y)
    P = y.shape[-1] // groups
    for t in range(y.shape[1]):
        for g in range(groups):
            some = slice(g * P, (g + 1) * P)
            mean = y[:, t, some].square().sum(-1, keepdim=True) / P
            scale[:, t, some] = weight[some] / (mean + eps).sqrt()
    return scale


def quotient(v: Tensor, pre: Tensor) -> Tensor:
    """Return what the activation multiplies its input by; 0 at padding, where ``v`` is 0 and ``pre`` may be."""
    return torch.where(v == 0, 0, v / pre)


def ssd(mixer: Any, x: Tensor, mask: Tensor | None = None, multipliers: list[float] | None = None) -> Pieces:
    """Return a Mamba-2 layer, straight from its parameters, in the type of ``x``.

    Args:
        mixer: Any of the six classes of layers.
        x: Its input (B, L, E).
        mask: (B, L), 0 at padding.
        multipliers: Falcon-H1's five, of z, x, B, C and delta; transformers keeps them in float32.
    """
    p = {name: parameter.detach().to(x.dtype) for name, parameter in mixer.named_parameters()}
    D, H, G, N = mixer.intermediate_size, mixer.num_heads, mixer.n_groups, mixer.ssm_state_size
    real = torch.ones_like(x[..., :1]) if mask is None else mask.to(x.dtype).unsqueeze(-1)

    inner = getattr(mixer, "ssm_in_multiplier", 1.0)
    rows = p["in_proj.weight"].split([D, D, G * N, G * N, H])
    biases = p.get("in_proj.bias", x.new_zeros(2 * D + 2 * G * N + H)).split([D, D, G * N, G * N, H])
    scales = torch.tensor(multipliers or [1.0] * 5, dtype=torch.float32).to(x.dtype)
    z, into, b, c, dt = (m * ((inner * real * x) @ W.T + w) for m, W, w in zip(scales, rows, biases, strict=True))

    pre = conv(torch.cat([into, b, c], dim=-1), p["conv1d.weight"][:, 0], p.get("conv1d.bias"))
    post = ACTIVATIONS[mixer.activation](pre) * real
    v, b, c = post.split([D, G * N, G * N], dim=-1)
    low, high = mixer.time_step_limit
    delta = F.softplus(dt + p["dt_bias"])
    delta = torch.where(delta < low, low, torch.where(delta > high, high, delta))
    b, c = b.unflatten(-1, (G, N)), c.unflatten(-1, (G, N))
    alpha = torch.stack([ssd_alpha(*e[:1], -p["A_log"].exp(), *e[1:]) for e in zip(delta, b, c, strict=True)])
    alpha, skip = alpha.repeat_interleave(D // H, dim=1), p["D"].repeat_interleave(D // H)

    y = times(alpha, v) + skip * v
    gate = z * torch.sigmoid(z)
    if "norm.weight" in p:
        normed = y if getattr(mixer.norm, "norm_before_gate", False) else y * gate
        gate = gate * rms_scale(normed, p["norm.weight"], mixer.norm.variance_epsilon, G)
    return Pieces(
        real=real,
        into=scales[1] * inner * rows[1],
        taps=p["conv1d.weight"][:D, 0],
        act=quotient(v, pre[..., :D]),
        alpha=alpha,
        skip=skip,
        gate=gate,
        out=p["out_proj.weight"],
        y=(gate * y) @ p["out_proj.weight"].T + p.get("out_proj.bias", 0),
    )


def hybrid_s6(mixer: Any, x: Tensor, mask: Tensor | None = None) -> Pieces:
    """Return the Mamba layer of Jamba or Zamba, straight from its parameters, in the type of ``x``."""
    p = {name: parameter.detach().to(x.dtype) for name, parameter in mixer.named_parameters()}
    D, N, R = mixer.intermediate_size, mixer.ssm_state_size, mixer.time_step_rank
    real = torch.ones_like(x[..., :1]) if mask is None else mask.to(x.dtype).unsqueeze(-1)
    jamba = "x_proj.weight" in p
    value, gate = (slice(0, D), slice(D, 2 * D)) if jamba else (slice(0, None, 2), slice(1, None, 2))

    both = (x * real) @ p["in_proj.weight"].T + p.get("in_proj.bias", x.new_zeros(2 * D))
    pre = conv(both[..., value], p["conv1d.weight"][:, 0], p.get("conv1d.bias"))
    v = ACTIVATIONS[mixer.activation](pre) * real
    z = both[..., gate]
    if jamba:
        read, step, bias, A_log, skip = (
            p[name].unsqueeze(0) for name in ("x_proj.weight", "dt_proj.weight", "dt_proj.bias", "A_log", "D")
        )
    else:
        read, step, bias, A_log, skip = (
            p[name] for name in ("x_proj_weight", "dt_proj_weight", "dt_proj_bias", "A_log", "D")
        )
    H, P = bias.shape
    alphas = []
    for h in range(H):  # each head is a Mamba of its own
        low, b, c = (v[..., h * P : (h + 1) * P] @ read[h].T).split([R, N, N], dim=-1)
        if jamba:
            low, b, c = (
                part * rms_scale(part, p[f"{name}_layernorm.weight"], mixer.dt_layernorm.variance_epsilon)
                for name, part in (("dt", low), ("b", b), ("c", c))
            )
        delta = F.softplus(low @ step[h].T + bias[h])
        A = -A_log[h].exp()
        alphas.append(torch.stack([published_alpha(delta[e], A, b[e], c[e]) for e in range(len(x))]))
    alpha = torch.cat(alphas, dim=1)
    gated = z * torch.sigmoid(z)
    y = (times(alpha, v) + skip.flatten() * v) * gated
    return Pieces(
        real=real,
        into=p["in_proj.weight"][value],
        taps=p["conv1d.weight"][:, 0],
        act=quotient(v, pre),
        alpha=alpha,
        skip=skip.flatten(),
        gate=gated,
        out=p["out_proj.weight"],
        y=y @ p["out_proj.weight"].T + p.get("out_proj.bias", 0),
    )
