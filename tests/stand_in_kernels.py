"""Plain loops under the names and signatures of the packages' kernels, written from their papers and references.

Each of them may be hidden from torch's functions, as a kernel is.
"""

# mypy: allow-untyped-defs, disable-error-code="arg-type"

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

INFINITE = (0.0, float("inf"))


def loop(q: Tensor, k: Tensor, v: Tensor, a: Tensor, *, u: Any = None, recall: Any = None, erase: Any = None) -> Tensor:
    """A recurrence of (B, L, H, N) and values (B, L, H, P), token by token; with u it is read before it is written."""
    B, L, H, P = v.shape
    a, k, q = (t.expand(B, L, H, -1) for t in (a, k, q))
    h: Any = v.new_zeros(B, H, k.shape[-1], P)
    ys = []
    for t in range(L):
        before = h
        written = k[:, t].unsqueeze(-1) * v[:, t].unsqueeze(-2)
        h = a[:, t].unsqueeze(-1) * before + written
        if erase is not None:
            w = (recall[:, t].unsqueeze(-1) * before).sum(-2)
            h = h - erase[:, t].unsqueeze(-1) * w.unsqueeze(-2)
        read = h if u is None else before + u.unsqueeze(-1) * written
        ys.append((q[:, t].unsqueeze(-1) * read).sum(-2))
    return torch.stack(ys, 1)


# --- mamba_ssm and causal_conv1d --------------------------------------------------------------------------------------


def causal_conv1d_fn(
    x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False, final_states_out=None,
    activation=None,
):  # fmt: skip
    K = weight.shape[1]
    padded = F.pad(x, (K - 1, 0))
    y = sum(weight[:, j, None] * padded[..., j : j + x.shape[-1]] for j in range(K))
    y = y if bias is None else y + bias[:, None]
    y = F.silu(y) if activation else y
    return (y, x[..., 1 - K :]) if return_final_states else y


