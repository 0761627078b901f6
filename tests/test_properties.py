"""Some hundred models and calls, drawn at random, hold the laws of :mod:`tests.properties`; more by its own runs."""

import warnings
from collections import Counter

import pytest

from tests.properties.calls import became, drawn_call, subjects
from tests.properties.laws import Outcome, outcomes
from tests.properties.pieces import AROUND, BESIDE, MIXERS, READ, WORDS

SEED, MODELS, CALLS = 1, 100, 900


@pytest.mark.slow
@pytest.mark.parametrize("part", range(5))
def test_every_drawn_model_is_explained_rightly_or_refused(part: int) -> None:
    said: Counter[str] = Counter()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(part, MODELS, 5):
            text, results = outcomes(SEED, number)
            wrong = [outcome for outcome in results if outcome.is_wrong]
            assert not wrong, f"python -m tests.properties.run --seed {SEED} --only {number}: {text}\n{wrong}"
            said.update(outcome.result.split(":")[0] for outcome in results)
    assert said["right"] >= said["refused"] / 2


@pytest.mark.slow
def test_every_drawn_call_is_right_or_refused_and_changes_nothing() -> None:
    explained, said = subjects(), Counter[str]()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for number in range(CALLS):
            call = drawn_call(explained, SEED, number)
            result, detail = became(call)
            assert "WRONG" not in result, f"calls --seed {SEED} --only {number}: {call.text}\n{result}: {detail}"
            said[result] += 1
    assert said["scores"] >= CALLS / 5


def test_a_model_is_the_same_for_the_same_number() -> None:
    first, second = outcomes(SEED, 3), outcomes(SEED, 3)
    assert first == second and all(isinstance(outcome, Outcome) for outcome in first[1])


def test_the_words_of_the_grammar_are_many() -> None:
    assert min(len(AROUND), len(BESIDE), len(MIXERS), len(READ), len(WORDS)) > 15
