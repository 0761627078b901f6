"""How a model runs changes no score: compiled, under autocast, checkpointed, by other defaults of torch."""

import copy
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import captum_ssm as cs
from tests.conftest import borrowed, build
from tests.families import FAMILIES

METHODS: dict[str, Callable[..., Any]] = {
    "rollout": lambda f, ids, model: cs.ImplicitAttentionRollout(f, model).attribute(ids, 1),
    "signed": lambda f, ids, model: cs.ImplicitAttentionAttribution(f, model, rectify=None).attribute(ids, 1),
    "rectified": lambda f, ids, model: cs.ImplicitAttentionAttribution(f, model).attribute(ids, 1),
    "raw": lambda f, ids, model: cs.RawImplicitAttention(f, model).attribute(ids, 1),
    "layer": lambda f, ids, model: cs.LayerImplicitAttention(f, 0, model).attribute(ids),
    "relevance": lambda f, ids, model: cs.ImplicitAttentionRelevance(f, model).attribute(ids, 1, baselines=2),
    "frozen": lambda f, ids, model: cs.ImplicitAttentionRelevance(f, model).attribute(ids, 1),
    "checkpoints": lambda f, ids, model: cs.ImplicitAttentionRelevance(f, model, checkpoints=True).attribute(ids, 1),
}
every_method = pytest.mark.parametrize("method", METHODS)
BOTH = {"relevance", "signed"}
every_kind = pytest.mark.parametrize("method", sorted(BOTH))


def generated(model: Any, ids: Tensor) -> Tensor:
    method = cs.ImplicitAttentionAttribution(model, rectify=None)
    return cs.LLMImplicitAttention(method, None).explain(ids[:1], 3)


def last_logits(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda ids: model(ids, use_cache=False).logits[:, -1]


def right(name: str, method: str, ids: Tensor) -> Tensor:
    return METHODS[method](borrowed(name), ids, None)


class Block(nn.Module):
    """A mixer of a Mamba and a function of its output, which may be compiled or checkpointed."""

    def __init__(self, mixer: nn.Module, function: Callable[[Tensor], Tensor], reentrant: bool | None) -> None:
        super().__init__()
        self.mixer, self.function, self.reentrant = mixer, function, reentrant

    def body(self, x: Tensor) -> Tensor:
        return x + self.function(self.mixer(x))

    def forward(self, x: Tensor) -> Tensor:
        return self.body(x) if self.reentrant is None else checkpoint(self.body, x, use_reentrant=self.reentrant)


class Model(nn.Module):
    """A classifier of such blocks."""

    def __init__(self, function: Callable[[Tensor], Tensor] = F.silu, reentrant: bool | None = None) -> None:
        super().__init__()
        source = build("mamba").backbone
        self.embedding = source.embeddings
        self.blocks = nn.ModuleList(Block(layer.mixer, function, reentrant) for layer in source.layers)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, inputs: Tensor) -> Tensor:
        x = inputs if inputs.is_floating_point() else self.embedding(inputs)
        for block in self.blocks:
            x = block(x)
        return x[:, -1]


# --- Compiled ---


def stance() -> str:
    from torch._dynamo import eval_frame

    return eval_frame._stance.stance


def test_a_compiled_function_is_explained_by_its_code(ids: Tensor, unchanged: Any) -> None:
    """Also one that ran before, so that its code is there, and that holds on to the model by a closure."""
    model = build("mamba")
    compiled = torch.compile(last_logits(model), backend="eager")
    with torch.no_grad():
        compiled(ids)
    for explain in METHODS.values():
        with unchanged(model):
            scores = explain(compiled, ids, model)
        torch.testing.assert_close(scores, explain(last_logits(model), ids, model))
        assert stance() == "default"


@every_kind
def test_a_compiled_method_tells_its_model(method: str, ids: Tensor) -> None:
    model = Logits().eval()
    compiled = torch.compile(model.forward, backend="eager")
    torch.testing.assert_close(METHODS[method](compiled, ids, None), METHODS[method](model, ids, None))


