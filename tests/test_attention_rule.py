"""The rule of softmax attention: the multipliers of its functions one by one, without their L² numbers."""

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from captum_ssm.operators import SoftmaxAttention, score_blocks
from captum_ssm.operators.attention import weighted_sums
from captum_ssm.operators.device_sizes import DeviceSize
from captum_ssm.relevance.difference import Difference
from captum_ssm.relevance.frozen import Frozen
from captum_ssm.relevance.rule import Rule
from captum_ssm.relevance.traced import Traced
from tests.cases import on_all
from tests.tensors_made import Largest

LOWEST = torch.finfo(torch.float32).min
HIDDEN = torch.rand(5, 7, generator=torch.Generator().manual_seed(1)) < 0.4
HIDDEN[3] = True
HIDDEN[:, 6] = True
WINDOW = torch.ones(7, 7, dtype=torch.bool).tril().triu(-2)

CASES: dict[str, dict[str, Any]] = {
    "all": {},
    "causal": {"queries": 7, "is_causal": True},
    "causal, fewer queries": {"is_causal": True},
    "causal, more queries": {"queries": 9, "is_causal": True},
    "window": {"queries": 7, "attn_mask": WINDOW},
    "window of examples": {"queries": 7, "attn_mask": torch.stack([WINDOW, WINDOW.mT])[:, None]},
    "bias": {"attn_mask": torch.randn(2, 3, 5, 7, generator=torch.Generator().manual_seed(2), dtype=torch.float64)},
    "bias of a key": {"attn_mask": torch.randn(1, 7, generator=torch.Generator().manual_seed(3), dtype=torch.float64)},
    "hidden keys": {"attn_mask": torch.zeros(5, 7, dtype=torch.float64).masked_fill(HIDDEN, LOWEST)},
    "keys that are hidden by -infinity": {"attn_mask": ~HIDDEN},
    "scale": {"scale": 0.3},
    "one head": {"lead": ()},
    "groups of heads": {"lead": (2, 2, 3)},
    "shared keys": {"shared": True},
}
every_case = on_all("name", CASES)
RULES: dict[str, Rule] = {"share": Difference(), "halves": Difference(0.5), "frozen": Frozen()}
every_rule = pytest.mark.parametrize("rule", RULES.values(), ids=RULES)


def attend(q: Any, k: Any, v: Any, **options: Any) -> Any:
    return F.scaled_dot_product_attention(q, k, v, **options)


def close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-12)


def written_out(q: Any, k: Any, v: Any, is_causal: bool, attn_mask: Tensor | None, scale: float) -> Any:
    """Attention in functions that have rules of their own."""
    scores = q @ k.transpose(-1, -2) * scale
    if attn_mask is None:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool)
        attn_mask = attn_mask.tril() if is_causal else attn_mask
    if attn_mask.dtype == torch.bool:
        sees = attn_mask.any(-1, keepdim=True)
        return F.softmax(scores.masked_fill(~attn_mask & sees, -torch.inf), -1) * sees @ v
    hidden = (attn_mask == LOWEST).all(-1, keepdim=True)  # the sum is the mask alone, whatever the scores are
    return F.softmax(scores.masked_fill(hidden, 0) + attn_mask.masked_fill(hidden, 0), -1) @ v


def sides(rule: Rule, *shape: int, origin: Any = None) -> Any:
    value, reference = (torch.randn(shape, dtype=torch.float64) for _ in range(2))
    return Traced.of(value.requires_grad_(), reference, rule, origin)


def multipliers(y: Any, inputs: tuple[Any, ...], dy: Tensor) -> list[Tensor]:
    values = [x.value for x in inputs]
    found = torch.autograd.grad(y.value, values, dy, allow_unused=True)
    return [torch.zeros_like(x) if m is None else m for x, m in zip(values, found)]


@pytest.fixture(params=[2**17, 12], ids=["one block", "many blocks"])
def blocks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_blocks, "_SCORES", DeviceSize(request.param, request.param))
    monkeypatch.setattr(score_blocks, "_ROWS", 2)


