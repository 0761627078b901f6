"""The methods are Captum methods: what Captum's tools and its users rely on holds for each of them."""

import copy
import functools
import warnings
from collections.abc import Callable
from typing import Any

import captum.metrics
import pytest
import torch
from captum.attr import Attribution, GradientAttribution, LayerGradientXActivation, NoiseTunnel
from torch import Tensor, nn

from captum_ssm import (
    FidelityError,
    ImplicitAttentionAttribution,
    ImplicitAttentionRelevance,
    ImplicitAttentionRollout,
    InvalidInputError,
    LayerImplicitAttention,
    LayerImplicitAttentionRelevance,
    ModelStateError,
    NeuronImplicitAttentionRelevance,
    RawImplicitAttention,
)
from captum_ssm.attr import LayerImplicitAttentionAttribution
from captum_ssm.network.forward import run_model
from tests.conftest import SEVERAL, borrowed, build
from tests.families import VOCABULARY


@pytest.fixture(params=SEVERAL)
def family(request: pytest.FixtureRequest) -> Any:
    return borrowed(request.param)


METHODS: dict[str, Callable[..., Any]] = {
    "channel": ImplicitAttentionAttribution,
    "token": functools.partial(ImplicitAttentionAttribution, rectify="token"),
    "signed": functools.partial(ImplicitAttentionAttribution, rectify=None),
    "rollout": ImplicitAttentionRollout,
    "raw": RawImplicitAttention,
}
every_method = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS)
WITHOUT_GRADIENTS = [METHODS["rollout"], METHODS["raw"]]
every_gradient_method = pytest.mark.parametrize("method", list(METHODS.values())[:3], ids=list(METHODS)[:3])


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    assert expected.abs().max() > 0
    difference = (actual.double() - expected.double()).abs().max()
    assert difference <= tolerance * expected.abs().max(), f"{difference:.1e}"


def assert_differ(one: Tensor, other: Tensor) -> None:
    """By far more than what :func:`assert_close` allows."""
    assert (one - other).abs().max() > 1e-3 * one.abs().max()


