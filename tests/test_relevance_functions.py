"""The table of functions: every row names a function, every slope is the quotient, and registrations leave no trace."""

import operator
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any, get_args

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.integrations import moe  # noqa: F401  (it adds an operator to torch)

from captum_ssm import UnsupportedModelError, operators, register_rule, unregister_rule
from captum_ssm.layers import activations, averages, log_domain
from captum_ssm.operators import attention, elementary, recurrence
from captum_ssm.relevance.difference import Difference
from captum_ssm.relevance.frozen import Frozen
from captum_ssm.relevance.functions import EXTERNAL_CODE, FUNCTIONS, Function, convolutions
from captum_ssm.relevance.functions.table import Kind, OtherKind, Table
from captum_ssm.relevance.rule import Rule
from captum_ssm.relevance.traced import Traced
from tests.cases import on_all

ROWS = {row.name: row for row in FUNCTIONS}
every_row = on_all("name", ROWS)
OWNERS: list[Any] = [
    torch, F, Tensor, torch.special, torch.linalg, torch.fft, torch._VF, torch._C, torch._C._nn,
    activations, attention, averages, convolutions, log_domain, operators, elementary, recurrence,
]  # fmt: skip
FALLBACK = "grouped_mm_fallback"
"""The operator that transformers adds."""


def functions_named(name: str) -> Iterator[Any]:
    """All functions and properties that a row of this name may be for."""
    short = name.removeprefix("special_").removeprefix("linalg_").removeprefix("fft_")
    for owner in OWNERS:
        for attribute in (name, f"{name}_", f"_{name}", f"__{name}__", short):
            if hasattr(owner, attribute):
                yield getattr(owner, attribute)


def sides(result: Any) -> Any:
    """Return a result that is traced; mypy knows no more than that torch's functions give tensors."""
    assert isinstance(result, Traced)
    return result


def pair(rule: Rule, *shape: int, origin: Any = None) -> Any:
    value, reference = (torch.rand(*shape, dtype=torch.float64) + 0.1 for _ in range(2))
    return Traced.of(value.requires_grad_(), reference, rule, origin)


# --- Rows ---------------------------------------------------------------------------------------------------------


@every_row
def test_every_row_is_found_by_the_function_that_it_names(name: str) -> None:
    """A row whose name no function has is never read."""
    row = ROWS[name]
    named = [f for f in functions_named(name) if getattr(f, "__name__", "").strip("_") == name]
    named += [f.__get__ for f in functions_named(name) if not callable(f) and hasattr(f, "__get__")]
    if name == FALLBACK:
        named = [torch.ops.transformers.grouped_mm_fallback]
    assert named
    for function in named:
        is_form = function.__name__ == "__get__" and row.kind not in ("linear", "composed")
        assert FUNCTIONS.callee(function).row == (Function(name, "form") if is_form else row)
    for alias in (*row.aliases, *row.in_place):
        assert FUNCTIONS.find(alias) is row
        function = next(functions_named(alias))
        assert FUNCTIONS.callee(function if callable(function) else function.__get__).row is row


def test_no_name_is_that_of_two_rows() -> None:
    names = [name for row in ROWS.values() for name in {row.name, *row.aliases, *row.in_place}]
    assert len(names) == len(set(names)) and len(ROWS) == len(FUNCTIONS) > 150
    for name in ("sinc", "second", "third"):
        table = Table()
        table.declare(Function("sinc", "elementwise", aliases=("second",), in_place=("third",)))
        with pytest.raises(ValueError, match=f"'{name}' has a row"):
            table.declare(Function(name, "linear"))


@every_row
def test_the_columns_of_a_row_fit_its_kind(name: str) -> None:
    row = ROWS[name]
    assert row.kind in get_args(Kind) + get_args(OtherKind) and row.kind != "decision"
    assert row.slope is None or row.kind == "elementwise"
    assert row.origin == "activated" or row.kind == "elementwise"
    assert (row.axis is not None or row.window > 0) == (row.kind == "selection")
    assert row.factors == 2 or (row.kind == "product" and row.factors == 1)
    assert row.linear_in is None or row.kind == "linear"
    assert row.of_complex is None or row.kind == "elementwise"
    assert bool(row.reason) == (row.kind == "refused")
    assert not row.contraction or row.kind in ("linear", "product")
    composed_too = row.kind in ("product", "elementwise", "selection")
    assert callable(row.composition) if row.kind == "composed" else row.composition is None or composed_too
    assert row.kind != "method" or callable(getattr(Rule, name))


def test_a_function_without_a_row_is_a_decision() -> None:
    assert FUNCTIONS.callee(torch.argmax).row == Function("argmax", "decision")
    assert "argmax" not in FUNCTIONS and "exp" in FUNCTIONS


