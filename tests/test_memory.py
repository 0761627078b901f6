"""No explanation ever holds a matrix between tokens for every channel."""

from collections.abc import Callable
from functools import cache, partial
from typing import Any
from weakref import WeakSet

import pytest
import torch
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from captum_ssm import (
    ImplicitAttentionAttribution,
    ImplicitAttentionRelevance,
    ImplicitAttentionRollout,
    LLMImplicitAttention,
    RawImplicitAttention,
)
from captum_ssm.attr import generated_tokens
from captum_ssm.layers.fidelity import decompose
from captum_ssm.matrices import entries, lengths, shared_heads
from captum_ssm.network.examination import examine
from captum_ssm.network.recording import record_mixers
from captum_ssm.operators import Recurrence
from captum_ssm.operators.device_sizes import DeviceSize
from tests.conftest import build
from tests.families import VOCABULARY
from tests.tensors_made import Largest

L = 64
FAMILIES = ["mamba", "mamba2", "qwen3_5", "rwkv"]
model_of = cache(build)


def generated(model: Any, ids: Tensor) -> Tensor:
    """Explain the last four tokens as written ones."""
    return LLMImplicitAttention(ImplicitAttentionAttribution(model), None).explain(ids, L - 4)


def explained(method: Callable[[Any], Any], model: Any, ids: Tensor, **options: Any) -> Tensor:
    """Explain the logit of a token."""
    scores: Tensor = method(model).attribute(ids, target=5, **options)
    return scores


METHODS: dict[str, Callable[[Any, Tensor], Tensor]] = {
    **{
        f"rollout {fusion}": partial(explained, partial(ImplicitAttentionRollout, fusion=fusion))
        for fusion in ("root", "absolute", "positive", "mean", "norm")
    },
    **{
        f"attribution {rectify}": partial(explained, partial(ImplicitAttentionAttribution, rectify=rectify))
        for rectify in ("channel", "token", None)
    },
    "rows": partial(explained, partial(ImplicitAttentionAttribution, normalize="rows")),
    "raw": partial(explained, RawImplicitAttention),
    "generation": generated,
    "frozen gates": partial(explained, ImplicitAttentionRelevance),
    "reference": partial(explained, ImplicitAttentionRelevance, baselines=2),
}


def channels_of(model: Any, ids: Tensor) -> int:
    """Return D, the fewest channels of any recurrence of a model."""
    with torch.no_grad(), record_mixers(model) as calls:
        model(ids, use_cache=False)
    leaves = [leaf for call in calls for leaf in decompose(call).chain.leaves()]
    return min(leaf.heads * leaf.head_size for leaf in leaves if isinstance(leaf, Recurrence))


ALIKE = ("rollout positive", "rollout mean", "rollout norm", "attribution token")
"""Methods that sum the same entries as another, on whichever kernel."""


@pytest.mark.parametrize(
    ("name", "method"),
    [(name, method) for name in FAMILIES for method in METHODS if name == "mamba" or method not in ALIKE],
)
def test_no_tensor_has_a_matrix_for_every_channel(name: str, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The bounds of blocks, made for large models, are lowered for a tiny one."""
    explain = METHODS[method]
    model, ids = model_of(name), torch.randint(3, VOCABULARY, (1, L), generator=torch.Generator().manual_seed(0))
    monkeypatch.setattr(entries, "_BLOCK", DeviceSize(2**13, 2**13))
    monkeypatch.setattr(entries, "_CHANNELS", 1)
    monkeypatch.setattr(shared_heads, "_BLOCK", DeviceSize(2**13, 2**13))
    monkeypatch.setattr(shared_heads, "_MATRICES", DeviceSize(2**13, 2**13))
    monkeypatch.setattr(shared_heads, "_HEADS", DeviceSize(2**13, 2**13))
    monkeypatch.setattr(lengths, "_VECTORS_AT_ONCE", DeviceSize(2**7, 2**7))
    D = channels_of(model, ids)
    with Largest() as largest:
        explain(model, ids)
    assert largest.entries < D * L * L, (largest.entries / (D * L * L), D)


class Saved:
    """A tensor that a graph holds for its gradient."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


@pytest.mark.parametrize("name", ["mamba2", "qwen3_5"])
def test_a_generation_holds_no_graph_while_it_makes_matrices(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The backward pass of the last token frees it, if each takes one token, as those of long texts do."""
    model, ids = model_of(name), torch.randint(3, VOCABULARY, (1, L), generator=torch.Generator().manual_seed(0))
    held: WeakSet[Saved] = WeakSet()
    entries: list[int] = []

    def save(tensor: Tensor) -> Saved:
        saved = Saved(tensor.detach())
        held.add(saved)
        return saved

    def count() -> None:
        entries.append(sum(saved.tensor.numel() for saved in held))

    def backward(*args: Any, **options: Any) -> Any:
        count()
        return grad(*args, **options)

    def examined(*args: Any) -> Any:
        count()
        return examine(*args)

    grad = torch.autograd.grad
    monkeypatch.setattr(torch.autograd, "grad", backward)
    monkeypatch.setattr(generated_tokens, "examine", examined)
    monkeypatch.setattr(generated_tokens, "_PASS", 1)
    expected = generated(model, ids)
    entries.clear()
    with saved_tensors_hooks(save, lambda saved: saved.tensor):
        found = generated(model, ids)
    assert torch.equal(found, expected)
    before, *_ = entries
    after = entries[5]  # after a pass to the head's input, and one for each of four tokens
    assert after < before / 10, (after, before)
