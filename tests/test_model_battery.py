"""Thirty tiny models in the shapes that people build: relevance sums to the model's own difference on each of them.

The methods of matrices explain such a model exactly, or refuse it by name. The layers are a Mamba that is known, a scan
over the four ways of an image with an adapter of its own, and recurrences that no adapter knows.
"""

from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Mamba2Config, MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer
from transformers.models.mamba2.modeling_mamba2 import Mamba2Mixer

from captum_ssm import (
    ImplicitAttentionAttribution,
    ImplicitAttentionRelevance,
    ImplicitAttentionRollout,
    InvalidInputError,
    UnsupportedModelError,
    register,
    unregister,
)
from captum_ssm.layers.fidelity import relative_error
from captum_ssm.operators import Chain, Diagonal, Projection, Reordered, Scan, Sum
from captum_ssm.testing import check_adapter
from tests.families import perturbed

D, L, IDS = 8, 8, 11


# --- Layers -------------------------------------------------------------------------------------------------------


def mamba() -> nn.Module:
    return MambaMixer(MambaConfig(hidden_size=D, state_size=3, time_step_rank=2), 0)


def mamba2() -> nn.Module:
    config = Mamba2Config(hidden_size=D, state_size=3, num_heads=4, head_dim=4, n_groups=1, expand=2, chunk_size=4)
    return Mamba2Mixer(config, 0)


class Decay(nn.Module):
    """A gated recurrence as one writes it by hand; no adapter knows it."""

    def __init__(self) -> None:
        super().__init__()
        self.value, self.keep, self.out = nn.Linear(D, D), nn.Linear(D, D), nn.Linear(D, D)

    def forward(self, x: Tensor) -> Tensor:
        v, keep, h, outputs = self.value(x), self.keep(x).sigmoid(), torch.zeros_like(x[:, 0]), []
        for t in range(x.shape[1]):
            h = keep[:, t] * h + (1 - keep[:, t]) * v[:, t]
            outputs.append(h)
        return self.out(torch.stack(outputs, 1))


class HandLSTM(nn.Module):
    """An LSTM, whose gates read its state."""

    def __init__(self) -> None:
        super().__init__()
        self.read, self.again = nn.Linear(D, 4 * D), nn.Linear(D, 4 * D)

    def forward(self, x: Tensor) -> Tensor:
        h = c = torch.zeros_like(x[:, 0])
        outputs = []
        for t in range(x.shape[1]):
            i, f, g, o = (self.read(x[:, t]) + self.again(h)).chunk(4, -1)
            c = f.sigmoid() * c + i.sigmoid() * g.tanh()
            h = o.sigmoid() * c.tanh()
            outputs.append(h)
        return torch.stack(outputs, 1)


class Attend(nn.Module):
    """Softmax attention of every token to all."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv = nn.Linear(D, 3 * D)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(x).chunk(3, -1)
        return (q @ k.mT * D**-0.5).softmax(-1) @ v


class BothEnds(nn.Module):
    """Two layers and a flip."""

    def __init__(self, make: Callable[[], nn.Module] = mamba) -> None:
        super().__init__()
        self.forth, self.back = make(), make()

    def forward(self, x: Tensor) -> Tensor:
        return self.forth(x) + self.back(x.flip(1)).flip(1)


class FourWays(nn.Module):
    """A gated scan of an image's tokens (B, rows * columns, D), along its rows and its columns, from either end."""

    def __init__(self, rows: int, columns: int) -> None:
        super().__init__()
        self.rows, self.columns = rows, columns
        self.into, self.out = nn.Linear(D, D), nn.Linear(D, D)
        self.keep = nn.ModuleList([nn.Linear(D, D) for _ in range(4)])

    def orders(self) -> list[Tensor]:
        number = torch.arange(self.rows * self.columns).view(self.rows, self.columns)
        return [number.flatten(), number.T.flatten(), number.flatten().flip(0), number.T.flatten().flip(0)]

    def forward(self, x: Tensor) -> Tensor:
        v, total = self.into(x), torch.zeros_like(x)
        for order, keep in zip(self.orders(), self.keep):
            h, a = torch.zeros_like(v[:, 0]), keep(x).sigmoid()
            found = {}
            for token in order.tolist():
                h = a[:, token] * h + (1 - a[:, token]) * v[:, token]
                found[token] = h
            total = total + torch.stack([found[token] for token in range(len(order))], 1)
        return self.out(total * x.sigmoid())


