"""Softmax attention, which hybrid models have between their recurrences. Its weights are read, not derived anew.

Rotary positions, norms of queries and keys, windows and sparse selections differ by family, and enter nothing but
the weights. So the layer's own forward pass gives them: run by a copy of the layer, since the user's runs whichever
implementation it was loaded with, and most return none. Only mamba_ssm's layer has no code that would give them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from captum_ssm.adapters.reading import parameters
from captum_ssm.errors import UnsupportedModelError
from captum_ssm.gates import inverse_rms, rotate
from captum_ssm.layers.isolated import isolated_copy
from captum_ssm.layers.mixers import register
from captum_ssm.operators import Attention, CausalConv, Chain, Diagonal, Operator, Projection

_MASKED = -1e4
"""What is added to the score of a key that is not seen; libraries and users write this or less."""

_SELECTORS = ("build_attention_mask_from_topk", "indexer")
"""Where a sparse layer has its mask from: a method of GLM-5's attention, a submodule of Qwen4's."""


@register("JambaAttention", kernel="softmax attention", family="jamba")
@register("ZambaAttention", kernel="softmax attention", family="zamba")
@register("Zamba2Attention", kernel="softmax attention", family="zamba2")
@register("BambaAttention", kernel="softmax attention", family="bamba")
@register("GraniteMoeHybridAttention", kernel="softmax attention", family="granitemoehybrid")
@register("FalconH1Attention", kernel="softmax attention", family="falcon_h1")
@register("NemotronHAttention", kernel="softmax attention", family="nemotron_h")
@register("RecurrentGemmaAttention", kernel="softmax attention", family="recurrent_gemma")
@register("Qwen3NextAttention", kernel="softmax attention", family="qwen3_next")
@register("Qwen3_5Attention", kernel="softmax attention", family="qwen3_5")
@register("Qwen3_5MoeAttention", kernel="softmax attention", family="qwen3_5_moe")
@register("Qwen4ExpTextAttention", kernel="softmax attention", family="qwen4_exp")
@register("OlmoHybridAttention", kernel="softmax attention", family="olmo_hybrid")
@register("MiniMaxAttention", kernel="softmax attention", family="minimax")
@register("Lfm2Attention", kernel="softmax attention", family="lfm2")
@register("Lfm2MoeAttention", kernel="softmax attention", family="lfm2_moe")
@register("Lfm3Attention", kernel="softmax attention", family="lfm3")
def grouped_attention(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Softmax attention whose query heads share the values of their group.

    ``y = W_out diag(sigmoid(gate)) weights W_v x + bias``; only some families have the gate.

    Args:
        mixer: Attention layer of transformers with ``v_proj`` and ``o_proj`` or ``out_proj``.
        x: Input (B, L, E).
        kwargs: All that enters the weights; ``layer_idx`` tells which layer's turn a shared Zamba2 layer has.

    Returns:
        Chain of ``out``, in gated layers ``gate``, ``attention`` and ``in``.

    Source:
        transformers ``modeling_<family>.py``; Vaswani et al. 2017 (arXiv 1706.03762), groups as in Ainslie et al.
        2023 (arXiv 2305.13245), gate as in Qiu et al. 2025 (arXiv 2505.06708).
    """
    named, weights = parameters(mixer, x), attention_weights(mixer, x, kwargs)
    H, P = weights.shape[1], mixer.head_dim

    gate = _gate_by_head(named, x, P)
    if len(named["q_proj.weight"]) == 2 * H * P:  # each head's query is followed by its gate
        queries = F.linear(x, named["q_proj.weight"], named.get("q_proj.bias")).unflatten(-1, (H, 2, P))
        gate = {"gate": Diagonal(queries[..., 1, :].flatten(-2).sigmoid())}

    value, bias = named["v_proj.weight"], named.get("v_proj.bias")
    if hasattr(mixer, "linear_v_adapter_list"):  # Zamba2: what the layers that share this one have of their own
        low_rank = f"linear_v_adapter_list.{mixer.layer_dic[kwargs['layer_idx']]}"
        value = value + named[f"{low_rank}.1.weight"] @ named[f"{low_rank}.0.weight"]

    def every_head(w: Tensor) -> Tensor:
        return w.unflatten(0, (-1, P)).repeat_interleave(mixer.num_key_value_groups, 0).flatten(0, 1)

    return Chain(
        {
            "out": _projection(named, "out_proj" if "out_proj.weight" in named else "o_proj"),
            **gate,
            "attention": Attention(weights, head_size=P),
            "in": Projection(every_head(value), None if bias is None else every_head(bias)),
        }
    )