@pytest.mark.parametrize("method", [m for m in METHODS if m != "layer"])
def test_a_compiled_function_within_a_layer_is_followed(method: str, ids: Tensor) -> None:
    ran: list[str] = []

    def backend(graph: Any, _: Any) -> Any:
        ran.append("compiled")
        return graph.forward

    model = Model(torch.compile(F.silu, backend=backend)).eval()
    model(ids)
    assert ran
    ran.clear()
    torch.testing.assert_close(METHODS[method](model, ids, None), METHODS[method](Model().eval(), ids, None))
    assert not ran


def test_compiled_code_is_compiled_again_after_an_error_and_in_any_order_of_threads(ids: Tensor) -> None:
    model = torch.compile(build("mamba"), backend="eager")
    with pytest.raises(AssertionError, match="Target"):
        cs.ImplicitAttentionRelevance(model).attribute(ids)
    assert stance() == "default"
    inside, leave = threading.Event(), threading.Event()
    plain = build("mamba")

    def slow(ids: Tensor) -> Tensor:
        inside.set()
        assert leave.wait(30)
        return last_logits(plain)(ids)

    thread = threading.Thread(target=lambda: cs.ImplicitAttentionRelevance(slow, plain).attribute(ids, 1))
    thread.start()
    assert inside.wait(30)
    cs.ImplicitAttentionRelevance(model).attribute(ids, 1)
    assert stance() == "force_eager"  # the other thread's explanation goes on
    leave.set()
    thread.join()
    assert stance() == "default"


@every_method
def test_an_exported_model_is_named(method: str, ids: Tensor) -> None:
    graph = torch.export.export(Logits().eval(), (ids,)).module()
    with pytest.raises(cs.UnsupportedModelError, match=r"torch\.export.*model that was exported"):
        METHODS[method](graph, ids, None)


def test_an_exported_model_within_a_callable_is_named(ids: Tensor) -> None:
    graph = torch.export.export(Logits().eval(), (ids,)).module()
    with pytest.raises(cs.UnsupportedModelError, match=r"torch\.export"):
        METHODS["relevance"](lambda ids: graph(ids), ids, build("mamba"))
    with pytest.raises(cs.InvalidInputError, match="exported copy"):
        METHODS["signed"](lambda ids: graph(ids), ids, build("mamba"))