@pytest.mark.parametrize(
    ("function", "name", "in_place"),
    [
        (Tensor.__radd__, "add", False), (Tensor.__iadd__, "add", True), (Tensor.add_, "add", True),
        (Tensor.__itruediv__, "div", True), (Tensor.__setitem__, "setitem", True), (Tensor.relu_, "relu", True),
        (Tensor.__getitem__, "getitem", False), (Tensor.requires_grad_, "requires_grad", False),
    ],
)  # fmt: skip
def test_an_operator_has_the_row_of_its_function(function: Any, name: str, in_place: bool) -> None:
    callee = FUNCTIONS.callee(function)
    assert callee.row is FUNCTIONS.find(name) and callee.in_place is in_place


# --- Slopes -------------------------------------------------------------------------------------------------------

ARGUMENTS: dict[str, list[Any]] = {"pow": [3], "clamp": [0.3, 0.8], "clip": [0.3, 0.8], "clamp_min": [0.3],
                                   "clamp_max": [0.8], "gelu": ["tanh"]}  # fmt: skip


@on_all("name", [row.name for row in ROWS.values() if row.slope])
@pytest.mark.parametrize("shift", [0.0, -0.5])
def test_a_slope_is_the_quotient(name: str, shift: float) -> None:
    positive = name in ("log", "sqrt", "rsqrt", "reciprocal")
    x, r = (torch.rand(200, dtype=torch.float64) + (0.01 if positive else shift) for _ in range(2))
    function = next(functions_named(name))
    arguments: dict[str, Any] = {"approximate": "tanh"} if name == "gelu" else {}
    others = [] if arguments else ARGUMENTS.get(name, [])
    y, z = (function(t, *others, **arguments) for t in (x, r))
    slope = ROWS[name].slope
    assert slope is not None
    found = slope(x, r, y, z, *others, **arguments)
    assert found is not None
    assert ((found * (x - r) - (y - z)).abs() <= 1e-14 * (y.abs() + z.abs() + 1)).all()
    at_one_point = slope(x, x, y, y, *others, **arguments)
    assert at_one_point is not None
    start = x.clone().requires_grad_()
    (derivative,) = torch.autograd.grad(function(start, *others, **arguments).sum(), start)
    assert (at_one_point - derivative).abs().max() <= 1e-12 * derivative.abs().max()


# --- Products, quotients and origins ------------------------------------------------------------------------------