@functools.cache  # one function for one model, which is then examined once
def every_position(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """A callable that returns (B, L, V), as a user of Captum writes it."""
    return lambda ids: model(input_ids=ids, use_cache=False).logits


@functools.cache
def read_at(model: nn.Module, position: int) -> Callable[[Tensor], Tensor]:
    return lambda ids: model(input_ids=ids, use_cache=False).logits[:, position]


@functools.cache
def of_embeddings(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda x: model(inputs_embeds=x, use_cache=False).logits[:, -1]


def embed(model: Any, ids: Tensor) -> Tensor:
    return model.get_input_embeddings()(ids).detach()


class Wrapper(nn.Module):
    """A model of the user's own around one of transformers, which returns scores."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.inner = model

    def forward(self, ids: Tensor, mask: Tensor | None = None) -> Tensor:
        return self.inner(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -1]


# --- Inputs and outputs -------------------------------------------------------------------------------------------


@every_method
def test_a_tuple_goes_in_and_a_tuple_comes_out(method: Any, mamba: nn.Module, ids: Tensor) -> None:
    for inputs in (ids, embed(mamba, ids)):
        alone = method(mamba).attribute(inputs, target=3)
        inside = method(mamba).attribute((inputs,), target=3)
        assert isinstance(alone, Tensor)
        assert type(inside) is tuple and len(inside) == 1
        assert torch.equal(inside[0], alone)


@every_method
def test_ids_get_one_score_each(method: Any, mamba: nn.Module, ids: Tensor) -> None:
    scores = method(mamba).attribute(ids, target=3)
    assert scores.shape == ids.shape and scores.dtype == torch.float32
    assert scores.is_contiguous() and not scores.requires_grad and scores.grad_fn is None
    assert scores.isfinite().all() and scores.ne(0).any()


@every_method
def test_ids_of_any_integer_type_are_the_same_tokens(method: Any, mamba: nn.Module, ids: Tensor) -> None:
    assert_close(method(mamba).attribute(ids.int(), target=3), method(mamba).attribute(ids, target=3))


@every_method
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float64, 1e-5), (torch.bfloat16, 2e-2)], ids=str
)
def test_embeddings_share_the_score_of_their_token(
    method: Any, dtype: torch.dtype, tolerance: float, mamba: nn.Module, ids: Tensor
) -> None:
    model = mamba.to(dtype)
    x = embed(model, ids)
    assert x.dtype == dtype and x.shape == (2, 7, 8)
    scores = method(model).attribute(x, target=3)
    assert scores.shape == x.shape and scores.dtype == dtype
    assert scores.is_contiguous() and not scores.requires_grad
    assert torch.equal(scores, scores[..., :1].expand_as(scores))  # the method knows tokens, not components
    assert_close(scores.double().sum(-1), method(model).attribute(ids, target=3).double(), tolerance)


@every_method
def test_what_is_not_contiguous_is_read_as_it_stands(method: Any, mamba: nn.Module, ids: Tensor) -> None:
    turned = ids.t().contiguous().t()
    assert not turned.is_contiguous()
    scores = method(mamba).attribute(turned, target=3)
    assert scores.is_contiguous() and torch.equal(scores, method(mamba).attribute(ids, target=3))
    x = embed(mamba, ids)
    swapped = x.transpose(0, 1).contiguous().transpose(0, 1)
    scores = method(mamba).attribute(swapped, target=3)
    assert scores.is_contiguous() and torch.equal(scores, method(mamba).attribute(x, target=3))


@every_method
def test_a_float64_model_gives_the_same_scores(method: Any, mamba: nn.Module, ids: Tensor) -> None:
    narrow = method(mamba).attribute(ids, target=3)
    wide = method(build("mamba").double()).attribute(ids, target=3)
    assert wide.is_floating_point()
    assert_close(wide, narrow)


# --- Targets ------------------------------------------------------------------------------------------------------

SAME_TARGET: dict[str, Any] = {
    "0-d tensor": torch.tensor(3),
    "1-element tensor": torch.tensor([3]),
    "1-D tensor": torch.tensor([3, 3]),
    "list": [3, 3],
    "tuple": (3,),
    "list of tuples": [(3,), (3,)],
    "negative": 3 - VOCABULARY,
}


@every_method
@pytest.mark.parametrize("target", SAME_TARGET.values(), ids=SAME_TARGET)
def test_every_form_of_a_target_is_the_same_target(method: Any, target: Any, mamba: nn.Module, ids: Tensor) -> None:
    assert_close(method(mamba).attribute(ids, target=target), method(mamba).attribute(ids, target=3))


@every_method
@pytest.mark.parametrize("form", [list, torch.tensor], ids=["list", "tensor"])
def test_targets_of_each_example_are_those_of_the_examples_alone(
    method: Any, form: Any, mamba: nn.Module, ids: Tensor
) -> None:
    together = method(mamba).attribute(ids, target=form([3, 5]))
    alone = [method(mamba).attribute(ids[k : k + 1], target=target) for k, target in enumerate((3, 5))]
    assert_close(together, torch.cat(alone))


@every_gradient_method
def test_another_target_is_another_explanation(method: Any, mamba: nn.Module, ids: Tensor) -> None:
    assert_differ(method(mamba).attribute(ids, target=3), method(mamba).attribute(ids, target=5))
    assert_differ(method(mamba).attribute(ids, target=[3, 5])[1:], method(mamba).attribute(ids, target=3)[1:])


@every_method
def test_a_tuple_selects_position_and_class(method: Any, mamba: nn.Module, ids: Tensor) -> None:
    full = method(every_position(mamba), model=mamba)
    for position in (-1, 4):
        expected = method(read_at(mamba, position), model=mamba).attribute(ids, target=3)
        assert_close(full.attribute(ids, target=(position, 3)), expected)
        assert_close(full.attribute(ids, target=[(position, 3)] * 2), expected)
    assert_differ(full.attribute(ids, target=(4, 3)), full.attribute(ids, target=(-1, 3)))


@every_method
def test_tuples_of_each_example_are_those_of_the_examples_alone(method: Any, mamba: nn.Module, ids: Tensor) -> None:
    full = method(every_position(mamba), model=mamba)
    targets = [(4, 3), (6, 5)]
    together = full.attribute(ids, target=targets)
    alone = [full.attribute(ids[k : k + 1], target=target) for k, target in enumerate(targets)]
    assert_close(together, torch.cat(alone))
    assert together[0, 5:].eq(0).all()  # what comes after the explained position has no part in it


@every_method
def test_a_callable_of_one_score_each_needs_no_target(method: Any, mamba: nn.Module, ids: Tensor) -> None:
    expected = method(mamba).attribute(ids, target=3)
    one = method(lambda ids: read_at(mamba, -1)(ids)[:, 3], model=mamba)
    assert_close(one.attribute(ids), expected)
    column = method(lambda ids: read_at(mamba, -1)(ids)[:, 3:4], model=mamba)
    assert_close(column.attribute(ids, target=0), expected)


# --- Batches and padding ------------------------------------------------------------------------------------------


@every_method
def test_the_order_of_examples_is_the_order_of_scores(method: Any, mamba: nn.Module) -> None:
    ids = torch.randint(1, VOCABULARY, (4, 6))
    order = torch.tensor([2, 0, 3, 1])
    scores = method(mamba).attribute(ids, target=[3, 5, 7, 9])
    shuffled = method(mamba).attribute(ids[order], target=torch.tensor([3, 5, 7, 9])[order])
    assert_close(shuffled, scores[order])


@every_method
def test_an_example_does_not_see_the_others(method: Any, mamba: nn.Module, ids: Tensor) -> None:
    other = ids.clone()
    other[1] = (ids[1] + 5) % (VOCABULARY - 1) + 1
    scores, changed = (method(mamba).attribute(i, target=3) for i in (ids, other))
    assert_close(changed[:1], scores[:1])
    assert_differ(changed[1:], scores[1:])
    assert_close(method(mamba).attribute(ids[:1], target=3), scores[:1])


@every_method
@pytest.mark.parametrize("side", ["left", "right"])
def test_sentences_of_every_length_are_explained_as_they_are_alone(method: Any, side: str, mamba: nn.Module) -> None:
    sentences = [torch.randint(1, VOCABULARY, (n,)) for n in (3, 7, 1, 5)]
    ids, mask = torch.zeros(2, 4, 7, dtype=torch.long)
    for row, sentence in enumerate(sentences):
        at = slice(7 - len(sentence), 7) if side == "left" else slice(0, len(sentence))
        ids[row, at], mask[row, at] = sentence, 1
    together = method(mamba).attribute(ids, target=3, additional_forward_args=mask)
    assert together[mask == 0].eq(0).all()
    alone = [method(mamba).attribute(sentence.unsqueeze(0), target=3)[0] for sentence in sentences]
    for row, scores in enumerate(alone):
        assert_close(together[row][mask[row] == 1], scores)
    x = method(mamba).attribute(embed(mamba, ids), target=3, additional_forward_args=mask)
    assert_close(x.sum(-1), together)
    assert x[mask == 0].eq(0).all()


# --- Additional arguments and the forward function ----------------------------------------------------------------

MASK = torch.tensor([[0, 0, 1, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1, 1]])


@every_method
def test_additional_arguments_come_alone_or_as_a_tuple(method: Any, mamba: nn.Module, ids: Tensor) -> None:
    plain = method(mamba).attribute(ids, target=3)
    masked = method(mamba).attribute(ids, target=3, additional_forward_args=MASK)
    assert torch.equal(masked, method(mamba).attribute(ids, 3, (MASK,)))
    assert_differ(masked[:1], plain[:1])
    for nothing in ((), (None,), torch.ones_like(MASK)):
        assert_close(method(mamba).attribute(ids, target=3, additional_forward_args=nothing), plain)


@every_method
def test_a_callable_gets_its_additional_arguments_in_order(method: Any, mamba: nn.Module, ids: Tensor) -> None:
    seen: list[tuple[Any, ...]] = []

    def forward(ids: Tensor, mask: Tensor, position: int, factor: float, note: str) -> Tensor:
        seen.append((mask, position, factor, note))
        return factor * mamba(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, position]

    def closed(ids: Tensor) -> Tensor:
        return 2.0 * mamba(input_ids=ids, attention_mask=MASK, use_cache=False).logits[:, 4]

    scores = method(forward, model=mamba).attribute(ids, 3, (MASK, 4, 2.0, "note"))
    assert_close(scores, method(closed, model=mamba).attribute(ids, target=3))
    assert seen and all(args[0] is MASK and args[1:] == (4, 2.0, "note") for args in seen)


def test_a_transformers_model_as_it_is_equals_the_callable_written_by_hand(family: nn.Module, ids: Tensor) -> None:
    by_hand = lambda ids: family(input_ids=ids, use_cache=False).logits[:, -1]  # noqa: E731
    for method in METHODS.values():
        expected = method(family).attribute(ids, target=3)
        assert_close(method(by_hand, model=family).attribute(ids, target=3), expected)


@every_method
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_a_module_around_the_model_is_explained_alike(
    method: Any, training: bool, mamba: nn.Module, ids: Tensor
) -> None:
    """A fresh wrapper is in training mode, which tells nothing about the model that it holds."""
    wrapper = Wrapper(mamba)
    wrapper.training = training
    assert not mamba.training
    expected = method(mamba).attribute(ids, target=3)
    assert_close(method(wrapper).attribute(ids, target=3), expected)
    assert_close(method(wrapper, model=mamba).attribute(ids, target=3), expected)
    masked = method(mamba).attribute(ids, target=3, additional_forward_args=MASK)
    assert_close(method(wrapper).attribute(ids, target=3, additional_forward_args=MASK), masked)


@every_method
def test_the_forward_function_of_a_copy_may_be_swapped(method: Any, mamba: nn.Module, ids: Tensor) -> None:
    """Captum's language-model and data-loader wrappers do so."""
    original = method(read_at(mamba, -1), model=mamba)
    before = original.attribute(ids, target=3)
    swapped = copy.copy(original)
    swapped.forward_func = read_at(mamba, 4)
    expected = method(read_at(mamba, 4), model=mamba).attribute(ids, target=3)
    assert_close(swapped.attribute(ids, target=3), expected)
    assert_differ(before, expected)
    assert torch.equal(original.attribute(ids, target=3), before)


@every_method
def test_a_swapped_module_is_the_model_that_is_explained(
    method: Any, mamba: nn.Module, falcon_mamba: nn.Module, ids: Tensor
) -> None:
    swapped = copy.copy(method(mamba))
    swapped.forward_func = falcon_mamba
    assert_close(swapped.attribute(ids, target=3), method(falcon_mamba).attribute(ids, target=3))
    assert_differ(method(mamba).attribute(ids, target=3), method(falcon_mamba).attribute(ids, target=3))


@every_method
def test_the_undecorated_attribute_is_there_and_works(method: Any, mamba: nn.Module, ids: Tensor) -> None:
    """NoiseTunnel and TCAV call it."""
    made = method(mamba)
    assert torch.equal(made.attribute.__wrapped__(made, ids, target=3), made.attribute(ids, target=3))
    assert torch.equal(type(made).attribute.__wrapped__(made, (ids,), 3)[0], made.attribute(ids, target=3))


def test_the_undecorated_attribute_of_a_layer_is_there_and_works(mamba: nn.Module, ids: Tensor) -> None:
    layer = LayerImplicitAttention(mamba, 0)
    assert torch.equal(layer.attribute.__wrapped__(layer, ids), layer.attribute(ids))  # type: ignore[attr-defined]


# --- Grad modes and state -----------------------------------------------------------------------------------------


@every_method
@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_the_grad_mode_around_the_call_changes_nothing(method: Any, mode: Any, mamba: nn.Module, ids: Tensor) -> None:
    x = embed(mamba, ids)
    plain = [method(mamba).attribute(inputs, target=3, additional_forward_args=MASK) for inputs in (ids, x)]
    with mode():
        inside = [method(mamba).attribute(i, target=3, additional_forward_args=MASK) for i in (ids, x)]
        created = [method(mamba).attribute(i.clone(), target=3, additional_forward_args=MASK) for i in (ids, x)]
    for one, two, expected in zip(inside, created, plain, strict=True):
        assert torch.equal(one, expected) and torch.equal(two, expected)


@every_method
@pytest.mark.parametrize("which", ["inputs", "query", "mask", "target"])
def test_a_tensor_may_come_from_inference_mode(method: Any, which: str, mamba: nn.Module, ids: Tensor) -> None:
    """In evaluation loops all tensors do."""
    target, query = torch.tensor([3, 5]), torch.tensor([6, 6])
    for inputs in (ids, embed(mamba, ids)):
        tensors = {"inputs": inputs, "target": target, "mask": MASK, "query": query}
        scores = []
        for inside in (False, True):
            with torch.inference_mode(inside):
                given = {**tensors, which: tensors[which].clone()}
                mask = given.pop("mask")
                scores.append(method(mamba).attribute(additional_forward_args=mask, **given))
        assert_close(scores[1], scores[0])


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_the_grad_mode_around_a_layers_call_changes_nothing(mode: Any, mamba: nn.Module, ids: Tensor) -> None:
    expected = LayerImplicitAttention(mamba, 0).attribute(ids, MASK)
    with mode():
        assert torch.equal(LayerImplicitAttention(mamba, 0).attribute(ids.clone(), MASK.clone()), expected)
    assert not expected.requires_grad


@every_method
def test_the_same_call_gives_the_same_bits(method: Any, mamba: nn.Module, ids: Tensor) -> None:
    made = method(mamba)
    first = made.attribute(ids, target=3)
    torch.manual_seed(1)
    assert torch.equal(made.attribute(ids, target=3), first)
    assert torch.equal(method(mamba).attribute(ids, target=3), first)


@every_method
def test_a_call_draws_no_random_numbers(method: Any, mamba: nn.Module, ids: Tensor) -> None:
    state = torch.get_rng_state()
    method(mamba).attribute(ids, target=3)
    assert torch.equal(torch.get_rng_state(), state)


@every_method
def test_parameters_need_no_gradients(method: Any, mamba: nn.Module, ids: Tensor) -> None:
    x = embed(mamba, ids)
    plain = [method(mamba).attribute(inputs, target=3) for inputs in (ids, x)]
    mamba.requires_grad_(False)
    for inputs, expected in zip((ids, x), plain, strict=True):
        assert_close(method(mamba).attribute(inputs, target=3), expected)


@every_method
def test_hooks_of_every_kind_are_gone_after_a_call(method: Any, mamba: nn.Module, ids: Tensor, unchanged: Any) -> None:
    x = embed(mamba, ids)
    followed = x.clone().requires_grad_()
    with unchanged(mamba, ids, x, followed, MASK):
        for inputs in (ids, x, followed, (ids,), (x,)):
            method(mamba).attribute(inputs, target=3, additional_forward_args=MASK)


@every_method
def test_a_progress_bar_changes_nothing(method: Any, mamba: nn.Module, ids: Tensor) -> None:
    shown = method(mamba).attribute(ids, target=3, show_progress=True)
    assert torch.equal(shown, method(mamba).attribute(ids, target=3))


# --- The explained position ---------------------------------------------------------------------------------------


@every_method
def test_a_query_is_the_position_that_is_read(method: Any, mamba: nn.Module, ids: Tensor) -> None:
    at = method(read_at(mamba, 4), model=mamba)
    expected = at.attribute(ids, target=3)
    weights = torch.zeros(2, 7)
    weights[:, 4] = 1
    for query in (4, -3, torch.tensor(4), torch.tensor([4, 4]), torch.tensor([-3, 4]), weights):
        assert_close(at.attribute(ids, target=3, query=query), expected)


@every_method
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_a_query_may_have_another_type_than_the_model(
    method: Any, dtype: torch.dtype, mamba: nn.Module, ids: Tensor
) -> None:
    model = mamba.to(dtype)
    at = method(read_at(model, 4), model=model)
    expected = at.attribute(ids, target=3)
    weights = torch.zeros(2, 7)
    weights[:, 4] = 1
    for query in (4, weights, weights.to(dtype)):
        assert_close(at.attribute(ids, target=3, query=query), expected)


@every_method
def test_weights_of_double_precision_are_weights(method: Any, mamba: nn.Module, ids: Tensor) -> None:
    made, weights = method(mamba), torch.rand(2, 7)
    expected = made.attribute(ids, target=3, query=weights)
    assert_close(made.attribute(ids, target=3, query=weights.double()), expected)


@every_method
def test_a_query_of_each_example_is_that_of_the_example_alone(method: Any, mamba: nn.Module, ids: Tensor) -> None:
    together = method(mamba).attribute(ids, target=3, query=torch.tensor([2, 5]))
    alone = [method(mamba).attribute(ids[k : k + 1], target=3, query=query) for k, query in enumerate((2, 5))]
    assert_close(together, torch.cat(alone))
    assert together[0, 3:].eq(0).all() and together[1, 6:].eq(0).all()


@every_method
def test_scores_are_linear_in_the_query(method: Any, mamba: nn.Module, ids: Tensor) -> None:
    made = method(mamba)
    one, other, both = (made.attribute(ids, target=3, query=q) for q in (6, 2, torch.zeros(2, 7)))
    assert both.eq(0).all()
    weights = torch.zeros(2, 7)
    weights[:, 6], weights[:, 2] = 0.25, 2.0
    assert_close(made.attribute(ids, target=3, query=weights), 0.25 * one + 2 * other)


@pytest.mark.parametrize("method", list(METHODS.values())[3:], ids=list(METHODS)[3:])
def test_without_gradients_in_the_matrices_the_target_counts_by_its_position_alone(
    method: Any, mamba: nn.Module, ids: Tensor
) -> None:
    expected = method(read_at(mamba, 4), model=mamba).attribute(ids, target=3)
    for target in (3, 5, None):
        assert_close(method(mamba).attribute(ids, target=target, query=4), expected)


# --- What Captum asks of a method ---------------------------------------------------------------------------------


@every_method
def test_a_method_answers_what_captum_asks(method: Any, mamba: nn.Module, ids: Tensor) -> None:
    made = method(mamba)
    assert isinstance(made, Attribution) and isinstance(made, GradientAttribution)
    assert made.forward_func is mamba
    assert made.has_convergence_delta() is False
    assert isinstance(made.multiplies_by_inputs, bool)
    assert made.get_name().replace(" ", "") == type(made).__name__
    with pytest.raises(NotImplementedError, match="call attribute"):
        made.attribute_future(ids, target=3)


@every_method
def test_a_noise_tunnel_without_noise_changes_nothing(method: Any, mamba: nn.Module, ids: Tensor) -> None:
    x = embed(mamba, ids)
    made = method(mamba)
    tunnel = NoiseTunnel(made)
    options: dict[str, Any] = {"nt_samples": 3, "stdevs": 0.0}
    assert_close(tunnel.attribute(x, target=3, **options), made.attribute(x, target=3))
    # arguments for each example are repeated for each sample
    masked = tunnel.attribute(x, target=[3, 5], additional_forward_args=MASK, **options)
    assert_close(masked, made.attribute(x, target=[3, 5], additional_forward_args=MASK))
    (inside,) = tunnel.attribute((x,), target=3, nt_samples_batch_size=2, **options)
    assert_close(inside, made.attribute(x, target=3))
    squared = tunnel.attribute(x, target=3, nt_type="smoothgrad_sq", **options)
    assert_close(squared, made.attribute(x, target=3).square())


@every_method
def test_a_noise_tunnel_averages_over_noise(method: Any, mamba: nn.Module, ids: Tensor) -> None:
    x = embed(mamba, ids)
    scores = NoiseTunnel(method(mamba)).attribute(x, target=3, nt_samples=4, stdevs=0.3)
    assert scores.shape == x.shape and scores.isfinite().all()
    assert_differ(scores, method(mamba).attribute(x, target=3))


@every_method
def test_infidelity_measures_the_scores_of_embeddings(method: Any, mamba: nn.Module, ids: Tensor) -> None:
    x = embed(mamba, ids)
    scores = method(of_embeddings(mamba), model=mamba).attribute(x, target=3)

    def remove(inputs: Any) -> tuple[Tensor, Tensor]:
        noise = 0.1 * torch.randn_like(inputs)
        return noise, inputs - noise

    def still(inputs: Any) -> tuple[Tensor, Tensor]:
        return torch.zeros_like(inputs), inputs

    measure = functools.partial(captum.metrics.infidelity, of_embeddings(mamba), inputs=x, target=3)
    value = measure(perturb_func=remove, attributions=scores, n_perturb_samples=4)
    assert value.shape == (2,) and value.isfinite().all() and value.gt(0).all()
    assert measure(perturb_func=still, attributions=scores).abs().max() <= 1e-10


@every_method
def test_sensitivity_measures_the_method(method: Any, mamba: nn.Module, ids: Tensor) -> None:
    x = embed(mamba, ids)
    attribute = method(mamba).attribute
    value = captum.metrics.sensitivity_max(attribute, x, target=3, perturb_radius=0.05, n_perturb_samples=3)
    assert value.shape == (2,) and value.isfinite().all() and value.gt(0).all()
    still = captum.metrics.sensitivity_max(attribute, x, perturb_func=lambda x: x, target=3, n_perturb_samples=2)
    assert still.shape == (2,) and still.abs().max() <= 1e-5
    with_mask = captum.metrics.sensitivity_max(
        attribute, x, target=torch.tensor([3, 5]), additional_forward_args=MASK, n_perturb_samples=2
    )
    assert with_mask.shape == (2,) and with_mask.isfinite().all()


@every_method
def test_no_warning_is_given_for_an_ordinary_call(method: Any, mamba: nn.Module, ids: Tensor) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        method(mamba).attribute(ids, target=3)
        method(mamba).attribute(embed(mamba, ids), target=3)


@every_method
def test_a_method_needs_the_model_of_a_callable_at_once(method: Any, mamba: nn.Module) -> None:
    with pytest.raises(InvalidInputError, match="model="):
        method(read_at(mamba, -1))


# --- Contrast -----------------------------------------------------------------------------------------------------

SAME_CONTRAST: dict[str, Any] = {
    "0-d tensor": torch.tensor(5),
    "1-element tensor": torch.tensor([5]),
    "1-D tensor": torch.tensor([5, 5]),
    "list": [5, 5],
    "tuple": (5,),
    "list of tuples": [(5,), (5,)],
    "negative": 5 - VOCABULARY,
}


@every_method
@pytest.mark.parametrize("contrast", SAME_CONTRAST.values(), ids=SAME_CONTRAST)
def test_a_contrast_explains_the_difference_of_two_scores(
    method: Any, contrast: Any, mamba: nn.Module, ids: Tensor
) -> None:
    def difference(ids: Tensor) -> Tensor:
        logits = read_at(mamba, -1)(ids)
        return logits[:, 3] - logits[:, 5]

    expected = method(difference, model=mamba).attribute(ids)
    for inputs in (ids, (ids,), embed(mamba, ids)):
        scores = method(mamba).attribute(inputs, target=3, contrast=contrast)
        scores = scores[0] if isinstance(scores, tuple) else scores
        assert_close(scores.sum(-1) if scores.dim() == 3 else scores, expected)


@every_gradient_method
def test_a_contrast_matters(method: Any, mamba: nn.Module, ids: Tensor) -> None:
    plain, one, other = (method(mamba).attribute(ids, target=3, contrast=contrast) for contrast in (None, 5, 7))
    assert_differ(plain, one)
    assert_differ(one, other)


def test_a_signed_score_turns_round_with_its_contrast(mamba: Any, ids: Tensor) -> None:
    """What speaks for one class speaks against the other; what passes a layer by speaks for neither."""
    mamba.backbone.layers = mamba.backbone.layers[:1].eval()
    made = METHODS["signed"](mamba)
    one, other = made.attribute(ids, target=3, contrast=5), made.attribute(ids, target=5, contrast=3)
    assert_close(one[:, :-1], -other[:, :-1])


@every_method
@pytest.mark.parametrize("form", [list, torch.tensor], ids=["list", "tensor"])
def test_contrasts_of_each_example_are_those_of_the_examples_alone(
    method: Any, form: Any, mamba: nn.Module, ids: Tensor
) -> None:
    pairs = [(3, 7), (5, 9)]
    targets, contrasts = map(list, zip(*pairs, strict=True))
    together = method(mamba).attribute(ids, target=form(targets), contrast=form(contrasts))
    alone = [
        method(mamba).attribute(ids[k : k + 1], target=target, contrast=contrast)
        for k, (target, contrast) in enumerate(pairs)
    ]
    assert_close(together, torch.cat(alone))


@every_method
def test_a_contrast_may_be_read_at_another_position(method: Any, mamba: nn.Module, ids: Tensor) -> None:
    def difference(ids: Tensor) -> Tensor:
        logits = every_position(mamba)(ids)
        return logits[:, -1, 3] - logits[:, 4, 5]

    full = method(every_position(mamba), model=mamba)
    scores = full.attribute(ids, target=(-1, 3), contrast=(4, 5))
    assert_close(scores, method(difference, model=mamba).attribute(ids))
    assert_close(full.attribute(ids, target=[(-1, 3)] * 2, contrast=[(4, 5)] * 2), scores)
    assert_differ(scores, full.attribute(ids, target=(-1, 3)))


@pytest.mark.parametrize("method", WITHOUT_GRADIENTS, ids=["rollout", "raw"])
def test_without_gradients_in_the_matrices_a_contrast_counts_by_its_position_alone(
    method: Any, mamba: nn.Module, ids: Tensor
) -> None:
    expected = method(mamba).attribute(ids, target=3)
    for contrast in (5, 7, [5, 9]):
        assert_close(method(mamba).attribute(ids, target=3, contrast=contrast), expected)


@every_method
@pytest.mark.parametrize(
    "contrast",
    [VOCABULARY, 1.5, [3], torch.tensor([3, 5, 7]), (1, 2, 3), [(3,)], "3"],
    ids=["out of range", "float", "short list", "long tensor", "long tuple", "short list of tuples", "text"],
)
def test_a_wrong_contrast_is_refused_as_a_wrong_target_is(
    method: Any, contrast: Any, mamba: nn.Module, ids: Tensor, unchanged: Any
) -> None:
    with unchanged(mamba, ids):
        with pytest.raises(AssertionError):
            method(mamba).attribute(ids, target=contrast)
        with pytest.raises(AssertionError):
            method(mamba).attribute(ids, target=3, contrast=contrast)


@every_method
def test_a_contrast_with_itself_leaves_nothing_to_explain(method: Any, mamba: nn.Module, ids: Tensor) -> None:
    with pytest.raises(ModelStateError, match="zero"):
        method(mamba).attribute(ids, target=3, contrast=3)


@every_gradient_method
def test_a_contrast_needs_a_target(method: Any, mamba: nn.Module, ids: Tensor) -> None:
    with pytest.raises(AssertionError, match="arget"):
        method(mamba).attribute(ids, contrast=3)


# --- Internal batches ---------------------------------------------------------------------------------------------

FIVE = torch.randint(1, VOCABULARY, (5, 6), generator=torch.Generator().manual_seed(2))
FIVE_MASKS = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [1] * 6, [0, 0, 0, 0, 1, 1]])
WEIGHTS = torch.rand(5, 6, generator=torch.Generator().manual_seed(3))
EACH: dict[str, dict[str, Any]] = {
    "one for all": {"target": 3},
    "list": {"target": [3, 5, 7, 9, 11]},
    "tensor": {"target": torch.tensor([3, 5, 7, 9, 11])},
    "one element": {"target": torch.tensor([3])},
    "list of tuples": {"target": [(3,), (5,), (7,), (9,), (11,)]},
    "tuple": {"target": (3,)},
    "contrast": {"target": 3, "contrast": [5, 7, 9, 11, 5]},
    "contrast as tensor": {"target": [3, 5, 7, 9, 11], "contrast": torch.tensor([5, 7, 9, 11, 5])},
    "mask": {"target": [3, 5, 7, 9, 11], "additional_forward_args": FIVE_MASKS},
    "mask in a tuple": {"target": 3, "additional_forward_args": (FIVE_MASKS,)},
    "no mask": {"target": 3, "additional_forward_args": (None,)},
    "query": {"target": 3, "query": 2},
    "query of each": {"target": [3, 5, 7, 9, 11], "query": torch.tensor([5, 4, 3, 2, -1])},
    "weights": {"target": 3, "query": WEIGHTS},
}


