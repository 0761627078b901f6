"""The words of the grammar: small pieces of models, as people have them around recurrent layers."""

from collections.abc import Callable
from copy import deepcopy
from functools import lru_cache
from random import Random
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from tests.families import FAMILIES, VOCABULARY

V, E, LONGEST = VOCABULARY, 16, 16
ROLLOUT, RELEVANCE, FROZEN = "rollout", "relevance", "frozen"
NOBODY: frozenset[str] = frozenset()
MATRICES = frozenset({ROLLOUT})
ANYBODY = frozenset({ROLLOUT, RELEVANCE, FROZEN})


class Text(NamedTuple):
    """All that a piece may read beside its sequence: the model's own inputs, and a second sequence (B, L, E)."""

    inputs: Tensor
    other: Tensor | None = None


class Step(nn.Module):
    """A piece of a model with its parts, run as a module or, inlined, as lines of the model's own code."""

    def __init__(self, run: Callable[[Any, Tensor, Text], Tensor], inlined: bool = False, **parts: nn.Module) -> None:
        super().__init__()
        self.run, self.inlined = run, inlined
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, h: Tensor, text: Text) -> Tensor:
        return self.run(self, h, text)

    def apply_to(self, h: Tensor, text: Text) -> Tensor:
        return self.forward(h, text) if self.inlined else self(h, text)


class Piece(NamedTuple):
    """One word: what it does, and which methods may refuse a model that has it (all others have to explain it)."""

    build: Callable[[Random], Step]
    refused_by: frozenset[str] = NOBODY


def function(run: Callable[[Tensor], Tensor], refused_by: frozenset[str] = NOBODY) -> Piece:
    """A piece that is a function of the sequence alone."""
    return Piece(lambda draw: Step(lambda m, h, text: run(h), inlined=draw.random() < 0.5), refused_by)


def with_parts(
    run: Callable[[Any, Tensor, Text], Tensor],
    refused_by: frozenset[str] = NOBODY,
    **parts: Callable[[], nn.Module],
) -> Piece:
    """A piece with parts."""
    return Piece(
        lambda draw: Step(run, draw.random() < 0.5, **{name: make() for name, make in parts.items()}), refused_by
    )


# --- Mixers ---------------------------------------------------------------------------------------------------------

MIXERS: dict[str, str] = {
    "MambaMixer": "mamba", "FalconMambaMixer": "falcon_mamba", "JambaMambaMixer": "jamba", "JambaAttention": "jamba",
    "ZambaMambaMixer": "zamba", "Mamba2Mixer": "mamba2", "BambaMixer": "bamba", "NemotronHAttention": "nemotron_h",
    "GraniteMoeHybridMambaLayer": "granitemoehybrid", "FalconH1Mixer": "falcon_h1", "Zamba2MambaMixer": "zamba2",
    "RecurrentGemmaRecurrentBlock": "recurrent_gemma", "RwkvSelfAttention": "rwkv", "RwkvFeedForward": "rwkv",
    "Qwen3NextGatedDeltaNet": "qwen3_next", "OlmoHybridGatedDeltaNet": "olmo_hybrid",
    "KimiLinearDeltaAttention": "kimi_linear", "BailingHybridDeltaAttention": "bailing_hybrid",
    "Lfm2ShortConv": "lfm2", "Lfm3ShortConv": "lfm3",
}  # fmt: skip


@lru_cache
def _prototypes(family: str) -> nn.Module:
    options = {"hidden_size": E} if family in ("mamba", "falcon_mamba") else {}
    with torch.random.fork_rng():
        model: nn.Module = FAMILIES[family].build(**options)
    return model


class Mixer(nn.Module):
    """A mixer of a transformers model, with the arguments that its model gives it."""

    def __init__(self, name: str) -> None:
        super().__init__()
        layers = _prototypes(MIXERS[name]).modules()
        self.layer = deepcopy(next(module for module in layers if type(module).__name__ == name))
        self.arguments = FAMILIES[MIXERS[name]].layers[name].arguments
        with torch.no_grad():
            for parameter in self.layer.parameters():
                parameter.add_(0.1 * torch.randn_like(parameter))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x, **self.arguments(x))
        return y[0] if isinstance(y, tuple) else y