class Recording(Difference):
    """A rule that says which of its methods a call of two factors goes to."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Any] = []

    def product(self, call: Any) -> Tensor:
        self.calls.append("product")
        return super().product(call)

    def quotient(self, call: Any, denominator: int) -> Tensor:
        self.calls.append(denominator)
        return super().quotient(call, denominator)


@pytest.mark.parametrize(
    ("origins", "expected"),
    [
        ((None, None), "product"), ((None, "activated"), "product"), (("activated", "activated"), "product"),
        ((None, "inverse"), 1), (("inverse", None), 0), (("inverse", "activated"), 0), (("inverse", "inverse"), 1),
    ],
)  # fmt: skip
def test_a_factor_that_is_one_over_something_makes_a_quotient(origins: Any, expected: Any) -> None:
    rule = Recording()
    x, y = (pair(rule, 3, origin=origin) for origin in origins)
    assert isinstance(x * y, Traced)
    assert rule.calls == [expected]


@pytest.mark.parametrize("gates", ["half", "value"])
def test_frozen_gates_make_no_difference_between_a_quotient_and_a_product(gates: Any) -> None:
    rule = Frozen(gates)
    x = pair(rule, 3)
    y = {origin: pair(rule, 3, origin=origin) for origin in ("activated", "inverse")}
    y["inverse"].value.data.copy_(y["activated"].value)
    one, other = (torch.autograd.grad((x * y[origin]).value.sum(), x.value) for origin in y)
    assert torch.equal(*one, *other)


def test_the_result_has_the_origin_that_its_row_says() -> None:
    x = pair(Difference(), 3, 3)
    assert sides(torch.rsqrt(x)).origin == sides(torch.reciprocal(x)).origin == "inverse"
    gate = sides(F.silu(x))
    assert gate.origin == gate.flip(0).origin == (gate * 2).origin == (-gate).origin == "activated"
    eye, image = torch.eye(3).double(), gate.view(1, 1, 3, 3)
    sums: list[Any] = [gate.sum(0), gate.mean(0), gate.nansum(0), gate[:, 0].diag().trace(), torch.fft.rfft(gate).real]
    products = [gate @ eye, F.linear(gate, eye), gate.mv(eye[0]), gate[0].dot(eye[0]), torch.inner(gate, eye)]
    products += [torch.tensordot(gate, eye, 1), F.conv2d(image, eye.view(1, 1, 3, 3)), F.conv1d(image[0], eye[None])]
    for changed in (*sums, *products, F.conv_transpose2d(image, eye.view(1, 1, 3, 3)), torch.linalg.vecdot(gate, eye)):
        assert sides(changed).origin is None
    assert (gate + x).origin is None


@pytest.mark.parametrize("like", ["to", "type_as", "expand_as", "view_as", "reshape_as"])
def test_a_plain_tensor_that_takes_a_type_or_shape_stays_plain(like: str) -> None:
    plain, x = torch.ones(3), pair(Difference(), 3)
    changed = getattr(plain, like)(x)
    assert type(changed) is Tensor and torch.equal(changed.double(), plain.double())
    assert changed.dtype == (x.dtype if "to" in like or "type" in like else plain.dtype)


@pytest.mark.parametrize("rule", [Difference, Frozen])
def test_constants_of_a_narrower_type_do_not_narrow_the_explanation(rule: Any) -> None:
    """As the weights of a model of half precision, whose values are float32 when they are explained."""
    x, weight = pair(rule(), 2, 3), torch.rand(3, 3).bfloat16()
    assert torch.equal(sides(F.linear(x, weight)).value, F.linear(x.value, weight.double()))
    assert torch.equal((x @ weight).reference, x.reference @ weight.double())
    assert torch.equal(sides(torch.cat([x, weight])).value, torch.cat([x.value, weight.double()]))


def test_a_dot_product_of_vectors_is_followed() -> None:
    rule = Difference()
    x, y = pair(rule, 2, 3), pair(rule, 2, 3)
    out = torch.linalg.vecdot(x, y)
    gradients = torch.autograd.grad(out.value.sum(), [x.value, y.value])
    found = sum(((t.value - t.reference) * g).sum() for t, g in zip((x, y), gradients))
    assert (found - (out.value - out.reference).sum()).abs() <= 1e-14


# --- Registration -------------------------------------------------------------------------------------------------


def snapshot() -> Any:
    functions = (
        torch.special.bessel_j0,
        torch.exp,
        torch.topk,
        torch.div,
        Tensor.__truediv__,
        F.linear,
        torch.add,
        Tensor.__iadd__,
    )
    rows = {row.name: row for row in FUNCTIONS}
    return rows, [FUNCTIONS.callee(f) for f in functions], {name: EXTERNAL_CODE[name] for name in EXTERNAL_CODE}


def identity(x: Any, *_: Any, **__: Any) -> Any:
    return x


@pytest.mark.parametrize(
    "function", [torch.special.bessel_j0, torch.topk, torch.argmax, torch.Tensor.cpu, "Strange", "pkg.fused"]
)
@pytest.mark.parametrize("kind", ["linear", "product", "elementwise", "constant", None])
def test_a_rule_that_is_registered_and_forgotten_leaves_the_table_as_it_was(function: Any, kind: Any) -> None:
    before = snapshot()
    for _ in range(2):
        if kind is not None and not isinstance(function, str):
            assert register_rule(function, kind) is None
            assert FUNCTIONS.callee(function).row.kind == kind
        else:
            assert register_rule(function)(identity) is identity
        with pytest.raises(ValueError, match="already registered"):
            register_rule(function)
        unregister_rule(function)
        with pytest.raises(KeyError):
            unregister_rule(function)
        assert snapshot() == before


@on_all("name", [row.name for row in ROWS.values() if row.kind in get_args(Kind)])
def test_a_rule_of_this_package_that_is_forgotten_can_be_registered_again(name: str) -> None:
    before = snapshot()

    def function() -> None: ...

    function.__name__ = name
    unregister_rule(function)
    assert FUNCTIONS.find(name) == replace(ROWS[name], kind="decision")
    register_rule(function, ROWS[name].kind)  # type: ignore[arg-type]
    assert snapshot() == before


@pytest.mark.parametrize("write", [lambda x, y: x / y, lambda x, y: torch.true_divide(x, y), operator.itruediv])
def test_another_rule_of_a_function_holds_for_its_operators(write: Callable[..., Tensor]) -> None:
    before, rule = snapshot(), Difference()
    declared = ROWS["div"].composition
    assert declared is not None
    unregister_rule(torch.div)
    try:
        with pytest.raises(UnsupportedModelError, match=r"'(__truediv__|true_divide|__idiv__|div)'"):
            write(pair(rule, 3) * 1, pair(rule, 3))
        register_rule(torch.div)(lambda x, y: x * 2)
        x = pair(rule, 3) * 1
        expected = 2 * x.value
        assert torch.equal(sides(write(x, pair(rule, 3))).value, expected)
        unregister_rule(torch.div)
    finally:
        register_rule(torch.div)(declared)
    assert snapshot() == before


def test_a_function_is_refused_again_after_its_rule_is_forgotten() -> None:
    """Although the function was looked up while it had the rule."""
    register_rule(torch.special.bessel_j0, "elementwise")
    assert isinstance(torch.special.bessel_j0(pair(Difference(), 3)), Traced)
    unregister_rule(torch.special.bessel_j0)
    with pytest.raises(UnsupportedModelError, match="'special_bessel_j0'"):
        torch.special.bessel_j0(pair(Difference(), 3))