@pytest.mark.parametrize(
    ("method", "options"),
    [
        pytest.param(method, options, id=f"{name}-{key}")
        for name, method in METHODS.items()
        for key, options in EACH.items()
        if name in ("signed", "rollout") or key in ("mask", "weights")
    ],
)
def test_an_internal_batch_of_any_size_gives_the_same(method: Any, options: dict[str, Any], mamba: nn.Module) -> None:
    made = method(mamba)
    expected = made.attribute(FIVE, **options)
    for size in (2, 9):
        assert_close(made.attribute(FIVE, **options, internal_batch_size=size), expected, 1e-6)
    assert_close(made.attribute((FIVE,), **options, internal_batch_size=3)[0], expected, 1e-6)
    if "mask" not in options:
        x = made.attribute(embed(mamba, FIVE), **options, internal_batch_size=2)
        assert x.shape == (5, 6, 8) and x.is_contiguous()
        assert_close(x.sum(-1), expected)


@every_method
def test_the_targets_of_internal_batches_are_those_of_their_examples(method: Any, mamba: nn.Module) -> None:
    full = method(every_position(mamba), model=mamba)
    targets = [(k, 3 + k) for k in (1, 5, 2, 4, 3)]
    together = full.attribute(FIVE, target=targets, internal_batch_size=2)
    alone = [full.attribute(FIVE[k : k + 1], target=target) for k, target in enumerate(targets)]
    assert_close(together, torch.cat(alone), 1e-6)