def four_ways(mixer: Any, x: Tensor, kwargs: Mapping[str, Any]) -> Chain:
    """A scan for each of the ways, its tokens reordered."""
    ways, one = {}, x.new_ones(1, 1, 1, 1)
    for name, order, keep in zip(("rows", "columns", "rows back", "columns back"), mixer.orders(), mixer.keep):
        a = torch.sigmoid(F.linear(x, keep.weight, keep.bias))[:, order].unsqueeze(-1)
        ways[name] = Reordered(Scan(a=a, b=1 - a, c=one), order)
    out, into = (Projection(layer.weight, layer.bias) for layer in (mixer.out, mixer.into))
    return Chain({"out": out, "gate": Diagonal(x.sigmoid()), "ways": Sum(ways), "in": into})


@pytest.fixture(autouse=True)
def _adapter() -> Iterator[None]:
    register(FourWays)(four_ways)
    yield
    unregister(FourWays)


class Blocks(nn.Module):
    """Mixers on a residual stream (B, L, D), each behind a norm."""

    def __init__(self, *makes: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm, self.mixers = nn.LayerNorm(D), nn.ModuleList([make() for make in makes])

    def forward(self, h: Tensor) -> Tensor:
        for mixer in self.mixers:
            h = h + mixer(self.norm(h))
        return self.norm(h)


# --- Models -------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """A model that one function says: ``forward(model, *inputs)``, with the named parts."""

    def __init__(self, forward: Callable[..., Tensor], **parts: nn.Module) -> None:
        super().__init__()
        self.function = forward
        for name, part in parts.items():
            self.add_module(name, part)

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.function(self, *inputs)


class Case(NamedTuple):
    """A model, the shapes of its inputs, and how the methods of matrices answer."""

    make: Callable[[], nn.Module]
    shapes: tuple[tuple[int, ...], ...]
    """Of each input; ids have no axis but (B, L)."""
    refused: str = ""
    """The part of the message that says why; empty if the model is explained."""
    near: bool = False
    """Whether the reference lies so near that the model decides alike: which is the greatest, which comes first."""


def linear(inputs: int, outputs: int = D) -> nn.Module:
    return nn.Linear(inputs, outputs)


def head(outputs: int = 3) -> nn.Module:
    return nn.Linear(D, outputs)


def series(forward: Callable[..., Tensor], *makes: Callable[[], nn.Module], width: int = 3) -> Callable[[], nn.Module]:
    return lambda: Model(forward, embed=linear(width), blocks=Blocks(*makes), head=head())


def last(m: Any, x: Tensor) -> Tensor:
    return m.head(m.blocks(m.embed(x))[:, -1])


def mean(m: Any, x: Tensor) -> Tensor:
    return m.head(m.blocks(m.embed(x)).mean(1))


def normalised(m: Any, x: Tensor) -> Tensor:
    """The series less its mean, over its deviation, and the answer scaled back."""
    centre, spread = x.mean(1, keepdim=True), x.std(1, keepdim=True) + 0.1
    return m.head(m.blocks(m.embed((x - centre) / spread))[:, -1]) * spread[:, 0] + centre[:, 0]


def trend(m: Any, x: Tensor) -> Tensor:
    """A moving average by a linear layer, the rest by the blocks."""
    smooth = F.pad(x, (0, 0, 2, 0)).unfold(1, 3, 1).mean(-1)
    return m.line(smooth.flatten(1)) + m.head(m.blocks(m.embed(x - smooth))[:, -1])


def patched(m: Any, x: Tensor) -> Tensor:
    return m.head(m.blocks(m.embed(x.unfold(1, 4, 2).flatten(2)))[:, -1])


def by_channel(m: Any, x: Tensor) -> Tensor:
    """Each variate a series of its own."""
    folded = x.mT.flatten(0, 1).unsqueeze(-1)
    return m.head(m.blocks(m.embed(folded))[:, -1]).view(len(x), -1)


def variates(m: Any, x: Tensor) -> Tensor:
    return m.head(m.blocks(m.embed(x.mT)).mean(1))


def reverse_complement(m: Any, x: Tensor) -> Tensor:
    """The mean of both strands: the other one is read from its end, with A and T, C and G exchanged."""
    return (mean(m, x) + mean(m, x.flip(1, 2))) / 2


def stem(m: Any, x: Tensor) -> Tensor:
    return m.head(m.blocks(m.stem(x.mT).mT.relu()).mean(1))


def attended_bag(m: Any, x: Tensor) -> Tensor:
    h = m.blocks(m.embed(x))
    weights = (m.score(h).tanh() * m.gate(h).sigmoid()).mean(-1, keepdim=True).softmax(1)
    return m.head((weights * h).sum(1))


def greatest(m: Any, x: Tensor) -> Tensor:
    return m.head(m.blocks(m.embed(x))).amax(1)


def set_of_points(m: Any, x: Tensor) -> Tensor:
    return m.head(m.embed(x).relu().amax(1))


def sorted_points(m: Any, x: Tensor) -> Tensor:
    order = x[..., :1].argsort(1).expand_as(x)
    return m.head(m.blocks(m.embed(x.gather(1, order))).mean(1))


def neighbours(m: Any, x: Tensor) -> Tensor:
    """Each point with the sum of all others, weighed by their distance."""
    weights = (-(x.unsqueeze(2) - x.unsqueeze(1)).square().sum(-1)).softmax(-1)
    return m.head(m.blocks(m.embed(x) + weights @ m.embed(x)).mean(1))


def features(m: Any, x: Tensor) -> Tensor:
    """Each column of a table a token."""
    return m.head(m.blocks(x.unsqueeze(-1) * m.columns.weight + m.names.weight).mean(1))


def ids_beside_features(m: Any, ids: Tensor, x: Tensor) -> Tensor:
    return m.head(m.blocks(m.items(ids) + m.embed(x))[:, -1])


def candidate(m: Any, ids: Tensor, item: Tensor) -> Tensor:
    """How well an item fits what was clicked."""
    user = m.blocks(m.items(ids))[:, -1]
    return torch.stack([(user * m.embed(item)).sum(-1), m.head(user)[:, 0]], 1)


def two_towers(m: Any, x: Tensor, y: Tensor) -> Tensor:
    u, v = m.blocks(m.embed(x)).mean(1), m.others(m.embed(y)).mean(1)
    return torch.stack([(u * v).sum(-1), (u - v).square().sum(-1)], 1)


def siamese(m: Any, x: Tensor, y: Tensor) -> Tensor:
    u, v = (m.blocks(m.embed(t)).mean(1) for t in (x, y))
    return torch.stack([(F.normalize(u, dim=-1) * F.normalize(v, dim=-1)).sum(-1), (u * v).sum(-1)], 1)


def language(m: Any, ids: Tensor) -> Tensor:
    return m.head(m.blocks(m.items(ids))[:, -1])


def image(m: Any, x: Tensor) -> Tensor:
    return m.head(m.blocks(m.patches(x).flatten(2).mT).mean(1))


def alternating(m: Any, x: Tensor) -> Tensor:
    """One block reads from the first patch, the next from the last, as in Vision-LSTM."""
    h = m.patches(x).flatten(2).mT
    return m.head(m.others(m.blocks(h).flip(1)).flip(1).mean(1))


def u_shape(m: Any, x: Tensor) -> Tensor:
    """Half the size and back, with a path across; the answer is the mean logits of each class."""
    wide = m.down(x).relu()
    deep = m.blocks(m.deeper(wide).flatten(2).mT).mT.unflatten(-1, (2, 2))
    up = deep.repeat_interleave(2, -1).repeat_interleave(2, -2)
    return m.head(torch.cat([wide, up], 1)).mean((2, 3))


def video(m: Any, x: Tensor) -> Tensor:
    """Frames as tokens."""
    return m.head(m.blocks(m.embed(x.flatten(2)))[:, -1])


def encoder_decoder(m: Any, x: Tensor, y: Tensor) -> Tensor:
    memory, h = m.blocks(m.embed(x)), m.others(m.embed(y))
    read = (h @ memory.mT).softmax(-1) @ memory
    return m.head((h + read)[:, -1])


def experts(m: Any, x: Tensor) -> Tensor:
    h = m.embed(x)
    share = m.gate(h).sigmoid()
    return m.head((share * m.blocks(h) + (1 - share) * m.others(h))[:, -1])


def squeezed(m: Any, x: Tensor) -> Tensor:
    """Channels weighed by what the whole series is like."""
    h = m.blocks(m.embed(x))
    return m.head((h * m.gate(h.mean(1, keepdim=True)).sigmoid())[:, -1])


def kernel(m: Any, x: Tensor) -> Tensor:
    """A long convolution, as a state space with constant coefficients has."""
    h = m.embed(x)
    taps = m.taps.weight.exp() * torch.exp(-torch.arange(L) / 3)  # (D, L)
    y = F.conv1d(F.pad(h.mT, (L - 1, 0)), taps.flip(1).unsqueeze(1), groups=D).mT
    return m.head(F.gelu(y)[:, -1])


def decision(m: Any, x: Tensor, actions: Tensor) -> Tensor:
    """States and actions take turns in one sequence."""
    h = torch.stack([m.embed(x), m.actions(actions)], 2).flatten(1, 2)
    return m.head(m.blocks(h)[:, -2])


NO_LAYER = "no layer that captum_ssm can decompose"
MIXED_BEFORE = r"blocks\.mixers\.0.*code before it mixes tokens"
OTHER_TOKENS = r"called with \d+ tokens for inputs of"
FOLDED = "windows or variates folded"
TWICE = "runs the model more than once"
SHAPE = "must have shape"
CASES: dict[str, Case] = {
    "forecast, last token": Case(series(last, mamba, mamba), ((L, 3),)),
    "forecast, Mamba-2": Case(series(last, mamba2, mamba2), ((L, 3),)),
    "forecast, a recurrence by hand": Case(series(last, Decay, Decay), ((L, 3),), NO_LAYER),
    "forecast, normalised": Case(series(normalised, mamba), ((L, 3),), MIXED_BEFORE),
    "forecast, trend and rest": Case(
        lambda: Model(trend, embed=linear(3), blocks=Blocks(mamba), head=head(), line=nn.Linear(3 * L, 3)),
        ((L, 3),),
        MIXED_BEFORE,
    ),
    "forecast, patches": Case(series(patched, mamba, width=12), ((L, 3),), OTHER_TOKENS),
    "forecast, each variate alone": Case(series(by_channel, mamba, width=1), ((L, 3),), FOLDED),
    "forecast, variates as tokens": Case(series(variates, mamba, width=L), ((L, 3),), OTHER_TOKENS),
    "genomics, both strands": Case(series(reverse_complement, mamba, width=4), ((L, 4),), TWICE),
    "genomics, two layers and a flip": Case(series(mean, BothEnds, BothEnds, width=4), ((L, 4),)),
    "genomics, by hand from both ends": Case(series(mean, lambda: BothEnds(Decay), width=4), ((L, 4),), NO_LAYER),
    "genomics, a stem of convolutions": Case(
        lambda: Model(stem, stem=nn.Conv1d(4, D, 3, padding=1), blocks=Blocks(mamba), head=head()),
        ((L, 4),),
        r"'stem' \(Conv1d\) mixes tokens",
    ),
    "bag, attention": Case(
        lambda: Model(
            attended_bag, embed=linear(5), blocks=Blocks(mamba), score=linear(D), gate=linear(D), head=head()
        ),
        ((9, 5),),
    ),
    "bag, the greatest": Case(series(greatest, mamba, width=5), ((9, 5),), near=True),
    "segmentation, U-shape": Case(
        lambda: Model(
            u_shape,
            down=nn.Conv2d(2, D, 3, 2, 1),
            deeper=nn.Conv2d(D, D, 2, 2),
            blocks=Blocks(lambda: FourWays(2, 2)),
            head=nn.Conv2d(2 * D, 3, 1),
        ),
        ((2, 8, 8),),
    ),
    "audio, waveform": Case(
        lambda: Model(stem, stem=nn.Conv1d(1, D, 8, 4), blocks=Blocks(mamba), head=head()), ((40, 1),), OTHER_TOKENS
    ),
    "audio, spectrogram": Case(series(mean, mamba, mamba2, width=6), ((L, 6),)),
    "table, columns as tokens": Case(
        lambda: Model(
            features, columns=nn.Embedding(6, D), names=nn.Embedding(6, D), blocks=Blocks(mamba), head=head()
        ),
        ((6,),),
        SHAPE,
    ),
    "recommendation, ids beside features": Case(
        lambda: Model(
            ids_beside_features, items=nn.Embedding(IDS, D), embed=linear(3), blocks=Blocks(mamba), head=head()
        ),
        ((), (L, 3)),
    ),
    "recommendation, a candidate": Case(
        lambda: Model(candidate, items=nn.Embedding(IDS, D), embed=linear(4), blocks=Blocks(mamba), head=head()),
        ((), (4,)),
    ),
    "two towers": Case(
        lambda: Model(two_towers, embed=linear(3), blocks=Blocks(mamba), others=Blocks(mamba)),
        ((L, 3), (L, 3)),
        "reads a second sequence",
    ),
    "siamese": Case(lambda: Model(siamese, embed=linear(3), blocks=Blocks(mamba)), ((L, 3), (L, 3)), TWICE),
    "language": Case(
        lambda: Model(language, items=nn.Embedding(IDS, D), blocks=Blocks(mamba, mamba), head=head()), ((),)
    ),
    "image, four ways": Case(
        lambda: Model(image, patches=nn.Conv2d(2, D, 2, 2), blocks=Blocks(*[lambda: FourWays(3, 4)] * 2), head=head()),
        ((2, 6, 8),),
    ),
    "image, both ends": Case(
        lambda: Model(image, patches=nn.Conv2d(2, D, 2, 2), blocks=Blocks(BothEnds), head=head()), ((2, 6, 8),)
    ),
    "image, one end and the other": Case(
        lambda: Model(
            alternating, patches=nn.Conv2d(2, D, 2, 2), blocks=Blocks(mamba), others=Blocks(mamba2), head=head()
        ),
        ((2, 6, 8),),
    ),
    "image, overlapping patches": Case(
        lambda: Model(image, patches=nn.Conv2d(2, D, 3, 2, 1), blocks=Blocks(BothEnds), head=head()),
        ((2, 6, 8),),
        MIXED_BEFORE,
    ),
    "points, a set": Case(lambda: Model(set_of_points, embed=linear(3), head=head()), ((9, 3),), NO_LAYER, near=True),
    "points, sorted": Case(series(sorted_points, mamba), ((9, 3),), "order of the tokens", near=True),
    "points, neighbours": Case(series(neighbours, mamba), ((9, 3),), MIXED_BEFORE),
    "video, frames as tokens": Case(series(video, mamba, width=8), ((L, 2, 2, 2),), SHAPE),
    "encoder and decoder": Case(
        lambda: Model(encoder_decoder, embed=linear(3), blocks=Blocks(mamba), others=Blocks(mamba), head=head()),
        ((L, 3), (5, 3)),
        OTHER_TOKENS,
    ),
    "hybrid, attention": Case(series(last, mamba, Attend, mamba), ((L, 3),), r"\(Attend\) mixes tokens"),
    "hybrid, LSTM": Case(series(last, mamba, HandLSTM), ((L, 3),), r"\(HandLSTM\) mixes tokens"),
    "two experts": Case(
        lambda: Model(
            experts, embed=linear(3), gate=linear(D, 1), blocks=Blocks(mamba), others=Blocks(mamba2), head=head()
        ),
        ((L, 3),),
    ),
    "squeezed channels": Case(
        lambda: Model(squeezed, embed=linear(3), gate=linear(D), blocks=Blocks(mamba), head=head()),
        ((L, 3),),
        r"'gate' \(Linear\) mixes tokens",
    ),
    "state space as a convolution": Case(
        lambda: Model(kernel, embed=linear(3), taps=nn.Embedding(D, L), head=head()), ((L, 3),), NO_LAYER
    ),
    "policy, states and actions": Case(
        lambda: Model(decision, embed=linear(3), actions=linear(2), blocks=Blocks(mamba), head=head()),
        ((L, 3), (L, 2)),
        OTHER_TOKENS,
    ),
}


def inputs(case: Case, seed: int) -> tuple[Tensor, ...]:
    random = torch.Generator().manual_seed(seed)
    ids = torch.randint(IDS, (2, L), generator=random)
    return tuple(torch.randn(2, *shape, generator=random) if shape else ids for shape in case.shapes)


def reference(case: Case) -> tuple[Tensor, ...]:
    return tuple(0.98 * x for x in inputs(case, 1)) if case.near else inputs(case, 2)


def built(case: Case) -> nn.Module:
    torch.manual_seed(0)
    return perturbed(case.make(), std=0.1)


every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


@every_case
def test_relevance_is_the_difference_that_the_model_makes(case: Case) -> None:
    model, given, compared = built(case), inputs(case, 1), reference(case)
    method = ImplicitAttentionRelevance(model)
    relevance = method.attribute(given, 1, baselines=compared)
    assert all(part.shape == x.shape for part, x in zip(relevance, given))
    with torch.no_grad():
        difference = (model(*given) - model(*compared))[:, 1]
    assert difference.abs().min() > 1e-5
    total = sum(part.flatten(1).sum(1) for part in relevance)
    torch.testing.assert_close(total, difference, atol=1e-5, rtol=1e-5)
    known = {MambaMixer, Mamba2Mixer, FourWays}
    assert set(method.followed.values()) == (
        {"decomposition"} if any(type(m) in known for m in model.modules()) else set()
    )


@every_case
@pytest.mark.parametrize("method", [ImplicitAttentionRollout, ImplicitAttentionAttribution])
def test_the_methods_of_matrices_explain_exactly_or_refuse_by_name(case: Case, method: Any) -> None:
    model, (x, *others) = built(case), inputs(case, 1)
    if case.refused:
        with pytest.raises((UnsupportedModelError, InvalidInputError), match=case.refused):
            method(model).attribute(x, 1, tuple(others) or None)
        return
    explainer = method(model)
    scores = explainer.attribute(x, 1, tuple(others) or None)
    assert scores.shape == x.shape and scores.isfinite().all() and scores.any()
    assert explainer.fidelity and max(explainer.fidelity.values()) <= 1e-5


def test_there_are_some_thirty_models() -> None:
    assert len(CASES) >= 30
    assert sum(not case.refused for case in CASES.values()) >= 12


@pytest.mark.parametrize(("rows", "columns"), [(3, 4), (2, 2)])
def test_a_scan_over_four_ways_is_a_sum_of_reordered_scans(rows: int, columns: int) -> None:
    torch.manual_seed(0)
    layer, x = perturbed(FourWays(rows, columns)), torch.randn(2, rows * columns, D)
    report = check_adapter(layer, x, causal=False)
    assert report.fidelity <= 1e-6 and report.factors == ("out", "gate", "ways", "in")
    chain = four_ways(layer, x, {})
    alone = chain.without("rows", "rows back", "columns back").apply(x)
    columns_first = torch.arange(rows * columns).view(rows, columns).T.flatten()
    keep, v, h = layer.keep[1](x).sigmoid(), F.linear(x, layer.into.weight), torch.zeros(2, D)
    expected = torch.zeros_like(x)
    for token in columns_first.tolist():
        h = keep[:, token] * h + (1 - keep[:, token]) * v[:, token]
        expected[:, token] = h
    assert relative_error(alone, F.linear(expected * x.sigmoid(), layer.out.weight)) <= 1e-6
