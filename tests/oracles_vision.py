"""Vision Mamba's bidirectional layer and the papers' recipes for it, written out: what the tests compare with.

As in :mod:`oracles`, nothing here is taken from captum_ssm. Symbols: B batch, L tokens, D channels, E model width,
N state size; ``i`` query (row), ``j`` key (column).
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from tests.oracles import conv, conv_matrix, diagonal_matrix, published_alpha, times


def direction(mixer: Any, value: Tensor, suffix: str = "", late: bool = False) -> dict[str, Tensor]:
    """Return the pieces of one direction of a bidirectional ``Mamba``, in the order in which that direction reads.

    Args:
        mixer: The layer.
        value: What the convolution gets (B, L, D), in that order.
        suffix: Of the direction's parameters, ``""`` or ``"_b"``.
        late: Leave the reading token's own decay and its diagonal out of ``alpha``, as the code of Ali et al. does.

    Returns:
        ``alpha`` (B, D, L, L) without the skip; ``skip`` (D,); ``act`` and ``v`` (B, L, D), the activation's diagonal
        and what it gives; ``taps`` (D, L, L).
    """
    p = {name: parameter.detach() for name, parameter in mixer.named_parameters()}
    N, R = mixer.d_state, mixer.dt_rank
    taps = p[f"conv1d{suffix}.weight"][:, 0]
    pre = conv(value, taps, p.get(f"conv1d{suffix}.bias"))
    v = pre * torch.sigmoid(pre)
    low, b, c = (v @ p[f"x_proj{suffix}.weight"].T).split([R, N, N], dim=-1)
    delta = F.softplus(low @ p[f"dt_proj{suffix}.weight"].T + p[f"dt_proj{suffix}.bias"])
    A = -p["A_b_log" if suffix else "A_log"].exp()
    row = late_alpha if late else published_alpha
    alpha = torch.stack([row(*example[:1], A, *example[1:]) for example in zip(delta, b, c, strict=True)])
    skip = p[f"D{suffix}"]
    return {"alpha": alpha, "skip": skip, "act": torch.sigmoid(pre), "v": v, "taps": conv_matrix(taps, value.shape[1])}


def late_alpha(delta: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Return ``alpha[d, i, j] = C_i . (prod_{j < k < i} exp(delta_kd A_d)) delta_jd B_j`` for j < i, else 0.

    Args and shape as in :func:`oracles.published_alpha`.

    Source:
        AmeenAli/HiddenMambaAttn ``mamba_ssm/ops/selective_scan_interface.py``, ``compute_middle_attn_vector``: its
        product of decays ends before the reading token, and so do its columns.
    """
    L, D = delta.shape
    alpha = delta.new_zeros(D, L, L)
    for i in range(L):
        for j in range(i):
            decay = torch.ones_like(A)
            for k in range(j + 1, i):
                decay = decay * torch.exp(delta[k].unsqueeze(1) * A)
            alpha[:, i, j] = (C[i] * decay * delta[j].unsqueeze(1) * B[j]).sum(1)
    return alpha


def bidirectional(mixer: Any, x: Tensor, late: bool = False) -> dict[str, Any]:
    """Return the pieces of a bidirectional ``Mamba``, all in the order of the sequence.

    Args:
        mixer: The layer, ``tutorials.vision_mamba.Mamba``.
        x: Its input (B, L, E).
        late: As for :func:`direction`.

    Returns:
        ``value`` (B, L, D), what the convolutions get; ``gate`` (B, L, D), halved where the layer halves; ``out``
        (E, D), the output projection with the layer's scale; ``forward`` and ``backward``, each as :func:`direction`
        returns; ``y`` (B, L, E), the output.
    """
    p = {name: parameter.detach() for name, parameter in mixer.named_parameters()}
    D, E = mixer.d_inner, mixer.d_model
    both = x @ p["in_proj.weight"].T + p.get("in_proj.bias", x.new_zeros(2 * D))
    value, z = both[..., :D], both[..., D:]
    gate = z * torch.sigmoid(z) / (2 if mixer.if_divide_out else 1)
    scale = p.get("gamma", x.new_ones(E))
    forward = direction(mixer, value, late=late)
    backward = {
        name: part if name == "skip" else part.flip(-2, -1) if name in ("alpha", "taps") else part.flip(1)
        for name, part in direction(mixer, value.flip(1), "_b", late).items()
    }
    y = torch.zeros_like(value)
    for part in (forward, backward):
        y = y + times(part["alpha"], part["v"]) + part["skip"] * part["v"]
    out = scale.unsqueeze(1) * p["out_proj.weight"]
    y = (gate * y) @ out.T + scale * p.get("out_proj.bias", x.new_zeros(E))
    return {"value": value, "gate": gate, "out": out, "forward": forward, "backward": backward, "y": y}


