"""Whatever mixes tokens besides the supported mixers is found and named; what does not is let through."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import MambaConfig
from transformers.models.mamba.modeling_mamba import MambaMixer

from captum_ssm import ImplicitAttentionAttribution, InvalidInputError, UnsupportedModelError
from captum_ssm.network.examination import examine
from captum_ssm.network.graph import ResidualGraph
from captum_ssm.network.recording import record_mixers
from tests.conftest import SEVERAL, build
from tests.families import COMMON, VOCABULARY


@pytest.fixture(params=SEVERAL)
def family(request: pytest.FixtureRequest) -> nn.Module:
    return build(request.param)


CONFIG = MambaConfig(**COMMON, state_size=2, num_hidden_layers=2, time_step_rank=2)


def examined(model: nn.Module, forward: Callable[[Tensor], Tensor], inputs: Tensor) -> ResidualGraph:
    """Examine a model as a method does: with the calls that a run of it recorded."""
    with torch.no_grad(), record_mixers(model) as calls:
        forward(inputs)
    mask = torch.ones(calls[0].x.shape[:2])
    return examine(model, calls, inputs, mask, forward, model)


class Block(nn.Module):
    """A MambaMixer with a residual path, and another layer hidden behind it, two modules deep."""

    def __init__(self, extra: nn.Module, index: int = 0) -> None:
        super().__init__()
        self.norm, self.mixer = nn.LayerNorm(8), MambaMixer(CONFIG, index)
        self.extra = nn.Sequential(nn.Identity(), extra)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.mixer(self.norm(x))
        return x + self.extra(x)


class Model(nn.Module):
    """Two blocks, and what the model itself does with their output; (B, 3) scores of the last token."""

    def __init__(self, extra: nn.Module | None = None, after: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.embed, self.after = nn.Embedding(VOCABULARY, 8), after
        self.blocks = nn.ModuleList([Block(nn.Identity(), 0), Block(extra or nn.Identity(), 1)])
        self.head = nn.Linear(8, 3)
        random = torch.Generator().manual_seed(0)
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5, generator=random)
        self.calls = 0
        self.eval()

    def forward(self, ids: Tensor) -> Tensor:
        self.calls += 1
        x = self.embed(ids) if not ids.is_floating_point() else ids
        for block in self.blocks:
            x = block(x)
        return self.head(self.after(x)[:, -1])


class Function(nn.Module):
    """A function of (B, L, 8), with no parameter and no telling name."""

    def __init__(self, function: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Recurrent(nn.Module):
    def __init__(self, batch_first: bool = True, bidirectional: bool = False) -> None:
        super().__init__()
        self.batch_first = batch_first
        self.rnn = nn.LSTM(8, 4 if bidirectional else 8, batch_first=batch_first, bidirectional=bidirectional)

    def forward(self, x: Tensor) -> Tensor:
        return self.rnn(x)[0] if self.batch_first else self.rnn(x.transpose(0, 1))[0].transpose(0, 1)


class SelfAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        return self.attention(x, x, x, need_weights=False)[0]


class AttentionByName(SelfAttention):
    def forward(self, x: Tensor) -> Tensor:
        return self.attention(query=x, key=x, value=x)[0]


class Convolution(nn.Module):
    """Over tokens, in the layout of torch, cut to be causal."""

    def __init__(self, kernel: int, width: int = 8) -> None:
        super().__init__()
        self.conv = nn.Conv1d(8, width, kernel, padding=kernel - 1)
        self.back = nn.Linear(width, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.back(self.conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2))


def roll(x: Tensor) -> Tensor:
    return x.roll(1, 1)


def anti_causal(x: Tensor) -> Tensor:
    return x.flip(1).cumsum(1).flip(1)


def both_ways(x: Tensor) -> Tensor:
    return x - x.mean(1, keepdim=True)


def later(x: Tensor, by: int) -> Tensor:
    return F.pad(x, (0, 0, by, 0))[:, : x.shape[1]]


def check(model: Any, ids: Tensor) -> bool:
    """Examine a model; return whether it was run for that, besides the run that is explained."""
    before = model.calls
    examined(model, model, ids)
    return model.calls - before > 1


# --- What is refused ----------------------------------------------------------------------------------------------

MIXING: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "LSTM": (Recurrent, "blocks.1.extra.1.rnn' (LSTM)"),
    "LSTM, bidirectional": (lambda: Recurrent(bidirectional=True), "blocks.1.extra.1.rnn' (LSTM)"),
    "LSTM, tokens first": (lambda: Recurrent(batch_first=False), "blocks.1.extra.1' (Recurrent)"),
    "attention": (SelfAttention, "blocks.1.extra.1.attention' (MultiheadAttention)"),
    "attention by keyword": (AttentionByName, "blocks.1.extra.1.attention' (MultiheadAttention)"),
    "transformer layer": (
        lambda: nn.TransformerEncoderLayer(8, 2, 8, batch_first=True, norm_first=True),
        "blocks.1.extra.1.self_attn' (MultiheadAttention)",
    ),
    "convolution": (lambda: Convolution(3), "blocks.1.extra.1' (Convolution)"),
    "convolution to another width": (lambda: Convolution(3, width=12), "blocks.1.extra.1' (Convolution)"),
    "roll": (lambda: Function(roll), "blocks.1.extra.1' (Function)"),
    "anti-causal": (lambda: Function(anti_causal), "blocks.1.extra.1' (Function)"),
    "mean over tokens": (lambda: Function(both_ways), "blocks.1.extra.1' (Function)"),
    "deep inside": (
        lambda: nn.Sequential(nn.Linear(8, 8), nn.Sequential(nn.Tanh(), Recurrent())),
        "blocks.1.extra.1.1.1.rnn' (LSTM)",
    ),
}
every_mixing = pytest.mark.parametrize(("make", "named"), MIXING.values(), ids=MIXING)


@every_mixing
def test_a_hidden_layer_that_mixes_tokens_is_refused_by_its_innermost_name(
    make: Callable[[], nn.Module], named: str, ids: Tensor, unchanged: Any
) -> None:
    model = Model(make())
    for _ in range(2):  # a refusal is not remembered as a pass
        with unchanged(model, ids), pytest.raises(UnsupportedModelError) as caught:
            check(model, ids)
        assert f"'{named} mixes tokens" in str(caught.value)
        assert "captum_ssm.register" in str(caught.value) and ", mamba," in str(caught.value)


@every_mixing
def test_an_attribution_refuses_it_for_ids_and_for_embeddings(
    make: Callable[[], nn.Module], named: str, ids: Tensor
) -> None:
    model = Model(make())
    for inputs in (ids, model.embed(ids).detach()):
        with pytest.raises(UnsupportedModelError) as caught:
            ImplicitAttentionAttribution(model).attribute(inputs, target=1)
        assert named in str(caught.value)


@every_mixing
def test_frozen_parameters_hide_nothing(make: Callable[[], nn.Module], named: str, ids: Tensor) -> None:
    model = Model(make()).requires_grad_(False)
    for run in (check, lambda model, ids: ImplicitAttentionAttribution(model).attribute(ids, target=1)):
        for mode in (torch.enable_grad, torch.no_grad):
            if run is check and mode is torch.no_grad:
                continue  # called by methods only, which enable gradients
            with mode(), pytest.raises(UnsupportedModelError) as caught:
                run(model, ids)
            assert named in str(caught.value)
    assert not any(parameter.requires_grad for parameter in model.parameters())


@pytest.mark.parametrize("function", [anti_causal, both_ways])
def test_a_module_that_is_the_models_own_child_is_seen(function: Callable[[Tensor], Tensor], ids: Tensor) -> None:
    with pytest.raises(UnsupportedModelError, match=r"'after' \(Function\)"):
        check(Model(after=Function(function)), ids)


def test_a_layer_called_by_keyword_on_what_needs_no_gradient_is_seen(ids: Tensor) -> None:
    """As right behind frozen embeddings, where nothing that enters it leads to a parameter."""

    class Named(Model):
        first: nn.Module

        def forward(self, ids: Tensor) -> Tensor:
            return super().forward(self.first(x=self.embed(ids)))

    model = Named()
    model.first = Function(lambda x: x + roll(x)).eval()
    model.requires_grad_(False)
    with pytest.raises(UnsupportedModelError, match=r"'first' \(Function\)"):
        check(model, ids)


@pytest.mark.parametrize("function", [both_ways, anti_causal])
def test_what_a_model_does_to_embeddings_is_seen(function: Callable[[Tensor], Tensor], ids: Tensor) -> None:
    """A model that returns all tokens is itself one of the modules."""
    model = nn.Sequential(Block(nn.Identity()), Function(function)).eval()
    for parameter in model.parameters():
        nn.init.normal_(parameter, std=0.5)
    x = torch.randn(2, 7, 8)
    with pytest.raises(UnsupportedModelError, match=r"'1' \(Function\)"):
        examined(model, model, x)


@pytest.mark.xfail(strict=True, reason="what a model's own forward does after its last module is not watched")
def test_what_the_model_itself_does_to_the_tokens_is_seen(ids: Tensor) -> None:
    model = Model(after=lambda x: x + x.roll(1, 1))
    with pytest.raises(UnsupportedModelError):
        check(model, ids)


def test_a_convolution_of_the_model_itself_is_seen(ids: Tensor) -> None:
    """Where the model lays its channels out as torch's convolutions want them."""
    conv, back = nn.Conv1d(8, 12, 3, padding=2).eval(), nn.Linear(12, 8).eval()
    model = Model()
    model.conv, model.back = conv, back
    model.after = lambda x: back(conv(x.transpose(1, 2))[..., :7].transpose(1, 2))
    with pytest.raises(UnsupportedModelError, match=r"\(Model\)"):
        check(model, ids)


