"""The layers written out from their parameters, for one sequence (L, E): the matrix of each channel, and the output.

Every function returns the matrices (D, L, L) of the scan or of the attention, entry by entry, and the layer's output.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Written = tuple[Tensor, Tensor]


def named(layer: Any, x: Tensor) -> dict[str, Tensor]:
    return {name: tensor.detach().to(x) for name, tensor in layer.named_parameters() if not tensor.is_complex()}


def linear(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    y = x @ p[f"{name}.weight"].T
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def convolved(p: dict[str, Tensor], name: str, x: Tensor, ahead: int = 0) -> Tensor:
    """A depthwise convolution, one tap of one token after the other, that reads some tokens ahead."""
    w, L = p[f"{name}.weight"].squeeze(1), len(x)
    y = torch.zeros_like(x)
    for t in range(L):
        for k in range(w.shape[1]):
            s = t + ahead - (w.shape[1] - 1) + k
            if 0 <= s < L:
                y[t] += w[:, k] * x[s]
    return y + p[f"{name}.bias"] if f"{name}.bias" in p else y


def rms(x: Tensor, eps: float) -> Tensor:
    return x / math.sqrt(float((x * x).mean()) + eps)


def times(alpha: Tensor, v: Tensor) -> Tensor:
    """The sums over keys, channel by channel: (L, D)."""
    return torch.stack([alpha[d] @ v[:, d] for d in range(v.shape[1])], -1)


def s6(
    p: dict[str, Tensor], u: Tensor, end: str = "", norm: Any = None, names: tuple[str, str] = ("A_log", "D")
) -> Tensor:
    """The matrices of a selective scan, from its convolved and activated input; ``end`` ends its modules' names."""
    A_log, D = (p[name] for name in names)
    w, N, L = p[f"dt_proj{end}.weight"], A_log.shape[1], len(u)
    deltas, bs, cs = [], [], []
    for t in range(L):
        read = p[f"x_proj{end}.weight"] @ u[t]
        low, b, c = read.split([w.shape[1], N, N])
        if norm is not None:
            low, b, c = norm(low, "dt"), norm(b, "B"), norm(c, "C")
        deltas.append(F.softplus(w @ low + p[f"dt_proj{end}.bias"]))
        bs.append(b)
        cs.append(c)
    alpha = u.new_zeros(len(D), L, L)
    for d in range(len(D)):
        for i in range(L):
            for j in range(i + 1):
                passed = sum((deltas[k][d] for k in range(j + 1, i + 1)), u.new_zeros(()))
                decay = torch.exp(-passed * A_log[d].exp())
                alpha[d, i, j] = (cs[i] * decay * deltas[j][d] * bs[j]).sum() + (D[d] if i == j else 0)
    return alpha


def mambapy(layer: Any, x: Tensor) -> Written:
    p = named(layer, x)
    u, z = linear(p, "in_proj", x).chunk(2, -1)
    u = F.silu(convolved(p, "conv1d", u))
    alpha = s6(p, u, norm=mambapy_norm(layer, p))
    return alpha, linear(p, "out_proj", times(alpha, u) * F.silu(z))


def mambapy_norm(layer: Any, p: dict[str, Tensor]) -> Any:
    if not layer.config.inner_layernorms:
        return None
    return lambda v, name: rms(v, layer.config.rms_norm_eps) * p.get(f"{name}_layernorm.weight", 1.0)


def mambapy_vision(layer: Any, x: Tensor) -> Written:
    """The matrices are those of the sum of both directions."""
    p, L = named(layer, x), len(x)
    value, z = linear(p, "in_proj", x).chunk(2, -1)
    u = F.silu(convolved(p, "conv1d", value))
    turned = torch.stack([value[L - 1 - t] for t in range(L)])
    u_b = F.silu(convolved(p, "conv1d_b", turned))
    norm = mambapy_norm(layer, p)
    forward, backward = s6(p, u, norm=norm), s6(p, u_b, "_b", norm, ("A_log_b", "D_b"))
    y, y_b = times(forward, u), times(backward, u_b)
    both = torch.stack([y[t] + y_b[L - 1 - t] for t in range(L)]) / (2 if layer.config.divide_output else 1)
    return forward, linear(p, "out_proj", both * F.silu(z))


def mambavision(layer: Any, x: Tensor) -> Written:
    p, ahead = named(layer, x), layer.d_conv // 2
    value, beside = linear(p, "in_proj", x).chunk(2, -1)
    u, z = F.silu(convolved(p, "conv1d_x", value, ahead)), F.silu(convolved(p, "conv1d_z", beside, ahead))
    alpha = s6({**p, "dt_proj.bias": p["dt_proj.bias"] + p["dt_proj.bias"]}, u)  # by the projection, and by the scan
    y = torch.cat([times(alpha, u), z], -1)
    identity = torch.eye(len(x)).to(x).expand(z.shape[1], -1, -1)
    return torch.cat([alpha, identity]), linear(p, "out_proj", y)


