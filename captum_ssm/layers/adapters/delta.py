"""The delta rule of Gated DeltaNet and of Kimi delta attention: a state that forgets, erases and then writes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from torch import Tensor

from captum_ssm.layers.activations import activation, secant
from captum_ssm.layers.delta_rule import delta_scan, log_decay, unit
from captum_ssm.layers.heads import to_heads
from captum_ssm.layers.mixers import register
from captum_ssm.layers.norms import group_norm
from captum_ssm.layers.padding import own_masking, padding_mask
from captum_ssm.layers.parameters import low_rank, parameters, projection, projections
from captum_ssm.operators import CausalConv, Chain, Diagonal, Operator, Projection


@register("Qwen3NextGatedDeltaNet", kernel="GDN", family="qwen3_next")
@register("Qwen3_5GatedDeltaNet", kernel="GDN", family="qwen3_5")
@register("Qwen3_5MoeGatedDeltaNet", kernel="GDN", family="qwen3_5_moe")
@register("Qwen4ExpTextGatedDeltaNet", kernel="GDN", family="qwen4_exp")
@register("OlmoHybridGatedDeltaNet", kernel="GDN", family="olmo_hybrid")
def gdn(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose a Gated DeltaNet: the delta rule with one decay for each head.

    Equation::

        y = W_out diag(act(z)) diag(norm) S diag(act) M_conv W_v diag(mask) x
        S: h_t = (I - beta_t k_t k_t^T) a_t h_{t-1} + beta_t k_t v_t,  y_t = <q_t, h_t> / sqrt(N)
        a = exp(-exp(A_log) softplus(W_a x + dt_bias)),  beta = sigmoid(W_b x)

    Queries and keys have length 1. Beta is doubled where OLMo Hybrid allows negative eigenvalues. Each key head serves
    a group of consecutive value heads.

    Args:
        mixer: ``Qwen3NextGatedDeltaNet``, ``Qwen3_5GatedDeltaNet``, ``Qwen3_5MoeGatedDeltaNet``,
            ``Qwen4ExpTextGatedDeltaNet`` or ``OlmoHybridGatedDeltaNet`` of transformers.
        x: Input (B, L, E).
        kwargs: Arguments of the call; ``attention_mask`` (B, L) is 0 at padding.

    Returns:
        Chain of ``out``, ``gate``, ``norm``, ``scan``, ``act``, ``conv``, ``in`` and, with a mask, ``mask``.

    Source:
        transformers ``modeling_qwen3_next.py``, ``modeling_qwen3_5.py``, ``modeling_qwen3_5_moe.py``,
        ``modeling_qwen4_exp.py``, ``modeling_olmo_hybrid.py``; Yang et al. 2024 (arXiv 2412.06464), equation 10.
    """
    weights, mask = parameters(mixer, x), padding_mask(own_masking(mixer, kwargs, x), x)
    masked = Chain(mask).apply(x)
    *qkv, W_z, W_b, W_a = _gdn_projections(mixer, weights)
    largest = 2 if getattr(mixer, "allow_neg_eigval", False) else 1
    beta = largest * W_b.apply(masked, bias=True).sigmoid()
    log_a = log_decay(W_a.apply(masked, bias=True), weights["A_log"], weights["dt_bias"])
    factors = _delta_layer(mixer, weights, masked, qkv, log_a, beta, W_z.apply(masked, bias=True))
    return Chain({**factors, **mask})


