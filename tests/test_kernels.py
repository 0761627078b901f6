"""Installed kernels that cannot take the model's tensors: the error names the remedy, and the remedy works.

Packages that stand for the real ones on a machine without CUDA are put before all others in a process of its own:
transformers chooses its kernels when it is imported.
"""

import functools
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from captum_ssm import ImplicitAttentionAttribution, ImplicitAttentionRelevance, ModelStateError, reference_kernels
from captum_ssm.network.reference_kernels import remedy_for
from captum_ssm.network.threads import current_thread
from tests.conftest import build
from tests.families import VOCABULARY

TRITON = "0 active drivers ([]). There should only be one."
POINTER = "Pointer argument (at 0) cannot be accessed from Triton (cpu tensor?)"
CUDA = "Expected u.is_cuda() to be true, but got false.  (Could this error message be improved?)"
PACKAGES: dict[str, dict[str, str]] = {
    "fla/__init__.py": {},
    "fla/ops/__init__.py": {},
    "fla/ops/gated_delta_rule.py": {"chunk_gated_delta_rule": TRITON, "fused_recurrent_gated_delta_rule": TRITON},
    "fla/ops/kda.py": {"chunk_kda": TRITON, "fused_recurrent_kda": TRITON},
    "mamba_ssm/__init__.py": {},
    "mamba_ssm/ops/__init__.py": {},
    "mamba_ssm/ops/selective_scan_interface.py": {"selective_scan_fn": CUDA, "mamba_inner_fn": CUDA},
    "mamba_ssm/ops/triton/__init__.py": {},
    "mamba_ssm/ops/triton/ssd_combined.py": {
        "mamba_chunk_scan_combined": POINTER, "mamba_split_conv1d_scan_combined": POINTER},
    "mamba_ssm/ops/triton/selective_state_update.py": {"selective_state_update": POINTER},
    "causal_conv1d/__init__.py": {"causal_conv1d_fn": CUDA, "causal_conv1d_update": CUDA},
}  # fmt: skip
"""What each function says on a CPU, by file and name."""

FAMILIES = ["mamba", "falcon_mamba", "jamba", "mamba2", "bamba", "nemotron_h", "qwen3_next", "qwen3_5", "olmo_hybrid",
            "kimi_linear", "lfm2"]  # fmt: skip
"""Families that have at least one kernel in these packages."""

IDS = [[5, 7, 11, 3, 2, 9], [4, 4, 1, 8, 19, 6]]

SCRIPT = """
import json, sys
import fla
from tests.families import FAMILIES
import torch
from captum_ssm.network.threads import current_thread
from captum_ssm import ImplicitAttentionAttribution, ModelStateError, reference_kernels

ids, found = torch.tensor(json.loads(sys.argv[2])), {}

def functions(model):
    homes = {type(module).__module__ for module in model.modules()}
    return {(h, n): v for h in homes for n, v in vars(sys.modules[h]).items() if callable(v)}

for family in json.loads(sys.argv[1]):
    model, result = FAMILIES[family].build(), {}
    method, before = ImplicitAttentionAttribution(model, rectify=None), functions(model)
    try:
        method.attribute(ids, target=3)
        result["error"] = None
    except ModelStateError as error:
        result["error"] = str(error)
        result["cause"] = str(error.__cause__)
    with reference_kernels(model):
        result["replaced"] = sorted(n for (h, n), v in functions(model).items() if v is not before[h, n])
        result["scores"] = method.attribute(ids, target=3).tolist()
    result["restored"] = functions(model) == before
    try:
        with reference_kernels(model):
            raise KeyError("of the user's own")
    except KeyError:
        result["restored after an error"] = functions(model) == before
    try:
        method.attribute(ids, target=3)
        result["fails again"] = False
    except ModelStateError:
        result["fails again"] = True
    found[family] = result
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What happens in a process in which the packages are installed, by family."""
    home = tmp_path_factory.mktemp("packages")
    for path, functions in PACKAGES.items():
        (home / path).parent.mkdir(parents=True, exist_ok=True)
        bodies = [
            f"def {name}(*args, **kwargs):\n    raise RuntimeError({says!r})\n" for name, says in functions.items()
        ]
        (home / path).write_text("\n".join(bodies))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(home), str(Path(__file__).parents[1])])}
    run = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(FAMILIES), json.dumps(IDS)],
        env=environment, cwd=home, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout.splitlines()[-1])