@register("KimiLinearAttention", kernel="softmax attention", family="kimi_linear")
@register("BailingHybridAttention", kernel="softmax attention", family="bailing_hybrid")
@register("Glm5NextTextAttention", kernel="softmax attention", family="glm5_next")
def latent_attention(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Softmax attention whose keys and values are read from one small latent vector of each token.

    ``y = W_out diag(sigmoid(gate)) weights W_up diag(norm) W_down x + bias``; only Bailing has the gate.

    Args:
        mixer: Multi-head latent attention of transformers.
        x: Input (B, L, E).
        kwargs: All that enters the weights.

    Returns:
        Chain of ``out``, in gated layers ``gate``, ``attention``, ``value``, ``norm`` and ``in``.

    Source:
        transformers ``modeling_<family>.py``; DeepSeek-AI 2024 (arXiv 2405.04434), section 2.1.
    """
    named, weights = parameters(mixer, x), attention_weights(mixer, x, kwargs)
    H, P, rank = weights.shape[1], mixer.v_head_dim, mixer.kv_lora_rank

    bias = named.get("kv_a_proj_with_mqa.bias")
    into = Projection(named["kv_a_proj_with_mqa.weight"][:rank], None if bias is None else bias[:rank])
    scale = inverse_rms(into.apply(x, bias=True), mixer.kv_a_layernorm.variance_epsilon)
    keys_and_values = named["kv_b_proj.weight"].unflatten(0, (H, -1))  # head by head, a key and then a value
    return Chain(
        {
            "out": _projection(named, "o_proj"),
            **_gate_by_head(named, x, P),
            "attention": Attention(weights, head_size=P),
            "value": Projection(keys_and_values[:, -P:].flatten(0, 1)),
            "norm": Diagonal(scale * named["kv_a_layernorm.weight"]),
            "in": into,
        }
    )


@register("MHA", kernel="softmax attention", family="mamba_ssm")
def native_attention(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Softmax attention of mamba_ssm, which may convolve queries, keys and values, and have a gated MLP beside it.

    ``y = W_out [weights M_conv W_v x; silu(W_gate x) W_up x] + bias``. The channels of the MLP stand in the chain as
    further heads whose weights are 0: all that they give passes by the skip.

    Args:
        mixer: ``MHA`` of mamba_ssm.
        x: Input (B, L, E).
        kwargs: Nothing in them matters: the layer takes no mask.

    Returns:
        Chain of ``out``, with an MLP ``gate``, ``attention``, with a convolution ``conv``, and ``in``.

    Source:
        mamba_ssm ``modules/mha.py``; rotary positions as in flash_attn ``layers/rotary.py``.
    """
    named, H, P = parameters(mixer, x), mixer.num_heads, mixer.head_dim
    sizes = [H * P, mixer.num_heads_kv * P, mixer.num_heads_kv * P]

    def by_head(name: str) -> list[Tensor]:
        """Return what a parameter has for queries, keys and values (H·P, ...): a group's for each of its heads."""
        parts = named[name][: sum(sizes)].split(sizes)
        return [part.unflatten(0, (-1, P)).repeat_interleave(H * P // len(part), 0).flatten(0, 1) for part in parts]

    biases = by_head("in_proj.bias") if "in_proj.bias" in named else [None] * 3
    read: list[dict[str, Operator]] = [{"in": Projection(W, b)} for W, b in zip(by_head("in_proj.weight"), biases)]
    if mixer.d_conv:
        taps = zip(by_head("conv1d.weight"), by_head("conv1d.bias"))
        read = [{"conv": CausalConv(w.squeeze(1), b), **into} for (w, b), into in zip(taps, read)]
    q, k = (Chain(factors).apply(x, bias=True).unflatten(-1, (H, P)) for factors in read[:2])
    if mixer.rotary_emb_dim:
        q, k = (rotate(t, _positions(mixer.rotary_emb, x), mixer.rotary_emb.interleaved) for t in (q, k))

    scores = torch.einsum("bihp,bjhp->bhij", q, k) * (mixer.softmax_scale or P**-0.5)
    if mixer.causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=x.device).triu(1)
        scores = scores.masked_fill(later, -math.inf)
    factors = {"attention": Attention(scores.softmax(-1), head_size=P), **read[2]}
    if mixer.mlp_dim:
        factors = _beside_mlp(named, x, factors, mixer.mlp_dim // 2)
    return Chain({"out": _projection(named, "out_proj"), **factors})


def _positions(rotary: Any, x: Tensor) -> Tensor:
    """Return the angles (1, L, 1, A) by which queries and keys are turned.

    Raises:
        UnsupportedModelError: If their lengths change with the position too (XPos).
    """
    if rotary.scale_base is not None:
        raise UnsupportedModelError(
            "Rotary positions that also scale queries and keys (scale_base) are not supported. Register an adapter of "
            "your own for this MHA layer (captum_ssm.register)."
        )
    frequencies = rotary.base ** -(torch.arange(0, rotary.dim, 2, device=x.device, dtype=x.dtype) / rotary.dim)
    return torch.outer(torch.arange(x.shape[1], device=x.device, dtype=x.dtype), frequencies)[None, :, None]


def _beside_mlp(named: Mapping[str, Tensor], x: Tensor, factors: dict[str, Any], M: int) -> dict[str, Operator]:
    """Return the factors of an attention with the M channels of a gated MLP after its own: they pass all but the gate.

    Args:
        named: The layer's parameters, whose ``in_proj`` ends with what reads these channels, and then their gates.
        x: Its input (B, L, E).
        factors: ``attention``, perhaps ``conv``, and ``in``.
        M: How many channels.
    """
    attention, into = factors["attention"], factors["in"]
    D, P = attention.sizes[0], math.gcd(attention.head_size, M)
    weights = attention.weights.repeat_interleave(attention.head_size // P, 1)
    whole = _projection(named, "in_proj")
    bias = whole.bias if whole.bias is None else torch.cat([into.bias, whole.bias[-2 * M : -M]])
    gate = Projection(whole.W[-M:], whole.bias if whole.bias is None else whole.bias[-M:]).apply(x, bias=True)
    if "conv" in factors:
        w, shift = factors["conv"].w, factors["conv"].bias
        now = F.pad(w.new_ones(M, 1), (w.shape[1] - 1, 0))
        factors = {**factors, "conv": CausalConv(torch.cat([w, now]), F.pad(shift, (0, M)))}
    return {
        "gate": Diagonal(F.pad(F.silu(gate), (D, 0), value=1.0)),
        **factors,
        "attention": Attention(F.pad(weights, (0, 0, 0, 0, 0, M // P)), head_size=P, skip=F.pad(x.new_ones(M), (D, 0))),
        "in": Projection(torch.cat([into.W, whole.W[-2 * M : -M]]), bias),
    }


def attention_weights(mixer: nn.Module, x: Tensor, kwargs: Mapping[str, Any]) -> Tensor:
    """Return the weights of an attention layer's call, in the type of ``x`` and differentiable in it.

    Rows of padding are 0, and so is the row of a token that a sparse layer lets see nothing.

    Args:
        mixer: Attention layer of transformers.
        x: Input (B, L, E).
        kwargs: The call's other arguments. A cache among them is left alone.

    Returns:
        (B, H, L, L); row i is the query, column j the key.

    Raises:
        UnsupportedModelError: If the call's mask is no tensor, as for flex attention.

    Cost: O(L²·D) time and B·H·L² numbers.
    """
    mask = _additive(kwargs.get("attention_mask"), x, getattr(mixer, "sliding_window", None))
    padding = (mask <= _MASKED).diagonal(dim1=-2, dim2=-1).unsqueeze(-1)  # a key that its own query does not see
    arguments = {**kwargs, "past_key_values": None}
    layer = isolated_copy(mixer, x, _Eager)
    selector = next((name for name in _SELECTORS if hasattr(mixer, name)), None)
    if selector is not None:
        selected = _selected(mixer, selector, x, arguments)
        mask = _additive(selected, x)
        found = torch.ones_like(selected) if selected.dtype == torch.bool else mask
        vars(layer).update(dict.fromkeys(_SELECTORS, lambda *_, **__: found))
    weights = type(mixer).forward(layer, x, **{**arguments, "attention_mask": mask})[1]
    blind = (mask <= _MASKED).all(-1, keepdim=True)  # the softmax over hidden keys alone is no attention
    return weights.masked_fill(padding | blind, 0)


def _selected(mixer: nn.Module, selector: str, x: Tensor, arguments: Mapping[str, Any]) -> Tensor:
    """Return the mask (B, 1, L, L) that a sparse layer selects, boolean or additive as its ``selector`` gives it.

    A selection may hang on the last digit, so it is the one that the layer makes in its own type. It has no gradient.
    """
    layer = isolated_copy(mixer, None, _Eager)
    select, results = getattr(layer, selector), []

    def record(*args: Any, **kwargs: Any) -> Tensor:
        results.append(select(*args, **kwargs))
        return results[0]

    vars(layer)[selector] = record
    with torch.no_grad():
        type(mixer).forward(layer, x.to(next(mixer.parameters()).dtype), **arguments)
    return results[0]


def _additive(mask: Any, x: Tensor, window: int | None = None) -> Tensor:
    """Return what is added to the scores, (B or 1, 1, L, L): the causal mask where the call left it to the kernel.

    Args:
        mask: None or (B, L) if the kernel is causal by itself, else (B, 1, L, L), True or 0 where a key is seen.
        x: Input (B, L, E).
        window: How many keys a token sees at most; None for all.
    """
    if not (mask is None or isinstance(mask, Tensor)):
        raise UnsupportedModelError(
            f"An attention mask of type {type(mask).__name__} cannot be read. Load the model with another attention: "
            "attn_implementation='sdpa' or 'eager'."
        )
    if mask is None or mask.dim() == 2:
        L = x.shape[1]
        seen = torch.ones(L, L, dtype=torch.bool, device=x.device).tril()
        seen = seen.triu(1 - window) if window else seen
        mask = seen[None, None] if mask is None else seen & mask.to(seen)[:, None, None]
    if mask.dtype == torch.bool:
        mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill(~mask, -math.inf)
    return mask.to(x).clamp(min=torch.finfo(torch.float32).min)  # finite also where the softmax runs in float32


class _Eager:
    """A layer's configuration but for the attention, which is the one that returns its weights."""

    _attn_implementation = "eager"

    def __init__(self, config: Any) -> None:
        self._config = config

    def __getattr__(self, name: str) -> Any:
        return getattr(self._config, name)


def _projection(named: Mapping[str, Tensor], name: str) -> Projection:
    return Projection(named[f"{name}.weight"], named.get(f"{name}.bias"))


def _gate_by_head(named: Mapping[str, Tensor], x: Tensor, P: int) -> dict[str, Operator]:
    """Return the factor that weighs each head's P channels by one number, or nothing if the layer has no such gate."""
    if "g_proj.weight" not in named:
        return {}
    return {"gate": Diagonal(F.linear(x, named["g_proj.weight"]).sigmoid().repeat_interleave(P, -1))}
