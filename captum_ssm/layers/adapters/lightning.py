"""Lightning attention of MiniMax: linear attention whose heads forget at constant rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from captum_ssm.layers.activations import activation_name, secant
from captum_ssm.layers.mixers import register
from captum_ssm.layers.norms import group_norm
from captum_ssm.layers.padding import padding_mask
from captum_ssm.layers.parameters import parameters, projection, projections
from captum_ssm.operators import Chain, Diagonal, Operator, Product, Scan


@register("MiniMaxLightningAttention", kernel="lightning", family="minimax")
def lightning(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Decompose lightning attention.

    Equation::

        y = W_out diag(sigmoid(W_g x)) diag(norm) S diag(act) W_v diag(mask) x
        S: h_t = exp(-slope) h_{t-1} + k_t v_t,  y_t = <q_t, h_t>

    Each head has a slope. The activation is applied to queries, keys and values; the norm spans all heads. Padding is
    masked in queries, keys and values, not in the gate.

    Args:
        mixer: ``MiniMaxLightningAttention`` of transformers.
        x: Input (B, L, E).
        kwargs: Arguments of the call; ``attention_mask`` (B, L) is 0 at padding.

    Returns:
        Chain of ``out``, ``gate``, ``norm``, ``scan``, ``act``, ``in`` and, with a mask, ``mask``.

    Source:
        transformers ``modeling_minimax.py``; MiniMax 2025 (arXiv 2501.08313), section 2.2; Qin et al. 2024
        (arXiv 2401.04658).
    """
    weights, mask = parameters(mixer, x), padding_mask(kwargs, x)
    H, P = mixer.num_attention_heads, mixer.head_dim
    qkv = projections(weights, "qkv_proj", [P, P, P], groups=H)
    pre = [Chain({"in": into, **mask}).apply(x, bias=True) for into in qkv]
    acts = [secant(activation_name(mixer.act_fn), u) for u in pre]
    q, k, v = (act * u for act, u in zip(acts, pre))

    scan = Scan(
        a=Product((-weights["slope_rate"].view(1, 1, H, 1),), exponential=True),
        b=k.unflatten(-1, (H, P)),
        c=q.unflatten(-1, (H, P)),
        head_size=P,
    )
    factors: dict[str, Operator] = {
        "out": projection(weights, "out_proj"),
        "gate": Diagonal(projection(weights, "output_gate").apply(x, bias=True).sigmoid()),
        "norm": group_norm(scan.apply(v), 1, mixer.norm.variance_epsilon, weights["norm.weight"]),
        "scan": scan,
        "act": Diagonal(acts[-1]),
        "in": qkv[-1],
    }
    return Chain({**factors, **mask})