every_family = pytest.mark.parametrize("family", FAMILIES)


@every_family
def test_a_kernel_that_fails_is_named_with_its_remedy(family: str, found: dict[str, Any]) -> None:
    error, cause = found[family]["error"], found[family]["cause"]
    assert "captum_ssm.reference_kernels(model)" in error
    assert cause in (TRITON, POINTER, CUDA) and cause in error


@every_family
def test_within_the_reference_kernels_the_scores_are_those_without_the_packages(
    family: str, found: dict[str, Any]
) -> None:
    assert found[family]["replaced"]
    expected = ImplicitAttentionAttribution(build(family), rectify=None).attribute(torch.tensor(IDS), target=3)
    scores = torch.tensor(found[family]["scores"])
    assert (scores - expected).abs().max() <= 1e-6 * expected.abs().max()


@every_family
def test_the_kernels_are_back_afterwards(family: str, found: dict[str, Any]) -> None:
    assert found[family]["restored"] and found[family]["restored after an error"]
    assert found[family]["fails again"]


# --- Without any package ------------------------------------------------------------------------------------------


@pytest.fixture
def ids() -> Tensor:
    return torch.randint(1, VOCABULARY, (2, 6), generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("family", ["mamba", "qwen3_next", "rwkv", "minimax"])
def test_without_packages_nothing_changes(family: str, ids: Tensor, unchanged: Any) -> None:
    model = build(family)
    method = ImplicitAttentionAttribution(model, rectify=None)
    expected = method.attribute(ids, target=3)
    with unchanged(model), reference_kernels(model):
        assert torch.equal(method.attribute(ids, target=3), expected)


def test_only_what_transformers_dispatches_is_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mamba")
    home = sys.modules[type(model).__module__]
    decorated = functools.wraps(len)(lambda x: len(x))
    monkeypatch.setattr(home, "decorated", decorated, raising=False)
    before = dict(vars(home))
    with reference_kernels(model):
        replaced = {name for name, value in vars(home).items() if before[name] is not value}
        convolutions, scans = ("causal_conv1d_fn", "causal_conv1d_update"), ("selective_scan", "selective_state_update")
        assert replaced == {*convolutions, "mamba_inner_fn", *(f"mamba_{name}" for name in scans)}
        for name in replaced:
            substitute = getattr(home, name)
            assert inspect.unwrap(substitute) is inspect.unwrap(before[name])  # of the signature
            assert substitute.seen_by(current_thread()) is inspect.unwrap(before[name])
    assert dict(vars(home)) == before


def test_contexts_may_be_nested(ids: Tensor) -> None:
    model = build("mamba")
    before = dict(vars(sys.modules[type(model).__module__]))
    with reference_kernels(model), reference_kernels(model):
        model(input_ids=ids, use_cache=False)
    assert dict(vars(sys.modules[type(model).__module__])) == before


@pytest.mark.parametrize("says", [TRITON, POINTER, CUDA, "x must be a CUDA tensor"])
def test_what_kernels_say_of_foreign_tensors_is_known(says: str) -> None:
    assert remedy_for(RuntimeError(says)) and remedy_for(ValueError(says))


@pytest.mark.parametrize("error", [RuntimeError("shapes do not match"), ValueError("of the user's own")])
def test_another_error_of_the_model_is_not_taken_for_a_kernels(error: Exception, ids: Tensor) -> None:
    model = build("mamba")

    def fail(module: nn.Module, args: Any) -> None:
        raise error

    model.get_submodule("backbone.norm_f").register_forward_pre_hook(fail)
    with pytest.raises(type(error), match=str(error)) as raised:
        ImplicitAttentionAttribution(model).attribute(ids, target=3)
    assert raised.value is error and not isinstance(error, ModelStateError)


@pytest.mark.parametrize("family", ["jamba", "qwen3_next", "lfm2_moe"])
def test_experts_that_take_no_float64_are_named_with_a_remedy_that_works(family: str, ids: Tensor) -> None:
    model = build(family).double()
    for method in (ImplicitAttentionAttribution(model), ImplicitAttentionRelevance(model)):
        with pytest.raises(ModelStateError, match=r"experts.*float64.*set_experts_implementation\('eager'\)"):
            method.attribute(ids, target=3)
    model.set_experts_implementation("eager")
    for method in (ImplicitAttentionAttribution(model), ImplicitAttentionRelevance(model)):
        assert method.attribute(ids, target=3).dtype == torch.float64
