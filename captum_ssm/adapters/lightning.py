"""Lightning attention of MiniMax: linear attention whose heads forget at constant rates."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from captum_ssm.adapters.reading import padding, parameters
from captum_ssm.gates import activation_name, inverse_rms, secant
from captum_ssm.layers.mixers import register
from captum_ssm.operators import Chain, Diagonal, Operator, Product, Projection, Scan


@register("MiniMaxLightningAttention", kernel="lightning", family="minimax")
def lightning(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """Lightning attention: ``h_t = exp(-slope) h_{t-1} + k_t v_t``, ``y_t = <q_t, h_t>``, one slope for each head.

    ``y = W_out diag(sigmoid(W_g x)) diag(norm) S diag(act) W_v diag(mask) x``. The activation is applied to queries,
    keys and values; the norm spans all heads. Padding is masked in these three alone, not in the gate.

    Args:
        mixer: ``MiniMaxLightningAttention`` of transformers.
        x: Input (B, L, E).
        kwargs: ``attention_mask`` (B, L), 0 at padding, is respected.

    Returns:
        Chain of ``out, gate, norm, scan, act, in`` and, with a mask, ``mask``.

    Source:
        transformers ``modeling_minimax.py``; MiniMax 2025 (arXiv 2501.08313), section 2.2; Qin et al. 2024
        (arXiv 2401.04658).
    """
    weights, mask = parameters(mixer, x), padding(kwargs, x)
    H, P = mixer.num_attention_heads, mixer.head_dim

    qkv = [W.flatten(0, 1) for W in weights["qkv_proj.weight"].unflatten(0, (H, 3, P)).unbind(1)]
    pre = [F.linear(Chain(mask).apply(x), W) for W in qkv]
    acts = [secant(activation_name(mixer.act_fn), u) for u in pre]
    q, k, v = (act * u for act, u in zip(acts, pre))

    scan = Scan(
        a=Product((-weights["slope_rate"].view(1, 1, H, 1),), exponential=True),
        b=k.unflatten(-1, (H, P)),
        c=q.unflatten(-1, (H, P)),
        head_size=P,
    )
    factors: dict[str, Operator] = {
        "out": Projection(weights["out_proj.weight"]),
        "gate": Diagonal(F.linear(x, weights["output_gate.weight"]).sigmoid()),
        "norm": Diagonal(inverse_rms(scan.apply(v), mixer.norm.variance_epsilon) * weights["norm.weight"]),
        "scan": scan,
        "act": Diagonal(acts[-1]),
        "in": Projection(qkv[-1]),
    }
    return Chain({**factors, **mask})
