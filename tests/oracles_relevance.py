"""The rules of relevance, written out: a loop over tokens for each recurrence, every product by its own rule.

Nothing here is fast and nothing here is taken from captum_ssm. A *pair* is a value and what it is compared with; the
gradient of the first is the multiplier of the difference of the two.
"""

import math
from collections.abc import Callable, Sequence
from itertools import permutations
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Pair = tuple[Tensor, Tensor]


def shapley(function: Callable[..., Tensor], values: Sequence[Tensor], references: Sequence[Tensor]) -> list[Tensor]:
    """Return what each argument adds to ``function(*values) - function(*references)``, on average over all orders.

    In each order the arguments change from reference to value one after the other.
    """
    orders = list(permutations(range(len(values))))
    shares = [torch.zeros_like(function(*values)) for _ in values]
    for order in orders:
        now = list(references)
        for k in order:
            before = function(*now)
            now[k] = values[k]
            shares[k] = shares[k] + (function(*now) - before) / len(orders)
    return shares


def product(*pairs: Pair) -> Pair:
    """Return a product; each factor's multiplier is the mean over all orders of the others, changed before it or not.

    For two factors ``(b + b') / 2``. For three ``(2 b c + b c' + b' c + 2 b' c') / 6``.
    """
    values, references = zip(*pairs)
    orders = list(permutations(range(len(pairs))))
    linear: Tensor = torch.zeros(())
    for order in orders:
        for place, k in enumerate(order):
            others = [values[j].detach() for j in order[:place]] + [references[j] for j in order[place + 1 :]]
            linear = linear + values[k] * math.prod(others) / len(orders)
    exact = math.prod(values)
    return linear + (exact - linear).detach(), math.prod(references)


def read(value: Pair, gate: Pair, share: float) -> Pair:
    """Return ``value * gate``, where of what the two change together this share is the value's."""
    (v, w), (g, h) = value, gate
    value_first, gate_first = v * g.detach() + w * g, v * h + v.detach() * g
    linear = share * value_first + (1 - share) * gate_first
    return linear + (v * g - linear).detach(), w * h


def exponential(pair: Pair) -> Pair:
    """Return the exponential; its multiplier is the difference quotient."""
    value, reference = pair
    change = value.detach() - reference
    slope = torch.where(change == 0, reference.exp(), (value.detach().exp() - reference.exp()) / change)
    linear = slope * value
    return linear + (value.exp() - linear).detach(), reference.exp()


def difference_of_recurrence(
    coefficients: Sequence[Sequence[Pair]],
    x: Pair,
    lag: int = 0,
    exponential_decay: bool = False,
    state_share: float = 0.5,
) -> Pair:
    """Return ``y_t = <c_t, h_{t-lag}>`` of ``h_t = a_t h_{t-1} - erase_t <recall_t, h_{t-1}> + b_t x_t`` by tokens.

    Args:
        coefficients: The factors of a, b and c, and of recall and erase if there are any; each (B or 1, L or 1, H or 1,
            N or 1) with its reference.
        x: (B, L, H, P).
        lag: 1 if the state is read before it is written.
        exponential_decay: Whether a is the exponential of the product of its factors.
        state_share: Of what the state and c change together, the part that is the state's.
    """
    B, L, H, P = x[0].shape
    N = max(factor.shape[3] for factors in coefficients for factor, _ in factors)

    def at(factors: Sequence[Pair], t: int) -> list[Pair]:
        """The factors at token t, (B, H, N or 1, 1)."""
        return [
            (v.expand(B, L, H, v.shape[3])[:, t, :, :, None], r.expand(B, L, H, r.shape[3])[:, t, :, :, None])
            for v, r in factors
        ]

    state: Pair = (torch.zeros(B, H, N, P).to(x[0]),) * 2
    outputs: list[Pair] = []
    for t in range(L):
        decay, write, out, *erasing = (at(factors, t) for factors in coefficients)
        now = (x[0][:, t, :, None], x[1][:, t, :, None])
        a = product(*decay)
        kept = product(exponential(a) if exponential_decay else a, state)
        written = product(*write, now)
        after = kept[0] + written[0], kept[1] + written[1]
        if erasing:
            recall, erase = erasing
            found = [part.sum(-2, keepdim=True) for part in product(product(*recall), state)]
            erased = product(product(*erase), (found[0], found[1]))
            after = after[0] - erased[0], after[1] - erased[1]
        y = read(state if lag else after, product(*out), state_share)
        outputs.append((y[0].sum(-2), y[1].sum(-2)))
        state = after
    values, references = zip(*outputs)
    return torch.stack(values, 1), torch.stack(references, 1)


def mamba_lrp(model: Any, ids: Tensor, target: int, gate: float = 0.5) -> Tensor:
    """Return MambaLRP's relevance (B, L) of the last token's logit of a ``MambaForCausalLM``, in float64.

    Gradient times input, where the normalizers, A, B, C and the step sizes are held, a SiLU is its input times a held
    sigmoid, and half of the product with the gate is held.

    Args:
        model: The model.
        ids: (B, L).
        target: Which logit.
        gate: The gate's share of its product with the value; the value has the rest. MambaLRP's is a half.

    Source:
        Jafari et al. 2024 (arXiv 2406.07592), section 4: propositions 4.1 to 4.3.
    """
    model = model.double()
    embedded = model.backbone.embeddings(ids).detach().requires_grad_()
    h = embedded
    for layer in model.backbone.layers:
        h = h + _mixed_with_held_gates(layer.mixer, _normed(layer.norm, h), gate)
    logits = model.lm_head(_normed(model.backbone.norm_f, h)[:, -1])
    (gradient,) = torch.autograd.grad(logits[:, target].sum(), embedded)
    return (embedded * gradient).sum(-1).detach()


def _normed(norm: Any, h: Tensor) -> Tensor:
    scale = 1 / (h.square().mean(-1, keepdim=True) + norm.variance_epsilon).sqrt()
    return norm.weight * (h * scale.detach())


def _silu(x: Tensor) -> Tensor:
    return x * torch.sigmoid(x).detach()


def _mixed_with_held_gates(mixer: Any, x: Tensor, gate: float) -> Tensor:
    R, N = mixer.time_step_rank, mixer.ssm_state_size
    into, z = mixer.in_proj(x).chunk(2, dim=-1)
    K, L = mixer.conv1d.weight.shape[-1], x.shape[1]
    padded = F.pad(into, (0, 0, K - 1, 0))
    pre = sum(mixer.conv1d.weight[:, 0, k] * padded[:, k : k + L] for k in range(K))
    u = _silu(pre if mixer.conv1d.bias is None else pre + mixer.conv1d.bias)
    low, b, c = mixer.x_proj(u).split([R, N, N], dim=-1)
    delta = F.softplus(mixer.dt_proj(low)).detach()
    b, c, A = b.detach(), c.detach(), -mixer.A_log.exp().detach()
    h = torch.zeros(x.shape[0], u.shape[-1], N).to(x)
    outputs = []
    for t in range(L):
        step = delta[:, t, :, None]
        h = torch.exp(step * A) * h + step * b[:, t, None] * u[:, t, :, None]
        outputs.append((h * c[:, t, None]).sum(-1) + mixer.D * u[:, t])
    y, g = torch.stack(outputs, 1), _silu(z)
    return mixer.out_proj(gate * y.detach() * g + (1 - gate) * y * g.detach())
