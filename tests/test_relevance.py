"""Relevance adds up to what it explains, on every family and in every form of a call, and is a Captum method."""

import copy
import functools
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import transformers as hf
from captum.attr import GradientAttribution, NoiseTunnel
from torch import Tensor, nn

from captum_ssm import (
    FidelityError,
    ImplicitAttentionRelevance,
    InvalidInputError,
    ModelStateError,
    UnsupportedModelError,
    models,
    register_rule,
    unregister_rule,
)
from captum_ssm.attr import relevance as relevance_module
from captum_ssm.relevance import own_projections
from captum_ssm.relevance.own_outputs import OwnOutputs
from captum_ssm.relevance.own_projections import OwnProjections
from captum_ssm.relevance.run import Run
from tests.conftest import build
from tests.families import FAMILIES, VOCABULARY, perturbed
from tests.oracles import s6
from tests.oracles_relevance import mamba_lrp

Relevance = ImplicitAttentionRelevance
TARGET, OTHER, BASELINE = 3, 8, 5
IDS = torch.randint(1, VOCABULARY, (2, 7), generator=torch.Generator().manual_seed(14))
PADDED = torch.cat([IDS[:1], torch.cat([IDS[1:, :4], torch.zeros(1, 3, dtype=torch.long)], 1)])
MASK = torch.tensor([[1, 1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0, 0]])

RULES: dict[str, tuple[dict[str, Any], Any]] = {
    "half": ({"gate_rule": "half"}, None),
    "value": ({"gate_rule": "value"}, None),
    "difference": ({}, BASELINE),
}
"""What a method is made with, and the baselines of its call."""
every_rule = pytest.mark.parametrize("rule", RULES)
every_family = pytest.mark.parametrize("family", FAMILIES)
both = pytest.mark.parametrize("baselines", [None, BASELINE], ids=["frozen", "difference"])
SEVERAL = ["mamba", "rwkv", "recurrent_gemma", "qwen3_5", "jamba"]
several_families = pytest.mark.parametrize("family", SEVERAL)


@functools.cache
def model_of(family: str) -> Any:
    """Return the family's model, shared by the tests: that a call leaves it as it was is a test of its own."""
    return build(family)


@functools.cache
def of_wide_type(family: str) -> Any:
    """Return the family's model in float64, shared too."""
    return of_type(build(family), torch.float64)


@functools.cache
def of_half_type(family: str) -> Any:
    """Return the family's model in bfloat16, shared too."""
    return of_type(build(family), torch.bfloat16)


