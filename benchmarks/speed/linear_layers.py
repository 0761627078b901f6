"""Linear attention of published forms whose own packages need a GPU, in a model of plain torch.

Its layers project to queries, keys, values and gates, and run the recurrence by the operator that has its equation.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.speed.models import VOCABULARY
from captum_ssm import register
from captum_ssm.operators import Chain, DeltaScan, Diagonal, HeadOperator, Projection, Scan

N = 64
"""States, and channels, of a head."""


class LinearAttention(nn.Module):
    """``y = W_out diag(silu(W_g x)) S W_v x`` with a recurrence ``S`` of heads of 64 channels and 64 states.

    Args:
        width: E.
        kind: ``"retention"``: a constant decay for each head. ``"GLA"``: a decay for each state. ``"RWKV-6"``: the
            same, read before the token is written, which has a weight of its own. ``"RWKV-7"``: a delta rule with
            other vectors, a decay for each state.
    """

    def __init__(self, width: int, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.inner = nn.Linear(width, 6 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)
        self.bonus = nn.Parameter(torch.randn(width))

    def recurrence(self, q: Tensor, k: Tensor, low: Tensor, write: Tensor) -> HeadOperator:
        """Return the recurrence for queries, keys, decays' logits and rates of writing, each (B, L, H, N)."""
        H = q.shape[2]
        match self.kind:
            case "retention":
                decay = 1 - 2.0 ** (-5 - torch.arange(H, dtype=q.dtype, device=q.device)).view(1, 1, H, 1)
                return Scan(decay.expand(-1, q.shape[1], -1, -1), k, q, head_size=N)
            case "GLA":
                return Scan((F.logsigmoid(low) / 16).exp(), k, q, head_size=N)
            case "RWKV-6":
                return Scan((-low.exp()).exp(), k, q, lag=1, bonus=self.bonus, head_size=N)
            case _:
                key, a = F.normalize(k, dim=-1), (-0.6 * low.sigmoid()).exp()
                return DeltaScan(a, k, q, recall=key, erase=key * write.sigmoid(), head_size=N)

    def chain(self, x: Tensor) -> Chain:
        """Return the layer as a product of operators for an input (B, L, E)."""
        E = self.out.in_features
        q, k, low, write = (part.unflatten(-1, (-1, N)) for part in self.inner(x)[..., : 4 * E].chunk(4, -1))
        gate, value = x @ self.inner.weight[4 * E : 5 * E].mT, self.inner.weight[5 * E :]
        return Chain(
            {
                "out": Projection(self.out.weight),
                "gate": Diagonal(F.silu(gate)),
                "scan": self.recurrence(q / N**0.5, k / N**0.5, low, write),
                "in": Projection(value),
            }
        )

    def forward(self, x: Tensor) -> Tensor:
        """Return the output (B, L, E) for an input (B, L, E)."""
        return self.chain(x).apply(x, bias=True)


@cache
def _register_layer() -> None:
    """Register the adapter of the layer, when the first model is made: what only imports this knows no other layers."""

    def own_chain(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
        return mixer.chain(x)

    register(LinearAttention, kernel="linear attention")(own_chain)


class LinearModel(nn.Module):
    """A residual stack of linear attention and channel mixing, with scores read at the last token.

    Args:
        layers: Their number.
        width: E.
        kind: Of the recurrence, see :class:`LinearAttention`.
    """

    def __init__(self, layers: int, width: int, kind: str) -> None:
        super().__init__()
        _register_layer()
        torch.manual_seed(0)
        self.embeddings = nn.Embedding(VOCABULARY, width)
        self.mixers = nn.ModuleList(LinearAttention(width, kind) for _ in range(layers))
        self.mlps = nn.ModuleList(
            nn.Sequential(nn.RMSNorm(width), nn.Linear(width, 3 * width), nn.SiLU(), nn.Linear(3 * width, width))
            for _ in range(layers)
        )
        self.norms = nn.ModuleList(nn.RMSNorm(width) for _ in range(layers + 1))
        self.head = nn.Linear(width, VOCABULARY, bias=False)
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        """Return scores (B, vocabulary) for token ids (B, L)."""
        x = self.embeddings(ids)
        for norm, mixer, mlp in zip(self.norms, self.mixers, self.mlps):
            x = x + mixer(norm(x))
            x = x + mlp(x)
        return self.head(self.norms[-1](x[:, -1]))


KINDS = ("retention", "GLA", "RWKV-6", "RWKV-7")