def test_tokens_mixed_in_pieces_are_seen(ids: Tensor) -> None:
    """As by causal attention within windows: the first token sees itself, and so does the last of 7."""
    model = Model(Function(lambda x: torch.cat([part.cumsum(1) for part in x.split(3, 1)], 1)))
    with pytest.raises(UnsupportedModelError, match="Function"):
        check(model, ids)


def test_tokens_mixed_in_the_middle_are_seen(ids: Tensor) -> None:
    model = Model(Function(lambda x: torch.cat([x[:, :1], x[:, 1:-1].cumsum(1), x[:, -1:]], 1)))
    with pytest.raises(UnsupportedModelError, match="Function"):
        check(model, ids)


# --- What is let through ------------------------------------------------------------------------------------------

POINTWISE: dict[str, Callable[[], nn.Module]] = {
    "MLP": lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 8)),
    "LayerNorm": lambda: nn.LayerNorm(8),
    "RMSNorm": lambda: nn.RMSNorm(8),
    "dropout": lambda: nn.Sequential(nn.Linear(8, 8), nn.Dropout(0.9)),
    "gate": lambda: nn.Sequential(nn.Linear(8, 16), nn.GLU()),
    "1x1 convolution": lambda: Convolution(1),
    "1x1 convolution to another width": lambda: Convolution(1, width=12),
    "batch norm": lambda: nn.Sequential(Function(lambda x: x), BatchNorm()),
    "a constant": lambda: Function(lambda x: torch.zeros_like(x)),
    "position numbers": lambda: Function(lambda x: x * torch.arange(x.shape[1]).unsqueeze(-1)),
}