def of_type(model: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Return the model in another type, and with experts that run in any."""
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"
    return model.to(dtype)


def score(model: nn.Module, inputs: Tensor, target: int = TARGET, mask: Tensor | None = None) -> Tensor:
    """The plain model's logit at the last real token."""
    name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
    with torch.no_grad():
        logits = model(**{name: inputs}, attention_mask=mask, use_cache=False).logits
    if logits.dim() == 3:
        last = torch.full((len(inputs),), inputs.shape[1] - 1) if mask is None else mask.sum(1) - 1
        logits = logits[torch.arange(len(inputs)), last]
    return logits[:, target]


def assert_adds_up(
    method: Relevance, relevance: Tensor, value: Tensor, reference: Tensor | None, tolerance: float = 1e-3
) -> None:
    """The relevance and the terms sum to ``value``, or to ``value - reference``, within rounding."""
    assert relevance.isfinite().all() and relevance.ne(0).any()
    total = relevance.flatten(1).sum(1) + sum(method.terms.values())
    explained = value if reference is None else value - reference
    size = relevance.flatten(1).abs().sum(1) + value.abs() + (0 if reference is None else reference.abs())
    error = (total.double() - explained.double()).abs()
    assert (error <= tolerance * size).all(), f"{float((error / size).max()):.1e}"
    if tolerance >= 1e-4:
        assert error.max() <= tolerance * explained.abs().max(), f"{float(error.max() / explained.abs().max()):.1e}"


def assert_close(actual: Tensor, expected: Tensor, tolerance: float = 1e-5) -> None:
    assert actual.shape == expected.shape
    assert expected.abs().max() > 0
    difference = (actual.double() - expected.double()).abs().max()
    assert difference <= tolerance * expected.abs().max(), f"{difference / expected.abs().max():.1e}"


def assert_differ(one: Tensor, other: Tensor) -> None:
    assert (one - other).abs().max() > 1e-3 * one.abs().max()


def embed(model: Any, ids: Tensor) -> Tensor:
    return model.get_input_embeddings()(ids).detach()


def last_logits(model: nn.Module) -> Callable[..., Tensor]:
    """A callable as a user of Captum writes it, for ids and for embeddings."""

    def forward(inputs: Tensor, mask: Tensor | None = None) -> Tensor:
        name = "inputs_embeds" if inputs.is_floating_point() else "input_ids"
        return model(**{name: inputs}, attention_mask=mask, use_cache=False).logits[:, -1]

    return forward


# --- Completeness -------------------------------------------------------------------------------------------------


@every_family
@every_rule
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_the_relevance_adds_up_to_what_the_model_gives(family: str, rule: str, dtype: torch.dtype) -> None:
    """Also where the reference would have gone to other experts, which is a term of its own then."""
    options, baselines = RULES[rule]
    model = model_of(family) if dtype == torch.float32 else of_wide_type(family)
    method = Relevance(model, **options)
    relevance = method.attribute(IDS, TARGET, baselines=baselines)
    assert relevance.shape == IDS.shape and not relevance.requires_grad
    value, reference = score(model, IDS), score(model, torch.full_like(IDS, BASELINE))
    tolerance = 1e-3 if dtype == torch.float32 else 1e-6
    assert_adds_up(method, relevance, value, None if baselines is None else reference, tolerance)
    own_precision = 1e-12 if baselines is None else 1e-6  # transformers computes parts of its layers in float32
    assert method.completeness <= (1e-5 if dtype == torch.float32 else own_precision)
    assert set(method.terms) == ({"bias"} if baselines is None else {"decisions"} if method.held else set())


@every_family
@pytest.mark.parametrize("rule", ["half", "difference"])
def test_padding_has_no_relevance_and_changes_none(family: str, rule: str) -> None:
    options, baselines = RULES[rule]
    model = model_of(family)
    method = Relevance(model, **options)
    relevance = method.attribute(PADDED, TARGET, MASK, baselines=baselines)
    assert relevance[MASK == 0].eq(0).all()
    reference = None
    if baselines is not None:
        reference = score(model, torch.where(MASK.bool(), BASELINE, PADDED), TARGET, MASK)
    assert_adds_up(method, relevance, score(model, PADDED, TARGET, MASK), reference)
    alone = Relevance(model, **options).attribute(PADDED[1:, :4], TARGET, baselines=baselines)
    assert_close(relevance[1:, :4], alone, 1e-4)


@pytest.mark.parametrize("family", ["mamba", "mamba2", "jamba", "qwen3_5", "lfm2"])
@both
def test_padding_on_the_left_changes_nothing(family: str, baselines: Any) -> None:
    model = model_of(family)
    ids = torch.cat([torch.zeros(1, 3, dtype=torch.long), IDS[1:, :4]], 1)
    relevance = Relevance(model).attribute(ids, TARGET, MASK[1:].flip(1), baselines=baselines)
    assert relevance[:, :3].eq(0).all()
    assert_close(relevance[:, 3:], Relevance(model).attribute(IDS[1:, :4], TARGET, baselines=baselines), 1e-4)


CONFIGURATIONS: dict[str, tuple[str, dict[str, Any]]] = {
    "biases": ("mamba", {"use_bias": True, "num_hidden_layers": 3}),
    "no convolution bias": ("mamba", {"use_conv_bias": False, "state_size": 5}),
    "gelu": ("mamba", {"hidden_act": "gelu"}),
    "relu": ("mamba", {"hidden_act": "relu"}),
    "one state": ("falcon_mamba", {"state_size": 1}),
    "one group": ("mamba2", {"n_groups": 1, "use_bias": True}),
    "chunks": ("mamba2", {"chunk_size": 2}),
    "more heads": ("qwen3_5", {"linear_num_value_heads": 6, "linear_num_key_heads": 3}),
    "no rescaling": ("rwkv", {"rescale_every": 0, "num_hidden_layers": 2}),
    "wide window": ("recurrent_gemma", {"attention_window_size": 16}),
    "other chunks": ("xlstm", {"chunk_size": 2}),
    "no decay factor": ("minimax", {"linear_attn_alpha_factor": 1.0}),
}


@pytest.mark.parametrize("name", CONFIGURATIONS)
@every_rule
def test_other_configurations_and_seeds_add_up_too(name: str, rule: str) -> None:
    family, changes = CONFIGURATIONS[name]
    options, baselines = RULES[rule]
    for seed in (1,):
        model = perturbed(FAMILIES[family].build(**changes), seed=seed, std=0.1)
        ids = torch.randint(1, VOCABULARY, (3, 5 + seed), generator=torch.Generator().manual_seed(seed))
        method = Relevance(model, **options)
        relevance = method.attribute(ids, TARGET, baselines=baselines)
        reference = None if baselines is None else score(model, torch.full_like(ids, BASELINE))
        assert_adds_up(method, relevance, score(model, ids), reference)


@several_families
@both
def test_a_single_token_adds_up(family: str, baselines: Any) -> None:
    model, method = model_of(family), Relevance(model_of(family))
    relevance = method.attribute(IDS[:, :1], TARGET, baselines=baselines)
    reference = None if baselines is None else score(model, torch.full((2, 1), BASELINE))
    assert_adds_up(method, relevance, score(model, IDS[:, :1]), reference)


@several_families
@both
def test_the_future_of_the_explained_token_has_no_relevance(family: str, baselines: Any) -> None:
    model = model_of(family)
    at = Relevance(lambda ids: model(input_ids=ids, use_cache=False).logits, model=model)
    relevance = at.attribute(IDS, (3, TARGET), baselines=baselines)
    assert relevance[:, 4:].eq(0).all()
    assert_close(relevance[:, :4], Relevance(model).attribute(IDS[:, :4], TARGET, baselines=baselines), 1e-4)


@several_families
@both
def test_the_relevance_of_a_contrast_is_the_difference_of_relevances(family: str, baselines: Any) -> None:
    model, method = model_of(family), Relevance(model_of(family))
    one, other = (method.attribute(IDS, target, baselines=baselines) for target in (TARGET, OTHER))
    relevance = method.attribute(IDS, TARGET, contrast=OTHER, baselines=baselines)
    assert_close(relevance, one - other, 1e-4)
    value, reference = (score(model, i) - score(model, i, OTHER) for i in (IDS, torch.full_like(IDS, BASELINE)))
    assert_adds_up(method, relevance, value, None if baselines is None else reference)


@both
def test_targets_and_contrasts_of_each_example(baselines: Any, mamba: nn.Module) -> None:
    together = Relevance(mamba).attribute(IDS, [3, 5], contrast=[8, 9], baselines=baselines)
    for row, (target, contrast) in enumerate([(3, 8), (5, 9)]):
        alone = Relevance(mamba).attribute(IDS[row : row + 1], target, contrast=contrast, baselines=baselines)
        assert_close(together[row : row + 1], alone)


@both
def test_a_callable_of_one_score_each_adds_up(baselines: Any, mamba: nn.Module) -> None:
    logits = last_logits(mamba)
    method = Relevance(lambda ids: logits(ids)[:, TARGET], model=mamba)
    relevance = method.attribute(IDS, baselines=baselines)
    assert_close(relevance, Relevance(mamba).attribute(IDS, TARGET, baselines=baselines))
    nonlinear = Relevance(lambda ids: torch.log_softmax(logits(ids), -1), model=mamba)
    relevance = nonlinear.attribute(IDS, TARGET, baselines=baselines)
    values = [logits(ids).log_softmax(-1)[:, TARGET].detach() for ids in (IDS, torch.full_like(IDS, BASELINE))]
    assert_adds_up(nonlinear, relevance, values[0], None if baselines is None else values[1])


CLASSIFIERS = {
    "JambaForSequenceClassification": "jamba",
    "Zamba2ForSequenceClassification": "zamba2",
    "Qwen3NextForSequenceClassification": "qwen3_next",
}


@pytest.mark.parametrize("name", CLASSIFIERS)
@every_rule
def test_a_classification_head_adds_up(name: str, rule: str) -> None:
    options, baselines = RULES[rule]
    config = copy.deepcopy(model_of(CLASSIFIERS[name]).config)
    config.pad_token_id, config.num_labels = 0, 3
    torch.manual_seed(0)
    model = perturbed(getattr(hf, name)(config))
    method = Relevance(model, **options)
    relevance = method.attribute(PADDED, 2, MASK, baselines=baselines)
    assert relevance[MASK == 0].eq(0).all()
    reference = None
    if baselines is not None:
        reference = score(model, torch.where(MASK.bool(), BASELINE, PADDED), 2, MASK)
    assert_adds_up(method, relevance, score(model, PADDED, 2, MASK), reference)


# --- MambaLRP -----------------------------------------------------------------------------------------------------


def test_half_of_a_gate_is_the_rule_of_mamba_lrp(mamba: nn.Module) -> None:
    relevance = Relevance(mamba, gate_rule="half").attribute(IDS, TARGET)
    assert_close(relevance, mamba_lrp(copy.deepcopy(mamba), IDS, TARGET))
    value = Relevance(mamba, gate_rule="value").attribute(IDS, TARGET)
    assert_close(value, mamba_lrp(copy.deepcopy(mamba), IDS, TARGET, gate=0.0))
    assert_differ(relevance, value)


def test_the_shipped_model_has_the_relevance_of_mamba_lrp() -> None:
    model = hf.AutoModelForCausalLM.from_pretrained(models.REVIEWS)
    ids = hf.AutoTokenizer.from_pretrained(models.REVIEWS)("a gorgeous, witty film", return_tensors="pt").input_ids
    assert_close(Relevance(model).attribute(ids, 7), mamba_lrp(copy.deepcopy(model), ids, 7))


@pytest.mark.parametrize("rule", ["half", "value"])
def test_a_token_that_acts_through_gates_alone_has_relevance_only_with_a_reference(rule: Any, mamba: Any) -> None:
    """What the values do not hold, frozen gates do not see: here the rows of the input that are not gates are 0."""
    mixer = mamba.backbone.layers[0].mixer
    del mamba.backbone.layers[1:]
    with torch.no_grad():
        mixer.in_proj.weight[: mixer.intermediate_size] = 0
        mixer.conv1d.bias.fill_(1.0)
    frozen = Relevance(mamba, gate_rule=rule).attribute(IDS, TARGET)
    compared = Relevance(mamba).attribute(IDS, TARGET, baselines=BASELINE)
    # only the last token's own gate and its residual count
    assert frozen[:, :-1].eq(0).all() and compared[:, :-1].abs().max() <= 1e-6
    assert frozen[:, -1].ne(0).all() and compared[:, -1].ne(0).all()


# --- Baselines ----------------------------------------------------------------------------------------------------


@several_families
def test_a_reference_equal_to_the_input_leaves_nothing_to_explain(family: str) -> None:
    method = Relevance(model_of(family))
    relevance, delta = method.attribute(IDS, TARGET, baselines=IDS, return_convergence_delta=True)
    assert relevance.eq(0).all() and not method.held and method.terms == {}
    assert delta.abs().max() <= 1e-4


def test_padding_is_its_own_reference() -> None:
    """So it decides nothing."""
    method = Relevance(model_of("jamba"))
    relevance = method.attribute(PADDED, TARGET, MASK, baselines=torch.where(MASK.bool(), PADDED, BASELINE))
    assert relevance.eq(0).all() and method.held == set() and method.terms == {}


@several_families
def test_tokens_that_are_the_same_in_the_reference_have_no_relevance(family: str) -> None:
    reference = IDS.clone()
    reference[:, 2] = BASELINE
    relevance = Relevance(model_of(family)).attribute(IDS, TARGET, baselines=reference)
    changed = IDS[:, 2] != BASELINE
    assert relevance[changed, 2].ne(0).all() and changed.any()
    relevance[:, 2] = 0
    assert relevance.eq(0).all()


@pytest.mark.parametrize("family", [family for family in SEVERAL if family != "jamba"])
def test_exchanging_input_and_reference_turns_every_sign(family: str) -> None:
    """Without decisions, which are the input's. What changed last with the one has changed first with the other."""
    model = model_of(family)
    reference = IDS.flip(1)
    there = Relevance(model, value_share=0.8).attribute(IDS, TARGET, baselines=reference)
    back = Relevance(model, value_share=0.2).attribute(reference, TARGET, baselines=IDS)
    assert_close(back, -there, 1e-4)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_whatever_the_share_of_a_value_relevance_adds_up(share: float, mamba: nn.Module) -> None:
    found, halves = (Relevance(mamba, value_share=part) for part in (share, 0.5))
    relevance = found.attribute(IDS, TARGET, baselines=BASELINE)
    other = halves.attribute(IDS, TARGET, baselines=BASELINE)
    assert_close(relevance.sum(1), other.sum(1))
    assert (relevance - other).abs().max() > 1e-3 * other.abs().max(), "the tokens divide it otherwise"


def forms_of_a_baseline(model: nn.Module) -> dict[str, Any]:
    x = embed(model, torch.full_like(IDS, BASELINE))
    return {
        "tuple": (BASELINE,),
        "0-d": torch.tensor(BASELINE),
        "ids of one sequence": torch.full((7,), BASELINE),
        "ids of one example": torch.full((1, 7), BASELINE),
        "ids": torch.full_like(IDS, BASELINE),
        "ids of a narrower type": torch.full_like(IDS, BASELINE, dtype=torch.int32),
        "ids in a tuple": (torch.full_like(IDS, BASELINE),),
        "an embedding": x[0, 0],
        "embeddings of one sequence": x[0],
        "embeddings": x,
        "a list of one": [BASELINE],
    }


@pytest.mark.parametrize("form", list(forms_of_a_baseline(build("mamba"))))
def test_every_form_of_a_baseline_is_the_same_reference(form: str, mamba: nn.Module) -> None:
    expected = Relevance(mamba).attribute(IDS, TARGET, baselines=BASELINE)
    found = Relevance(mamba).attribute(IDS, TARGET, baselines=forms_of_a_baseline(mamba)[form])
    assert_close(found, expected)


def test_a_list_of_baselines_is_averaged(mamba: nn.Module) -> None:
    several: list[Any] = [5, IDS.flip(1), embed(mamba, IDS).mean((0, 1))]
    method = Relevance(mamba)
    alone = [method.attribute(IDS, TARGET, baselines=one) for one in several]
    together, delta = method.attribute(IDS, TARGET, baselines=several, return_convergence_delta=True)
    assert_close(together, torch.stack(alone).mean(0))
    assert_differ(together, alone[0])
    assert delta.shape == (2,) and delta.abs().max() <= 1e-4
    two = method.attribute(IDS, TARGET, baselines=[5, 6])  # not one for each example
    assert_close(two, (alone[0] + method.attribute(IDS, TARGET, baselines=6)) / 2)


@every_family
def test_references_of_one_run_are_those_of_a_run_each(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    method, several = Relevance(model_of(family)), [5, 6, IDS.flip(1)]
    arguments: Any = {"target": [TARGET, OTHER], "additional_forward_args": MASK, "contrast": 4}

    def explained(baselines: Any) -> tuple[Tensor, Tensor, dict[str, Tensor], set[str]]:
        scores, delta = method.attribute(IDS, **arguments, baselines=baselines, return_convergence_delta=True)
        return scores, delta, method.terms, method.held

    together = explained(several)
    each = [explained(baseline) for baseline in several]
    monkeypatch.setattr(relevance_module, "_TOKENS", 1)
    one_by_one = explained(several)
    for scores, delta, terms, held in (together, one_by_one):
        assert_close(scores, torch.stack([one[0] for one in each]).mean(0))
        assert delta.shape == (2,) and delta.abs().max() <= 1e-3
        assert held == set().union(*(one[3] for one in each))
        for name, term in terms.items():
            expected = torch.stack([one[2].get(name, torch.zeros(2)) for one in each]).mean(0)
            assert (term - expected).abs().max() <= 1e-5  # of logits of size 1


def test_references_of_several_kinds_or_of_a_callable_have_a_run_each(
    mamba: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A callable may treat the examples of a batch together, and is never given more than it was called with."""
    sizes: list[int] = []

    def logits(ids: Tensor) -> Tensor:
        sizes.append(len(ids))
        return mamba(ids, use_cache=False).logits[:, -1]

    Relevance(logits, mamba).attribute(IDS, TARGET, baselines=[5, 6])
    assert {*sizes} == {2}
    runs = []
    explain = Run.explain
    monkeypatch.setattr(Run, "explain", lambda run, **options: runs.append(run) or explain(run, **options))  # type: ignore[func-returns-value]
    for baselines in ([5, 6.0], [5, embed(mamba, IDS)], [1.0, 2.0]):
        runs.clear()
        Relevance(mamba).attribute(IDS, TARGET, baselines=baselines)
        assert len(runs) == 2
    runs.clear()
    Relevance(mamba).attribute(IDS, TARGET, baselines=[5, 6])
    assert len(runs) == 1


@pytest.mark.parametrize("baselines", [BASELINE, [BASELINE, None], [BASELINE, 6], [None, 6, BASELINE]])
def test_the_mixers_own_code_runs_once_for_several_references(
    baselines: Any, mamba: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Besides the plain run of the model on each reference."""
    monkeypatch.setattr(relevance_module, "_TOKENS", 1)
    mixer = mamba.get_submodule("backbone.layers.0.mixer")
    runs, forward = [], type(mixer).forward

    @functools.wraps(forward)
    def counted(layer: Any, *args: Any, **kwargs: Any) -> Any:
        runs.extend([1] if layer.layer_idx == 0 else [])
        return forward(layer, *args, **kwargs)

    monkeypatch.setattr(type(mixer), "forward", counted)
    Relevance(mamba).attribute(IDS, TARGET, baselines=baselines)
    plain = sum(one is not None for one in (baselines if isinstance(baselines, list) else [baselines]))
    assert len(runs) == 1 + plain and "forward" not in vars(mixer)


@both
@pytest.mark.parametrize("family", ["mamba", "mamba2", "recurrent_gemma", "qwen3_5"])
def test_projections_of_the_own_code_change_nothing(
    family: str, baselines: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are what the decomposition would compute for the value."""
    monkeypatch.setattr(own_projections, "_LARGE", 1)
    method, used = Relevance(copy.deepcopy(model_of(family)).double()), []
    value = OwnProjections.value

    def noted(known: OwnProjections, *args: Any) -> Tensor | None:
        y = value(known, *args)
        if y is not None:
            used.append((y, torch.nn.functional.linear(*args)))
        return y

    monkeypatch.setattr(OwnProjections, "value", noted)
    shared = method.attribute(IDS, TARGET, baselines=baselines)
    assert used and all(torch.allclose(y, linear, rtol=0, atol=1e-12) for y, linear in used)
    monkeypatch.setattr(OwnProjections, "value", lambda *_: None)
    alone = method.attribute(IDS, TARGET, baselines=baselines)
    assert (shared - alone).abs().max() <= 1e-12 * alone.abs().max()


@pytest.mark.parametrize("family", ["mamba", "mamba2", "recurrent_gemma", "qwen3_5"])
@pytest.mark.parametrize("checkpoints, autocast", [(True, False), (False, True), (True, True)])
def test_projections_of_the_own_code_in_blocks_that_run_again_and_in_narrower_types(
    family: str, checkpoints: bool, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both runs of a block keep the same tensors; a projection that autocast has rounded is made again."""
    method, model = Relevance(model_of(family), checkpoints=checkpoints), model_of(family)
    found = []
    for large in (1, 2**62):
        monkeypatch.setattr(own_projections, "_LARGE", large)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            found.append(method.attribute(IDS, TARGET, baselines=BASELINE))
    assert (found[0] - found[1]).abs().max() <= 1e-5 * found[1].abs().max()
    assert not any(part._forward_hooks for part in model.modules())


@pytest.mark.parametrize("bias", [True, False])
def test_a_projection_is_known_for_the_same_entries_in_memory(
    bias: bool, mamba: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(own_projections, "_LARGE", 1)
    mixer, own, x = mamba.get_submodule("backbone.layers.0.mixer"), OwnProjections(), torch.randn(2, 5, 4)
    part = mixer.part = nn.Linear(4, 6, bias)
    with torch.no_grad():
        own.watch(mixer)
        y = part(x)
    rows = [part.weight[1:4], *([part.bias[1:4]] if bias else [])]
    leaf = x.detach().requires_grad_()
    known = own.value(leaf, *rows)
    assert known is not None and known.is_contiguous() and torch.equal(known, y[..., 1:4])
    (gradient,) = torch.autograd.grad(known.sum(), leaf)
    assert_close(gradient, part.weight[1:4].sum(0).expand_as(x))
    others = [(x.clone(), *rows), (x, part.weight[::2], *rows[1:]), (x, part.weight[1:4].clone(), *rows[1:])]
    others += [(x, rows[0], torch.zeros(3))] + ([(x, rows[0], part.bias[2:5]), (x, rows[0])] if bias else [])
    assert all(own.value(*other) is None for other in others)
    y.add_(1)  # as the own code may
    assert own.value(x, *rows) is None
    own.forget()
    part(x)
    assert not own._known and not part._forward_hooks


@torch.no_grad()
def test_own_outputs_are_kept_for_the_same_input_alone(mamba: nn.Module) -> None:
    mixer, own = mamba.get_submodule("backbone.layers.0.mixer"), OwnOutputs()
    x = torch.randn(2, 7, mixer.hidden_size)  # type: ignore[call-overload]
    expected = mixer(x)

    def run(x: Tensor) -> Tensor:
        with ExitStack() as stack:
            own.attach(mamba, stack)
            return mixer(x)

    run(x).zero_()  # as a hook may
    run(x).zero_()
    assert torch.equal(run(x * (1 + 1e-6)), expected)
    assert torch.equal(run(x * (1 + 1e-3)), mixer(x * (1 + 1e-3)))
    assert torch.equal(run(x[:1]), mixer(x[:1])) and torch.equal(run(x), expected)
    mixer.get_submodule("in_proj").register_forward_hook(lambda module, args, output: 2 * output)
    assert torch.equal(run(x), mixer(x)) and not torch.equal(run(x), expected)


def test_the_terms_of_several_baselines_are_averaged() -> None:
    model, method = model_of("jamba"), Relevance(model_of("jamba"))
    several = [BASELINE, IDS]  # the second decides as the input does
    relevance = method.attribute(IDS, TARGET, baselines=several)
    assert method.held == {"topk"}
    expected = score(model, IDS) - (score(model, torch.full_like(IDS, BASELINE)) + score(model, IDS)) / 2
    assert_close(relevance.sum(1) + method.terms["decisions"], expected, 1e-4)


def test_a_baseline_of_each_example_is_that_of_the_example_alone(mamba: nn.Module) -> None:
    reference = IDS.roll(1, 1)
    together = Relevance(mamba).attribute(IDS, TARGET, baselines=reference)
    alone = [
        Relevance(mamba).attribute(IDS[k : k + 1], TARGET, baselines=reference[k : k + 1]) for k in range(len(IDS))
    ]
    assert_close(together, torch.cat(alone))


# --- Embeddings ---------------------------------------------------------------------------------------------------


@several_families
@every_rule
def test_the_components_of_an_embedding_share_the_relevance_of_their_token(family: str, rule: str) -> None:
    options, baselines = RULES[rule]
    model = model_of(family)
    x = embed(model, IDS)
    reference = None if baselines is None else embed(model, torch.full_like(IDS, BASELINE))
    method = Relevance(model, **options)
    relevance = method.attribute(x, TARGET, baselines=reference)
    assert relevance.shape == x.shape
    assert_close(relevance.sum(-1), Relevance(model, **options).attribute(IDS, TARGET, baselines=baselines), 1e-4)
    assert_adds_up(method, relevance, score(model, x), None if reference is None else score(model, reference))


@pytest.mark.parametrize("baselines", [0, 0.0, 0.25, (0.25,), torch.tensor(0.25), torch.full((8,), 0.25)], ids=str)
def test_a_number_is_a_reference_for_embeddings(baselines: Any, mamba: nn.Module) -> None:
    x, method = embed(mamba, IDS), Relevance(mamba)
    relevance = method.attribute(x, TARGET, baselines=baselines)
    number = baselines[0] if isinstance(baselines, tuple) else baselines
    reference = torch.zeros_like(x) + number
    assert_adds_up(method, relevance, score(mamba, x), score(mamba, reference))
    if isinstance(baselines, float) and baselines:  # of ids an integer is a token
        assert_close(Relevance(mamba).attribute(IDS, TARGET, baselines=baselines), relevance.sum(-1))


@both
def test_a_tuple_goes_in_and_a_tuple_comes_out(baselines: Any, mamba: nn.Module) -> None:
    for inputs in (IDS, embed(mamba, IDS)):
        alone = Relevance(mamba).attribute(inputs, TARGET, baselines=baselines)
        inside = Relevance(mamba).attribute((inputs,), TARGET, baselines=None if baselines is None else (baselines,))
        assert type(inside) is tuple and len(inside) == 1
        assert torch.equal(inside[0], alone)
        (with_delta,), delta = Relevance(mamba).attribute(
            (inputs,), TARGET, baselines=baselines, return_convergence_delta=True
        )
        assert torch.equal(with_delta, alone) and delta.shape == (2,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_the_relevance_has_the_type_of_the_embeddings(dtype: torch.dtype, mamba: nn.Module) -> None:
    model = mamba.to(dtype)
    assert Relevance(model).attribute(embed(model, IDS), TARGET).dtype == dtype


# --- Options ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["mamba", "jamba"])
@both
def test_what_speaks_for_and_against_is_the_net_relevance(family: str, baselines: Any) -> None:
    method = Relevance(model_of(family))
    net = method.attribute(IDS, TARGET, baselines=baselines)
    positive, negative = (method.attribute(IDS, TARGET, baselines=baselines, sign=s) for s in ("positive", "negative"))
    assert positive.ge(0).all() and negative.le(0).all()
    assert_close(positive + negative, net, 1e-4)
    assert_differ(positive, net)  # components of one embedding disagree
    x = embed(method.model, IDS)
    reference = None if baselines is None else embed(method.model, torch.full_like(IDS, BASELINE))
    whole = method.attribute(x, TARGET, baselines=reference)
    assert_close(method.attribute(x, TARGET, baselines=reference, sign="positive"), whole.clamp_min(0))
    assert_close(method.attribute(x, TARGET, baselines=reference, sign="negative"), whole.clamp_max(0))
    assert_close(whole.clamp_min(0).sum(-1), positive, 1e-4)


@pytest.mark.parametrize("family", ["mamba", "mamba2", "falcon_h1"])
@both
def test_the_skip_apart_adds_up_too(family: str, baselines: Any) -> None:
    model, whole = model_of(family), Relevance(model_of(family))
    net = whole.attribute(IDS, TARGET, baselines=baselines)
    assert Relevance(model, apart=["skip"]).apart == Relevance(model, apart="skip").apart == ("skip",)
    for apart in [("skip",)]:
        method = Relevance(model, apart=apart)
        relevance = method.attribute(IDS, TARGET, baselines=baselines)
        reference = None if baselines is None else score(model, torch.full_like(IDS, BASELINE))
        assert_adds_up(method, relevance, score(model, IDS), reference)
        assert method.terms["skip"].shape == (2,) and method.terms["skip"].ne(0).all()
        assert_differ(relevance, net)
        assert_close(relevance.sum(1) + method.terms["skip"], net.sum(1), 1e-3)
    without = copy.deepcopy(model)
    for module in without.modules():
        if isinstance(getattr(module, "D", None), nn.Parameter):
            module.get_parameter("D").data.zero_()
    none = Relevance(without, apart="skip")
    assert_close(
        none.attribute(IDS, TARGET, baselines=baselines),
        Relevance(without).attribute(IDS, TARGET, baselines=baselines),
        1e-4,
    )
    assert none.terms["skip"].abs().max() <= 1e-6


def test_the_skip_is_what_passes_one_layer_beside_its_recurrence(mamba: Any) -> None:
    """With frozen gates and one layer it is what the direct path adds to the score, norms held."""
    del mamba.backbone.layers[1:]
    method = Relevance(mamba, apart="skip", gate_rule="value")
    block, x = mamba.backbone.layers[0], embed(mamba, IDS)
    with torch.no_grad():
        block.mixer.conv1d.bias.zero_()  # what a bias sends through the skip belongs to the bias
        method.attribute(IDS, TARGET)
        pieces = s6(block.mixer, block.norm(x))
        direct = (pieces["skip"] * pieces["v"] * pieces["gate"]) @ block.mixer.out_proj.weight.T
        h = x + pieces["y"]
        scale = (h.square().mean(-1, keepdim=True) + mamba.backbone.norm_f.variance_epsilon).rsqrt()
        expected = mamba.lm_head((mamba.backbone.norm_f.weight * scale * direct)[:, -1])[:, TARGET]
    assert_close(method.terms["skip"], expected)


@pytest.mark.parametrize("family", ["rwkv", "lfm2", "recurrent_gemma"])
@both
def test_a_family_without_a_skip_has_nothing_apart(family: str, baselines: Any) -> None:
    method = Relevance(model_of(family), apart="skip")
    relevance = method.attribute(IDS, TARGET, baselines=baselines)
    assert method.terms["skip"].eq(0).all()
    assert_close(relevance, Relevance(model_of(family)).attribute(IDS, TARGET, baselines=baselines))


@pytest.mark.parametrize("family", ["mamba", "rwkv", "jamba", "qwen4_exp"])
@every_rule
def test_checkpoints_change_nothing(family: str, rule: str) -> None:
    options, baselines = RULES[rule]
    model = model_of(family)
    one, other = (Relevance(model, checkpoints=c, **options) for c in (False, True))
    expected, delta = one.attribute(IDS, TARGET, baselines=baselines, return_convergence_delta=True)
    found, again = other.attribute(IDS, TARGET, baselines=baselines, return_convergence_delta=True)
    assert_close(found, expected)
    assert (delta - again).abs().max() <= 1e-4
    assert one.held == other.held and one.fidelity.keys() == other.fidelity.keys()
    for name, term in one.terms.items():
        assert (other.terms[name] - term).abs().max() <= 1e-4


@pytest.mark.parametrize("family", ["mamba", "jamba"])
@both
def test_a_few_examples_at_a_time_are_all_examples(family: str, baselines: Any) -> None:
    model = model_of(family)
    ids = torch.randint(1, VOCABULARY, (5, 7))
    options: dict[str, Any] = {"target": [1, 2, 3, 4, 5], "contrast": 9, "baselines": baselines}
    method = Relevance(model)
    expected, delta = method.attribute(ids, return_convergence_delta=True, **options)
    terms, held = method.terms, method.held
    for size in (2, 9):
        found, deltas = method.attribute(ids, internal_batch_size=size, return_convergence_delta=True, **options)
        assert_close(found, expected, 1e-4)
        assert deltas.shape == delta.shape and (deltas - delta).abs().max() <= 1e-4
        assert method.held == held and method.terms.keys() == terms.keys()
        for name, term in terms.items():
            assert method.terms[name].shape == (5,)
            assert (method.terms[name] - term).abs().max() <= 1e-4
    with pytest.raises(InvalidInputError, match="internal_batch_size"):
        method.attribute(ids, internal_batch_size=0, **options)


def test_masks_and_baselines_of_each_example_go_with_it(mamba: nn.Module) -> None:
    ids, mask = PADDED.repeat(2, 1), MASK.repeat(2, 1)
    reference = torch.randint(1, VOCABULARY, ids.shape)
    for baselines in (reference, embed(mamba, reference), [reference, 5]):
        expected = Relevance(mamba).attribute(ids, TARGET, mask, baselines=baselines)
        found = Relevance(mamba).attribute(ids, TARGET, mask, baselines=baselines, internal_batch_size=3)
        assert_close(found, expected)


@pytest.mark.parametrize("form", ["ids", "embeddings", "embedding"])
def test_a_baseline_of_all_examples_is_that_of_any_few_of_them(form: str, mamba: nn.Module) -> None:
    ids = torch.randint(1, VOCABULARY, (8, 8))  # as many examples as tokens and components
    reference = torch.randint(1, VOCABULARY, (8,))
    baselines = {"ids": reference, "embeddings": embed(mamba, reference), "embedding": embed(mamba, reference[0])}[form]
    expected = Relevance(mamba).attribute(ids, TARGET, baselines=baselines)
    assert_close(Relevance(mamba).attribute(ids, TARGET, baselines=baselines, internal_batch_size=4), expected)


# --- Decisions ----------------------------------------------------------------------------------------------------


@both
def test_decisions_are_the_inputs_and_named(baselines: Any) -> None:
    model, method = model_of("jamba"), Relevance(model_of("jamba"))
    method.attribute(IDS, TARGET, baselines=baselines)
    if baselines is not None:
        assert method.held == {"topk"} and method.terms["decisions"].abs().max() > 1e-3
        assert method.completeness <= 1e-5
    assert model is method.model
    method.attribute(IDS, TARGET, baselines=IDS)
    assert method.held == set() and "decisions" not in method.terms  # of this call, not the last


def test_the_experts_of_the_input_are_kept() -> None:
    """What the decisions change is the score of the reference with the input's experts, less that with its own."""
    model, method = build("jamba"), Relevance(build("jamba"))
    method.attribute(IDS, TARGET, baselines=BASELINE)
    chosen: list[Tensor] = []
    routers = [m for m in model.modules() if "Router" in type(m).__name__ or hasattr(m, "router")]
    assert routers
    topk, replay = torch.topk, [False]

    def kept(x: Tensor, *args: Any, **kwargs: Any) -> Any:
        found = topk(x, *args, **kwargs)
        if not replay[0]:
            chosen.append(found.indices)
            return found
        index = chosen.pop(0)
        return type(found)((x.gather(-1, index), index))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "topk", kept)
        score(model, IDS)
        replay[0] = True
        held = score(model, torch.full_like(IDS, BASELINE))
    assert not chosen
    assert_close(method.terms["decisions"], held - score(model, torch.full_like(IDS, BASELINE)), 1e-4)


# --- What a model may call ----------------------------------------------------------------------------------------


def between(function: Callable[[Tensor], Tensor], name: str = "Strange") -> Any:
    model = build("mamba")
    norm = model.backbone.layers[1].norm

    def forward(self: Any, x: Tensor) -> Tensor:
        return function(self.norm(x))

    strange = type(name, (nn.Module,), {"forward": forward})()
    strange.norm = norm
    strange.weight = norm.weight  # a block reads its type
    model.backbone.layers[1].norm = strange
    return model.eval()


def unlisted(x: Tensor) -> Tensor:
    """A smooth function that no model calls, so that the table refuses it: ``1 - exp(-x²)``."""
    return torch.igamma(torch.ones((), dtype=x.dtype), x.square())


UNKNOWN: dict[str, Callable[[Tensor], Tensor]] = {
    "special_legendre_polynomial_p": lambda x: torch.special.legendre_polynomial_p(x, 2),
    "igammac": lambda x: torch.igammac(torch.ones((), dtype=x.dtype), x.square()),
    "igamma": unlisted,
    "frexp": lambda x: torch.frexp(x).mantissa,
}


@pytest.mark.parametrize("name", UNKNOWN)
@both
def test_a_function_without_a_rule_is_refused_with_its_module(name: str, baselines: Any, unchanged: Any) -> None:
    model = between(UNKNOWN[name])
    for checkpoints in (False, True):
        with unchanged(model, IDS), pytest.raises(UnsupportedModelError, match=rf"'{name}' in Strange.*register_rule"):
            Relevance(model, checkpoints=checkpoints).attribute(IDS, TARGET, baselines=baselines)


@contextmanager
def rule_for(what: Any, kind: Any = None, made: Any = None) -> Iterator[None]:
    if made is None:
        register_rule(what, kind)
    else:
        register_rule(what)(made)
    try:
        yield
    finally:
        unregister_rule(what)


def legendre(x: Tensor, n: int) -> Tensor:
    assert n == 2
    return 1.5 * x * x - 0.5


def assert_explained(model: nn.Module, baselines: Any, **options: Any) -> Tensor:
    method = Relevance(model, **options)
    relevance = method.attribute(IDS, TARGET, baselines=baselines)
    reference = None if baselines is None else score(model, torch.full_like(IDS, BASELINE))
    assert_adds_up(method, relevance, score(model, IDS), reference)
    return relevance


def composed_igamma(module: Any, x: Tensor) -> Tensor:
    """The module around ``unlisted``, written in functions that have a row."""
    return 1 - torch.exp(-module.norm(x).square())


@both
@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_registered_rule_is_used(baselines: Any, checkpoints: bool) -> None:
    for what, kind, made, name in (
        (torch.igamma, "elementwise", None, "igamma"),
        (torch.igammac, "elementwise", None, "igammac"),
        (torch.special.legendre_polynomial_p, None, legendre, "special_legendre_polynomial_p"),
        ("Strange", None, composed_igamma, "igamma"),
    ):
        model = between(UNKNOWN[name])
        with rule_for(what, kind, made):
            assert_explained(model, baselines, checkpoints=checkpoints)
        with pytest.raises(UnsupportedModelError, match=name):
            Relevance(model).attribute(IDS, TARGET, baselines=baselines)


def test_a_rule_of_a_module_holds_for_classes_derived_from_it(unchanged: Any) -> None:
    model = between(unlisted)
    norm = model.backbone.layers[1].norm
    norm.__class__ = type("Derived", (type(norm),), {})
    with rule_for("Strange", made=composed_igamma):
        with unchanged(model, IDS):
            assert_explained(model, BASELINE)
        norm.__class__ = type("Changed", (type(norm),), {"forward": lambda self, x: unlisted(1.1 * self.norm(x))})
        with unchanged(model, IDS), pytest.raises(FidelityError, match="wrong rule for Changed"):
            Relevance(model).attribute(IDS, TARGET, baselines=BASELINE)
    norm.__class__ = type(norm).__mro__[2]
    with pytest.raises(UnsupportedModelError, match="igamma"):
        Relevance(model).attribute(IDS, TARGET, baselines=BASELINE)


@both
def test_a_wrong_rule_of_a_module_is_found_out(baselines: Any, unchanged: Any) -> None:
    model = between(unlisted)
    for checkpoints in (False, True):
        with (
            rule_for("Strange", made=lambda module, x: module.norm(x) * 0.9),
            unchanged(model, IDS),
            pytest.raises(FidelityError, match=r"layers\.1\.norm.*wrong rule for Strange"),
        ):
            Relevance(model, checkpoints=checkpoints).attribute(IDS, TARGET, baselines=baselines)


def test_a_wrong_kind_of_a_function_is_found_out() -> None:
    """A function that is not linear, called linear, does not add up."""
    model = between(unlisted)
    with rule_for(torch.igamma, "linear"), pytest.raises(FidelityError, match="whole model"):
        Relevance(model).attribute(IDS, TARGET, baselines=BASELINE)


def test_a_rule_is_registered_once_and_forgotten_once() -> None:
    for what, kind in ((torch.igamma, "elementwise"), ("Strange", None)):
        made = (lambda module, x: x) if kind is None else None
        with rule_for(what, kind, made), pytest.raises(ValueError, match=r"already registered.*unregister_rule"):
            register_rule(what, kind) if kind else register_rule(what)(made)  # type: ignore[arg-type]
        with pytest.raises(KeyError):
            unregister_rule(what)
    with pytest.raises(ValueError, match="already registered"):
        register_rule(torch.exp, "linear")
    for what, kind in ((torch.igamma, "quadratic"), ("Strange", "linear")):
        with pytest.raises(ValueError, match="not a kind"):
            register_rule(what, kind)  # type: ignore[arg-type]
        with pytest.raises(KeyError):
            unregister_rule(what)


CALLED: dict[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda x: x.softmax(-1),
    "layer norm": lambda x: nn.functional.layer_norm(x, (8,)),
    "attention": lambda x: nn.functional.scaled_dot_product_attention(x, x, x, is_causal=True),
    "in place": lambda x: x.mul_(2).add_(1),
    "loop": lambda x: torch.stack([x[:, : t + 1].sum(1) * x[:, t].sigmoid() for t in range(x.shape[1])], 1),
    "buffer": lambda x: fill(torch.zeros_like(x.detach()), x),
    "largest": lambda x: x + x.max(-1, keepdim=True).values,
    "decision": lambda x: torch.where(x > 0, x, 0.1 * x),
    "mask": lambda x: x * (x.mean(-1, keepdim=True) > 0).to(x.dtype),
}


def fill(buffer: Tensor, x: Tensor) -> Tensor:
    for t in range(x.shape[1]):
        buffer[:, t] = x[:, t] * x[:, max(t - 1, 0)]
    return buffer


@pytest.mark.parametrize("name", CALLED)
@both
def test_code_between_the_layers_is_followed(name: str, baselines: Any) -> None:
    for checkpoints in (False, True):
        assert_explained(between(CALLED[name]), baselines, checkpoints=checkpoints)


@both
def test_embeddings_are_changed_in_place(baselines: Any, mamba: Any) -> None:
    """As a model does that scales them."""
    block = mamba.backbone.layers[0]
    forward = type(block).forward
    block.__class__ = type(
        "Scaled", (type(block),), {"forward": lambda self, x, **kwargs: forward(self, x.mul_(2.0), **kwargs)}
    )
    assert_explained(mamba, baselines)


# --- Refusals -----------------------------------------------------------------------------------------------------


def named(value: Any) -> str:
    return f"{value.dtype} {tuple(value.shape)}" if isinstance(value, Tensor) else str(value)


@pytest.mark.parametrize(
    "baselines",
    [
        VOCABULARY, -1, torch.full((2, 6), 5), torch.full((3, 7), 5), torch.full((2, 7, 8), 5), torch.zeros(2, 6, 8),
        torch.full((8,), torch.nan), torch.full((8,), torch.inf), [5, VOCABULARY], [], "[MASK]", (5, 6),
        torch.zeros(2, 7, 9), torch.zeros(3),
    ],
    ids=named,
)  # fmt: skip
def test_a_baseline_that_does_not_fit_is_refused(baselines: Any, mamba: nn.Module, unchanged: Any) -> None:
    with unchanged(mamba, IDS), pytest.raises(InvalidInputError, match=r"baseline|Token ids"):
        Relevance(mamba).attribute(IDS, TARGET, baselines=baselines)


@pytest.mark.parametrize(
    "baselines", [torch.zeros(2, 6, 8), torch.zeros(9), float("nan"), torch.zeros(3, 7, 8), [0.0, torch.inf]], ids=named
)
def test_a_baseline_that_does_not_fit_embeddings_is_refused(baselines: Any, mamba: nn.Module, unchanged: Any) -> None:
    x = embed(mamba, IDS)
    with unchanged(mamba, x), pytest.raises(InvalidInputError, match="baseline"):
        Relevance(mamba).attribute(x, TARGET, baselines=baselines)


def test_unknown_options_are_refused(mamba: nn.Module, unchanged: Any) -> None:
    with unchanged(mamba, IDS):
        for options in (
            {"gate_rule": "all"}, {"apart": "bias"}, {"apart": ("skip", "conv")}, {"gate_rule": None},
            {"value_share": -0.1}, {"value_share": 1.1},
        ):  # fmt: skip
            with pytest.raises(InvalidInputError):
                Relevance(mamba, **options)
        with pytest.raises(InvalidInputError, match="checkpoints"):
            Relevance(mamba, apart="skip", checkpoints=True)
        for sign in ("net", "", 1):
            with pytest.raises(InvalidInputError, match="sign"):
                Relevance(mamba).attribute(IDS, TARGET, sign=sign)  # type: ignore[arg-type]
        for inputs in (IDS[0], IDS[:, :0], IDS + VOCABULARY):
            with pytest.raises(InvalidInputError):
                Relevance(mamba).attribute(inputs, TARGET)
        for target in (VOCABULARY, None, [1, 2, 3]):
            with pytest.raises(AssertionError):
                Relevance(mamba).attribute(IDS, target)


@both
def test_a_forward_function_that_reads_nothing_is_refused(baselines: Any, mamba: nn.Module, unchanged: Any) -> None:
    with unchanged(mamba, IDS), pytest.raises(InvalidInputError, match="does not depend on the inputs"):
        Relevance(lambda ids: torch.ones(len(ids), 9), model=mamba).attribute(IDS, TARGET, baselines=baselines)


@both
def test_a_model_that_is_not_known_is_followed_function_by_function(baselines: Any, mamba: nn.Module) -> None:
    """With a reference its relevance is the same but for the share of a product; without one, gates are halved."""
    method = Relevance(last_logits(mamba))
    scores = method.attribute(IDS, TARGET, baselines=baselines)
    known = Relevance(mamba).attribute(IDS, TARGET, baselines=baselines)
    assert method.fidelity == {} and method.completeness <= 1e-5
    if baselines is not None:
        torch.testing.assert_close(scores.sum(1), known.sum(1), atol=1e-4, rtol=1e-4)


@both
def test_a_training_or_broken_model_is_refused(baselines: Any, mamba: Any, unchanged: Any) -> None:
    mamba.backbone.layers[0].train()
    with unchanged(mamba, IDS), pytest.raises(ModelStateError, match="training"):
        Relevance(mamba).attribute(IDS, TARGET, baselines=baselines)
    mamba.eval()
    mamba.backbone.layers[1].mixer.D.data[0] = torch.nan
    with unchanged(mamba, IDS), pytest.raises(ModelStateError, match="NaN"):
        Relevance(mamba).attribute(IDS, TARGET, baselines=baselines)


def patch(mixer: nn.Module, factor: float, named: bool = True) -> None:
    """Give a mixer's class another forward pass, ``factor`` times its own."""
    own = type(mixer).forward

    def forward(self: nn.Module, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        return factor * own(self, hidden_states, *args, **kwargs)

    def of_any_arguments(self: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        return factor * own(self, *args, **kwargs)

    mixer.__class__ = type("Patched", (type(mixer),), {"forward": forward if named else of_any_arguments})


@both
@pytest.mark.parametrize("with_kwargs", [False, True])
def test_a_hook_that_changes_what_a_layer_gives_is_followed(baselines: Any, with_kwargs: bool, mamba: Any) -> None:
    def behind(module: nn.Module, *arguments: Any) -> Any:
        y = arguments[-1]
        return y + y.roll(1, 1)

    mixer = mamba.backbone.layers[1].mixer
    mixer.register_forward_pre_hook(lambda module, args: (args[0].flip(1), *args[1:]))
    mixer.register_forward_hook(behind, with_kwargs=with_kwargs)
    method = Relevance(mamba)
    scores = method.attribute(IDS, TARGET, baselines=baselines)
    own = score(mamba, IDS) - (0 if baselines is None else score(mamba, torch.full_like(IDS, baselines)))
    assert_close(scores.sum(1) + sum(method.terms.values()), own)
    assert "layers.1.mixer" in method.followed["backbone.layers.1.mixer"]


@both
def test_a_layer_whose_input_has_no_name_is_followed(baselines: Any, mamba: Any) -> None:
    expected = Relevance(mamba).attribute(IDS, TARGET, baselines=baselines)
    patch(mamba.backbone.layers[1].mixer, 1.0, named=False)
    found = Relevance(mamba).attribute(IDS, TARGET, baselines=baselines)
    assert_close(found, expected)


@both
@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_patched_layer_is_followed_as_it_is(baselines: Any, checkpoints: bool, mamba: Any, unchanged: Any) -> None:
    """Its decomposition is not the layer's, so its own code counts; who asks for a part of the former is refused."""
    mixer = mamba.backbone.layers[1].mixer
    patch(mixer, 1.1)
    method = Relevance(mamba, checkpoints=checkpoints)
    with unchanged(mamba, IDS):
        scores = method.attribute(IDS, TARGET, baselines=baselines)
    with torch.no_grad():
        own = score(mamba, IDS) - (0 if baselines is None else score(mamba, torch.full_like(IDS, baselines)))
    assert_close(scores.sum(1) + sum(method.terms.values()), own)
    assert list(method.followed) == [f"backbone.layers.{n}.mixer" for n in range(len(method.followed))]
    assert method.followed["backbone.layers.0.mixer"] == "decomposition"
    assert "layers.1.mixer" in method.followed["backbone.layers.1.mixer"]
    with unchanged(mamba, IDS), pytest.raises(FidelityError, match=r"layers\.1\.mixer"):
        Relevance(mamba, apart="skip").attribute(IDS, TARGET, baselines=baselines)


@pytest.mark.parametrize("family", ["mamba", "jamba", "qwen3_5", "rwkv"])
@pytest.mark.parametrize("checkpoints", [False, True])
def test_a_call_leaves_everything_as_it_was(family: str, checkpoints: bool, unchanged: Any) -> None:
    model = build(family)
    x = embed(model, IDS).requires_grad_()
    x.grad = torch.ones_like(x)
    reference = torch.zeros_like(x)
    before = score(model, IDS)
    with unchanged(model, IDS, x, reference, MASK):
        for baselines in (None, BASELINE):
            Relevance(model, checkpoints=checkpoints).attribute(IDS, TARGET, MASK, baselines=baselines)
        Relevance(model, checkpoints=checkpoints).attribute(x, TARGET, baselines=reference)
    assert torch.equal(score(model, IDS), before)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("checkpoints", [False, True])
@both
def test_the_grad_mode_around_the_call_changes_nothing(
    mode: Any, checkpoints: bool, baselines: Any, mamba: nn.Module
) -> None:
    x = embed(mamba, IDS)
    method = Relevance(mamba, checkpoints=checkpoints)
    expected = [method.attribute(inputs, TARGET, MASK, baselines=baselines) for inputs in (IDS, x)]
    with mode():
        reference = None if baselines is None else torch.full_like(IDS, BASELINE)
        found = [method.attribute(i.clone(), TARGET, MASK.clone(), baselines=baselines) for i in (IDS, x)]
        assert torch.equal(method.attribute(IDS, TARGET, MASK, baselines=reference), expected[0])
    assert all(map(torch.equal, found, expected))


# --- Numbers ------------------------------------------------------------------------------------------------------


def scaled(model: nn.Module, name: str, factor: float) -> nn.Module:
    """Return the model with every parameter whose name ends with this one scaled."""
    with torch.no_grad():
        for parameter in [p for key, p in model.named_parameters() if key.endswith(name)]:
            parameter.mul_(factor)
    return model


def assert_float32_is_float64(model: nn.Module, wide: nn.Module | None = None, tolerance: float = 1e-4) -> None:
    """The scores of each example differ by no more than this, relative to the largest of them."""
    ids = torch.randint(1, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(5))
    wide = wide or of_type(copy.deepcopy(model), torch.float64)
    found, expected = (Relevance(each).attribute(ids, TARGET, baselines=BASELINE).double() for each in (model, wide))
    assert ((found - expected).abs().amax(1) <= tolerance * expected.abs().amax(1)).all()


@every_family
def test_the_scores_of_float32_are_those_of_float64(family: str) -> None:
    assert_float32_is_float64(model_of(family), of_wide_type(family))


@pytest.mark.parametrize("factor", [4, 16, 64])
def test_large_keys_of_rwkv_keep_the_scores_of_float64(factor: float) -> None:
    """Keys of value and reference are then up to hundreds apart."""
    model = FAMILIES["rwkv"].build(rescale_every=0)
    assert_float32_is_float64(scaled(model, "attention.key.weight", factor))


@pytest.mark.parametrize("factor", [10, 40])
@pytest.mark.parametrize("family", ["jamba", "zamba", "zamba2", "bamba", "minimax", "kimi_linear", "recurrent_gemma"])
def test_large_queries_of_a_softmax_keep_the_scores_of_float64(family: str, factor: float) -> None:
    assert_float32_is_float64(scaled(build(family), "q_proj.weight", factor))


@pytest.mark.parametrize("factor", [3, 100])
def test_large_gates_of_mlstm_keep_the_scores_of_float64(factor: float) -> None:
    assert_float32_is_float64(scaled(build("xlstm"), "igate_preact.weight", factor))


# --- Half precision -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "xlstm"])
@both
def test_a_model_of_half_precision_is_explained_much_as_in_float32(family: str, baselines: Any) -> None:
    """As far as it is the same model: an expert that rounding exchanges may change a single sentence's scores."""
    ids = torch.randint(1, VOCABULARY, (8, 7), generator=torch.Generator().manual_seed(2))
    method = Relevance(of_half_type(family))
    found = method.attribute(ids, TARGET, baselines=baselines)
    assert found.dtype == torch.float32 and found.isfinite().all()
    expected = Relevance(model_of(family)).attribute(ids, TARGET, baselines=baselines)
    assert torch.cosine_similarity(found, expected, dim=1).median() > 0.9


# --- Captum -------------------------------------------------------------------------------------------------------


@every_rule
@several_families
def test_the_convergence_delta_is_the_true_one(rule: str, family: str) -> None:
    options, baselines = RULES[rule]
    model = model_of(family)
    method = Relevance(model, **options)
    relevance, delta = method.attribute(IDS, TARGET, baselines=baselines, return_convergence_delta=True)
    explained = score(model, IDS) - (0 if baselines is None else score(model, torch.full_like(IDS, BASELINE)))
    assert delta.shape == (2,)
    assert (delta - (relevance.sum(1) + sum(method.terms.values()) - explained)).abs().max() <= 1e-5
    assert delta.abs().max() <= 1e-3 * explained.abs().max()


def test_the_convergence_delta_is_to_the_model_and_not_to_its_decomposition(mamba: Any) -> None:
    """A layer off by a hundredth, which the tolerance lets pass, shows."""
    patch(mamba.backbone.layers[1].mixer, 1.01)
    method = Relevance(mamba, tolerance=0.1)
    for baselines in (None, BASELINE):
        relevance, delta = method.attribute(IDS, TARGET, baselines=baselines, return_convergence_delta=True)
        explained = score(mamba, IDS) - (0 if baselines is None else score(mamba, torch.full_like(IDS, BASELINE)))
        assert delta.abs().max() > 1e-4
        assert_close(delta, relevance.sum(1) + sum(method.terms.values()) - explained, 1e-2)


def test_the_method_answers_what_captum_asks(mamba: nn.Module) -> None:
    method = Relevance(mamba)
    assert isinstance(method, GradientAttribution)
    assert method.has_convergence_delta() is True
    assert isinstance(method.attribute(IDS, TARGET), Tensor)
    assert torch.equal(method.attribute.__wrapped__(method, IDS, TARGET), method.attribute(IDS, target=TARGET))
    with pytest.raises(TypeError):
        method.attribute(IDS, TARGET, None, BASELINE)  # baselines by name alone
    with pytest.raises(NotImplementedError):
        method.attribute_future(IDS, TARGET)


def test_the_relevance_is_said_to_be_a_part_of_the_score(mamba: nn.Module) -> None:
    """As Captum's own InputXGradient, LRP and DeepLift do."""
    assert Relevance(mamba).multiplies_by_inputs is True


def test_captums_own_delta_of_embeddings_is_about_zero(mamba: nn.Module) -> None:
    x, reference = (embed(mamba, ids) for ids in (IDS, torch.full_like(IDS, BASELINE)))
    method = Relevance(last_logits(mamba), model=mamba)
    relevance, delta = method.attribute(x, TARGET, baselines=reference, return_convergence_delta=True)
    captums = method.compute_convergence_delta(relevance, reference, x, target=TARGET)
    assert captums.shape == (2,) and captums.abs().max() <= 1e-5
    assert (captums - delta).abs().max() <= 1e-5
    wrong = method.compute_convergence_delta(2 * relevance, reference, x, target=TARGET)
    assert wrong.abs().max() > 1e-2


@both
def test_a_noise_tunnel_runs_the_method(baselines: Any, mamba: nn.Module) -> None:
    x = embed(mamba, IDS)
    reference = None if baselines is None else torch.zeros_like(x[:1])
    method = Relevance(mamba)
    expected = method.attribute(x, TARGET, baselines=reference)
    options: dict[str, Any] = {"target": TARGET, "nt_samples": 3}
    if reference is not None:  # a tunnel takes None for 0
        options["baselines"] = reference
    assert_close(NoiseTunnel(method).attribute(x, stdevs=0.0, **options), expected)
    noisy = NoiseTunnel(method).attribute(x, stdevs=0.3, **options)
    assert noisy.shape == x.shape and noisy.isfinite().all()
    assert_differ(noisy, expected)
    found, delta = NoiseTunnel(method).attribute(x, stdevs=0.0, return_convergence_delta=True, **options)
    assert_close(found, expected)
    assert delta.abs().max() <= 1e-4


@pytest.mark.parametrize("kinds", [["full_attention"] * 2, ["linear_attention", "full_attention"]])
def test_packed_texts_are_explained_as_the_model_reads_them(kinds: list[str], ids: Tensor) -> None:
    """Attention keeps texts apart whose positions begin at 0 anew; a recurrence without CUDA kernels does not."""
    model = FAMILIES["qwen3_5"].build_here(layer_types=kinds, num_hidden_layers=2)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2, 3]])

    def forward(ids: Tensor) -> Tensor:
        packed: Tensor = model(input_ids=ids, position_ids=positions.expand(len(ids), -1), use_cache=False).logits
        return packed[:, -1]

    other = torch.cat([ids[:, :3].flip(0), ids[:, 3:]], 1)
    reads = bool((forward(other) - forward(ids)).abs().max() > 1e-5)
    assert reads == ("linear_attention" in kinds)
    for baselines in (3, None):
        scores = Relevance(forward, model).attribute(ids[:1], 1, baselines=baselines)
        assert bool((scores[:, :3].abs() > 1e-5 * scores.abs().max()).any()) == reads
