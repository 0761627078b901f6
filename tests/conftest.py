"""Tiny random models of every family, and the seeds and switches of the whole suite."""

import os

os.environ["HF_HUB_OFFLINE"] = "1"

import copy
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING_NAMES

from tests import oracles
from tests.families import FAMILIES, VOCABULARY, layers_of

transformers.utils.logging.set_verbosity_error()
torch.set_num_threads(1)

HAD = {family for family in FAMILIES if family.partition(" ")[0] in CONFIG_MAPPING_NAMES}
"""The families that the installed release of transformers has."""


SLOW = 5.0
"""Seconds from which on a test is marked ``slow``."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip tests of families that the installed release does not have, by name; begin with the slow ones.

    One that came last would be waited for by all processes but its own.
    """
    for item in items:
        for name in (getattr(item, "callspec", None) and item.callspec.params.values()) or ():  # type: ignore[attr-defined]
            if isinstance(name, str) and name in FAMILIES.keys() - HAD:
                item.add_marker(pytest.mark.skip(reason=f"transformers {transformers.__version__} has no {name}"))
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Name the tests that take long and are not marked."""
    took = {
        report.nodeid: report.duration
        for report in terminalreporter.stats.get("passed", [])
        if report.duration > SLOW and report.when == "call" and "slow" not in report.keywords
    }
    if took:
        terminalreporter.section(f"over {SLOW:g} s, and not marked slow")
    for name, seconds in took.items():
        terminalreporter.line(f"{seconds:6.1f} s  {name}")


_BUILT: dict[str, Any] = {}


def build(name: str) -> Any:
    """Return a fresh copy of a family's model, so that no test sees another's changes."""
    if name not in _BUILT:
        model = FAMILIES[name].build_here()
        if model is None:
            pytest.skip(f"The code of transformers {transformers.__version__} runs no {name}")
        _BUILT[name] = model
    return copy.deepcopy(_BUILT[name])


_AT_HOME: dict[str, tuple[Any, dict[str, Any]]] = {}
_AWAY: dict[str, tuple[Any, dict[str, Any]]] = {}


def borrowed(name: str) -> Any:
    """Return a family's model, the same for one test after another, until a test leaves it changed.

    The first explanation of a model examines it, and takes ten times as long as the next: a test needs a model that is
    built anew only if it is about the first, or needs two, or changes one.
    """
    if name not in _AWAY:
        model = None if name in _AT_HOME else build(name)
        _AWAY[name] = _AT_HOME.pop(name) if model is None else (model, snapshot(model, ()))
    return _AWAY[name][0]


@pytest.fixture(autouse=True)
def _seed_and_models() -> Iterator[None]:
    torch.manual_seed(0)
    yield
    for name, (model, before) in _AWAY.items():
        if snapshot(model, ()) == before:
            _AT_HOME[name] = model, before
    _AWAY.clear()


@pytest.fixture
def mamba() -> Any:
    return borrowed("mamba")


@pytest.fixture
def falcon_mamba() -> Any:
    return borrowed("falcon_mamba")


FAMILY_NAMES = [family for family, _, _ in layers_of(oracles)]
"""The families of the tests that know what an S6 layer is made of; test_families.py has all."""

SEVERAL = [*FAMILY_NAMES, "zamba", "falcon_h1", "recurrent_gemma", "rwkv", "qwen3_5"]
"""Families that differ in what a call can go wrong by: shared and parallel layers, no mask, their own state."""


@pytest.fixture(params=FAMILY_NAMES)
def family(request: pytest.FixtureRequest) -> Any:
    return borrowed(request.param)


@pytest.fixture
def ids() -> Tensor:
    """Token ids of two examples, none of them the padding token."""
    return torch.randint(1, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(1))


HOOKS = [
    "_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks",
    "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs", "_forward_hooks_always_called",
    "_state_dict_hooks", "_state_dict_pre_hooks", "_load_state_dict_pre_hooks", "_load_state_dict_post_hooks",
]  # fmt: skip


def snapshot(model: nn.Module, tensors: tuple[Tensor, ...]) -> dict[str, Any]:
    """Return all that a call must leave as it was, in a form that ``==`` compares bit by bit."""

    def bits(tensor: Tensor | None) -> Any:
        if tensor is None:
            return None
        if tensor.is_meta or tensor.layout is not torch.strided:
            return tensor.dtype, tuple(tensor.shape), tensor.requires_grad, b""
        raw = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
        return tensor.dtype, tuple(tensor.shape), tensor.requires_grad, raw

    state: dict[str, Any] = {"grad mode": torch.is_grad_enabled(), "inference mode": torch.is_inference_mode_enabled()}
    for name, parameter in [*model.named_parameters(), *model.named_buffers()]:
        state[f"parameter {name}"] = (id(parameter), bits(parameter), bits(parameter.grad))
    for name, module in model.named_modules():
        state[f"training {name}"] = module.training
        state[f"hooks {name}"] = {kind: dict(getattr(module, kind)) for kind in HOOKS}
        state[f"attributes {name}"] = set(vars(module))
        state[f"forward {name}"] = vars(module).get("forward"), type(module)
    for number, tensor in enumerate(tensors):
        state[f"tensor {number}"] = (bits(tensor), bits(tensor.grad) if tensor.is_leaf else None)
    return state


@contextmanager
def _unchanged(model: nn.Module, *tensors: Tensor) -> Iterator[None]:
    before = snapshot(model, tensors)
    try:
        yield
    finally:
        after = snapshot(model, tensors)
        changed = [key for key in before.keys() | after.keys() if before.get(key) != after.get(key)]
        assert not changed, f"changed: {changed}"


@pytest.fixture
def unchanged() -> Callable[..., AbstractContextManager[None]]:
    """A context in which neither the model nor the tensors nor the grad mode may change, also on an error."""
    return _unchanged


def random(*shape: int) -> tuple[Tensor, Tensor]:
    """A value that requires a gradient, and its reference."""
    return torch.randn(shape, dtype=torch.float64).requires_grad_(), torch.randn(shape, dtype=torch.float64)
