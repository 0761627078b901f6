"""mamba_ssm's layers written out token by token and head by head, from their parameters alone."""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def named(layer: Any, x: Tensor) -> dict[str, Tensor]:
    return {name: tensor.detach().to(x) for name, tensor in layer.named_parameters()}


def linear(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = x @ p[f"{name}.weight"].T
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def convolved(p: dict[str, Tensor], x: Tensor) -> Tensor:
    """A depthwise convolution, one tap of one token after the other."""
    w = p["conv1d.weight"].squeeze(1)
    y = torch.zeros_like(x)
    for t in range(len(x)):
        for k in range(w.shape[1]):
            s = t - (w.shape[1] - 1) + k
            if s >= 0:
                y[t] += w[:, k] * x[s]
    return y + p["conv1d.bias"] if "conv1d.bias" in p else y


def rms(x: Tensor, eps: float) -> Tensor:
    return x / math.sqrt(float((x * x).mean()) + eps)


def mamba(layer: Any, x: Tensor) -> Tensor:
    """S6: each channel its own state, decays, input and output."""
    p, R, N = named(layer, x), layer.dt_rank, layer.d_state
    u, z = linear(p, "in_proj", x).chunk(2, -1)
    u = F.silu(convolved(p, u))
    y = torch.zeros_like(u)
    for d in range(u.shape[1]):
        h = x.new_zeros(N)
        for t in range(len(u)):
            low, b, c = (u[t] @ p["x_proj.weight"].T).split([R, N, N])
            delta = F.softplus(low @ p["dt_proj.weight"][d] + p["dt_proj.bias"][d])
            h = (-delta * p["A_log"][d].exp()).exp() * h + delta * b * u[t, d]
            y[t, d] = c @ h + p["D"][d] * u[t, d]
    return linear(p, "out_proj", y * F.silu(z))


def mamba2(layer: Any, x: Tensor) -> Tensor:
    """SSD, head by head; the channels of a gated MLP come first."""
    p, simple = named(layer, x), not hasattr(layer, "d_ssm")
    N, G, P, H = layer.d_state, layer.ngroups, layer.headdim, layer.nheads
    D = H * P
    M = layer.d_inner - D
    z0, x0, z, u, low = linear(p, "in_proj", x).split([M, M, D, D + 2 * G * N, H], -1)
    v, b, c = F.silu(convolved(p, u)).split([D, G * N, G * N], -1)
    y = torch.zeros_like(v)
    for h in range(H):
        g, state = h * G // H, x.new_zeros(N, P)
        for t in range(len(x)):
            head = slice(h * P, (h + 1) * P)
            bt, ct = (w[t, g * N : (g + 1) * N] for w in (b, c))
            delta = F.softplus(low[t, h] + p["dt_bias"][h]).clamp(*layer.dt_limit)
            state = (-delta * p["A_log"][h].exp()).exp() * state + delta * torch.outer(bt, v[t, head])
            skip = p["D"][head] if len(p["D"]) > H or P == 1 else p["D"][h]
            y[t, head] = ct @ state + skip * v[t, head]
    groups = 1 if simple and not layer.use_mem_eff_path else G
    for t in range(len(x)):
        gate = F.silu(z[t])
        if "norm.weight" not in p:
            y[t] = y[t] * gate
            continue
        before = layer.norm.norm_before_gate
        parts = (y[t] if before else y[t] * gate).chunk(groups)
        normed = torch.cat([rms(part, layer.norm.eps) for part in parts]) * p["norm.weight"]
        y[t] = normed * gate if before else normed
    return linear(p, "out_proj", torch.cat([F.silu(z0) * x0, y], -1))


def mamba3_alpha(layer: Any, x: Tensor) -> Tensor:
    """The attention of each head (H, L, L) by its closed form, every decay a product over the tokens in between."""
    p, N, G, H, D = named(layer, x), layer.d_state, layer.num_bc_heads, layer.nheads, layer.d_inner
    L, A = len(x), layer.num_rope_angles
    sizes = [2 * D, G * N, G * N, H, H, H, A]
    _, b, c, low, rate, mix, turn = linear(p, "in_proj", x).split(sizes, -1)
    delta, mix = F.softplus(low + p["dt_bias"]), mix.sigmoid()
    a = (delta * (-F.softplus(rate)).clamp(max=-layer.A_floor)).exp()
    alpha = x.new_zeros(H, L, L)
    for h in range(H):
        rows = []
        for name, read in (("C", c), ("B", b)):
            angle, turned = x.new_zeros(A), x.new_zeros(L, N)
            for t in range(L):
                angle = angle + math.pi * turn[t].tanh() * delta[t, h]
                w = read[t].view(G, N)[h * G // H]
                w = rms(w, getattr(layer, f"{name}_norm").eps) * p[f"{name}_norm.weight"] + p[f"{name}_bias"][h, 0]
                turned[t] = w
                for k in range(A):
                    e, f = w[2 * k], w[2 * k + 1]
                    turned[t, 2 * k] = e * angle[k].cos() - f * angle[k].sin()
                    turned[t, 2 * k + 1] = e * angle[k].sin() + f * angle[k].cos()
            rows.append(turned)
        for t in range(L):
            for s in range(t + 1):
                weight = mix[s, h] * delta[s, h]
                if s < t:
                    weight = weight + (1 - mix[s + 1, h]) * delta[s + 1, h]
                alpha[h, t, s] = rows[0][t] @ rows[1][s] * a[s + 1 : t + 1, h].prod() * weight
            alpha[h, t, t] += p["D"][h]
    return alpha


def mamba3(layer: Any, x: Tensor) -> Tensor:
    p, D, P = named(layer, x), layer.d_inner, layer.headdim
    z, v = linear(p, "in_proj", x)[:, : 2 * D].chunk(2, -1)
    alpha = mamba3_alpha(layer, x)
    y = torch.cat([alpha[h] @ v[:, h * P : (h + 1) * P] for h in range(layer.nheads)], -1)
    if layer.is_outproj_norm:
        y = torch.stack([torch.cat([rms(head, layer.norm.eps) for head in row.split(P)]) for row in y])
        y = y * p["norm.weight"]
    return linear(p, "out_proj", y * F.silu(z))


def attention(layer: Any, x: Tensor) -> Tensor:
    """Softmax attention, one query and one key after the other."""
    p, H, P, G, L = named(layer, x), layer.num_heads, layer.head_dim, layer.num_heads_kv, len(x)
    M = layer.mlp_dim // 2
    read, up, gate = linear(p, "in_proj", x).split([(H + 2 * G) * P, M, M], -1)
    read = convolved(p, read) if layer.d_conv else read
    q, k, v = (t.unflatten(-1, (-1, P)) for t in read.split([H * P, G * P, G * P], -1))
    if layer.rotary_emb_dim:
        q, k = (turned(t, layer.rotary_emb_dim, layer.rotary_emb.base, layer.rotary_emb.interleaved) for t in (q, k))
    y = x.new_zeros(L, H, P)
    for h in range(H):
        g = h * G // H
        for i in range(L):
            keys = range(i + 1 if layer.causal else L)
            weights = torch.stack([(q[i, h] @ k[j, g] * (layer.softmax_scale or P**-0.5)).exp() for j in keys])
            y[i, h] = sum(w / weights.sum() * v[j, g] for w, j in zip(weights, keys))
    return linear(p, "out_proj", torch.cat([y.flatten(1), up * F.silu(gate)], -1))


def turned(t: Tensor, size: int, base: float, interleaved: bool) -> Tensor:
    """Queries or keys (L, H, P) with the pairs of their first entries turned by position times frequency."""
    y = t.clone()
    for k in range(size // 2):
        first, second = (2 * k, 2 * k + 1) if interleaved else (k, k + size // 2)
        for i in range(len(t)):
            angle = i / base ** (2 * k / size)
            y[i, :, first] = t[i, :, first] * math.cos(angle) - t[i, :, second] * math.sin(angle)
            y[i, :, second] = t[i, :, first] * math.sin(angle) + t[i, :, second] * math.cos(angle)
    return y