@every_method
def test_the_model_sees_no_more_examples_than_an_internal_batch_has(method: Any, mamba: nn.Module) -> None:
    seen: list[tuple[int, int]] = []

    def forward(ids: Tensor, mask: Tensor, factor: float, note: str) -> Tensor:
        seen.append((len(ids), len(mask)))
        assert note == "note"
        return factor * mamba(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -1]

    made = method(forward, model=mamba)
    args = (FIVE_MASKS, 2.0, "note")
    expected = made.attribute(FIVE, 3, args)
    seen.clear()
    assert_close(made.attribute(FIVE, 3, args, internal_batch_size=2), expected, 1e-6)
    assert set(seen) == {(2, 2), (1, 1)}


@every_method
@pytest.mark.parametrize("size", [0, -1])
def test_an_internal_batch_without_examples_is_refused(
    method: Any, size: int, mamba: nn.Module, unchanged: Any
) -> None:
    with unchanged(mamba, FIVE), pytest.raises(InvalidInputError, match=f"at least 1, not {size}"):
        method(mamba).attribute(FIVE, target=3, internal_batch_size=size)


@every_method
def test_an_error_in_a_later_internal_batch_leaves_nothing_behind(
    method: Any, mamba: nn.Module, unchanged: Any
) -> None:
    wrong = FIVE.clone()
    wrong[4, 2] = VOCABULARY
    with unchanged(mamba, FIVE, wrong):
        with pytest.raises(AssertionError):
            method(mamba).attribute(FIVE, target=[3, 5, 7, VOCABULARY, 9], internal_batch_size=2)
        with pytest.raises(InvalidInputError, match="0 to 22"):
            method(mamba).attribute(wrong, target=3, internal_batch_size=2)


