"""A sweep over the table: every function that has a row, on random arguments, against torch itself and the two laws.

The laws are the sum, ``value - reference = sum of multiplier * (input - reference)`` for every result, and the limit:
with value and reference close together, the multipliers are the gradient of torch.
"""

from collections.abc import Callable
from functools import partial
from typing import Any
from zlib import crc32

import pytest
import torch
from torch import Tensor

from captum_ssm.relevance.difference import Difference
from captum_ssm.relevance.frozen import Frozen
from captum_ssm.relevance.functions import FUNCTIONS
from captum_ssm.relevance.functions.refused import DECISIONS
from captum_ssm.relevance.rule import Rule
from captum_ssm.relevance.traced import Traced
from scripts import function_table
from tests.cases import on_all
from tests.function_cases import CASES, FOURIER, GROUPS, IMAGES, LINEAR, Case

RULES = {"difference": Difference, "half": Frozen, "value": partial(Frozen, "value")}
every_case = pytest.mark.parametrize("name", CASES)
Pair = tuple[Tensor, Tensor]


def drawn(name: str, distance: float = 1.0) -> list[Pair]:
    """A value and a reference at about this distance for each tensor of a case."""
    generator = torch.Generator().manual_seed(crc32(name.encode()))
    case, pairs = CASES[name], []
    for shape in case.shapes:
        x, step = (torch.randn(shape, dtype=torch.float64, generator=generator) for _ in range(2))
        pairs.append((case.within(x), case.within(x + distance * step)))
    return pairs


def parts(results: Any) -> list[Any]:
    """The tensors with floating-point numbers among the results, complex ones as pairs of real ones."""
    if isinstance(results, Tensor):
        if results.is_complex():
            return [torch.view_as_real(results.resolve_conj())]
        return [results] if results.is_floating_point() else []
    return [part for result in results if result is not None for part in parts(result)]


def followed(case: Case, pairs: list[Pair], traced: tuple[int, ...], rule: Rule) -> tuple[list[Any], list[Tensor]]:
    """The results of a case, some of whose tensors are traced, and the values that gradients can be taken of."""
    leaves = [pairs[k][0].clone().requires_grad_() for k in traced]
    tensors = [x for x, _ in pairs]
    for k, leaf in zip(traced, leaves):
        tensors[k] = Traced.of(leaf * 1, pairs[k][1].clone(), rule)
    return parts(case.function(*tensors)), leaves


def multipliers(results: list[Any], leaves: list[Tensor]) -> list[Tensor]:
    """The multipliers of all values in one weighed sum of the results."""
    total = sum((_weighed(result.value) for result in results if isinstance(result, Traced)), torch.zeros(()))
    if not total.requires_grad:
        return [torch.zeros_like(leaf) for leaf in leaves]
    found = torch.autograd.grad(total, leaves, allow_unused=True)
    return [torch.zeros_like(leaf) if g is None else g for g, leaf in zip(found, leaves)]


def _weighed(result: Tensor) -> Tensor:
    weights = torch.linspace(0.5, 1.5, result.numel(), dtype=result.dtype).view(result.shape)
    return (result * weights).sum()


def assert_close(found: Tensor, wanted: Tensor, tolerance: float) -> None:
    assert found.shape == wanted.shape
    if wanted.numel():
        assert (found - wanted).abs().max() <= tolerance * max(1.0, float(wanted.abs().max()))


@every_case
@on_all("rule", RULES.values())
def test_values_are_those_of_torch_and_relevance_adds_up(name: str, rule: Callable[[], Rule]) -> None:
    case, pairs = CASES[name], drawn(name)
    values = parts(case.function(*(x for x, _ in pairs)))
    for traced in case.calls:
        own = rule()
        results, leaves = followed(case, pairs, traced, own)
        assert len(results) == len(values)
        at_reference = parts(case.function(*(pair[k in traced] for k, pair in enumerate(pairs))))
        change, size = torch.zeros(()).double(), 1e-300
        for result, value, reference in zip(results, values, at_reference):
            assert_close(getattr(result, "value", result), value, 1e-10)
            if not isinstance(result, Traced):  # a constant of this rule
                assert isinstance(own, Frozen) or torch.equal(value, reference) or own.changed_decisions
                continue
            if isinstance(own, Difference) and not own.changed_decisions:
                assert_close(result.reference, reference, 1e-10)
            change = change + (_weighed(result.value) - _weighed(result.reference)).detach()
            size += float(result.value.abs().sum() + result.reference.abs().sum())
        found = multipliers(results, leaves)
        total = sum(((leaf - pairs[k][1]) * m).sum() for k, leaf, m in zip(traced, leaves, found))
        assert abs(total - change) <= 1e-10 * size


