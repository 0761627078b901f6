"""RG-LRU, WKV-4, mLSTM and short convolutions by their papers' sums, one pair of tokens at a time.

Nothing here is taken from captum_ssm. Each function returns, for a layer of transformers and its input ``x``
(B, L, E) in float64, a dictionary of

* ``alpha``: the matrices (B, D, L, L) of the recurrence alone,
* ``operator``: the whole layer given its gates, (B, L·E, L·E), without constants,
* ``y``: its output (B, L, E).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.oracles import conv, conv_matrix, diagonal_matrix, times


def weights(mixer: nn.Module, x: Tensor) -> dict[str, Tensor]:
    return {name: parameter.detach().to(x.dtype) for name, parameter in mixer.named_parameters()}


def by_channel(matrices: Tensor) -> Tensor:
    """Return one matrix (B, L·D, L·D) that applies to each channel its own of (B, D, L, L)."""
    B, D, L, _ = matrices.shape
    whole = matrices.new_zeros(B, L, D, L, D)
    for d in range(D):
        whole[:, :, d, :, d] = matrices[:, d]
    return whole.reshape(B, L * D, L * D)


def by_token(W: Tensor, L: int) -> Tensor:
    """Return one matrix (L·D, L·E) that applies ``W`` (D, E) to each of L tokens."""
    return torch.kron(torch.eye(L, dtype=W.dtype), W)


def shifted(x: Tensor, mix: Tensor) -> Tensor:
    """Return ``mix x_t + (1 - mix) x_{t-1}``, with 0 before the first token."""
    y = torch.zeros_like(x)
    for t in range(x.shape[1]):
        before = x[:, t - 1] if t else torch.zeros_like(x[:, 0])
        y[:, t] = mix.flatten() * x[:, t] + (1 - mix.flatten()) * before
    return y


def shift_matrix(mix: Tensor, B: int, L: int) -> Tensor:
    """Return the matrices (B, E, L, L) of :func:`shifted`."""
    matrix = mix.new_zeros(B, mix.numel(), L, L)
    for t in range(L):
        matrix[:, :, t, t] = mix.flatten()
        if t:
            matrix[:, :, t, t - 1] = 1 - mix.flatten()
    return matrix


def rg_lru(mixer: Any, x: Tensor, position_ids: Tensor) -> dict[str, Tensor]:
    """``alpha[i, j] = (prod_{j < k <= i} a_k) scale_j i_j``."""
    p = weights(mixer, x)
    B, L, _ = x.shape
    u = conv(x @ p["linear_x.weight"].T + p["linear_x.bias"], p["conv_1d.weight"][:, 0], p["conv_1d.bias"])
    gates = {}
    for name in ("recurrent", "input"):
        blocks, biases = p[f"rg_lru.{name}_gate_weight"], p[f"rg_lru.{name}_gate_bias"].flatten()
        gates[name] = 1 / (1 + torch.exp(-(u @ torch.block_diag(*blocks) + biases)))
    a = torch.exp(-8 * gates["recurrent"] * torch.log1p(torch.exp(p["rg_lru.recurrent_param"])))
    scale = (1 - a * a).sqrt()
    positions = position_ids.expand(B, L)
    D = u.shape[-1]
    alpha = u.new_zeros(B, D, L, L)
    for b in range(B):
        for i in range(L):
            decay = torch.ones_like(a[0, 0])
            for j in range(i, -1, -1):
                start = bool(positions[b, j] == 0)
                alpha[b, :, i, j] = decay * gates["input"][b, j] * (1 if start else scale[b, j])
                decay = decay * (0 if start else a[b, j])
    gate = mixer.act_fn(x @ p["linear_y.weight"].T + p["linear_y.bias"])
    y = (times(alpha, u) * gate) @ p["linear_out.weight"].T + p["linear_out.bias"]
    core = diagonal_matrix(gate) @ alpha @ conv_matrix(p["conv_1d.weight"][:, 0], L)
    operator = by_token(p["linear_out.weight"], L) @ by_channel(core) @ by_token(p["linear_x.weight"], L)
    return {"alpha": alpha, "operator": operator, "y": y}


def wkv(mixer: Any, x: Tensor) -> dict[str, Tensor]:
    """Row i of ``alpha`` is the softmax of ``k_j - (i - 1 - j) w``, j < i, and ``k_i + bonus``."""
    p = weights(mixer, x)
    B, L, _ = x.shape
    k, v, r = (shifted(x, p[f"time_mix_{n}"]) @ p[f"{n}.weight"].T for n in ("key", "value", "receptance"))
    w, bonus = p["time_decay"].exp(), p["time_first"]
    alpha = k.new_zeros(B, k.shape[-1], L, L)
    for i in range(L):
        exponents = [k[:, j] - (i - 1 - j) * w for j in range(i)] + [k[:, i] + bonus]
        alpha[:, :, i, : i + 1] = torch.stack(exponents, dim=-1).softmax(-1)
    gate = 1 / (1 + torch.exp(-r))
    y = (times(alpha, v) * gate) @ p["output.weight"].T
    operator = by_token(p["output.weight"], L) @ by_channel(diagonal_matrix(gate) @ alpha)
    operator = operator @ by_token(p["value.weight"], L) @ by_channel(shift_matrix(p["time_mix_value"], B, L))
    return {"alpha": alpha, "operator": operator, "y": y}


def channel_mix(mixer: Any, x: Tensor) -> dict[str, Tensor]:
    """``y = sigmoid(r) * W_v max(k, 0)²``; ``alpha`` is the token shift."""
    p = weights(mixer, x)
    B, L, _ = x.shape
    k, r = (shifted(x, p[f"time_mix_{n}"]) @ p[f"{n}.weight"].T for n in ("key", "receptance"))
    positive, gate = k.clamp(min=0), 1 / (1 + torch.exp(-r))
    y = gate * ((positive * positive) @ p["value.weight"].T)
    alpha = shift_matrix(p["time_mix_key"], B, L)
    operator = by_channel(diagonal_matrix(gate)) @ by_token(p["value.weight"], L)
    operator = operator @ by_channel(diagonal_matrix(positive)) @ by_token(p["key.weight"], L) @ by_channel(alpha)
    return {"alpha": alpha, "operator": operator, "y": y}


def mlstm(mixer: Any, x: Tensor) -> dict[str, Tensor]:
    """``alpha[i, j] = (q_i . k_j / sqrt(N)) (prod_{j < k <= i} f_k) exp(i_j) / (max(|sum|, 1) + eps exp(m_i))``.

    The denominator is the paper's but for eps, which transformers adds to numbers divided by ``exp(m)``.
    """
    p, config = weights(mixer, x), mixer.config
    B, L, _ = x.shape
    H, cap = config.num_heads, config.gate_soft_cap
    if "qkv_opreact.weight" in p:
        both = F.linear(x, p["qkv_opreact.weight"], p.get("qkv_opreact.bias"))
        q, k, v, o = both.split([mixer.qk_dim, mixer.qk_dim, mixer.v_dim, mixer.v_dim], dim=-1)
        gates = x @ p["ifgate_preact.weight"].T + p["ifgate_preact.bias"]
        i_gate, f_gate = gates[..., :H], gates[..., H:]
        value = p["qkv_opreact.weight"][2 * mixer.qk_dim : 2 * mixer.qk_dim + mixer.v_dim]
    else:
        q, k, v, o = (F.linear(x, p[f"{n}.weight"], p.get(f"{n}.bias")) for n in ("q", "k", "v", "ogate_preact"))
        i_gate, f_gate = (x @ p[f"{n}gate_preact.weight"].T + p[f"{n}gate_preact.bias"] for n in "if")
        value = p["v.weight"]
    i_gate, f_gate = (cap * torch.tanh(g / cap) for g in (i_gate, f_gate))
    log_f = -torch.log1p(torch.exp(-f_gate))
    q, k = (t.unflatten(-1, (H, -1)) for t in (q, k))
    P = mixer.v_dim // H

    alpha = x.new_zeros(B, H, L, L)
    m = x.new_zeros(B, H)
    for t in range(L):
        m = torch.maximum(m + log_f[:, t], i_gate[:, t])
        log_decay = torch.zeros_like(m)
        for j in range(t, -1, -1):
            score = (q[:, t] * k[:, j]).sum(-1) / q.shape[-1] ** 0.5
            alpha[:, :, t, j] = score * torch.exp(log_decay + i_gate[:, j])
            log_decay = log_decay + log_f[:, j]
        total = alpha[:, :, t].sum(-1).abs().clamp(min=1) + config.eps * torch.exp(m)
        alpha[:, :, t] /= total.unsqueeze(-1)
    alpha = alpha.repeat_interleave(P, dim=1)

    h = times(alpha, v).unflatten(-1, (H, P))
    deviation = h - h.mean(-1, keepdim=True)
    std = ((deviation * deviation).mean(-1, keepdim=True) + mixer.multihead_norm.eps).sqrt()
    gate = 1 / (1 + torch.exp(-o))
    normed = (deviation / std).flatten(-2) * p["multihead_norm.weight"]
    if "multihead_norm.bias" in p:
        normed = normed + p["multihead_norm.bias"]
    y = F.linear(gate * normed, p["out_proj.weight"], p.get("out_proj.bias"))
    centring = torch.block_diag(*[torch.eye(P, dtype=x.dtype) - 1 / P] * H)
    scale = gate * p["multihead_norm.weight"] / std.expand_as(h).flatten(-2)
    operator = by_token(p["out_proj.weight"], L) @ by_channel(diagonal_matrix(scale)) @ by_token(centring, L)
    operator = operator @ by_channel(alpha) @ by_token(value, L)
    return {"alpha": alpha, "operator": operator, "y": y}


def short_conv(mixer: Any, x: Tensor, attention_mask: Tensor | None = None) -> dict[str, Tensor]:
    """``y = W_out (c * conv(b * v)) + bias``, with b, c and v the three thirds of one projection."""
    p = weights(mixer, x)
    B, L, E = x.shape
    real = torch.ones_like(x[..., :1]) if attention_mask is None else attention_mask.to(x.dtype).unsqueeze(-1)
    b, c, v = F.linear(x * real, p["in_proj.weight"], p.get("in_proj.bias")).split(E, dim=-1)
    taps = p["conv.weight"][:, 0]
    y = F.linear(c * conv(b * v, taps, p.get("conv.bias")), p["out_proj.weight"], p.get("out_proj.bias"))
    alpha = conv_matrix(taps, L).expand(B, -1, -1, -1)
    core = by_channel(diagonal_matrix(c) @ alpha @ diagonal_matrix(b))
    masked = by_channel(diagonal_matrix(real.expand_as(x)))
    operator = by_token(p["out_proj.weight"], L) @ core @ by_token(p["in_proj.weight"][2 * E :], L) @ masked
    return {"alpha": alpha, "operator": operator, "y": y}
