"""The delta rule of Gated DeltaNet and of Kimi delta attention: a state that forgets, erases and then writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from captum_ssm.adapters.reading import padding, parameters, to_heads
from captum_ssm.gates import activation, inverse_length, inverse_rms, secant
from captum_ssm.layers.mixers import register
from captum_ssm.operators import CausalConv, Chain, DeltaScan, Diagonal, Operator, Projection

_EPS = 1e-6
"""Added to the squared length of every query and key. A constant of transformers and of its kernels."""


@register("Qwen3NextGatedDeltaNet", kernel="GDN", family="qwen3_next")
@register("Qwen3_5GatedDeltaNet", kernel="GDN", family="qwen3_5")
@register("Qwen3_5MoeGatedDeltaNet", kernel="GDN", family="qwen3_5_moe")
@register("Qwen4ExpTextGatedDeltaNet", kernel="GDN", family="qwen4_exp")
@register("OlmoHybridGatedDeltaNet", kernel="GDN", family="olmo_hybrid")
def gdn(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Gated DeltaNet: the delta rule with one decay for each head.

    ``y = W_out diag(act(z)) diag(norm) S diag(act) M_conv W_v diag(mask) x``, where S is the recurrence
    ``h_t = (I - beta_t k_t k_t^T) a_t h_{t-1} + beta_t k_t v_t``, ``y_t = <q_t, h_t> / sqrt(N)`` of unit q and k, with
    ``a = exp(-exp(A_log) softplus(W_a x + dt_bias))`` and ``beta = sigmoid(W_b x)``, twice that where OLMo Hybrid
    allows negative eigenvalues. Each key head serves a group of consecutive value heads.

    Args:
        mixer: ``Qwen3NextGatedDeltaNet``, ``Qwen3_5GatedDeltaNet``, ``Qwen3_5MoeGatedDeltaNet``,
            ``Qwen4ExpTextGatedDeltaNet`` or ``OlmoHybridGatedDeltaNet`` of transformers.
        x: Input (B, L, E).
        kwargs: ``attention_mask`` (B, L), 0 at padding, is respected.

    Returns:
        Chain of ``out, gate, norm, scan, act, conv, in`` and, with a mask, ``mask``.

    Source:
        transformers ``modeling_qwen3_next.py``, ``modeling_qwen3_5.py``, ``modeling_qwen3_5_moe.py``,
        ``modeling_qwen4_exp.py``, ``modeling_olmo_hybrid.py``; Yang et al. 2024 (arXiv 2412.06464), equation 10.
    """
    weights, mask = parameters(mixer, x), padding(kwargs, x)
    real = Chain(mask).apply(x)
    *qkv, W_z, W_b, W_a = _gdn_projections(mixer, weights)
    largest = 2 if getattr(mixer, "allow_neg_eigval", False) else 1
    beta = largest * F.linear(real, W_b).sigmoid()
    log_decay = -weights["A_log"].exp() * F.softplus(F.linear(real, W_a) + weights["dt_bias"])
    factors = _delta_rule(mixer, weights, real, qkv, log_decay.unsqueeze(-1), beta, F.linear(real, W_z))
    return Chain({**factors, **mask})