@pytest.mark.parametrize("form", [list, torch.tensor], ids=["list", "tensor"])
@pytest.mark.parametrize("which", ["target", "contrast"])
def test_targets_that_are_too_few_are_refused_also_if_they_fit_an_internal_batch(
    which: str, form: Any, mamba: nn.Module
) -> None:
    options = {"target": 7, which: form([3, 5])}
    with pytest.raises(AssertionError):
        ImplicitAttentionAttribution(mamba).attribute(FIVE[:4], **options, internal_batch_size=2)


@pytest.mark.parametrize("options", [{"query": torch.tensor([2, 3])}, {"additional_forward_args": FIVE_MASKS[:2]}])
def test_what_belongs_to_too_few_examples_is_refused_also_if_it_fits_an_internal_batch(
    options: dict[str, Any], mamba: nn.Module
) -> None:
    with pytest.raises(InvalidInputError):
        ImplicitAttentionAttribution(mamba).attribute(FIVE[:4], target=3, **options, internal_batch_size=2)


def test_an_argument_that_is_no_tensor_belongs_to_all_examples(mamba: nn.Module) -> None:
    """As for Captum, which repeats and splits tensors alone."""

    def forward(ids: Tensor, mask: Tensor, factors: list[float]) -> Tensor:
        return sum(factors) * mamba(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, -1]

    made = METHODS["signed"](forward, model=mamba)
    args = (FIVE_MASKS, [1.0, 2.0, 3.0, 4.0, 5.0])
    assert_close(made.attribute(FIVE, 3, args, internal_batch_size=2), made.attribute(FIVE, 3, args), 1e-6)


