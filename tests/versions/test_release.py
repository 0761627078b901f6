"""Every family that the installed release of transformers has is exact, or the release's own code is named.

What is expected comes from the release: its models' own outputs, sums and rounding, and the blocks as they stand in the
records. Where its code cannot run a model, or runs it wrongly, the error says which release does it right.
"""

import traceback
from collections.abc import Iterator
from functools import cache
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor

from captum_ssm import (
    FidelityError,
    ImplicitAttentionRelevance,
    InvalidInputError,
    LayerImplicitAttention,
)
from captum_ssm.layers.call import LayerCall
from captum_ssm.layers.fidelity import decompose
from captum_ssm.layers.release import NEWEST
from captum_ssm.network.recording import record_mixers
from tests.conftest import HAD, build
from tests.families import EARLIER, FAMILIES
from tests.families.record import is_causal
from tests.test_families import IDS, LENGTHS, TARGET, assert_close, mixers_of, model_of, padded, walk_of
from tests.test_families import METHODS as OTHERS

every_family = pytest.mark.parametrize("family", sorted(HAD))
METHODS = {name: OTHERS[name] for name in ("signed", "channel", "rollout absolute")}
METHODS["relevance"] = ImplicitAttentionRelevance


@cache
def untouched(family: str) -> Any:
    """Return a model that explanations alone run, which leave it as it was; some releases keep their states on it."""
    return build(family)


def own_logits(model: Any, ids: Tensor, mask: Tensor | None = None) -> Tensor:
    with torch.no_grad():
        logits: Tensor = model(input_ids=ids, attention_mask=mask, use_cache=False).logits
    return logits


def calls_of(model: Any) -> list[LayerCall]:
    with torch.no_grad(), record_mixers(model) as calls:
        model(input_ids=IDS, use_cache=False)
    return calls


@every_family
def test_every_mixer_is_decomposed(family: str) -> None:
    model = model_of(family)
    calls = calls_of(model)
    names = {call.name: type(call.mixer).__name__ for call in calls}
    assert {name: EARLIER.get(kind, kind) for name, kind in names.items()} == mixers_of(family, model)
    assert max(decompose(call).error for call in calls) <= 1e-5
    for name in names:
        matrix = LayerImplicitAttention(model, name).attribute(IDS)
        assert matrix.triu(1).eq(0).all() and matrix.isfinite().all()


@every_family
def test_the_rollout_is_the_product_of_the_blocks_matrices(family: str) -> None:
    walk = walk_of(family)
    for method, matrices in (
        ("rollout absolute", walk.matrices("absolute")),
        ("signed", walk.gradient_weighted(None)),
        ("channel", walk.gradient_weighted("channel")),
    ):
        scores = METHODS[method](walk.model).attribute(IDS, target=TARGET)
        assert_close(scores, walk.rolled_out(matrices), method)


@every_family
@pytest.mark.parametrize("baselines", [None, 3], ids=["score", "difference"])
def test_the_relevance_adds_up_to_what_the_model_gives(family: str, baselines: int | None) -> None:
    model, method = model_of(family), ImplicitAttentionRelevance(model_of(family))
    relevance, delta = method.attribute(IDS, TARGET, baselines=baselines, return_convergence_delta=True)
    expected = own_logits(model, IDS)[:, -1, TARGET]
    if baselines is not None:
        expected = expected - own_logits(model, torch.full_like(IDS, baselines))[:, -1, TARGET]
    terms = sum(method.terms.values(), torch.zeros(2))
    scale = relevance.abs().sum(1)
    assert ((relevance.sum(1) + terms - expected).abs() <= 1e-5 * scale).all()
    assert (delta.abs() <= 1e-5 * scale).all()


@every_family
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_no_score_or_is_refused(family: str, side: str) -> None:
    """Alone and in a batch: earlier releases mask a batch of one sequence otherwise than one of several."""
    for name in ("signed", "relevance"):
        make = METHODS[name]
        for rows in (slice(0, 2), slice(1, 2)):
            model, (ids, mask) = build(family), padded(side, width=9)
            ids, mask = ids[rows], mask[rows]
            try:
                read = own_logits(model, ids, mask)
            except Exception as error:  # the release cannot run this
                with pytest.raises(type(error)):
                    make(model).attribute(ids, TARGET, additional_forward_args=mask)
                continue
            alone = [each[None, :n] for each, n in list(zip(IDS, LENGTHS))[rows]]
            own = [own_logits(build(family), each)[0] for each in alone]
            ignores = all(torch.allclose(t[m == 1], o, atol=1e-4) for t, m, o in zip(read, mask, own))
            try:
                scores = make(untouched(family)).attribute(ids, TARGET, additional_forward_args=mask)
            except (InvalidInputError, FidelityError) as error:
                assert not ignores, error
                assert isinstance(error, InvalidInputError) or NEWEST in str(error)
                continue
            assert scores[mask == 0].eq(0).all() or not ignores
            for row, each in enumerate(alone if ignores else []):
                expected = make(untouched(family)).attribute(each, TARGET)[0]
                assert_close(scores[row][mask[row] == 1], expected, "signed" if name == "relevance" else name)


def variants(family: str) -> Iterator[tuple[str, Any]]:
    """Yield the family's models with the options of its layers that this release's own code runs and has right."""
    for layer in FAMILIES[family].layers.values():
        for name, options in layer.options.items():
            model = FAMILIES[family].build_here(**options)
            if model is not None:
                yield name, model


@every_family
def test_every_option_is_exact(family: str) -> None:
    for name, model in variants(family):
        assert max(decompose(call).error for call in calls_of(model)) <= 1e-5, name


@pytest.mark.parametrize("family", ["zamba2", "nemotron_h", "xlstm"])
def test_a_fault_of_the_release_is_named(family: str) -> None:
    """Several chunks: some earlier releases carry the state between them wrongly, or not at all."""
    options = {"chunk_size": 2, **({"num_mem_blocks": 1} if family == "zamba2" else {})}
    try:
        model = FAMILIES[family].build(**options)
    except Exception as error:
        pytest.skip(f"transformers {transformers.__version__} cannot build {family}: {error}")
    method = METHODS["signed"](model)
    try:
        right = is_causal(model)
    except Exception as own:
        with pytest.raises(type(own)) as raised:
            method.attribute(IDS, TARGET)
        assert transformers.__version__ in "".join(traceback.format_exception_only(raised.value))
        return
    if right:
        method.attribute(IDS, TARGET)
        assert max(method.fidelity.values()) <= 1e-5
    else:
        with pytest.raises(FidelityError, match=rf"transformers {transformers.__version__}.*{NEWEST}"):
            method.attribute(IDS, TARGET)


@every_family
def test_float64_is_exact(family: str) -> None:
    model = build(family)
    for module in model.modules():
        config: Any = getattr(module, "config", None)
        if hasattr(config, "_experts_implementation"):
            config._experts_implementation = "eager"
    model = model.double()
    method = METHODS["signed"](model)
    scores = method.attribute(IDS, TARGET)
    assert max(method.fidelity.values()) <= 1e-5
    assert_close(scores, METHODS["signed"](model_of(family)).attribute(IDS, TARGET), "signed")


@pytest.mark.parametrize("family", FAMILIES)
def test_the_release_has_the_family(family: str) -> None:
    """Skipped by name where it has not; the other tests are of those that it has."""
    assert family in HAD
