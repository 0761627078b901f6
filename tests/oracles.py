"""The papers' sums, written out: what the tests and the benchmarks compare with.

Nothing here is fast and nothing here is taken from captum_ssm: each function is its equation, with a Python loop
for each index of tokens that the equation has. Symbols are those of ``captum_ssm.operators``: B batch, L tokens,
D channels, E model width, N state size, K taps, H heads; ``i`` query (row), ``j`` key (column).
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def published_alpha(delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Return S6's hidden attention of one example by the published triple loop over rows, columns and steps.

    ``alpha[d, i, j] = C_i . (prod_{j < k <= i} exp(delta_kd A_d)) delta_jd B_j``

    Args:
        delta: Step sizes (L, D).
        A: Continuous decays (D, N), negative.
        B: Input weights (L, N).
        C: Read-out weights (L, N).

    Returns:
        (D, L, L), lower triangular.
    """
    L, D = delta.shape
    alpha = delta.new_zeros(D, L, L)
    for i in range(L):
        for j in range(i + 1):
            decay = torch.ones_like(A)
            for k in range(j + 1, i + 1):
                decay = decay * torch.exp(delta[k].unsqueeze(1) * A)
            alpha[:, i, j] = (C[i] * decay * delta[j].unsqueeze(1) * B[j]).sum(1)
    return alpha


def scan_alpha(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    lag: int = 0,
    skip: Tensor | None = None,
    bonus: Tensor | None = None,
    head_size: int = 1,
) -> Tensor:
    """Return ``alpha[i, j] = sum_n c_in (prod_{j < k <= i - lag} a_kn) b_jn`` of every channel.

    Args:
        a: Decays (B, L, H, N), 1 where shared; ``b`` (input) and ``c`` (read-out) likewise.
        lag: For lag 1 column j starts at row j + 1.
        skip: Added to the diagonal, broadcastable to (B, L, D); ``bonus`` likewise.
        head_size: Channels of each head.

    Returns:
        (B, D, L, L) with ``D = H * head_size``.
    """
    B, L, H, N = torch.broadcast_shapes(a.shape, b.shape, c.shape)
    a, b, c = (p.expand(B, L, H, N) for p in (a, b, c))
    alpha = a.new_zeros(B, H, L, L)
    for i in range(L):
        for j in range(i - lag + 1):
            decay = torch.ones_like(a[:, 0])
            for k in range(j + 1, i - lag + 1):
                decay = decay * a[:, k]
            alpha[:, :, i, j] = (c[:, i] * decay * b[:, j]).sum(-1)
    alpha = alpha.repeat_interleave(head_size, dim=1)
    for direct in (skip, bonus):
        if direct is not None:
            direct = direct.expand(B, L, H * head_size)
            for i in range(L):
                alpha[:, :, i, i] += direct[:, i]
    return alpha


def recurrence(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    x: Tensor,
    lag: int = 0,
    skip: Tensor | None = None,
    bonus: Tensor | None = None,
    head_size: int = 1,
) -> Tensor:
    """Return ``h_t = a_t h_{t-1} + b_t x_t, y_t = <c_t, h_{t-lag}> + (bonus_t + skip_t) x_t``, one token at a time.

    Args as in :func:`scan_alpha`, and ``x`` (B, L, D). Returns (B, L, D).
    """
    _, _, H, N = torch.broadcast_shapes(a.shape, b.shape, c.shape)
    B, L, D = x.shape
    a, b, c = (p.expand(B, L, H, N).repeat_interleave(head_size, dim=2) for p in (a, b, c))
    h = x.new_zeros(B, D, N)
    y = torch.zeros_like(x)
    for t in range(L):
        before = h
        h = a[:, t] * h + b[:, t] * x[:, t].unsqueeze(-1)
        y[:, t] = (c[:, t] * (before if lag else h)).sum(-1)
        for direct in (skip, bonus):
            if direct is not None:
                y[:, t] += direct.expand(B, L, D)[:, t] * x[:, t]
    return y


def delta_recurrence(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    recall: Tensor,
    erase: Tensor,
    x: Tensor,
    skip: Tensor | None = None,
    bonus: Tensor | None = None,
    head_size: int = 1,
) -> Tensor:
    """Return ``h_t = a_t h_{t-1} - erase_t <recall_t, h_{t-1}> + b_t x_t, y_t = <c_t, h_t> + (bonus_t + skip_t) x_t``.

    Args:
        a: Decays (B, L, H, N), 1 where shared; all others likewise.
        x: (B, L, D) with ``D = H * head_size``.

    Returns:
        (B, L, D), computed one token and one channel at a time.
    """
    _, _, H, N = torch.broadcast_shapes(*(p.shape for p in (a, b, c, recall, erase)))
    B, L, D = x.shape
    a, b, c, recall, erase = (p.expand(B, L, H, N) for p in (a, b, c, recall, erase))
    y = torch.zeros_like(x)
    for d in range(D):
        head = d // head_size
        h = x.new_zeros(B, N)
        for t in range(L):
            found = (recall[:, t, head] * h).sum(-1, keepdim=True)
            h = a[:, t, head] * h - erase[:, t, head] * found + b[:, t, head] * x[:, t, d : d + 1]
            y[:, t, d] = (c[:, t, head] * h).sum(-1)
    for direct in (skip, bonus):
        if direct is not None:
            y = y + direct * x
    return y