def unified(parts: dict[str, Any], name: str, skip: bool = True) -> Tensor:
    """Return ``diag(gate) [alpha + diag(skip)] diag(act) M_conv`` of one direction of a layer's parts, (B, D, L, L)."""
    part = parts[name]
    direct = diagonal_matrix(part["skip"].expand_as(part["v"])) if skip else 0
    return diagonal_matrix(parts["gate"]) @ (part["alpha"] + direct) @ diagonal_matrix(part["act"]) @ part["taps"]


def recorded(model: Any, images: Tensor, target: int | None = None) -> tuple[list[Tensor], list[Tensor], Tensor]:
    """Run a Vision Mamba layer by layer, and back from a logit, or from the sum of all.

    Returns:
        What each mixer reads (B, L, E); the gradient at each mixer's output (B, L, E); the score (B,).
    """
    stream, reads, outputs = model.embed(images), [], []
    for layer in model.layers:
        reads.append(layer.norm(stream))
        outputs.append(layer.mixer(reads[-1]))
        stream = stream + outputs[-1]
    tokens = model.norm_f(stream)
    logits = model.head(tokens.mean(1) if model.class_position is None else tokens[:, model.class_position])
    score = logits.sum(1) if target is None else logits[:, target]
    gradients = torch.autograd.grad(score.sum(), outputs)
    return [x.detach() for x in reads], list(gradients), score.detach()


# --- The published recipes ----------------------------------------------------------------------------------------


def published_row(mixer: Any, x: Tensor, token: int, attention: str, late: bool, both: bool) -> Tensor:
    """Return the class token's row of every channel, (B, D, L), as the published code puts it together.

    Forward columns come first; the backward direction's take the place of those after the class token. There is no
    skip and no halving.

    Args:
        mixer: The layer.
        x: Its input (B, L, E).
        token: Position of the class token.
        attention: ``"scan"`` (2024) or ``"unified"`` (2025).
        late: As for :func:`direction`: so in the code of 2024.
        both: Whether the class token's own column is the sum of both directions: so in the code of 2025.
    """
    parts = bidirectional(mixer, x, late)
    parts["gate"] = parts["gate"] * (2 if mixer.if_divide_out else 1)
    rows = {
        name: (parts[name]["alpha"] if attention == "scan" else unified(parts, name, skip=False))[:, :, token]
        for name in ("forward", "backward")
    }
    row = rows["forward"].clone()
    row[..., token + 1 :] = rows["backward"][..., token + 1 :]
    if both:
        row[..., token] += rows["backward"][..., token]
    return row


def scaled(a: Tensor) -> Tensor:
    """Return ``(a - min a) / (max a - min a)``; 0 where all are equal, for which the published code has no number."""
    low, high = a.min(), a.max()
    return (a - low) / (high - low) if high > low else torch.zeros_like(a)


def recipe_of_one_image(name: str, rows: list[Tensor], gradients: list[Tensor], token: int, start: int) -> Tensor:
    """Return the scores (L - 1,) of one image's patches by a published recipe.

    Args:
        name: ``"raw"``, ``"rollout"``, ``"attribution-2024"`` or ``"attribution-2025"``.
        rows: The class token's row of every channel of each layer, (D, L).
        gradients: Of the logit at the output of each layer, (L, E).
        token: Position of the class token.
        start: The first layer that counts.

    Source:
        AmeenAli/HiddenMambaAttn ``vim/xai_utils.py``; Itamarzimm/UnifiedImplicitAttnRepr
        ``MambaVision/imagenet_seg_eval.py``.
    """
    L = rows[0].shape[-1]
    layers = []
    for a, g in zip(rows, gradients, strict=True):
        slope = scaled(g.clamp(min=0).max(dim=1)[0])
        if name == "raw":
            layers.append(scaled(a).mean(0))
        elif name == "rollout":
            layers.append(a.mean(0))
        elif name == "attribution-2024":
            layers.append(scaled(a.clamp(min=0)).mean(0) * slope)
        else:
            layers.append(scaled(a.clamp(min=0).mean(0) * slope))
    if name == "raw":
        scores = torch.stack(layers[start:]).mean(0)
    else:
        eye = torch.eye(L, dtype=rows[0].dtype)
        matrices = [(eye + row.expand(L, L)) / (eye + row.expand(L, L)).sum(-1, keepdim=True) for row in layers]
        joint = matrices[start]
        for matrix in matrices[start + 1 :]:
            joint = matrix @ joint
        scores = joint[token]
    return torch.cat([scores[:token], scores[token + 1 :]]).clamp(min=0)