# --- Around a mixer: from its function and its normed input to the sequence that is added to the stream --------------

Mixing = Callable[[Tensor], Tensor]
Around = Callable[[Mixing, Tensor, Text], Tensor]


def rearranged(order: Callable[[int], Tensor]) -> Around:
    """The tokens in another order before the mixer, and back behind it."""

    def run(mix: Mixing, x: Tensor, text: Text) -> Tensor:
        there = order(x.shape[1])
        return mix(x[:, there])[:, there.argsort()]

    return run


def by_norm(mix: Mixing, x: Tensor, text: Text) -> Tensor:
    there = x[..., :3].sum(-1).argsort(stable=True, dim=1).unsqueeze(-1).expand_as(x)
    return torch.zeros_like(x).scatter(1, there, mix(x.gather(1, there)))


def in_windows(mix: Mixing, x: Tensor, text: Text) -> Tensor:
    B, L = x.shape[:2]
    width = 2 if L % 2 == 0 else L
    return mix(x.reshape(B * L // width, width, E)).reshape(B, L, E)


def behind_prefix(mix: Mixing, x: Tensor, text: Text) -> Tensor:
    return mix(torch.cat([torch.ones_like(x[:, :2]), x], 1))[:, 2:]


def grid(x: Tensor) -> Tensor:
    return x.reshape(len(x), 2 if x.shape[1] % 2 == 0 else 1, -1, E)


AROUND: dict[str, tuple[Around, frozenset[str]]] = {
    "plainly": (lambda mix, x, text: mix(x), NOBODY),
    "on every token but the last": (
        lambda mix, x, text: torch.cat([mix(x[:, :-1]), 0 * x[:, -1:]], 1), MATRICES),
    "backwards": (lambda mix, x, text: mix(x.flip(1)).flip(1), NOBODY),
    "in both directions": (lambda mix, x, text: mix(x) + mix(x.flip(1)).flip(1), NOBODY),
    "backwards, by index": (rearranged(lambda L: torch.arange(L - 1, -1, -1)), NOBODY),
    "even tokens first": (rearranged(lambda L: torch.arange(L).remainder(2).argsort(stable=True)), NOBODY),
    "rolled": (lambda mix, x, text: mix(x.roll(1, 1)).roll(-1, 1), NOBODY),
    "rolled and not back": (lambda mix, x, text: mix(x.roll(1, 1)), MATRICES),
    "turned round and not back": (lambda mix, x, text: mix(x.flip(1)), MATRICES),
    "its output turned round": (lambda mix, x, text: mix(x).flip(1), MATRICES),
    "by columns": (
        lambda mix, x, text: mix(grid(x).transpose(1, 2).reshape(x.shape)).reshape(
            len(x), -1, 2 if x.shape[1] % 2 == 0 else 1, E).transpose(1, 2).reshape(x.shape), NOBODY),
    "sorted by content": (by_norm, ANYBODY),
    "in windows": (in_windows, MATRICES),
    "behind a prefix": (behind_prefix, MATRICES),
    "on a difference of neighbours": (lambda mix, x, text: mix(x - x.roll(1, 1)), MATRICES),
    "on the mean of neighbours": (
        lambda mix, x, text: mix(F.avg_pool1d(x.transpose(1, 2), 3, 1, 1).transpose(1, 2)), MATRICES),
    "twice": (lambda mix, x, text: mix(mix(x)), ANYBODY),
    "on half of its input": (lambda mix, x, text: mix(0.5 * x), NOBODY),
    "on the second sequence": (
        lambda mix, x, text: mix(x if text.other is None else text.other.to(x)), ANYBODY),
    "on the sum with the second sequence": (
        lambda mix, x, text: mix(x if text.other is None else x + text.other.to(x)), MATRICES),
    "with no gradient": (lambda mix, x, text: mix(x.detach()), MATRICES),
    "under checkpoints": (lambda mix, x, text: checkpoint(mix, x, use_reentrant=False), ANYBODY),
    "in the last dimension but one": (
        lambda mix, x, text: mix(x.transpose(1, 2).contiguous().transpose(1, 2)), NOBODY),
    "one example after another": (lambda mix, x, text: torch.cat([mix(part) for part in x.split(1)]), ANYBODY),
    "tokens first": (lambda mix, x, text: mix(x.transpose(0, 1).clone().transpose(0, 1)), NOBODY),
    "from (B, 1, L, E)": (lambda mix, x, text: mix(x.unsqueeze(1).squeeze(1)), NOBODY),
    "from (B, H, W, E)": (lambda mix, x, text: mix(grid(x).reshape(x.shape)), NOBODY),
}  # fmt: skip

NORMS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm(E),
    "RMSNorm": lambda: nn.RMSNorm(E),
    "no norm": nn.Identity,
    "a weight-normed Linear": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(E, E)),
}


