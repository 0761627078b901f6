"""Where the tensors of a model are between its runs changes no score: offloaded by hooks."""

from collections.abc import Callable, Mapping
from functools import cache, partial, update_wrapper
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import captum_ssm as cs
from captum_ssm.layers.fidelity import _is_rounding, unchecked_chain
from captum_ssm.layers.mixers import known_mixers
from captum_ssm.network.recording import record_mixers
from tests.conftest import build
from tests.test_running import BOTH, METHODS, every_method, generated, right

FAMILIES = ["mamba", "mamba2", "jamba", "rwkv", "recurrent_gemma", "qwen3_next"]


class Offload:
    """A hook as accelerate builds it: it fetches the tensors of its module for a run, and takes them away again.

    Args:
        module: The module.
        place_submodules: Whether it does so for all modules within.
    """

    def __init__(self, module: nn.Module, place_submodules: bool) -> None:
        self.place_submodules = place_submodules
        self.weights_map = dict(self.tensors(module))
        self.move(module, lambda name, tensor: tensor.to("meta"))

    def tensors(self, module: nn.Module) -> Mapping[str, Tensor]:
        recurse = self.place_submodules
        return dict([*module.named_parameters(recurse=recurse), *module.named_buffers(recurse=recurse)])

    def move(self, module: nn.Module, to: Callable[[str, Tensor], Tensor]) -> None:
        for path, tensor in self.tensors(module).items():
            home, _, name = path.rpartition(".")
            owner = module.get_submodule(home)
            table: Any = owner._parameters if name in owner._parameters else owner._buffers
            moved = to(path, tensor.detach())
            table[name] = nn.Parameter(moved) if table is owner._parameters else moved

    def pre_forward(self, module: nn.Module, *args: Any, **kwargs: Any) -> tuple[Any, Any]:
        self.move(module, lambda name, _: self.weights_map[name].detach())
        return args, kwargs

    def post_forward(self, module: nn.Module, output: Any) -> Any:
        self.move(module, lambda name, tensor: tensor.to("meta"))
        return output


class Several:
    """Hooks of one module, of which the last one does all."""

    def __init__(self, *hooks: Any) -> None:
        self.hooks = hooks
        self.pre_forward, self.post_forward = hooks[-1].pre_forward, hooks[-1].post_forward