class BatchNorm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(8)

    def forward(self, x: Tensor) -> Tensor:
        return self.norm(x.transpose(1, 2)).transpose(1, 2)


@pytest.mark.parametrize("make", POINTWISE.values(), ids=POINTWISE)
def test_a_layer_that_acts_on_each_token_alone_is_let_through(
    make: Callable[[], nn.Module], ids: Tensor, unchanged: Any
) -> None:
    model = Model(make())
    check(model, ids)
    x = model.embed(ids).detach()
    model.calls = 0
    scores = ImplicitAttentionAttribution(model).attribute(ids, target=1)
    assert scores.shape == ids.shape and model.calls == 1  # it had passed
    assert ImplicitAttentionAttribution(Model(make()).requires_grad_(False)).attribute(x, target=1).shape == x.shape


def test_pooling_over_tokens_for_the_score_mixes_none(ids: Tensor) -> None:
    check(Model(after=lambda x: x.mean(1, keepdim=True)), ids)


def test_a_1x1_convolution_of_the_model_itself_is_let_through(ids: Tensor) -> None:
    model = Model()
    conv = nn.Conv1d(8, 8, 1).eval()
    model.conv, model.after = conv, lambda x: conv(x.transpose(1, 2)).transpose(1, 2)
    check(model, ids)