def test_the_fidelity_is_the_worst_of_all_internal_batches(mamba: nn.Module) -> None:
    made = METHODS["signed"](mamba)
    worst: dict[str, float] = {}
    for k in range(5):
        made.attribute(FIVE[k : k + 1], target=3)
        worst = {name: max(error, worst.get(name, 0.0)) for name, error in made.fidelity.items()}
    made.attribute(FIVE, target=3, internal_batch_size=1)
    assert made.fidelity == worst


@pytest.mark.parametrize("method", WITHOUT_GRADIENTS, ids=["rollout", "raw"])
def test_a_contrast_without_a_target_is_refused_where_a_target_may_be_left_out(
    method: Any, mamba: nn.Module, ids: Tensor
) -> None:
    with pytest.raises(AssertionError, match="arget"):
        method(mamba).attribute(ids, contrast=3)


# --- The method of the embedding layer ----------------------------------------------------------------------------


def at_embeddings(model: Any, forward: Any = None, **options: Any) -> Any:
    layer = model.get_input_embeddings()
    if forward is None:
        return LayerImplicitAttentionAttribution(model, layer, **options)
    return LayerImplicitAttentionAttribution(forward, layer, model=model, **options)


def caches(model: Any) -> list[Any]:
    return [module.config.use_cache for module in model.modules() if hasattr(module, "config")]