def offload(module: nn.Module, place_submodules: bool = False, several: bool = False) -> None:
    """Hook a module as accelerate does: its ``forward`` is replaced, and the old one kept beside it."""
    hook, before = Offload(module, place_submodules), module.forward

    def forward(module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        args, kwargs = hook.pre_forward(module, *args, **kwargs)
        return hook.post_forward(module, module._old_forward(*args, **kwargs))  # type: ignore[operator]

    vars(module).update(_hf_hook=Several(object(), hook) if several else hook, _old_forward=before)
    vars(module).update(forward=update_wrapper(partial(forward, module), before))


def offloaded(name: str, at: str = "each module") -> Any:
    model = build(name)
    if name == "rwkv":  # which divides its weights at its first run, if it has them then
        model(torch.ones(1, 1, dtype=torch.long), use_cache=False)
    modules = list(model.modules())
    if at == "mixers":
        modules = list(dict.fromkeys(known_mixers(model).values()))
    elif at == "blocks":
        modules = [b for m in modules if isinstance(m, nn.ModuleList) for b in m if set(b.modules()) & mixers(model)]
    for number, module in enumerate(modules):
        offload(module, place_submodules=at != "each module", several=number % 2 == 0)
    return model


def mixers(model: nn.Module) -> set[nn.Module]:
    return set(known_mixers(model).values())


@cache
def whole(name: str) -> Any:
    """Return a family's model in one place, shared by the tests; RWKV-4 after its first run, which divides weights."""
    model = build(name)
    if name == "rwkv":
        model(torch.ones(1, 1, dtype=torch.long), use_cache=False)
    return model


def expected(name: str, method: str, ids: Tensor) -> Tensor:
    return METHODS[method](whole(name), ids, None)


def state(model: nn.Module) -> dict[str, Any]:
    tensors = [*model.named_parameters(), *model.named_buffers()]
    found: dict[str, Any] = {name: (id(tensor), tensor.device) for name, tensor in tensors}
    found.update({name: {k: id(v) for k, v in vars(m).items()} for name, m in model.named_modules()})
    return found


@pytest.mark.parametrize("name", FAMILIES)
def test_an_offloaded_model_is_explained_as_the_whole_one(name: str, ids: Tensor) -> None:
    model = offloaded(name)
    assert all(tensor.is_meta for tensor in [*model.parameters(), *model.buffers()])
    before = state(model)
    for method in METHODS if name == "mamba" else BOTH:
        torch.testing.assert_close(METHODS[method](model, ids, None), expected(name, method, ids))
        assert state(model) == before


@pytest.mark.parametrize("at", ["mixers", "blocks"])
@pytest.mark.parametrize("name", ["mamba", "jamba"])
def test_a_hook_may_fetch_the_tensors_of_all_modules_within(name: str, at: str, ids: Tensor) -> None:
    model = offloaded(name, at)
    assert all(tensor.is_meta for mixer in mixers(model) for tensor in mixer.parameters())
    for method in (*BOTH, "layer"):
        torch.testing.assert_close(METHODS[method](model, ids, None), right(name, method, ids))
    torch.testing.assert_close(generated(model, ids), generated(build(name), ids))


def test_an_offloaded_model_in_half_precision_is_judged_by_its_own_code(ids: Tensor) -> None:
    """Its layers run once more, isolated, where the decomposition is not within its own rounding."""
    model = build("falcon_mamba").bfloat16()
    scores = METHODS["signed"](model, ids, None)
    for module in model.modules():
        offload(module)
    torch.testing.assert_close(METHODS["signed"](model, ids, None), scores)
    assert _is_rounding(*rounded_call(model, ids))


def rounded_call(model: nn.Module, ids: Tensor) -> tuple[Any, Tensor, Tensor]:
    with record_mixers(model) as calls, torch.no_grad():
        model(ids, use_cache=False)
    y = unchecked_chain(calls[0], calls[0].wide_input).apply(calls[0].wide_input, bias=True)
    return calls[0], y, torch.ones(ids.shape)


@every_method
def test_a_patched_function_below_the_hook_counts(method: str, ids: Tensor) -> None:
    """A layer whose own function was replaced before it was hooked is not what its adapter knows."""
    model = build("mamba")
    for mixer in mixers(model):
        vars(mixer)["forward"] = lambda *args, own=mixer.forward, **kwargs: 1.5 * own(*args, **kwargs)
        offload(mixer)
    if method in ("relevance", "frozen", "checkpoints"):
        explained = cs.ImplicitAttentionRelevance(model, checkpoints=method == "checkpoints")
        explained.attribute(ids, 1, baselines=2 if method == "relevance" else None)
        assert all("misses" in way for way in explained.followed.values())
    else:
        with pytest.raises(cs.FidelityError):
            METHODS[method](model, ids, None)


def test_weights_that_nothing_keeps_are_named(ids: Tensor) -> None:
    """A hook of torch that brings them tells nobody where they are in between."""
    model = build("mamba")
    mixer = model.backbone.layers[0].mixer
    kept = mixer.A_log
    mixer.A_log = nn.Parameter(kept.detach().to("meta"))
    mixer.register_forward_pre_hook(lambda m, args: setattr(m, "A_log", kept))
    mixer.register_forward_hook(lambda m, args, output: setattr(m, "A_log", nn.Parameter(kept.detach().to("meta"))))
    with pytest.raises(cs.UnsupportedModelError, match=r"'A_log' has no values.*preload_module_classes"):
        METHODS["signed"](model, ids, None)