def delta_alpha(
    a: Tensor,
    b: Tensor,
    c: Tensor,
    recall: Tensor,
    erase: Tensor,
    skip: Tensor | None = None,
    bonus: Tensor | None = None,
    head_size: int = 1,
) -> Tensor:
    """Return ``alpha[i, j] = c_i^T (prod_{i >= k > j} diag(a_k) - erase_k recall_k^T) b_j`` of every channel.

    Args as in :func:`delta_recurrence`, and ``a`` of full length. Returns (B, D, L, L).
    """
    B, L, H, N = torch.broadcast_shapes(*(p.shape for p in (a, b, c, recall, erase)))
    a, b, c, recall, erase = (p.expand(B, L, H, N) for p in (a, b, c, recall, erase))
    step = torch.diag_embed(a) - erase.unsqueeze(-1) * recall.unsqueeze(-2)  # (B, L, H, N, N)
    alpha = a.new_zeros(B, H, L, L)
    for j in range(L):
        h = b[:, j]
        for i in range(j, L):
            h = h if i == j else (step[:, i] @ h.unsqueeze(-1)).squeeze(-1)
            alpha[:, :, i, j] = (c[:, i] * h).sum(-1)
    alpha = alpha.repeat_interleave(head_size, dim=1)
    for direct in (skip, bonus):
        if direct is not None:
            alpha = alpha + diagonal_matrix(direct.expand(B, L, H * head_size))
    return alpha


def conv_matrix(w: Tensor, L: int) -> Tensor:
    """Return the matrices (D, L, L) of the causal convolution with the taps ``w`` (D, K)."""
    D, K = w.shape
    matrix = w.new_zeros(D, L, L)
    for i in range(L):
        for k in range(K):
            j = i - (K - 1) + k
            if j >= 0:
                matrix[:, i, j] = w[:, k]
    return matrix