def test_the_embedding_layers_scores_are_those_of_the_tokens(family: Any, ids: Tensor) -> None:
    for rectify in ("channel", "token", None):
        expected = ImplicitAttentionAttribution(family, rectify=rectify).attribute(ids, target=3)
        scores = at_embeddings(family, rectify=rectify).attribute(ids, target=3)
        width = family.get_input_embeddings().weight.shape[1]
        assert scores.shape == (2, 7, width) and scores.is_contiguous() and not scores.requires_grad
        assert torch.equal(scores, scores[..., :1].expand_as(scores))
        assert_close(scores.sum(-1), expected)


def test_the_embedding_layers_options_hold(mamba: nn.Module, ids: Tensor) -> None:
    for options in ({"attention": "scan"}, {"without": ("gate",)}, {"tolerance": 1e-3}):
        expected = METHODS["signed"](mamba, **options).attribute(ids, target=3)
        assert_close(at_embeddings(mamba, **options).attribute(ids, target=3).sum(-1), expected)
    with pytest.raises(FidelityError):
        at_embeddings(mamba, tolerance=0.0).attribute(ids, target=3)


@pytest.mark.parametrize("target", [*SAME_TARGET.values(), [3, 5], torch.tensor([3, 5])], ids=str)
def test_the_embedding_layer_takes_every_form_of_a_target(target: Any, mamba: nn.Module, ids: Tensor) -> None:
    expected = METHODS["signed"](mamba).attribute(ids, target=target, additional_forward_args=MASK)
    for args in (MASK, (MASK,)):
        scores = at_embeddings(mamba).attribute(ids, target, args)
        assert_close(scores.sum(-1), expected)
    assert_close(at_embeddings(mamba, read_at(mamba, 4)).attribute(ids, target).sum(-1)[:, 5:] + 1, torch.ones(2, 2))


def test_the_embedding_layer_follows_its_own_output_and_not_the_inputs(mamba: nn.Module, ids: Tensor) -> None:
    """A layer method of Captum returns a tuple if the layer does."""
    made = at_embeddings(mamba)
    assert torch.equal(made.attribute((ids,), target=3), made.attribute(ids, target=3))
    assert torch.equal(made.attribute.__wrapped__(made, ids, 3), made.attribute(ids, target=3))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode], ids=["no_grad", "inference_mode"])
def test_the_grad_mode_around_the_embedding_layers_call_changes_nothing(
    mode: Any, mamba: nn.Module, ids: Tensor
) -> None:
    made = at_embeddings(mamba)
    expected = made.attribute(ids, [3, 5], MASK)
    with mode():
        target = torch.tensor([3, 5])
        assert torch.equal(made.attribute(ids.clone(), target, MASK.clone()), expected)


def test_the_embedding_layer_reads_its_forward_function_late(mamba: nn.Module, ids: Tensor) -> None:
    original = at_embeddings(mamba, read_at(mamba, -1))
    before = original.attribute(ids, target=3)
    swapped = copy.copy(original)
    swapped.forward_func = read_at(mamba, 4)
    expected = METHODS["signed"](read_at(mamba, 4), model=mamba).attribute(ids, target=3)
    assert_close(swapped.attribute(ids, target=3).sum(-1), expected)
    assert torch.equal(original.attribute(ids, target=3), before)