def test_families_are_let_through(family: nn.Module, ids: Tensor) -> None:
    examined(family, lambda ids: family(input_ids=ids, use_cache=False).logits, ids)
    padded = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1] * 7])
    examined(family, lambda ids: family(input_ids=ids, attention_mask=padded, use_cache=False).logits, ids)


# --- Once for each model ------------------------------------------------------------------------------------------


def test_the_check_runs_once_for_each_model(ids: Tensor) -> None:
    model = Model()
    assert [check(model, ids) for _ in range(3)] == [1, 0, 0]
    assert check(Model(), ids) == 1
    model.calls = 0
    for run in (1, 2, 3):  # no more forward passes than the explanation's own
        ImplicitAttentionAttribution(model).attribute(ids, target=1)
        assert model.calls == run


def test_a_fresh_model_is_checked_at_its_first_explanation(ids: Tensor) -> None:
    model = Model()
    method = ImplicitAttentionAttribution(model)
    method.attribute(ids, target=1)
    runs = model.calls
    assert runs > 1
    method.attribute(ids, target=2)
    assert model.calls == runs + 1


@pytest.mark.parametrize("at", ["blocks.1.extra", "blocks.1.extra.1", "head", "blocks.0.mixer"])
def test_a_replaced_module_is_checked(at: str, ids: Tensor) -> None:
    model = Model()
    check(model, ids)
    parent, name = at.rsplit(".", 1) if "." in at else ("", at)
    old = getattr(model.get_submodule(parent), name)
    new = {"blocks.0.mixer": MambaMixer(CONFIG, 0), "head": nn.Linear(8, 3)}.get(at, nn.Sequential(nn.Tanh()))
    for parameter in new.parameters():
        nn.init.normal_(parameter, std=0.5)
    setattr(model.get_submodule(parent), name, new.eval())
    assert old is not new
    assert [check(model, ids) for _ in range(2)] == [1, 0]


def test_an_added_module_is_checked(ids: Tensor) -> None:
    model: Any = Model()
    check(model, ids)
    model.blocks[1].extra.append(Recurrent().eval())
    with pytest.raises(UnsupportedModelError, match=r"'blocks\.1\.extra\.2\.rnn' \(LSTM\)"):
        check(model, ids)


def test_a_module_at_the_address_of_a_freed_one_is_checked(ids: Tensor) -> None:
    missed = 0
    for _ in range(20):
        model: Any = Model(Function(lambda x: x))
        check(model, ids)
        model.blocks[1].extra[1] = None  # frees the function, whose place the next may take
        model.blocks[1].extra[1] = Function(roll).eval()
        try:
            check(model, ids)
        except UnsupportedModelError:
            continue
        missed += 1
    assert missed == 0


