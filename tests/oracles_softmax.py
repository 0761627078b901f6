"""Softmax attention written out from the papers' equations, token by token; nothing is taken from captum_ssm.

Symbols as in ``oracles.py``: B batch, L tokens, E model width, H heads, P channels of a head; ``i`` query, ``j`` key.
"""

import math
from typing import Any

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, scale: float, seen: Tensor) -> Tensor:
    """Return ``softmax_j(scale q_i . k_j)`` over the keys that i sees; 0 where it sees none.

    Args:
        q: Queries (B, L, H, P); ``k`` (keys) likewise, with as many heads or fewer, each for a group of queries.
        scale: Factor of the scores.
        seen: (B, L, L), True where i sees j.

    Returns:
        (B, H, L, L).
    """
    B, L, H, _ = q.shape
    group = H // k.shape[2]
    weights = q.new_zeros(B, H, L, L)
    for b in range(B):
        for h in range(H):
            for i in range(L):
                keys = [j for j in range(L) if seen[b, i, j]]
                scores = [scale * float(q[b, i, h] @ k[b, j, h // group]) for j in keys]
                total = sum(math.exp(score - max(scores)) for score in scores)
                for j, score in zip(keys, scores, strict=True):
                    weights[b, h, i, j] = math.exp(score - max(scores)) / total
    return weights


def rotate(x: Tensor, frequencies: list[float], interleaved: bool = False, positions: Any = None) -> Tensor:
    """Turn pair n of the channels of token t by the angle ``t * frequencies[n]`` (Su et al. 2021, equation 34).

    Args:
        x: (B, L, H, P); the pairs are (n, n + number of pairs), or (2n, 2n + 1) if interleaved.
        frequencies: Of each pair; channels in no pair stay as they are.
        interleaved: Which pairs.
        positions: t of each token; None counts from 0.
    """
    y, N = x.clone(), len(frequencies)
    for t in range(x.shape[1]):
        for n, frequency in enumerate(frequencies):
            one, two = (2 * n, 2 * n + 1) if interleaved else (n, n + N)
            angle = (t if positions is None else positions[t]) * frequency
            y[:, t, :, one] = x[:, t, :, one] * math.cos(angle) - x[:, t, :, two] * math.sin(angle)
            y[:, t, :, two] = x[:, t, :, one] * math.sin(angle) + x[:, t, :, two] * math.cos(angle)
    return y


def norm(module: Any, x: Tensor) -> Tensor:
    """Return ``x / sqrt(mean(x²) + eps)`` times the weight, or times 1 + weight in the norms of Qwen and Gemma."""
    one_more = not hasattr(module, "variance_epsilon")
    eps = module.eps if one_more else module.variance_epsilon
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * (module.weight.double() + one_more)


def linear(module: Any, x: Tensor) -> Tensor:
    bias = 0 if module.bias is None else module.bias.double()
    return x @ module.weight.double().T + bias


def block_selection(indexer: Any, x: Tensor, seen: Tensor, frequencies: list[float]) -> Tensor:
    """Return ``seen`` (B, L, L) less what Qwen4's indexer leaves out.

    The keys that i sees are cut into blocks of equal size. A block's key is the normed mean of its tokens' keys, turned
    to the position of its first token; its score the sum over heads of relu(q . k). Kept are the blocks with the best
    scores, and the keys after the last whole block.
    """
    B, L, _ = x.shape
    P, H, size = indexer.index_head_dim, indexer.index_n_heads, indexer.compress_ratio
    both = x @ indexer.index_qk_proj.weight.double().T
    q = rotate(norm(indexer.q_layernorm, both[..., : H * P].reshape(B, L, H, P)), frequencies)
    keys = both[..., H * P :]
    kept = torch.zeros_like(seen)
    for b in range(B):
        for i in range(L):
            visible = [j for j in range(L) if seen[b, i, j]]
            blocks = [visible[n : n + size] for n in range(0, len(visible) - size + 1, size)]
            scores = []
            for block in blocks:
                key = norm(indexer.k_layernorm, sum(keys[b, j] for j in block) / size)
                key = rotate(key.view(1, 1, 1, P), frequencies, positions=block[:1]).view(P)
                scores.append(sum(max(float(q[b, i, h] @ key), 0) for h in range(H)))
            best = sorted(range(len(blocks)), key=lambda n: -scores[n])[: indexer.token_budget // size]
            tail = visible[len(blocks) * size :]
            for j in [j for n in best for j in blocks[n]] + tail:
                kept[b, i, j] = True
    return kept


def pool_selection(indexer: Any, x: Tensor, q_latent: Tensor, seen: Tensor, real: Tensor) -> Tensor:
    """Return ``seen`` (B, L, L) less what GLM-5's indexer leaves out.

    The real tokens are cut into pools of equal size. A pool's key is a mean of its tokens' keys, weighted in each
    channel by the softmax of a gate plus a bias for the place in the pool; its score for i a weighted sum over heads
    of relu(q . k). Kept are the whole pools in sight with the best scores, and (if so configured) the tokens of the
    last pool in sight if it is not whole.
    """
    B, L, _ = x.shape
    H, P, size = indexer.n_heads, indexer.head_dim, indexer.index_kpool
    q = (q_latent @ indexer.wq_b.weight.double().T).view(B, L, H, P)
    k = x @ indexer.wk.weight.double().T
    centred = k - k.mean(-1, keepdim=True)
    k = centred / (centred.square().mean(-1, keepdim=True) + indexer.k_norm.eps).sqrt()
    k = k * indexer.k_norm.weight.double() + indexer.k_norm.bias.double()
    gate = x @ indexer.index_kpool_compress_gate.double().T
    by_head = x @ indexer.weights_proj.weight.double().T / math.sqrt(H)
    kept = torch.zeros_like(seen)
    for b in range(B):
        tokens = [j for j in range(L) if real[b, j]]
        for i in tokens:
            visible = [j for j in tokens if seen[b, i, j]]
            pools = [visible[n : n + size] for n in range(0, len(visible) - size + 1, size)]
            scores = []
            for pool in pools:
                logits = torch.stack([gate[b, j] for j in pool]) + indexer.index_kpool_compress_ape.double()
                share = logits.exp() / logits.exp().sum(0)
                key = sum(share[n] * k[b, j] for n, j in enumerate(pool))
                scores.append(
                    sum(float(by_head[b, i, h]) * max(float(q[b, i, h] @ key) / math.sqrt(P), 0) for h in range(H))
                )
            best = sorted(range(len(pools)), key=lambda n: -scores[n])[: indexer.index_topk // size]
            tail = visible[len(pools) * size :] if indexer.index_kpool_always_select_tail else []
            for j in [j for n in best for j in pools[n]] + tail:
                kept[b, i, j] = True
    return kept


def layer(mixer: Any, x: Tensor, real: Tensor, window: int | None, frequencies: list[float], place: int | None) -> Any:
    """Return the parts of an attention layer of transformers, in float64.

    Args:
        mixer: The layer.
        x: Input (B, L, E), float64.
        real: (B, L), 0 at padding.
        window: How many keys a token sees at most; None for all.
        frequencies: Of the rotary positions; empty without them.
        place: Which of the layers that share a Zamba2 layer this is.

    Returns:
        ``alpha`` and ``core`` = gate times alpha (B, D, L, L), values ``v`` (B, L, D), output ``y`` (B, L, E).
    """
    B, L, _ = x.shape
    seen = torch.zeros(B, L, L, dtype=torch.bool)
    for b in range(B):
        for i in range(L):
            for j in range(i + 1):
                seen[b, i, j] = bool(real[b, i] and real[b, j]) and (window is None or i - j < window)
    latent = hasattr(mixer, "kv_lora_rank")
    gate = None
    if latent:
        H, P, rank = mixer.num_heads, mixer.v_head_dim, mixer.kv_lora_rank
        nope, rope = mixer.qk_nope_head_dim, mixer.qk_rope_head_dim
        q_latent = x
        if getattr(mixer, "q_a_proj", None) is not None:
            q_latent = norm(mixer.q_a_layernorm, linear(mixer.q_a_proj, x))
            q = linear(mixer.q_b_proj, q_latent).view(B, L, H, nope + rope)
        else:
            q = linear(mixer.q_proj, x).view(B, L, H, nope + rope)
        down = linear(mixer.kv_a_proj_with_mqa, x)
        up = linear(mixer.kv_b_proj, norm(mixer.kv_a_layernorm, down[..., :rank])).view(B, L, H, nope + P)
        v = up[..., nope:]
        q_turned = rotate(q[..., nope:], frequencies, interleaved=True)
        k_turned = rotate(down[..., rank:].view(B, L, 1, rope), frequencies, interleaved=True).expand(B, L, H, rope)
        q, k = torch.cat([q[..., :nope], q_turned], -1), torch.cat([up[..., :nope], k_turned], -1)
        scale = mixer.scaling
        if getattr(mixer, "indexer", None) is not None:
            seen = pool_selection(mixer.indexer, x, q_latent, seen, real)
    else:
        H, P = mixer.config.num_attention_heads, mixer.head_dim
        parts = {}
        for name in "qkv":
            parts[name] = linear(getattr(mixer, f"{name}_proj"), x)
            if place is not None:
                down, up = getattr(mixer, f"linear_{name}_adapter_list")[place]
                parts[name] = parts[name] + linear(up, linear(down, x))
        if parts["q"].shape[-1] == 2 * H * P:
            both = parts["q"].view(B, L, H, 2 * P)
            parts["q"], gate = both[..., :P].reshape(B, L, H * P), both[..., P:].reshape(B, L, H * P).sigmoid()
        whole = type(mixer).__name__.startswith("Olmo")  # normed before the cut into heads
        for name in "qk":
            module = getattr(mixer, f"{name}_norm", None) or getattr(mixer, f"{name}_layernorm", None)
            if module is not None and whole:
                parts[name] = norm(module, parts[name])
            parts[name] = parts[name].view(B, L, -1, P)
            if module is not None and not whole:
                parts[name] = norm(module, parts[name])
            parts[name] = rotate(parts[name], frequencies)
        q, k = parts["q"], parts["k"] * getattr(mixer, "key_multiplier", 1)
        group = H // k.shape[2]
        v = torch.stack([parts["v"].view(B, L, -1, P)[:, :, h // group] for h in range(H)], dim=2)
        if hasattr(mixer, "indexer"):
            seen = block_selection(mixer.indexer, x, seen, frequencies)
        scale = mixer.scaling
    if getattr(mixer, "g_proj", None) is not None:
        one_each = linear(mixer.g_proj, x).sigmoid()
        gate = torch.cat([one_each[..., h : h + 1].expand(B, L, P) for h in range(H)], -1)
    weights = attention(q, k, scale, seen)
    mixed = torch.zeros_like(v)
    for i in range(L):
        for j in range(L):
            mixed[:, i] += weights[:, :, i, j].unsqueeze(-1) * v[:, j]
    mixed = mixed.flatten(2) if gate is None else gate * mixed.flatten(2)
    alpha = torch.stack([weights[:, d // P] for d in range(H * P)], dim=1)
    core = alpha if gate is None else gate.transpose(1, 2).unsqueeze(-1) * alpha
    y = linear(mixer.out_proj if hasattr(mixer, "out_proj") else mixer.o_proj, mixed)
    return {"alpha": alpha, "core": core, "v": v.flatten(2), "y": y}
