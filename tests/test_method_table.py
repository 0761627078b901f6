"""The page of methods by kind of model is that of these sources."""

import re
from typing import Any

import pytest

from scripts import method_table

ERROR = re.compile(r"\d(?:\.\d+)?e-\d+")


@pytest.fixture(scope="module")
def found() -> Any:
    return method_table.results()


def without_errors(text: str) -> str:
    """Replace measured errors, which rounding may move, after a check that they are of its size."""
    assert all(float(error) <= 1e-4 for error in ERROR.findall(text))
    return ERROR.sub("error", text)


def test_the_page_is_current(found: Any) -> None:
    """Renew it by ``python -m scripts.method_table --write``."""
    page = method_table.PAGE.read_text(encoding="utf-8")
    assert without_errors(page) == without_errors(method_table.page(found))


def test_relevance_explains_all_that_is_written_in_torch(found: Any) -> None:
    for name, (_, cells) in found.items():
        outside = any(word in name for word in ("leaves torch", "torch.jit", "random"))
        assert all(bool(cell.cause) == outside for cell in cells[:2]), name
        assert all(cell.cause or cell.error <= 5e-5 for cell in cells), name


def test_each_cause_is_a_whole_sentence(found: Any) -> None:
    causes = {cell.cause for _, cells in found.values() for cell in cells if cell.cause}
    assert len(causes) >= 5 and all(20 < len(cause) < 250 for cause in causes)
