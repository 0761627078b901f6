"""The delta rule and lightning attention, written out token by token, and the layers around them.

As in ``oracles``: nothing here is fast and nothing is taken from captum_ssm. Symbols are those of the operators.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracles import conv, conv_matrix, diagonal_matrix, times

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "relu": F.relu,
    "sigmoid": torch.sigmoid,
}


def delta_alpha(q: Tensor, k: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
    """Return the hidden attention of the delta rule, by products of whole (N, N) transitions.

    ``alpha[i, j] = q_i^T (prod_{j < t <= i} (I - beta_t k_t k_t^T) diag(decay_t)) beta_j k_j``

    Args:
        q: Queries (B, L, H, N), scaled; ``k``, keys, and ``decay`` likewise.
        beta: (B, L, H).

    Returns:
        (B, H, L, L), lower triangular.
    """
    B, L, H, N = q.shape
    alpha = q.new_zeros(B, H, L, L)
    eye = torch.eye(N, dtype=q.dtype)
    for j in range(L):
        written = beta[:, j].unsqueeze(-1) * k[:, j]  # (B, H, N)
        for i in range(j, L):
            if i > j:
                erase = eye - beta[:, i, :, None, None] * k[:, i].unsqueeze(-1) * k[:, i].unsqueeze(-2)
                written = (erase @ (decay[:, i] * written).unsqueeze(-1)).squeeze(-1)
            alpha[:, :, i, j] = (q[:, i] * written).sum(-1)
    return alpha


def delta_rule(q: Tensor, k: Tensor, v: Tensor, beta: Tensor, decay: Tensor) -> Tensor:
    """Return the output of the delta rule as a memory: forget, recall what the key finds, write the correction.

    Args as in :func:`delta_alpha`, and values ``v`` (B, L, H, P). Returns (B, L, H, P).
    """
    B, L, H, N = q.shape
    memory = q.new_zeros(B, H, N, v.shape[-1])
    y = torch.zeros_like(v)
    for t in range(L):
        memory = decay[:, t].unsqueeze(-1) * memory
        found = torch.einsum("bhn,bhnp->bhp", k[:, t], memory)
        correction = beta[:, t].unsqueeze(-1) * (v[:, t] - found)
        memory = memory + k[:, t].unsqueeze(-1) * correction.unsqueeze(-2)
        y[:, t] = torch.einsum("bhn,bhnp->bhp", q[:, t], memory)
    return y


def lightning_alpha(q: Tensor, k: Tensor, slope: Tensor) -> Tensor:
    """Return ``alpha[i, j] = <q_i, k_j> exp(-slope (i - j))`` for ``q``, ``k`` (B, L, H, N) and ``slope`` (H,)."""
    B, L, H, _ = q.shape
    alpha = q.new_zeros(B, H, L, L)
    for i in range(L):
        for j in range(i + 1):
            alpha[:, :, i, j] = (q[:, i] * k[:, j]).sum(-1) * torch.exp(-slope * (i - j))
    return alpha


def gdn(mixer: Any, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Return the pieces of a transformers Gated DeltaNet layer, straight from its parameters, in the type of ``x``.

    Args:
        mixer: A layer of Qwen3-Next, Qwen3.5, Qwen4 or OLMo Hybrid.
        x: Its input (B, L, E).
        mask: (B, L), 0 at padding.

    Returns:
        ``alpha`` (B, D, L, L) of the recurrence; ``core`` (B, D, L, L), all between the projections; ``v`` (B, L, D)
        what reaches the core; ``gate`` (B, L, D), the output gate; ``y`` (B, L, E), the layer's output.
    """
    p = {name: parameter.detach().to(x.dtype) for name, parameter in mixer.named_parameters()}
    x = x if mask is None else x * mask.to(x.dtype).unsqueeze(-1)
    H, Hk, N, P = mixer.num_v_heads, mixer.num_k_heads, mixer.head_k_dim, mixer.head_v_dim
    if "in_proj_qkvz.weight" in p:  # row by row: of each key head its q, its k, the v and the z of its value heads
        rows: dict[str, list[Tensor]] = {name: [] for name in "qkvzba"}
        fused, small = iter(p["in_proj_qkvz.weight"]), iter(p["in_proj_ba.weight"])
        for _ in range(Hk):
            for name, size in (("q", N), ("k", N), ("v", H // Hk * P), ("z", H // Hk * P)):
                rows[name] += [next(fused) for _ in range(size)]
            for name in "ba":
                rows[name] += [next(small) for _ in range(H // Hk)]
        W = {name: torch.stack(of) for name, of in rows.items()}
    elif "in_proj_qkv.weight" in p:
        qkv = p["in_proj_qkv.weight"]
        W = {"q": qkv[: Hk * N], "k": qkv[Hk * N : 2 * Hk * N], "v": qkv[2 * Hk * N :]}
        W |= {name: p[f"in_proj_{name}.weight"] for name in "zba"}
    else:
        W = {name: p[f"{name}_proj.weight"] for name in "qkvba"} | {"z": p["g_proj.weight"]}
    beta = 1 / (1 + torch.exp(-x @ W["b"].T))
    if getattr(mixer, "allow_neg_eigval", False):
        beta = 2 * beta
    decay = torch.exp(-torch.exp(p["A_log"]) * torch.log1p(torch.exp(x @ W["a"].T + p["dt_bias"])))  # (B, L, H)
    olmo = "o_norm.weight" in p
    eps = 1e-5 if olmo else mixer.layer_norm_epsilon
    gate = ACTIVATIONS[(mixer.o_norm if olmo else mixer.norm).activation](x @ W["z"].T)
    scale, out = (p["o_norm.weight"], p["o_proj.weight"]) if olmo else (p["norm.weight"], p["out_proj.weight"])
    return _delta_layer(
        [x @ W[name].T for name in "qkv"], p["conv1d.weight"][:, 0], mixer.activation, (Hk, H, N, P), beta,
        decay.unsqueeze(-1).expand(*beta.shape, N), gate, scale, eps, out,
    )  # fmt: skip


def kda(mixer: Any, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Return the pieces of a Kimi delta attention layer of Kimi Linear, Bailing or GLM; see :func:`gdn`."""
    p = {name: parameter.detach().to(x.dtype) for name, parameter in mixer.named_parameters()}
    x = x if mask is None else x * mask.to(x.dtype).unsqueeze(-1)
    B, L, _ = x.shape
    H, N = mixer.num_heads, mixer.head_dim
    if "g_proj.weight" in p:
        z, f = x @ p["g_proj.weight"].T, x @ p["forget_gate.f_proj.weight"].T
    else:
        z = x @ p["g_a_proj.weight"].T @ p["g_b_proj.weight"].T
        f = x @ p["forget_gate.f_a_proj.weight"].T @ p["forget_gate.f_b_proj.weight"].T
    f = (f + p["forget_gate.dt_bias"]).view(B, L, H, N)
    rate = torch.exp(p["forget_gate.A_log"]).view(H, 1)
    forget = mixer.forget_gate
    bound = {
        "KimiLinearForgetGate": lambda: None,
        "BailingHybridForgetGate": lambda: forget.lower_bound if forget.safe_gate else None,
        "Glm5NextTextForgetGate": lambda: forget.safe_gate_lower_bound,
    }[type(forget).__name__]()
    log = -rate * torch.log1p(torch.exp(f)) if bound is None else bound / (1 + torch.exp(-rate * f))
    beta = torch.sigmoid(x @ p["b_proj.weight"].T)
    return _delta_layer(
        [x @ p[f"{name}_proj.weight"].T for name in "qkv"], p["conv1d.weight"][:, 0], mixer.activation, (H, H, N, N),
        beta, torch.exp(log), torch.sigmoid(z), p["o_norm.weight"], mixer.o_norm.variance_epsilon, p["o_proj.weight"],
    )  # fmt: skip


def _delta_layer(
    into: list[Tensor], taps: Tensor, act: str, sizes: tuple[int, int, int, int], beta: Tensor, decay: Tensor,
    gate: Tensor, scale: Tensor, eps: float, out: Tensor,
) -> dict[str, Tensor]:  # fmt: skip
    Hk, H, N, P = sizes
    B, L, _ = gate.shape
    pre = conv(torch.cat(into, dim=-1), taps)
    q, k, v = ACTIVATIONS[act](pre).split([Hk * N, Hk * N, H * P], dim=-1)
    q, k = (
        torch.stack([t.view(B, L, Hk, N)[:, :, h // (H // Hk)] for h in range(H)], dim=2) for t in (q, k)
    )  # value head h reads key head h // (H // Hk)
    q, k = (t / (t.square().sum(-1, keepdim=True) + 1e-6).sqrt() for t in (q, k))
    q = q / N**0.5
    alpha = delta_alpha(q, k, beta, decay).repeat_interleave(P, dim=1)
    y = delta_rule(q, k, v.view(B, L, H, P), beta, decay)
    norm = (scale / (y.square().mean(-1, keepdim=True) + eps).sqrt()).flatten(2)
    quotient = (v / pre[..., -H * P :]).nan_to_num()  # 0 / 0 at padding, where alpha is 0 whatever it is multiplied by
    core = diagonal_matrix(gate * norm) @ alpha @ diagonal_matrix(quotient) @ conv_matrix(taps[-H * P :], L)
    return {"alpha": alpha, "core": core, "v": into[2], "gate": gate, "y": (gate * norm * y.flatten(2)) @ out.T}


def lightning(mixer: Any, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Return the pieces of a MiniMax lightning attention layer; see :func:`gdn`."""
    p = {name: parameter.detach().to(x.dtype) for name, parameter in mixer.named_parameters()}
    real = torch.ones_like(x[..., :1]) if mask is None else mask.to(x.dtype).unsqueeze(-1)
    B, L, _ = x.shape
    H, P = mixer.num_attention_heads, mixer.head_dim
    pre = (x @ p["qkv_proj.weight"].T).view(B, L, H, 3 * P)  # of each head its q, its k and its v
    acts: dict[str, Callable[[Tensor], Tensor]] = {"SiLUActivation": F.silu, "GELUActivation": F.gelu, "ReLU": F.relu}
    act = acts[type(mixer.act_fn).__name__]
    q, k, v = (act(pre) * real.unsqueeze(-1)).split(P, dim=-1)
    alpha = lightning_alpha(q, k, mixer.slope_rate.to(x.dtype).flatten()).repeat_interleave(P, dim=1)
    into = pre[..., 2 * P :].flatten(2)
    y = times(alpha, v.flatten(2))
    norm = p["norm.weight"] / (y.square().mean(-1, keepdim=True) + mixer.norm.variance_epsilon).sqrt()
    gate = torch.sigmoid(x @ p["output_gate.weight"].T)
    core = diagonal_matrix(gate * norm) @ alpha @ diagonal_matrix((act(into) / into).nan_to_num())
    return {
        "alpha": alpha,
        "core": core,
        "v": into * real,
        "gate": gate,
        "y": (gate * norm * y) @ p["out_proj.weight"].T,
    }
