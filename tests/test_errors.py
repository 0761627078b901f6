"""Errors link to their places in the documentation, and pass between processes as they are."""

import copy
import pickle
import re
import traceback
from pathlib import Path

import pytest

from captum_ssm import errors

PAGE = Path(__file__).parents[1] / "docs" / "errors.md"
ERRORS = [
    errors.UnsupportedModelError("no layer"),
    errors.InvalidInputError("no token"),
    errors.ModelStateError("NaN"),
    errors.FidelityError("layers.0", 0.5, 1e-5, "a hook"),
    errors.CompletenessError(0.5, 1e-3, "a kernel, "),
]
every_error = pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)


def test_every_class_of_errors_is_tried() -> None:
    classes = {kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, Exception)}
    assert {kind for kind in classes if not kind.__name__.startswith("_")} == {type(error) for error in ERRORS}


@every_error
def test_a_traceback_ends_in_the_place_of_the_error_and_the_message_is_as_it_was(error: Exception) -> None:
    lines = "".join(traceback.format_exception(error)).rstrip().split("\n")
    name = type(error).__name__
    assert lines[-1] == f"See {errors.PAGE}#{name.lower()}" and errors.PAGE not in str(error)
    headings = re.findall(r"^## (.*)$", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    assert f"`{name}`" in headings, "the page has a heading, which is the anchor"


@every_error
def test_an_error_passes_to_another_process_as_it_is(error: Exception) -> None:
    for other in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(other) is type(error) and str(other) == str(error)
        assert vars(other) == vars(error) and traceback.format_exception(other) == traceback.format_exception(error)


def test_an_error_of_ones_own_has_the_place_of_its_base() -> None:
    class Own(errors.InvalidInputError):
        """An error of another package."""

    assert Own("x").docs == errors.InvalidInputError.docs


def test_the_page_quotes_messages_as_they_are() -> None:
    sources = (path.read_text(encoding="utf-8") for path in Path(errors.__file__).parent.rglob("*.py"))
    text = re.sub(r'"\s*f?"', "", " ".join(" ".join(sources).split()))  # messages over several lines are one
    rows = re.findall(r"^\| (\".*?) \|", PAGE.read_text(encoding="utf-8"), re.MULTILINE)
    quoted = [quote for row in rows for quote in re.findall(r'"(.*?)"', row)]
    assert len(quoted) > 15 and not [quote for quote in quoted if quote not in text]
