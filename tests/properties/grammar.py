"""Draws a model from a number, by a grammar: inputs -> vectors -> blocks and what stands beside them -> read-out."""

from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.families import FAMILIES
from tests.properties.pieces import (
    ANYBODY,
    BESIDE,
    FROZEN,
    LONGEST,
    MATRICES,
    NOBODY,
    READ,
    ROLLOUT,
    WORDS,
    E,
    Step,
    Text,
    V,
    block,
)

B = 2
Forward = Callable[..., Any]


@dataclass
class Case:
    """A model that was drawn, and the inputs that it is explained on.

    Attributes:
        text: What the model is, in words.
        model: The model.
        forward: What a user passes as ``forward_func``: the model, or a callable that runs it.
        inputs: The inputs of two examples.
        others: Other inputs, of another length where the model takes them.
        args: The additional forward arguments of the inputs.
        other_args: Those of the other inputs.
        target: The target.
        refused_by: The methods that may refuse it.
        own: Whether each vector that is made of the inputs is made of one token, and belongs to it.
        mask: 1 at real tokens, (B, L), if there is padding.
        embedding: The module whose output at token j is token j's vector, if there is one.
        output: From the inputs to the model's output, run as its documentation says; None if ``forward`` does that.
    """

    text: str
    model: nn.Module
    forward: Forward
    inputs: Tensor
    others: Tensor
    args: tuple[Any, ...]
    other_args: tuple[Any, ...]
    target: Any
    refused_by: frozenset[str]
    own: bool = True
    mask: Tensor | None = None
    embedding: nn.Module | None = None
    output: Forward | None = None

    @property
    def decides(self) -> bool:
        """Whether it may do with one text what it does not with another, so that one of them alone is refused."""
        return self.refused_by >= ANYBODY

    @property
    def takes_ids(self) -> bool:
        """Whether the inputs are token ids."""
        return not self.inputs.is_floating_point()

    @property
    def takes_images(self) -> bool:
        """Whether the inputs are images."""
        return self.inputs.dim() == 4

    def readings(self, inputs: Tensor, args: tuple[Any, ...]) -> Tensor:
        """All that the score is made of, (B, ...), where no saturated function of two logits hides a change."""
        with torch.no_grad():
            if not isinstance(self.model, Drawn):
                return self.score(inputs, args)
            answer, self.model.answer = self.model.answer, lambda y: y
            try:
                output = self.model(inputs, *args)
            finally:
                self.model.answer = answer
        return output[:, self.target[0]] if isinstance(self.target, tuple) else output

    def score(self, inputs: Tensor, args: tuple[Any, ...]) -> Tensor:
        """The explained score of each example, (B,), by a run of the model alone."""
        with torch.no_grad():
            output = (self.output or self.forward)(inputs, *args)
        if self.target is None:
            return output.reshape(len(inputs))
        if isinstance(self.target, tuple):
            return output[(slice(None), *self.target)]
        return output[:, self.target]


# --- Models of pieces -----------------------------------------------------------------------------------------------


class Drawn(nn.Module):
    """A model of pieces.

    Args:
        enter: From the inputs to the first sequence, (B, L, E).
        steps: What follows.
        read: The read-out, (B, E).
        answer: From two logits to the output.
    """

    def __init__(
        self, enter: nn.Module, steps: list[Step], read: Step | None, answer: Callable[[Tensor], Tensor]
    ) -> None:
        super().__init__()
        self.enter, self.steps, self.read = enter, nn.ModuleList(steps), read
        self.head, self.answer = nn.Linear(E, 2), answer

    def forward(self, inputs: Tensor, other: Tensor | None = None) -> Tensor:
        text = Text(inputs, other)
        h = self.enter(inputs)
        for step in self.steps:
            assert isinstance(step, Step)
            h = step.apply_to(h, text)
        if self.read is not None:
            h = self.read.apply_to(h, text)
        return self.answer(self.head(h))


class Embedded(nn.Module):
    """Vectors of token ids."""

    def __init__(self, name: str, factor: float) -> None:
        super().__init__()
        self.tok, self.other, self.pair = nn.Embedding(V, E), nn.Embedding(V, E), nn.Embedding(V * V, E)
        self.bag, self.low, self.up = nn.EmbeddingBag(V, E), nn.Embedding(3, V), nn.Linear(3, E)
        self.make, self.factor = WORDS[name].make, factor

    def forward(self, ids: Tensor) -> Tensor:
        return self.factor * self.tok(ids) + self.make(self, ids)


