"""The rules of relevance, function by function: values, sums and refusals of every row of the table."""

import math
import operator
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from captum_ssm.errors import UnsupportedModelError
from captum_ssm.relevance import blockwise as blocks
from captum_ssm.relevance.difference import Difference
from captum_ssm.relevance.difference_quotient import difference_quotient
from captum_ssm.relevance.frozen import Frozen
from captum_ssm.relevance.functions import FUNCTIONS
from captum_ssm.relevance.rule import Rule
from captum_ssm.relevance.traced import Traced
from tests.cases import on_all
from tests.conftest import random

# --- Functions ----------------------------------------------------------------------------------------------------

SHAPE = (2, 3, 4)
PLAIN = torch.randn(SHAPE, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
MATRIX = torch.randn(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
VECTOR = torch.randn(4, dtype=torch.float64, generator=torch.Generator().manual_seed(5))
EVEN = torch.arange(24).view(SHAPE) % 2 == 0

ELEMENTWISE: dict[str, Any] = {
    "pow": lambda x: x**3,
    "float_power": lambda x: torch.float_power(x, 2),
    "clamp": lambda x: torch.clamp(x, -0.5, 0.7),
    "clip": lambda x: x.clip(max=0.3),
    "clamp_min": lambda x: x.clamp_min(0.1),
    "clamp_max": lambda x: torch.clamp_max(x, 0.1),
    "leaky_relu": lambda x: F.leaky_relu(x, 0.2),
    "threshold": lambda x: F.threshold(x, 0.1, -2.0),
    "logit": lambda x: torch.logit(x, eps=1e-3),
    "hardtanh": lambda x: F.hardtanh(x, -0.3, 0.4),
    "log_sigmoid": F.logsigmoid,
    "polygamma": lambda x: torch.polygamma(1, x),
    "special_polygamma": lambda x: torch.special.polygamma(2, x),
    "special_logit": lambda x: torch.special.logit(x, eps=1e-3),
}
"""How a function of single entries is called, if not with the entries alone."""
DOMAINS: dict[str, Any] = {
    **dict.fromkeys(["log", "log2", "log10", "sqrt", "rsqrt", "reciprocal"], lambda x: x.abs() + 0.1),
    **dict.fromkeys(["log1p", "special_log1p", "special_entr"], torch.abs),
    **dict.fromkeys(["lgamma", "digamma", "polygamma", "special_gammaln", "special_digamma"], lambda x: x.abs() + 0.1),
    **dict.fromkeys(["special_psi", "special_polygamma"], lambda x: x.abs() + 0.1),
    **dict.fromkeys(["acosh", "arccosh"], lambda x: x.abs() + 1.1),
    **dict.fromkeys(["logit", "special_logit", "special_ndtri"], torch.sigmoid),
    **dict.fromkeys(["asin", "acos", "arcsin", "arccos", "atanh", "arctanh", "erfinv", "special_erfinv"], torch.tanh),
}  # fmt: skip


def elementwise(name: str) -> Any:
    owners = (F, torch, torch.special, Tensor)
    name = name.removeprefix("special_")
    return ELEMENTWISE.get(name) or next(getattr(owner, name) for owner in owners if hasattr(owner, name))


ONE: dict[str, Any] = {
    "softmax": lambda x: x.softmax(-1),
    "softmax over another axis": lambda x: torch.softmax(x, 1),
    "softmax with a mask": lambda x: F.softmax(x.masked_fill(EVEN, -torch.inf), dim=-1),
    "softmax with a finite mask": lambda x: F.softmax(torch.where(EVEN, x, torch.finfo(x.dtype).min), dim=-1),
    "softmax with a type": lambda x: F.softmax(x, dim=-1, dtype=torch.float64),
    "softmax of large numbers": lambda x: (300 * x).softmax(-1),
    "log_softmax": lambda x: F.log_softmax(x, dim=1),
    "logsumexp": lambda x: torch.logsumexp(x, 1),
    "logsumexp kept": lambda x: x.logsumexp(-1, keepdim=True),
    "logsumexp of large numbers": lambda x: (300 * x).logsumexp(-1),
    "layer_norm": lambda x: F.layer_norm(x, (4,), VECTOR, VECTOR + 1),
    "layer_norm over two axes": lambda x: F.layer_norm(x, (3, 4)),
    "LayerNorm": lambda x: nn.LayerNorm(4, eps=0.1).double()(x),
    "rms_norm": lambda x: F.rms_norm(x, (4,), VECTOR, 1e-3),
    "rms_norm without eps": lambda x: F.rms_norm(x, (4,)),
    "batch_norm": lambda x: F.batch_norm(
        x.movedim(-1, 1), VECTOR, VECTOR.square() + 1, VECTOR, VECTOR + 1, eps=0.1),
    "group_norm": lambda x: F.group_norm(x.movedim(-1, 1), 2, VECTOR, VECTOR + 1),
    "var": lambda x: x.var(-1),
    "var of all": lambda x: torch.var(x),
    "var by number": lambda x: x.var(1, unbiased=False, keepdim=True),
    "var by correction": lambda x: x.var((0, 1), correction=0),
    "std": lambda x: x.std(-1, keepdim=True),
    "norm": lambda x: x.norm(dim=-1),
    "norm of absolute values": lambda x: x.norm(p=1, dim=-1, keepdim=True),
    "vector_norm": lambda x: torch.linalg.vector_norm(x, dim=-1),
    "vector_norm by order": lambda x: torch.linalg.vector_norm(x, ord=1, dim=(1, 2)),
    "normalize": lambda x: F.normalize(x, dim=-1),
    "glu": lambda x: F.glu(x, dim=-1),
    "rdiv": lambda x: 2 / (x + 9),
    "div by a number": lambda x: x / 3,
    "rsub": lambda x: 1 - x,
    "rpow": lambda x: 2**x,
    "matmul from the left": lambda x: MATRIX @ x.mT,
    "linear": lambda x: F.linear(x, MATRIX, VECTOR),
    "conv1d": lambda x: F.conv1d(x, PLAIN[:, :, :2], PLAIN[0, 0, :2]),
    "einsum": lambda x: torch.einsum("bij,jk->bki", x, MATRIX),
    "cumsum": lambda x: x.cumsum(1),
    "mean": lambda x: x.mean((0, 2)),
    "pad": lambda x: F.pad(x, (1, 2), value=3.0),
    "unbind": lambda x: torch.stack(x.unbind(1)[::-1]),
    "iterate": lambda x: torch.cat([part * 2 for part in x]),
    "split": lambda x: x.split([1, 2], dim=1)[1],
    "gather": lambda x: x.gather(-1, EVEN.long()),
    "where": lambda x: torch.where(EVEN, x, PLAIN),
    "index": lambda x: x[EVEN],
    "view": lambda x: x.transpose(0, 1).reshape(3, 8).view(-1, 4)[1:, ::2],
    "T": lambda x: x[0].T,
    "detach": lambda x: x.detach() * 2,
    "data": lambda x: x.data * 2,
    "repeat_interleave": lambda x: x.repeat_interleave(2, dim=1),
    "roll": lambda x: x.roll(1, 1),
    "like": lambda x: x.new_zeros(2) + torch.ones_like(x).sum() + x[0, 0, :2],
    "relu in place": lambda x: F.relu(x * 1, inplace=True),
    "module in place": lambda x: nn.SiLU(inplace=True)(x + 0),
    "relu_": lambda x: (x + 1).relu_(),
    "mul_": lambda x: (x + 1).mul_(PLAIN),
    "add in place": lambda x: operator.iadd(x * 1, PLAIN),
    "mul in place": lambda x: operator.imul(x * 1, 2.0),
    "div in place": lambda x: operator.itruediv(x * 1, 2.0),
    "exp_ of a slice": lambda x: written(x * 1, lambda y: y[:, 1:].exp_()),
    "set a slice": lambda x: written(x * 1, lambda y: operator.setitem(y, (..., 0), 3.0)),
    "set a slice to another": lambda x: written(x * 1, lambda y: operator.setitem(y, (..., 0), x[..., 1] ** 2)),
    "set a plain slice": lambda x: written(PLAIN.clone(), lambda y: operator.setitem(y, slice(1, 2), x[:1])),
    "add to a plain slice": lambda x: written(PLAIN.clone(), lambda y: y[:, 1:].add_(x[:, 1:])),
    "copy_ into a plain view": lambda x: written(PLAIN.clone(), lambda y: y.transpose(0, 1)[2].copy_(x[:, 0])),
    "multiply a plain slice": lambda x: written(PLAIN.clone(), lambda y: y[..., 2].mul_(x[..., 2])),
    "copy_ into two plain views": lambda x: written(
        PLAIN.clone(), lambda y: [part.copy_(2 * other) for part, other in zip(y.unbind(1), x.unbind(1))]
    ),
    "index_add_": lambda x: written(PLAIN.clone(), lambda y: y.index_add_(1, torch.tensor([2, 0, 2]), x)),
    "index_copy": lambda x: PLAIN.index_copy(1, torch.tensor([2]), x[:, :1]),
    "scatter_add": lambda x: torch.zeros(SHAPE).double().scatter_add(2, EVEN.long(), x),
    "masked_fill_": lambda x: (x + 0).masked_fill_(EVEN, 2.0),
    "zero_": lambda x: written(x + 0, lambda y: y[0].zero_()),
    "written in place and read before": lambda x: (x * 1).add_(1) + x,
}  # fmt: skip
"""Functions of one tensor, by what they are called."""
TWO: dict[str, Any] = {
    "mul": torch.mul,
    "mul broadcast": lambda x, y: x[:, :1] * y[..., :1],
    "sub": lambda x, y: torch.sub(x, y, alpha=2),
    "div": lambda x, y: x / (y.abs() + 0.2),
    "div in place": lambda x, y: operator.itruediv(x * 1, y.abs() + 0.2),
    "matmul": lambda x, y: x @ y.mT,
    "bmm": lambda x, y: torch.bmm(x, y.transpose(1, 2)),
    "einsum": lambda x, y: torch.einsum("bij,bkj->ikb", x, y),
    "linear": lambda x, y: F.linear(x, y[0]),
    "maximum": torch.maximum,
    "minimum": torch.minimum,
    "addmm": lambda x, y: torch.addmm(VECTOR, x[0], y[1].T[:, [0, 1, 2, 0]], beta=0.5, alpha=2.0),
    "addmm to a sum": lambda x, y: torch.addmm(x[0], y[0], MATRIX),
    "baddbmm": lambda x, y: torch.baddbmm(PLAIN[:, :, :3], x, y.mT, beta=0.5, alpha=2.0),
    "addcmul": lambda x, y: torch.addcmul(x, x, y, value=0.3),
    "lerp": lambda x, y: torch.lerp(x, y, 0.3),
    "lerp by a tensor": lambda x, y: torch.lerp(PLAIN, x, y.sigmoid()),
    "cat": lambda x, y: torch.cat([x, PLAIN, y], 1),
    "stack": lambda x, y: torch.stack([x, y, x]),
    "where": lambda x, y: torch.where(EVEN, x, y),
    "index_put": lambda x, y: x.index_put((torch.tensor([1]), torch.tensor([2])), y[0, :1]),
    "index_add_": lambda x, y: (x * 1).index_add_(1, torch.tensor([0, 0, 2]), y, alpha=2),
    "masked_scatter": lambda x, y: x.masked_scatter(EVEN, y),
    "set a slice": lambda x, y: written(x * 1, lambda z: operator.setitem(z, (slice(None), 1), y[:, 0])),
    "multiply a slice": lambda x, y: written(x * 1, lambda z: z[:, 1:].mul_(y[:, 1:])),
    "attention": lambda x, y: F.scaled_dot_product_attention(x, y, x * y),
    "causal attention": lambda x, y: F.scaled_dot_product_attention(x, y, y, is_causal=True, scale=0.7),
    "attention with a mask": lambda x, y: F.scaled_dot_product_attention(x, y, y, attn_mask=torch.eye(3).bool()),
    "attention with a bias": lambda x, y: F.scaled_dot_product_attention(x, y, y, attn_mask=MATRIX[:3, :3]),
    "attention of groups": lambda x, y: F.scaled_dot_product_attention(
        torch.stack([x, y, x, x], 1),
        y.unsqueeze(1).expand(2, 2, 3, 4),
        x.unsqueeze(1).expand(2, 2, 3, 4),
        enable_gqa=True,
    ),
    "norm": lambda x, y: F.layer_norm(x, (4,), y[0, 0], y[0, 1]),
    "linear with a bias": lambda x, y: F.linear(x, y[0], VECTOR[:3]),
    "bilinear": lambda x, y: F.bilinear(x, y, MATRIX.expand(2, 4, 4)),
    "bilinear with a bias": lambda x, y: F.bilinear(x, y, MATRIX.expand(2, 4, 4), VECTOR[:2]),
    "linear of three": lambda x, y: torch.einsum("bi,bj->bij", x[:, 0] + y[:, 1], y[:, 0]),
}  # fmt: skip
"""Functions of two tensors."""
SELECTIONS: dict[str, Any] = {
    "amax": lambda x: x.amax(-1),
    "max": lambda x: x.max(dim=-1).values,
    "max by position": lambda x: torch.max(x, 1, True)[0],
    "min": lambda x: x.min(1)[0],
    "topk": lambda x: x.topk(2, dim=-1).values,
    "topk over another axis": lambda x: torch.topk(x, 2, 1)[0],
    "sort": lambda x: x.sort(dim=-1, descending=True)[0],
    "sort over another axis": lambda x: torch.sort(x, 1).values,
    "median": lambda x: x.median(-1).values,
    "argmax": lambda x: x.gather(1, x.argmax(1, keepdim=True)),
    "where": lambda x: torch.where(x > 0, x, 0.1 * x),
    "mask": lambda x: x * (x.sum(-1, keepdim=True) > 0),
    "argsort": lambda x: x.gather(-1, x.argsort(-1)),
    "nonzero": lambda x: x.flatten()[(x.flatten() > 0.5).nonzero().squeeze(1)],
    "nonzero by axis": lambda x: x[x.relu().nonzero(as_tuple=True)],
    "if": lambda x: x * 2 if x[0, 0, 0] > x[0, 0, 1] else x * 3,
}
"""Functions that choose entries by what they are."""


def written(target: Tensor, how: Any) -> Tensor:
    """The tensor after something was written into it."""
    how(target)
    return target


def assert_followed(function: Any, pairs: list[tuple[Tensor, Tensor]], rule: Rule) -> None:
    """The function's value is its own, and what its arguments add is what it differs by from its reference."""
    with torch.no_grad():
        value, reference = (function(*(pair[side].detach() for pair in pairs)) for side in (0, 1))
    copies = [(v.detach().clone(), r.clone()) for v, r in pairs]
    out = function(*(Traced.of(v * 1, r.clone(), rule) for v, r in pairs))
    if isinstance(out, Traced):
        assert_equal(out.value, value)
        dys = [torch.randn_like(value) for _ in range(2)]
        for dy in dys:
            leaves = [v for v, _ in pairs]
            gradients = torch.autograd.grad((out.value * dy).sum(), leaves, retain_graph=True, allow_unused=True)
            found = sum(((v.detach() - r) * g).sum() for (v, r), g in zip(pairs, gradients) if g is not None)
            wanted = (dy * (out.value - out.reference)).sum().detach()
            scale = (dy * out.value).abs().sum() + (dy * out.reference).abs().sum()
            assert abs(found - wanted) <= 1e-11 * scale.detach()
    else:
        assert isinstance(rule, Frozen)  # a gate: all of it is the reference's
        assert_equal(out, value)
    if isinstance(rule, Difference):
        assert_equal(out.reference, reference)
    for (v, r), (was_v, was_r) in zip(pairs, copies):
        assert torch.equal(v, was_v) and torch.equal(r, was_r)


def assert_equal(actual: Tensor, expected: Tensor) -> None:
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert (actual - expected).abs().max() <= 1e-11 * expected.abs().max()


RULES = {"difference": Difference, "half": Frozen, "value": partial(Frozen, "value")}
every_rule = on_all("rule", RULES.values())


@every_rule
@pytest.mark.parametrize("name", sorted(row.name for row in FUNCTIONS if row.kind == "elementwise"))
def test_a_function_of_each_entry_is_followed(name: str, rule: Any) -> None:
    within = DOMAINS.get(name, lambda x: x)
    value, reference = (within(t.detach()) for t in random(*SHAPE))
    if rule is not Difference:
        reference = torch.zeros_like(reference)
    assert_followed(elementwise(name), [(value.requires_grad_(), reference)], rule())


@every_rule
@pytest.mark.parametrize("name", ONE)
def test_a_function_is_followed(name: str, rule: Any) -> None:
    assert_followed(ONE[name], [random(*SHAPE)], rule())


@every_rule
@pytest.mark.parametrize("name", TWO)
def test_a_function_of_two_is_followed(name: str, rule: Any) -> None:
    assert_followed(TWO[name], [random(*SHAPE), random(*SHAPE)], rule())


def test_a_function_with_a_row_is_not_among_those_without_one() -> None:
    """Those that have a row are refused for some of their arguments alone."""
    whole = {
        "data_ptr",
        "histc",
        "unique",
        "special_bessel_j0",
        "linalg_inv",
        "gumbel_softmax",
        "bernoulli",
        "ctc_loss",
    }
    whole |= {"pack_padded_sequence", "frexp"}
    assert {name for name in UNKNOWN if not FUNCTIONS.find(name.partition(" ")[0]).has_rule} == whole


@every_rule
def test_a_function_of_one_number_is_followed(rule: Any) -> None:
    assert_followed(lambda x: x.norm() * x.sum().tanh(), [random(*SHAPE)], rule())


@pytest.mark.parametrize("name", SELECTIONS)
def test_what_the_value_chooses_is_chosen_of_the_reference_too(name: str) -> None:
    """And that it would have been another is noted."""
    function, rule = SELECTIONS[name], Difference()
    x, r = random(*SHAPE)
    out = function(Traced.of(x, r, rule))
    assert_equal(out.value, function(x))
    assert rule.changed_decisions
    (gradient,) = torch.autograd.grad(out.value.sum(), x)
    assert abs(((x - r) * gradient).sum() - (out.value - out.reference).sum()) <= 1e-11 * out.value.abs().sum()
    # of an increasing function of the value the choices, and so what is noted, are the value's
    other = Difference()
    alike = function(Traced.of(x, 2 * x.detach(), other))
    assert not other.changed_decisions
    assert_equal(alike.reference, function(2 * x.detach()))


def test_a_choice_of_the_reference_takes_the_numbers_of_the_value() -> None:
    x = torch.tensor([[3.0, 1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    r = torch.tensor([[10.0, 30.0, 20.0]], dtype=torch.float64)
    for function, held, wanted in [
        (lambda t: t.topk(2, dim=-1).values, "topk", [10.0, 20.0]),
        (lambda t: t.sort(-1).values, "sort", [30.0, 20.0, 10.0]),
        (lambda t: t.max(-1).values, "max", [10.0]),
        (lambda t: t.amax(-1), "argmax", [10.0]),
        (lambda t: t.kthvalue(1, dim=-1).values, "kthvalue", [30.0]),
    ]:
        rule = Difference()
        assert function(Traced.of(x, r, rule)).reference.flatten().tolist() == wanted
        assert rule.changed_decisions == {held}


def assert_refused(function: Any, rule: Any, name: str) -> None:
    with pytest.raises(UnsupportedModelError, match=f"No rule .*'_?{name}'"):
        function(Traced.of(*random(*SHAPE), rule()))


UNKNOWN: dict[str, Any] = {
    "data_ptr": lambda x: x.data_ptr(),
    "histc": lambda x: x.histc(3),
    "unique": lambda x: x.unique(),
    "special_bessel_j0": torch.special.bessel_j0,
    "linalg_inv": lambda x: torch.linalg.inv(x[..., :3]),
    "linalg_solve": lambda x: torch.linalg.solve(x[..., :3], x),
    "linalg_matrix_norm": lambda x: torch.linalg.matrix_norm(x, 2),
    "norm": lambda x: x.norm(p=0, dim=1),
    "norm of a matrix": lambda x: x[0].norm("nuc"),
    "logsumexp": lambda x: torch.complex(x, x).logsumexp(-1),
    "clamp": lambda x: torch.complex(x, x).clamp(0, 1),
    "tanh": lambda x: torch.complex(x, x).tanh(),
    "conv1d": lambda x: F.conv1d(x, x[..., :3], VECTOR[:2], padding="same"),
    "conv_tbc": lambda x: torch.conv_tbc(x, x.mT, VECTOR[:3]),
    "frexp": lambda x: x.frexp(),
    "gradient": lambda x: torch.gradient(x[0, 0], spacing=(x[0, 1],)),
    "embedding": lambda x: F.embedding(torch.tensor([0]), x[0], max_norm=1.0),
    "grid_sample": lambda x: F.grid_sample(x[:, None], x[..., :2].unsqueeze(1), align_corners=False),
    "scatter_reduce": lambda x: x.scatter_reduce(1, EVEN.long(), x, "prod"),
    "quantile": lambda x: x.quantile(0.3, interpolation="nearest"),
    "matrix_power": lambda x: torch.matrix_power(x[..., :3], -1),
    "batch_norm": lambda x: nn.BatchNorm1d(3).double()(x),
    "batch_norm without statistics": lambda x: nn.BatchNorm1d(3, track_running_stats=False).double().eval()(x),
    "dropout": lambda x: F.dropout(x, 0.5, training=True),
    "rrelu": lambda x: F.rrelu(x, training=True),
    "gumbel_softmax": lambda x: F.gumbel_softmax(x),
    "bernoulli": lambda x: torch.bernoulli(x),
    "scaled_dot_product_attention": lambda x: F.scaled_dot_product_attention(x, x, x, dropout_p=0.1),
    "pack_padded_sequence": lambda x: nn.utils.rnn.pack_sequence([x[0], x[1, :2]]),
    "lstm of packed sequences": lambda x: nn.LSTM(4, 2).double()(
        nn.utils.rnn.PackedSequence(x[:, 0], torch.ones(2).long())
    ),
    "gru of packed sequences": lambda x: nn.GRU(4, 2).double()(
        nn.utils.rnn.PackedSequence(x[:, 0], torch.ones(2).long())
    ),
    "lstm": lambda x: nn.LSTM(4, 2, 2, dropout=0.1).double()(x),
    "ctc_loss": lambda x: F.ctc_loss(x, torch.ones(3, 1).long(), torch.full((3,), 2), torch.full((3,), 1)),
}
"""Calls that are refused, by the function's name and, where one function has several, what the call is."""


@every_rule
@pytest.mark.parametrize("name", UNKNOWN)
def test_a_function_without_a_rule_is_refused_by_name(name: str, rule: Any) -> None:
    assert_refused(UNKNOWN[name], rule, name.partition(" ")[0])


@pytest.mark.parametrize(
    "function",
    [lambda x: torch.vmap(torch.sin)(x), lambda x: x * float(x[0, 0, 0]), lambda x: x * torch.tensor(x)],
    ids=["vmap", "float", "tensor"],
)
def test_what_cannot_be_followed_is_refused_or_noted(function: Any) -> None:
    rule = Difference()
    pair = random(*SHAPE)
    try:
        function(Traced.of(*pair, rule))
    except UnsupportedModelError:
        return
    assert rule.changed_decisions


@pytest.mark.xfail(strict=True, reason="a plain view made before something traced is written stays plain")
def test_a_view_made_before_the_writing_is_followed() -> None:
    def late(x: Tensor) -> Tensor:
        whole = torch.zeros_like(x) if not isinstance(x, Traced) else torch.zeros(SHAPE, dtype=torch.float64)
        part = whole[:, 1]
        whole[:, :] = x
        return part * 2

    assert_followed(late, [random(*SHAPE)], Difference())


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(("rule", "share"), [("half", 0.5), ("value", 0.0)])
def test_a_held_gate_gets_its_share_of_the_product(swapped: bool, rule: Any, share: float) -> None:
    """The gate is what came out of an activation; of two values, or two gates, each gets half."""
    (x, _), (y, _) = random(*SHAPE), random(*SHAPE)
    frozen, nothing = Frozen(rule), torch.zeros_like(x)
    u: Any = Traced.of(x, nothing, frozen)
    v: Any = Traced.of(y, nothing, frozen)

    def relevances(one: Any, other: Any) -> list[Tensor]:
        out = other * one if swapped else one * other
        return [g * t for g, t in zip(torch.autograd.grad(out.value.sum(), [x, y]), (x, y))]

    gates: list[Any] = [F.silu(u), F.gelu(u).transpose(0, 1).transpose(1, 0)]
    for gate in gates:
        for found, wanted in zip(relevances(gate, v), (share, 1 - share)):
            assert (found - wanted * gate.value * y).abs().max() <= 1e-12
    pairs: list[tuple[Any, Any]] = [(u, v), (F.silu(u), F.gelu(v)), (2 * u, v[:, :1])]
    for one, other in pairs:
        product = one.value * other.value
        for found in relevances(one, other):
            assert (found.sum() - 0.5 * product.sum()).abs() <= 1e-11


PRODUCTS: dict[str, Any] = {
    "linear": lambda x: F.linear(x, MATRIX),
    "linear with a bias": lambda x: F.linear(x, MATRIX, VECTOR),
    "matmul": lambda x: x @ MATRIX,
    "matmul from the left": lambda x: MATRIX[:3, :3] @ x,
    "convolution": lambda x: F.conv1d(x, PLAIN),
    "convolution with a bias": lambda x: F.conv1d(x, PLAIN, VECTOR[:2]),
    "attention": lambda x: F.scaled_dot_product_attention(PLAIN, PLAIN, x),
}
"""Sums of products with constants."""


@on_all("name", PRODUCTS)
def test_held_products_of_a_reference_of_zero_are_not_computed(name: str) -> None:
    """The reference is then 0, or the bias; any other is the function of it."""
    function = PRODUCTS[name]
    for reference in (torch.zeros(SHAPE, dtype=torch.float64), PLAIN):
        x: Any = Traced.of(random(*SHAPE)[0], reference, Frozen())
        with Multiplications() as made:
            found = function(x).reference
        with Multiplications() as plain:
            assert_equal(found, function(reference))
        computed = name.endswith("with a bias") or bool(reference.any())
        assert made.count == plain.count * (2 if computed else 1)


class Multiplications(TorchDispatchMode):
    """Counts the sums of products that are computed while the mode is on."""

    count = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += any(word in str(function) for word in ("mm", "conv", "attention"))
        return function(*args, **(kwargs or {}))


def test_held_gates_are_constants() -> None:
    """A function that is not 0 at 0 is a gate; the weights of a softmax and the scale of a norm are."""
    x, y = (t.detach() for t, _ in (random(*SHAPE), random(*SHAPE)))
    for function in (
        torch.sigmoid,
        torch.exp,
        F.softplus,
        torch.cos,
        lambda t: t.softmax(-1),
        lambda t: (t**2 + 1).rsqrt(),
    ):
        for rule in (Frozen(), Frozen("value")):
            gate = function(Traced.of(x.requires_grad_(), torch.zeros_like(x), rule))
            assert not isinstance(gate, Traced) and not gate.requires_grad
            out: Any = gate * Traced.of(y.requires_grad_(), torch.zeros_like(y), rule)
            (gradient,) = torch.autograd.grad(out.value.sum(), y)
            assert_equal(gradient, function(x).detach())


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
@pytest.mark.parametrize("level", [-120.0, 120.0])
def test_a_softmax_does_not_mind_the_level_of_value_or_reference(name: str, level: float) -> None:
    """In float32, where exponents of 104 are 0."""
    x, r = torch.randn(3, 4, requires_grad=True), torch.randn(3, 4)
    out = getattr(torch, name)(Traced.of(x + level, r, Difference()), -1)
    assert (out.value - getattr(torch, name)(x + level, -1)).abs().max() <= 1e-4
    (gradient,) = torch.autograd.grad(out.value.sum(), x)
    found, wanted = ((x + level - r) * gradient).sum(), (out.value - out.reference).sum()
    assert (found - wanted).abs() <= 1e-4 * max(1, abs(level))


def sums_of_exponentials(name: str, x: Tensor, r: Tensor) -> Tensor:
    """The multipliers (..., K, J) of x_j in the result k, from one constant for both and from every step's own rule."""
    c = torch.maximum(x, r).amax(-1, keepdim=True)
    e, f = (x - c).exp(), (r - c).exp()
    s, t = e.sum(-1, keepdim=True), f.sum(-1, keepdim=True)
    slopes = ((e - f) / (x - r)).unsqueeze(-2)
    log = slopes * ((s.log() - t.log()) / (s - t)).unsqueeze(-1)
    softmax = (torch.eye(x.shape[-1]) - ((e / s + f / t) / 2).unsqueeze(-1)) * slopes * (2 / (s + t)).unsqueeze(-1)
    return {"softmax": softmax, "logsumexp": log, "log_softmax": torch.eye(x.shape[-1]) - log}[name]


@pytest.mark.parametrize("name", ["softmax", "log_softmax", "logsumexp"])
@pytest.mark.parametrize("level", [-300.0, -80.0, -20.0, 0.0, 20.0, 80.0, 300.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_sum_of_exponentials_has_the_rule_written_out_at_any_level(
    name: str, level: float, dtype: torch.dtype
) -> None:
    tolerance = {torch.float32: 1e-4, torch.float64: 1e-10}[dtype]
    x, r = (3 * torch.randn(5, 4) + level).to(dtype).requires_grad_(), (3 * torch.randn(5, 4)).to(dtype)
    expected = sums_of_exponentials(name, x.detach().double(), r.double())
    out: Any = getattr(torch, name)(Traced.of(x, r, Difference()), -1)
    results = out.value.unsqueeze(-1) if name == "logsumexp" else out.value
    for k in range(results.shape[-1]):
        (gradient,) = torch.autograd.grad(results[..., k].sum(), x, retain_graph=True)
        assert (gradient - expected[..., k, :]).abs().max() <= tolerance


def test_hidden_entries_have_no_part_in_a_softmax() -> None:
    """A mask of -inf hides the same entries of value and reference."""
    hidden = torch.tensor([False, True, False, True])
    x, r = random(3, 4)
    rule = Difference()
    masked: Any = Traced.of(x, r, rule).masked_fill(hidden, -torch.inf)
    few: Any = Traced.of(x, r, rule)[:, ~hidden]
    weights = torch.randn(3, 4, dtype=torch.float64)
    functions: list[tuple[Any, Tensor]] = [(torch.softmax, weights), (torch.logsumexp, weights[:, 0])]
    for function, weight in functions:
        shown = weight[:, ~hidden] if weight.dim() == 2 else weight
        (found,) = torch.autograd.grad((function(masked, -1).value * weight).sum(), x, retain_graph=True)
        (expected,) = torch.autograd.grad((function(few, -1).value * shown).sum(), x, retain_graph=True)
        assert_equal(found, expected)


@pytest.mark.parametrize("distance", [1e-3, 1e9, 1e30])
def test_a_quotient_does_not_mind_how_far_its_denominators_are_apart(distance: float) -> None:
    """In float32: the multipliers of float64, and the share of each is not what rounding leaves of 1."""
    gradients = []
    for dtype in (torch.float32, torch.float64):
        torch.manual_seed(0)
        (a, r), (b, s) = ((t.detach().to(dtype).abs() + 1 for t in random(*SHAPE)) for _ in range(2))
        leaves = [a.requires_grad_(), (b * distance**0.5).requires_grad_()]
        x, y = Traced.of(leaves[0], r, Difference()), Traced.of(leaves[1], s / distance**0.5, Difference())
        quotients: list[Any] = [x / y, torch.reciprocal(y) * x]
        for out in quotients:
            gradients.append([g.double() for g in torch.autograd.grad(out.value.sum(), leaves)])
    for found, expected in zip(gradients[:2], gradients[2:]):
        for one, other in zip(found, expected):
            assert ((one - other).abs() <= 1e-5 * other.abs()).all()


# --- The quotient -------------------------------------------------------------------------------------------------

NEAR: dict[str, tuple[Any, float]] = {
    "exp": (torch.exp, 1.0), "rsqrt of tiny numbers": (torch.rsqrt, 1e-12), "silu": (F.silu, 1.0),
    "sigmoid": (torch.sigmoid, 3.0), "gelu": (F.gelu, 1.0), "log": (torch.log, 1e-6), "square": (torch.square, 1e3),
    "softplus": (F.softplus, 1.0), "reciprocal": (torch.reciprocal, 1e-9), "sqrt": (torch.sqrt, 1e-9),
    "tanh": (torch.tanh, 1.0), "power": (lambda x: x**1.5, 1.0), "leaky_relu": (F.leaky_relu, 1.0),
}  # fmt: skip


@pytest.mark.parametrize("distance", [1e-8, 1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1])
@pytest.mark.parametrize("name", NEAR)
def test_the_quotient_of_float32_is_about_that_of_float64(name: str, distance: float) -> None:
    """However near value and reference are."""
    function, size = NEAR[name]
    x = (size * (0.5 + torch.rand(1000))).float()
    r = (x * (1 + distance * (torch.rand(1000) - 0.5))).float()
    found = difference_quotient(function, x, r, function(x), function(r))
    wide = (function(x.double()) - function(r.double())) / (x.double() - r.double())
    there = x != r
    assert there.sum() > 10 or distance < 1e-7
    assert ((found - wide)[there].abs() <= 1e-4 * wide[there].abs()).all()
    assert ((found - derivative(function, x))[~there].abs() <= 1e-5 * derivative(function, x)[~there].abs()).all()


def derivative(function: Any, x: Tensor) -> Tensor:
    x = x.detach().requires_grad_()
    return torch.autograd.grad(function(x).sum(), x)[0]


@pytest.mark.parametrize("function", [F.relu, torch.abs, lambda x: x.clamp(0, 1), F.relu6, F.leaky_relu])
@pytest.mark.parametrize("distance", [1e-7, 1e-4, 1.0])
def test_the_quotient_across_a_kink_is_that_of_the_ends(function: Any, distance: float) -> None:
    x, r = distance * torch.rand(1000), -distance * torch.rand(1000)
    found = difference_quotient(function, x, r, function(x), function(r))
    wanted = (function(x.double()) - function(r.double())) / (x.double() - r.double())
    assert (found - wanted).abs().max() <= 1e-5


@pytest.mark.parametrize("function", [torch.exp, F.relu, torch.sign, torch.rsqrt, torch.log])
def test_the_quotient_is_finite_where_there_is_no_slope(function: Any) -> None:
    x = torch.tensor([0.0, 0.0, -torch.inf, -torch.inf, torch.inf, 1.0])
    r = torch.tensor([0.0, 1.0, -torch.inf, 1.0, torch.inf, 1.0])
    assert difference_quotient(function, x, r, function(x), function(r)).isfinite().all()


@pytest.mark.parametrize("shape", [(1,), (4,), (3, 1)])
def test_the_quotient_of_a_function_with_other_tensors_takes_their_own_entries(shape: tuple[int, ...]) -> None:
    """However few entries are so close that they are looked at again."""
    exponent = 1 + torch.rand(3, 4)
    x = 1 + torch.rand(3, 4)
    r = x + 1
    close = torch.zeros(3, 4, dtype=torch.bool)
    close.view(-1)[: math.prod(shape)] = True
    r[close] = x[close]
    function: Any = lambda t: t**exponent  # noqa: E731
    found = difference_quotient(function, x, r, function(x), function(r))
    wanted = torch.where(close, exponent * x ** (exponent - 1), (function(x) - function(r)) / (x - r))
    assert (found - wanted).abs().max() <= 1e-5


CLOSED: dict[str, Any] = {
    **{row.name: elementwise(row.name) for row in FUNCTIONS if row.slope},  # some have it for some arguments alone
    "second power": lambda x: x**2, "third power": lambda x: x**3, "gelu": partial(F.gelu, approximate="tanh"),
    "softplus beyond its threshold": lambda x: F.softplus(10 * x),
}  # fmt: skip


@pytest.mark.parametrize("distance", [0.0, 1e-6, 1e-3, 1e-1, 1.0, 30.0])
@pytest.mark.parametrize("name", CLOSED)
def test_a_slope_of_float32_is_about_the_quotient_of_float64(name: str, distance: float) -> None:
    """However near or far value and reference are."""
    function, within = CLOSED[name], DOMAINS.get(name, lambda x: x)
    x = within(3 * torch.randn(1000))
    r = within(x + distance * torch.randn(1000))
    out = function(Traced.of(x.requires_grad_(), r, Difference()))
    (found,) = torch.autograd.grad(out.value.sum(), x)
    v, w = x.detach().double(), r.double()
    wide = torch.where(v == w, derivative(function, v), (function(v) - function(w)) / (v - w))
    assert ((found - wide).abs() <= 2e-5 * wide.abs() + 1e-6).all()


@pytest.mark.parametrize("entries", [1, 3, 7])
def test_blocks_of_entries_never_change_a_result(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_ENTRIES", entries)
    x, r = torch.randn(2, 4, 5)
    for one, other in ((x, r), (x.T, r.T), (x, r.double())):
        assert torch.equal(blocks.blockwise(torch.maximum, one, other), torch.maximum(one, other))
    assert blocks.blockwise(lambda x, r: None, x, r) is None


@pytest.mark.parametrize("entries", [1, 7, 10])
def test_blocks_of_rows_never_change_a_result(entries: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blocks, "_ENTRIES", entries)
    x, r = torch.randn(2, 3, 4, 5)

    def both(x: Tensor, r: Tensor) -> tuple[Tensor, Tensor]:
        return x.softmax(-1), r.cumsum(-1)

    for one, other in ((x, r), (x.mT, r.mT), (x, r.double())):
        for found, expected in zip(blocks.rowwise(both, 2, one, other), both(one, other)):
            assert torch.equal(found, expected)


@pytest.mark.parametrize("name", CLOSED)
def test_a_slope_is_finite_where_there_is_none(name: str) -> None:
    x = torch.tensor([0.0, 0.0, -torch.inf, -torch.inf, torch.inf, 1.0], requires_grad=True)
    r = torch.tensor([0.0, 1.0, -torch.inf, 1.0, torch.inf, 1.0])
    out = CLOSED[name](Traced.of(x, r, Difference()))
    (slope,) = torch.autograd.grad(out.value, x, torch.ones_like(x))
    assert slope.isfinite().all()


def test_what_an_operator_makes_of_the_same_is_made_once() -> None:
    rule = Difference()
    x, w = Traced.of(torch.randn(1, 4, 3), torch.zeros(1, 4, 3), rule), torch.randn(3, 3)
    assert F.linear(x, w) is not F.linear(x, w)
    with rule.sharing():
        y = F.linear(x, w)
        assert F.linear(x, w) is y
        assert F.linear(x, w.clone()) is not y
        assert F.linear(x.clone(), w) is not y
    with rule.sharing(shared=False):
        assert F.linear(x, w) is not F.linear(x, w)


@pytest.mark.parametrize(
    "write", [lambda y: y.add_(1), lambda y: F.relu(y, inplace=True), lambda y: y.__setitem__(0, 1.0)]
)
def test_what_is_written_into_is_not_shared(write: Callable[[Tensor], object]) -> None:
    rule = Difference()
    x: Any = Traced.of(torch.randn(2, 4, 3), torch.zeros(2, 4, 3), rule)
    with rule.sharing():
        expected = (x + 1).value.clone()
        write(x + 1)
        assert torch.equal((x + 1).value, expected)