@register("KimiLinearDeltaAttention", kernel="KDA", family="kimi_linear")
@register("BailingHybridDeltaAttention", kernel="KDA", family="bailing_hybrid")
@register("Glm5NextTextLinearAttention", kernel="KDA", family="glm5_next")
def kda(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Kimi delta attention: the delta rule with a decay for each state.

    The equation is that of :func:`gdn` with ``diag(a_t)``, ``a_t`` of N entries, in place of the number ``a_t``, and
    ``sigmoid(z)`` as the gate. With ``f = W_f x + dt_bias`` the logarithm of the decay is ``-exp(A_log) softplus(f)``,
    or, in a gate with a lower bound (negative), ``bound * sigmoid(exp(A_log) f)``.

    Args:
        mixer: ``KimiLinearDeltaAttention``, ``BailingHybridDeltaAttention`` or ``Glm5NextTextLinearAttention`` of
            transformers.
        x: Input (B, L, E).
        kwargs: ``attention_mask`` (B, L), 0 at padding, is respected.

    Returns:
        Chain of ``out, gate, norm, scan, act, conv, in`` and, with a mask, ``mask``.

    Source:
        transformers ``modeling_kimi_linear.py``, ``modeling_bailing_hybrid.py``, ``modeling_glm5_next.py``; Kimi Team
        2025 (arXiv 2510.26692), equation 1.
    """
    weights, mask = parameters(mixer, x), padding(kwargs, x)
    real = Chain(mask).apply(x)
    qkv = [weights[f"{name}_proj.weight"] for name in "qkv"]
    beta = F.linear(real, weights["b_proj.weight"]).sigmoid()
    f = _project(weights, "forget_gate.f", real) + weights["forget_gate.dt_bias"]
    f, rate = f.unflatten(-1, (mixer.num_heads, -1)), weights["forget_gate.A_log"].exp().view(-1, 1)
    bound = _lower_bound(mixer.forget_gate)
    log_decay = -rate * F.softplus(f) if bound is None else bound * (rate * f).sigmoid()
    factors = _delta_rule(mixer, weights, real, qkv, log_decay, beta, _project(weights, "g", real))
    return Chain({**factors, **mask})


def _delta_rule(
    mixer: Any,
    weights: Mapping[str, Tensor],
    x: Tensor,
    qkv: Sequence[Tensor],
    log_decay: Tensor,
    beta: Tensor,
    z: Tensor,
) -> dict[str, Operator]:
    """Return the factors that all layers of the delta rule have.

    Args:
        mixer: The layer.
        weights: Its parameters by name.
        x: Its input (B, L, E), 0 at padding.
        qkv: Projections of queries (Hk·N, E), keys (Hk·N, E) and values (H·P, E): H // Hk heads share a key.
        log_decay: (B, L, H, N), or (B, L, H, 1) where a head's states share it; not above 0.
        beta: How much of what is found at its key a token erases and rewrites, (B, L, H).
        z: Input of the output gate (B, L, H·P).

    Returns:
        ``out, gate, norm, scan, act, conv, in``.
    """
    out, norm = ("o_proj", "o_norm") if hasattr(mixer, "o_norm") else ("out_proj", "norm")
    gated_norm, scale = getattr(mixer, norm), weights[f"{norm}.weight"]
    H, P = beta.shape[-1], len(scale)
    Hk = getattr(mixer, "num_k_heads", H)

    taps = weights["conv1d.weight"].squeeze(1).split([len(W) for W in qkv])
    convs = [CausalConv(w) for w in taps]
    pre = [conv.apply(F.linear(x, W)) for conv, W in zip(convs, qkv)]
    acts = [secant(mixer.activation, u) for u in pre]
    queries, keys, values = (act * u for act, u in zip(acts, pre))

    heads = [to_heads(t.unflatten(-1, (Hk, -1)), H) for t in (queries, keys)]  # (B, L, H, N)
    q, k = (t * inverse_length(t, _EPS) for t in heads)
    a, write = log_decay.exp(), beta.unsqueeze(-1) * k
    scan = DeltaScan(a=a, b=write, c=q * q.shape[-1] ** -0.5, recall=a * k, erase=write, head_size=P)
    found = scan.apply(values).unflatten(-1, (H, P))

    return {
        "out": Projection(weights[f"{out}.weight"]),
        "gate": Diagonal(activation(gated_norm.activation, z)),
        "norm": Diagonal((inverse_rms(found, gated_norm.variance_epsilon) * scale).flatten(-2)),
        "scan": scan,
        "act": Diagonal(acts[-1]),
        "conv": convs[-1],
        "in": Projection(qkv[-1]),
    }


def _gdn_projections(mixer: Any, weights: Mapping[str, Tensor]) -> tuple[Tensor, ...]:
    """Return the projections of queries, keys, values, output gate, beta and decay, each in the order of its heads."""
    if "q_proj.weight" in weights:
        return tuple(weights[f"{name}_proj.weight"] for name in "qkvgba")
    if "in_proj_qkv.weight" in weights:
        qkv = weights["in_proj_qkv.weight"].split([mixer.key_dim, mixer.key_dim, mixer.value_dim])
        return (*qkv, *(weights[f"in_proj_{name}.weight"] for name in "zba"))
    # Qwen3-Next keeps together what belongs to one key head: its q and k, then v and z of all its value heads
    N, D = mixer.head_k_dim, mixer.value_dim // mixer.num_k_heads
    qkvz = weights["in_proj_qkvz.weight"].unflatten(0, (mixer.num_k_heads, -1)).split([N, N, D, D], dim=1)
    ba = weights["in_proj_ba.weight"].unflatten(0, (mixer.num_k_heads, -1)).chunk(2, dim=1)
    return tuple(W.flatten(0, 1) for W in (*qkvz, *ba))


def _project(weights: Mapping[str, Tensor], name: str, x: Tensor) -> Tensor:
    """Return ``x`` through the projection of this name, which may be a product of two, ``a`` before ``b``."""
    for part in ("proj", "a_proj", "b_proj"):
        if f"{name}_{part}.weight" in weights:
            x = F.linear(x, weights[f"{name}_{part}.weight"])
    return x


def _lower_bound(forget_gate: Any) -> float | None:
    """Return the lower bound of the logarithm of a decay, or None: Kimi has none, Bailing and GLM may leave it out."""
    if not getattr(forget_gate, "safe_gate", True):
        return None
    return getattr(forget_gate, "lower_bound", getattr(forget_gate, "safe_gate_lower_bound", None))