@pytest.mark.parametrize(("short", "by"), [(1, 1), (3, 3)])
def test_an_input_too_short_to_show_it_proves_nothing(short: int, by: int, ids: Tensor) -> None:
    model = Model(Function(lambda x: later(x, by)))
    check(model, ids[:, :short])
    with pytest.raises(UnsupportedModelError, match="Function"):
        check(model, ids)


def test_a_single_token_is_checked_again_with_more(ids: Tensor) -> None:
    model = Model()
    assert [check(model, ids[:, :1]) for _ in range(2)] == [1, 0]
    assert [check(model, ids) for _ in range(2)] == [1, 0]


def test_other_calls_of_the_same_modules_are_checked_again(ids: Tensor) -> None:
    """As when a model takes another path: what it was seen to do holds for these calls alone."""

    class Either(Model):
        skip = False

        def forward(self, ids: Tensor) -> Tensor:
            self.calls += 1
            x = self.blocks[0](self.embed(ids))
            return self.head((x if self.skip else self.blocks[1](x))[:, -1])

    model = Either()
    assert [check(model, ids) for _ in range(2)] == [1, 0]
    model.skip = True
    assert [check(model, ids) for _ in range(2)] == [1, 0]


def test_each_length_is_checked(ids: Tensor) -> None:
    model = Model()
    assert [check(model, ids[:, :n]) for n in (3, 2, 3, 7, 5, 7)] == [1, 1, 0, 1, 1, 0]


def test_an_order_that_some_lengths_have_is_followed_after_others(ids: Tensor) -> None:
    """As by code that folds a sequence into two rows, if its length is even."""

    class Folded(Model):
        def forward(self, ids: Tensor) -> Tensor:
            order = torch.arange(ids.shape[1]).reshape(2 - ids.shape[1] % 2, -1).T.flatten()
            return super().forward(ids[:, order])

    model, method = Folded(), ImplicitAttentionAttribution
    assert torch.equal(method(model).attribute(ids, 1), method(Model()).attribute(ids, 1))
    found, right = method(model).attribute(ids[:, :6], 1), method(Model()).attribute(ids[:, [0, 3, 1, 4, 2, 5]], 1)
    torch.testing.assert_close(found[:, [0, 3, 1, 4, 2, 5]], right)


# --- Nothing is left ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", ["", "embed", "blocks.0.mixer", "blocks.1.extra.1", "head"])
def test_a_module_that_raises_leaves_no_hook(at: str, ids: Tensor, unchanged: Any) -> None:
    class BrokenError(RuntimeError):
        pass

    def fail(*args: Any) -> None:
        raise BrokenError

    model = Model()
    handle = model.get_submodule(at).register_forward_hook(fail)
    with unchanged(model, ids), pytest.raises(BrokenError):
        check(model, ids)
    handle.remove()
    check(model, ids)


def test_a_check_leaves_parameters_gradients_and_hooks_as_they_were(ids: Tensor, unchanged: Any) -> None:
    model = Model(nn.Sequential(nn.Linear(8, 8), nn.Tanh()))
    model.head.weight.grad = torch.ones_like(model.head.weight)
    model.embed.weight.requires_grad_(False)
    x = model.embed(ids).detach().requires_grad_()
    for inputs in (ids, x):
        fresh = Model(nn.Linear(8, 8))
        with unchanged(fresh, ids, x):
            check(fresh, inputs)
    with unchanged(model, ids):
        check(model, ids)


# --- One run ------------------------------------------------------------------------------------------------------