def min_gru(layer: Any, x: Tensor) -> Written:
    p = named(layer, x)
    hidden, gate = linear(p, "to_hidden_and_gate", x).chunk(2, -1)
    return min_rnn(p, hidden, 1 - gate.sigmoid(), gate.sigmoid())


def min_lstm(layer: Any, x: Tensor) -> Written:
    p = named(layer, x)
    hidden, f, i = linear(p, "to_hidden_and_f_i_gate", x).chunk(3, -1)
    total = f.sigmoid() + i.sigmoid()
    return min_rnn(p, hidden, f.sigmoid() / total, i.sigmoid() / total)


def min_rnn(p: dict[str, Tensor], hidden: Tensor, keep: Tensor, write: Tensor) -> Written:
    L, D = hidden.shape
    alpha, v = hidden.new_zeros(D, L, L), torch.zeros_like(hidden)
    for d in range(D):
        for i in range(L):
            u = hidden[i, d]
            v[i, d] = u + 0.5 if u >= 0 else 1 / (1 + torch.exp(-u))
            for j in range(i + 1):
                alpha[d, i, j] = write[j, d] * torch.prod(keep[j + 1 : i + 1, d])
    h = times(alpha, v)
    return alpha, linear(p, "to_out", h) if "to_out.weight" in p else h


def s5(layer: Any, x: Tensor) -> Written:
    """The matrices are the real and the imaginary part of each state's decay, and the identity of what passes by."""
    ssm, (L, E) = layer.seq, x.shape
    B, C = (t.detach().to(torch.cdouble) for t in ssm.get_BC_tilde())
    rate, step = ssm.Lambda.detach().to(torch.cdouble), ssm.log_step.detach().double().exp()
    decay = torch.exp(rate * step)
    B = ((decay - 1) / rate).unsqueeze(1) * B
    N = len(decay)
    y = torch.zeros_like(x)
    alpha = x.new_zeros(4 * N + E, L, L)
    for i in range(L):
        y[i] = ssm.D.detach().to(x) * x[i]
        for j in range(L):
            kernel = decay ** abs(i - j)
            if j <= i:
                y[i] += (C[:, :N] @ (kernel * (B @ x[j].to(B)))).real
                alpha[: 2 * N, i, j], alpha[2 * N : 4 * N, i, j] = kernel.real.repeat(2), kernel.imag.repeat(2)
            if ssm.bidir and j >= i:
                y[i] += (C[:, N:] @ (kernel * (B @ x[j].to(B)))).real
        alpha[4 * N :, i, i] = 1
    return alpha, y


def mlstm_matrices(q: Tensor, k: Tensor, i: Tensor, f: Tensor, starts_at_0: bool) -> Tensor:
    """The matrices of the heads (H, L, L), of queries and keys (L, H, N) and exponents of gates (L, H).

    A millionth of the largest weight so far is added to the normaliser; in one of the two codes the state before the
    first token has a weight too.
    """
    L, H, N = q.shape
    alpha = q.new_zeros(H, L, L)
    for h in range(H):
        for t in range(L):
            logs = [F.logsigmoid(f[s + 1 : t + 1, h]).sum() + i[s, h] for s in range(t + 1)]
            row = torch.stack([q[t, h] @ k[s, h] / math.sqrt(N) * torch.exp(logs[s]) for s in range(t + 1)])
            largest = [*logs, F.logsigmoid(f[: t + 1, h]).sum()] if starts_at_0 else logs
            alpha[h, t, : t + 1] = row / (max(abs(float(row.sum())), 1.0) + 1e-6 * math.exp(max(map(float, largest))))
    return alpha