@every_case
def test_multipliers_of_value_and_reference_close_together_are_the_gradient(name: str) -> None:
    case, pairs = CASES[name], drawn(name, 1e-7)
    for traced in case.calls if not case.flat else ():
        results, leaves = followed(case, pairs, traced, Difference())
        found = multipliers(results, leaves)
        middle = [((x + r) / 2).requires_grad_(k in traced) for k, (x, r) in enumerate(pairs)]
        total = sum((_weighed(part) for part in parts(case.function(*middle))), torch.zeros(()))
        wanted = torch.autograd.grad(total, [middle[k] for k in traced], allow_unused=True)
        for m, gradient in zip(found, wanted):
            if gradient is not None:  # which torch has not where it detaches
                assert_close(m, gradient, 1e-4)


@every_case
def test_float32_is_about_float64(name: str) -> None:
    case = CASES[name]
    narrow = [(x.float(), r.float()) for x, r in drawn(name)]
    wide = [(x.double(), r.double()) for x, r in narrow]
    for traced in case.calls:
        results, leaves = followed(case, narrow, traced, Difference())
        expected, wide_leaves = followed(case, wide, traced, Difference())
        for result, wanted in zip(results, expected):
            for side in ("value", "reference"):
                if isinstance(result, Traced) and isinstance(wanted, Traced):
                    assert_close(getattr(result, side).double(), getattr(wanted, side), 1e-4)
        for m, wanted in zip(multipliers(results, leaves), multipliers(expected, wide_leaves)):
            assert m.dtype == torch.float32
            assert_close(m.double(), wanted, 1e-3)


# --- The sweep misses nothing -------------------------------------------------------------------------------------

NO_FUNCTIONS = {
    "autocast", "autocast_to_full_precision", "autocast_to_reduced_precision", "clear_non_serializable_cached_data",
    "coalesced", "dimI", "dimV", "dsmm", "hspmm", "spmm", "sspaddmm",
}  # fmt: skip
"""Parts of torch that no forward pass of dense tensors calls."""
ELSEWHERE = {
    "setitem",
    "causal_convolution",
    "grouped_mm",
    "grouped_mm_fallback",
    "cuda",
    "to",
    "type_as",
    "cpu",
    "type",
}
"""Rows that tests of a layer or of another file apply, as they need a package, a device or a type."""


def test_every_row_is_swept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A row without a case is never compared with the function that it names."""
    applied: set[str] = set()
    run = Rule.__call__

    def note(rule: Rule, function: Any, *arguments: Any) -> Any:
        applied.add(FUNCTIONS.callee(function).row.name)
        return run(rule, function, *arguments)

    monkeypatch.setattr(Rule, "__call__", note)
    for name, case in CASES.items():
        followed(case, drawn(name), case.calls[0], Difference())
    swept = {row.name for row in FUNCTIONS if row.kind in ("linear", "product", "composed", "selection", "step")}
    assert not sorted(swept - applied - ELSEWHERE)


def test_every_function_of_torch_has_a_place_in_the_table() -> None:
    """One that a new version of torch brings gets a row, or a reason to be refused."""
    assert function_table.unlisted() <= NO_FUNCTIONS


def test_the_page_of_functions_is_current() -> None:
    """Renew it by ``python -m scripts.function_table --write``."""
    assert function_table.PAGE.read_text(encoding="utf-8") == function_table.page()


def test_a_decision_is_no_row_and_has_no_floating_point_results() -> None:
    x = Traced.of(torch.randn(3), torch.randn(3), Difference())
    assert not [name for name in DECISIONS.split() if name in FUNCTIONS]
    for decided in (torch.argmax(x), torch.isfinite(x), x > 0, x.long(), x.count_nonzero()):
        assert not isinstance(decided, Traced)


def test_no_two_cases_have_one_name() -> None:
    assert len(CASES) == len(LINEAR) + len(IMAGES) + len(FOURIER) + sum(map(len, GROUPS))