@register("KimiLinearDeltaAttention", kernel="KDA", family="kimi_linear")
@register("BailingHybridDeltaAttention", kernel="KDA", family="bailing_hybrid")
@register("Glm5NextTextLinearAttention", kernel="KDA", family="glm5_next")
def kda(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose a Kimi delta attention: the delta rule with a decay for each state.

    Equation::

        y = W_out diag(sigmoid(z)) diag(norm) S diag(act) M_conv W_v diag(mask) x
        S: h_t = (I - beta_t k_t k_t^T) diag(a_t) h_{t-1} + beta_t k_t v_t,  y_t = <q_t, h_t> / sqrt(N)
        a = exp(-exp(A_log) softplus(f + dt_bias)),  f = W_f x,  beta = sigmoid(W_b x)

    Queries and keys have length 1. In a gate with a lower bound, a negative number, the logarithm of the decay is
    ``bound * sigmoid(exp(A_log) (f + dt_bias))``.

    Args:
        mixer: ``KimiLinearDeltaAttention``, ``BailingHybridDeltaAttention`` or ``Glm5NextTextLinearAttention`` of
            transformers.
        x: Input (B, L, E).
        kwargs: Arguments of the call; ``attention_mask`` (B, L) is 0 at padding.

    Returns:
        Chain of ``out``, ``gate``, ``norm``, ``scan``, ``act``, ``conv``, ``in`` and, with a mask, ``mask``.

    Source:
        transformers ``modeling_kimi_linear.py``, ``modeling_bailing_hybrid.py``, ``modeling_glm5_next.py``; Kimi Team
        2025 (arXiv 2510.26692), equation 1.
    """
    weights, mask = parameters(mixer, x), padding_mask(kwargs, x)
    masked = Chain(mask).apply(x)
    qkv = [projection(weights, f"{name}_proj") for name in "qkv"]
    beta = projection(weights, "b_proj").apply(masked, bias=True).sigmoid()
    f = low_rank(weights, "forget_gate.f", masked)
    A_log, dt_bias = weights["forget_gate.A_log"], weights["forget_gate.dt_bias"]
    log_a = log_decay(f, A_log, dt_bias, _lower_bound(mixer.forget_gate))
    factors = _delta_layer(mixer, weights, masked, qkv, log_a, beta, low_rank(weights, "g", masked))
    return Chain({**factors, **mask})


def _delta_layer(
    mixer: Any,
    weights: Mapping[str, Tensor],
    x: Tensor,
    qkv: Sequence[Projection],
    log_a: Tensor,
    beta: Tensor,
    z: Tensor,
) -> dict[str, Operator]:
    """Build the factors that all layers of the delta rule have.

    Args:
        mixer: The layer.
        weights: Parameters by name.
        x: Input (B, L, E), 0 at padding.
        qkv: Projections to queries (Hk·N), keys (Hk·N) and values (H·P): H // Hk heads share a key.
        log_a: Logarithms of the decays (B, L, H, N), or (B, L, H, 1) where the states of a head share it.
        beta: Share of the value found at its key that a token erases and rewrites, (B, L, H).
        z: Input of the output gate (B, L, H·P).

    Returns:
        ``out``, ``gate``, ``norm``, ``scan``, ``act``, ``conv``, ``in``.
    """
    out, norm = ("o_proj", "o_norm") if hasattr(mixer, "o_norm") else ("out_proj", "norm")
    gated_norm, scale, H = getattr(mixer, norm), weights[f"{norm}.weight"], beta.shape[-1]
    convs = _convolutions(weights, [into.sizes[0] for into in qkv])
    pre = [conv.apply(into.apply(x, bias=True)) for conv, into in zip(convs, qkv)]
    acts = [secant(_activation(mixer), u) for u in pre]
    queries, keys, values = (act * u for act, u in zip(acts, pre))

    key_heads = getattr(mixer, "num_k_heads", H)
    q, k = (unit(to_heads(t.unflatten(-1, (key_heads, -1)), H)) for t in (queries, keys))  # (B, L, H, N)
    scan = delta_scan(q, k, log_a.exp(), beta, P=len(scale))
    return {
        "out": projection(weights, out),
        "gate": Diagonal(activation(getattr(gated_norm, "activation", "silu"), z)),
        "norm": group_norm(scan.apply(values), H, gated_norm.variance_epsilon, scale),
        "scan": scan,
        "act": Diagonal(acts[-1]),
        "conv": convs[-1],
        "in": qkv[-1],
    }


def _convolutions(weights: Mapping[str, Tensor], sizes: Sequence[int]) -> list[CausalConv]:
    """Build the convolutions of queries, keys and values, which a layer keeps in a single one or by themselves."""
    if "conv1d.weight" in weights:
        return [CausalConv(taps) for taps in weights["conv1d.weight"].squeeze(1).split(sizes)]
    return [CausalConv(weights[f"{name}_conv1d.weight"].squeeze(1)) for name in "qkv"]


def _activation(mixer: Any) -> str:
    """Read the activation after the convolutions.

    Code of earlier releases has SiLU where it runs without the kernel that it was to call, and OLMo Hybrid always had.

    Args:
        mixer: The layer.

    Returns:
        The name of the activation.
    """
    return getattr(mixer, "activation", "silu") if getattr(mixer, "causal_conv1d_fn", mixer) is not None else "silu"


def _gdn_projections(mixer: Any, weights: Mapping[str, Tensor]) -> list[Projection]:
    """Build the projections to queries, keys, values, output gate, beta and decay, each in the order of its heads."""
    if "q_proj.weight" in weights:
        return [projection(weights, f"{name}_proj") for name in "qkvgba"]
    if "in_proj_qkv.weight" in weights:
        qkv = projections(weights, "in_proj_qkv", [mixer.key_dim, mixer.key_dim, mixer.value_dim])
        return [*qkv, *(projection(weights, f"in_proj_{name}") for name in "zba")]
    # Qwen3-Next groups the rows by key head: its q and k, then v and z of all its value heads
    groups = mixer.num_k_heads
    N, D, H = mixer.head_k_dim, mixer.value_dim // groups, mixer.num_v_heads // groups
    qkvz = projections(weights, "in_proj_qkvz", [N, N, D, D], groups)
    return [*qkvz, *projections(weights, "in_proj_ba", [H, H], groups)]


def _lower_bound(forget_gate: Any) -> float | None:
    """Read the lower bound of a decay's logarithm: Kimi has none, Bailing and GLM may leave it out."""
    if not getattr(forget_gate, "safe_gate", True):
        return None
    return getattr(forget_gate, "lower_bound", getattr(forget_gate, "safe_gate_lower_bound", None))