def test_hooks_and_caches_are_as_before_after_the_embedding_layers_call(
    family: nn.Module, ids: Tensor, unchanged: Any
) -> None:
    family(ids)  # RWKV rescales its weights when it first runs
    before = caches(family)
    assert True in before
    seen: list[Any] = []

    def forward(ids: Tensor) -> Tensor:
        output = family(ids)  # says nothing of a cache, as Captum's own callers do
        seen.extend(getattr(output, name, None) for name in ("past_key_values", "cache_params", "state"))
        return output.logits[:, -1]

    with unchanged(family, ids):
        scores = at_embeddings(family, forward).attribute(ids, target=3)
    assert_close(scores.sum(-1), METHODS["signed"](family).attribute(ids, target=3))
    assert caches(family) == before and seen and not any(cache is not None for cache in seen)


class BrokenError(RuntimeError):
    pass


def test_hooks_and_caches_are_as_before_after_an_error_of_the_embedding_layers_call(
    family: nn.Module, ids: Tensor, unchanged: Any
) -> None:
    def broken(ids: Tensor) -> Tensor:
        family(ids)
        raise BrokenError

    family(ids)
    before = caches(family)
    with unchanged(family, ids):
        with pytest.raises(BrokenError):
            at_embeddings(family, broken).attribute(ids, target=3)
        with pytest.raises(AssertionError):
            at_embeddings(family).attribute(ids, target=VOCABULARY)
        with pytest.raises(AssertionError, match="Target not provided"):
            at_embeddings(family).attribute(ids)
    assert caches(family) == before


def test_a_layer_that_is_not_the_embedding_layer_is_refused(mamba: Any) -> None:
    for layer in (nn.Embedding(VOCABULARY, 8), mamba.backbone.layers[0].mixer, mamba.lm_head, mamba):
        with pytest.raises(InvalidInputError, match=f"embedding layer.*not a {type(layer).__name__}"):
            LayerImplicitAttentionAttribution(mamba, layer)
    layer = mamba.get_input_embeddings()
    with pytest.raises(InvalidInputError, match="model="):
        LayerImplicitAttentionAttribution(read_at(mamba, -1), layer)
    with pytest.raises(InvalidInputError, match="rectify"):
        LayerImplicitAttentionAttribution(mamba, layer, rectify="row")  # type: ignore[arg-type]
    with pytest.raises(InvalidInputError, match="attention"):
        LayerImplicitAttentionAttribution(mamba, layer, attention="softmax")  # type: ignore[arg-type]


def test_what_the_embedding_layer_does_not_offer_is_refused(mamba: nn.Module, ids: Tensor, unchanged: Any) -> None:
    made = at_embeddings(mamba)
    with unchanged(mamba, ids):
        with pytest.raises(InvalidInputError, match="layer's output"):
            made.attribute(ids, target=3, attribute_to_layer_input=True)
        with pytest.raises(InvalidInputError):
            made.attribute(ids, target=3, grad_kwargs={"retain_graph": True})
        for wrong in (ids + VOCABULARY, ids[:0], ids[:, :0], ids[0]):
            with pytest.raises(InvalidInputError):
                made.attribute(wrong, target=3)
        with pytest.raises(ModelStateError, match="eval"):
            at_embeddings(copy.deepcopy(mamba).train()).attribute(ids, target=3)


def test_the_embedding_layers_method_is_one_of_captums(mamba: Any) -> None:
    made = at_embeddings(mamba)
    assert isinstance(made, LayerGradientXActivation) and isinstance(made, GradientAttribution)
    assert made.layer is mamba.get_input_embeddings() and made.forward_func is mamba
    assert made.has_convergence_delta() is False
    assert made.get_name().replace(" ", "") == "LayerImplicitAttentionAttribution"


@pytest.mark.parametrize("padded, kept", [(None, 1), ("left", 1), ("right", 4)])
def test_logits_of_the_tokens_before_the_explained_one_are_not_computed(padded: Any, kept: int, mamba: Any) -> None:
    """The head gets the last token alone, or with right padding all from the first example's last real one on."""
    ids, mask = torch.randint(1, VOCABULARY, (2, 7)), torch.ones(2, 7, dtype=torch.long)
    if padded is not None:
        mask[0, slice(4, None) if padded == "right" else slice(3)] = 0
    args, seen = (() if padded is None else (mask,)), []
    with torch.no_grad():
        logits = mamba(ids, attention_mask=mask, use_cache=False).logits
    last = [6 if padded != "right" else 3, 6]
    hook = mamba.lm_head.register_forward_pre_hook(lambda head, args: seen.append(args[0].shape[1]))
    found = run_model(mamba, ids, *args)
    hook.remove()
    assert_close(found, logits[[0, 1], last])
    assert seen == [kept]


def test_the_output_layer_has_all_tokens_where_it_is_read_itself(mamba: Any) -> None:
    """A neuron of the output layer is the logit of the token that the selector names."""
    ids, place = torch.randint(1, VOCABULARY, (2, 7)), (3, 5)

    def logit(ids: Tensor) -> Tensor:
        logits: Tensor = mamba(ids, use_cache=False).logits
        return logits[:, 3]

    of_neuron = NeuronImplicitAttentionRelevance(mamba, "lm_head").attribute(ids, place, baselines=0)
    assert_close(of_neuron, ImplicitAttentionRelevance(logit, mamba).attribute(ids, 5, baselines=0))
    at_head = LayerImplicitAttentionRelevance(mamba, "lm_head").attribute(ids, 5, baselines=0)
    assert at_head.shape == (2, 7, mamba.config.hidden_size) and not at_head[:, :-1].any() and at_head[:, -1].any()


@every_method
def test_a_text_as_long_as_the_layers_are_wide(method: Any, mamba: Any) -> None:
    """The vector that the head gets for the last token is no sequence of L channels."""
    L = mamba.config.hidden_size
    ids = torch.randint(1, VOCABULARY, (2, L))

    def read_whole(ids: Tensor) -> Tensor:
        logits: Tensor = mamba(ids, use_cache=False).logits
        return logits[:, -1]

    assert_close(method(mamba).attribute(ids, target=3), method(read_whole, model=mamba).attribute(ids, target=3))
    one = functools.partial(run_model, mamba)  # a function of the caller's that leaves logits out
    assert_close(method(one, model=mamba).attribute(ids, target=3), method(mamba).attribute(ids, target=3))