def first_changed(y: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """An output whose first tensor is changed."""
    return (change(y[0]), *y[1:]) if isinstance(y, tuple) else change(y)


def hook_on(where: str, module: nn.Module) -> None:
    """Hook a function to a mixer or norm, as people do who steer or watch a model."""
    if where == "a hook that watches":
        module.register_forward_hook(lambda m, args, y: None)
    elif where == "a hook that doubles":
        module.register_forward_hook(lambda m, args, y: first_changed(y, lambda v: 2 * v))
    elif where == "a hook that shifts":
        module.register_forward_hook(lambda m, args, y: first_changed(y, lambda v: v + v.roll(1, 1)))
    elif where == "a pre-hook that turns round":
        module.register_forward_pre_hook(lambda m, args: (args[0].flip(1),))
    elif where == "a forward of its own":
        forward = module.forward
        module.forward = lambda x, **options: first_changed(forward(x.flip(1), **options), lambda v: v.flip(1))


HOOKS = {
    "a hook that watches": NOBODY, "a hook that doubles": ANYBODY, "a hook that shifts": ANYBODY,
    "a pre-hook that turns round": ANYBODY, "a forward of its own": ANYBODY,
}  # fmt: skip


def block(draw: Random) -> tuple[str, Step, frozenset[str]]:
    """Draw a block around a mixer."""
    name = draw.choice([*MIXERS, "MambaMixer", "MambaMixer", "Mamba2Mixer"])
    norm = draw.choice(list(NORMS))
    around, refused_by = AROUND[how := draw.choice([*AROUND, "plainly", "plainly", "backwards", "in both directions"])]
    joined = draw.choice(["added", "added", "added", "alone", "half the stream", "normed behind", "in place", "gated"])
    hooked = draw.choice(list(HOOKS)) if draw.random() < 0.12 else None

    def run(m: Any, h: Tensor, text: Text) -> Tensor:
        y = around(m.mixer, m.norm(h), text)
        if joined == "alone":
            return y
        if joined == "half the stream":
            return 0.5 * h + y
        if joined == "normed behind":
            return m.behind(h + y)
        if joined == "gated":
            return h + y * torch.sigmoid(m.gate(h))
        if joined == "in place":
            h = h.clone()
            h += y
            return h
        return h + y

    step = Step(
        run, draw.random() < 0.5, mixer=Mixer(name), norm=NORMS[norm](), behind=nn.LayerNorm(E), gate=nn.Linear(E, E)
    )
    if hooked is not None:
        hook_on(hooked, step.get_submodule(draw.choice(["mixer", "norm", "mixer.layer"])))
    words = [w for w in (norm if norm != "no norm" else "", name, how if how != "plainly" else "") if w]
    text = f"[{' '.join(words)}, {joined}{f', {hooked}' if hooked else ''}]"
    return text, step, refused_by | (HOOKS[hooked] if hooked else NOBODY)


# --- Beside the mixers ----------------------------------------------------------------------------------------------


@torch.jit.script
def scripted(x: Tensor) -> Tensor:
    return torch.tanh(x) * 2.0


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: Any, *gradient: Any) -> Any:
        return 2 * gradient[0]


def previous(h: Tensor) -> Tensor:
    return F.pad(h, (0, 0, 1, 0))[:, :-1]