def head_norm(y: Tensor, H: int, eps: float, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A layer norm of each head of each token."""
    heads = y.unflatten(-1, (H, -1))
    rows = [[(h - h.mean()) / math.sqrt(float(h.var(correction=0)) + eps) for h in token] for token in heads]
    normed = torch.stack([torch.cat(row) for row in rows]) * weight
    return normed if bias is None else normed + bias


def mlstm(layer: Any, x: Tensor) -> Written:
    """The mLSTM of the first xLSTM, convolved."""
    p, config = named(layer, x), layer.mlstm_cell.config
    H = config.num_heads
    inner, z = linear(p, "proj_up", x).chunk(2, -1)
    u = F.silu(convolved(p, "conv1d.conv", inner))

    def headwise(name: str, t: Tensor) -> Tensor:
        w = p[f"{name}.weight"]
        parts = t.split(w.shape[2], -1)
        y = torch.cat([part @ w[h].T for h, part in enumerate(parts)], -1)
        return y + p[f"{name}.bias"] if f"{name}.bias" in p else y

    q, k, v = headwise("q_proj", u), headwise("k_proj", u), headwise("v_proj", inner)
    i, f = (linear(p, f"mlstm_cell.{name}", torch.cat([q, k, v], -1)) for name in ("igate", "fgate"))
    alpha = mlstm_matrices(q.unflatten(-1, (H, -1)), k.unflatten(-1, (H, -1)), i, f, starts_at_0=False)
    alpha = alpha.repeat_interleave(v.shape[1] // H, 0)
    weight = 1 + p["mlstm_cell.outnorm.weight"]
    h = head_norm(times(alpha, v), H, layer.mlstm_cell.outnorm.eps, weight, None) + p["learnable_skip"] * u
    return alpha, linear(p, "proj_down", h * F.silu(z))


def large_mlstm(layer: Any, x: Tensor) -> Written:
    """The mLSTM of the xLSTM of 7B, with soft caps."""
    p, H, cap = named(layer, x), layer.config.num_heads, layer.config.gate_soft_cap
    if layer.config.weight_mode == "single":
        q, k, v, o, i, f = (linear(p, n, x) for n in ("q", "k", "v", "ogate_preact", "igate_preact", "fgate_preact"))
    else:
        q, k, v, o = linear(p, "qkv_opreact", x).split([layer.qk_dim] * 2 + [layer.v_dim] * 2, -1)
        i, f = linear(p, "ifgate_preact", x).split(H, -1)
    i, f = (cap * torch.tanh(t / cap) for t in (i, f))
    alpha = mlstm_matrices(q.unflatten(-1, (H, -1)), k.unflatten(-1, (H, -1)), i, f, starts_at_0=True)
    alpha = alpha.repeat_interleave(layer.v_dim // H, 0)
    norm = layer.multihead_norm
    h = head_norm(times(alpha, v), H, norm.eps, p["multihead_norm.weight"], p.get("multihead_norm.bias"))
    return alpha, linear(p, "out_proj", o.sigmoid() * h)


def retention(layer: Any, x: Tensor) -> Written:
    """Positions turn neighbouring entries of queries and keys, by angles from 1 down to 1/10000 of a radian."""
    p, (L, E), H = named(layer, x), x.shape, layer.num_heads
    N = E // H
    q, k, v, g = (linear(p, f"{name}_proj", x) for name in "qkvg")
    q, k = (t.unflatten(-1, (H, N)) for t in (q, k))

    def turned(t: Tensor, place: int) -> Tensor:
        y = torch.zeros_like(t)
        for pair in range(N // 2):
            angle = place / 10000 ** (pair / (N // 2 - 1))
            a, b = t[2 * pair], t[2 * pair + 1]
            y[2 * pair] = a * math.cos(angle) - b * math.sin(angle)
            y[2 * pair + 1] = b * math.cos(angle) + a * math.sin(angle)
        return y

    alpha = x.new_zeros(H, L, L)
    for h in range(H):
        decay = 1 - 2.0 ** (-5 - h)
        for i in range(L):
            total = math.sqrt(sum(decay ** (i - j) for j in range(i + 1)))
            for j in range(i + 1):
                score = turned(q[i, h], i) @ turned(k[j, h], j) / math.sqrt(N)
                alpha[h, i, j] = score * decay ** (i - j) / total
            alpha[h, i] /= max(abs(float(alpha[h, i].sum())), 1.0)
    alpha = alpha.repeat_interleave(layer.head_dim, 0)
    rows = times(alpha, v).unflatten(-1, (H, -1))
    normed = torch.stack([torch.cat([rms(h, layer.group_norm.eps) for h in row]) for row in rows])
    return alpha, linear(p, "out_proj", F.silu(g) * normed)


def shifted(x: Tensor, mu: Tensor) -> Tensor:
    """Each token mixed with the one before it."""
    before = torch.stack([torch.zeros_like(x[0]), *x[:-1]])
    return x + (before - x) * mu.flatten()


def wkv7(layer: Any, x: Tensor) -> Written:
    """The matrices of the heads: the products of the transitions of the tokens between key and query."""
    p, (L, E), H = named(layer, x), x.shape, layer.num_heads

    def low_rank(name: str, t: Tensor, between: Any = lambda t: t) -> Tensor:
        return linear(p, f"{name}_lora.lora.2", between(linear(p, f"{name}_lora.lora.0", t)))

    xr, xw, xk, xv, xa, xg = (shifted(x, p[f"x_{name}"]) for name in "rwkvag")
    r, key, v = linear(p, "r_proj", xr), linear(p, "k_proj", xk), linear(p, "v_proj", xv)
    eta, g = low_rank("a", xa).sigmoid(), low_rank("g", xg, torch.sigmoid)
    w = torch.exp(-math.exp(-0.5) * low_rank("w", xw, torch.tanh).sigmoid())
    if layer.layer_idx > 0:
        first = torch.randn(1, L, E, generator=torch.Generator().manual_seed(3))[0].to(x)
        v = v + (first - v) * low_rank("v", xv).sigmoid()
    kappa = (key * p["k_k"]).unflatten(-1, (H, -1))
    kappa = torch.stack([torch.stack([h / math.sqrt(float(h @ h)) for h in token]) for token in kappa])
    k = key * (1 + (eta - 1) * p["k_a"])
    r, k, w, eta, values = (t.unflatten(-1, (H, -1)) for t in (r, k, w, eta, v))
    alpha, y = x.new_zeros(H, L, L), torch.zeros_like(values)
    for h in range(H):
        for j in range(L):
            state = k[j, h]
            for i in range(j, L):
                if i > j:
                    state = w[i, h] * state - (eta[i, h] * kappa[i, h]) * (kappa[i, h] @ state)
                alpha[h, i, j] = r[i, h] @ state
                y[i, h] += alpha[h, i, j] * values[j, h]
    normed = head_norm(y.flatten(1), H, layer.g_norm.eps, p["g_norm.weight"], p["g_norm.bias"])
    bonus = torch.stack([(r[:, h] * k[:, h] * p["r_k"][h]).sum(-1, keepdim=True) * values[:, h] for h in range(H)], 1)
    return alpha.repeat_interleave(E // H, 0), linear(p, "o_proj", (normed + bonus.flatten(1)) * g)


def channel_mix7(layer: Any, x: Tensor) -> Written:
    p, (L, E) = named(layer, x), x.shape
    alpha = x.new_zeros(E, L, L)
    for i in range(L):
        alpha[:, i, i] = 1 - p["x_k"]
        if i:
            alpha[:, i, i - 1] = p["x_k"]
    return alpha, linear(p, "value", linear(p, "key", shifted(x, p["x_k"])).relu() ** 2)


def griffin(layer: Any, x: Tensor) -> Written:
    p, L, lru = named(layer, x), len(x), layer.rg_lru
    value, z = linear(p, "linear_x", x), linear(p, "linear_y", x)
    K = layer.conv1d_temporal_width
    u = torch.zeros_like(value)
    for t in range(L):
        for k in range(min(K, t + 1)):
            u[t] += p["conv_1d.w"][K - 1 - k] * value[t - k]
    u = u + p["conv_1d.b"]

    def gate(name: str) -> Tensor:
        parts = u.chunk(lru.num_heads, -1)
        return torch.cat(
            [t @ w + b for t, w, b in zip(parts, p[f"rg_lru.{name}.w"], p[f"rg_lru.{name}.b"])], -1
        ).sigmoid()

    a = torch.exp(-8 * gate("a_gate") * F.softplus(p["rg_lru.a_param"]))
    i, D = gate("input_gate"), u.shape[1]
    alpha = x.new_zeros(D, L, L)
    for d in range(D):
        for t in range(L):
            for s in range(t + 1):
                size = 1 if s == 0 else torch.sqrt(1 - a[s, d] ** 2)
                alpha[d, t, s] = size * i[s, d] * torch.prod(a[s + 1 : t + 1, d])
    return alpha, linear(p, "linear_out", times(alpha, u) * F.gelu(z, approximate="tanh"))


def local_attention(layer: Any, x: Tensor) -> Written:
    p, L, H, P = named(layer, x), len(x), layer.num_heads, layer.head_dim

    def turned(t: Tensor, place: int) -> Tensor:
        y, pairs = t.clone(), P // 4
        for pair in range(pairs):
            angle = place / 10000 ** (pair / pairs)
            a, b = t[pair], t[pairs + pair]
            y[pair] = a * math.cos(angle) - b * math.sin(angle)
            y[pairs + pair] = b * math.cos(angle) + a * math.sin(angle)
        return y

    q, k, v = (linear(p, f"proj_{name}", x) for name in "qkv")
    alpha = x.new_zeros(H, L, L)
    for h in range(H):
        for i in range(L):
            seen = range(max(0, i - layer.window_size), i + 1)
            scores = [turned(q[i, h * P : (h + 1) * P], i) @ turned(k[j], j) / math.sqrt(P) for j in seen]
            alpha[h, i, seen.start : seen.stop] = torch.stack(scores).softmax(0)
    alpha = alpha.repeat_interleave(P, 0)
    return alpha, linear(p, "proj_final", times(alpha, v.repeat(1, H)))