class Logits(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.model = build("mamba")

    def forward(self, ids: Tensor) -> Tensor:
        return self.model(ids, use_cache=False).logits[:, -1]


# --- Autocast ---


def autocast() -> AbstractContextManager[None]:
    return torch.autocast("cpu", torch.bfloat16)


NARROW = ["mamba", "mamba2", "jamba", "rwkv", "recurrent_gemma", "qwen3_next"]
"""Families whose layers compute in bfloat16 under autocast, in part or all."""


@pytest.mark.parametrize("inside", [False, True])
@pytest.mark.parametrize("name", NARROW)
def test_relevance_under_autocast_adds_up_to_the_models_own_outputs(name: str, inside: bool, ids: Tensor) -> None:
    """It follows the functions in the model's own types, so it is the relevance that the model has without autocast."""
    model = build(name)

    def score(ids: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            return model(ids, use_cache=False).logits[:, -1].float()

    method = cs.ImplicitAttentionRelevance(score, model)
    with torch.autocast("cpu", torch.bfloat16, enabled=not inside):
        scores = method.attribute(ids, 1, baselines=2)
        with torch.no_grad():
            difference = score(ids)[:, 1] - score(torch.full_like(ids, 2))[:, 1]
    total = scores.sum(1) + sum(method.terms.values())
    scale = scores.abs().sum(1) + sum(term.abs() for term in method.terms.values())
    assert float(((total - difference).abs() / scale).max()) < 0.1
    if method.terms:
        return  # experts that bfloat16 chooses otherwise
    torch.testing.assert_close(scores, right(name, "relevance", ids), rtol=0.05, atol=0.02 * float(scores.abs().max()))


@pytest.mark.parametrize("name", NARROW)
def test_a_layers_matrix_is_the_same_under_autocast(name: str, ids: Tensor) -> None:
    """The first layer has the same input, and its decomposition does not round."""
    with autocast():
        scores = METHODS["layer"](build(name), ids, None)
    torch.testing.assert_close(scores, right(name, "layer", ids))


@pytest.mark.parametrize("method", ["rollout", "signed", "rectified", "raw"])
def test_scores_under_autocast_are_near_to_those_without(method: str, ids: Tensor) -> None:
    with autocast():
        scores = METHODS[method](build("mamba"), ids, None)
        of_answer = generated(borrowed("mamba"), ids)
    for found, exact in ((scores, right("mamba", method, ids)), (of_answer, generated(borrowed("mamba"), ids))):
        assert found.dtype == exact.dtype
        torch.testing.assert_close(found, exact, rtol=0, atol=0.02 * float(exact.abs().max()))


def test_a_layer_that_misses_its_output_is_refused_under_autocast_too(ids: Tensor) -> None:
    model = build("mamba")
    mixer = model.backbone.layers[0].mixer
    mixer.register_forward_hook(lambda layer, args, output: 1.2 * output)
    with autocast(), pytest.raises(cs.FidelityError):
        METHODS["signed"](model, ids, None)


def test_training_under_the_same_autocast_is_as_before(ids: Tensor) -> None:
    """Casts of weights that autocast keeps for its user are none of ours, which may have no graph."""
    gradients = []
    for explained in (False, True):
        model = build("mamba")
        with autocast():
            if explained:
                for method in BOTH:
                    METHODS[method](model, ids, None)
            model(ids, use_cache=False).logits.float().square().sum().backward()
        gradients.append({name: p.grad for name, p in model.named_parameters()})
    assert gradients[0].keys() == gradients[1].keys()
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient, rtol=0, atol=0, msg=name)


# --- Several types ---


def in_type(module: nn.Module, dtype: torch.dtype, back: torch.dtype) -> None:
    """Let a module compute in another type than the model around it."""

    def cast(value: Any, to: torch.dtype) -> Any:
        return torch.utils._pytree.tree_map_only(Tensor, lambda t: t.to(to) if t.is_floating_point() else t, value)

    module.to(dtype)
    module.register_forward_pre_hook(lambda m, args, kwargs: cast((args, kwargs), dtype), with_kwargs=True)
    module.register_forward_hook(lambda m, args, output: cast(output, back))


@pytest.mark.parametrize("wide", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["mamba", "recurrent_gemma"])
@every_method
def test_layers_in_a_narrower_type_are_judged_by_it(method: str, name: str, wide: torch.dtype, ids: Tensor) -> None:
    narrow = {torch.float32: torch.bfloat16, torch.float64: torch.float32}[wide]
    model = build(name).to(wide)
    for mixer in cs.layers.mixers.known_mixers(model).values():
        in_type(mixer, narrow, wide)
    exact = METHODS[method](build(name).to(wide), ids, None)
    near = {torch.float32: 0.05, torch.float64: 1e-4}[wide] * float(exact.abs().max())
    torch.testing.assert_close(METHODS[method](model, ids, None).to(exact), exact, rtol=0, atol=near)


@pytest.mark.parametrize("name", ["mamba", "qwen3_next"])
def test_a_head_in_a_wider_type_is_no_new_path(name: str, ids: Tensor) -> None:
    """The rounding of the layers before it is theirs, not that of its type."""
    model = build(name)
    head = copy.deepcopy(model.get_output_embeddings()).double()
    head.register_forward_pre_hook(lambda m, args: (args[0].double(),))
    model.set_output_embeddings(head)
    for method in BOTH:
        torch.testing.assert_close(METHODS[method](model, ids, None).float(), right(name, method, ids))
    torch.testing.assert_close(generated(model, ids).float(), generated(borrowed(name), ids), rtol=1e-4, atol=1e-6)


# --- Checkpoints ---


@pytest.mark.parametrize("reentrant", [False, True])
@every_method
def test_checkpointed_code_is_explained_as_the_code(method: str, reentrant: bool, ids: Tensor, unchanged: Any) -> None:
    model = Model(reentrant=reentrant).eval()
    with unchanged(model):
        scores = METHODS[method](model, ids, None)
    torch.testing.assert_close(scores, METHODS[method](Model().eval(), ids, None))


def test_checkpoints_of_other_code_still_run_twice(ids: Tensor) -> None:
    runs: list[int] = []

    def counted(x: Tensor) -> Tensor:
        runs.append(1)
        return x.sin()

    for reentrant in (False, True):
        METHODS["relevance"](Model(reentrant=reentrant).eval(), ids, None)
        runs.clear()
        checkpoint(counted, torch.ones(2, requires_grad=True), use_reentrant=reentrant).sum().backward()
        assert len(runs) == 2


def test_an_error_within_checkpointed_code_comes_out(ids: Tensor) -> None:
    def fail(x: Tensor) -> Tensor:
        raise KeyError("its own")

    for reentrant in (False, True):
        with pytest.raises(KeyError, match="its own"):
            METHODS["signed"](Model(fail, reentrant).eval(), ids, None)


@pytest.mark.parametrize("reentrant", [False, True])
@pytest.mark.parametrize("name", ["mamba", "jamba"])
def test_checkpointing_of_transformers_changes_nothing(name: str, reentrant: bool, ids: Tensor) -> None:
    model = build(name)
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    for method in BOTH:
        torch.testing.assert_close(METHODS[method](model, ids, None), right(name, method, ids))
    with pytest.raises(cs.ModelStateError, match=r"model\.eval\(\)"):
        METHODS["relevance"](model.train(), ids, None)


# --- Defaults of torch ---


@contextmanager
def float64_by_default() -> Iterator[None]:
    torch.set_default_dtype(torch.float64)
    try:
        yield
    finally:
        torch.set_default_dtype(torch.float32)


@contextmanager
def meta_by_default() -> Iterator[None]:
    torch.set_default_device("meta")
    try:
        yield
    finally:
        torch.set_default_device(None)


DEFAULTS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "float64": float64_by_default,
    "meta": meta_by_default,
    "device": lambda: torch.device("meta"),
    "inference": torch.inference_mode,
}


@pytest.mark.parametrize("name", ["mamba", "recurrent_gemma"])
@pytest.mark.parametrize("default", DEFAULTS)
def test_defaults_of_torch_change_nothing(default: str, name: str, ids: Tensor) -> None:
    """Nothing is made on a default device or in a default type; what has no values there would fail."""
    for method in METHODS if name == "mamba" else BOTH:
        expected = right(name, method, ids)
        model = build(name)
        with DEFAULTS[default]():
            scores = METHODS[method](model, ids, None)
        assert scores.dtype == expected.dtype
        torch.testing.assert_close(scores.clone(), expected)
    expected, model = generated(borrowed(name), ids), build(name)
    with DEFAULTS[default]():
        scores = generated(model, ids)
    torch.testing.assert_close(scores.clone(), expected)


@every_method
def test_a_model_made_in_inference_mode_is_explained(method: str, ids: Tensor) -> None:
    """Autograd refuses its parameters, so copies stand in for them."""
    with torch.inference_mode():
        model = FAMILIES["mamba"].build()
    before = [id(parameter) for parameter in model.parameters()]
    torch.testing.assert_close(METHODS[method](model, ids, None), right("mamba", method, ids))
    assert [id(parameter) for parameter in model.parameters()] == before