def attend(h: Tensor) -> Tensor:
    return (h @ h.transpose(1, 2) / E).softmax(-1) @ h


def spectrum(h: Tensor) -> Tensor:
    return torch.fft.fft(h, dim=1).real


def without_grad(h: Tensor) -> Tensor:
    with torch.no_grad():
        return torch.tanh(h)


def experts(m: Any, h: Tensor, text: Text) -> Tensor:
    chosen = m.router(h).argmax(-1, keepdim=True)
    return h + torch.where(chosen == 0, m.first(h), m.second(h))


def channels_first(m: Any, h: Tensor, text: Text) -> Tensor:
    return h + m.conv(h.transpose(1, 2))[..., : h.shape[1]].transpose(1, 2)


def linear() -> nn.Module:
    return nn.Linear(E, E)


BESIDE: dict[str, Piece] = {
    "MLP": with_parts(lambda m, h, t: h + m.out(F.silu(m.into(h))), into=linear, out=linear),
    "GELU MLP": with_parts(lambda m, h, t: h + m.out(F.gelu(m.into(h))), into=linear, out=linear),
    "ReLU MLP": with_parts(lambda m, h, t: h + m.out(F.relu(m.into(h))), into=linear, out=linear),
    "GLU": with_parts(lambda m, h, t: h + F.glu(torch.cat([m.into(h), m.out(h)], -1), -1), into=linear, out=linear),
    "gate": with_parts(lambda m, h, t: h * torch.sigmoid(m.gate(h)), gate=linear),
    "LayerNorm": with_parts(lambda m, h, t: m.norm(h), norm=lambda: nn.LayerNorm(E)),
    "BatchNorm": with_parts(
        lambda m, h, t: m.norm(h.transpose(1, 2)).transpose(1, 2), norm=lambda: nn.BatchNorm1d(E)),
    "Dropout": with_parts(lambda m, h, t: m.drop(h), drop=lambda: nn.Dropout(0.5)),
    "convolution of one tap": with_parts(channels_first, conv=lambda: nn.Conv1d(E, E, 1)),
    "scale by position": function(lambda h: h * torch.linspace(1, 2, h.shape[1]).to(h)[:, None]),
    "heads": function(lambda h: h.unflatten(-1, (4, 4)).transpose(1, 2).transpose(1, 2).flatten(2)),
    "tokens one by one": function(lambda h: torch.stack(list(h.unbind(1)), 1)),
    "chunks": function(lambda h: torch.cat(h.chunk(2, 1), 1)),
    "padded and cut": function(lambda h: F.pad(h, (0, 0, 2, 0))[:, 2:]),
    "index_select": function(lambda h: h.index_select(1, torch.arange(h.shape[1]))),
    "grid and back": function(lambda h: grid(h).reshape(h.shape)),
    "turned round twice": function(lambda h: h.flip(1).flip(1)),
    "clone": function(lambda h: h.clone()),
    "in place": function(lambda h: (h * 1).mul_(2)),
    "causal convolution": with_parts(channels_first, MATRICES, conv=lambda: nn.Conv1d(E, E, 3, padding=2)),
    "depthwise convolution": with_parts(
        channels_first, MATRICES, conv=lambda: nn.Conv1d(E, E, 3, padding=1, groups=E)),
    "cumulative mean": function(
        lambda h: h + h.cumsum(1) / torch.arange(1, h.shape[1] + 1).to(h)[:, None], MATRICES),
    "mean over tokens taken off": function(lambda h: h - h.mean(1, keepdim=True), MATRICES),
    "the mean added": with_parts(
        lambda m, h, t: h + m.out(h.mean(1))[:, None], MATRICES, out=linear),
    "token shift": function(lambda h: h + previous(h), MATRICES),
    "half shifted": function(lambda h: torch.cat([h[..., :8], previous(h[..., 8:])], -1), MATRICES),
    "roll": function(lambda h: h + h.roll(1, 1), MATRICES),
    "turned round": function(lambda h: h.flip(1), MATRICES),
    "rolled": function(lambda h: h.roll(2, 1), MATRICES),
    "hand-written attention": function(lambda h: h + attend(h), MATRICES),
    "a matrix between tokens": Piece(
        lambda draw: Step(lambda m, h, t: h + torch.einsum(
            "ij,bjd->bid", m.weight.weight[: h.shape[1], : h.shape[1]], h),
            weight=nn.Linear(LONGEST, LONGEST)), MATRICES),
    "spectrum": function(lambda h: h + 0.1 * spectrum(h), ANYBODY),
    "LSTM": with_parts(lambda m, h, t: h + m.rnn(h)[0], ANYBODY, rnn=lambda: nn.LSTM(E, E, batch_first=True)),
    "GRU": with_parts(lambda m, h, t: h + m.rnn(h)[0], ANYBODY, rnn=lambda: nn.GRU(E, E, batch_first=True)),
    "MultiheadAttention": with_parts(
        lambda m, h, t: h + m.attention(h, h, h, need_weights=False)[0], ANYBODY,
        attention=lambda: nn.MultiheadAttention(E, 2, batch_first=True)),
    "scripted": function(lambda h: h + scripted(h), ANYBODY),
    "scripted roll": function(lambda h: h + scripted(h).roll(1, 1), ANYBODY),
    "vmap": function(lambda h: h + torch.vmap(torch.tanh)(h), ANYBODY),
    "numpy": function(lambda h: h + torch.from_numpy(h.detach().numpy() * 2).to(h), ANYBODY),
    "numpy, shifted": function(lambda h: h + torch.from_numpy(h.roll(1, 1).detach().numpy() * 2).to(h), ANYBODY),
    "a function of its own": function(lambda h: h + Doubled.apply(h), ANYBODY),
    "without gradient": function(lambda h: h + without_grad(h), ANYBODY),
    "without gradient, shifted": function(lambda h: h + without_grad(h).roll(1, 1), ANYBODY),
    "detached mean": function(lambda h: h + h.detach().mean(1, keepdim=True), ANYBODY),
    "detached norm": function(lambda h: h / h.detach().norm(dim=-1, keepdim=True), ANYBODY),
    "scaled by the longest token": function(
        lambda h: h / h.detach().norm(dim=-1).amax(1)[:, None, None], ANYBODY),
    "experts": with_parts(experts, ANYBODY, router=lambda: nn.Linear(E, 2), first=linear, second=linear),
    "by a condition": function(
        lambda h: torch.where(h.detach().sum((1, 2), keepdim=True) > 0, 2 * h, h), ANYBODY),
    "added to the second sequence": with_parts(
        lambda m, h, t: h if t.other is None else h + m.out(t.other.to(h)), MATRICES, out=linear),
    "gated by the second sequence": with_parts(
        lambda m, h, t: h if t.other is None else h * torch.sigmoid(m.out(t.other.to(h))), MATRICES, out=linear),
    "the inputs once more": Piece(lambda draw: Step(
        lambda m, h, t: h + (m.again(t.inputs) if not t.inputs.is_floating_point() else 0 * h),
        again=nn.Embedding(V, E)), MATRICES),
}  # fmt: skip


