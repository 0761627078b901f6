"""The README's Python runs as it stands."""

import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch

from captum_ssm import supported, unregister
from tutorials.vision_mamba import load_digits_model, two_digit_canvases

README = Path(__file__).parents[1] / "README.md"

BLOCKS = re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)
FIRST, CALLABLE, CONTRAST, RELEVANCE, METRICS, ANY_MODEL, IMAGES, GENERATION, ADAPTER = BLOCKS
DERIVATION = README.parent / "docs" / "relevance.md"


@pytest.fixture
def restored_registry() -> Iterator[None]:
    before = set(supported())
    yield
    for support in set(supported()) - before:
        unregister(support.layer)


def test_the_examples_explain_the_shipped_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    names: dict[str, Any] = {}
    exec(FIRST, names)
    assert names["scores"].shape == names["inputs"].input_ids.shape
    for block in (CALLABLE, CONTRAST):
        del names["scores"]
        exec(block, names)
        assert names["scores"].shape == names["inputs"].input_ids.shape
    del names["scores"]
    exec(RELEVANCE, names)
    assert names["scores"].shape == names["inputs"].input_ids.shape
    assert float(names["gap"].abs().max()) < 1e-4
    exec(METRICS, names)
    assert float((names["kept"] - names["lost"]).area.mean()) > 0 and Path("curves.png").stat().st_size > 1000
    exec(GENERATION, names)
    result = names["result"]
    assert result.token_attr.shape == (len(result.output_tokens), len(result.input_tokens))
    assert len(result.input_tokens) == names["prompt"].shape[1] + len(result.output_tokens) - 1
    plt.close(names["figure"])


def test_the_example_of_any_model_adds_up() -> None:
    names: dict[str, Any] = {}
    exec(ANY_MODEL, names)
    forecast, (series, features), (usual, _) = names["forecast"], names["inputs"], names["usual"]
    with torch.no_grad():
        difference = forecast(series, features) - forecast(usual.expand_as(series), torch.zeros_like(features))
    found = names["of_series"].sum((1, 2)) + names["of_features"].sum(1)
    torch.testing.assert_close(found, difference[:, 0], atol=1e-5, rtol=1e-5)


def test_the_examples_explain_images() -> None:
    canvases = two_digit_canvases(2)
    model = load_digits_model()
    names: dict[str, Any] = {"model": model, "images": canvases.images, "answers": model(canvases.images).argmax(1)}
    exec(IMAGES, names)
    assert names["scores"].shape == canvases.images.shape and names["grid"].shape == (2, 8, 8)


def test_the_derivation_of_relevance_holds_on_the_shipped_model() -> None:
    (block,) = re.findall(r"```python\n(.*?)```", DERIVATION.read_text(encoding="utf-8"), re.DOTALL)
    exec(block, {})  # it ends in asserts


def test_the_example_of_an_adapter_holds_every_law(restored_registry: None, capsys: pytest.CaptureFixture[str]) -> None:
    exec(ADAPTER, {})
    assert "AdapterReport(fidelity=" in capsys.readouterr().out


def test_every_file_that_the_readme_links_to_exists() -> None:
    links = re.findall(r"\]\(([^)#]+)\)", README.read_text(encoding="utf-8"))
    local = [link for link in links if "://" not in link]
    assert len(local) > 5
    assert [link for link in local if not (README.parent / link).exists()] == []