@every_case
@every_rule
def test_the_rule_is_that_of_the_functions_written_out(name: str, rule: Rule, blocks: None) -> None:
    """Of torch's attention, for a value and a reference, and multipliers of queries, keys and values."""
    torch.manual_seed(0)
    case = {"queries": 5, "lead": (2, 3), "shared": False, **CASES[name]}
    lead = case.pop("lead")
    q = sides(rule, *lead, case.pop("queries"), 4, origin="activated")
    shared = lead[-1:] if case.pop("shared") else lead
    k, v = sides(rule, *shared, 7, 4), sides(rule, *shared, 7, 6, origin="activated")
    y = attend(q, k, v, **case)
    expected = written_out(q, k, v, **{"is_causal": False, "attn_mask": None, "scale": 0.5, **case})
    close((y.value, y.reference), (expected.value, expected.reference))
    dy = torch.randn_like(y.value)
    found = multipliers(y, (q, k, v), dy)
    close(found, multipliers(expected, (q, k, v), dy))
    if isinstance(rule, Difference):
        total = sum(float((m * (x.value - x.reference)).sum()) for m, x in zip(found, (q, k, v)))
        assert abs(total - float((dy * (y.value - y.reference)).sum())) < 1e-10


UNSEEN = {
    "all of a large number": torch.full((7, 7), -1e9),
    "a sum of two masks": torch.full((7, 7), -1e9).triu(1) - 1e9 * (torch.arange(7) < 3),
    "a sum that overflows": torch.full((7, 7), LOWEST).triu(1) + torch.where(torch.arange(7) < 3, LOWEST, 0),
    "about a number": torch.linspace(1, -1, 7).expand(7, 7) - 1e4,
}


@on_all("mask", UNSEEN)
@every_rule
def test_masks_that_hide_all_keys_weigh_them_as_torch_does(mask: str, rule: Rule) -> None:
    """Multipliers of the values are the weights that torch computes, and the rest adds up to what torch computes."""
    torch.manual_seed(0)
    q, k, v = (
        Traced.of(t.value.detach().float().requires_grad_(), t.reference.float(), rule)
        for t in (sides(rule, 1, 2, 7, 4) for _ in range(3))
    )
    y = attend(q, k, v, attn_mask=UNSEEN[mask])
    value, reference = (
        attend(*(getattr(t, side) for t in (q, k, v)), attn_mask=UNSEEN[mask]) for side in ("value", "reference")
    )
    torch.testing.assert_close(y.value, value, rtol=0, atol=1e-3)
    dy = torch.randn_like(y.value)
    found = multipliers(y, (q, k, v), dy)
    if isinstance(rule, Frozen):
        weights = attend(q.value, k.value, torch.eye(7).expand(1, 2, 7, 7), attn_mask=UNSEEN[mask])
        torch.testing.assert_close(found[2], weights.mT @ dy, rtol=0, atol=1e-3)
    else:
        total = sum(float((m * (x.value - x.reference)).sum()) for m, x in zip(found, (q, k, v)))
        assert abs(total - float((dy * (value - reference)).sum())) < 1e-3 * float(dy.abs().sum())


@every_rule
@pytest.mark.parametrize("traced", ["q", "k", "v"])
def test_constants_of_half_precision_meet_values_of_single(rule: Rule, traced: str) -> None:
    """As learned queries of a model in bfloat16, which is followed in float32; so may a mask be."""
    torch.manual_seed(0)
    x = sides(rule, 1, 2, 7, 4)
    x = Traced.of(x.value.detach().float().requires_grad_(), x.reference.float(), rule)
    plain, mask = torch.randn(1, 2, 7, 4).bfloat16(), torch.zeros(7, 7).bfloat16()
    y: Any = attend(*(x if name == traced else plain for name in "qkv"), attn_mask=mask)
    value = y.value if isinstance(y, Traced) else y
    expected = attend(*(x.value if name == traced else plain.float() for name in "qkv"))
    torch.testing.assert_close(value, expected)