# --- From inputs to the first sequence ------------------------------------------------------------------------------


def shifted(ids: Tensor) -> Tensor:
    result = torch.zeros_like(ids)
    result[:, 1:] = ids[:, :-1]
    return result


def positions(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1])


class Words(NamedTuple):
    """More vectors (B, L, E) that are made of token ids, besides those of the embedding."""

    make: Callable[[Any, Tensor], Tensor]
    refused_by: frozenset[str] = NOBODY
    of_own_token: bool = True


WORDS: dict[str, Words] = {
    "": Words(lambda m, ids: 0.0),  # type: ignore[arg-type, return-value]
    "learned positions": Words(lambda m, ids: m.other.weight[: ids.shape[1]]),
    "positions that are looked up": Words(lambda m, ids: m.other(positions(ids))),
    "positions of the shape of the ids": Words(lambda m, ids: m.other(positions(ids)[None].expand_as(ids))),
    "a type": Words(lambda m, ids: m.other(torch.zeros_like(ids))),
    "types by id": Words(lambda m, ids: m.other((ids > 9).long())),
    "a second embedding": Words(lambda m, ids: m.other(ids)),
    "weight[ids]": Words(lambda m, ids: m.other.weight[ids]),
    "index_select": Words(
        lambda m, ids: m.other.weight.index_select(0, ids.flatten()).reshape(*ids.shape, E)),
    "low rank": Words(lambda m, ids: m.up(F.embedding(ids, m.low.weight.T))),
    "ids modulo 5": Words(lambda m, ids: m.other(ids % 5)),
    "hashed pairs": Words(lambda m, ids: m.other((7 * ids + 3 * ids.roll(1, 1)) % V), MATRICES, False),
    "pairs": Words(lambda m, ids: m.pair(V * shifted(ids) + ids), MATRICES, False),
    "the one before": Words(lambda m, ids: m.tok(shifted(ids)), MATRICES),
    "the next one": Words(lambda m, ids: m.other(ids.roll(-1, 1)), MATRICES),
    "the other strand": Words(lambda m, ids: m.tok((V - 1 - ids).flip(1)), MATRICES),
    "a bag": Words(lambda m, ids: m.bag(ids)[:, None], MATRICES),
    "the first token's": Words(lambda m, ids: m.other(ids[:, :1]), ANYBODY),
    "sorted ids": Words(lambda m, ids: m.other(ids.sort(1).values), ANYBODY, False),
    "lists": Words(
        lambda m, ids: m.other(torch.tensor([[(7 * t + 1) % V for t in row] for row in ids.tolist()])), ANYBODY),
    "one hot": Words(lambda m, ids: F.one_hot(ids, V).to(m.tok.weight) @ m.other.weight, ANYBODY),
    "ids as numbers": Words(lambda m, ids: ids.to(m.tok.weight)[..., None] / V, ANYBODY),
    "repeats": Words(
        lambda m, ids: m.other((ids[:, :, None] == ids[:, None]).sum(-1).clamp_max(V - 1)), ANYBODY, False),
}  # fmt: skip


