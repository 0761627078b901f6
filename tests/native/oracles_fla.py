"""The recurrences of flash-linear-attention's layers, as their papers write them: one loop for each index of tokens.

Nothing here is taken from captum_ssm. All take a layer with float64 parameters, and give its hidden attention
(B, H, L, L), or its output.
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def heads(t: Tensor, H: int) -> Tensor:
    return t.unflatten(-1, (H, -1))


def convolved(mixer: Any, name: str, x: Tensor) -> Tensor:
    """Return queries, keys or values (B, L, channels), their convolution a loop over taps, all SiLU at the end."""
    u = x @ getattr(mixer, f"{name}_proj").weight.T
    conv = getattr(mixer, f"{name}_conv1d", None)
    if conv is None:
        return u
    K, y = conv.weight.shape[-1], torch.zeros_like(u)
    for t in range(x.shape[1]):
        for back in range(min(K, t + 1)):
            y[:, t] += conv.weight[:, 0, K - 1 - back] * u[:, t - back]
    y = y if conv.bias is None else y + conv.bias
    return y if conv.activation is None else F.silu(y)


def diagonal(q: Tensor, k: Tensor, decay: Tensor) -> Tensor:
    """Return ``alpha[i, j] = sum_n q_in k_jn prod_{j < t <= i} decay_tn`` for q, k, decay (B, L, H, N)."""
    B, L, H, _ = q.shape
    alpha = q.new_zeros(B, H, L, L)
    for i in range(L):
        for j in range(i + 1):
            between = torch.ones_like(decay[:, 0])
            for t in range(j + 1, i + 1):
                between = between * decay[:, t]
            alpha[:, :, i, j] = (q[:, i] * between * k[:, j]).sum(-1)
    return alpha


def transitions(q: Tensor, k: Tensor, transition: Tensor) -> Tensor:
    """Return ``alpha[i, j] = q_i^T (prod_{j < t <= i} transition_t) k_j``, transitions (B, L, H, N, N)."""
    B, L, H, _ = q.shape
    alpha = q.new_zeros(B, H, L, L)
    for j in range(L):
        written = k[:, j]
        for i in range(j, L):
            if i > j:
                written = (transition[:, i] @ written.unsqueeze(-1)).squeeze(-1)
            alpha[:, :, i, j] = (q[:, i] * written).sum(-1)
    return alpha


def retention(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Sun et al. 2023, equations 3 and 5: queries and keys as complex numbers that turn with their positions."""
    H, N, groups = mixer.num_heads, mixer.head_k_dim, mixer.num_kv_groups
    q, k = (convolved(mixer, name, x).unflatten(-1, (-1, N)) for name in "qk")
    if mixer.feature_map_fn is not None:
        q, k = mixer.feature_map_fn(q), mixer.feature_map_fn(k)
    k = torch.stack([k[:, :, h // groups] for h in range(H)], 2)
    alpha = q.new_zeros(len(x), H, x.shape[1], x.shape[1])
    for h in range(H):
        for i in range(x.shape[1]):
            for j in range(i + 1):
                for n in range(N // 2):
                    theta = 10000.0 ** (-2 * n / N)
                    query, key = (torch.complex(t[:, m, h, n], t[:, m, h, n + N // 2]) for t, m in ((q, i), (k, j)))
                    turn = torch.exp(torch.tensor(1j * theta * (i - j), dtype=query.dtype))
                    alpha[:, h, i, j] += (query * turn * key.conj()).real
                alpha[:, h, i, j] *= (1 - 2.0 ** (-5 - h)) ** (i - j) / N**0.5
    return alpha


def gla(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Yang et al. 2023, equation 3, with ``alpha = sigmoid(W_2 W_1 x + b)^(1 / tau)``."""
    H, N, groups = mixer.num_heads, mixer.head_k_dim, mixer.num_kv_groups
    q, k = (convolved(mixer, name, x).unflatten(-1, (-1, N)) for name in "qk")
    if mixer.feature_map_fn is not None:
        q, k = mixer.feature_map_fn(q), mixer.feature_map_fn(k)
    decay = mixer.gk_proj(x).sigmoid() ** (1 / mixer.gate_logit_normalizer)
    if mixer.clamp_min is not None:
        decay = decay.clamp_min(torch.tensor(mixer.clamp_min, dtype=x.dtype).exp())
    k, decay = (torch.stack([t[:, :, h // groups] for h in range(H)], 2) for t in (k, decay.unflatten(-1, (-1, N))))
    return diagonal(q, k, decay) / N**0.5


def hgrn2(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Qin et al. 2024, section 3.2: the forget gate, above its bound, and what is left of it as the key."""
    q, f = convolved(mixer, "q", x), convolved(mixer, "f", x)
    low = kwargs["lower_bound"].double() if mixer.layer_idx else 0.0
    a = low + (1 - low) * f.sigmoid()
    q, k, a = (heads(t, mixer.num_heads) for t in (F.silu(q), 1 - a, a))
    return diagonal(q, k, a) / mixer.head_f_dim**0.5


def unit(t: Tensor) -> Tensor:
    return t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt()


def erasing(k: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
    """Return ``(I - beta_t k_t k_t^T) diag(decay_t)``, (B, L, H, N, N)."""
    eye = torch.eye(k.shape[-1], dtype=k.dtype)
    return (eye - beta[..., None, None] * k.unsqueeze(-1) * k.unsqueeze(-2)) @ torch.diag_embed(decay.expand_as(k))


def delta_net(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Yang et al. 2024 (arXiv 2406.06484), equation 4."""
    H, act = mixer.num_heads, mixer.qk_activation
    q, k = (heads(convolved(mixer, name, x), H) for name in "qk")
    acts: dict[str, Callable[[Tensor], Tensor]] = {
        "silu": F.silu, "relu": F.relu, "elu": lambda t: F.elu(t) + 1, "identity": lambda t: t,
    }  # fmt: skip
    if act != "silu" or not mixer.use_short_conv:
        q, k = acts[act](q), acts[act](k)
    q, k = (unit(t) if mixer.qk_norm == "l2" else t / t.abs().sum(-1, keepdim=True) for t in (q, k))
    beta = mixer.b_proj(x).sigmoid() if mixer.use_beta else torch.ones_like(q[..., 0])
    beta = 2 * beta if mixer.allow_neg_eigval else beta
    return transitions(q, beta.unsqueeze(-1) * k, erasing(k, beta, torch.ones_like(k))) / q.shape[-1] ** 0.5


def gated_keys(mixer: Any, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return unit queries and keys (B, L, H, N), and how much is erased (B, L, H)."""
    H, group = mixer.num_v_heads, mixer.num_v_heads // mixer.num_heads
    qk = [heads(convolved(mixer, name, x), mixer.num_heads) for name in "qk"]
    qk = qk if mixer.use_short_conv else [F.silu(t) for t in qk]
    q, k = (unit(torch.stack([t[:, :, h // group] for h in range(H)], 2)) for t in qk)
    beta = mixer.b_proj(x).sigmoid()
    return q, k, 2 * beta if mixer.allow_neg_eigval else beta


def gated_delta_net(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Yang et al. 2024 (arXiv 2412.06464), equation 10."""
    q, k, beta = gated_keys(mixer, x)
    decay = torch.exp(-mixer.A_log.exp() * torch.log1p(torch.exp(mixer.a_proj(x) + mixer.dt_bias)))
    return transitions(q, beta.unsqueeze(-1) * k, erasing(k, beta, decay.unsqueeze(-1))) / q.shape[-1] ** 0.5


def kimi_delta(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Kimi Team 2025, equation 1."""
    q, k, beta = gated_keys(mixer, x)
    f, rate = heads(mixer.f_proj(x) + mixer.dt_bias, mixer.num_v_heads), mixer.A_log.exp().unsqueeze(-1)
    bound = mixer.lower_bound
    decay = (1 + f.exp()) ** -rate if bound is None else torch.exp(bound * (rate * f).sigmoid())
    return transitions(q, beta.unsqueeze(-1) * k, erasing(k, beta, decay)) / q.shape[-1] ** 0.5


def before(x: Tensor) -> Tensor:
    return torch.cat([torch.zeros_like(x[:, :1]), x[:, :-1]], 1)


def rwkv6(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Peng et al. 2024, Finch: its data-dependent interpolation, and a bonus in the place of the decay for i = j."""
    step, H = before(x) - x, mixer.num_heads
    rank = mixer.proj_low_rank_dim
    low = torch.tanh((x + step * mixer.x_proj[0].mu) @ mixer.x_proj[0].linear.weight.T)
    inputs = {}
    for number, name in enumerate("rwkvg"):
        W = mixer.x_proj[2].weight[:, number * rank : (number + 1) * rank]
        mu = low[..., number * rank : (number + 1) * rank] @ W.T + mixer.x_bias[number]
        inputs[name] = x + step * mu
    r, k = (heads(getattr(mixer, f"{n}_proj").linear(inputs[n]), H) for n in "rk")
    decay = torch.exp(-torch.exp(heads(mixer.w_proj.linear(inputs["w"]), H)))
    alpha = r.new_zeros(len(x), H, x.shape[1], x.shape[1])
    for i in range(x.shape[1]):
        alpha[:, :, i, i] = (r[:, i] * mixer.bonus * k[:, i]).sum(-1)
        for j in range(i):
            between = torch.ones_like(decay[:, 0])
            for t in range(j + 1, i):
                between = between * decay[:, t]
            alpha[:, :, i, j] = (r[:, i] * between * k[:, j]).sum(-1)
    return alpha


def rwkv7(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Return the layer's output: Peng et al. 2025, the state (P, N) of each head written out token by token."""
    H, N = mixer.num_heads, mixer.head_dim
    xs = {name: x + (before(x) - x) * getattr(mixer, f"x_{name}") for name in "rwkvag"}
    r, k, v = (getattr(mixer, f"{n}_proj")(xs[n]) for n in "rkv")
    w = torch.exp(-torch.exp(torch.tensor(-0.5, dtype=x.dtype)) * mixer.w_lora(xs["w"]).sigmoid())
    eta, g = mixer.a_lora(xs["a"]).sigmoid(), mixer.g_lora(xs["g"])
    if mixer.layer_idx:
        m = mixer.v_lora(xs["v"]).sigmoid()
        v = (1 - m) * v + m * kwargs["v_first"].double()
    kappa = heads(k * mixer.k_k, H)
    kappa = unit(kappa) if mixer.fuse_norm else kappa / kappa.norm(dim=-1, keepdim=True)
    k = k + k * (eta - 1) * mixer.k_a
    r, k, v, w, eta = (heads(t, H) for t in (r, k, v, w, eta))
    y = torch.zeros_like(v)
    for b in range(len(x)):
        for h in range(H):
            S = x.new_zeros(v.shape[-1], N)
            for t in range(x.shape[1]):
                removal = torch.outer(-kappa[b, t, h], eta[b, t, h] * kappa[b, t, h])
                S = S @ (torch.diag(w[b, t, h]) + removal) + torch.outer(v[b, t, h], k[b, t, h])
                o = S @ r[b, t, h]
                o = (o - o.mean()) / (o.var(correction=0) + mixer.g_norm.eps).sqrt()
                part = slice(h * v.shape[-1], (h + 1) * v.shape[-1])
                o = o * mixer.g_norm.weight[part] + mixer.g_norm.bias[part]
                y[b, t, h] = o + (r[b, t, h] * mixer.r_k[h] * k[b, t, h]).sum() * v[b, t, h]
    return (y.flatten(-2) * g) @ mixer.o_proj.weight.T


def softmax(mixer: Any, x: Tensor, real: Tensor) -> Tensor:
    """Vaswani et al. 2017, equation 1, each query and key as complex numbers that turn with their positions."""
    P, L = mixer.head_dim, x.shape[1]
    q, k = (getattr(mixer, f"{name}_proj")(x).unflatten(-1, (-1, P)) for name in "qk")
    if mixer.qk_norm:
        q, k = (
            t / (t.square().mean(-1, keepdim=True) + norm.eps).sqrt() * norm.weight
            for t, norm in ((q, mixer.q_norm), (k, mixer.k_norm))
        )
    weights = x.new_zeros(len(x), mixer.num_heads, L, L)
    for b in range(len(x)):
        for h in range(mixer.num_heads):
            for i in range(L):
                first = 0 if mixer.window_size is None else max(0, i - mixer.window_size + 1)
                keys = [j for j in range(first, i + 1) if real[b, j] and real[b, i]]
                scores = torch.zeros(len(keys), dtype=x.dtype)
                for number, j in enumerate(keys):
                    for n in range(P // 2):
                        theta = 10000.0 ** (-2 * n / P)
                        query = torch.complex(q[b, i, h, n], q[b, i, h, n + P // 2])
                        g = h // mixer.num_kv_groups
                        key = torch.complex(k[b, j, g, n], k[b, j, g, n + P // 2])
                        turn = torch.exp(torch.tensor(1j * theta * (i - j), dtype=query.dtype))
                        scores[number] += (query * turn * key.conj()).real / P**0.5
                for j, weight in zip(keys, scores.exp() / scores.exp().sum()):
                    weights[b, h, i, j] = weight
    return weights