def selective_scan_fn(
    u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False, return_last_state=False
):  # fmt: skip
    channels = u.shape[1]
    delta = delta if delta_bias is None else delta + delta_bias[:, None]
    delta = F.softplus(delta) if delta_softplus else delta

    def by_token(t):  # (B, L, D, N)
        if t.dim() == 2:
            return t[None, None].expand(u.shape[0], u.shape[2], -1, -1)
        t = t.unsqueeze(1) if t.dim() == 3 else t
        return t.repeat_interleave(channels // t.shape[1], 1).permute(0, 3, 1, 2)

    step = delta.transpose(1, 2).unsqueeze(-1)
    y = loop(by_token(C), step * by_token(B), u.transpose(1, 2).unsqueeze(-1), torch.exp(step * A))
    y = y.squeeze(-1).transpose(1, 2)
    y = y if D is None else y + D[:, None] * u
    y = y if z is None else y * F.silu(z)
    return (y, y[..., -1]) if return_last_state else y


def forked_scan_fn(u, delta, A, B, C, D=None, delta_bias=None, delta_softplus=True, oflex=True, backend=None):
    """The order of the arguments of VMamba."""
    return selective_scan_fn(u, delta, A, B, C, D, None, delta_bias, delta_softplus)


def mamba_inner_fn(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, out_proj_weight, out_proj_bias, A, B=None, C=None,
    D=None, delta_bias=None, B_proj_bias=None, C_proj_bias=None, delta_softplus=True, checkpoint_lvl=1,
    b_rms_weight=None, c_rms_weight=None, dt_rms_weight=None, b_c_dt_rms_eps=1e-6,
):  # fmt: skip
    y = mamba_inner_fn_no_out_proj(
        xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B, C, D, delta_bias, B_proj_bias,
        C_proj_bias, delta_softplus, checkpoint_lvl, b_rms_weight, c_rms_weight, dt_rms_weight, b_c_dt_rms_eps,
    )  # fmt: skip
    return F.linear(y.transpose(1, 2), out_proj_weight, out_proj_bias)


def mamba_inner_fn_no_out_proj(
    xz, conv1d_weight, conv1d_bias, x_proj_weight, delta_proj_weight, A, B=None, C=None, D=None, delta_bias=None,
    B_proj_bias=None, C_proj_bias=None, delta_softplus=True, checkpoint_lvl=1, b_rms_weight=None, c_rms_weight=None,
    dt_rms_weight=None, b_c_dt_rms_eps=1e-6,
):  # fmt: skip
    x, z = xz.chunk(2, 1)
    x = causal_conv1d_fn(x, conv1d_weight.squeeze(1), conv1d_bias, activation="silu")
    read = x_proj_weight @ x
    R, N = delta_proj_weight.shape[1], A.shape[1]
    norms = (dt_rms_weight, b_rms_weight, c_rms_weight)
    parts = [delta_proj_weight @ read[:, :R], read[:, R : R + N], read[:, R + N :]]
    biases = (None, B_proj_bias, C_proj_bias)
    parts = [t if bias is None else t + bias[:, None] for t, bias in zip(parts, biases)]
    for i, w in enumerate(norms):
        if w is not None:
            scale = torch.rsqrt(parts[i].square().mean(1, keepdim=True) + b_c_dt_rms_eps)
            parts[i] = parts[i] * scale * w[:, None]
    delta, b, c = parts
    b, c = (read if given is None else given for read, given in ((b, B), (c, C)))
    return selective_scan_fn(x, delta, A, b, c, D, z, delta_bias, delta_softplus)


def mamba_chunk_scan_combined(
    x, dt, A, B, C, chunk_size, D=None, z=None, dt_bias=None, initial_states=None, seq_idx=None, cu_seqlens=None,
    dt_softplus=False, dt_limit=INFINITE, return_final_states=False, return_varlen_states=False,
):  # fmt: skip
    H = x.shape[2]
    dt = dt if dt_bias is None else dt + dt_bias
    dt = (F.softplus(dt) if dt_softplus else dt).clamp(*dt_limit).unsqueeze(-1)
    B, C = (t.repeat_interleave(H // t.shape[2], 2) for t in (B, C))
    y = loop(C, dt * B, x, torch.exp(dt * A[:, None]))
    y = y if D is None else y + (D if D.dim() == 2 else D[:, None]) * x
    y = y if z is None else y * F.silu(z)
    return (y, y[:, -1]) if return_final_states else y


def mamba_split_conv1d_scan_combined(
    zxbcdt, conv1d_weight, conv1d_bias, dt_bias, A, D, chunk_size, initial_states=None, seq_idx=None,
    dt_limit=INFINITE, return_final_states=False, activation="silu", rmsnorm_weight=None, rmsnorm_eps=1e-6,
    outproj_weight=None, outproj_bias=None, headdim=None, ngroups=1, norm_before_gate=True,
):  # fmt: skip
    H = len(A)
    inner = H * (D.shape[1] if D.dim() == 2 else headdim)
    GN = (len(conv1d_weight) - inner) // 2
    M = (zxbcdt.shape[-1] - 2 * inner - 2 * GN - H) // 2
    z0, x0, z, u, dt = zxbcdt.split([M, M, inner, inner + 2 * GN, H], -1)
    u = causal_conv1d_fn(u.transpose(1, 2), conv1d_weight, conv1d_bias, activation=activation).transpose(1, 2)
    x, b, c = u.split([inner, GN, GN], -1)
    b, c = (t.unflatten(-1, (ngroups, -1)) for t in (b, c))
    y = mamba_chunk_scan_combined(
        x.unflatten(-1, (H, -1)), dt, A, b, c, 8, D, None, dt_bias, dt_softplus=True, dt_limit=dt_limit
    ).flatten(2)
    y = y if norm_before_gate and rmsnorm_weight is not None else y * F.silu(z)
    if rmsnorm_weight is not None:
        groups = y.unflatten(-1, (ngroups, -1))
        y = (groups * torch.rsqrt(groups.square().mean(-1, keepdim=True) + rmsnorm_eps)).flatten(2) * rmsnorm_weight
        y = y * F.silu(z) if norm_before_gate else y
    y = torch.cat([F.silu(z0) * x0, y], -1)
    return y if outproj_weight is None else F.linear(y, outproj_weight, outproj_bias)


# --- flash-linear-attention -------------------------------------------------------------------------------------------


def causal_conv1d(
    x, weight=None, bias=None, residual=None, initial_state=None, output_final_state=False, activation=None,
    backend="triton", cu_seqlens=None, **kwargs,
):  # fmt: skip
    y = causal_conv1d_fn(x.transpose(1, 2), weight, bias, activation=activation).transpose(1, 2)
    return (y if residual is None else y + residual), None


def state(asked: bool, q: Tensor) -> Any:
    return q[:, -1] if asked else None


def scaled(q: Tensor, scale: Any) -> Tensor:
    return q * (q.shape[-1] ** -0.5 if scale is None else scale)


def chunk_gla(
    q, k, v, g, scale=None, initial_state=None, output_final_state=False, state_v_first=False, cu_seqlens=None,
    cu_seqlens_cpu=None,
):  # fmt: skip
    return loop(scaled(q, scale), k, v, g.exp()), state(output_final_state, q)


def fused_recurrent_gla(
    q, k, v, gk=None, gv=None, scale=None, initial_state=None, output_final_state=False, reverse=False,
    state_v_first=False, cu_seqlens=None, **kwargs,
):  # fmt: skip
    return chunk_gla(q, k, v, q.new_zeros(1, 1, 1, 1) if gk is None else gk, scale, None, output_final_state)


def chunk_simple_gla(
    q, k, v, g=None, g_gamma=None, scale=None, initial_state=None, output_final_state=False, state_v_first=False,
    cu_seqlens=None, cu_seqlens_cpu=None, **kwargs,
):  # fmt: skip
    log_a = q.new_zeros(1, 1, 1, 1)
    log_a = log_a if g is None else log_a + g.unsqueeze(-1)
    log_a = log_a if g_gamma is None else log_a + g_gamma[:, None]
    return loop(scaled(q, scale), k, v, log_a.exp()), state(output_final_state, q)


def parallel_simple_gla(q, k, v, g=None, scale=None, output_attentions=False, cu_seqlens=None, cu_seqlens_cpu=None):
    return chunk_simple_gla(q, k, v, g, None, scale)


def chunk_retention(
    q, k, v, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, **kwargs
):  # fmt: skip
    gamma = 1 - 2.0 ** (-5 - torch.arange(q.shape[2], dtype=q.dtype))
    return chunk_simple_gla(q, k, v, None, gamma.log(), scale, None, output_final_state)


def chunk_lightning_attn(
    q, k, v, layer_idx, num_layers, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, **kwargs
):  # fmt: skip
    H = q.shape[2]
    slopes = -(8 / H * (1 - layer_idx / num_layers)) * torch.arange(H, dtype=q.dtype)
    return chunk_simple_gla(q, k, v, None, slopes, scale, None, output_final_state)


def chunk_linear_attn(
    q, k, v, scale=None, initial_state=None, output_final_state=False, normalize=True, cu_seqlens=None
):  # fmt: skip
    q = scaled(q, scale)
    y = loop(q, k, v, q.new_ones(1, 1, 1, 1))
    return (y / ((q * k.cumsum(1)).sum(-1, keepdim=True) + 1e-10) if normalize else y), (None, q[:, -1:])


def parallel_based(q, k, v, scale=None, use_norm=True):
    q, ys = scaled(q, scale), []
    for t in range(q.shape[1]):
        s = (q[:, t : t + 1] * k[:, : t + 1]).sum(-1)
        weights = 1 + s + s.square() / 2
        y = (weights.unsqueeze(-1) * v[:, : t + 1]).sum(1)
        ys.append(y / (weights.sum(1).unsqueeze(-1) + 1e-6) if use_norm else y)
    return torch.stack(ys, 1)


def chunk_gsa(
    q, k, v, s, g=None, scale=None, initial_state=None, output_final_state=False, checkpoint_level=2, cu_seqlens=None,
    cu_seqlens_cpu=None, **kwargs,
):  # fmt: skip
    k, v, s, g = (t.repeat_interleave(q.shape[2] // t.shape[2], 2) for t in (k, v, s, g))
    q, keys, values, ys = scaled(q, scale), q.new_zeros(()), q.new_zeros(()), []
    for t in range(q.shape[1]):
        a, slot = g[:, t].exp().unsqueeze(-1), s[:, t].unsqueeze(-1)  # (B, H, M, 1)
        keys = a * keys + slot * k[:, t].unsqueeze(-2)
        values = a * values + slot * v[:, t].unsqueeze(-2)
        weights = (keys * q[:, t].unsqueeze(-2)).sum(-1).softmax(-1)
        ys.append((weights.unsqueeze(-1) * values).sum(-2))
    return torch.stack(ys, 1), state(output_final_state, q)


def chunk_hgrn(x, g, initial_state=None, output_final_state=False, cu_seqlens=None):
    one = x.new_ones(1, 1, 1, 1)
    return loop(one, one, x.unsqueeze(-1), g.exp().unsqueeze(-1)).squeeze(-1), state(output_final_state, x)


def chunk_rwkv6(
    r, k, v, w, u, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, cu_seqlens_cpu=None,
    **kwargs,
):  # fmt: skip
    return loop(scaled(r, scale), k, v, w.exp(), u=u), state(output_final_state, r)


def length_one(t: Tensor) -> Tensor:
    return t * torch.rsqrt(t.square().sum(-1, keepdim=True) + 1e-6)


def chunk_delta_rule(
    q, k, v, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    cu_seqlens=None, cu_seqlens_cpu=None, **kwargs,
):  # fmt: skip
    g = torch.zeros_like(v[..., 0])
    return chunk_gated_delta_rule(q, k, v, g, beta, scale, None, output_final_state, use_qk_l2norm_in_kernel)


def chunk_gated_delta_rule(
    q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, state_v_first=False, cu_seqlens=None, **kwargs,
):  # fmt: skip
    if kwargs.get("use_gate_in_kernel"):
        g = -kwargs["A_log"].exp() * F.softplus(g + kwargs["dt_bias"])
    return chunk_kda(
        q, k, v, g.unsqueeze(-1), beta, scale, None, output_final_state, use_qk_l2norm_in_kernel, False,
        use_beta_sigmoid_in_kernel, allow_neg_eigval,
    )  # fmt: skip


def fused_recurrent_gated_delta_rule(
    q, k, v, g=None, gk=None, gv=None, beta=None, scale=None, initial_state=None, output_final_state=False, **kwargs
):  # fmt: skip
    g = torch.zeros_like(v[..., 0]) if g is None else g
    beta = torch.ones_like(v[..., 0]) if beta is None else beta
    return chunk_gated_delta_rule(q, k, v, g, beta, scale, initial_state, output_final_state, **kwargs)


def chunk_kda(
    q, k, v, g, beta, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    use_gate_in_kernel=False, use_beta_sigmoid_in_kernel=False, allow_neg_eigval=False, safe_gate=False,
    lower_bound=None, disable_recompute=False, return_intermediate_states=False, state_v_first=False, cu_seqlens=None,
    **kwargs,
):  # fmt: skip
    if use_gate_in_kernel:
        rate, g = kwargs["A_log"].exp().view(-1, 1), g + kwargs["dt_bias"].view(g.shape[2:])
        g = -rate * F.softplus(g) if lower_bound is None else lower_bound * (rate * g).sigmoid()
    if use_qk_l2norm_in_kernel:
        q, k = length_one(q), length_one(k)
    if use_beta_sigmoid_in_kernel:
        beta = (2 if allow_neg_eigval else 1) * beta.sigmoid()
    q, k = (t.repeat_interleave(v.shape[2] // t.shape[2], 2) for t in (q, k))
    write = beta.unsqueeze(-1) * k
    y = loop(scaled(q, scale), write, v, g.exp(), recall=g.exp() * k, erase=write)
    return y, state(output_final_state, q)


def chunk_gated_delta_product(
    q, k, v, g, beta, num_householder, scale=None, initial_state=None, output_final_state=False,
    use_qk_l2norm_in_kernel=False, cu_seqlens=None, cu_seqlens_cpu=None, cp_context=None,
):  # fmt: skip
    if use_qk_l2norm_in_kernel:
        q, k = length_one(q), length_one(k)
    q, h, ys = scaled(q, scale), q.new_zeros(()), []
    for t in range(q.shape[1]):
        for j in range(t * num_householder, (t + 1) * num_householder):
            write = (beta[:, j, :, None] * k[:, j]).unsqueeze(-1)
            a = g[:, t, :, None].exp() if j % num_householder == 0 else torch.ones_like(g[:, t, :, None])
            w = ((a * k[:, j]).unsqueeze(-1) * h).sum(-2, keepdim=True)
            h = a.unsqueeze(-1) * h - write * w + write * v[:, j].unsqueeze(-2)
        ys.append((q[:, t].unsqueeze(-1) * h).sum(-2))
    return torch.stack(ys, 1), state(output_final_state, q)


def chunk_comba(
    q, k, v, p, g, beta=None, scale=None, initial_state=None, output_final_state=False, use_qk_l2norm_in_kernel=False,
    cu_seqlens=None, cu_seqlens_cpu=None,
):  # fmt: skip
    if use_qk_l2norm_in_kernel:
        q, k, p = length_one(q), length_one(k), length_one(p)
    a, write = g.exp().unsqueeze(-1), beta.unsqueeze(-1) * k
    return loop(scaled(q, scale), write, v, a, recall=a * p, erase=write), state(output_final_state, q)


def chunk_dplr_delta_rule(
    q, k, v, a, b, gk, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, safe_gate=False,
    chunk_size=None, **kwargs,
):  # fmt: skip
    return loop(scaled(q, scale), k, v, gk.exp(), recall=a, erase=-b), state(output_final_state, q)


def chunk_iplr_delta_rule(
    q, k, v, a, b, scale=None, initial_state=None, output_final_state=False, cu_seqlens=None, cu_seqlens_cpu=None,
    **kwargs,
):  # fmt: skip
    return loop(scaled(q, scale), k, v, q.new_ones(1, 1, 1, 1), recall=a, erase=-b), state(output_final_state, q)


def chunk_rwkv7(
    r, w, k, v, a, b, scale=1.0, initial_state=None, output_final_state=False, cu_seqlens=None, safe_gate=False,
    lower_bound=None,
):  # fmt: skip
    return chunk_dplr_delta_rule(r, k, v, a, b, w, scale, None, output_final_state)


def fused_mul_recurrent_rwkv7(
    r, w, k, v, kk, a, scale=1.0, initial_state=None, output_final_state=False, reverse=False, cu_seqlens=None
):  # fmt: skip
    return chunk_rwkv7(r, w, k, v, -kk, kk * a, scale, None, output_final_state)


# --- RWKV -------------------------------------------------------------------------------------------------------------


def wkv(w: Tensor, u: Tensor, k: Tensor, v: Tensor) -> Tensor:
    number = total = torch.zeros_like(k[:, 0])
    ys = []
    for t in range(k.shape[1]):
        now = torch.exp(u + k[:, t])
        ys.append((number + now * v[:, t]) / (total + now))
        decay, weight = torch.exp(-w.exp()), torch.exp(k[:, t])
        number, total = decay * number + weight * v[:, t], decay * total + weight
    return torch.stack(ys, 1)


def WKV(B, T, C, w, u, k, v):
    return wkv(w, u, k, v)


def rwkv_linear_attention(time_decay, time_first, key, value, state=None, return_state=False):
    return wkv(time_decay, time_first, key, value), state


def fused_recurrent_rwkv4(w, u, k, v, state):
    return wkv(w, u, k, v), state


def WKV_6(B, T, C, H, r, k, v, w, u):
    r, k, v = (t.view(B, T, H, -1) for t in (r, k, v))
    w = w.view(B, T, H, -1) if w.dim() == 3 else w.view(1, 1, H, -1)
    return loop(r, k, v, torch.exp(-w.exp()), u=u.view(H, -1)).view(B, T, C)


def WindBackstepping(w, q, k, v, z, b):
    return loop(q, k, v, torch.exp(-w.exp()), recall=z, erase=-b)


def WKV_7(r, w, k, v, a, b):
    r, w, k, v, a, b = (t.unflatten(-1, (-1, 64)) for t in (r, w, k, v, a, b))
    return WindBackstepping(w, r, k, v, a, b).flatten(2)


# --- xLSTM and parallel scans -----------------------------------------------------------------------------------------


def memory(q: Tensor, k: Tensor, v: Tensor, i: Tensor, f: Tensor, eps: float, m: Any) -> Tensor:
    """The matrix memory of (B, H, L, ...), from the logarithm of its size, or None."""
    log_f = F.logsigmoid(f)
    C, n, ys = torch.zeros_like(k[:, :, 0, :, None] * v[:, :, 0, None]), torch.zeros_like(k[:, :, 0]), []
    for t in range(q.shape[2]):
        before = i[:, :, t] if m is None else m
        m = torch.maximum(log_f[:, :, t] + before, i[:, :, t]) if t or m is not None else before
        decay, gate = torch.exp(log_f[:, :, t] + before - m)[..., None], torch.exp(i[:, :, t] - m)[..., None]
        key, query = gate * k[:, :, t], q[:, :, t] * q.shape[-1] ** -0.5
        C, n = decay[..., None] * C + key[..., None] * v[:, :, t, None], decay * n + key
        total = torch.maximum((query * n).sum(-1).abs(), torch.exp(-m)) + eps
        ys.append((query[..., None] * C).sum(-2) / total[..., None])
    return torch.stack(ys, 2)


def mlstm_chunkwise(
    q, k, v, i, f, c_initial=None, n_initial=None, m_initial=None, return_last_states=False, eps=1e-6, chunk_size=64,
    **kwargs,
):  # fmt: skip
    y = memory(q, k, v, i, f, eps, torch.zeros_like(i[:, :, 0]))
    return (y, (y[:, :, -1], f, i)) if return_last_states else y


def wrap_chunkwise(
    mlstm_chunkwise_kernel, mlstm_sequence_kernel, q, k, v, f, i, c_initial=None, n_initial=None, m_initial=None,
    return_last_states=True, eps=1e-6, chunk_size=64,
):  # fmt: skip
    return mlstm_chunkwise(q, k, v, i, f, None, None, None, return_last_states, eps)


def mlstm_parallel(
    q, k, v, i, f, c_initial=None, n_initial=None, m_initial=None, return_last_states=False, eps=1e-6, **kwargs
):  # fmt: skip
    return memory(q, k, v, i, f, eps, None)


def parallel_stabilized_simple(
    queries, keys, values, igate_preact, fgate_preact, lower_triangular_matrix=None, stabilize_rowwise=True, eps=1e-6,
    **kwargs,
):  # fmt: skip
    return memory(queries, keys, values, igate_preact.squeeze(-1), fgate_preact.squeeze(-1), eps, None)


def mlstm_siging(
    q, k, v, i, f, c_initial=None, n_initial=None, m_initial=None, return_last_states=False, eps=1e-6,
    stable_fgate=True, normalize=True, **kwargs,
):  # fmt: skip
    q, k, v, i, f = (t.transpose(1, 2) for t in (q, k, v, i, f))
    parts = scaled(q, None), i.sigmoid()[..., None] * k, f.sigmoid()[..., None]
    y = loop(parts[0], parts[1], v, parts[2])
    if normalize:
        total = loop(parts[0], parts[1], torch.ones_like(v[..., :1]), parts[2])
        y = y / (total.abs().clamp(min=1) + eps)
    return y.transpose(1, 2)


def pscan(A, X):
    h, hs = torch.zeros_like(X[:, 0]), []
    for t in range(X.shape[1]):
        h = A[:, t] * h + X[:, t]
        hs.append(h)
    return torch.stack(hs, 1)


def PScan(A_in, X_in):
    return pscan(A_in, X_in)


def associative_scan(combine_fn, xs, dim, reverse=False, combine_mode="pointwise"):
    steps = [xs] if isinstance(xs, Tensor) else list(xs)
    parts = list(zip(*(t.unbind(dim) for t in steps)))
    parts = parts[::-1] if reverse else parts
    done = [parts[0] if len(steps) > 1 else parts[0][0]]
    for part in parts[1:]:
        done.append(combine_fn(done[-1], part if len(steps) > 1 else part[0]))
    done = done[::-1] if reverse else done
    if len(steps) == 1:
        return torch.stack(done, dim)
    return tuple(torch.stack(each, dim) for each in zip(*done))


# --- Hidden from torch's functions ------------------------------------------------------------------------------------


def hidden(name: str, function: Callable[..., Any]) -> Any:
    """The same function under a name, as a kernel: torch's functions do not show what it computes."""

    @wraps(function)
    def kernel(*args: Any, **kwargs: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args, **kwargs)

    kernel.__name__ = name
    return kernel


def autograd_function(name: str, function: Callable[..., Any]) -> Any:
    """The same function as the forward run of a function of autograd of this name."""

    def forward(ctx: Any, *args: Any) -> Any:
        with torch._C.DisableTorchFunctionSubclass():
            return function(*args)

    own = inspect.signature(function)
    context = inspect.Parameter("ctx", inspect.Parameter.POSITIONAL_OR_KEYWORD)
    named = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
    forward.__signature__ = inspect.Signature([context, *named])  # type: ignore[attr-defined]
    return type(name, (torch.autograd.Function,), {"forward": staticmethod(forward)})


FUNCTIONS: dict[str, Callable[..., Any]] = {
    **dict.fromkeys(("causal_conv1d_fn", "causal_conv1d_ref"), causal_conv1d_fn),
    "causal_conv1d": causal_conv1d,
    **dict.fromkeys(("selective_scan_fn", "selective_scan_ref"), selective_scan_fn),
    "mamba_inner_fn": mamba_inner_fn,
    "mamba_inner_fn_no_out_proj": mamba_inner_fn_no_out_proj,
    **dict.fromkeys(
        ("mamba_chunk_scan_combined", "mamba_chunk_scan", "ssd_selective_scan"), mamba_chunk_scan_combined
    ),
    **dict.fromkeys(
        ("mamba_split_conv1d_scan_combined", "mamba_split_conv1d_scan_ref"), mamba_split_conv1d_scan_combined
    ),
    "chunk_gla": chunk_gla,
    **dict.fromkeys(("fused_recurrent_gla", "naive_recurrent_gla"), fused_recurrent_gla),
    **dict.fromkeys(
        ("chunk_simple_gla", "fused_chunk_simple_gla", "fused_recurrent_simple_gla"), chunk_simple_gla
    ),
    "parallel_simple_gla": parallel_simple_gla,
    **dict.fromkeys(
        ("chunk_retention", "fused_chunk_retention", "fused_recurrent_retention", "parallel_retention"),
        chunk_retention,
    ),
    **dict.fromkeys(("chunk_lightning_attn", "fused_recurrent_lightning_attn"), chunk_lightning_attn),
    **dict.fromkeys(
        ("chunk_linear_attn", "fused_chunk_linear_attn", "fused_recurrent_linear_attn"), chunk_linear_attn
    ),
    **dict.fromkeys(("parallel_based", "fused_chunk_based"), parallel_based),
    **dict.fromkeys(("chunk_gsa", "fused_recurrent_gsa"), chunk_gsa),
    **dict.fromkeys(("chunk_hgrn", "fused_recurrent_hgrn", "naive_recurrent_hgrn"), chunk_hgrn),
    **dict.fromkeys(("chunk_rwkv6", "fused_recurrent_rwkv6"), chunk_rwkv6),
    **dict.fromkeys(("chunk_delta_rule", "fused_recurrent_delta_rule"), chunk_delta_rule),
    **dict.fromkeys(("chunk_gated_delta_rule", "chunk_gdn"), chunk_gated_delta_rule),
    **dict.fromkeys(
        ("fused_recurrent_gated_delta_rule", "fused_recurrent_gdn"), fused_recurrent_gated_delta_rule
    ),
    **dict.fromkeys(("chunk_kda", "fused_recurrent_kda"), chunk_kda),
    "chunk_gated_delta_product": chunk_gated_delta_product,
    **dict.fromkeys(("chunk_comba", "fused_recurrent_comba"), chunk_comba),
    **dict.fromkeys(("chunk_dplr_delta_rule", "fused_recurrent_dplr_delta_rule"), chunk_dplr_delta_rule),
    **dict.fromkeys(("chunk_iplr_delta_rule", "fused_recurrent_iplr_delta_rule"), chunk_iplr_delta_rule),
    **dict.fromkeys(("chunk_rwkv7", "fused_recurrent_rwkv7"), chunk_rwkv7),
    "fused_mul_recurrent_rwkv7": fused_mul_recurrent_rwkv7,
    "fused_recurrent_rwkv4": fused_recurrent_rwkv4,
    "rwkv_linear_attention": rwkv_linear_attention,
    "RUN_CUDA": WKV,
    **dict.fromkeys(("RUN_CUDA_RWKV5", "RUN_CUDA_RWKV6"), WKV_6),
    **dict.fromkeys(
        (
            "mlstm_chunkwise__native_autograd", "mlstm_chunkwise__native_custbw", "mlstm_chunkwise__limit_chunk",
            "mlstm_chunkwise__xl_chunk", "mlstm_recurrent_sequence__native_fw",
            "mlstm_recurrent_sequence__triton_alternate_step_fw", "mlstm_recurrent_sequence__triton_step_fused_fw",
        ),
        mlstm_chunkwise,
    ),
    **dict.fromkeys(
        (
            "wrap_chunkwise__arbitrary_sequence_length", "wrap_chunkwise__arbitrary_sequence_length_with_padding",
            "wrap_chunkwise__pad_zeros",
        ),
        wrap_chunkwise,
    ),
    **dict.fromkeys(
        (
            "mlstm_parallel__native_autograd", "mlstm_parallel__native_custbw",
            "mlstm_parallel__native_stablef_autograd", "mlstm_parallel__native_stablef_custbw",
            "mlstm_parallel__limit_headdim",
        ),
        mlstm_parallel,
    ),
    "parallel_stabilized_simple": parallel_stabilized_simple,
    **dict.fromkeys(
        (
            "mlstm_siging_parallel__native_autograd", "mlstm_siging_parallel__native_custbw",
            "mlstm_siging_chunkwise__xl_chunk",
        ),
        mlstm_siging,
    ),
    "pscan": pscan,
    "associative_scan": associative_scan,
}  # fmt: skip
"""By name: the loop of a function."""

AUTOGRAD: dict[str, Callable[..., Any]] = {
    "CausalConv1dFn": causal_conv1d_fn,
    "SelectiveScanFn": selective_scan_fn,
    **dict.fromkeys(
        (
            "SelectiveScan", "SelectiveScanCore", "SelectiveScanOflex", "SelectiveScanCuda", "SelectiveScanMamba",
            "SelectiveScanEasy",
        ),
        forked_scan_fn,
    ),
    "MambaInnerFn": mamba_inner_fn,
    "MambaInnerFnNoOutProj": mamba_inner_fn_no_out_proj,
    "MambaChunkScanCombinedFn": mamba_chunk_scan_combined,
    "MambaSplitConv1dScanCombinedFn": mamba_split_conv1d_scan_combined,
    "RwkvLinearAttention": rwkv_linear_attention,
    "WKV": WKV,
    **dict.fromkeys(("WKV_5", "WKV_6"), WKV_6),
    "WKV_7": WKV_7,
    "WindBackstepping": WindBackstepping,
    "PScan": PScan,
}  # fmt: skip
"""By name: the loop of a function of autograd."""