# --- The read-out ---------------------------------------------------------------------------------------------------

READ: dict[str, Piece] = {
    "the last token": function(lambda h: h[:, -1]),
    "the first token": function(lambda h: h[:, 0]),
    "the third token": function(lambda h: h[:, 2]),
    "mean": function(lambda h: h.mean(1)),
    "sum": function(lambda h: h.sum(1)),
    "weighted mean": function(lambda h: (h * torch.linspace(0.1, 1, h.shape[1]).to(h)[:, None]).mean(1)),
    "maximum": function(lambda h: h.amax(1)),
    "norm, then last token": with_parts(lambda m, h, t: m.norm(h)[:, -1], norm=lambda: nn.LayerNorm(E)),
    "first and last token": function(lambda h: h[:, 0] + h[:, -1]),
    "mean of the last two": function(lambda h: h[:, -2:].mean(1)),
    "turned round, then the first token": function(lambda h: h.flip(1)[:, 0]),
    "attention pooling": with_parts(
        lambda m, h, t: (m.score(h).softmax(1) * h).sum(1), score=lambda: nn.Linear(E, 1)),
    "the mean of a half": function(lambda h: h[:, ::2].mean(1)),
    "tanh of the mean": function(lambda h: h.mean(1).tanh()),
    "a convolution, then last token": with_parts(
        lambda m, h, t: channels_first(m, h, t)[:, -1], MATRICES, conv=lambda: nn.Conv1d(E, E, 3, padding=2)),
    "the token of the largest first channel": function(
        lambda h: h.gather(1, h[..., 0].argmax(1)[:, None, None].expand(-1, 1, E))[:, 0], ANYBODY),
    "standard deviation": function(lambda h: h.std(1), ANYBODY),
    "last token and its neighbour's product": function(lambda h: h[:, -1] * h[:, -2]),
    "the last token beside the first of the inputs": with_parts(
        lambda m, h, t: h[:, -1] + (t.inputs[:, 0].to(h) if h.shape == t.inputs.shape else 0), MATRICES),
    "the last token and its own mean": function(lambda h: h[:, -1] + h.detach().mean(1), ANYBODY),
}  # fmt: skip