class Entered(nn.Module):
    """Vectors of anything but token ids."""

    def __init__(self, run: Callable[[Any, Tensor], Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.run = run
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.run(self, x)


@dataclass
class Entry:
    """A way in: the shape of inputs of L tokens, the module that makes vectors of them, and who may refuse it.

    ``tokens`` is how many there always are, if inputs have no other length.
    """

    shape: Callable[[int], tuple[int, ...]]
    build: Callable[[], nn.Module]
    refused_by: frozenset[str] = NOBODY
    tokens: int | None = None


def with_class_token(m: Any, x: Tensor, place: int) -> Tensor:
    h = m.conv(x).flatten(2).transpose(1, 2)
    token = m.token.weight[None].expand(len(h), -1, -1)
    return torch.cat([h[:, :place], token, h[:, place:]], 1)


IMAGE = (2, 4, 6)
ENTRIES: dict[str, Entry] = {
    "vectors": Entry(lambda L: (L, E), lambda: Entered(lambda m, x: x)),
    "vectors, Linear": Entry(lambda L: (L, 5), lambda: Entered(lambda m, x: m.into(x), into=nn.Linear(5, E))),
    "vectors with positions": Entry(
        lambda L: (L, E),
        lambda: Entered(lambda m, x: x + m.place.weight[: x.shape[1]], place=nn.Embedding(LONGEST, E))),
    "vectors, convolution of one tap": Entry(
        lambda L: (L, 5),
        lambda: Entered(lambda m, x: m.conv(x.transpose(1, 2)).transpose(1, 2), conv=nn.Conv1d(5, E, 1))),
    "vectors, causal convolution": Entry(
        lambda L: (L, 5), lambda: Entered(lambda m, x: m.conv(F.pad(x.transpose(1, 2), (2, 0))).transpose(1, 2),
                                          conv=nn.Conv1d(5, E, 3)), MATRICES),
    "vectors less their mean": Entry(
        lambda L: (L, E), lambda: Entered(lambda m, x: x - x.mean(1, keepdim=True)), MATRICES),
    "vectors turned round": Entry(lambda L: (L, E), lambda: Entered(lambda m, x: x.flip(1)), MATRICES),
    "a series in patches of two": Entry(
        lambda L: (2 * L, 4), lambda: Entered(lambda m, x: m.into(x.reshape(len(x), -1, 8)), into=nn.Linear(8, E)),
        MATRICES),
    "a series, channels first": Entry(
        lambda L: (6, 6),
        lambda: Entered(lambda m, x: m.into(x.transpose(1, 2)), into=nn.Linear(6, E)), MATRICES, 6),
    "variates as tokens": Entry(
        lambda L: (4, 9), lambda: Entered(lambda m, x: m.into(x), into=nn.Linear(9, E)), NOBODY, 4),
    "images": Entry(
        lambda L: IMAGE, lambda: Entered(lambda m, x: m.conv(x).flatten(2).transpose(1, 2), conv=nn.Conv2d(2, E, 2, 2)),
        NOBODY, 6),
    "images by columns": Entry(
        lambda L: IMAGE,
        lambda: Entered(lambda m, x: m.conv(x).transpose(2, 3).flatten(2).transpose(1, 2), conv=nn.Conv2d(2, E, 2, 2)),
        NOBODY, 6),
    "images, overlapping patches": Entry(
        lambda L: IMAGE,
        lambda: Entered(lambda m, x: m.conv(x).flatten(2).transpose(1, 2), conv=nn.Conv2d(2, E, 3, 2, 1)),
        MATRICES, 6),
    "images by unfold": Entry(
        lambda L: IMAGE,
        lambda: Entered(lambda m, x: m.into(F.unfold(x, 2, stride=2).transpose(1, 2)), into=nn.Linear(8, E)),
        NOBODY, 6),
    "images by reshape": Entry(
        lambda L: IMAGE,
        lambda: Entered(
            lambda m, x: m.into(x.reshape(-1, 2, 2, 2, 3, 2).permute(0, 2, 4, 1, 3, 5).reshape(len(x), 6, 8)),
            into=nn.Linear(8, E)), NOBODY, 6),
    "images with a class token in front": Entry(
        lambda L: IMAGE,
        lambda: Entered(lambda m, x: with_class_token(m, x, 0), conv=nn.Conv2d(2, E, 2, 2), token=nn.Embedding(1, E)),
        NOBODY, 7),
    "images with a class token in the middle": Entry(
        lambda L: IMAGE,
        lambda: Entered(lambda m, x: with_class_token(m, x, 3), conv=nn.Conv2d(2, E, 2, 2), token=nn.Embedding(1, E)),
        NOBODY, 7),
    "images less their mean": Entry(
        lambda L: IMAGE,
        lambda: Entered(lambda m, x: m.conv(x - x.mean((2, 3), keepdim=True)).flatten(2).transpose(1, 2),
                        conv=nn.Conv2d(2, E, 2, 2)), MATRICES, 6),
    "bands": Entry(
        lambda L: (6, 2, 3), lambda: Entered(lambda m, x: m.into(x.flatten(2)), into=nn.Linear(6, E)), MATRICES, 6),
}  # fmt: skip


@dataclass
class Answer:
    """What a model makes of its two logits, and the target that selects a score of it.

    Where the logits lie far apart a probability has no gradient, and with frozen gates it never has.
    """

    run: Callable[[Tensor], Tensor]
    target: Any
    refused_by: frozenset[str] = NOBODY


ANSWERS: dict[str, Answer] = {
    "logits": Answer(lambda y: y, 1),
    "log-probabilities": Answer(lambda y: y.log_softmax(-1), 0, MATRICES),
    "probabilities": Answer(lambda y: y.softmax(-1), 1, frozenset({ROLLOUT, FROZEN})),
    "a margin": Answer(lambda y: y[..., 1] - y[..., 0], None),
    "a column": Answer(lambda y: y[..., :1], None),
    "a product": Answer(lambda y: y[..., 0] * y[..., 1], None),
}


def _drawn(draw: Random) -> Case:
    """Draw a model of pieces."""
    words, refused_by, own = [], NOBODY, True
    L = draw.choice([5, 6, 6, 7])
    if takes_ids := draw.random() < 0.55:
        name, factor = draw.choice([*WORDS, "", "", "", "learned positions"]), draw.choice([1.0, 1.0, 4.0])
        enter: nn.Module = Embedded(name, factor)
        words.append(f"ids -> {f'{factor:g} x ' if factor != 1 else ''}embedding{f' + {name}' if name else ''}")
        refused_by, own = WORDS[name].refused_by, WORDS[name].of_own_token
        entry = Entry(lambda L: (L,), lambda: enter)
    else:
        name = draw.choice(list(ENTRIES))
        entry = ENTRIES[name]
        enter, refused_by = entry.build(), entry.refused_by
        words.append(name)
    steps = []
    for _ in range(draw.choice([1, 1, 2, 2, 3])):
        text, step, refused = block(draw)
        words.append(text)
        steps.append(step)
        refused_by |= refused
        if draw.random() < 0.6:
            name = draw.choice([*BESIDE, "MLP", "MLP", "LayerNorm", "gate"])
            words.append(name)
            steps.append(BESIDE[name].build(draw))
            refused_by |= BESIDE[name].refused_by
    if draw.random() < 0.4:  # what is read stands right behind the last block
        at = draw.randrange(len(steps) + 1)
        name = draw.choice(list(BESIDE))
        steps.insert(at, BESIDE[name].build(draw))
        words.insert(at + 1, name)
        refused_by |= BESIDE[name].refused_by
    answer = ANSWERS[form := draw.choice([*ANSWERS, "logits", "logits"])]
    target, refused_by = answer.target, refused_by | answer.refused_by
    if draw.random() < 0.1:
        read, reading, target = None, "all tokens", (draw.randrange(L - 2), *([] if target is None else [target]))
        if form == "a column":
            target = (*target, 0)
    else:
        reading = draw.choice([*READ, "the last token", "the last token", "mean"])
        read = READ[reading].build(draw)
        refused_by |= READ[reading].refused_by
    words += [reading, form]
    model = Drawn(enter, steps, read, answer.run)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    M = L + draw.choice([-1, 1, 0, 2]) if entry.tokens is None else L
    inputs, others = ((torch.randint(V, (B, n)) if takes_ids else torch.randn(B, *entry.shape(n))) for n in (L, M))
    two = any("second sequence" in word for word in words)
    seconds: list[tuple[Any, ...]] = [(torch.randn(B, entry.tokens or n, E),) if two else () for n in (L, M)]
    model.eval()
    return Case(
        " -> ".join(words), model, model, inputs, others, seconds[0], seconds[1], target, refused_by, own,
        embedding=enter.tok if isinstance(enter, Embedded) else None,
    )  # fmt: skip


# --- Models of transformers, and what people write around them ------------------------------------------------------


def _last(logits: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return logits[:, -1]
    last = (torch.arange(mask.shape[1]) * mask).argmax(1)
    return logits[torch.arange(len(logits)), last]


def _called(model: Any, inputs: Tensor, mask: Tensor | None = None, **options: Any) -> Any:
    name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
    return model(**{name: inputs}, attention_mask=mask, use_cache=False, **options)


WRAPPED: dict[str, tuple[Callable[[Any], Forward], Any, frozenset[str]]] = {
    "log-probability": (lambda m: lambda x: _called(m, x).logits[:, -1].log_softmax(-1), 5, NOBODY),
    "all logits": (lambda m: lambda x: _called(m, x).logits, (2, 5), NOBODY),
    "mean logits": (lambda m: lambda x: _called(m, x).logits.mean(1), 5, NOBODY),
    "a hidden state": (
        lambda m: lambda x: _called(m, x, output_hidden_states=True).hidden_states[1][:, -1], 5, ANYBODY),
    "ids turned round": (lambda m: lambda x: _called(m, x.flip(1)).logits[:, -1], 5, MATRICES),
    "ids without the first": (lambda m: lambda x: _called(m, x[:, 1:]).logits[:, -1], 5, ANYBODY),
    "two texts in one batch": (
        lambda m: lambda x: _called(m, torch.cat([x, x.flip(1)])).logits[: len(x), -1], 5, ANYBODY),
    "run twice": (
        lambda m: lambda x: _called(m, x).logits[:, -1] - _called(m, x.flip(1)).logits[:, -1], 5, ANYBODY),
    "vectors behind a prefix": (
        lambda m: lambda x: _called(m, torch.cat([torch.ones_like(m.get_input_embeddings()(x)[:, :2]),
                                                  m.get_input_embeddings()(x)], 1)).logits[:, -1], 5, MATRICES),
    "ids behind a prefix": (
        lambda m: lambda x: _called(m, torch.cat([torch.full_like(x[:, :2], 4), x], 1)).logits[:, -1], 5, ANYBODY),
    "vectors scaled": (lambda m: lambda x: _called(m, 3 * m.get_input_embeddings()(x)).logits[:, -1], 5, MATRICES),
    "in inference mode": (lambda m: torch.no_grad()(lambda x: _called(m, x).logits[:, -1]), 5, ANYBODY),
}  # fmt: skip

_SLOW = frozenset({"glm5_next", "qwen4_exp", "xlstm"})
_WITHOUT_MASK = frozenset({"recurrent_gemma", "rwkv", "xlstm"})


def _wrapped(draw: Random) -> Case:
    """Draw a model of transformers."""
    family = draw.choice([name for name in FAMILIES if name not in _SLOW])
    model = FAMILIES[family].build()
    L = draw.choice([5, 6])
    M = L + draw.choice([-1, 1, 2])
    inputs, others = (torch.randint(3, V, (B, n)) for n in (L, M))
    embedding = model.get_input_embeddings()
    embedded = draw.random() < 0.3
    if embedded:
        with torch.no_grad():
            inputs, others = (embedding(x).detach().clone() for x in (inputs, others))
    kind = draw.choice(
        ["plain", "padded", *[w for w in WRAPPED if not embedded or ("ids" not in w and "vectors" not in w)]]
    )
    words = f"{family}, {'embeddings' if embedded else 'ids'}, {kind}"
    if kind == "plain":
        return Case(
            words, model, model, inputs, others, (), (), 5, NOBODY, True, None, embedding,
            lambda x: _called(model, x).logits[:, -1],
        )  # fmt: skip
    if kind == "padded":
        masks = [torch.ones(B, n, dtype=torch.long) for n in (L, M)]
        left = draw.random() < 0.5
        for mask in masks:
            mask[0, slice(0, 2) if left else slice(-2, None)] = 0
        refused_by = ANYBODY if left or embedded or family in _WITHOUT_MASK else NOBODY
        return Case(
            f"{words} on the {'left' if left else 'right'}", model, model, inputs, others, (masks[0],), (masks[1],), 5,
            refused_by, True, masks[0], embedding, lambda x, mask: _last(_called(model, x, mask).logits, mask),
        )  # fmt: skip
    make, target, refused_by = WRAPPED[kind]
    with torch.no_grad():  # transformers sets its own hooks on a model that is first asked for hidden states
        make(model)(inputs)
    return Case(words, model, make(model), inputs, others, (), (), target, refused_by, True, None, embedding)


def drawn(seed: int, number: int) -> Case:
    """Draw a model: the same one for the same two numbers, in the same state of its weights.

    Args:
        seed: The seed of the run.
        number: The number of the model in the run.
    """
    draw = Random(f"{seed}:{number}")
    torch.manual_seed(draw.randrange(2**31))
    return _wrapped(draw) if draw.random() < 0.15 else _drawn(draw)