@every_rule
def test_constants_among_the_arguments_have_no_reference(rule: Rule) -> None:
    """As in attention to tokens that are not explained."""
    torch.manual_seed(0)
    plain = torch.randn(2, 3, 7, 4, dtype=torch.float64)
    for traced in ("q", "k", "v"):
        t = sides(rule, 2, 3, 7, 4)
        arguments = {name: t if name == traced else plain for name in ("q", "k", "v")}
        y = attend(**arguments, is_causal=True)
        expected = written_out(**arguments, is_causal=True, attn_mask=None, scale=0.5)
        if isinstance(rule, Frozen) and traced != "v":
            assert not isinstance(y, Traced)
            close(y, expected)
            continue
        close(y.reference, expected.reference)
        dy = torch.randn_like(y.value)
        close(multipliers(y, (t,), dy), multipliers(expected, (t,), dy))


def test_value_and_reference_that_are_equal_have_the_derivative() -> None:
    rule, (q, k, v) = Difference(0.5), torch.randn(3, 1, 2, 7, 4, dtype=torch.float64)
    traced = tuple(Traced.of(t.clone().requires_grad_(), t.clone(), rule) for t in (q, k, v))
    y = attend(*traced, is_causal=True)
    plain = [t.clone().requires_grad_() for t in (q, k, v)]
    dy = torch.randn_like(q)
    expected = torch.autograd.grad(attend(*plain, is_causal=True), plain, dy)
    close(multipliers(y, traced, dy), list(expected))


@pytest.mark.parametrize("level", [1e3, -1e3])
def test_value_and_reference_may_be_of_different_levels(level: float) -> None:
    """So far apart that their exponentials have no common scale."""
    rule = Difference()
    torch.manual_seed(0)
    q, k, v = (sides(rule, 1, 2, 7, 4) for _ in range(3))
    one = torch.ones_like(q.reference[..., :1])
    q = Traced.of(torch.cat([one, q.value], -1), torch.cat([one, q.reference], -1), rule)
    k = Traced.of(torch.cat([0 * one, k.value], -1), torch.cat([level * one, k.reference], -1), rule)
    y, expected = attend(q, k, v, scale=0.5), written_out(q, k, v, False, None, 0.5)
    dy = torch.randn_like(v.reference)
    close(multipliers(y, (q, k, v), dy), multipliers(expected, (q, k, v), dy))


@every_rule
def test_no_tensor_holds_the_scores_of_all_tokens(rule: Rule, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(score_blocks, "_SCORES", DeviceSize(2**12, 2**12))
    L, width = 200, 8
    q, k, v = (sides(rule, 1, 2, L, width) for _ in range(3))
    with Largest() as made:
        y = attend(q, k, v, is_causal=True)
        multipliers(y, (q, k, v), torch.ones_like(y.value))
    assert made.entries < L * L


@pytest.mark.parametrize("size", [8, 6])
def test_neither_product_of_an_attention_holds_its_weights(size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor where values are smaller than queries and keys, as in latent attention."""
    monkeypatch.setattr(score_blocks, "_SCORES", DeviceSize(2**12, 2**12))
    L, width = 200, 8
    q, k = torch.randn(2, 1, 2, L, width)
    operator, x = SoftmaxAttention(q, k, 0.5, sees_earlier=True, head_size=size), torch.randn(1, L, 2 * size)
    with Largest() as made:
        operator.apply(x), operator.adjoint(x)
    assert made.entries < L * L


@every_rule
def test_a_query_that_sees_no_key_weighs_all_alike(rule: Rule, blocks: None) -> None:
    """As rows of padding do in an adapter's attention, before they are set to 0."""
    q, k, v = (sides(rule, 1, 2, 7, 4) for _ in range(3))
    y: Any = weighted_sums(q, k, v, torch.full((1, 1, 7, 7), LOWEST, dtype=torch.float64), False, 0.5)
    for found, values in ((y.value, v.value), (y.reference, v.reference)):
        close(found, values.mean(-2, keepdim=True).expand_as(values))