def test_a_function_that_runs_the_model_twice_is_refused(family: nn.Module, ids: Tensor) -> None:
    """Its output comes from two attentions; the last one alone would be half of the answer."""

    def run(ids: Tensor) -> Tensor:
        return family(input_ids=ids, use_cache=False).logits

    twice = ImplicitAttentionAttribution(lambda ids: run(ids)[:, -1, 3] - run(ids)[:, 4, 5], family)
    with pytest.raises(InvalidInputError, match=r"runs the model more than once.*contrast"):
        twice.attribute(ids)

    def once(ids: Tensor) -> Tensor:
        logits = run(ids)
        return logits[:, -1, 3] - logits[:, 4, 5]

    assert ImplicitAttentionAttribution(once, family).attribute(ids).isfinite().all()


# --- What gradients do not show -----------------------------------------------------------------------------------

HIDDEN: dict[str, Callable[[Tensor], Tensor]] = {
    "a detached mean": lambda x: x + x.detach().mean(1, keepdim=True),
    "a shift without gradient": lambda x: x + later(x.data, 1),
    "numpy": lambda x: x + torch.from_numpy(x.detach().numpy()).roll(1, 1),
    "the longest token": lambda x: x / x.detach().norm(dim=-1).amax(1)[:, None, None],
}


@pytest.mark.parametrize("takes_ids", [True, False])
@pytest.mark.parametrize("at", ["before the layers", "between the layers", "behind the layers"])
@pytest.mark.parametrize("name", HIDDEN)
def test_values_that_pass_between_tokens_without_a_gradient_are_refused(
    name: str, at: str, takes_ids: bool, ids: Tensor, unchanged: Any
) -> None:
    function = HIDDEN[name]

    class Hidden(Model):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids) if not ids.is_floating_point() else ids
            x = function(x) if at == "before the layers" else x
            x = self.blocks[0](x)
            x = function(x) if at == "between the layers" else x
            x = self.blocks[1](x)
            return self.head((function(x) if at == "behind the layers" else x)[:, -1])

    model = Hidden()
    inputs = ids if takes_ids else model.embed(ids).detach()
    with unchanged(model, inputs), pytest.raises(UnsupportedModelError, match=r"several tokens|other tokens"):
        ImplicitAttentionAttribution(model).attribute(inputs, target=1)


@pytest.mark.parametrize(
    "read", [lambda x: x.amax(1), lambda x: x[:, -1] + x[:, -1].detach(), lambda x: x.detach().tanh()[:, -1] * x[:, -1]]
)
def test_decisions_and_stopped_gradients_of_a_token_itself_are_let_through(
    read: Callable[[Tensor], Tensor], ids: Tensor
) -> None:
    model = Model(after=lambda x: read(x)[:, None])
    assert ImplicitAttentionAttribution(model).attribute(ids, target=1).shape == ids.shape


def test_one_layer_that_reads_both_ways_is_explained_as_two_that_share_their_weights(ids: Tensor) -> None:
    class Both(Model):
        def __init__(self, tied: bool) -> None:
            super().__init__()
            self.there: Any = self.blocks[0].get_submodule("mixer")
            self.back: Any = self.there if tied else copy.deepcopy(self.there)

        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids)
            return self.head((x + self.there(x) + self.back(x.flip(1)).flip(1))[:, 2])

    for rectify in (None, "channel"):
        options: Any = {"rectify": rectify}
        tied, two = (ImplicitAttentionAttribution(Both(t).eval(), **options).attribute(ids, 1) for t in (True, False))
        torch.testing.assert_close(tied, two)
        assert tied.ne(0).all()


def test_a_layer_that_reads_another_without_a_gradient_is_refused(ids: Tensor) -> None:
    class Stopped(Model):
        def forward(self, ids: Tensor) -> Tensor:
            x = self.embed(ids) if not ids.is_floating_point() else ids
            return self.head(self.blocks[1](self.blocks[0](x).detach())[:, -1])

    model = Stopped()
    for inputs in (ids, model.embed(ids).detach()):
        with pytest.raises(UnsupportedModelError, match=r"blocks\.1\.mixer"):
            ImplicitAttentionAttribution(model).attribute(inputs, target=1)