def conv(x: Tensor, w: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return ``y_t = sum_k w_k x_{t - (K-1) + k} + bias`` for ``x`` (B, L, D), tap by tap."""
    K = w.shape[1]
    y = torch.zeros_like(x)
    for t in range(x.shape[1]):
        for k in range(K):
            if t - (K - 1) + k >= 0:
                y[:, t] += w[:, k] * x[:, t - (K - 1) + k]
        if bias is not None:
            y[:, t] += bias
    return y


def diagonal_matrix(s: Tensor) -> Tensor:
    """Return the (B, D, L, L) matrices of the diagonal ``s`` (B, L, D)."""
    return torch.diag_embed(s.transpose(1, 2))


def times(matrices: Tensor, x: Tensor) -> Tensor:
    """Return every channel's matrix (B, D, L, L) times its column of ``x`` (B, L, D)."""
    return (matrices @ x.transpose(1, 2).unsqueeze(-1)).squeeze(-1).transpose(1, 2)


def fused(matrices: Tensor, how: str) -> Tensor:
    """Return the mean over channels of (B, D, L, L), of the entries' absolute or positive parts or as they are."""
    entries = {"absolute": matrices.abs(), "positive": matrices.clamp(min=0), "mean": matrices}[how]
    return entries.sum(1) / matrices.shape[1]


def weighted(matrices: Tensor, u: Tensor, v: Tensor) -> Tensor:
    """Return ``u_id A^d_ij v_jd`` of every channel, (B, D, L, L), entry by entry, for ``u``, ``v`` (B, L, D)."""
    out = torch.zeros_like(matrices)
    for i in range(matrices.shape[-1]):
        for j in range(matrices.shape[-1]):
            out[..., i, j] = u[:, i] * matrices[..., i, j] * v[:, j]
    return out


def lengths(matrices: Tensor, v: Tensor, W: Tensor) -> Tensor:
    """Return ``|W (A_ij v_j)|`` for every pair of tokens, (B, L, L): the length of what j contributes to i."""
    B, _, L, _ = matrices.shape
    out = v.new_zeros(B, L, L)
    for i in range(L):
        for j in range(L):
            vector = matrices[..., i, j] * v[:, j]
            out[:, i, j] = (vector @ W.T).square().sum(-1).sqrt()
    return out


def rollout(matrices: list[Tensor], query: Tensor) -> Tensor:
    """Return ``query R`` with ``R = prod_l rownorm(I + C_l)``, by matrix products, the last layer leftmost.

    Args:
        matrices: ``C_l`` (B, L, L) of each layer, the **first** layer first.
        query: (B, L).

    The rows of ``I + C`` are divided by ``1 + |sum_j C_ij|``.
    """
    L = query.shape[1]
    eye = torch.eye(L, dtype=query.dtype)
    R = eye.expand(len(query), L, L)
    for C in matrices:
        R = (eye + C) / (1 + C.sum(-1, keepdim=True).abs()) @ R
    return (query.unsqueeze(1) @ R).squeeze(1)


def wired_rollout(
    streams: dict[str, tuple[str | None, list[tuple[int, str]]]],
    matrices: list[Tensor],
    query: Tensor,
    keep: dict[int, Tensor] | None = None,
    embedded: dict[int, Tensor] | None = None,
) -> Tensor:
    """Return the rollout of a model of any wiring, by matrix products from the embeddings on.

    ``R_s = rownorm(keep R_base + sum_m C_m R_read(m))``, where the rows are divided by ``keep + |sum_mj (C_m)_ij|``,
    and 0 where that is 0; ``R_e = I`` of the embeddings ``"e"``, and ``R = 0`` of ``"nothing"``.

    Args:
        streams: In the order of the forward pass, name to (base or None, [(mixer, what it reads), ...]); the last one
            is the model's output.
        matrices: ``C_m`` (B, L, L) of each mixer.
        query: (B, L).
        keep: Factor of the base, (B, L), where a mixer's stream has one.
        embedded: Share of what a mixer reads at each token that comes straight from the embeddings, (B, L).
    """
    L = query.shape[1]
    eye = torch.eye(L, dtype=query.dtype).expand(len(query), L, L)
    R = {"e": eye, "nothing": torch.zeros_like(eye)}
    for name, (base, added) in streams.items():
        kept = torch.ones_like(query) if keep is None else keep[added[0][0]]
        kept = kept if base is not None else torch.zeros_like(query)
        rows = kept.unsqueeze(-1) * (eye if base is None else R[base])
        total = torch.zeros_like(query)
        for number, read in added:
            C = matrices[number]
            share = torch.zeros_like(query) if embedded is None else embedded[number]
            rows = rows + C @ torch.diag_embed(1 - share) @ R[read] + C @ torch.diag_embed(share)
            total = total + C.sum(-1)
        whole = (kept + total.abs()).unsqueeze(-1)
        R[name] = torch.where(whole > 0, rows / whole.clamp(min=1e-300), 0)
    return (query.unsqueeze(1) @ R[name]).squeeze(1)


ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {"silu": F.silu, "gelu": F.gelu, "relu": F.relu}


def s6(mixer: Any, x: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """Return the pieces of a transformers S6 mixer, straight from its parameters, in the type of ``x``.

    Args:
        mixer: ``MambaMixer`` or ``FalconMambaMixer``.
        x: Its input (B, L, E).
        mask: (B, L), 0 at padding.

    Returns:
        ``pre`` (B, L, D) before the activation; ``v`` after it; ``alpha`` (B, D, L, L) of the recurrence without its
        skip; ``skip`` (D,); ``gate`` (B, L, D); ``y`` (B, L, E), the layer's output.
    """
    p = {name: parameter.detach().to(x.dtype) for name, parameter in mixer.named_parameters()}
    real = torch.ones_like(x[..., :1]) if mask is None else mask.to(x.dtype).unsqueeze(-1)
    R, N, D = mixer.time_step_rank, mixer.ssm_state_size, mixer.intermediate_size
    both = (x * real) @ p["in_proj.weight"].T + p.get("in_proj.bias", torch.zeros(2 * D, dtype=x.dtype))
    into, z = both[..., :D], both[..., D:]
    pre = conv(into, p["conv1d.weight"][:, 0], p.get("conv1d.bias"))
    v = ACTIVATIONS[mixer.config.hidden_act](pre) * real
    low, b, c = (v @ p["x_proj.weight"].T).split([R, N, N], dim=-1)
    if "FalconMamba" in type(mixer).__name__:
        low, b, c = (t / (t.square().mean(-1, keepdim=True) + mixer.config.mixer_rms_eps).sqrt() for t in (low, b, c))
    delta = F.softplus(low @ p["dt_proj.weight"].T + p["dt_proj.bias"])
    alpha = torch.stack([published_alpha(*e[:1], -p["A_log"].exp(), *e[1:]) for e in zip(delta, b, c, strict=True)])
    gate = z * torch.sigmoid(z)
    y = (times(alpha, v) + p["D"] * v) * gate
    out = y @ p["out_proj.weight"].T + p.get("out_proj.bias", torch.zeros(x.shape[-1], dtype=x.dtype))
    return {"pre": pre, "v": v, "alpha": alpha, "skip": p["D"], "gate": gate, "y": out}


def unified_s6(mixer: Any, x: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return ``diag(gate) [alpha + diag(skip)] diag(act) M_conv`` of every channel, (B, D, L, L).

    The activation's diagonal is the quotient ``act(u) / u``: ``x`` must not lead to ``u = 0``.
    """
    parts = s6(mixer, x, mask)
    B, L, D = parts["v"].shape
    scan = parts["alpha"] + diagonal_matrix(parts["skip"].expand(B, L, D))
    taps = conv_matrix(mixer.conv1d.weight.detach()[:, 0].to(x.dtype), L)
    return diagonal_matrix(parts["gate"]) @ scan @ diagonal_matrix(parts["v"] / parts["pre"]) @ taps
